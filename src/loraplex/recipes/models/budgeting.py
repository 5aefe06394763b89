"""`loraplex budget`: what each method costs on a model, or which rank of each costs as much as asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, cast

from peft import PeftConfig
from torch import nn

from loraplex.inspection.budget import Budget, match, plan
from loraplex.io.field_types import shown
from loraplex.recipes.config.arguments import adapter_config, plannable, plannable_methods
from loraplex.recipes.config.data_spec import Kind
from loraplex.recipes.config.run_config import ConfigError, RunConfig, nearest, parse_yaml, unknown_key
from loraplex.recipes.models.loading import DTYPES, load_skeleton

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_MOST_TOKENS = 2**40
_SOURCE = ("revision", "trust_remote_code", "gguf_file")


@dataclass(frozen=True)
class BudgetJob:
    """What to plan."""

    model: str
    """Hub id, folder (config.json is enough), or package:NAME."""
    methods: Sequence[str] = field(default_factory=plannable_methods)
    match: str | None = None
    """An adapter whose parameters the others are to have: "lora:r=16"."""
    params: str | None = None
    """A number of parameters, or a share of the base model's: "2M", "0.5%"."""
    tokens: int = 4096
    """Of a step: batch size × length."""
    dtype: str = "auto"
    """Of the base weights; "auto" takes the config's."""
    task: Kind = "sft"
    """"classification" trains a head along, for the classes that the model's config names."""
    autocast: bool = False
    """Whether the step runs under bfloat16 or float16 autocast."""


@dataclass(frozen=True)
class BudgetReport:
    """Budgets by the methods' names in a run."""

    model: str
    base_parameters: int
    dtype: str
    tokens: int
    autocast: bool
    target: int | None = None
    """Number of parameters to match."""
    reference: str | None = None
    """What it is the number of: "lora:r=16", "0.5%"."""
    budgets: dict[str, Budget] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "budgets": {method: budget.to_dict() for method, budget in self.budgets.items()}}


def plan_methods(job: BudgetJob, overrides: Iterable[tuple[str, Any]] = ()) -> BudgetReport:
    """Plan each method on the job's model, from its config alone.

    Args:
        job: what to plan.
        overrides: "adapter.FIELD", for the methods that have the field; or where the model is from.

    Raises:
        ConfigError: an unknown method or field (with the nearest name), a value out of range, or one that does not
            fit the model.
    """
    if not 1 <= job.tokens <= _MOST_TOKENS:
        raise ConfigError(f"--tokens {shown(job.tokens)}: give a number from 1 to {_MOST_TOKENS:,}.")
    adapter, source = _sorted(overrides)
    if job.match is not None and job.params is not None:
        raise ConfigError(f"--match {job.match} and --params {job.params} exclude each other: keep one.")
    configs = _configs(job, adapter)
    reference = None if job.match is None else parse_match(job.match, adapter, job.task)
    skeleton: Any = load_skeleton(job.model, job.task, **source)
    if job.dtype != "auto":
        skeleton.to(DTYPES[job.dtype])
    base = sum(p.numel() for p in skeleton.parameters())
    target, known = None, dict[str, Budget]()
    if job.params is not None:
        target = parse_parameters(job.params, base)
    elif reference is not None:
        method, config = reference
        found = _plan(method, config, skeleton, job)
        target = found.parameters
        configs = {method: _from_rank(other, config) for method, other in configs.items()}
        known = {method: replace(found, excess=0) for method, other in configs.items() if other == config}
    budgets = {m: known.get(m) or _plan(m, config, skeleton, job, target) for m, config in configs.items()}
    dtype = str(skeleton.dtype).removeprefix("torch.")
    return BudgetReport(job.model, base, dtype, job.tokens, job.autocast, target, job.match or job.params, budgets)


def _plan(method: str, config: PeftConfig, skeleton: nn.Module, job: BudgetJob, target: int | None = None) -> Budget:
    try:
        if target is None:
            return plan(skeleton, config, job.tokens, job.autocast)
        return match(skeleton, config, target, job.tokens, job.autocast)
    except ValueError as error:
        raise ConfigError(f"{method}: {error}") from None


