"""The tuner: puts adapter layers into a model, switches, saves and loads adapters, for all methods alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.integrations import init_empty_weights
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from loraplex.io.field_types import shown
from loraplex.io.reading import message_of
from loraplex.runtime.packing import guard
from loraplex.runtime.placement import refuse_loaded_with_parent
from loraplex.tuner.attempt import Attempt, all_or_nothing, running
from loraplex.tuner.bank import find_bank, link, shared_by
from loraplex.tuner.combine import COMBINATIONS, add_weighted_adapter
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.experts import adapt_parameters, patterns_for_parameters
from loraplex.tuner.layer import AdapterLayer, AdapterLinear, put_around
from loraplex.tuner.left_out import add_bare_weights, warn_of_left_out
from loraplex.tuner.load_checks import back_up_values, check_config, check_tensors, warn_of_nonfinite, weights_of
from loraplex.tuner.mixed_batches import passed_down
from loraplex.tuner.model_merging import MergingModel
from loraplex.tuner.saved_tensors import (
    check_none_lost,
    read_tensors,
    shared_with_prefix,
    to_model_keys,
    to_their_dtypes,
)
from loraplex.tuner.schedule import Scheduled
from loraplex.tuner.schedule_callback import join_trainers
from loraplex.tuner.sharing import SharedFactors
from loraplex.tuner.tokens import adapted_too, check_tokens, pass_adapters_without_tokens
from loraplex.tuner.updates import ROOT


class AdapterModel(MergingModel):
    """Abstract tuner. A method subclasses it once, to name its prefix; every subclass can host every method."""

    # The bank is one too: switching and deleting adapters must reach it.
    tuner_layer_cls = AdapterLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        for attempt in running():
            attempt.ours = True
        all_or_nothing(model, lambda: super(AdapterModel, self).__init__(model, *args, **kwargs))

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Adapt the targets of `peft_config[adapter_name]`, and link what they share.

        PEFT's injection hooks would not do: they run for the first adapter only, and a second one would not share.
        If it is known what will be loaded, that is checked first. On an error the model is left as it was.
        """
        config: AdapterConfig = self.peft_config[adapter_name]  # type: ignore[assignment]
        for attempt in running():
            attempt.ours = True
        everything = add_bare_weights(model, config)
        put = partial(self._put, model, adapter_name, autocast_adapter_dtype, state_dict=state_dict)

        def change() -> None:
            put(low_cpu_mem_usage=low_cpu_mem_usage)
            guard(model)
            back_up_values(model, keys)

        try:
            check_config(model, config)
            weights = weights_of(config)
            keys = [] if weights is None else self._rehearse(model, adapter_name, put, weights)
            all_or_nothing(model, change)
            if everything:
                warn_of_left_out(model, config)
        except BaseException as error:
            self.peft_config.pop(adapter_name, None)
            if isinstance(error, ValueError):
                # PEFT's messages repeat a config's values, however long they are.
                error.args = (message_of(error),)
            raise

    def _rehearse(
        self, model: nn.Module, adapter_name: str, put: Callable[..., None], weights: str | dict[str, Tensor]
    ) -> list[str]:
        """Check on the meta device whether `weights` fit the adapter: a config may ask for more than memory holds.

        Returns:
            The keys in the model of the tensors that will be loaded.
        """
        config: AdapterConfig = self.peft_config[adapter_name]  # type: ignore[assignment]
        raw = read_tensors(weights, config.method) if isinstance(weights, str) else weights
        before = Attempt(model)
        try:
            with torch.device("meta"):
                put(low_cpu_mem_usage=False)
            state = to_model_keys(model, adapter_name, config, raw)
            check_tensors(model, adapter_name, config, state)
        finally:
            before.undo()
        return [key.removeprefix(ROOT) for key in state]

    def _put(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
        state_dict: dict[str, Tensor] | None,
    ) -> None:
        config: AdapterConfig = self.peft_config[adapter_name]  # type: ignore[assignment]
        check_tokens(model, config)
        try:
            with patterns_for_parameters(model, config, adapter_name):
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except TypeError as error:
            if "trainable_token_indices" in str(error):
                raise adapted_too(f"A module ({error})") from error
            # PEFT takes a name as the end of any module's name, and then refuses lists of modules and adapted layers.
            if not config.modules_to_save:
                raise
            raise ValueError(
                f"modules_to_save={shown(config.modules_to_save)} names more than modules that can be trained in full "
                f"({error}): give whole names of modules that compute something and are not adapted."
            ) from error
        pass_adapters_without_tokens(model, adapter_name)
        if config.shared_cls is not None:
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                bank = link(model, adapter_name, config)
            active = adapter_name in self.active_adapters and not config.inference_mode
            shared = bank.shared(adapter_name)
            shared.requires_grad_(active)  # type: ignore[union-attr]
            if isinstance(shared, Scheduled):
                shared.belongs_to(self.peft_config, adapter_name)
                join_trainers()
            bank._active_adapter = self.active_adapters

    def train(self, mode: bool = True) -> AdapterModel:
        """Switch modes."""
        if mode:
            refuse_loaded_with_parent(self)
        return super().train(mode)

    def _create_and_replace(
        self,
        peft_config: AdapterConfig,  # type: ignore[override]
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, AdapterLinear):
            layer = target
        else:
            layer = put_around(target, parent, current_key, get_quantization_kwargs(self.model))
        self._add(layer, peft_config, adapter_name, current_key)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _add(self, layer: AdapterLinear, peft_config: AdapterConfig, adapter_name: str, current_key: str) -> None:
        factors = peft_config.factors_cls(peft_config, current_key, layer.in_features, layer.out_features)
        layer.add_adapter(adapter_name, peft_config, factors)
        # This makes the parameters of inactive adapters untrainable.
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def _inject_parameters(
        self,
        peft_config: AdapterConfig,  # type: ignore[override]
        model: nn.Module,
        adapter_name: str,
        low_cpu_mem_usage: bool,
    ) -> list[str]:
        def add(layer: AdapterLinear) -> None:
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._add(layer, peft_config, adapter_name, layer.module_name)

        return adapt_parameters(model, peft_config, add)

    # Embeddings that are tied to a head, with ensure_weight_tying

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        LoraModel._add_modules_to_save_to_tie(self, peft_config, tied_weight_keys)  # type: ignore[arg-type]

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        raise ValueError(
            f"ensure_weight_tying can't tie adapters: target_modules names {', '.join(tied_weight_keys)} or the "
            "embedding that it is tied to. Leave them out (exclude_modules), or leave ensure_weight_tying out: merging "
            "then gives the head a weight of its own."
        )

    # Switching

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat", **more: Any
    ) -> None:
        """Add the adapter `adapter_name`, whose update is Σ wₖ ΔWₖ of adapters of one method, exactly.

        Args:
            adapters: their names.
            weights: one factor for each, of any sign.
            adapter_name: the new adapter; it is not activated.
            combination_type: "cat" adds the ranks up; "linear" keeps the rank, for adapters with the same A.
            more: what LoraModel takes for its other combinations (density, svd_rank, …), to refuse it with a remedy.

        Raises:
            ValueError: the sum is no adapter of this method (Dual LoRA, MASA's router), or the arguments don't fit.
        """
        if more and combination_type in COMBINATIONS:
            raise ValueError(f"{', '.join(more)}: combination_type={combination_type!r} takes no further settings.")
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type)

    def supports_lora_conversion(self, adapter_name: str | None = None) -> bool:
        """Whether PEFT's `convert_to_lora` can convert this adapter; without a name, the active ones."""
        names = self.active_adapters if adapter_name is None else [adapter_name]
        return all(layer.supports_lora_conversion(name) for layer in self._layers() for name in names)

    def shared(self, adapter_name: str) -> SharedFactors | None:
        """The shared factors of `adapter_name`, or None."""
        return shared_by(self.model, adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; the bank follows the layers in which one is active next."""
        super().delete_adapter(adapter_name)
        if (bank := find_bank(self.model)) is not None:
            bank.set_adapter(self.active_adapters)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names` (one per example) down to the layers, for one forward or generate."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names works for inference only: call model.eval() first.")
        if unknown := sorted({*adapter_names} - {*self.peft_config, "__base__"}):
            raise ValueError(f"adapter_names asks for {unknown}; this model has {sorted(self.peft_config)}.")
        with passed_down(self.model, adapter_names, kwargs.get("num_beams") or 1):
            yield

    # Saving and loading

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: AdapterConfig,  # type: ignore[override]
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        entries = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for prefix, shared in shared_with_prefix(model, adapter_name):
            shared.before_save(adapter_name)
            for name in shared.stale_parameters():
                entries.pop(prefix + name, None)
        return entries

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: AdapterConfig,  # type: ignore[override]
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Rename the keys for the model, after checking that every tensor of the adapter is there and fits.

        PEFT would load what happens to fit and leave the rest at random.
        """
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_none_lost(state_dict, state)
        check_tensors(model, adapter_name, config, state)
        warn_of_nonfinite(state, config.method)
        back_up_values(model, state)
        to_their_dtypes(model, config.method, state)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Check before any module below takes a tensor: a checkpoint with a broken schedule should change nothing.
        for adapter_name in self.peft_config:
            for inner, shared in shared_with_prefix(self, adapter_name):
                shared.check_loaded(state_dict, prefix + inner)
        super()._load_from_state_dict(state_dict, prefix, *args)
