"""Tiny random models, the methods' settings, and how tests fill and compare adapters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

from loraplex import AsLoraConfig, DualLoraConfig, MasaConfig, MultiLoraConfig
from loraplex.tuner.bank import find_bank
from loraplex.tuner.layer import AdapterLinear

VOCAB, HIDDEN, INNER, HEADS, LAYERS = 61, 32, 48, 4, 5
"""Five layers: MASA's groups of two do not divide them."""

METHODS: dict[str, Callable[..., Any]] = {
    "multilora": partial(MultiLoraConfig, num_modules=2),
    "multilora-module": partial(MultiLoraConfig, num_modules=3, scaling_granularity="module"),
    "aslora": partial(AsLoraConfig, merge_start_step=1, merge_interval=1, num_merges=2),
    "dual_lora": partial(DualLoraConfig, r_magnitude=1, r_direction=3, warmup_steps=4),
    "masa-router": partial(MasaConfig, num_experts=3, share_layers=2, expert_mixing="router"),
    "masa-sum": partial(MasaConfig, num_experts=3, share_layers=2, expert_mixing="sum"),
    "masa-concat": partial(MasaConfig, num_experts=2, share_layers=2, expert_mixing="concat"),
}
"""One row per method and variant; `lora_alpha != r` in all (see `config`)."""

PLAIN = ("multilora", "aslora", "dual_lora", "masa-router")
"""One variant of each method, for promises that do not depend on the variant."""
MERGEABLE = tuple(name for name in METHODS if name != "masa-router")


def config(method: str, **settings: Any) -> Any:
    """The method's config with r=4, lora_alpha=6 (scaling 1.5) unless told otherwise."""
    return METHODS[method](**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **settings})


# Models


@dataclass(frozen=True)
class Arch:
    """How to build and feed one architecture."""

    config: Callable[[], Any]
    auto: Any
    targets: list[str]
    kind: str

    def build(self, **settings: Any) -> nn.Module:
        """A model with weights that depend on nothing but the settings."""
        torch.manual_seed(0)
        model_config = self.config()
        for name, value in settings.items():
            setattr(model_config, name, value)
        return self.auto.from_config(model_config).eval()

    def inputs(self, batch: int = 3, seed: int = 1) -> dict[str, Tensor]:
        """A batch with labels. The first token is never padding."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "image":
            pixels = torch.randn(batch, 3, 8, 8, generator=generator)
            return {"pixel_values": pixels, "labels": torch.arange(batch) % 3}
        ids = torch.randint(3, VOCAB, (batch, 7), generator=generator)
        if self.kind == "classify":
            return {"input_ids": ids, "labels": torch.arange(batch) % 3}
        return {"input_ids": ids, "labels": ids.clone()}


def _llama_like(cls: type) -> Any:
    return cls(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=2, max_position_embeddings=32,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip


def _bert_like(cls: type, **more: Any) -> Any:
    return cls(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=40, type_vocab_size=1, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0, **more,
    )  # fmt: skip


ARCHS: dict[str, Arch] = {
    "llama": Arch(lambda: _llama_like(LlamaConfig), AutoModelForCausalLM, ["q_proj", "v_proj"], "causal"),
    "qwen2": Arch(lambda: _llama_like(Qwen2Config), AutoModelForCausalLM, ["q_proj", "v_proj"], "causal"),
    "gpt2": Arch(
        lambda: GPT2Config(
            vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=32,
            bos_token_id=1, eos_token_id=2, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
        AutoModelForCausalLM, ["c_attn"], "causal",
    ),
    "opt": Arch(
        lambda: OPTConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, ffn_dim=INNER, num_hidden_layers=LAYERS, dropout=0.0,
            num_attention_heads=HEADS, max_position_embeddings=32, word_embed_proj_dim=HIDDEN,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
        AutoModelForCausalLM, ["q_proj", "v_proj"], "causal",
    ),
    "roberta": Arch(
        lambda: _bert_like(RobertaConfig), AutoModelForSequenceClassification, ["query", "value"], "classify"
    ),
    "deberta": Arch(
        lambda: _bert_like(
            DebertaV2Config, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True,
            position_buckets=8, norm_rel_ebd="layer_norm", pooler_hidden_size=HIDDEN, pooler_dropout=0.0,
        ),
        AutoModelForSequenceClassification, ["query_proj", "value_proj"], "classify",
    ),
    "t5": Arch(
        lambda: T5Config(
            vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=INNER, num_layers=LAYERS, num_decoder_layers=3,
            num_heads=HEADS, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
        ),
        AutoModelForSeq2SeqLM, ["q", "v"], "seq2seq",
    ),
    "vit": Arch(
        lambda: ViTConfig(
            hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            image_size=8, patch_size=4, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        AutoModelForImageClassification, ["q_proj", "v_proj"], "image",
    ),
}  # fmt: skip


class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Mlp(nn.Module):
    """A model that transformers knows nothing about."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def output(model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """Logits, without a gradient."""
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


# Adapters


def adapter_parameters(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """All parameters of one adapter, by their names in the model. A shared one comes once."""
    marks = [f"_{kind}.{adapter}." for kind in ("factors", "shared")]
    return {name: p for name, p in model.named_parameters() if any(mark in name for mark in marks)}


def fill(model: nn.Module, adapter: str = "default", seed: int = 0, std: float = 0.3) -> None:
    """Draw all factors of `adapter` afresh, so that none is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, adapter).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def advance(model: nn.Module, adapter: str = "default", steps: int = 3) -> None:
    """Let an optimizer that changes nothing take `steps` steps, so that the adapter's schedule advances."""
    parameters = list(adapter_parameters(model, adapter).values())
    trained = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)  # a frozen adapter's schedule stands still
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    optimizer.zero_grad()
    for parameter, requires_grad in zip(parameters, trained, strict=True):
        parameter.requires_grad_(requires_grad)


