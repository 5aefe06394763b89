"""What to do about a setting that `peft.LoraConfig` has and our configs have not."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from peft import LoraConfig

from loraplex.io.field_types import shown

_REMEDIES = {
    "init_lora_weights": "init_weights=True starts at the base model's function, as its default does; other starts "
    "(pissa, olora, eva, loftq, …) are LoRA's own",
    "layer_replication": "repeat the layers in the base model, save it, and adapt the deeper model",
    "fan_in_fan_out": "leave it out, GPT-2's Conv1D is recognised",
    "lora_bias": 'leave it out; bias="lora_only" trains the biases of the adapted modules',
    "use_dora": "leave it out; the methods adapt no magnitudes",
    "loftq_config": "leave it out and load the base model quantised (quantization_config=…)",
    "runtime_config": "leave it out; it holds settings of DoRA and of offloading while it starts",
}


def unknown_field(cls: Any, name: str) -> TypeError:
    """The error for a keyword that the config class `cls` does not know: whose it is, and what to do."""
    if name in {field.name for field in fields(LoraConfig)}:
        remedy = _REMEDIES.get(name, "leave it out")
        return TypeError(f"{name} is a setting of peft.LoraConfig that {cls.__name__} does not have: {remedy}.")
    known = [field.name for field in fields(cls)]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"it has {', '.join(known)}."
    return TypeError(f"{cls.__name__} got an unexpected keyword argument {shown(name)}: {hint}")
