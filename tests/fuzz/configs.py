"""Settings given to the methods' config classes, and what get_peft_model makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model

from loraplex import AsLoraConfig, DualLoraConfig, MasaConfig, MultiLoraConfig
from tests.fuzz import oracle
from tests.fuzz.adapters import FIELDS
from tests.fuzz.draw import PATTERNS, Draw, short
from tests.fuzz.loading import compare, snapshot
from tests.fuzz.room import Room
from tests.fuzz.verdict import Result, fault_of, text_of
from tests.fuzz.watch import Watch, limited

CLASSES = (MultiLoraConfig, AsLoraConfig, DualLoraConfig, MasaConfig)
_USUAL: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "num_merges": 1}


def run(draw: Draw, room: Room, place: Path, watch: Watch) -> Result:
    """One case: construct, write as JSON and read back; one in four puts the adapter onto a model."""
    cls: Any = draw.choice(CLASSES)
    result = Result("config", f"config {cls.__name__}")
    settings = _settings(draw, cls)
    config: Any = None
    with watch.on(place) as seen:
        try:
            with limited():
                config = cls(**settings)
                _check(result, cls, settings, config)
        except BaseException as error:
            _refused(result, error)
    if config is not None and not result.problems and draw.chance(0.25):
        _adapt(draw, room, result, config)
    result.problems += [f"forbidden: {event}" for event in seen]
    result.mutations = draw.log
    return result


def _settings(draw: Draw, cls: Any) -> dict[str, Any]:
    known = [name for name in FIELDS if name in cls.__dataclass_fields__]
    settings = {name: value for name, value in _USUAL.items() if name in known}
    for _ in range(draw.times(4)):
        name = draw.choice(known)
        default = getattr(cls, name, None)
        if draw.chance(0.25):
            pattern = draw.choice(PATTERNS)
            settings[name] = draw.choice(
                [pattern, [pattern], {pattern: 2}, {"q_proj": draw.value()}, ("q_proj",), {"v_proj"}]
            )
        else:
            settings[name] = draw.another(default) if draw.chance(0.4) else draw.value()
        draw.note(f"{name}={short(settings[name])}")
    return settings


def _check(result: Result, cls: Any, settings: dict[str, Any], config: Any) -> None:
    """Settings that were taken are of the documented type, and come back from a file equal."""
    plain = {name: _plain(value) for name, value in settings.items()}
    try:
        oracle.check_settings({"peft_type": cls.method, **plain})
    except oracle.Invalid as invalid:
        result.bad(f"accepts {invalid}")
        return
    text = json.dumps(config.to_dict(), default=_enum)
    again = PeftConfig.from_peft_type(**json.loads(text))
    if json.dumps(again.to_dict(), default=_enum) != text:
        result.bad("the settings read back from JSON are others")
    if not 0 < config.scaling("model.layers.0.self_attn.q_proj") < float("inf"):
        result.bad(f"scaling is {config.scaling('model.layers.0.self_attn.q_proj')}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, set)) else value


def _enum(value: Any) -> Any:
    return getattr(value, "value", str(value))


def _adapt(draw: Draw, room: Room, result: Result, config: Any) -> None:
    model = room.model()
    before = snapshot(model, room)
    result.path = "get_peft_model"
    try:
        with limited():
            adapted = get_peft_model(model, config)
            adapted(room.inputs)
    except BaseException as error:
        _refused(result, error)
        compare(result, before, model, room, error)


def _refused(result: Result, error: BaseException) -> None:
    result.outcome, result.message = "refused", text_of(error)[:500]
    if fault := fault_of(error):
        result.bad(fault, error)
