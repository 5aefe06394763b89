"""Each seam of PEFT, transformers and torch that loraplex relies on; after an upgrade these fail first.

Every docstring names the seam and where the package leans on it.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
from importlib.metadata import requires, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.requirements import Requirement
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from peft.helpers import disable_input_dtype_casting
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import tuners_utils
from peft.tuners.lora import conversion
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_pattern_key
from peft.utils.peft_types import PeftType, register_peft_method
from torch import nn

import helpers as h
import loraplex
from helpers import ARCHS, METHODS, PLAIN, adapted, config, output, ready
from loraplex.tuner.bank import BANK, FactorBank, find_bank
from loraplex.tuner.layer import AdapterLinear
from loraplex.tuner.load_checks import weights_of
from loraplex.tuner.model import AdapterModel
from loraplex.tuner.registry import add_peft_type
from loraplex.tuner.updates import LoraUpdate

TYPES = ("MASA", "ASLORA", "DUALLORA", "MULTILORA")
BATCH = ARCHS["llama"].inputs()


# The registry


@pytest.mark.parametrize("name", TYPES)
def test_added_members_are_like_built_in_ones(name: str) -> None:
    """Enumeration members can be added at run time (registry.add_peft_type)."""
    member = PeftType(name)
    assert member is PeftType[name] is getattr(PeftType, name)
    assert isinstance(member, PeftType)
    assert isinstance(member, str)
    assert (member.name, member.value) == (name, name)
    assert member == name
    assert hash(member) == hash(name)
    assert member in PeftType
    assert member in list(PeftType)
    assert list(PeftType).count(member) == 1
    assert f"{member}" == f"{PeftType.LORA}".replace("LORA", name)
    assert repr(member) == repr(PeftType.LORA).replace("LORA", name)


@pytest.mark.parametrize("name", TYPES)
def test_added_members_survive_copy_pickle_and_json(name: str) -> None:
    """Configs are deep-copied, pickled to worker processes and written as JSON with the type in them."""
    member = PeftType(name)
    assert copy.copy(member) is member
    assert copy.deepcopy(member) is member
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": name}


def test_unknown_types_are_still_refused() -> None:
    """register_peft_method refuses names that are no member; without that check registry.py is not needed."""
    with pytest.raises(KeyError):
        PeftType["ABSENT"]
    with pytest.raises(ValueError, match="ABSENT"):
        PeftType("ABSENT")
    with pytest.raises(ValueError, match=r"(?i)absent"):
        register_peft_method(name="absent", config_cls=PeftConfig, model_cls=BaseTuner)


def test_registering_twice_is_refused() -> None:
    """PEFT keeps one class per type: a second import of the package under another path must not replace it."""
    with pytest.raises(KeyError, match=r"(?i)masa"):
        register_peft_method(name="masa", config_cls=loraplex.MasaConfig, model_cls=BaseTuner)
    assert len(PeftType) == len({m.value for m in PeftType})


def test_adding_a_type_that_exists_does_not_duplicate_it() -> None:
    """A reload of the package, or a PEFT that brings the type itself, must not make a second member."""
    before = list(PeftType)
    try:
        add_peft_type("LORA")
    except ValueError as error:
        assert "LORA" in str(error)  # noqa: PT017 - a refusal is as good as a no-op
    assert list(PeftType) == before


@pytest.mark.parametrize("method", METHODS)
def test_tables_and_prefix(method: str) -> None:
    """The prefix must be the type in lower case + "_": `load_adapter` and deleting look keys up by it."""
    kind = config(method).peft_type
    assert isinstance(kind, PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[kind] is type(config(method))
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[kind]
    assert issubclass(tuner, AdapterModel)
    assert PEFT_TYPE_TO_PREFIX_MAPPING[kind] == tuner.prefix == f"{kind.value.lower()}_"


def test_config_fields_are_lora_config_s() -> None:
    """Moving from LoRA is a change of the class name (config.AdapterConfig)."""
    lora = set(inspect.signature(peft.LoraConfig).parameters)
    common = {
        "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform",
        "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save", "bias",
    }  # fmt: skip
    assert common <= lora
    for kind in TYPES:
        assert common <= set(inspect.signature(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]).parameters)


def test_peft_config_reads_our_type_from_disk(tmp_path: Path) -> None:
    """`PeftConfig.from_pretrained` on the base class finds our class by the type in the file (AutoPeftModel)."""
    config("masa-sum").save_pretrained(tmp_path)
    assert PeftConfig._get_peft_type(tmp_path) == "MASA"
    read = PeftConfig.from_pretrained(tmp_path)
    assert type(read) is loraplex.MasaConfig
    assert read.expert_mixing == "sum"
    assert isinstance(read.peft_type, PeftType)


@pytest.mark.parametrize("method", PLAIN)
def test_configs_pickle_and_copy(method: str) -> None:
    """Trainers copy and pickle configs; `_unproven` and the type must not get in the way."""
    settings = config(method)
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert copy.deepcopy(settings) == settings
    assert json.dumps(settings.to_dict())


# Private names


def test_private_names_exist() -> None:
    """Private functions that src imports or overrides; a rename in PEFT shows here, with its place in src."""
    places = {
        "layer.py": ["_get_in_out_features"],
        "merging.py": ["check_adapters_to_merge"],
        "saved_tensors.py": ["_filter_state_dict_by_key_prefixes", "_get_tuner_state_dict_key_prefixes"],
    }
    for names in places.values():
        for name in names:
            assert callable(getattr(tuners_utils, name))
    overridden = {
        BaseTuner: [
            "inject_adapter", "_create_and_replace", "merge_adapter", "_unload_and_optionally_merge",
            "delete_adapter", "_get_adapter_state_dict", "_remap_adapter_state_dict_for_load",
            "_check_merge_allowed", "_replace_module", "supports_lora_conversion",
        ],
        BaseTunerLayer: [
            "_move_adapter_to_device_of_base_layer", "_get_base_layer_device_and_dtype", "_cast_input_dtype",
            "_get_available_adapters", "set_adapter", "delete_adapter", "get_base_weight", "set_base_weight",
            "supports_lora_conversion",
        ],
    }  # fmt: skip
    for owner, names in overridden.items():
        for name in names:
            assert callable(getattr(owner, name)), name


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        (AdapterModel, "inject_adapter"),
        (AdapterModel, "_create_and_replace"),
        (AdapterModel, "merge_adapter"),
        (AdapterModel, "_unload_and_optionally_merge"),
        (AdapterModel, "_get_adapter_state_dict"),
        (AdapterModel, "_remap_adapter_state_dict_for_load"),
        (AdapterModel, "delete_adapter"),
        (AdapterModel, "_check_merge_allowed"),
        (AdapterModel, "_replace_module"),
        (AdapterModel, "supports_lora_conversion"),
        (AdapterLinear, "supports_lora_conversion"),
        (FactorBank, "supports_lora_conversion"),
        (AdapterLinear, "merge"),
        (AdapterLinear, "unmerge"),
        (FactorBank, "merge"),
        (FactorBank, "delete_adapter"),
        (FactorBank, "_move_adapter_to_device_of_base_layer"),
        (AdapterLinear, "_move_adapter_to_device_of_base_layer"),
    ],
)
def test_overrides_keep_peft_s_parameters(ours: type, name: str) -> None:
    """PEFT calls these by keyword; a new parameter of PEFT's must be taken up in the override."""
    theirs = BaseTuner if issubclass(ours, BaseTuner) else BaseTunerLayer
    assert set(inspect.signature(getattr(theirs, name)).parameters) <= set(
        inspect.signature(getattr(ours, name)).parameters
    )


