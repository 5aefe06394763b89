"""Factors whose update depends on the input through gates: merging and export take the gates' means over some text."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable

from torch import Tensor

from loraplex.runtime.parallel import to_local
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.factors import Factors
from loraplex.tuner.findings import Finding


class GatedFactors(Factors):
    """Factors of a method with gates. Where its config says `depends_on_input`, ΔW is only constant with mean gates.

    `loraplex.calibrate` sets `mean_gate`. It belongs to the weights that are there when it is set: merging and export
    refuse it once they have changed.
    """

    def __init__(self, config: AdapterConfig, module_name: str, in_features: int, out_features: int) -> None:
        super().__init__(config, module_name, in_features, out_features)
        self.depends_on_input = config.depends_on_input
        self._who = f"{config.title} on {module_name}"
        self._instead = f", or train with {config.constant_instead}" if config.constant_instead else ""
        self._mean_gate: Tensor | None = None
        self._calibrated = ""

    @property
    @abstractmethod
    def num_gates(self) -> int:
        """n, the number of parts of ΔW that have a gate each."""

    @abstractmethod
    def gates(self, x: Tensor) -> Tensor:
        """The weights of the parts of ΔW that x calls for: `(..., in)` → `(..., n)`. They add up to 1."""

    @abstractmethod
    def mean_form(self) -> tuple[Tensor, Tensor]:
        """`lora_form` with `mean_gate`, whatever weights it was measured on; with equal gates if it is None."""

    @abstractmethod
    def calibrated_tensors(self) -> Iterable[Tensor]:
        """What the gates of this layer, and the update with mean gates, are computed from."""

    @classmethod
    def gate_findings(cls, use: dict[str, dict[str, list[float]]]) -> list[Finding]:
        """What inspection shows of the gates that some tasks call for: task → module → mean gate of each part."""
        return []

    @property
    def mean_gate(self) -> Tensor | None:
        """The mean `(n,)` of the gates over calibration text; None if it was not measured."""
        return self._mean_gate

    @mean_gate.setter
    def mean_gate(self, gate: Tensor | None) -> None:
        if gate is not None and len(gate) != self.num_gates:
            raise ValueError(f"{self.module_name} has {self.num_gates} gates, but {len(gate)} mean gates were given.")
        self._mean_gate = gate
        self._calibrated = "" if gate is None else self._digest()

    def _digest(self) -> str:
        """SHA-256 of `calibrated_tensors`, equal on any device and in any dtype that holds the same values."""
        digest = hashlib.sha256(repr(float(self.scaling)).encode())
        for factor in self.calibrated_tensors():
            digest.update(to_local(factor).double().cpu().numpy().tobytes())
        return digest.hexdigest()

    def lora_form(self) -> tuple[Tensor, Tensor]:
        self.check_mergeable()
        return self.mean_form()

    def check_mergeable(self) -> None:
        if not self.depends_on_input:
            return
        if self._mean_gate is None:
            raise ValueError(
                f"{self._who} has no constant ΔW: its gates depend on the input, so it can't be merged exactly. Run "
                "loraplex.calibrate(model, batches) on text of your task first to merge with the mean gates (an "
                f"approximation, whose error it reports){self._instead}."
            )
        if self._calibrated != self._digest():
            raise ValueError(
                f"The mean gates of {self.module_name} were measured on other weights: the adapter was trained, loaded "
                "or cast since loraplex.calibrate. Run loraplex.calibrate(model, batches) again before merging or "
                "exporting."
            )

    def is_exact(self) -> bool:
        return not self.depends_on_input

    def notes(self) -> list[str]:
        if self.is_exact():
            return []
        return ["The gates were replaced by their means over calibration text: an approximation."]
