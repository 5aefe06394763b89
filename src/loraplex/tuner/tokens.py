"""Tokens whose embeddings are trained with an adapter (`trainable_token_indices`), by PEFT's own wrapper.

PEFT puts a `TrainableTokensWrapper` around the embedding, which holds a copy of the rows that are trained, and around
the modules that are tied to it. Settings are checked here before that: what PEFT would find out in the forward, on a
GPU by an assertion that ends the process, or not at all, is an error that names the remedy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper, _get_input_embeddings_name
from torch import Tensor, nn

from loraplex.io.field_types import shown
from loraplex.runtime.placement import device_of
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.finite import check_finite

_EMBEDDING = "embed_tokens"
"""What PEFT takes for the name of the embedding in a model that does not tell."""


class TokenLayer(TrainableTokensLayer):
    """PEFT's layer, which can be asked to merge adapters that train no tokens on it."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the trained rows of those adapters into the weight that have some; None merges the active ones."""
        names = self.active_adapters if adapter_names is None else adapter_names
        if present := [name for name in names if name in self.trainable_tokens_delta]:
            super().merge(safe_merge, present)

    def unmerge(self) -> None:
        """Put the rows back that were there before, if any adapter is merged."""
        if self.merged:
            super().unmerge()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # As in AdapterLinear: PEFT's version also casts to the base's dtype, and moves values to the meta device, where
        # a base serves for its names and shapes only.
        device = device or device_of(self.get_base_layer())
        if device is None or device.type == "meta" or adapter_name not in self.trainable_tokens_delta:
            return
        for tensors in (self.trainable_tokens_delta, self.trainable_tokens_original):
            if not tensors[adapter_name].is_meta:
                tensors[adapter_name] = tensors[adapter_name].to(device)


class TokenWrapper(TrainableTokensWrapper):
    """PEFT's wrapper, which looks an adapter up without asking whether it trains tokens, and ends in a KeyError.

    So an adapter without tokens could not be saved, loaded or named in a mixed batch beside one with tokens.
    """

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Key in a file → key in this module."""
        return super().adapter_state_dict_load_map(adapter_name) if self._has(adapter_name) else {}

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """What a file of this adapter holds of the module."""
        return super().adapter_state_dict(adapter_name, state_dict) if self._has(adapter_name) else {}

    def _forward_wrapped_mixed_batch(self, x: Tensor, active_adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        if self._has(active_adapter):
            return super()._forward_wrapped_mixed_batch(x, active_adapter, *args, **kwargs)
        return self.original_module(x, *args, **kwargs)

    def _has(self, adapter_name: str) -> bool:
        return adapter_name in self.token_adapter.trainable_tokens_delta


def check_tokens(model: nn.Module, config: AdapterConfig) -> None:
    """Check `trainable_token_indices` against the model that the adapter is about to be put on.

    Raises:
        ValueError: an index is beyond the vocabulary, or a module is no embedding (or head without a bias) whose rows
            can be trained.
    """
    if config.trainable_token_indices is None:
        return
    for target, indices in _by_module(model, config.trainable_token_indices).items():
        for name, module in model.named_modules(remove_duplicate=False):
            # As PEFT finds them: any module whose name ends so.
            if name.endswith(target) and ".token_adapter" not in name:
                _check_rows(name, _embedding(module), indices)
        if target in (config.modules_to_save or []):
            raise ValueError(
                f"{target!r} is in modules_to_save, which trains all of its rows, and in trainable_token_indices: "
                "leave it out of one of them."
            )


def pass_adapters_without_tokens(model: nn.Module, adapter_name: str) -> None:
    """Let the wrappers that hold tokens of `adapter_name` pass adapters that have none; see `TokenWrapper`.

    Raises:
        ValueError: a wrapper lies inside a layer that is adapted too.
    """
    for name, wrapper in token_wrappers(model, adapter_name):
        if name.endswith(".base_layer"):
            # PEFT wraps what is tied to the embedding where it finds it, in an adapted head too.
            raise adapted_too(name.removesuffix(".base_layer"))
        wrapper.__class__ = TokenWrapper
        wrapper.token_adapter.__class__ = TokenLayer


def _by_module(model: nn.Module, wanted: list[int] | dict[str, list[int]]) -> dict[str, list[int]]:
    if isinstance(wanted, dict):
        return wanted
    return {str(_get_input_embeddings_name(model, _EMBEDDING)): wanted}


def _embedding(module: nn.Module) -> nn.Module:
    return module.token_adapter.base_layer if isinstance(module, TrainableTokensWrapper) else module


def _check_rows(name: str, module: nn.Module, indices: list[int]) -> None:
    if isinstance(module, BaseTunerLayer):
        raise adapted_too(name)
    if not isinstance(module, (nn.Embedding, nn.Linear)) or not module.weight.is_floating_point():
        raise ValueError(
            f"trainable_token_indices names {name}, a {type(module).__name__}: rows can be trained of an unquantised "
            "nn.Embedding, or of a head (nn.Linear) only. Give the name of the embedding."
        )
    if isinstance(module, nn.Linear) and module.bias is not None:
        raise ValueError(
            f"trainable_token_indices names {name}, a head with a bias, which PEFT's wrapper would leave out: train "
            "it in full with modules_to_save instead."
        )
    rows = module.weight.shape[0]
    if beyond := [index for index in indices if index >= rows]:
        raise ValueError(
            f"trainable_token_indices has {shown(beyond)}, but {name} has {rows} rows: call "
            "model.resize_token_embeddings(len(tokenizer)) before the adapter is put on, or correct the indices."
        )


def adapted_too(name: str) -> ValueError:
    """The error for a module that is adapted, and whose rows are to be trained."""
    return ValueError(
        f"{name} is adapted, and trainable_token_indices trains rows of the same weight: leave it out of "
        "target_modules (exclude_modules), or train no tokens."
    )


def token_wrappers(
    model: nn.Module, adapter_name: str, remove_duplicate: bool = True
) -> Iterator[tuple[str, TrainableTokensWrapper]]:
    """The embeddings of which `adapter_name` trains rows, and the modules tied to them, by name."""
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(module, TrainableTokensWrapper) and adapter_name in module.token_adapter.trainable_tokens_delta:
            yield name, module


def check_tokens_mergeable(model: nn.Module, adapter_names: list[str]) -> None:
    """Raise a ValueError if rows that are about to be merged hold NaN or Inf."""
    for adapter_name in adapter_names:
        for name, wrapper in token_wrappers(model, adapter_name):
            check_finite(f"{name} (trained tokens)", [token_rows(wrapper, adapter_name)[1]])


def token_rows(wrapper: TrainableTokensWrapper, adapter_name: str) -> tuple[list[int], Tensor]:
    """Which rows of the weight an adapter trains, and the rows `(tokens, width)` that it puts in their place."""
    layer = wrapper.token_adapter
    return layer.token_indices[adapter_name], layer.trainable_tokens_delta[adapter_name]
