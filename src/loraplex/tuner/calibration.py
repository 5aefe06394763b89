"""Mean gates, with which an adapter whose ΔW depends on the input can be merged approximately."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loraplex.tuner.experts import AdapterParameters
from loraplex.tuner.gates import GatedFactors


@dataclass(frozen=True)
class Calibration:
    """Mean gates, and what they miss."""

    gates: dict[str, list[float]]
    """Module → mean gate of each part of its update."""
    errors: dict[str, float]
    """Module → relative error of its update with mean gates, ‖Δ̄h − Δh‖_F / ‖Δh‖_F on the held-out text."""
    output_error: float
    """‖ȳ − y‖_F / ‖y − y_base‖_F of the model's outputs on the held-out text: the share of the adapter's effect that
    the mean gates miss."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], held_out: Iterable[Mapping[str, Any]] | None = None
) -> Calibration:
    """Measure the mean gates of the active adapters that have gates; merging and exporting use them from then on.

    Args:
        model: the adapted model.
        batches: inputs of the task, for `model(**batch)`. Padding is left out by their `attention_mask`.
        held_out: other inputs, to measure the errors on; None measures them on `batches`, which flatters them.

    Raises:
        ValueError: there is no batch, no active adapter has gates, or two have on one module.
    """
    batches = list(batches)
    held_out = batches if held_out is None else list(held_out)
    if not batches or not held_out:
        raise ValueError("There is no batch to calibrate on: give some text of the adapter's task.")
    _refuse_experts(model)
    with _evaluating(model):
        gates = _mean_gates(model, batches)
        for factors, mean in gates.items():
            factors.mean_gate = mean.to(factors.lora_A.dtype)
        return _measure(model, held_out, list(gates))


@torch.no_grad()
def gate_use(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Module → mean gates of the active adapter on these inputs; the adapter stays as it is.

    Raises:
        ValueError: there is no batch, or no active adapter has gates.
    """
    _refuse_experts(model)
    with _evaluating(model):
        return {factors.module_name: mean.tolist() for factors, mean in _mean_gates(model, batches).items()}


def set_mean_gates(model: nn.Module, gates: Mapping[str, Sequence[float]]) -> None:
    """Give the adapters on `model` mean gates that were measured before, on the same weights.

    Args:
        model: the adapted model.
        gates: module → mean gate of each part, for exactly the modules that have gates.

    Raises:
        ValueError: the gates are those of other modules, or of other numbers of parts.
    """
    gated = {m.module_name: m for m in model.modules() if isinstance(m, GatedFactors) and m.depends_on_input}
    if apart := sorted(set(gated) ^ set(gates)):
        raise ValueError(
            f"The mean gates beside the adapter are not those of its modules ({', '.join(apart[:3])}, …): measure them "
            "again with loraplex export --calibration --remember."
        )
    for name, factors in gated.items():
        factors.mean_gate = torch.tensor(gates[name])


def _refuse_experts(model: nn.Module) -> None:
    for holder in (module for module in model.modules() if isinstance(module, AdapterParameters)):
        if any(isinstance(module, GatedFactors) and module.depends_on_input for module in holder.modules()):
            raise ValueError(
                f"{holder.module_name}: mean gates of experts and routers can't be measured yet: each sees some tokens "
                "only, and an expert may see none. Serve the adapter unmerged, or train with gates that don't "
                "depend on the input."
            )


def _mean_gates(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[GatedFactors, Tensor]:
    gates: dict[GatedFactors, Tensor] = {}
    counts: Counter[GatedFactors] = Counter()

    def add_gates(factors: GatedFactors, x: Tensor) -> None:
        found = factors.gates(x).double()
        gates[factors], counts[factors] = gates.get(factors, 0) + found.sum(0), counts[factors] + len(found)

    for batch in batches:
        _outputs(model, batch, add_gates)
    if not gates:
        raise ValueError(
            "No active adapter has gates that depend on the input, or there was no batch: nothing needs calibration. "
            "Activate the adapter that has with model.set_adapter(name)."
        )
    if len({factors.module_name for factors in gates}) < len(gates):
        raise ValueError("Two active adapters have gates on one module: activate one of them (set_adapter) at a time.")
    return {factors: total / counts[factors] for factors, total in gates.items()}


def _measure(model: nn.Module, batches: list[Mapping[str, Any]], gated: list[GatedFactors]) -> Calibration:
    squares: dict[GatedFactors, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    missed = torch.zeros(2, dtype=torch.float64)

    def add_squares(factors: GatedFactors, x: Tensor) -> None:
        exact = factors.forward(x)
        squares[factors] += _squares(_with_mean_gates(factors, x) - exact, exact)

    for batch in batches:
        exact = _outputs(model, batch, add_squares)
        mean = _outputs(model, batch, instead=_with_mean_gates)
        base = _outputs(model, batch, instead=lambda factors, x: x.new_zeros(*x.shape[:-1], factors.out_features))
        missed += _squares(mean - exact, exact - base)
    means = {f.module_name: f.mean_gate.tolist() for f in gated}  # type: ignore[union-attr]
    return Calibration(means, {f.module_name: _ratio(pair) for f, pair in squares.items()}, _ratio(missed))


def _with_mean_gates(factors: GatedFactors, x: Tensor) -> Tensor:
    A, B = factors.mean_form()
    return linear(linear(x, A.to(x.dtype)), B.to(x.dtype))


def _outputs(
    model: nn.Module,
    batch: Mapping[str, Any],
    see: Callable[[GatedFactors, Tensor], None] | None = None,
    instead: Callable[[GatedFactors, Tensor], Tensor] | None = None,
) -> Tensor:
    """The model's outputs on the real tokens of `batch`.

    `see(factors, x)` gets the inputs `(tokens, in)` of all factors with gates; `instead(factors, x)` computes in their
    place.
    """
    mask = batch.get("attention_mask")

    def real(x: Tensor) -> Tensor:
        fits = mask is not None and mask.shape == x.shape[:-1]
        # Layers of a dispatched model see x on devices of their own.
        return x[mask.to(x.device, torch.bool)] if fits else x.flatten(0, -2)  # type: ignore[union-attr]

    def hook(factors: GatedFactors, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        if see is not None:
            see(factors, real(args[0]))
        return instead(factors, args[0]) if instead is not None else None

    gated = [m for m in model.modules() if isinstance(m, GatedFactors) and m.depends_on_input]
    handles = [factors.register_forward_hook(hook) for factors in gated]
    try:
        output = model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(output, Tensor):
        output = output["logits"] if "logits" in output else output[0]
    return real(output)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _squares(difference: Tensor, whole: Tensor) -> Tensor:
    return torch.stack([difference.float().norm(), whole.float().norm()]).double().cpu() ** 2


def _ratio(squares: Tensor) -> float:
    part, whole = squares.tolist()
    return (part / whole) ** 0.5 if whole else 0.0
