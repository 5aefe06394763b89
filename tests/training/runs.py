"""Tiny models and data in a folder, and runs of the command on them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

METHODS = {
    "masa": {"expert_mixing": "router"},
    "aslora": {"merge_start_step": 2, "merge_interval": 3, "num_merges": 2},
    "dual_lora": {"warmup_steps": 6},
    "multilora": {},
    "lora": {},
}
WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", ":", "good", "bad", "dull", "bright"]
WORDS += ["film", "review", "is", "the", "very", "."]
CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = CHAT if chat else None
    return fast


def furnish(room: Path) -> Path:
    """Put a tiny Llama, a tiny Bert, and reviews that are good if they say "bright" into a folder."""
    torch.manual_seed(0)
    size = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    LlamaForCausalLM(
        LlamaConfig(
            **size, num_hidden_layers=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None
        )
    ).save_pretrained(room / "llama")
    tokenizer(chat=True).save_pretrained(room / "llama")
    BertModel(BertConfig(**size, num_hidden_layers=2, pad_token_id=0)).save_pretrained(room / "bert")
    tokenizer(chat=False).save_pretrained(room / "bert")
    for name, seed in (("reviews", 0), ("more", 1)):
        draw = random.Random(seed)
        rows = []
        for _ in range(80):
            good = draw.random() < 0.5
            words = [draw.choice(["the", "film", "very", "is", "."]) for _ in range(draw.randint(4, 14))]
            words.insert(draw.randint(0, len(words)), "bright" if good else "dull")
            rows.append({"text": " ".join(words), "label": "good" if good else "bad"})
        (room / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return room


def entry(room: Path, name: str = "reviews", **fields) -> dict:
    templates = {"prompt": "review : {text}", "response": "{label}", "labels": {"good": "good", "bad": "bad"}}
    return {"path": str(room / f"{name}.jsonl"), **templates, "eval_size": 16, **fields}


def write_run(room: Path, output_dir: Path, method: str, **changes) -> Path:
    train = {"max_steps": 12, "learning_rate": 5e-3, "eval_steps": 5, "save_steps": 4, "weight_decay": 0.1}
    run = {
        "model": str(room / "llama"),
        "method": method,
        "adapter": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **METHODS[method]},
        "data": [entry(room)],
        "train": {**train, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"},
        "output_dir": str(output_dir),
    }
    path = output_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**run, **changes}))
    return path


def rows(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(found: list[dict]) -> list[dict]:
    return [row for row in found if row["event"] != "end"]
