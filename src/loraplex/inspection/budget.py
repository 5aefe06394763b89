"""What an adapter costs, before there is a weight: parameters, file size, and memory of a training step.

Nothing is estimated that can be counted: the adapter is really put on the model's modules, on the meta device. Only
what a method keeps for its backward is a formula of its own (`Factors.saved_bytes`).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn

from loraplex.tuner.bank import find_bank
from loraplex.tuner.checks import check_count
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.expert_weight import ExpertLinear
from loraplex.tuner.layer import AdapterLinear
from loraplex.tuner.sharing import SharedFactors

_NAME = "default"
# In the order in which safetensors lays tensors out: by type, then by name.
_SAFETENSORS = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
# Modules of one parent that read the same tensor.
_READ_TOGETHER = ({"q", "k", "v", "query", "key", "value"}, {"gate", "up"})


@dataclass(frozen=True)
class Budget:
    """What one adapter costs. Memory in bytes, of one training step on one device with AdamW.

    Not in it: what the frozen model itself keeps for backward, and buffers that live for one operation.
    """

    method: str
    """PEFT's type, such as "LORA"."""
    settings: dict[str, Any]
    """The config's fields: r, lora_alpha, target_modules, and those that differ from the default."""
    parameters: int
    """Trainable parameters; a factor that several layers read counts once."""
    share: float
    """`parameters` over the base model's."""
    file_bytes: int
    """Size of adapter_model.safetensors, header included."""
    merged_file_bytes: int
    """The same at the end of the method's schedule, to a few bytes, if it merges factors; else `file_bytes`."""
    weight_bytes: int
    """The base model."""
    adapter_bytes: int
    """What the adapter adds to the model; float32 where the base has half precision, as PEFT does it."""
    gradient_bytes: int
    optimizer_bytes: int
    """AdamW's two moments, and what the method keeps beside them, such as running averages."""
    activation_bytes: int
    """What the method keeps for backward beyond the frozen model, at most; without gradient checkpointing."""
    excess: int | None = None
    """Of `match`: `parameters` minus what was asked for."""

    @property
    def step_bytes(self) -> int:
        """All parts of the memory together."""
        adapter = self.adapter_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes
        return self.weight_bytes + adapter

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "step_bytes": self.step_bytes}


def plan(model: nn.Module, config: PeftConfig, tokens: int = 4096, autocast: bool = False) -> Budget:
    """Count what an adapter on `model` costs.

    Args:
        model: the base model in the dtype of its weights; may be on the meta device. It is not changed.
        config: of one of our methods, or PEFT's LoraConfig. DoRA and other variants keep more than is counted.
        tokens: of a step: batch size × length.
        autocast: whether the step runs under bfloat16 or float16 autocast, the default of `train` on a GPU.

    Raises:
        ValueError: the architecture has no default targets, or the config does not fit the model.
    """
    _check_planned(config)
    return _measure(model, config, _adapt(model, config), tokens, autocast)


def _check_planned(config: PeftConfig) -> None:
    if not isinstance(config, (AdapterConfig, LoraConfig)):
        raise ValueError(f"{type(config).__name__} is neither one of loraplex nor a LoraConfig.")


def _measure(model: nn.Module, config: PeftConfig, adapted: PeftModel, tokens: int, autocast: bool) -> Budget:
    check_count("tokens", tokens)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    parameters, gradients = sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
    weights, file_bytes = _bytes(model), _file_bytes(adapted)
    return Budget(
        method=config.peft_type.value,  # type: ignore[union-attr]
        settings=_settings(config, adapted),
        parameters=parameters,
        share=parameters / sum(p.numel() for p in model.parameters()),
        weight_bytes=weights,
        adapter_bytes=_bytes(adapted) - weights,
        gradient_bytes=gradients,
        optimizer_bytes=2 * gradients + sum(shared.training_bytes() for shared in _shared(adapted)),
        activation_bytes=_activation_bytes(adapted, tokens, autocast),
        file_bytes=file_bytes,
        merged_file_bytes=_file_bytes(adapted) if _end_schedule(adapted) else file_bytes,  # last: it changes the model
    )


