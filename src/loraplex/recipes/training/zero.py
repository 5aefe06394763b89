"""What a checkpoint holds of a run under DeepSpeed's ZeRO: whole tensors by parameter name, in one safetensors file.

DeepSpeed's own checkpoints hold one file per process and are read by as many processes only; this one is read by any
number of them, and is as small as the adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import _init_optim_state

from loraplex.io.files import write_tensors
from loraplex.runtime.parallel import adapter_tensors, is_sharded, shard_like, to_local

ZERO_NAME = "optimizer.safetensors"


def save_state(engine: Any, folder: Path, write: bool) -> None:
    """Write weights, the optimizer's state and the loss scale; all ranks must call it, one of them with `write`."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    tensors = {f"buffer/{name}": buffer.cpu() for name, buffer in _buffers(engine.module)}
    moments, counts = _entries(engine)
    for name, parameter in _trained(engine.module):
        # The float32 weight that is stepped; the module computes with one in half precision, if so configured.
        tensors[f"weight/{name}"] = safe_get_full_fp32_param(parameter).cpu()
        for key in moments:
            tensors[f"{key}/{name}"] = safe_get_full_optimizer_state(parameter, key).cpu()
    tensors |= {f"count/{key}": count for key, count in counts.items()}
    tensors["count/loss_scale"] = torch.tensor(float(engine.optimizer.loss_scale), dtype=torch.float64)
    if write:
        write_tensors(folder / ZERO_NAME, tensors)


def load_state(engine: Any, folder: Path) -> None:
    """Go on from what `save_state` wrote, on any number of ranks.

    Raises:
        FileNotFoundError: the checkpoint was not written under ZeRO.
        ValueError: it is of another adapter.
    """
    if not (folder / ZERO_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} has no {ZERO_NAME}: it was not written under DeepSpeed's ZeRO. Resume with the launcher "
            "settings it was written with."
        )
    tensors = load_file(folder / ZERO_NAME)
    _make_optimizer_state(engine)
    moments, counts = _entries(engine)
    for name, parameter in _trained(engine.module):
        for key in ("weight", *moments):
            if (value := tensors.get(f"{key}/{name}")) is None:
                raise ValueError(f"{folder / ZERO_NAME} lacks {key} of {name}: it is of another adapter.")
            _put(parameter, value.to(to_local(parameter).device), None if key == "weight" else key)
    for state in engine.optimizer.optimizer.state.values():
        for key in counts:
            # Copied: each group counts its steps in a tensor of its own.
            count = tensors[f"count/{key}"]
            state[key] = count.to(state[key], copy=True) if isinstance(state[key], Tensor) else count.item()
    for name, buffer in _buffers(engine.module):
        buffer.copy_(tensors[f"buffer/{name}"])
    if engine.fp16_enabled():
        engine.optimizer.loss_scaler.cur_scale = tensors["count/loss_scale"].item()


def _put(parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    """Set the float32 weight that is stepped, and the weight that is computed with; or an entry of the state."""
    from deepspeed import utils

    sharded = is_sharded(parameter)
    mine = shard_like(value, parameter) if sharded else value
    if key is not None:
        set_state = utils.safe_set_local_optimizer_state if sharded else utils.safe_set_full_optimizer_state
        set_state(parameter, mine, key)
        return
    (utils.safe_set_local_fp32_param if sharded else utils.safe_set_full_fp32_param)(parameter, mine)
    to_local(parameter).copy_(mine)
    if sharded and parameter.numel():
        parameter.data.copy_(value)  # small ones stay gathered


def _buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What the adapters hold beside parameters: merge maps, the warm-up's step."""
    return [(name, t) for name, t in adapter_tensors(model) if not isinstance(t, nn.Parameter)]


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _entries(engine: Any) -> tuple[list[str], dict[str, Tensor]]:
    """(keys of the optimizer's state that have a number per weight, the others with their values)."""
    if engine.zero_optimization_stage() < 3:
        # DeepSpeed finds a parameter's part of the state once, when only the first group of them has any.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    base = engine.optimizer.optimizer
    flat, state = next(iter(base.state.items()))
    moments = [key for key, value in state.items() if isinstance(value, Tensor) and value.shape == flat.shape]
    return moments, {key: torch.as_tensor(value) for key, value in state.items() if key not in moments}


def _make_optimizer_state(engine: Any) -> None:
    """DeepSpeed makes an optimizer's state at its first step, and there has been none."""
    zero = engine.optimizer
    groups = zero.optimizer.param_groups
    if engine.zero_optimization_stage() < 3:
        _init_optim_state(zero.optimizer)
        return
    # ZeRO-3 puts parameters into their group for the moment of their step only.
    for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
        groups[zero.sub_group_to_group_id[index]]["params"].append(flat)
    _init_optim_state(zero.optimizer)
    for group in groups:
        group["params"] = []
