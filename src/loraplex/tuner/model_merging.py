"""Merging adapters into the weights of a whole model, and unloading them: all layers or none."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from loraplex.runtime.packing import release
from loraplex.tuner.bank import BANK
from loraplex.tuner.experts import AdapterParameters
from loraplex.tuner.layer import AdapterLinear
from loraplex.tuner.tokens import check_tokens_mergeable

logger = logging.getLogger(__name__)


class MergingModel(BaseTuner):
    """A tuner that can merge its adapters. Abstract: `AdapterModel` puts them into the model."""

    merge_errors: dict[str, float]
    """Module → ‖W′ − W − ΔW‖_F / ‖ΔW‖_F of the last merge, where W′ is what the base stores."""

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
            # Either can fail at any layer. So all layers are merged before one is replaced: a failure half-way would
            # leave a torn model.
            self.merge_adapter(adapter_names, safe_merge)
            merge = False
        with self._merging(adapter_names if merge else []):
            untied = [layer for layer in self._layers() if layer.untied]
            model: nn.Module = super()._unload_and_optionally_merge(  # type: ignore[assignment]
                merge, progressbar, safe_merge, adapter_names
            )
        model._modules.pop(BANK, None)
        if not merged:
            # A merged model stays guarded, since it is most often evaluated and then saved.
            release(model)
        if untied and self.get_model_config(model).get("tie_word_embeddings"):
            # PEFT does the same and warns alike, but only where it merges layer by layer.
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
        """Check first that all layers can merge, and give tied ones a weight of their own; on an error unmerge all."""
        names = self.active_adapters if adapter_names is None else adapter_names
        for layer in self._layers():
            layer.check_mergeable(names)
        check_tokens_mergeable(self.model, names)
        for tied in tied_layers(self.model):
            if isinstance(tied, AdapterLinear) and any(tied.factors(name) is not None for name in names):
                tied.untie()
        try:
            yield
        except Exception:
            self.unmerge_adapter()
            raise

    def _check_merge_allowed(self) -> None:
        """Check nothing: PEFT's version warns of merging into tied weights, which get a copy of their own here."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version copies the child's weight and bias, which a head of several modules does not have; layers of
        # ours take their device when an adapter is added.
        setattr(parent, child_name, new_module)
        for layer in child.modules() if isinstance(child, (AdapterLinear, AdapterParameters)) else ():
            if isinstance(layer, AdapterLinear) and layer.merged:
                self.merge_errors[layer.module_name] = layer.merge_error


def _warn_of_loss(errors: dict[str, float]) -> None:
    """Warn if merging lost more than half of an update."""
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
