"""Registers the methods with PEFT. No other file writes PEFT's tables."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType, register_peft_method
from transformers import PreTrainedModel

from loraplex.io.field_types import shown
from loraplex.tuner.adapter_files import check_adapter_files
from loraplex.tuner.attempt import all_or_nothing
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.gates import GatedFactors
from loraplex.tuner.model import AdapterModel

METHODS: dict[str, type[AdapterConfig]] = {}
"""The registered methods by the names that runs call them; the only table of methods there is."""


def register(config_cls: type[AdapterConfig], model_cls: type[AdapterModel]) -> None:
    """Register a method with PEFT under `config_cls.method`, with the prefix that PEFT expects of that name.

    Raises:
        ValueError: the class lacks something, or another method has its names.
    """
    name, run_name = _names(config_cls)
    if run_name in METHODS or (name in PeftType.__members__ and PeftType[name] in PEFT_TYPE_TO_CONFIG_MAPPING):
        raise ValueError(
            f"{config_cls.__name__}: another method is called {run_name!r} or {name!r}: choose other names."
        )
    add_peft_type(name)
    register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls)
    METHODS[run_name] = config_cls


def _names(config_cls: type[AdapterConfig]) -> tuple[str, str]:
    """PEFT's and the runs' name of a method whose classes are whole."""
    if lacking := [name for name in ("method", "title", "factors_cls") if not hasattr(config_cls, name)]:
        raise ValueError(f"{config_cls.__name__} says nothing of {', '.join(lacking)}: see AdapterConfig.")
    if not re.fullmatch(r"[A-Z][A-Z0-9]*", config_cls.method):
        raise ValueError(
            f"{config_cls.__name__}: method={config_cls.method!r} must be capital letters and digits: in small "
            "letters it stands in the keys of adapter files, where an underscore ends them."
        )
    gates = config_cls.depends_on_input is not AdapterConfig.depends_on_input
    if issubclass(config_cls.factors_cls, GatedFactors) != gates:
        raise ValueError(
            f"{config_cls.__name__}: factors_cls={config_cls.factors_cls.__name__} and depends_on_input go together: "
            "GatedFactors need a config that says when ΔW depends on the input, and the other way round."
        )
    return config_cls.method, config_cls.run_name()


def add_peft_type(name: str) -> PeftType:
    """Add the member `name` to PEFT's enumeration of adapter types.

    PEFT and transformers look types up in the enumeration and read `.value`, so a string is not enough; and an
    enumeration with members can't be subclassed.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    # type.__setattr__: EnumType's own refuses new members.
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def _while_accepting(model: PeftModel, method: str, change: Callable[[], Any]) -> Any:
    # PeftModel refuses an adapter of another type than its first one's, but our tuners host every method.
    def accepted() -> Any:
        first = model.peft_type
        model.peft_type = PeftType(method)
        try:
            return change()
        finally:
            model.peft_type = first

    return all_or_nothing(model, accepted)


def add_adapter(model: PeftModel, adapter_name: str, config: AdapterConfig, **kwargs: Any) -> None:
    """Add an adapter of any loraplex method to a model whose first adapter may be of another loraplex method.

    `model.add_adapter`, which gets the keyword arguments, takes adapters of the first one's method only.

    Raises:
        ValueError: the model's first adapter is not of loraplex.
    """
    _check_host(model)
    _while_accepting(model, config.method, lambda: model.add_adapter(adapter_name, config, **kwargs))


def load_adapter(model: PeftModel | PreTrainedModel, path: str, adapter_name: str, **kwargs: Any) -> Any:
    """Load a saved adapter of any loraplex method; keyword arguments go to the model's own `load_adapter`.

    The files are checked before the model is touched, and the model stays as it was if the load fails.

    Raises:
        ValueError: the model's first adapter is not of loraplex, or the files are not an adapter for this model.
    """
    from peft import PeftConfig

    if isinstance(model, PeftModel):
        _check_host(model)
    name = check_adapter_files(path)["peft_type"] if os.path.isdir(path) else PeftConfig._get_peft_type(path)
    if not isinstance(name, str) or name not in PeftType.__members__:
        raise ValueError(
            f"{path}: peft_type={shown(name)} is no type that this PEFT or loraplex knows: upgrade them, or import "
            "the module that registers it first."
        )
    method = PeftType[name]
    if not issubclass(PEFT_TYPE_TO_CONFIG_MAPPING.get(method, PeftConfig), AdapterConfig):
        raise ValueError(f"{path} is a {name} adapter, none of loraplex: load it with PeftModel.from_pretrained.")
    if not isinstance(model, PeftModel):
        return model.load_adapter(path, adapter_name, **kwargs)
    return _while_accepting(model, method, lambda: model.load_adapter(path, adapter_name, **kwargs))


def _check_host(model: PeftModel) -> None:
    if not isinstance(model.base_model, AdapterModel):
        raise ValueError(
            f"The model's first adapter is {model.peft_type}, which can't host loraplex adapters: create the model "
            "with get_peft_model(base_model, <loraplex config>) and add the other adapters to it."
        )
