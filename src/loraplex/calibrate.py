"""Mean gates of MASA's routers, so that an adapter whose ΔW depends on the input can be merged approximately."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loraplex.methods.masa import MasaFactors


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Measure the mean gates of the active router adapters; merging uses them from then on.

    Args:
        model: the adapted model.
        batches: inputs of the task, for `model(**batch)`. Padding is left out by their `attention_mask`.

    Returns:
        For each module the relative error of its update with mean gates, ‖Δ̄h − Δh‖_F / ‖Δh‖_F over `batches`.

    Raises:
        ValueError: there is no batch, or no active adapter has a router.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("There is no batch to calibrate on: give some text of the adapter's task.")
    gates: dict[MasaFactors, Tensor] = {}

    def add_gates(factors: MasaFactors, x: Tensor) -> None:
        gates[factors] = gates.get(factors, 0) + factors.gates(x).sum(0)

    _watch(model, batches, add_gates)
    if not gates:
        raise ValueError(
            'No active adapter has a router: only MASA with expert_mixing="router" needs calibration. '
            "Activate it with model.set_adapter(name)."
        )
    for factors, total in gates.items():
        factors.mean_gate = total / total.sum()
    squares: dict[MasaFactors, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))

    def add_squares(factors: MasaFactors, x: Tensor) -> None:
        exact = factors.forward(x)
        difference = linear(x, factors.delta_weight()) - exact
        squares[factors] += torch.stack([difference.double().norm(), exact.double().norm()]).cpu() ** 2

    _watch(model, batches, add_squares)
    return {f.module_name: (error / norm).sqrt().item() if norm else 0.0 for f, (error, norm) in squares.items()}


def _watch(model: nn.Module, batches: list[Mapping[str, Any]], see: Callable[[MasaFactors, Tensor], None]) -> None:
    """Run `model` on `batches` in evaluation mode; `see(factors, x)` gets each router's inputs `(tokens, in)`."""
    mask: Tensor | None = None

    def hook(factors: MasaFactors, args: tuple[Tensor]) -> None:
        (x,) = args
        see(factors, x[mask.bool()] if mask is not None and mask.shape == x.shape[:-1] else x.flatten(0, -2))

    routed = [m for m in model.modules() if isinstance(m, MasaFactors) and m.mixing == "router"]
    handles = [factors.register_forward_pre_hook(hook) for factors in routed]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            mask = batch.get("attention_mask")
            model(**batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
