"""The tuner: puts adapter layers into a model and reads and writes adapters, for all methods alike."""

from __future__ import annotations

import difflib
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, _get_submodules
from peft.utils.integrations import init_empty_weights
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraplex.combine import add_weighted_adapter
from loraplex.config import AdapterConfig
from loraplex.layer import AdapterLinear
from loraplex.packing import guard, release
from loraplex.placement import refuse_loaded_with_parent
from loraplex.sharing import BANK, FactorBank, SharedFactors, link

logger = logging.getLogger(__name__)


class AdapterModel(BaseTuner):
    """Abstract tuner. A method subclasses it once, to name its prefix; every subclass can host every method."""

    merge_errors: dict[str, float]
    """Of the last merge: module → ‖W′ − W − ΔW‖_F / ‖ΔW‖_F, where W′ is what the base stores."""

    # The bank is a tuner layer too: switching and deleting adapters must reach it.
    tuner_layer_cls = BaseTunerLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Adapt the targets of `peft_config[adapter_name]`, and tie what they share.

        Not in PEFT's injection hooks: those run for the first adapter only, and a second one would not share.
        On an error the model is left as it was.
        """
        config: AdapterConfig = self.peft_config[adapter_name]  # type: ignore[assignment]
        _check_config(model, config)
        before = [(p, p.requires_grad) for p in model.parameters()]
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        were_active = [(m, copy(m._active_adapter)) for m in model.modules() if isinstance(m, kinds)]
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            if config.shared_cls is not None:
                with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                    bank = link(model, adapter_name, config)
                active = adapter_name in self.active_adapters and not config.inference_mode
                bank.shared(adapter_name).requires_grad_(active)  # type: ignore[union-attr]
                bank._active_adapter = self.active_adapters
            _check_weights(model, adapter_name, config)
        except Exception:
            for layer, names in were_active:
                layer._active_adapter = names
            take_off(model, adapter_name)
            _restore(before)
            self.peft_config.pop(adapter_name, None)
            raise
        guard(model)
        if getattr(config, "_unproven", False):
            self.__dict__.setdefault("_before", {})[adapter_name] = before

    def train(self, mode: bool = True) -> AdapterModel:
        """Switch modes. An adapter that is put to use is the user's: a later failed load does not take it away."""
        self.__dict__.pop("_before", None)
        if mode:
            refuse_loaded_with_parent(self)
        return super().train(mode)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version copies the child's weight and bias, which a head of several modules does not have; layers of
        # ours take their device when an adapter is added.
        setattr(parent, child_name, new_module)
        if isinstance(child, AdapterLinear) and child.merged:
            self.merge_errors[child.module_name] = child.merge_error

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
        layer = target if isinstance(target, AdapterLinear) else self._wrap(target, parent, current_key)
        factors = peft_config.factors_cls(peft_config, current_key, layer.in_features, layer.out_features)
        layer.add_adapter(adapter_name, peft_config, factors)
        # Makes the parameters of inactive adapters untrainable.
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _wrap(self, target: nn.Module, parent: nn.Module, name: str) -> AdapterLinear:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"{name} belongs to nn.MultiheadAttention, which reads its weight without calling it: an adapter there "
                "would do nothing. Put it into exclude_modules."
            )
        quantization = get_quantization_kwargs(self.model)
        try:
            backend = resolve_quantization_backend(base, **quantization)
        except ValueError as error:
            raise ValueError(
                f"{name} is quantised with torchao, but the model does not say how ({error}). Load it with "
                "quantization_config=TorchAoConfig(…), and adapt the whole model, not a part of it."
            ) from error
        if not isinstance(base, (nn.Linear, Conv1D)) and (backend is None or backend.layer_type != "linear"):
            raise ValueError(
                f"{name} is a {type(base).__name__}; only linear layers (nn.Linear, Conv1D) can be adapted. "
                "Leave it out of target_modules, or train it in full with modules_to_save."
            )
        return AdapterLinear(target, name, **quantization)

    # Merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights; on an error no layer stays merged.

        `merge_errors` tells afterwards what rounding to the base's dtype, or quantising again, cost each module.
        """
        with self._merging(adapter_names):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        self.merge_errors = {layer.module_name: layer.merge_error for layer in self._layers() if layer.merged}
        _warn_of_loss(self.merge_errors)

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        self.merge_errors = {}
        merged = merge
        if merge and (safe_merge or any(layer.quantization_backend is not None for layer in self._layers())):
            # Either can fail at any layer, so all are merged before one is replaced; a failure half-way would leave a
            # torn model.
            self.merge_adapter(adapter_names, safe_merge)
            merge = False
        with self._merging(adapter_names if merge else []):
            untied = [layer for layer in self._layers() if layer.untied]
            model: nn.Module = super()._unload_and_optionally_merge(  # type: ignore[assignment]
                merge, progressbar, safe_merge, adapter_names
            )
        model._modules.pop(BANK, None)
        if not merged:
            # Of a merged model the guard keeps what it stores: it is most often evaluated and then saved.
            release(model)
        if untied and self.get_model_config(model).get("tie_word_embeddings"):
            # PEFT says and does the same, but only where it merges layer by layer.
            model.config.tie_word_embeddings = False  # type: ignore[union-attr]
            warnings.warn(
                "Input and output embeddings are no longer tied after merging. Setting `tie_word_embeddings=False` in "
                "the model config.",
                stacklevel=3,
            )
        if merge:
            _warn_of_loss(self.merge_errors)
        return model

    def _layers(self) -> list[AdapterLinear]:
        return [module for module in self.model.modules() if isinstance(module, AdapterLinear)]

    @contextmanager
    def _merging(self, adapter_names: list[str] | None) -> Iterator[None]:
        """Check first that all layers can merge, give tied ones a weight of their own; on an error unmerge all."""
        names = self.active_adapters if adapter_names is None else adapter_names
        for layer in self._layers():
            layer.check_mergeable(names)
        for tied in tied_layers(self.model):
            if isinstance(tied, AdapterLinear) and any(tied.factors(name) is not None for name in names):
                tied.untie()
        try:
            yield
        except Exception:
            self.unmerge_adapter()
            raise

    def _check_merge_allowed(self) -> None:
        """Nothing: PEFT's version warns of merging into tied weights, which get a copy of their own here."""

    # Switching

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Add the adapter `adapter_name`, whose update is Σ wₖ ΔWₖ of adapters of one method, exactly.

        Args:
            adapters: their names.
            weights: one factor for each, of any sign.
            adapter_name: the new adapter; it is not activated.
            combination_type: "cat" adds the ranks up; "linear" keeps the rank, for adapters with the same A.

        Raises:
            ValueError: the sum is no adapter of this method (Dual LoRA, MASA's router), or the arguments don't fit.
        """
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type)

    def supports_lora_conversion(self, adapter_name: str | None = None) -> bool:
        """Whether PEFT's `convert_to_lora` can convert this adapter, or the active ones; PEFT asks for "default"."""
        names = self.active_adapters if adapter_name is None else [adapter_name]
        return all(layer.supports_lora_conversion(name) for layer in self._layers() for name in names)

    def shared(self, adapter_name: str) -> SharedFactors | None:
        """What the layers of `adapter_name` share, or None."""
        bank = find_bank(self.model)
        return None if bank is None else bank.shared(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; the bank follows the layers in which one is active next."""
        super().delete_adapter(adapter_name)
        if (bank := find_bank(self.model)) is not None:
            bank.set_adapter(self.active_adapters)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` (one per example) down to the layers, for one forward or generate."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names works for inference only: call model.eval() first.")
        if unknown := sorted({*adapter_names} - {*self.peft_config, "__base__"}):
            raise ValueError(f"adapter_names asks for {unknown}; this model has {sorted(self.peft_config)}.")
        beams = kwargs.get("num_beams") or 1
        # generate repeats each example once per beam, except in the encoder.
        repeated = [name for name in adapter_names for _ in range(beams)]
        encoder = {*self.model.get_encoder().modules()} if _is_encoder_decoder(self.model) else set()
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_adapter_names, names=adapter_names if module in encoder else repeated), with_kwargs=True
            )
            for module in self.model.modules()
            if isinstance(module, (AdapterLinear, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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
        for prefix, shared in _shared_with_prefix(model, adapter_name):
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
        for prefix, shared in _shared_with_prefix(model, adapter_name):
            shared.fill_stale(prefix, state)
        prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
        expected = _filter_state_dict_by_key_prefixes(model.state_dict(), prefixes)
        problem = _mismatch(expected, state, model.state_dict(), config)
        tuner = model.base_model if isinstance(model, PeftModel) else None
        before = tuner.__dict__.get("_before", {}).pop(adapter_name, None) if tuner is not None else None
        if problem:
            if before is not None:
                # The adapter was put on the model for this file only: a failed load leaves the model as it was.
                tuner._discard(adapter_name)  # type: ignore[union-attr,operator]
                _restore(before)
            raise ValueError(problem)
        return state

    def _discard(self, adapter_name: str) -> None:
        if list(self.peft_config) == [adapter_name]:
            # PEFT's unload puts the adapter's copies of fully trained modules in place of the originals.
            originals = {
                name: module.original_module
                for name, module in self.model.named_modules()
                if isinstance(module, AuxiliaryTrainingWrapper)
            }
            self.unload()
            for name, original in originals.items():
                parent, _, child = _get_submodules(self.model, name)
                setattr(parent, child, original)
        else:
            self.delete_adapter(adapter_name)
            take_off(self.model, adapter_name)


def find_bank(model: nn.Module) -> FactorBank | None:
    """The bank of shared factors of `model` (a PeftModel, a tuner or the adapted model), or None."""
    return next((m for m in model.modules() if isinstance(m, FactorBank)), None)


def _warn_of_loss(errors: dict[str, float]) -> None:
    """Say where merging kept less than half of an update."""
    lost = {name: error for name, error in errors.items() if not error <= 0.5}  # NaN too
    if lost:
        worst = max(lost, key=lost.__getitem__)
        logger.warning(
            "Merging lost most of the update of %d of %d modules: the base's weights are stored too coarsely for "
            "changes this small (worst: %s, relative error %.2f). Merge into a float32 base, or serve the adapter "
            "unmerged.",
            len(lost),
            len(errors),
            worst,
            errors[worst],
        )


def tied_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """Adapted layers whose weight is a parameter of another module too, such as a head tied to the embedding."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    layers = (m for m in model.modules() if isinstance(m, (AdapterLinear, LoraLayer)) and not m.quantization_backend)
    return [layer for layer in layers if uses[id(layer.weight)] > 1]


def take_off(model: nn.Module, adapter_name: str) -> None:
    """Remove `adapter_name` wherever it was put, and unwrap layers that hold no other adapter."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, AdapterLinear):
            if layer.factors(adapter_name) is not None:
                layer.delete_adapter(adapter_name)
            if not layer._get_available_adapters():
                parent, _, child = _get_submodules(model, name)
                setattr(parent, child, layer.base_layer)
        elif isinstance(layer, ModulesToSaveWrapper) and adapter_name in layer._adapters:
            # Not by its own delete_adapter, which would make another adapter active.
            layer._adapters.discard(adapter_name)
            del layer.modules_to_save[adapter_name]
            if not layer._adapters:
                parent, _, child = _get_submodules(model, name)
                setattr(parent, child, layer.original_module)
    bank = model._modules.get(BANK)
    if isinstance(bank, FactorBank):
        bank.delete_adapter(adapter_name)
        if not bank._get_available_adapters():
            del model._modules[BANK]
    if not any(isinstance(module, AdapterLinear) for module in model.modules()):
        release(model)


def _restore(before: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, requires_grad in before:
        parameter.requires_grad_(requires_grad)


def _pass_adapter_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _shared_with_prefix(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, SharedFactors]]:
    """The shared factors of `adapter_name`, with the prefix of their keys in the model's state dict."""
    for bank_name, bank in model.named_modules():
        if isinstance(bank, FactorBank):
            for container in bank.adapter_layer_names:
                modules = bank.get_submodule(container)
                if adapter_name in modules:  # type: ignore[operator]
                    prefix = f"{bank_name}.{container}.{adapter_name}."
                    yield prefix, modules[adapter_name]  # type: ignore[index]


def _check_config(model: nn.Module, config: AdapterConfig) -> None:
    """Raise a ValueError if the weights are missing, or a listed target is: PEFT ignores it beside others."""
    weights = getattr(config, "_weights", None)
    if config.inference_mode and weights and not os.path.isfile(weights):
        raise ValueError(f"{weights} is missing: the folder holds settings but no weights. Copy the adapter again.")
    targets = config.target_modules
    if isinstance(targets, str) or targets is None or getattr(config, "_unproven", False):
        return
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            endings = {name.rpartition(".")[2] for name in names}
            nearest = difflib.get_close_matches(target, endings, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ": see model.named_modules() for the names."
            raise ValueError(f"target_modules names {target!r}, but the model has no such module{hint}")


def _check_weights(model: nn.Module, adapter_name: str, config: AdapterConfig) -> None:
    """Raise a ValueError if the local file that the adapter is about to be loaded from does not fit the model."""
    weights = getattr(config, "_weights", None)
    if not weights or not os.path.isfile(weights):
        return
    method = config.method.lower()
    # Modules that are trained in full are in the file under their plain names.
    heads = [name for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    state: dict[str, Tensor] = {}
    with safe_open(weights, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            name, count = re.subn(rf"\.?({method}_(?:factors|shared))\.", rf".\1.{adapter_name}.", key, count=1)
            name = name.removeprefix("base_model.model.")
            head = next((head for head in heads if name.startswith(f"{head}.")), None)
            if count or head:
                stored = tensors.get_slice(key)
                # A schedule's few integers say which factors are missing on purpose; of factors the shape is enough.
                counted = stored.get_dtype().startswith("I")
                if head and not count:
                    name = f"{head}.modules_to_save.{adapter_name}{name.removeprefix(head)}"
                state[name] = tensors.get_tensor(key) if counted else torch.empty(stored.get_shape(), device="meta")
    for prefix, shared in _shared_with_prefix(model, adapter_name):
        shared.fill_stale(prefix, state)
    marks = (
        f"{method}_factors.{adapter_name}.",
        f"{method}_shared.{adapter_name}.",
        f".modules_to_save.{adapter_name}.",
    )
    model_state = model.state_dict()
    expected = {key: tensor for key, tensor in model_state.items() if any(mark in key for mark in marks)}
    if problem := _mismatch(expected, state, model_state, config):
        raise ValueError(problem)


def _mismatch(
    expected: dict[str, Tensor], state: dict[str, Tensor], model_state: dict[str, Tensor], config: AdapterConfig
) -> str | None:
    """Why `state` is not an adapter for these `expected` tensors, or None."""
    trained_on = f"The adapter was trained on {config.base_model_name_or_path or 'an unnamed model'}"
    remedy = "load it onto that base model, with the adapter_config.json it was saved with."
    for key in expected:
        if key not in state:
            return f"The adapter's weights lack {key}: it is incomplete or for another model. {trained_on}: {remedy}"
    for key, tensor in state.items():
        if key in model_state and model_state[key].shape != tensor.shape:
            return (
                f"{key} is {tuple(tensor.shape)} in the adapter's weights and {tuple(model_state[key].shape)} in this "
                f"model. {trained_on}: {remedy}"
            )
    marks = (f".{config.method.lower()}_factors.", f"{config.method.lower()}_shared.")
    for key in state:
        if key not in expected and any(mark in key for mark in marks):
            return f"The adapter's weights hold {key}, which this model has no place for. {trained_on}: {remedy}"
    return None
