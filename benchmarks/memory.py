"""How much memory a step takes, counted at the allocator: temporaries inside autograd functions, custom operators and
single aten operations are seen like any tensor.

On a CPU, torch's profiler reports every block that torch's allocator hands out or takes back; their running sum gives
the peak. Workspaces that MKL or oneDNN allocate by themselves are not seen. On a GPU, the caching allocator's own
`max_memory_allocated`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


@dataclass
class Allocations:
    """Bytes beyond those that were allocated at the start."""

    peak: int = 0
    end: int = 0


@contextmanager
def allocations(device: torch.device) -> Iterator[Allocations]:
    """Count what is allocated inside the block; the result is filled in when it ends."""
    found = Allocations()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        torch.cuda.synchronize(device)
        found.peak = torch.cuda.max_memory_allocated(device) - start
        found.end = torch.cuda.memory_allocated(device) - start
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    events, open_nodes = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while open_nodes:
        node = open_nodes.pop()
        open_nodes += node.children
        if node.tag == _EventType.Allocation:
            events.append((node.start_time_ns, len(events), node.extra_fields.alloc_size))
    for *_, size in sorted(events):
        found.end += size
        found.peak = max(found.peak, found.end)


def held(device: torch.device) -> int:
    """Bytes of all tensors that Python holds, on a GPU of all that are allocated."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    storages = {}
    for thing in gc.get_objects():
        # By exact type: torch.compile leaves fake tensors behind, which have no storage.
        if type(thing) in (Tensor, nn.Parameter) and thing.device.type == "cpu" and thing.layout == torch.strided:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@dataclass(frozen=True)
class Saved:
    """What autograd keeps for backward, in bytes; a storage counts once."""

    x: int
    """The step's input itself (not a copy of it)."""
    parameters: int
    """Frozen weights and factors, which exist anyway."""
    other: int
    """All else."""
    weight_sized: int
    """Of `other`: storages with as many elements as the weight."""


def saved(forward: Callable[[], Any], x: Tensor, parameters: Iterable[Tensor], weight_elements: int) -> Saved:
    """Count what `forward` gives to autograd's `save_for_backward`."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    input_storage, kept = x.untyped_storage().data_ptr(), dict[int, tuple[int, int]]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), storage.nbytes() // tensor.element_size())
        return tensor.detach()  # a result with its graph would hold itself for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result  # until here no storage could be freed and its address be used again
    other = {key: value for key, value in kept.items() if key not in known and key != input_storage}
    return Saved(
        x=kept.get(input_storage, (0, 0))[0],
        parameters=sum(size for key, (size, _) in kept.items() if key in known),
        other=sum(size for size, _ in other.values()),
        weight_sized=sum(size for size, count in other.values() if count == weight_elements),
    )


def kept_by_forward(forward: Callable[[], Tensor], device: torch.device) -> int:
    """Bytes that `forward` leaves allocated beside its result: also what a function's ctx holds past autograd."""
    with allocations(device) as found:
        y = forward()
    return found.end - y.untyped_storage().nbytes()