def test_pattern_key() -> None:
    """rank_pattern and alpha_pattern are matched by PEFT's `get_pattern_key` (config.AdapterConfig.rank)."""
    assert get_pattern_key(["q_proj", r".*\.1\..*v_proj"], "model.layers.1.v_proj") == r".*\.1\..*v_proj"
    assert get_pattern_key(["q_proj"], "model.layers.1.self_attn.q_proj") == "q_proj"
    assert get_pattern_key(["q_proj"], "model.layers.1.self_attn.v_proj") == "model.layers.1.self_attn.v_proj"


# Injection


def test_hooks_run_for_the_first_adapter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why sharing is tied in `AdapterModel.inject_adapter` and not in PEFT's hooks: a second adapter skips those."""
    calls = []
    for hook in ("_pre_injection_hook", "_post_injection_hook"):
        monkeypatch.setattr(BaseTuner, hook, lambda *_, hook=hook: calls.append(hook))
    model = get_peft_model(ARCHS["llama"].build(), config("masa-sum"))
    first = len(calls)
    model.add_adapter("second", config("masa-sum"))
    assert first > 0
    assert len(calls) == first
    assert h.shared_state(model, "second") is not None


def test_casts_split_registered_aliases_but_not_the_bank() -> None:
    """`cast_adapter_dtype` goes layer by layer, and since 0.21.1 reassigns: why layers look factors up (bank.py)."""
    base = ARCHS["llama"].build().to(torch.bfloat16)
    model = get_peft_model(base, config("masa-sum"), autocast_adapter_dtype=False)
    bank = find_bank(model)
    before = dict(bank.shared("default").named_parameters())
    assert {p.dtype for p in before.values()} == {torch.bfloat16}
    tuners_utils.cast_adapter_dtype(model, "default")
    after = dict(bank.shared("default").named_parameters())
    assert {p.dtype for p in after.values()} == {torch.float32}
    for layer in h.layers_of(model).values():
        assert any(layer.factors("default").lora_A is p for p in after.values())


def test_all_linear_finds_adapted_layers_by_class_name() -> None:
    """ "all-linear" on an adapted model looks for "Linear" in the class name (layer.AdapterLinear)."""
    assert "Linear" in AdapterLinear.__name__
    model = adapted("multilora")
    tuner = model.base_model
    settings = tuners_utils._maybe_include_all_linear_layers(
        config("multilora", target_modules="all-linear"), tuner.model
    )
    assert not any("multilora_" in name or "base_layer" in name or BANK in name for name in settings.target_modules)
    assert "model.layers.0.self_attn.q_proj" in settings.target_modules
    assert "model.layers.0.mlp.up_proj" in settings.target_modules


def test_default_targets_are_lora_s() -> None:
    """`target_modules=None` uses PEFT's table for LoRA (model.AdapterModel.target_module_mapping)."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TABLE

    for arch in ("llama", "qwen2", "gpt2", "opt", "roberta", "deberta", "t5"):
        model = ARCHS[arch].build()
        assert TABLE[model.config.model_type]
        names = {
            name.rpartition(".")[2]
            for name in h.layers_of(get_peft_model(model, config("multilora", target_modules=None)))
        }
        assert names == set(TABLE[model.config.model_type])


def test_inject_twice_keeps_one_bank() -> None:
    """The bank is found again as a child of the adapted model, under any number of adapters (bank.link)."""
    model = adapted("masa-sum")
    loraplex.add_adapter(model, "second", config("aslora"))
    loraplex.add_adapter(model, "third", config("masa-concat"))
    assert sum(isinstance(m, FactorBank) for m in model.modules()) == 1
    assert {name for name, _ in find_bank(model).named_shared()} == {"default", "second", "third"}


# Keys


@pytest.mark.parametrize("adapter", ["default", "lora_A", "q_proj", "weird-name"])
@pytest.mark.parametrize("method", PLAIN)
def test_adapter_name_leaves_every_key(method: str, adapter: str, tmp_path: Path) -> None:
    """`_remove_adapter_name_from_key` finds the name before the last dot: why the bank's names are flat."""
    model = get_peft_model(ARCHS["llama"].build(), config(method), adapter_name=adapter)
    ready(model, adapter)
    model.eval().save_pretrained(tmp_path, selected_adapters=[adapter])
    folder = tmp_path if adapter == "default" else tmp_path / adapter
    keys = set(h.file_tensors(folder))
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config(method).peft_type]
    for key in keys:
        assert f".{adapter}." not in key.replace(".self_attn.q_proj.", ".")
        assert not key.endswith(f".{adapter}") or adapter == "lora_A"
    mine = [key for key in model.state_dict() if f"_factors.{adapter}." in key or f"_shared.{adapter}." in key]
    assert len(mine) == len({tuner._remove_adapter_name_from_key(key, adapter) for key in mine})
    loaded = PeftModel.from_pretrained(ARCHS["llama"].build(), folder, adapter_name="other")
    assert torch.equal(output(loaded, BATCH), output(model, BATCH))


