"""The methods by which PEFT and transformers put adapters onto a model, made all-or-nothing for adapters of ours.

Neither library takes back what it has begun: Ctrl-C, a full memory or a truncated file leaves layers, frozen parameters
and names of adapters behind. Our own code is called inside a load, not around it, so the methods themselves are
wrapped. A wrapper does nothing for adapters that are not of loraplex (docs/adr/0008-loads.md).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import wraps
from traceback import walk_tb
from typing import Any

from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, set_peft_model_state_dict
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils import cached_file

from loraplex.io.field_types import shown
from loraplex.tuner.adapter_files import read_settings
from loraplex.tuner.attempt import all_or_nothing
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.load_checks import warn_of_nonfinite
from loraplex.tuner.model import AdapterModel
from loraplex.tuner.saved_tensors import tensors_of

_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def guard_entry_points() -> None:
    """Wrap the methods, once."""
    for cls in {PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()}:
        for name, wrap in (("__init__", _init), ("add_adapter", _on_peft_model), ("load_adapter", _on_peft_model)):
            if name in vars(cls):
                setattr(cls, name, wrap(vars(cls)[name]))
    wrapped = classmethod(_from_pretrained(vars(PeftModel)["from_pretrained"].__func__))
    PeftModel.from_pretrained = wrapped  # type: ignore
    for name in ("__init__", "add_adapter"):
        setattr(PeftMixedModel, name, _not_mixed(vars(PeftMixedModel)[name]))
    PeftAdapterMixin.add_adapter = _add_to_transformers(PeftAdapterMixin.add_adapter)  # type: ignore[method-assign]
    PeftAdapterMixin.load_adapter = _load_into_transformers(PeftAdapterMixin.load_adapter)  # type: ignore


def _init(method: Callable[..., None]) -> Callable[..., None]:
    @wraps(method)
    def __init__(self: PeftModel, model: nn.Module, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        if isinstance(peft_config, AdapterConfig):
            all_or_nothing(model, lambda: method(self, model, peft_config, *args, **kwargs))
        else:
            method(self, model, peft_config, *args, **kwargs)

    return __init__


def _on_peft_model(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def change(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.base_model, AdapterModel):
            return all_or_nothing(self, lambda: _saying_what_lacks(lambda: method(self, *args, **kwargs)))
        return method(self, *args, **kwargs)

    return change


def _from_pretrained(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def from_pretrained(cls: Any, model: nn.Module, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        folder = os.path.join(model_id, kwargs.get("subfolder") or "")
        if kwargs.get("config") is None and os.path.isfile(os.path.join(folder, CONFIG_NAME)):
            kind: type = PEFT_TYPE_TO_CONFIG_MAPPING.get(read_settings(folder)["peft_type"], PeftConfig)
        else:
            kind = type(kwargs.get("config"))

        def load() -> Any:
            return method(cls, model, model_id, *args, **kwargs)

        ours = issubclass(kind, AdapterConfig)
        return all_or_nothing(model, lambda: _saying_what_lacks(load) if ours else load(), needs_us=True)

    return from_pretrained


def _not_mixed(method: Callable[..., None]) -> Callable[..., None]:
    @wraps(method)
    def put(self: PeftMixedModel, *args: Any, **kwargs: Any) -> None:
        ours = next((each for each in (*args, *kwargs.values()) if isinstance(each, AdapterConfig)), None)
        if ours is not None:
            raise ValueError(
                f"{type(ours).__name__} can't be used with PeftMixedModel (mixed=True). Leave mixed out: "
                "loraplex.add_adapter(model, name, config) puts adapters of different loraplex methods on one model."
            )
        method(self, *args, **kwargs)

    return put


def _saying_what_lacks(load: Callable[[], Any]) -> Any:
    """Load; if the file lacks a module that was trained in full, raise an error that says so, not PEFT's KeyError."""
    try:
        return load()
    except KeyError as error:
        *_, (frame, _) = walk_tb(error.__traceback__)
        if frame.f_code is not set_peft_model_state_dict.__code__:
            raise
        raise ValueError(
            f"The adapter's file lacks {shown(error.args[0])}, which was trained in full: copy or download the adapter "
            "again."
        ) from None


def _add_to_transformers(method: Callable[..., None]) -> Callable[..., None]:
    @wraps(method)
    def add_adapter(self: Any, adapter_config: Any, adapter_name: str | None = None) -> None:
        if isinstance(adapter_config, AdapterConfig):
            all_or_nothing(self, lambda: method(self, adapter_config, adapter_name))
        else:
            method(self, adapter_config, adapter_name)

    return add_adapter


def _load_into_transformers(method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @wraps(method)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments

        def load() -> Any:
            info = method(self, *args, **kwargs)
            name = given.get("adapter_name") or "default"
            config = self.peft_config[name]
            if isinstance(config, AdapterConfig):
                warn_of_nonfinite(tensors_of(self, name, config), config.method)
            return info

        return all_or_nothing(self, load, needs_us=True, weights=_weights(given))

    return load_adapter


def _weights(given: dict[str, Any]) -> str | dict[str, Tensor] | None:
    """The file or tensors that transformers is about to load; None if the adapter is not of loraplex.

    Raises:
        ValueError: the adapter is of loraplex, but can't be loaded.
    """
    if given.get("adapter_state_dict") is not None:
        return dict(given["adapter_state_dict"])
    load_config, more = given.get("load_config"), given.get("kwargs", {})
    source = given.get("peft_model_id") or getattr(load_config, "pretrained_model_name_or_path", None)
    if source is None:
        return None
    options = {**getattr(load_config, "download_kwargs", {}), **more, **(given.get("adapter_kwargs") or {})}
    options["local_files_only"] = given.get("local_files_only", False) or options.get("local_files_only", False)
    options = {key: value for key, value in options.items() if key in _DOWNLOAD and value is not None}
    config = given.get("peft_config")
    folder = os.path.join(source, options.get("subfolder") or "")
    if os.path.isdir(folder):
        if not os.path.isfile(os.path.join(folder, CONFIG_NAME)):
            return None
        cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(read_settings(folder)["peft_type"], PeftConfig)
        if not issubclass(cls, AdapterConfig):
            return None
        cls.from_pretrained(folder)
        _refuse_pickles(more, load_config)
        weights = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        if not os.path.isfile(weights):
            raise ValueError(f"{weights} is missing: the folder holds settings but no weights. Copy the adapter again.")
        return weights
    if config is None:
        found = cached_file(source, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **options)
        kind: Any = read_settings(os.path.dirname(found))["peft_type"] if found else None
        config = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind, PeftConfig)()
    if not isinstance(config, AdapterConfig):
        return None
    _refuse_pickles(more, load_config)
    return str(cached_file(source, SAFETENSORS_WEIGHTS_NAME, **options))


def _refuse_pickles(options: dict[str, Any], load_config: Any) -> None:
    if options.get("use_safetensors", getattr(load_config, "use_safetensors", None)) is False:
        raise ValueError(
            "use_safetensors=False asks for a pickle, which can run code: loraplex reads safetensors only."
        )
