"""NaN and Inf in a run: seen before the update is made, traced to a module, answered by stopping or by skipping.

Once per update, on all ranks alike, the losses of its micro-batches and the gradients are checked; that is one look at
the device. Only when something is wrong is the model passed through again, with hooks that find the module. Where
parameters are sharded (FSDP, DeepSpeed) the step is named and the module is not.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraplex.recipes.config.run_config import ConfigError
from loraplex.recipes.training.checkpoints import RUN_NAME, checkpoints, verify
from loraplex.recipes.training.nonfinite_search import Finding, Trace, kind_of, readable
from loraplex.runtime.parallel import is_sharded, to_local

MAX_SKIPPED = 10
"""Updates in a row that may be left out; then the run stops."""
_MASKED = -100


class NonFiniteError(ValueError):
    """A loss, a gradient or a factor is NaN or Inf; says where, what is kept and how to go on."""


@dataclass
class _MicroBatch:
    inputs: dict[str, Any]
    random_state: tuple[Tensor, Tensor | None]
    loss: Tensor


class NonFiniteGuard(TrainerCallback):
    """Stops a run, or leaves an update out, when its loss or gradients are not finite.

    The trainer reports every micro-batch to it (`saw`), and asks before it writes factors (`check_factors`).
    """

    def __init__(self, trainer: Any, on_nonfinite: Literal["stop", "skip"]) -> None:
        self.trainer = trainer
        self.on_nonfinite = on_nonfinite
        self._micro: list[_MicroBatch] = []
        self._in_a_row = 0
        self._unlogged = False
        """Whether an update was left out since the loss was last logged."""
        self._step: Callable[..., Any] | None = None
        """The optimizer's own, while an update is left out."""

    def saw(self, inputs: dict[str, Any], random_state: tuple[Tensor, Tensor | None], loss: Tensor) -> None:
        """A micro-batch of the coming update gave this loss; `random_state` is what dropout started from."""
        self._micro.append(_MicroBatch(inputs, random_state, loss.detach()))

    def random_state(self) -> tuple[Tensor, Tensor | None]:
        """Of the CPU's generator and of the accelerator's, if there is one."""
        device = self.trainer.args.device
        return torch.get_rng_state(), None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._micro = []
        if self.on_nonfinite == "skip" and self.trainer.is_deepspeed_enabled:
            raise ConfigError(
                "train.on_nonfinite is 'skip', but DeepSpeed makes the update before anyone can look at it: use 'stop'."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        micro, self._micro = self._micro, []
        optimizer = kwargs["optimizer"]
        bad_loss, bad_gradient = self._verdict(micro, optimizer)
        scaler = self.trainer.accelerator.scaler
        # An overflow of scaled fp16 gradients is the scaler's own affair, as long as there is a scale to lower.
        if bad_gradient and not bad_loss and scaler is not None and scaler.get_scale() >= 1:
            return
        if not (bad_loss or bad_gradient):
            self._in_a_row = 0
            return
        finding, loss = self._agree(self._find(micro, bad_loss), sum(m.loss.item() for m in micro))
        step, where = state.global_step + 1, "loss" if bad_loss else "gradient"
        cause = f"the {where} is not finite: {finding.text}"
        if self.on_nonfinite == "skip" and not finding.lasting:
            self._in_a_row += 1
            if state.is_world_process_zero:
                tqdm.write(f"step {step} is left out, as {cause}", file=sys.stderr)
                self.trainer.metrics_log.add("skipped", step, {"not_finite": where, "module": finding.module})
            if self._in_a_row < MAX_SKIPPED:
                self._leave_out(optimizer)
                return
            cause += f". {MAX_SKIPPED} updates in a row were left out"
        if state.is_world_process_zero:
            row = {"loss": loss, "learning_rate": optimizer.param_groups[0]["lr"]}
            self.trainer.metrics_log.add("train", step, row)
        self.trainer.callback_handler.on_train_end(args, state, control)  # closes the progress bar
        raise NonFiniteError(f"step {step}: {cause}. {self._way_on(finding)}")

    def _leave_out(self, optimizer: Any) -> None:
        """Make the coming update one that a gradient scaler skipped: the learning rate's schedule waits too."""
        scaler = self.trainer.accelerator.scaler
        if scaler is not None:
            scaler.update(scaler.get_scale())  # forgets that this update's gradients were unscaled
        self._unlogged = True
        self._step = optimizer.step
        optimizer.step = lambda closure=None: None
        optimizer._is_overflow = True  # what optimizer.step_was_skipped tells

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._step is not None:
            kwargs["optimizer"].step, self._step = self._step, None
            kwargs["optimizer"]._is_overflow = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._unlogged and "loss" in kwargs["logs"]:
            # The Trainer empties its sum of losses by taking it from itself, and a NaN stays one.
            self.trainer._tr_loss.zero_()
            self._unlogged = False

    def check_factors(self) -> None:
        """Called before trained parameters are written.

        Raises:
            NonFiniteError: one of them is not finite, on any rank.
        """
        trained = [(name, p) for name, p in self.trainer.model.named_parameters() if p.requires_grad]
        largest = _norm((p for _, p in trained), math.inf)  # never overflows where every element is finite
        if not self._any_rank(largest.isfinite().logical_not().reshape(1))[0]:
            return
        here = _broken_parameter(trained) or Finding("a trained parameter is not finite", sure=False, lasting=True)
        finding, _ = self._agree(here, 0.0)
        step = self.trainer.state.global_step
        raise NonFiniteError(f"step {step} is not saved: {finding.text}. {self._way_on(finding)}")

    def _verdict(self, micro: list[_MicroBatch], optimizer: Any) -> list[bool]:
        """(a loss is not finite, a gradient or their norm is not finite), the same on every rank."""
        device = self.trainer.args.device
        losses = torch.stack([m.loss for m in micro])
        if self.trainer.is_deepspeed_enabled:
            # The engine holds the gradients, has made the update and keeps their norm; in fp16 it skips overflows.
            norm = self.trainer.deepspeed.get_global_grad_norm()
            bad = norm is not None and not math.isfinite(norm) and self.trainer.accelerator.mixed_precision != "fp16"
            norm = torch.tensor(math.inf if bad else 0.0)
        else:
            norm = _norm((p.grad for group in optimizer.param_groups for p in group["params"]), 2)
        return self._any_rank(torch.stack([losses.isfinite().all(), norm.isfinite().to(device)]).logical_not())

    def _any_rank(self, flags: Tensor) -> list[bool]:
        if _ranks() > 1:
            flags = flags.to(self.trainer.args.device, torch.int32)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return [bool(flag) for flag in flags.tolist()]

    def _agree(self, found: Finding, loss: float) -> tuple[Finding, float]:
        """The finding of the first rank that is sure of one, and the ranks' mean loss."""
        everyone: list[Any] = [(found, loss)]
        if _ranks() > 1:
            everyone = [None] * _ranks()
            dist.all_gather_object(everyone, (found, loss))
        findings, losses = zip(*everyone, strict=True)
        return next((f for f in findings if f.sure), findings[0]), sum(losses) / len(losses)

    def _find(self, micro: list[_MicroBatch], bad_loss: bool) -> Finding:
        """What this rank can tell about the fault. Nothing here waits for other ranks."""
        model = self.trainer.model
        sharded = Finding("its module is not searched for under FSDP and DeepSpeed", sure=False)
        if self.trainer.is_deepspeed_enabled:
            return sharded
        if (broken := _broken_parameter(model.named_parameters())) is not None:
            return broken
        if any(is_sharded(p) for p in model.parameters()):
            return sharded
        for suspect in micro:
            if bad_loss and math.isfinite(suspect.loss.item()):
                continue
            if bad_loss and _all_masked(suspect.inputs):
                return Finding("every label of the batch is masked (-100), and its loss a mean over no token")
            try:
                finding = self._retrace(suspect)
            except RuntimeError as error:
                # Out of memory, say: what goes wrong here must not hide what it was to explain.
                return Finding(f"its module could not be traced ({str(error).splitlines()[0]})", sure=False)
            if finding is not None:
                return finding
        return Finding("its module is not known, a second pass through the model was finite", sure=False)

    def _retrace(self, micro: _MicroBatch) -> Finding | None:
        """Pass a micro-batch through the model again; random numbers, gradients and parameters stay as they are."""
        device = self.trainer.args.device
        cpu_state, device_state = micro.random_state
        with torch.random.fork_rng(
            [] if device_state is None else [device.index or 0],
            device_type="cuda" if device_state is None else device.type,
        ):
            torch.set_rng_state(cpu_state)
            if device_state is not None:
                torch.get_device_module(device).set_rng_state(device_state)
            with Trace(self.trainer.model) as trace:
                with self.trainer.compute_loss_context_manager():
                    loss = self.trainer.model(**self.trainer._prepare_inputs(micro.inputs)).loss
                trace.backward(loss)
        return trace.finding

    def _way_on(self, finding: Finding) -> str:
        folder = Path(self.trainer.args.output_dir)
        lower = f"--train.learning_rate {self.trainer.args.learning_rate / 2:g}"
        good = next((c for c in checkpoints(folder) if verify(c) is None), None)
        if good is None:
            text = f"No checkpoint was written yet: start again, with another setting such as {lower}"
        else:
            command = f"loraplex train {folder / RUN_NAME} --resume {lower}"
            text = f"The last good checkpoint is {good}. Continue from it, with another setting such as here: {command}"
        if finding.lasting or self.on_nonfinite == "skip" or self.trainer.is_deepspeed_enabled:
            return text
        return f"{text} (or --train.on_nonfinite skip, to leave such updates out)"


def _broken_parameter(named: Iterable[tuple[str, nn.Parameter]]) -> Finding | None:
    broken = [(name, p, kind) for name, p in named if (kind := kind_of([to_local(p)]))]
    if not broken:
        return None
    name, parameter, kind = broken[0]
    text = f"{readable(name)} holds {kind}"
    if not parameter.requires_grad:
        text += ", a frozen weight of the base model"
    if broken[1:]:
        text += f" ({len(broken)} parameters are not finite)"
    return Finding(text, readable(name), lasting=True)


def _all_masked(inputs: Mapping[str, Any]) -> bool:
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor):
        return False
    # A causal model never predicts the first token.
    return bool((labels[..., 1:] if labels.ndim > 1 else labels).eq(_MASKED).all())


def _norm(tensors: Iterable[Tensor | None], norm_type: float) -> Tensor:
    """Of all tensors together; NaN or Inf if any element is, and nobody has to wait for it."""
    local = [to_local(t) for t in tensors if t is not None]
    return torch.nn.utils.get_total_norm([t for t in local if t.numel()], norm_type)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