def test_another_adapter_s_keys_stay_out(tmp_path: Path) -> None:
    """Keys of other adapters are filtered by ".<name>." (`_filter_state_dict_for_adapter_name`)."""
    model = adapted("aslora")
    for name, method in {"second": "aslora", "third": "masa-router", "fourth": "dual_lora"}.items():
        loraplex.add_adapter(model, name, config(method))
        ready(model, name, seed=ord(name[0]))
    model.save_pretrained(tmp_path)
    for name in ("second", "third", "fourth"):
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(ARCHS["llama"].build(), tmp_path / name)
        assert torch.equal(output(loaded.eval(), BATCH), output(model.eval(), BATCH))
        foreign = {"aslora", "masa", "duallora"} - {loaded.peft_config["default"].method.lower()}
        assert not any(mark + "_" in key for key in h.file_tensors(tmp_path / name) for mark in foreign)


def test_missing_keys_after_loading(tmp_path: Path) -> None:
    """`load_adapter` reports missing keys by prefix and adapter name; there are none."""
    for method in PLAIN:
        adapted(method).save_pretrained(tmp_path / method)
        model = get_peft_model(ARCHS["llama"].build(), config(method))
        result = model.load_adapter(tmp_path / method, "again")
        assert result.missing_keys == []
        assert result.unexpected_keys == []


def test_tuner_keys_are_found_structurally() -> None:
    """`_get_tuner_state_dict_key_prefixes` visits tuner layers; the bank must count as one (bank.FactorBank)."""
    model = adapted("aslora")
    prefixes = tuners_utils._get_tuner_state_dict_key_prefixes(model, adapter_name="default")
    assert f"base_model.model.{BANK}.aslora_shared.default" in prefixes
    assert not any("base_layer" in prefix for prefix in prefixes)


# Status, switching, deleting


@pytest.mark.parametrize("method", PLAIN)
def test_layer_and_model_status(method: str) -> None:
    """`get_layer_status` / `get_model_status` read every tuner layer; ours leaves the bank out (patch_layer_status)."""
    model = adapted(method)
    loraplex.add_adapter(model, "second", config("masa-sum"))
    status = model.get_model_status()
    assert status.adapter_model_type.upper().startswith(type(model.base_model).__name__.upper()[:4])
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert set(status.available_adapters) == {"default", "second"}
    assert status.requires_grad == {"default": True, "second": False}
    assert set(status.devices) == {"default", "second"}
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    model.set_adapter("second")
    assert model.get_model_status().requires_grad == {"default": False, "second": True}
    model.set_adapter("default")
    if method != "masa-router":
        model.merge_adapter()
        assert model.get_model_status().merged_adapters == ["default"]
        model.unmerge_adapter()
        assert model.get_model_status().merged_adapters == []
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    layers = model.get_layer_status()
    assert sorted(row.name for row in layers) == sorted(name.removeprefix("base_model.") for name in h.layers_of(model))
    assert model.get_model_status().num_adapter_layers == len(layers)
    # PEFT's own counts the bank, and nothing in PEFT holds it under another name.
    theirs = peft.peft_model.get_layer_status.__wrapped__
    assert len(theirs(model)) == len(layers) + 1
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("peft", "transformers"):
            assert not any(value is theirs for value in vars(module).values()), name


@pytest.mark.parametrize("method", ["aslora", "masa-sum", "dual_lora"])
def test_status_after_merging_and_disabling(method: str) -> None:
    """A layer unmerges itself when it runs disabled; the bank's record must follow, or PEFT calls it irregular."""
    model = adapted(method)
    model.merge_adapter()
    with model.disable_adapter():
        output(model, BATCH)
    assert model.get_model_status().merged_adapters == []
    loraplex.add_adapter(model, "second", config(method))
    model.delete_adapter("second")


@pytest.mark.parametrize("method", PLAIN)
def test_inference_mode_freezes(method: str) -> None:
    """`set_adapter(inference_mode=True)` reaches the bank through `BaseTunerLayer.set_adapter`."""
    model = adapted(method)
    loraplex.add_adapter(model, "second", config(method))
    model.set_adapter("second", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_adapter("second")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(h.adapter_parameters(model, "second"))
    model.set_requires_grad(["default", "second"], requires_grad=False)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["aslora", "masa-router", "dual_lora"])
def test_deleting_reaches_the_bank(method: str) -> None:
    """PEFT's `delete_adapter` skips modules whose name holds the tuner's prefix: the bank's must not."""
    model = adapted(method)
    assert PEFT_TYPE_TO_PREFIX_MAPPING[config(method).peft_type] not in BANK
    model.add_adapter("second", config(method))
    model.delete_adapter("second")
    assert h.shared_state(model, "second") is None
    assert h.shared_state(model) is not None


def test_bank_adapts_nothing() -> None:
    """PEFT asks tuner layers for a base layer, a bias and a weight; the bank has none."""
    model = adapted("masa-sum")
    bank = find_bank(model)
    assert not hasattr(bank, "base_layer")
    assert bank.bias is None
    x = torch.randn(2)
    assert bank(x) is x
    assert not any(name.startswith(BANK) for name in model.base_model.targeted_module_names)
    other = get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config("masa-sum", target_modules=["0", "1"])
    )
    assert other(torch.randn(2, 4)).shape == (2, 4)


