"""Llamas with random weights."""

from __future__ import annotations

import argparse
from typing import Any

import psutil
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

# hidden, intermediate, layers, heads, key-value heads, vocabulary, embeddings tied
SIZES = {
    "tiny": (64, 128, 2, 4, 2, 128, True),
    "100m": (768, 2048, 12, 12, 4, 32000, True),
    "300m": (1024, 4096, 16, 16, 8, 32000, True),
    "1b": (2048, 8192, 16, 32, 8, 128256, True),
    "8b": (4096, 14336, 32, 32, 8, 128256, False),
}


def llama_config(size: str, **changes: Any) -> LlamaConfig:
    """The shape of a Llama of this size; 1b and 8b are Llama 3's."""
    hidden, inner, layers, heads, kv, vocabulary, tied = SIZES[size]
    shape = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocabulary, "tie_word_embeddings": tied, "use_cache": False,
    }  # fmt: skip
    return LlamaConfig(**shape | {"max_position_embeddings": 131072} | changes)


def weights_fit(config: LlamaConfig, args: argparse.Namespace, copies: float) -> bool:
    """Whether memory is free for that many times the weights; says so if it is not."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in LlamaForCausalLM(config).parameters()) * args.dtype.itemsize
    if args.device.type == "cuda":
        free = torch.cuda.mem_get_info(args.device)[0]
    else:
        free = psutil.virtual_memory().available
    if copies * weights > free:
        size = f"{config.hidden_size} × {config.num_hidden_layers}"
        print(f"{size} left out: {weights / 2**30:.1f} GiB of weights, {free / 2**30:.1f} GiB of memory free")
    return copies * weights <= free


def llama(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A Llama with random frozen weights, made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)
