"""The adapted linear layer: forward, merge, unmerge and mixed batches, written once for all methods."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraplex.numerics.products import add_product_, product, tiles
from loraplex.runtime.parallel import DDP_INSTEAD, refuse_fsdp1
from loraplex.runtime.placement import Resident, device_of, is_offloaded, loaded
from loraplex.tuner import base_weight
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.findings import Finding
from loraplex.tuner.finite import check_factors

logger = logging.getLogger(__name__)

_FULL_RANKS = 16
"""How many times in + out the ranks of all parts of an adapter may come to."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Factors(Resident, ABC):
    """What one adapter owns on one layer, and its equation. A method subclasses this once.

    `lora_A` (a parameter, or a property that reads a shared one) tells in which dtype the method computes. A method
    whose ΔW is a product of two factors writes `lora_form`; any other writes `delta_weight`.
    """

    lora_A: Tensor
    no_decay: ClassVar[tuple[str, ...]] = ()
    """Parameters that weight decay would undo, such as gates that start at zero."""

    def __init__(self, config: AdapterConfig, module_name: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.module_name = module_name
        self.in_features, self.out_features = in_features, out_features
        self.r = config.rank(module_name)
        self._check_size(config)
        self.lora_alpha = config.alpha(module_name)
        self.scaling = config.scaling(module_name)
        self.depends_on_input = config.depends_on_input
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.add_parameters(config)

    def _check_size(self, config: AdapterConfig) -> None:
        # What can't be meant should not end in the allocator. A rank above the smaller dimension is only wasteful, and
        # one r for all layers may exceed the outputs of a router or a classifier.
        largest = self.in_features + self.out_features
        if self.r > largest or self.r * config.parts > _FULL_RANKS * largest:
            times = f" in each of {config.parts} parts" if config.parts > 1 else ""
            raise ValueError(
                f"r={self.r}{times} is too large for {self.module_name}, whose weight is "
                f"{(self.out_features, self.in_features)}: the factors would be larger than what they adapt. Choose a "
                "smaller r, for this module by rank_pattern."
            )

    @abstractmethod
    def add_parameters(self, config: AdapterConfig) -> None:
        """Create and initialise the parameters that this layer owns."""

    def lora_form(self) -> tuple[Tensor, Tensor] | None:
        """A `(R, in)` and B `(out, R)` with ΔW = B A, scaling included, float32 at least; None if there are none.

        Raises:
            ValueError: ΔW is not a constant matrix.
        """
        return None

    def delta_weight(self, rows: slice = slice(None)) -> Tensor:
        """ΔW `(out, in)`, or these rows of it, scaling included, float32 at least.

        Raises:
            ValueError: ΔW is not a constant matrix.
        """
        form = self.lora_form()
        assert form is not None, "a method writes lora_form or delta_weight"
        A, B = form
        with torch.autocast(A.device.type, enabled=False):
            return product(B[rows], A)

    def by_rows(self) -> Callable[[slice], Tensor]:
        """`delta_weight` without a gradient, for many calls: what all rows need is made once."""
        if (form := self.lora_form()) is None:
            return self.delta_weight
        A, B = (factor.detach() for factor in form)
        return lambda rows: product(B[rows], A)

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The dtype in which `forward` wants x; None: that in which the base layer gets it."""
        return self.lora_A.dtype

    def takes_weight(self, x: Tensor) -> bool:
        """Whether `forward` wants the base layer's weight and bias beside x, to return all of h. No by default."""
        return False

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """ΔW x, scaling included: `(..., in)` → `(..., out)`. `x` has the dtype `input_dtype`."""

    def clear_cache(self) -> None:
        """Forget what was made from the factors and cached on request. Nothing is cached by default."""

    def check_mergeable(self) -> None:
        """Raise a ValueError where ΔW is not a constant matrix. Nothing to check by default."""

    def hold(self, A: Tensor, B: Tensor) -> None:
        """Take on the update ΔW = B A, where the config's `holding` made room for it."""
        raise NotImplementedError

    def is_exact(self) -> bool:
        """Whether ΔW is all that the adapter does to this layer."""
        return True

    def notes(self) -> list[str]:
        """What a user should know who exports or merges this adapter."""
        return []

    # Where ΔW depends on the input

    def gates(self, x: Tensor) -> Tensor:
        """The weights `(..., n)` of the parts of ΔW that x `(..., in)` calls for. They add up to 1.

        Only called where the config says `depends_on_input`.
        """
        raise NotImplementedError

    @property
    def mean_gate(self) -> Tensor | None:
        """The mean `(n,)` of the gates over calibration text, which merging and exporting use; None if not measured."""
        return None

    @mean_gate.setter
    def mean_gate(self, gate: Tensor | None) -> None:
        raise NotImplementedError

    def mean_form(self) -> tuple[Tensor, Tensor] | None:
        """`lora_form` with the mean gates as they are; with equal gates where none were measured."""
        return self.lora_form()

    # What inspection and budgets ask

    @classmethod
    def findings(cls, layers: Sequence[Any]) -> list[Finding]:
        """What is particular to the method in an adapter, of which `layers` are the factors of all layers."""
        return []

    @classmethod
    def gate_findings(cls, use: dict[str, dict[str, list[float]]]) -> list[Finding]:
        """What the gates tell that some tasks call for: task → module → mean gate of each part."""
        return []

    def saved_bytes(self, tokens: int, itemsize: int, copied: int) -> int:
        """What a layer saves from forward to backward beside its input, in bytes; parameters are counted elsewhere.

        As LoRA by default: A x, and the copies that autocast makes of A and B.

        Args:
            tokens: T, of a step.
            itemsize: bytes per element that is computed with.
            copied: bytes per element of a factor that autocast copies; 0 without autocast.
        """
        rank = self.r
        return tokens * rank * itemsize + copied * rank * (self.in_features + self.out_features)

    @property
    def takes_input_as_it_is(self) -> bool:
        """Whether x is saved in the dtype in which the base layer gets it, not as a copy in another one."""
        return self.input_dtype is None

    @property
    def dropout_draws(self) -> int:
        """How many masks the forward draws for one input."""
        return 1

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, r={self.r}, scaling={self.scaling:g}"


class AdapterLinear(nn.Module, BaseTunerLayer):
    """A linear layer with adapters of any of the methods: `base(x) + Σ ΔW x` over the active adapters.

    Wraps `nn.Linear`, GPT-2's `Conv1D` and PEFT's quantised linear layers. The class name must contain "Linear":
    PEFT looks for it when a second adapter asks for `target_modules="all-linear"`.
    """

    def __init__(self, base_layer: nn.Module, module_name: str, **quantization_kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        self.adapter_layer_names: tuple[str, ...] = ()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True  # PEFT's disable_input_dtype_casting asks every tuner layer
        self.merge_error = 0.0
        """Of the last merge: ‖W′ − W − ΔW‖_F / ‖ΔW‖_F, where W′ is what the base layer stores."""
        self._unmerged: tuple[Any, ...] | None = None
        self._fingerprint: tuple[torch.dtype, int] | None = None
        self._tied_weight: nn.Parameter | None = None
        self._engine_checked = False
        self._may_take_weight = False
        inner = self.get_base_layer()
        self.in_features: int
        self.out_features: int
        self.in_features, self.out_features = _get_in_out_features(inner)  # type: ignore[assignment]
        self.fan_in_fan_out = isinstance(inner, Conv1D)
        self.quantization_backend = resolve_quantization_backend(inner, **quantization_kwargs)

    def add_adapter(self, adapter_name: str, config: AdapterConfig, factors: Factors) -> None:
        """Register `factors` under `adapter_name`, on the base layer's device."""
        # PEFT finds a method's keys by "<module>.<type in lower case>_…": one container for each method.
        container = f"{config.method.lower()}_factors"
        if container not in self._modules:
            self.add_module(container, nn.ModuleDict())
            self.adapter_layer_names = (*self.adapter_layer_names, container)
        self._may_take_weight |= type(factors).takes_weight is not Factors.takes_weight
        factors.to(dtype=self.adapter_dtype)
        self.get_submodule(container)[adapter_name] = factors  # type: ignore[operator]
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def factors(self, adapter_name: str) -> Factors | None:
        """The factors of `adapter_name` on this layer, or None where it does not adapt this layer."""
        for container in self.adapter_layer_names:
            modules = self._modules[container]
            if adapter_name in modules:  # type: ignore[operator]
                return modules[adapter_name]  # type: ignore[index]
        return None

    @property
    def adapter_dtype(self) -> torch.dtype:
        """The base weight's dtype where adapters can compute in it, float32 over quantised weights."""
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        return dtype if dtype in _FLOATS else torch.float32

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the base's dtype: after loading with low_cpu_mem_usage that would round
        # a float32 adapter to bfloat16 and back.
        device = device or device_of(self.get_base_layer())
        factors = self.factors(adapter_name)
        if factors is None or device is None or any(p.is_meta for p in factors.parameters()):
            return
        # A base on the meta device is there for its names and shapes only: the adapter keeps its values.
        if device.type != "meta":
            factors.to(device=device)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        if not torch.compiler.is_compiling() and self.training and not self._engine_checked:
            refuse_fsdp1(self)
            self._engine_checked = True
        if self._may_take_weight and (whole := self._forward_with_weight(x)) is not None:
            return whole
        result = self.base_layer(x, *args, **kwargs)
        if self.training and not base_weight.passes_gradient(self, x, result):
            raise ValueError(
                f"{self.module_name} passes no gradient to its input: its quantised "
                f"{type(self.get_base_layer()).__name__} is for inference only, and the layers before it would not be "
                "trained. Quantise weights only (torchao: "
                'Int8WeightOnlyConfig; GPTQ: backend="gptq_torch"), or use bitsandbytes.'
            )
        if self.merged_adapters:
            return result
        dtype = result.dtype
        # Where accelerate hooks the base layer alone, x may come from another device.
        x = x.to(result.device)
        for adapter_name in self.active_adapters:
            factors = self.factors(adapter_name)
            if factors is not None:
                result = result + factors(self._cast(x, factors))
        return result.to(dtype)

    def _forward_with_weight(self, x: Tensor) -> Tensor | None:
        """h, where the only active adapter computes it with the base weight; else None."""
        only: Factors | None = None
        for adapter_name in self.active_adapters:
            factors = self.factors(adapter_name)
            if factors is not None and only is not None:
                return None
            only = factors or only
        if only is None or self.merged_adapters or not only.takes_weight(x):
            return None
        plain = base_weight.plain(self, x)
        return None if plain is None else only(x, *plain)

    def _cast(self, x: Tensor, factors: Factors) -> Tensor:
        return x if (dtype := factors.input_dtype) is None else self._cast_input_dtype(x, dtype)

    def _replicate_for_data_parallel(self) -> Any:
        raise ValueError(
            f"Adapters can't be trained under nn.DataParallel: copies of a layer would not share factors. {DDP_INSTEAD}"
        )

    def _mixed_batch_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                f"adapter_names has {len(adapter_names)} entries for a batch of {len(x)}: give one name per example, "
                '"__base__" for none. Models that pass other things than the batch through an adapted layer, such as '
                "DeBERTa its relative positions, can't mix adapters."
            )
        if self.merged_adapters:
            raise ValueError(f"adapter_names can't be used while {self.merged_adapters} are merged: unmerge first.")
        # Cloned: bitsandbytes returns views made inside autograd functions, which can't be written to.
        result = self.base_layer(x, *args, **kwargs).clone()
        x = x.to(result.device)
        for adapter_name in dict.fromkeys(adapter_names):
            factors = self.factors(adapter_name)
            if factors is not None:
                rows = [i for i, name in enumerate(adapter_names) if name == adapter_name]
                delta = factors(self._cast(x[rows], factors))
                result[rows] = (result[rows] + delta).to(result.dtype)
        return result

    def check_mergeable(self, adapter_names: list[str]) -> None:
        """Raise a ValueError where the base can't take a merged weight, or an adapter has no constant, finite ΔW."""
        present = [factors for name in adapter_names if (factors := self.factors(name)) is not None]
        if present and self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise ValueError(self._cannot_merge())
        for factors in present:
            factors.check_mergeable()
            check_factors(factors)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the adapters to the base weight; `unmerge` needs the weight before: a plain one is kept on the CPU.

        A quantised weight is dequantised, added to and quantised again. `merge_error` tells what that, or rounding to
        the weight's dtype, has cost.

        Args:
            safe_merge: refuse to merge where the result would hold NaN or Inf: of the base weight, or by overflow.
            adapter_names: which adapters; None merges the active ones.

        Raises:
            ValueError: see `check_mergeable`, or `safe_merge` found NaN or Inf. Nothing stays merged then.
        """
        self._merge(safe_merge, adapter_names, keep=True)

    @torch.no_grad()
    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, merged if asked for: what PEFT puts in the place of this layer."""
        if merge:
            # Nobody can unmerge, so nothing needs to be kept for it: merging is then bound by the memory's bandwidth.
            self._merge(safe_merge, adapter_names, keep=safe_merge or self.quantization_backend is not None)
        return self.get_base_layer()

    def _merge(self, safe_merge: bool, adapter_names: list[str] | None, keep: bool) -> None:
        names = [n for n in check_adapters_to_merge(self, adapter_names) if self.factors(n) is not None]
        if names:
            self.check_mergeable(names)
            with loaded(self):
                self._merge_loaded(names, safe_merge, keep)

    def _merge_loaded(self, names: list[str], safe_merge: bool, keep: bool) -> None:
        inner = self.get_base_layer()
        if is_offloaded(inner) and self.quantization_backend is None:
            # What was loaded may be the memory of an embedding that it is tied to, or of the user's own state dict.
            inner.weight.data = inner.weight.data.clone()  # type: ignore[operator]
        if self._unmerged is None and not keep:
            self.merge_error = self._add(names, safe_merge)
            self.merged_adapters = names
            return
        if self._unmerged is not None:
            # From the weight before any merge: adding to a merged one would round, or quantise, the update twice.
            names = [*self.merged_adapters, *names]
            self._take_out()
        kept = base_weight.keep(self)
        try:
            self.merge_error = self._add(names, safe_merge)
        except base_weight.Unreadable as error:
            base_weight.put_back(self, kept)
            raise ValueError(f"{self._cannot_merge()} ({error})") from error
        except Exception:
            base_weight.put_back(self, kept)
            raise
        self._unmerged, self.merged_adapters = kept, names
        self._fingerprint = base_weight.fingerprint(self)

    def _add(self, names: list[str], safe_merge: bool) -> float:
        """Write W + Σ ΔW, and return the share of Σ ΔW that was lost."""
        weight = base_weight.read(self)
        # A quantised weight can't be written in parts.
        whole = weight if self.quantization_backend is None else weight.clone()
        view = whole.T if self.fan_in_fan_out else whole
        lost, total = self._add_to(view, [self.factors(name) for name in names])  # type: ignore[misc]
        if safe_merge and not view.isfinite().all():
            raise ValueError(
                f"Merging {names} would write NaN or Inf into the weight of {self.module_name}: the adapter is "
                "broken; load an earlier checkpoint."
            )
        if self.quantization_backend is not None:
            lost = ((base_weight.write(self, whole) - whole).norm() ** 2).item()
        return math.sqrt(lost / total) if total else 0.0

    def _add_to(self, view: Tensor, adapters: list[Factors]) -> tuple[float, float]:
        """W ← W + Σ ΔW; returns ‖what rounding took‖² and ‖Σ ΔW‖²."""
        forms = [factors.lora_form() for factors in adapters]
        exact = view.dtype.itemsize >= 4 and self.quantization_backend is None
        if exact and all(form is not None for form in forms):
            for A, B in filter(None, forms):
                add_product_(view, B.to(view), A.to(view))
            return 0.0, 0.0
        lost = total = torch.zeros((), dtype=torch.float64, device=view.device)
        of_rows = [factors.by_rows() for factors in adapters]
        for rows in tiles(view):
            # Sum in float32 at least and round once: rounding after each adapter would lose small updates.
            delta: Tensor = sum(update(rows).to(view.device) for update in of_rows)  # type: ignore[assignment]
            if exact:
                view[rows] += delta
                continue
            merged = delta + view[rows]
            view[rows] = merged
            lost, total = lost + (view[rows] - merged).norm() ** 2, total + delta.norm() ** 2
        return lost.item(), total.item()

    def _cannot_merge(self) -> str:
        backend: Any = self.quantization_backend
        return (
            f"Can't merge into {self.module_name}: its weight is quantised with {backend.backend_name} "
            f"({type(self.get_base_layer()).__name__}), which can't be written. Merge into the base model in bfloat16 "
            "or float32, or serve the adapter unmerged."
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` can convert the adapter: ΔW must be a constant matrix."""
        factors = self.factors(adapter_name)
        try:
            if factors is not None:
                factors.check_mergeable()
        except ValueError:
            return False
        return True

    def untie(self) -> None:
        """Give the base layer a weight of its own until `unmerge`: merging must not change a tied embedding."""
        tied: Any = self.get_base_layer().weight
        self.get_base_layer().weight = nn.Parameter(tied.detach().clone(), requires_grad=tied.requires_grad)
        self._tied_weight = tied

    @property
    def untied(self) -> bool:
        """Whether the base layer has a weight of its own for now, which was tied to another module's."""
        return self._tied_weight is not None

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the exact weight that `merge` found.

        If it was written to meanwhile (trained, edited, loaded), ΔW is subtracted instead, as PEFT's LoRA does, and a
        warning says so.
        """
        if self._unmerged is not None:
            with loaded(self):
                self._take_out()
        if self._tied_weight is not None:
            if not is_offloaded(self.get_base_layer()):
                self.get_base_layer().weight = self._tied_weight
            self._tied_weight = None

    def _take_out(self) -> None:
        """The merged adapters from the weight, which is there to be written."""
        assert self._unmerged is not None
        now = base_weight.fingerprint(self)
        # After a cast the bits say nothing, and what was kept is cast alike.
        if now is None or self._fingerprint is None or now[0] != self._fingerprint[0] or now == self._fingerprint:
            base_weight.put_back(self, self._unmerged)
        else:
            logger.warning(
                "The weight of %s was changed while %s were merged into it: their update is subtracted from it, since "
                "putting back the weight from before the merge would undo the change. Unmerge before you train or "
                "edit the base model, to get the exact weights back.",
                self.module_name,
                self.merged_adapters,
            )
            weight = base_weight.read(self)
            view = weight.T if self.fan_in_fan_out else weight
            of_rows = [f.by_rows() for name in self.merged_adapters if (f := self.factors(name)) is not None]
            for rows in tiles(view):
                delta = sum(update(rows).to(view.device) for update in of_rows)
                view[rows] = view[rows] - delta
        self._unmerged, self._fingerprint, self.merged_adapters = None, None, []

    def __repr__(self) -> str:
        return "loraplex." + super().__repr__()


def wide(factor: Tensor) -> Tensor:
    """`factor` in float32 at least: products that are merged or exported are not rounded to bfloat16 on the way."""
    return factor.to(torch.promote_types(factor.dtype, torch.float32))


def kaiming_(factor: Tensor, fan_in: int) -> Tensor:
    """Fill with U(−1/√fan_in, 1/√fan_in), as `nn.Linear` and LoRA's A start (Kaiming-uniform with a = √5)."""
    bound = 1 / math.sqrt(fan_in)
    return nn.init.uniform_(factor, -bound, bound)