def match(model: nn.Module, config: PeftConfig, parameters: int, tokens: int = 4096, autocast: bool = False) -> Budget:
    """`plan` with the rank whose number of parameters is nearest to `parameters`; the other settings stay.

    The number is affine in r: two counts give the rank, and the last one is made with it. Ties go to the lower rank.

    Raises:
        ValueError: r changes nothing, because other fields fix every rank; or as for `plan`.
    """
    _check_planned(config)
    check_count("parameters", parameters)
    lowest = config.lowest_rank if isinstance(config, AdapterConfig) else 1
    made: dict[int, PeftModel] = {}

    def count(r: int) -> int:
        if r not in made:
            made[r] = _adapt(model, replace(config, r=r))  # type: ignore[call-arg]
        return made[r].get_nb_trainable_parameters()[0]

    r = first = max(lowest, config.r)  # type: ignore[attr-defined]
    if count(first) != parameters:
        # Most methods are nearly proportional to r, so that the second count often is the answer.
        second = max(lowest, round(first * parameters / count(first)))
        second += second == first
        slope = (count(second) - count(first)) // (second - first)
        if slope == 0:
            fields = " and ".join(config.rank_fields if isinstance(config, AdapterConfig) else ("rank_pattern",))
            raise ValueError(f"no rank follows r: leave {fields} out to match a budget.")
        constant = count(first) - slope * first
        r = max(lowest, (parameters - constant + (slope - 1) // 2) // slope)
        assert count(r) == constant + slope * r, "parameters are affine in r"
    found = _measure(model, replace(config, r=r), made[r], tokens, autocast)  # type: ignore[call-arg]
    return replace(found, excess=found.parameters - parameters)


def count(model: nn.Module, config: PeftConfig) -> int:
    """Trainable parameters with the adapter of any PEFT config; modules trained in full count too."""
    return _adapt(model, config).get_nb_trainable_parameters()[0]


def _adapt(model: nn.Module, config: Any) -> PeftModel:
    """A copy of `model` on the meta device, with the adapter."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if config.target_modules is None and kind not in DEFAULT_TARGETS:
        linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        names = ", ".join(linear)
        raise ValueError(
            f'no default target_modules for model_type {kind!r}: name some of {names}, or give "all-linear".'
        )
    # Copies of the modules, not of their tensors.
    tensors: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    skeleton = copy.deepcopy(model, tensors | {id(b): b.to("meta") for b in model.buffers()})
    # The device as a context too: PEFT alone would draw every factor on the CPU and then drop it.
    with torch.device("meta"):
        return get_peft_model(skeleton, copy.deepcopy(config), low_cpu_mem_usage=True)


def _settings(config: Any, adapted: PeftModel) -> dict[str, Any]:
    default = type(config)()
    found: Any = adapted.peft_config[_NAME]
    shown = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": found.target_modules}
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "task_type"}
    changed = {k: v for k, v in values.items() if v is not None and v != getattr(default, k)}
    return {k: sorted(v) if isinstance(v, set) else v for k, v in {**shown, **changed}.items()}


def _bytes(model: nn.Module) -> int:
    """Of all parameters and buffers; what several modules share counts once."""
    return sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))


def _file_bytes(adapted: PeftModel) -> int:
    """Size of the safetensors file that `save_pretrained` writes, from keys, types and shapes."""
    layers = {name.rpartition(".")[2]: module for name, module in adapted.named_modules()}
    # PEFT saves a targeted embedding or head in full beside its adapter.
    whole = any(isinstance(layers.get(name), (AdapterLinear, LoraLayer)) for name in EMBEDDING_LAYER_NAMES)
    state = get_peft_model_state_dict(adapted, save_embedding_layers=whole)
    order, end = list(_SAFETENSORS), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for key, tensor in sorted(state.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": _SAFETENSORS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    # Eight bytes of length, and spaces that align the data to eight.
    return 8 + length + -length % 8 + end


def _shared(adapted: PeftModel) -> Iterator[SharedFactors]:
    bank = find_bank(adapted)
    yield from () if bank is None else (shared for _, shared in bank.named_shared())


def _end_schedule(adapted: PeftModel) -> bool:
    """Whether the adapter has another size at the end of its schedule; it has that size from now on."""
    return any(shared.end_schedule() for shared in _shared(adapted))


def _activation_bytes(adapted: PeftModel, tokens: int, autocast: bool) -> int:
    """What all layers save for backward: x `(tokens, in)`, and what the method says of itself.

    At most: where x is neither cast nor dropped out, the frozen model may save it already, as attention does o_proj's.
    """
    total, read = 0, set()
    for name, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer) and _NAME in layer.lora_A:  # not on an embedding, which saves little
            factors: Any = _PeftLora(layer)
        elif isinstance(layer, AdapterLinear):
            factors = layer.factors(_NAME)
        else:
            continue
        bare = isinstance(layer, ParamWrapper)
        base = layer.get_param().dtype if bare else layer.get_base_layer().weight.dtype
        seen = _tokens_of(layer, adapted, tokens)
        dtype = base if factors.takes_input_as_it_is else factors.lora_A.dtype
        size, copied = (2, 2) if autocast else (dtype.itemsize, 0)
        total += factors.saved_bytes(seen, size, copied)
        inputs = seen * layer.in_features
        if isinstance(factors.dropout, nn.Dropout):
            # Each draw keeps its result and, on a GPU, a mask of one byte per element.
            total += factors.dropout_draws * inputs * (size + 1)
        elif (autocast and not factors.takes_input_as_it_is) or (torch.bfloat16 if autocast else dtype) != base:
            total += inputs * size  # a cast copy for each module
        elif (source := _source(name)) not in read:
            read.add(source)
            total += inputs * size
    return total


def _tokens_of(layer: Any, model: PeftModel, tokens: int) -> int:
    """How many of a step's tokens the layer sees: an expert sees its share of those that are routed."""
    inner = layer.get_base_layer()
    if not isinstance(inner, ExpertLinear) or inner.index is None:
        return tokens
    experts = inner.num_experts
    chosen = getattr(getattr(model, "config", None), "num_experts_per_tok", None) or experts
    return -(-tokens * chosen // experts)


class _PeftLora:
    """PEFT's own LoRA on one layer, asked what our methods are asked."""

    takes_input_as_it_is = False
    dropout_draws = 1

    def __init__(self, layer: Any) -> None:
        self.lora_A, self.dropout = layer.lora_A[_NAME].weight, layer.lora_dropout[_NAME]
        self._width = layer.in_features + layer.out_features
        self._whole = layer.get_param().numel() if isinstance(layer, ParamWrapper) else 0

    def saved_bytes(self, tokens: int, itemsize: int, copied: int) -> int:
        """A x, and the copies that autocast makes of A and B; W + ΔW where it adapts a bare parameter."""
        if self._whole:
            return self._whole * itemsize
        rank = len(self.lora_A)
        return tokens * rank * itemsize + copied * rank * self._width


def _source(name: str) -> tuple[str, Any]:
    """A key that is equal for modules that read the same tensor, going by their names."""
    parent, _, last = name.rpartition(".")
    stem = re.sub(r"_(proj|lin)$", "", last)
    return parent, next((i for i, stems in enumerate(_READ_TOGETHER) if stem in stems), last)
