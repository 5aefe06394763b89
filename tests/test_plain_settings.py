"""A plain LoRA that is no whole one: one clear error wherever its folder is read, and none for odd ones that are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import ARCHS
from loraplex.commands.cli import main
from loraplex.export.lora_format import read_lora
from loraplex.inspection.describe import describe
from loraplex.recipes.adapters.saved import adapter_json

LLAMA = ARCHS["llama"]
FACTOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def lora(folder: Path, **settings: Any) -> Path:
    model = get_peft_model(LLAMA.build(), LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], **settings))
    model.save_pretrained(folder)
    return folder


def edit_settings(folder: Path, **changed: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


SETTINGS: dict[str, tuple[Any, str]] = {
    "r": (0, "r=0 must be an integer of at least 1"),
    "lora_alpha": ("x", "lora_alpha='x' must be a positive number"),
    "use_rslora": ("yes", "use_rslora='yes' must be true or false"),
    "rank_pattern": ([], "rank_pattern=.* must be a mapping"),
    "alpha_pattern": ({"[": 2}, "is not a regular expression"),
    "target_modules": ("(a+)+$", "can match one name in more than"),
    "layers_to_transform": ("x", "layers_to_transform='x' must be"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, tmp_path: Path) -> None:
    value, message = SETTINGS[name]
    edit_settings(lora(tmp_path), **{name: value})
    for read in (describe, read_lora, adapter_json):
        with pytest.raises(ValueError, match=message):
            read(tmp_path)


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
@pytest.mark.parametrize("kind", ["LOHA", "VERA", "OFT"])
def test_patterns_of_other_types(kind: str, name: str, tmp_path: Path) -> None:
    value = {"(a+)+$": 2} if name == "rank_pattern" else "(a+)+$"
    layers = [0] if name == "layers_pattern" else None
    edit_settings(lora(tmp_path), peft_type=kind, layers_to_transform=layers, **{name: value})
    with pytest.raises(ValueError, match=f"{name}=.*can match one name in more than"):
        adapter_json(tmp_path)


@pytest.mark.parametrize("value", ["2", 2.5, None, True, -1, 10**9])
def test_ranks(value: object, tmp_path: Path) -> None:
    edit_settings(lora(tmp_path), r=value)
    for read in (describe, read_lora, adapter_json):
        with pytest.raises(ValueError, match=r"r=.* must be an integer"):
            read(tmp_path)


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda B: B.flatten(),
    "turned": lambda B: B.T.contiguous(),
    "of rank 1": lambda B: B[:, :1].contiguous(),
    "empty": lambda B: B[:0],
    "one more dimension": lambda B: B[None],
}


@pytest.mark.parametrize("kind", SHAPES)
def test_shapes(kind: str, tmp_path: Path) -> None:
    _edit(lora(tmp_path), SHAPES[kind])
    for read in (describe, read_lora):
        with pytest.raises(ValueError, match=r"factors of model\.layers\.0\.self_attn\.q_proj are A \(2, .*rank 2"):
            read(tmp_path)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_half_a_pair(factor: str, tmp_path: Path) -> None:
    tensors = load_file(lora(tmp_path) / "adapter_model.safetensors")
    del tensors[FACTOR.replace("lora_B", factor)]
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    for read in (describe, read_lora):
        with pytest.raises(ValueError, match=rf"lacks .*layers\.0\.self_attn\.q_proj\.{factor}"):
            read(tmp_path)


def test_an_adapted_embedding_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no rank and no norm in the table, and stops nothing."""
    model = get_peft_model(LLAMA.build(), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "–" in next(line for line in capsys.readouterr().out.splitlines() if "embed_tokens" in line)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_factors(bad: float, tmp_path: Path) -> None:
    _edit(lora(tmp_path), lambda B: torch.full_like(B, bad))
    for read in (describe, read_lora):
        with pytest.raises(ValueError, match=r"holds NaN or Inf on model\.layers\.0\.self_attn\.q_proj"):
            read(tmp_path)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.bool])
def test_factors_that_are_not_floating_point(dtype: torch.dtype, tmp_path: Path) -> None:
    _edit(lora(tmp_path), lambda B: B.to(dtype))
    for read in (describe, read_lora, adapter_json):
        with pytest.raises(ValueError, match=r"q_proj\.lora_B\.weight as .*no factor of a LoRA"):
            read(tmp_path)


def _edit(folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[FACTOR] = change(tensors[FACTOR])
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("alpha", [-3, 0, 2.5])
def test_alphas_that_only_lora_takes(alpha: float, tmp_path: Path) -> None:
    lora(tmp_path, init_lora_weights=False)
    edit_settings(tmp_path, lora_alpha=alpha, alpha_pattern={"nowhere": -1}, rank_pattern=None)
    _, B = read_lora(tmp_path)["model.layers.0.self_attn.q_proj"]
    stored = load_file(tmp_path / "adapter_model.safetensors")[FACTOR]
    torch.testing.assert_close(B, stored.double() * alpha / 2)
    describe(tmp_path)
    adapter_json(tmp_path)