def test_adapter_names_reach_the_layers() -> None:
    """`PeftModel.forward` strips `adapter_names` and calls `_enable_peft_forward_hooks` of the tuner (model.py)."""
    assert "adapter_names" in PeftModel(h.Mlp(), config("multilora", target_modules=["up"])).special_peft_forward_args
    assert "_enable_peft_forward_hooks" in inspect.getsource(PeftModel._enable_peft_forward_hooks)
    assert "adapter_names" in inspect.signature(ModulesToSaveWrapper.forward).parameters or "adapter_names" in (
        inspect.getsource(AuxiliaryTrainingWrapper.forward)
    )


def test_only_one_type_per_model_in_plain_peft() -> None:
    """`PeftModel.add_adapter` compares types with the first adapter's: why `loraplex.add_adapter` exists."""
    model = adapted("masa-sum")
    kind = model.peft_type
    with pytest.raises(ValueError, match=r"(?i)type"):
        model.add_adapter("second", config("aslora"))
    loraplex.add_adapter(model, "second", config("aslora"))
    assert model.peft_type == kind


# Base layers


def test_base_layer_shapes() -> None:
    """`_get_in_out_features` knows nn.Linear and Conv1D (layer.AdapterLinear)."""
    from transformers.pytorch_utils import Conv1D

    assert tuners_utils._get_in_out_features(nn.Linear(3, 5)) == (3, 5)
    assert tuple(tuners_utils._get_in_out_features(Conv1D(5, 3))) == (3, 5)


def test_base_weight_access() -> None:
    """Merging reads and writes through `get_base_weight` / `set_base_weight` (merging.MergingLayer.merge)."""
    layer = next(iter(h.layers_of(adapted("multilora")).values()))
    weight = layer.get_base_weight()
    assert torch.equal(weight, layer.base_layer.weight)
    parameter = layer.base_layer.weight
    layer.set_base_weight(weight + 1)
    assert layer.base_layer.weight is parameter
    assert torch.equal(parameter, layer.get_base_weight())


@pytest.mark.parametrize("method", PLAIN)
def test_input_casting_can_be_switched_off(method: str) -> None:
    """`disable_input_dtype_casting` asks every tuner layer for `cast_input_dtype_enabled` (AdapterLinear, the bank)."""
    model = adapted(method)
    expected = output(model, BATCH)
    with disable_input_dtype_casting(model):
        assert not any(m.cast_input_dtype_enabled for m in model.modules() if isinstance(m, BaseTunerLayer))
        assert torch.equal(output(model, BATCH), expected)
    assert all(m.cast_input_dtype_enabled for m in model.modules() if isinstance(m, BaseTunerLayer))


def test_lora_conversion_is_not_claimed_wrongly() -> None:
    """PEFT's `convert_to_lora` uses an SVD where a layer says that it can be converted."""
    # PEFT's own answer, which holds for no layer of ours.
    assert not BaseTunerLayer.supports_lora_conversion(
        next(iter(h.layers_of(adapted("multilora")).values())), "default"
    )
    for method in h.METHODS:
        model = adapted(method)
        layers = list(h.layers_of(model).values())
        assert layers
        assert model.supports_lora_conversion() is (method != "masa-router")
        assert {layer.supports_lora_conversion("default") for layer in layers} == {method != "masa-router"}


# Doors


def test_peft_s_conversion_is_replaced_where_it_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """`save_as_lora` looks `convert_to_lora` up in its module when it is called; nothing in PEFT holds the original
    under another name; its parameters are those that ours passes on (patch_peft_conversion)."""
    ours, theirs = conversion.convert_to_lora, conversion.convert_to_lora.__wrapped__
    assert theirs.__module__ == ours.__module__ == conversion.__name__
    expected = ["model", "rank", "adapter_name", "progressbar", "compile_kwargs"]
    assert list(inspect.signature(theirs, follow_wrapped=False).parameters) == expected
    assert list(inspect.signature(ours, follow_wrapped=False).parameters) == expected
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("peft", "transformers"):
            assert not any(value is theirs for value in vars(module).values()), name
    called: list[nn.Module] = []
    monkeypatch.setattr(conversion, "convert_to_lora", lambda model, **_: called.append(model) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        peft.save_as_lora("unused", model := h.Mlp(), 4)
    assert called == [model]


def test_save_as_lora_writes_what_conversion_returns(tmp_path: Path) -> None:
    """A LoraConfig and tensors by PEFT's names, which safetensors takes as they are (export.convert_for_peft)."""
    model = adapted("aslora")
    settings, state = peft.convert_to_lora(model, 4)
    peft.save_as_lora(tmp_path, model, 4)
    h.assert_same(h.file_tensors(tmp_path), state)
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == settings.to_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)


def test_conversion_asks_every_tuner_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """PeftModel asks the tuner, and the tuner all its layers, the bank among them; a layer says no by itself."""
    model = adapted("masa-sum")
    assert model.supports_lora_conversion()
    assert BaseTunerLayer.supports_lora_conversion(next(iter(h.layers_of(model).values()))) is False
    assert "adapter_name" in inspect.signature(PeftModel.supports_lora_conversion).parameters
    for layer in (AdapterLinear, FactorBank):
        with monkeypatch.context() as patch:
            patch.setattr(layer, "supports_lora_conversion", lambda *_: False)
            assert not BaseTuner.supports_lora_conversion(model.base_model)


def test_add_weighted_adapter_is_lora_s() -> None:
    """PeftModel passes the call on to its tuner, whose parameters have LoRA's names (model.add_weighted_adapter)."""
    *ours, more = inspect.signature(AdapterModel.add_weighted_adapter).parameters.values()
    theirs = inspect.signature(peft.LoraModel.add_weighted_adapter).parameters
    assert [one.name for one in ours] == list(theirs)[: len(ours)]
    assert more.kind is inspect.Parameter.VAR_KEYWORD
    assert "add_weighted_adapter" not in vars(PeftModel)
    assert "add_weighted_adapter" not in vars(BaseTuner)
    model = adapted("multilora")
    assert model.add_weighted_adapter == model.base_model.add_weighted_adapter