def _from_rank(config: Any, reference: Any) -> PeftConfig:
    """`config` with the rank of `reference`, if it can: where it is the answer, one count is enough."""
    try:
        return cast(PeftConfig, replace(config, r=reference.r))
    except ValueError:
        return cast(PeftConfig, config)


def parse_parameters(text: str, base: int, option: str = "--params") -> int:
    """The number of parameters that "2M", "300k", "4,194,304" or "0.5%" (of `base`) stands for.

    Raises:
        ConfigError: it is none of these, or not positive.
    """
    found = re.fullmatch(r"(\d[\d_,]*\.?\d*|\.\d+)\s*([%kmb]?)", text.strip().lower())
    number = float(re.sub("[_,]", "", found[1])) if found and len(text) < 40 else 0.0
    if found is None or number <= 0:
        raise ConfigError(f"{option} {text}: give a number (2000000, 2M, 300k) or a share of the base model (0.5%).")
    return max(1, round(number * base / 100 if found[2] == "%" else number * _UNITS[found[2]]))


def parse_match(text: str, adapter: dict[str, Any], task: Kind, option: str = "--match") -> tuple[str, PeftConfig]:
    """The method and config of "lora:r=16,target_modules=[q_proj]", laid over the fields that hold for all."""
    # A method of the user's own, module:Class, has a colon in its name.
    own_class = re.match(r"[\w.]+:\w+(?=:)", text)
    method = own_class[0] if own_class else text.partition(":")[0]
    fields_text = text[len(method) + 1 :]
    _check_method(method)
    own = parse_yaml(f"{{{fields_text.replace('=', ': ')}}}", f"{option} {text}")
    if not own or any(value is None for value in own.values()):
        raise ConfigError(f"{option} {text}: write METHOD:FIELD=VALUE,FIELD=VALUE, for example lora:r=16.")
    known = _fields(method)
    return method, _config(method, {k: v for k, v in adapter.items() if k in known} | own, task)


def _configs(job: BudgetJob, adapter: dict[str, Any]) -> dict[str, PeftConfig]:
    """Each method's config, from those of the fields that it has."""
    for method in job.methods:
        _check_method(method)
    known = {method: _fields(method) for method in job.methods}
    for name in adapter:
        if not any(name in names for names in known.values()):
            raise ConfigError(unknown_key(f"adapter.{name}", set().union(*known.values()), ", ".join(job.methods)))
    return {m: _config(m, {k: v for k, v in adapter.items() if k in known[m]}, job.task) for m in job.methods}


def _fields(method: str) -> set[str]:
    return {f.name for f in fields(cast(Any, _config(method, {}, "sft")))}


def _config(method: str, adapter: dict[str, Any], task: Kind) -> PeftConfig:
    # No run: only what `adapter_config` reads of one.
    return adapter_config(RunConfig.model_construct(method=method, adapter=adapter, task=task))


def _check_method(method: str) -> None:
    known = plannable_methods()
    if method not in known and not (":" in method and plannable(method)):
        near = nearest(method, known)
        hint = f"did you mean {near!r}?" if near else f"choose one of {', '.join(known)}, or your own module:Class."
        raise ConfigError(f"unknown method {shown(method)}: {hint}")


def _sorted(overrides: Iterable[tuple[str, Any]]) -> tuple[dict[str, Any], Any]:
    """(fields of the adapter, where the model is from)."""
    adapter, source = {}, {}
    for key, value in overrides:
        if key.startswith("adapter."):
            adapter[key.removeprefix("adapter.")] = value
        elif key in _SOURCE:
            source[key] = value
        else:
            raise ConfigError(unknown_key(key, ["adapter.FIELD", *_SOURCE], "the command line"))
    return adapter, source


STEP_PARTS = ("weights", "adapter", "gradients", "AdamW", "kept for backward")


def step_parts(budget: Budget) -> dict[str, int]:
    """The parts of a step's memory, in bytes, under the names that people are shown."""
    adapter = (budget.adapter_bytes, budget.gradient_bytes, budget.optimizer_bytes, budget.activation_bytes)
    return dict(zip(STEP_PARTS, (budget.weight_bytes, *adapter), strict=True))
