"""Parameters that an engine has sharded: FSDP2's DTensors and the partitions of DeepSpeed's ZeRO-3.

Each rank holds a shard. Element-wise work is done on the shards. Work that needs the full tensor gathers it, and then
all ranks have to take part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.fsdp._common_utils import _is_fsdp_flattened
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointFunction

FSDP2_INSTEAD = (
    "Use FSDP2: fsdp_version: 2 in accelerate's configuration (FSDP_VERSION=2), or torch.distributed.fsdp.fully_shard "
    "on each layer and on the whole model."
)
DDP_INSTEAD = (
    "Start one process per GPU instead (torchrun --nproc_per_node N, accelerate launch --multi_gpu), or show it one "
    "GPU only (CUDA_VISIBLE_DEVICES=0)."
)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a shard of `tensor`."""
    return isinstance(tensor, DTensor) or _is_zero3(tensor)


def to_local(tensor: Tensor) -> Tensor:
    """This rank's shard, a view: in a shape of its own (FSDP2), or flat and padded (ZeRO-3)."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    if not _is_zero3(tensor):
        return tensor.detach()
    # Outside its layer's forward and backward, a ZeRO-3 parameter itself is empty.
    shard: Any = tensor.ds_tensor  # type: ignore[attr-defined]
    if shard.final_location == "nvme":
        raise ValueError(
            "DeepSpeed keeps the adapter's parameters on the disk (offload_param to nvme), where schedules and saving "
            'can\'t read them: set offload_param.device to "cpu".'
        )
    return shard.detach()


def full_tensor(local: Tensor, like: Tensor) -> Tensor:
    """Gather a tensor that is sharded as `like` is. If `like` is sharded, all ranks must call this.

    Args:
        local: this rank's shard.
        like: the parameter.
    """
    if isinstance(like, DTensor):
        mesh, places = like.device_mesh, like.placements
        return DTensor.from_local(local, mesh, places, shape=like.shape, stride=like.stride()).full_tensor()
    if not _is_zero3(like):
        return local
    zero: Any = like
    from deepspeed.accelerator import get_accelerator

    # With offload_param the shards are on the CPU, but NCCL sends only tensors on a GPU.
    local = local.to(get_accelerator().current_device_name()).contiguous()
    gathered = local.new_empty(dist.get_world_size(zero.ds_process_group) * local.numel())
    dist.all_gather_into_tensor(gathered, local, group=zero.ds_process_group)
    return gathered[: zero.ds_numel].view(zero.ds_shape)


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a full `tensor` that every rank has; the inverse of `full_tensor`."""
    if isinstance(like, DTensor):
        # None: nothing is sent, each rank shards its own copy.
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()
    if not _is_zero3(like):
        return tensor
    zero: Any = like
    size, rank = zero.ds_tensor.numel(), dist.get_rank(zero.ds_process_group)
    mine = tensor.flatten()[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(mine, (0, size - mine.numel()))


def full_shape(like: Tensor) -> torch.Size:
    """The shape of the full tensor."""
    return like.ds_shape if _is_zero3(like) else like.shape  # type: ignore[attr-defined]


def replicated(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, which all ranks hold, as a DTensor on the mesh of `like`; unchanged if `like` is no DTensor."""
    if not isinstance(like, DTensor):
        return tensor
    places = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(tensor, like.device_mesh, places, run_check=False)


def ranks_of(tensor: Tensor) -> list[Any]:
    """The process groups whose ranks train `tensor` together: those of its mesh or partition, else all ranks."""
    if isinstance(tensor, DTensor):
        return [tensor.device_mesh.get_group(dimension) for dimension in range(tensor.device_mesh.ndim)]
    if _is_zero3(tensor):
        return [tensor.ds_process_group]  # type: ignore[attr-defined]
    return [dist.group.WORLD] if dist.is_available() and dist.is_initialized() else []


def first_decides(numbers: list[list[int]], groups: list[Any]) -> list[list[int]]:
    """The numbers of the first rank of `groups`. All their ranks must call this with theirs."""
    said = [numbers]
    # One dimension of the mesh after the other: in the end all ranks have the numbers of the very first.
    for group in groups:
        dist.broadcast_object_list(said, dist.get_global_rank(group, 0), group)
    return said[0]


def ddp_group() -> Any:
    """The process group of the DistributedDataParallel in whose forward this is called, or None."""
    ddp = DistributedDataParallel._active_ddp_module
    return None if ddp is None else ddp.process_group


def register_external_parameters(module: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Have ZeRO-3 gather `parameters`, which another module owns, for the forward and backward of `module`.

    ZeRO-3 notices such reads by itself only if a parameter happens not to be gathered at that moment.
    """
    if any(_is_zero3(parameter) for parameter in parameters):
        from deepspeed.runtime.zero import register_external_parameter

        for parameter in parameters:
            register_external_parameter(module, parameter)
        module.register_forward_pre_hook(_refuse_reentrant)


def _refuse_reentrant(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Raise a ValueError in a recomputation that gives ZeRO-3 a shared factor's gradient layer by layer."""
    node = torch._C._current_autograd_node()
    if torch.is_grad_enabled() and node is not None and node.name() == f"{CheckpointFunction.__name__}Backward":
        raise ValueError(
            "Reentrant activation checkpointing computes the gradient of a factor that several layers read in pieces, "
            "of which ZeRO-3 loses all but one. Train with gradient_checkpointing_kwargs={'use_reentrant': False, "
            "'determinism_check': 'none'}; TRL's trainers overwrite use_reentrant under ZeRO-3, so set it in "
            "trainer.args once the trainer is made."
        )


def refuse_fsdp1(layer: nn.Module) -> None:
    """Raise a ValueError in a forward under FSDP1, whose flat shards ASLoRA would merge without a word."""
    # FSDP1 marks the parameters that it flattens. Without use_orig_params, views of a flat one take their place.
    places = [t for m in layer.modules() for t in (*m._parameters.values(), m.__dict__.get("weight"))]
    tensors: list[Tensor] = [t for t in places if isinstance(t, Tensor)]
    if any(_is_fsdp_flattened(t) or (t._base is not None and _is_fsdp_flattened(t._base)) for t in tensors):
        raise ValueError(f"Adapters can't be trained under FSDP1. {FSDP2_INSTEAD}")


def gathered_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters and fully trained modules of `model` as full tensors on the CPU, by their names in `model`.

    Call it on all ranks, and pass the result to PEFT on the rank that saves:
    `model.save_pretrained(folder, state_dict=…)`. Frozen weights are not gathered, and factors one at a time.
    """
    return {
        name.replace(_CHECKPOINT_PREFIX, ""): full_tensor(to_local(tensor), tensor).cpu()
        for name, tensor in adapter_tensors(model)
    }


def adapter_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the adapters and fully trained modules, as this rank holds them."""
    for prefix, module in model.named_modules():
        tuner = module if isinstance(module, BaseTunerLayer) else None
        # PEFT saves a targeted embedding or head in full beside its adapter.
        embedding = tuner is not None and prefix.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
        if embedding or isinstance(module, AuxiliaryTrainingWrapper):
            yield from _tensors(module, prefix)
        elif tuner is not None:
            for name in tuner.adapter_layer_names:
                yield from _tensors(module.get_submodule(name), f"{prefix}.{name}")


def _tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(prefix)
    yield from module.named_buffers(prefix)


def _is_zero3(tensor: Any) -> bool:
    return hasattr(tensor, "ds_tensor")  # DeepSpeed's only mark