def test_injecting_does_not_cast() -> None:
    """A tuner's `inject_adapter` makes factors in the base's dtype, and PeftModel casts them to float32 afterwards by
    `_cast_adapter_dtype`: who injects without PeftModel casts too (combine.add_weighted_adapter)."""
    model = get_peft_model(ARCHS["llama"].build().to(torch.bfloat16), config("masa-sum"))
    assert {p.dtype for p in h.adapter_parameters(model).values()} == {torch.float32}
    model.peft_config["second"] = config("masa-sum")
    model.base_model.inject_adapter(model.base_model.model, "second")
    assert {p.dtype for p in h.adapter_parameters(model, "second").values()} == {torch.bfloat16}
    model.base_model._cast_adapter_dtype(adapter_name="second", autocast_adapter_dtype=True)
    assert {p.dtype for p in h.adapter_parameters(model, "second").values()} == {torch.float32}


def test_merging_is_only_checked_for_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """`_check_merge_allowed` warns of tied targets and does no more, so that ours, which unties them, may do nothing
    (model.AdapterModel._check_merge_allowed). Both ways of merging ask it."""
    BaseTuner._check_merge_allowed(adapted("multilora").base_model)
    seen: list[str] = []
    monkeypatch.setattr(BaseTuner, "_get_tied_target_modules", lambda *_: seen.append("tied") or ["lm_head"])
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        BaseTuner._check_merge_allowed(adapted("multilora").base_model)
    assert "tied" in seen
    asked: list[str] = []
    monkeypatch.setattr(AdapterModel, "_check_merge_allowed", lambda _: asked.append("asked"))
    model = adapted("multilora")
    model.merge_adapter()
    model.unmerge_adapter()
    model.merge_and_unload()
    assert len(asked) == 2


def lora_on(module: nn.Module, **settings: Any) -> Any:
    """PEFT's LoRA with random factors on the only layer of a model."""
    made = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["layer"], init_lora_weights=False, **settings)
    model = get_peft_model(nn.ModuleDict({"layer": module}), made)
    return model.base_model.model["layer"]


def test_plain_lora_is_read_by_these_names() -> None:
    """`lora_A`, `lora_B`, `scaling`, `fan_in_fan_out`, `quantization_backend` of LoraLayer (updates.LoraUpdate)."""
    from transformers.pytorch_utils import Conv1D

    for base in (nn.Linear(3, 5), Conv1D(5, 3)):
        layer = lora_on(base, use_rslora=True, fan_in_fan_out=isinstance(base, Conv1D))
        update = LoraUpdate("layer", layer, "default")
        update.check_mergeable()
        A, B = update.lora_form()
        assert (A.shape, B.shape) == ((2, 3), (5, 2))
        assert (update.in_features, update.out_features) == (3, 5)
        assert layer.scaling["default"] == pytest.approx(3 / 2**0.5)
        theirs = layer.get_delta_weight("default")
        torch.testing.assert_close(update.delta_weight(), theirs.T if isinstance(base, Conv1D) else theirs)
        assert layer.fan_in_fan_out is isinstance(base, Conv1D)
        assert layer.quantization_backend is None


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (nn.Linear(3, 5), {"use_dora": True}),
        (nn.Linear(3, 5), {"lora_bias": True}),
        (nn.Embedding(3, 5), {}),
    ],
    ids=["dora", "bias", "embedding"],
)
def test_more_than_plain_lora_is_recognised(module: nn.Module, settings: dict[str, Any]) -> None:
    """`lora_variant`, `lora_bias` and `lora_embedding_A` tell that more than B A is added (updates.LoraUpdate)."""
    layer = lora_on(module, **settings)
    assert "default" in {*layer.lora_A, *layer.lora_embedding_A}
    with pytest.raises(ValueError, match="no plain LoRA"):
        LoraUpdate("layer", layer, "default").check_mergeable()


def test_how_peft_matches_names() -> None:
    """Ends of names after a dot, only in these layers, or whole names (plain.plain_config tries them in turn)."""
    names = ["model.layers.0.q", "model.layers.1.q", "model.layers.1.xq", "q", "head.q"]

    def matched(**settings: Any) -> list[str]:
        made = peft.LoraConfig()
        made.__dict__.update(settings)
        return [name for name in names if tuners_utils.check_target_module_exists(made, name)]

    assert matched(target_modules={"q"}) == ["model.layers.0.q", "model.layers.1.q", "q", "head.q"]
    assert matched(target_modules={"q"}, layers_to_transform=[1]) == ["model.layers.1.q", "q"]
    assert matched(target_modules={"model.layers.1.q", "head.q"}) == ["model.layers.1.q", "head.q"]
    assert matched(target_modules={"q"}, modules_to_save=["head"]) == ["model.layers.0.q", "model.layers.1.q", "q"]


def test_fields_that_a_plain_config_sets() -> None:
    """plain.plain_config and plain.read_lora name these fields of LoraConfig."""
    fields = {
        "r", "lora_alpha", "fan_in_fan_out", "bias", "modules_to_save", "task_type", "base_model_name_or_path",
        "revision", "inference_mode", "target_modules", "layers_to_transform", "rank_pattern", "alpha_pattern",
        "use_rslora", "use_dora",
    }  # fmt: skip
    assert fields <= set(inspect.signature(peft.LoraConfig).parameters)
    plain = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"])
    assert (plain.bias, plain.use_rslora, plain.use_dora, plain.lora_bias) == ("none", False, False, False)
    assert not plain.rank_pattern
    assert not plain.alpha_pattern


def test_parameters_that_exports_pass_to_peft() -> None:
    """`get_peft_model_state_dict(save_embedding_layers=…)` and `load_peft_weights(device=…)` (export, adapted)."""
    assert {"adapter_name", "save_embedding_layers"} <= set(inspect.signature(get_peft_model_state_dict).parameters)
    assert "device" in inspect.signature(load_peft_weights).parameters


