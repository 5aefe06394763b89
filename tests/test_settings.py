"""A config's fields have the types that they declare, and its patterns can be matched in time."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from peft import PeftConfig, PeftModel, get_peft_model

import helpers as h
import loraplex
from helpers import ARCHS, PLAIN, adapted, config
from loraplex import AsLoraConfig, DualLoraConfig, MasaConfig, MultiLoraConfig
from loraplex.io.field_types import fits
from loraplex.tuner.patterns import check_pattern

LLAMA = ARCHS["llama"]
BATCH = LLAMA.inputs()
CONFIGS = [MasaConfig, AsLoraConfig, DualLoraConfig, MultiLoraConfig]
ODD: list[Any] = [
    *(True, 1, -1, 0, 1.5, float("nan"), float("inf"), "", "false", "1", None, b"x", object()),
    *([], [1], ["a"], [None], [["a"]], {}, {"a": 1}, {"a": "b"}, {"a": True}, {1: 1}, [{}], 10**400, "x" * 10**6),
]


def refusal(cls: type[Any], settings: dict[str, Any]) -> str | None:
    """What the config says of these settings; None if it takes them, and can then be written."""
    try:
        json.dumps(cls(**settings).to_dict())
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_field_refuses_what_its_type_does_not_say(cls: type[Any]) -> None:
    """Inherited fields included. What is accepted has the type, and nothing ends in an error of another kind."""
    hints, refused = get_type_hints(cls), 0
    for field in dataclasses.fields(cls):
        for value in ODD:
            message = refusal(cls, {field.name: value})
            if message is None:
                assert fits(value, hints[field.name]), (field.name, value)
            else:
                refused += 1
                assert field.name in message
                assert len(message) < 1500, "a message does not repeat a whole tree"
    assert refused > 8 * len(dataclasses.fields(cls))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_rslora": "false"}, "use_rslora='false' must be true or false."),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern=['q_proj'] must be a mapping from strings to integers."),
        ({"alpha_pattern": {"q": "4"}}, "alpha_pattern={'q': '4'} must be a mapping from strings to numbers."),
        ({"modules_to_save": 2}, "modules_to_save=2 must be a list of strings or none."),
        ({"modules_to_save": "head"}, "modules_to_save='head' must be a list of strings or none."),
        ({"target_modules": [["q"]]}, "target_modules=[['q']] must be a list of strings or a string or none."),
        ({"layers_to_transform": 1.0}, "layers_to_transform=1.0 must be a list of integers or an integer or none."),
        ({"inference_mode": 1}, "inference_mode=1 must be true or false."),
        ({"revision": 1}, "revision=1 must be a string or none."),
        ({"task_type": 1}, "task_type=1 must be a string or none."),
        ({"auto_mapping": "os"}, "auto_mapping='os' must be a mapping or none."),
        ({"init_weights": None}, "init_weights=None must be true or false."),
        ({"peft_type": "LORA"}, "peft_type='LORA' is not that of"),
        ({"r": 10**9}, "r=1000000000 must be an integer of at most 65536."),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", CONFIGS)
def test_one_form_of_message(cls: type[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        cls(**settings)


def test_counts_that_can_t_be_meant() -> None:
    for cls, name in ((MasaConfig, "num_experts"), (MultiLoraConfig, "num_modules")):
        with pytest.raises(ValueError, match=rf"{name}=1000000000 must be an integer of at most 1024"):
            cls(**{name: 10**9})
    with pytest.raises(ValueError, match=r"warmup_steps=.*at most"):
        DualLoraConfig(warmup_steps=2**70)


@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
def test_names_may_come_in_any_collection(kind: type[Any]) -> None:
    made = MasaConfig(target_modules=kind(["q_proj"]), exclude_modules=kind(["k"]), modules_to_save=kind(["head"]))
    assert (made.target_modules, made.exclude_modules, made.modules_to_save) == ({"q_proj"}, {"k"}, ["head"])


@pytest.mark.parametrize("method", PLAIN)
def test_rank_larger_than_a_layer(method: str) -> None:
    """It names the layer, before anything of that size is made, and leaves the model alone."""
    base = LLAMA.build()
    before = h.snapshot(base, BATCH)
    ranks = {"r_magnitude": None, "r_direction": None} if method == "dual_lora" else {}
    with pytest.raises(ValueError, match=r"r=60000.*layers\.0\.self_attn\.q_proj.*\(32, 32\).*rank_pattern"):
        get_peft_model(base, config(method, r=60_000, **ranks))
    h.assert_unchanged(before, h.snapshot(base, BATCH))
    # A small head among the targets is no reason to refuse.
    get_peft_model(base, config(method, r=h.HIDDEN, target_modules=["q_proj", "k_proj"], **ranks))


@pytest.mark.parametrize(("cls", "name"), [(MasaConfig, "num_experts"), (MultiLoraConfig, "num_modules")])
def test_parts_larger_than_a_layer(cls: type[Any], name: str) -> None:
    with pytest.raises(ValueError, match=r"r=32 in each of 1000 parts.*q_proj"):
        get_peft_model(LLAMA.build(), cls(r=32, target_modules=["q_proj"], **{name: 1000}))


# Files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested in more than 100 levels"),
        ('{"r": ' * 100_000, "nested in more than 100 levels"),
        ("[1, 2]", r"holds \[1, 2\], not a mapping"),
        ("5", "holds 5, not a mapping"),
        ("null", "holds None, not a mapping"),
        ("{}", "peft_type=None must be the name of an adapter type"),
        ('{"peft_type": "adapter.evil:x"}', r"peft_type='adapter\.evil:x' must be the name"),
        ('{"peft_type": ["MASA"]}', r"peft_type=\['MASA'\] must be the name"),
        ('{"peft_type": 5}', "peft_type=5 must be the name"),
        ('{"peft_type": "NEWER"}', "peft_type='NEWER' is no type that this PEFT or loraplex knows"),
        ('{"peft_type": "LORA"}', "is a LORA adapter, none of loraplex"),
        ('{"peft_type": "MASA", "cls": 1, "self": 2}', "does not know: 'cls, self'"),
        ('{"peft_type": "MASA", "x": 1, "loraplex_version": [1]}', r"written by loraplex \[1\]"),
        ('{"peft_type": "MASA", "use_rslora": "false"}', "use_rslora='false'"),
        ('{"peft_type": "MASA", "r": ' + "9" * 5000 + "}", "number that can't be read|r=9"),
    ],
    ids=lambda text: text[:40],
)
def test_settings_of_a_file(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One clear error, and no import: `adapter/evil.py` lies where Python would find it."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    adapted("masa-sum").save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(text, encoding="utf-8")
    model = adapted("masa-sum")
    for target in (model, LLAMA.build()):
        before = h.snapshot(target, BATCH)
        with pytest.raises(ValueError, match=message):
            loraplex.load_adapter(target, tmp_path / "adapter", "second")
        h.assert_unchanged(before, h.snapshot(target, BATCH))


# Patterns

GOOD = [
    r".*\.(q|v)_proj",
    r"model\.layers\.(1|2|3)\.self_attn\..*",
    r"(\w+\.)+q_proj",
    r"(?:[^.]+\.)*q_proj",
    r"model(\.\w+)+_proj",
    r".*layers.*self_attn.*(q|k|v)_proj.*",
    r"^(?!.*visual).*(?:q_proj|v_proj).*$",
    r"^((?!lm_head).)*$",
    r"(?i).*(Q|V)_PROJ",
    r"(?:.*\.)?layers\.(?:\d+)\.(?:.*\.)?(?:q|k|v|o)_proj",
    r".*blocks\.\d+\.(attn|cross_attn|mlp)\.(qkv|proj|fc\d+|w\d+).*",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    rf"model\.layers\.({'|'.join(map(str, range(128)))})\.(self_attn|mlp)\.(q_proj|k_proj|up_proj|down_proj)",
    "|".join(rf"model\.layers\.{i}\.self_attn\.q_proj" for i in range(300)),
    # What unsloth writes.
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:k_proj|v_proj|q_proj)))",
]
"""What people write."""
HANGING = [
    *(r"(a+)+$", r"(.*)*x", r"(.*a){20}", r"(a|aa)+$", r"(\w+\s?)+$", r"^(([a-z])+.)+[A-Z]([a-z])+$", r"(a?){40}a{40}"),
    *(
        r"(?=(a+)+$)b",
        r"(x+x+)+y",
        r"([a-z._0-9]+)+!",
        r".*.*.*.*.*.*x",
        r"(\w*\.?\w*)*!",
        r"(.*?,){12}P",
        r"((a*)*)*b",
    ),
]
NAMES = [
    *("model.layers.11.self_attn.q_proj", "base_model.model.model.language_model.layers.27.mlp.experts.gate_up_proj"),
    *("encoder.block.3.layer.0.SelfAttention.q", "transformer.h.10.attn.c_attn", "a_b.c_d.e_f.g_h.i_j.k_l.m_n.o_p.q_r"),
]


@pytest.mark.parametrize("pattern", GOOD)
def test_patterns_that_people_write(pattern: str) -> None:
    MasaConfig(target_modules=pattern, exclude_modules=pattern)
    if not pattern.startswith("(?i)"):  # a flag must stand first, and PEFT puts other things before it
        MasaConfig(rank_pattern={pattern: 2}, alpha_pattern={pattern: 2})
    started = time.process_time()
    for name in NAMES:
        re.fullmatch(pattern, name)
    assert time.process_time() - started < 0.1


@pytest.mark.parametrize("pattern", HANGING)
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
@pytest.mark.parametrize("cls", [MasaConfig, DualLoraConfig])
def test_patterns_that_hang(cls: type[Any], field: str, pattern: str) -> None:
    value = {pattern: 2} if field in ("rank_pattern", "alpha_pattern") else pattern
    more = {"layers_to_transform": [1]} if field == "layers_pattern" else {}
    started = time.process_time()
    with pytest.raises(ValueError, match=rf"{field}=.*Python's re too long.*by name"):
        cls(**{field: value}, **more)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("pattern", ["(a", "[", "(?P<x", "a{2,1}", "(" * 5000 + ")" * 5000, "a" * 30_000, "(?:" * 99])
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save"]
)
def test_patterns_that_are_none(field: str, pattern: str) -> None:
    value: Any = {pattern: 2} if field in ("rank_pattern", "alpha_pattern") else pattern
    value = [pattern] if field == "modules_to_save" else value
    more = {"layers_to_transform": [1]} if field == "layers_pattern" else {}
    with pytest.raises(
        ValueError, match=rf"^{field}=.*(regular expression|nested too deeply|a pattern may have)"
    ) as info:
        MultiLoraConfig(**{field: value}, **more)
    assert len(str(info.value)) < 500


def test_names_are_no_patterns() -> None:
    """Lists of names are compared, not matched."""
    made = MasaConfig(target_modules=["(a+)+$", "q_proj"], exclude_modules=["["])
    assert made.target_modules == {"(a+)+$", "q_proj"}


def test_message_of_a_long_pattern_is_short() -> None:
    with pytest.raises(ValueError, match="…") as info:
        check_pattern("target_modules", "(a+)+" * 3000)
    assert len(str(info.value)) < 600


def test_a_file_s_pattern_is_judged_before_it_is_matched(tmp_path: Path) -> None:
    adapted("aslora").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": r"([a-z._0-9]+)+!"}))
    base = LLAMA.build()
    before = h.snapshot(base, BATCH)
    for load in (
        lambda: PeftModel.from_pretrained(base, tmp_path),
        lambda: base.load_adapter(str(tmp_path)),
        lambda: PeftConfig.from_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=r"target_modules=.*Python's re too long"):
            load()
    h.assert_unchanged(before, h.snapshot(base, BATCH))