def ready(model: nn.Module, adapter: str = "default", seed: int = 0) -> None:
    """Non-zero factors; ASLoRA has merged twice, Dual LoRA stands at 3 of 4 warm-up steps."""
    fill(model, adapter, seed)
    advance(model, adapter)


def adapted(method: str, arch: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
    """A model with a `ready` adapter, in eval mode."""
    base = ARCHS[arch].build().to(dtype)
    model = get_peft_model(base, config(method, **{"target_modules": ARCHS[arch].targets, **settings}))
    ready(model)
    return model.eval()


def layers_of(model: nn.Module, ending: str = "") -> dict[str, AdapterLinear]:
    """Adapted layers whose name ends with `ending`, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdapterLinear) and name.endswith(ending)}


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors that belong to no adapter."""
    mine = {id(p) for name in model.peft_config for p in adapter_parameters(model, name).values()}
    return {name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in mine}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Equal names, and equal tensors bit for bit."""
    assert sorted(left) == sorted(right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def file_tensors(path: Any) -> dict[str, Tensor]:
    """What a saved adapter's weights file holds."""
    with safe_open(f"{path}/adapter_model.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict


def snapshot(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """All that a failed operation must leave alone. An empty container that stays behind is nothing."""
    modules = {name: m for name, m in model.named_modules() if not (isinstance(m, nn.ModuleDict) and len(m) == 0)}
    return {
        "keys": sorted(model.state_dict()),
        "types": {name: type(m).__name__ for name, m in modules.items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: m.training for name, m in modules.items()},
        "configs": sorted(getattr(model, "peft_config", {})),
        "active": list(getattr(model, "active_adapters", [])) if isinstance(model, PeftModel) else [],
        "output": output(model, inputs),
    }


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Equal snapshots, outputs bit for bit."""
    for name, value in before.items():
        if name == "output":
            assert torch.equal(value, after[name]), "the output changed"
        else:
            assert value == after[name], f"{name} changed"


def shared_state(model: nn.Module, adapter: str = "default") -> Any:
    """What the layers of `adapter` share, or None."""
    bank = find_bank(model)
    return None if bank is None else bank.shared(adapter)


# Exports


def skeleton(arch: str = "llama", **settings: Any) -> nn.Module:
    """The model of `arch` with every tensor on the meta device."""
    model_config = ARCHS[arch].config()
    for name, value in settings.items():
        setattr(model_config, name, value)
    with torch.device("meta"):
        return ARCHS[arch].auto.from_config(model_config).eval()


def stock(folder: Path, arch: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
    """The model of `arch` with the plain LoRA in `folder`, by PEFT's own classes, in the file's precision."""
    base = ARCHS[arch].build(**settings).to(dtype)
    loaded = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
    assert not any("loraplex" in type(module).__module__ for module in loaded.modules())
    return loaded.eval()


def products(folder: Path) -> dict[str, Tensor]:
    """Module → B A of an exported file, in float64. Its config must make the scaling 1."""
    tensors = file_tensors(folder)
    ending = ".lora_A.weight"
    return {
        key.removeprefix("base_model.model.").removesuffix(ending): tensors[key.replace("lora_A", "lora_B")].double()
        @ tensors[key].double()
        for key in tensors
        if key.endswith(ending)
    }


def lora_config(folder: Path) -> dict[str, Any]:
    """What adapter_config.json holds."""
    return json.loads((folder / "adapter_config.json").read_text())


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖, in float64."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def naive_updates(model: PeftModel, gates: dict[str, list[float]] | None = None) -> dict[str, Tensor]:
    """Module → ΔW `(out, in)` of the adapter "default", one scalar at a time, as the papers write it.

    From the adapter's tensors and its config alone: no code of the package computes anything here.

    Args:
        model: the adapted model.
        gates: module → a constant gate for each of MASA's experts, in place of the router's.
    """
    state = {key: tensor.tolist() for key, tensor in model.state_dict().items() if "_factors." in key or BANK in key}
    layers = {name: layer for name, layer in layers_of(model).items() if layer.factors("default") is not None}
    names = [name.removeprefix(ROOT) for name in layers]
    naive = {name: _naive_update(name, names, model, state, gates) for name in names}
    return {name: torch.tensor(rows, dtype=torch.float64) for name, rows in naive.items()}


ROOT, BANK = "base_model.model.", "loraplex_bank"


def _naive_update(
    name: str, names: list[str], model: PeftModel, state: dict[str, Any], gates: dict[str, list[float]] | None
) -> list[list[float]]:
    config, method = model.peft_config["default"], model.peft_config["default"].method
    own = f"{ROOT}{name}.{method.lower()}_factors.default."
    shared = f"{ROOT}{BANK}.{method.lower()}_shared.default."
    family = [other for other in names if _role(other) == _role(name)]
    index = sorted(family, key=_depth).index(name)
    prefix = f"{shared}{_role(name).replace('.', '__')}__"
    r, alpha = _pattern(config.rank_pattern, name, config.r), _pattern(config.alpha_pattern, name, config.lora_alpha)
    scale = alpha / (r**0.5 if config.use_rslora else r)
    if method == "MULTILORA":
        A, B, c = (state[own + factor] for factor in ("lora_A", "lora_B", "lora_scaling"))
        channel = len(c[0]) > 1
        B = [[b * c[k // r][o if channel else 0] for k, b in enumerate(row)] for o, row in enumerate(B)]
    elif method == "ASLORA":
        owner = state[prefix + "merges"][0][index]
        A, B = state[prefix + "lora_A"], state[f"{prefix}lora_B_{owner}"]
    elif method == "MASA":
        group = index // (config.share_layers or config.num_experts)
        A, B = state[f"{prefix}lora_A_{group}"], state[own + "lora_B"]
        if config.expert_mixing != "concat":
            weights = [1.0] * config.num_experts if config.expert_mixing == "sum" else gates[name]
            columns = range(len(A[0]))
            A = [[sum(w * A[e * r + k][i] for e, w in enumerate(weights)) for i in columns] for k in range(r)]
    else:
        A, B, C, D = (state[own + factor] for factor in ("lora_A", "lora_B", "lora_C", "lora_D"))
        done, steps = state[shared + "warmup"]
        scale = alpha / (len(A) * len(C)) ** (0.25 if config.use_rslora else 0.5) * min(1.0, done / steps)
        magnitude, direction = _matmul(B, A), _matmul(D, C)
        return [
            [scale * max(p, 0.0) * (1 if q > 0 else -1) for p, q in zip(*rows, strict=True)]
            for rows in zip(magnitude, direction, strict=True)
        ]
    return [[scale * value for value in row] for row in _matmul(B, A)]


def _matmul(B: list[list[float]], A: list[list[float]]) -> list[list[float]]:
    columns = [[row[i] for row in A] for i in range(len(A[0]))]
    return [[sum(b * a for b, a in zip(row, column, strict=True)) for column in columns] for row in B]


def _role(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1N", name, count=1)


def _depth(name: str) -> int:
    return int(next((part for part in name.split(".") if part.isdigit()), 0))


def _pattern(pattern: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", name)), default)


class Watch(TorchDispatchMode):
    """Sees every operation: the sizes of what they make, and whether one reads a tensor on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[tuple[int, ...], str] = {}
        self.meta: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs))):
            self.meta.add(str(func))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.sizes.setdefault(tuple(leaf.shape), str(func))
        return result

    def largest(self) -> int:
        """Elements of the largest tensor that was made."""
        return max(torch.Size(shape).numel() for shape in self.sizes)
