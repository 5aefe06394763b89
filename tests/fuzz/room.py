"""What every case starts from, built once: a tiny base model with its tokenizer, good adapters of all methods, data."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen2Config

from loraplex import AsLoraConfig, DualLoraConfig, MasaConfig, MultiLoraConfig
from tests.fuzz import raw
from tests.helpers import advance, fill
from tests.training.runs import WORDS, tokenizer

ROOM = "/room-of-the-fuzzer"
"""Stands for the room's folder in what is mutated: a case must not depend on the length of a temporary path."""
HIDDEN, LAYERS = 8, 3
LABELS = ["bad", "good"]

_ours = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]}
_aslora = partial(AsLoraConfig, merge_start_step=1, merge_interval=1, num_merges=2, **_ours)
_masa = partial(MasaConfig, num_experts=2, share_layers=2, **_ours)
_multi = partial(MultiLoraConfig, num_modules=2, **_ours)
_dual = partial(DualLoraConfig, r_magnitude=1, r_direction=3, warmup_steps=4, **{**_ours, "r": 4})
_lora = partial(LoraConfig, **_ours)

ADAPTERS: dict[str, Callable[..., Any]] = {
    "multilora": _multi,
    "multilora-module": partial(_multi, num_modules=3, scaling_granularity="module", use_rslora=True),
    "multilora-patterns": partial(_multi, rank_pattern={"v_proj": 3}, alpha_pattern={r"layers\.1\..*": 5.0}),
    "multilora-extras": partial(_multi, modules_to_save=["lm_head"], bias="all"),
    "aslora": _aslora,
    "aslora-extras": partial(_aslora, modules_to_save=["lm_head"], bias="lora_only"),
    "dual_lora": _dual,
    "dual_lora-bias": partial(_dual, bias="lora_only"),
    "masa-router": partial(_masa, expert_mixing="router"),
    "masa-sum": partial(_masa, expert_mixing="sum"),
    "masa-concat": partial(_masa, expert_mixing="concat"),
    "masa-extras": partial(_masa, expert_mixing="concat", modules_to_save=["lm_head"], bias="all"),
    "classifier": partial(_multi, task_type="SEQ_CLS"),
    "lora": partial(_lora, init_lora_weights=False),
    "lora-patterns": partial(_lora, init_lora_weights=False, use_rslora=True, rank_pattern={"v_proj": 3}),
}
"""Name → config; all are trained a little, so that ASLoRA stands between merges and Dual LoRA in its warm-up."""
OURS = tuple(name for name in ADAPTERS if not name.startswith(("lora", "classifier")))


@dataclass
class Room:
    """Folders and models that cases copy from, never write to."""

    folder: Path
    base: nn.Module
    hosts: dict[str, PeftModel] = field(default_factory=dict)
    configs: dict[str, Any] = field(default_factory=dict)
    """Adapter → its adapter_config.json."""
    tensors: dict[str, raw.Tensors] = field(default_factory=dict)
    inputs: Tensor = field(default_factory=lambda: torch.tensor([[3, 9, 4, 12, 7], [8, 2, 2, 14, 5]]))

    def model(self) -> Any:
        """A fresh base model."""
        return copy.deepcopy(self.base)

    def host(self, name: str) -> PeftModel:
        """A fresh model whose first adapter, "default", is `name`."""
        return copy.deepcopy(self.hosts[name])

    def placed(self, content: bytes) -> bytes:
        """`content` with the real folder in place of `ROOM`."""
        return content.replace(ROOM.encode(), str(self.folder).encode())

    @property
    def base_folder(self) -> Path:
        """The saved base model."""
        return self.folder / "base"


def model_config(**settings: Any) -> Qwen2Config:
    """A model with biases, three layers deep."""
    return Qwen2Config(
        vocab_size=len(WORDS), hidden_size=HIDDEN, intermediate_size=12, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None, eos_token_id=1,
        pad_token_id=0, tie_word_embeddings=False, **settings,
    )  # fmt: skip


def furnish(folder: Path) -> Room:
    """Build everything into `folder`, and import what cases would import one by one."""
    for module in (
        "trl",
        "loraplex.recipes.training.run",
        "loraplex.recipes.adapters.analysis",
        "loraplex.study.run",
        "pyarrow.parquet",
        "matplotlib.font_manager",
    ):
        importlib.import_module(module)
    torch.manual_seed(0)
    tokenizer(chat=False).save_pretrained(folder / "base")
    AutoModelForCausalLM.from_config(model_config()).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    base.save_pretrained(folder / "base")
    room = Room(folder, base)
    for name, config in ADAPTERS.items():
        _adapter(room, name, config())
    rows = [{"text": f"the film is {'bright' if n % 3 else 'dull'}", "label": LABELS[n % 3 > 0]} for n in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return room


def _adapter(room: Room, name: str, config: Any) -> None:
    base = room.model()
    if name == "classifier":
        labels = dict(enumerate(LABELS))
        torch.manual_seed(1)
        base = AutoModelForSequenceClassification.from_pretrained(
            room.base_folder, id2label=labels, label2id={label: index for index, label in labels.items()}
        )
        base.config.pad_token_id = 0
    base.name_or_path = base.config._name_or_path = str(room.base_folder)
    torch.manual_seed(len(name))
    model = get_peft_model(base, config)
    if not name.startswith("lora"):
        fill(model)
        advance(model, steps=2)
    generator = torch.Generator().manual_seed(2)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and ("modules_to_save" in key or key.endswith("bias")):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    folder = room.folder / "adapters" / name
    model.save_pretrained(folder)
    room.hosts[name] = model.eval()
    room.configs[name] = json.loads((folder / "adapter_config.json").read_text().replace(str(room.folder), ROOM))
    room.tensors[name] = raw.read(folder / "adapter_model.safetensors")
    for parameter in model.parameters():
        parameter.grad = None


def run_tree(**changes: Any) -> dict[str, Any]:
    """A small run's YAML, as plain values."""
    return {
        "model": f"{ROOM}/base",
        "method": "multilora",
        "dtype": "float32",
        "adapter": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
        "data": [
            {
                "path": f"{ROOM}/data.jsonl", "prompt": "review : {text}", "response": "{label}",
                "labels": {"good": "good", "bad": "bad"}, "eval_size": 4,
            }
        ],
        "train": {"max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "warmup_steps": 0.1},
        "output_dir": "out/run",
        **changes,
    }  # fmt: skip


def study_tree(**changes: Any) -> dict[str, Any]:
    """A small study's YAML, as plain values."""
    data = {**run_tree()["data"][0], "test_size": 3}
    return {
        "title": "study",
        "model": f"{ROOM}/base",
        "tasks": {"reviews": [data]},
        "methods": {"multilora": None, "lora": {"adapter": {"target_modules": ["q_proj"]}}},
        "reference": "lora",
        "budget": "lora:r=2",
        "adapter": {"target_modules": ["q_proj", "v_proj"]},
        "learning_rates": [1e-3, 3e-3],
        "seeds": [0, 1],
        "train": {"max_steps": 3, "per_device_train_batch_size": 2},
        "output_dir": "out/study",
        **changes,
    }