def test_plain_lora_on_a_skeleton_loses_its_values(tmp_path: Path) -> None:
    """PEFT's own layers follow their base to the meta device; the file's keys, with the adapter's name before
    `.weight`, are those of the model, which takes them by `assign` (training.adapted.load_on_skeleton)."""
    peft.save_as_lora(tmp_path, adapted("multilora"), 8)
    model = PeftModel.from_pretrained(h.skeleton(), tmp_path, low_cpu_mem_usage=True)
    factors = {name for name in model.state_dict() if ".lora_" in name}
    assert all(model.state_dict()[name].is_meta for name in factors)
    state = load_peft_weights(str(tmp_path), device="cpu")
    renamed = {key.replace(".weight", ".default.weight"): tensor for key, tensor in state.items()}
    assert set(renamed) == factors
    assert model.load_state_dict(renamed, strict=False, assign=True).unexpected_keys == []
    assert not any(model.state_dict()[name].is_meta for name in factors)


def test_native_loading_is_injection_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' `load_adapter` injects before it reads any weights or marks the model as adapted, so that what it
    is about to read can be checked there (entry_points.py reads these arguments)."""
    parameters = inspect.signature(transformers.PreTrainedModel.load_adapter).parameters
    assert list(parameters)[1:5] == ["peft_model_id", "adapter_name", "peft_config", "adapter_state_dict"]
    assert {"local_files_only", "adapter_kwargs", "load_config", "kwargs"} <= set(parameters)
    adapted("multilora").save_pretrained(tmp_path)
    model = ARCHS["llama"].build()
    seen: list[Any] = []

    def stop(self: AdapterModel, base: nn.Module, adapter_name: str, *_: Any, **__: Any) -> None:
        seen.append((model._hf_peft_config_loaded, weights_of(self.peft_config[adapter_name])))
        raise ValueError("stop")

    monkeypatch.setattr(AdapterModel, "inject_adapter", stop)
    with pytest.raises(ValueError, match="stop"):
        loraplex.load_adapter(model, str(tmp_path), "mine")
    assert seen == [(False, str(tmp_path / "adapter_model.safetensors"))]
    assert not model._hf_peft_config_loaded


def test_only_lora_is_hot_swapped() -> None:
    """PEFT refuses other types by a table; `patch_peft_hotswap` passes ours on before it is asked.

    Nothing in PEFT holds the functions under another name, and they take the arguments that ours pass on.
    """
    from peft.utils import hotswap

    assert list(hotswap.CONFIG_KEYS_TO_CHECK) == [PeftType.LORA]
    for name in HOTSWAP:
        ours = getattr(hotswap, name)
        theirs = ours.__wrapped__
        for module_name, module in list(sys.modules.items()):
            if module_name.partition(".")[0] in ("peft", "transformers"):
                assert not any(value is theirs for value in vars(module).values()), module_name
        parameters = [list(inspect.signature(each, follow_wrapped=False).parameters) for each in (ours, theirs)]
        assert parameters[0] == parameters[1]


# Optimizers and callbacks


def test_step_hook_fires_once_per_step() -> None:
    """`register_optimizer_step_post_hook` sees every optimizer, LBFGS included (optimizer_steps)."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    seen: list[torch.optim.Optimizer] = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: seen.append(optimizer))
    try:
        weight = nn.Parameter(torch.ones(2))
        for make in (torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS):
            optimizer = make([weight], lr=0.1)

            def closure(optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
                optimizer.zero_grad()
                loss = (weight**2).sum()
                loss.backward()
                return loss.detach()

            optimizer.step(closure)
            assert seen == [optimizer]
            seen.clear()
    finally:
        handle.remove()


def test_hooks_of_a_derived_optimizer_nest() -> None:
    """A subclass that calls its base class's step is hooked twice (optimizer_steps counts the outermost)."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    class Derived(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    weight, seen = nn.Parameter(torch.ones(2)), []
    torch.optim.SGD([weight]), (optimizer := Derived([weight]))
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: seen.append(optimizer))
    optimizer.step()
    handle.remove()
    assert seen == [optimizer] * 2


def test_the_step_that_makes_an_optimizers_state_is_known() -> None:
    """torch calls `step(closure=None)` with a learning rate of 0 and no backward pass (optimizer_steps)."""
    from torch.distributed.checkpoint.state_dict import _init_optim_state
    from torch.optim.optimizer import register_optimizer_step_post_hook

    weight, seen = nn.Parameter(torch.ones(2)), []
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    handle = register_optimizer_step_post_hook(
        lambda optimizer, args, kwargs: seen.append((kwargs, optimizer.param_groups[0]["lr"]))
    )
    _init_optim_state(optimizer)
    handle.remove()
    assert seen == [({"closure": None}, 0.0)]


def test_a_frame_that_runs_refuses_to_be_cleared() -> None:
    """By that a step is known that an exception has ended (optimizer_steps)."""
    frames = []

    def fails() -> None:
        frames.append(inspect.currentframe())
        with pytest.raises(RuntimeError):
            frames[0].clear()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as kept:  # whose traceback holds the frame
        fails()
    frames[0].clear()
    assert kept.tb is not None


def test_callbacks_at_the_end_of_a_backward_pass() -> None:
    """The engine takes them only in the course of a pass, and calls those that callbacks add (hidden_optimizer)."""
    queue, calls = torch.autograd.Variable._execution_engine.queue_callback, []
    with pytest.raises(RuntimeError, match="during backward"):
        queue(lambda: None)
    weight = nn.Parameter(torch.ones(2))

    def hook(p: torch.Tensor) -> None:
        queue(lambda: queue(lambda: calls.append("last")))
        queue(lambda: calls.append("first"))

    weight.register_post_accumulate_grad_hook(hook)
    (weight * 2).sum().backward()
    assert calls == ["first", "last"]


def test_accumulation_counts_one_version_of_a_gradient() -> None:
    """A reset is told from accumulation by that (hidden_optimizer.Watch)."""
    weight, versions = nn.Parameter(torch.ones(2)), []
    weight.register_post_accumulate_grad_hook(lambda p: versions.append(p.grad._version))
    for reset in (None, None, "none", None, "zero", None):
        if reset == "none":
            weight.grad = None
        elif reset == "zero":
            weight.grad.zero_()
        (weight * weight).sum().backward()
    grown = [b - a for a, b in pairwise(versions)]
    assert [step == 1 for step in grown] == [True, False, True, False, True]


def test_a_parameters_hooks_tell_whether_it_is_watched() -> None:
    """A handle and the parameter name the same hooks, and `_cdata` the tensor that calls them; torch swaps such a
    parameter, but not one that is referred to weakly (hidden_optimizer.Watch)."""
    one, other, calls = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), []
    assert one._post_accumulate_grad_hooks is None
    handle = one.register_post_accumulate_grad_hook(calls.append)
    assert handle.hooks_dict_ref() is one._post_accumulate_grad_hooks
    before = one._cdata
    one.data = torch.zeros(2)
    assert one._cdata == before
    torch.utils.swap_tensors(one, other)
    assert one._cdata != before
    one.sum().backward()
    assert calls == []
    one._post_accumulate_grad_hooks = one._post_accumulate_grad_hooks
    one.sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_node_that_recomputes_is_known(reentrant: bool) -> None:
    """Reentrant checkpointing recomputes inside its own node, the other kind inside whichever needs a tensor
    (parallel._refuse_reentrant)."""
    from torch.utils.checkpoint import checkpoint

    nodes: list[str | None] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        node = torch._C._current_autograd_node()
        nodes.append(node and node.name())
        return (x * 2).sin()

    checkpoint(block, torch.ones(2, requires_grad=True), use_reentrant=reentrant).sum().backward()
    assert nodes[0] is None
    assert (nodes[1] == "CheckpointFunctionBackward") is reentrant


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("original", [True, False])
def test_fsdp1_is_known_by_its_marks(original: bool, tmp_path: Path) -> None:
    """`_fsdp_flattened` on parameters, or on what their views are of (parallel.refuse_fsdp1)."""
    from torch import distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    from loraplex.runtime.parallel import refuse_fsdp1

    class Asks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            refuse_fsdp1(self)
            return super().forward(x)

    Asks(2, 2)(torch.ones(1, 2))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(Asks(2, 2), use_orig_params=original, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=r"FSDP1.*fully_shard"):
            model(torch.ones(1, 2))
    finally:
        dist.destroy_process_group()


def test_ddp_says_in_its_forward_which_ranks_it_joins(tmp_path: Path) -> None:
    """`_active_ddp_module` is set there and nowhere else (parallel.ddp_group)."""
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from loraplex.runtime.parallel import ddp_group

    class Asks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(ddp_group())
            return super().forward(x)

    seen: list[Any] = []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        DistributedDataParallel(Asks(2, 2), process_group=group)(torch.ones(1, 2))
        assert seen == [group]
        assert ddp_group() is None
    finally:
        dist.destroy_process_group()


def test_skipped_step_is_not_seen() -> None:
    """A gradient scaler that skips a step does not call the optimizer: the schedule must not advance."""
    model = get_peft_model(ARCHS["llama"].build(), config("dual_lora")).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(**BATCH).loss * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert h.shared_state(model).warmup.tolist()[0] == 0
    optimizer.zero_grad()
    scaler.scale(model(**BATCH).loss).backward()
    scaler.step(optimizer)
    assert h.shared_state(model).warmup.tolist()[0] == 1


def test_dead_models_are_not_watched() -> None:
    """Schedules are held weakly: a deleted model is no longer stepped or warned about (optimizer_steps)."""
    import gc

    from loraplex.runtime import optimizer_steps

    gc.collect()
    before = len(optimizer_steps._subscribers)
    model = get_peft_model(ARCHS["llama"].build(), config("dual_lora"))
    assert len(optimizer_steps._subscribers) == before + 1
    del model
    gc.collect()
    assert len(optimizer_steps._subscribers) == before


def test_gradient_scalers_scale_by_one_method() -> None:
    """A scaler's `scale` multiplies by `_scale`, in torch's class and FSDP's; accelerate calls it (loss_scaling.py)."""
    from accelerate import Accelerator
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    assert issubclass(ShardedGradScaler, torch.amp.GradScaler)
    assert "scale" in ShardedGradScaler.__dict__
    for cls in (torch.cuda.amp.GradScaler, torch.cpu.amp.GradScaler):
        assert issubclass(cls, torch.amp.GradScaler)
        assert "scale" not in cls.__dict__
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert scaler.scale(torch.tensor(3.0)) == 24
    assert scaler._scale == 8
    assert "self.scaler.scale(loss).backward(" in inspect.getsource(Accelerator.backward)


def test_a_backward_pass_has_a_number_and_takes_a_callback() -> None:
    """Hooks see the engine's number of the pass, −1 outside; a callback runs at its end (loss_scaling.py)."""
    seen = []
    x = torch.ones(2, requires_grad=True)
    loss = x.sum()

    def hook(gradient: torch.Tensor) -> None:
        seen.append(torch._C._current_graph_task_id())
        torch.autograd.Variable._execution_engine.queue_callback(lambda: seen.append("end"))

    loss.register_hook(hook)
    x.register_hook(lambda _: seen.append(torch._C._current_graph_task_id()))
    for _ in range(2):
        loss.backward(retain_graph=True)
    first, inside, end, second, *_ = seen
    assert first == inside != second
    assert first != -1 == torch._C._current_graph_task_id()
    assert end == seen[-1] == "end"


def test_deepspeed_scales_a_loss_by_two_methods() -> None:
    """ZeRO's `scale_if_loss` asks `LossScalerBase.scale_loss`; older engines its `backward` (loss_scaling.py)."""
    scalers = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    for cls in (scalers.LossScaler, scalers.DynamicLossScaler):
        assert issubclass(cls, scalers.LossScalerBase)
        assert not {"scale_loss", "backward"} & cls.__dict__.keys()
    assert scalers.LossScaler(8.0).loss_scale == 8
    assert "self.loss_scaler.scale_loss(value)" in inspect.getsource(ZeROOptimizer.scale_if_loss)


@pytest.mark.skipif(torch.__version__ < "2.9", reason="the setting has this name since torch 2.9")
def test_one_name_tells_the_precision_of_products() -> None:
    """`fp32_precision` of a backend's products follows the older setting, and "none" is full (products.py)."""
    cuda, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = cuda.fp32_precision, mkldnn.fp32_precision
    try:
        for precision, expected in {"high": ("tf32", "tf32"), "medium": ("tf32", "bf16")}.items():
            torch.set_float32_matmul_precision(precision)
            assert (cuda.fp32_precision, mkldnn.fp32_precision) == expected
    finally:
        torch.set_float32_matmul_precision("highest")
        cuda.fp32_precision, mkldnn.fp32_precision = before


def test_callback_events() -> None:
    """The callback answers to events of transformers' Trainer by these names (schedule.ScheduleCallback)."""
    from transformers import TrainerCallback

    for event in ("on_train_begin", "on_step_end"):
        ours, theirs = getattr(loraplex.ScheduleCallback, event), getattr(TrainerCallback, event)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


def test_trainers_take_the_default_callbacks(tmp_path: Path) -> None:
    """Each new Trainer makes one of each class in this list (schedule_callback.join_trainers)."""
    from transformers import Trainer, TrainingArguments, trainer

    get_peft_model(nn.Sequential(nn.Linear(4, 4)), loraplex.DualLoraConfig(target_modules=["0"]))
    ours = [kind for kind in trainer.DEFAULT_CALLBACKS if issubclass(kind, loraplex.ScheduleCallback)]
    assert len(ours) == 1
    run = Trainer(nn.Linear(2, 2), TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    assert [type(callback) for callback in run.callback_handler.callbacks].count(ours[0]) == 1


IMPORTED = """
import importlib, json, logging, signal, sys, warnings
import torch, peft, transformers
from torch.optim import optimizer

for name in json.loads(sys.argv[1]):  # what loraplex imports of others, so that they make their changes before
    importlib.import_module(name)


def attributes():
    modules = [m for m in list(sys.modules.values()) if m.__name__.partition(".")[0] in HOSTS]
    found = {f"{m.__name__}:{key}": value for m in modules for key, value in list(vars(m).items())}
    kinds = {v for v in found.values() if isinstance(v, type) and v.__module__.partition(".")[0] in HOSTS}
    found |= {f"{v.__module__}.{v.__qualname__}:{key}": value for v in kinds for key, value in vars(v).items()}
    return found


def process():
    loggers = {name: (log.level, list(log.handlers), log.propagate)
               for name, log in logging.root.manager.loggerDict.items()
               if isinstance(log, logging.Logger) and not name.startswith("loraplex")}
    return {
        "hooks": (dict(optimizer._global_optimizer_pre_hooks), dict(optimizer._global_optimizer_post_hooks)),
        "module hooks": [dict(vars(torch.nn.modules.module)[name]) for name in sorted(vars(torch.nn.modules.module))
                         if name.startswith("_global_") and isinstance(vars(torch.nn.modules.module)[name], dict)],
        "finders": list(sys.meta_path), "path hooks": list(sys.path_hooks), "path": list(sys.path),
        "filters": list(warnings.filters), "showwarning": warnings.showwarning, "loggers": loggers,
        "root": (logging.root.level, list(logging.root.handlers)),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "excepthook": sys.excepthook, "threads": torch.get_num_threads(), "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(), "seed": torch.initial_seed(),
        "precision": torch.get_float32_matmul_precision(),
    }


HOSTS = ("peft", "transformers", "torch", "accelerate", "safetensors")
process(), attributes()  # looking makes some attributes
before, others = process(), attributes()
import loraplex
after, others_after = process(), attributes()
changed = sorted(key for key in others if key in others_after and others_after[key] is not others[key]
                 and not isinstance(others[key], (int, float, str, bool)))
print(json.dumps({"process": [key for key in before if before[key] != after[key]], "changed": changed}))
"""


def test_importing_changes_what_the_record_names() -> None:
    """Nothing in the process, and in others' modules what docs/adr/0007-what-is-global.md lists."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def run(*arguments: str) -> Any:
        command = [sys.executable, "-W", "ignore", "-c", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    names = "import json, sys, loraplex; print(json.dumps([n for n, m in list(sys.modules.items()) if m and "
    names += "n.partition('.')[0] in ('peft', 'transformers', 'torch', 'accelerate', 'safetensors') and "
    names += "getattr(m, '__spec__', None)]))"
    found = run(IMPORTED, json.dumps(run(names)))
    assert found["process"] == []
    conversion_names = {f"{module}:convert_to_lora" for module in CONVERSION}
    entry_points = {key for key in found["changed"] if key.rpartition(":")[2] in ENTRY_POINTS}
    assert conversion_names <= set(found["changed"])
    status_names = {f"{module}:get_layer_status" for module in ("peft", "peft.peft_model")}
    hotswap_names = {f"peft.utils.hotswap:{name}" for name in HOTSWAP}
    assert set(found["changed"]) == conversion_names | entry_points | status_names | hotswap_names
    kinds = ("PeftModel", "PeftMixedModel", "PeftAdapterMixin")
    assert all(any(kind in key for kind in kinds) for key in entry_points)


HOTSWAP = ("hotswap_adapter", "hotswap_adapter_from_state_dict", "prepare_model_for_compiled_hotswap")
CONVERSION = ("peft", "peft.tuners", "peft.tuners.lora", "peft.tuners.lora.conversion")
ENTRY_POINTS = ("__init__", "add_adapter", "load_adapter", "from_pretrained")


def test_versions() -> None:
    """The installed PEFT lies in the range that the package declares and was tested with."""
    needed = next(Requirement(r) for r in requires("loraplex") or [] if Requirement(r).name == "peft")
    assert version("peft") in needed.specifier
    assert re.match(r"\d+\.\d+", peft.__version__)
