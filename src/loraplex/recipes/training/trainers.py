"""The trainers of a run: TRL's SFTTrainer and transformers' Trainer, with our evaluation, checkpoints and decay."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from loraplex.io.files import put_in_place
from loraplex.io.reading import message_of, read_json
from loraplex.recipes.config.run_config import ConfigError
from loraplex.recipes.evaluation import Evaluator
from loraplex.recipes.training.callbacks import MetricsCallback
from loraplex.recipes.training.checkpoints import SAVING, outdated, write_manifest
from loraplex.recipes.training.metrics import MetricsLog
from loraplex.recipes.training.nonfinite import NonFiniteGuard
from loraplex.recipes.training.optimizer_state import check_optimizer, settings_of
from loraplex.recipes.training.zero import load_state, save_state
from loraplex.runtime.out_of_memory import is_out_of_memory
from loraplex.runtime.parallel import gathered_state_dict
from loraplex.tuner.factors import Factors
from loraplex.tuner.schedules import save_schedules
from loraplex.tuner.sharing import SharedFactors

SCHEDULER_JSON = "scheduler.json"

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class _TaskEvaluation(_Base):
    """Evaluates every task with the evaluator that `loraplex eval` uses, and writes whole checkpoints or none."""

    evaluators: dict[str, Evaluator]
    metrics_log: MetricsLog
    metrics: MetricsCallback
    guard: NonFiniteGuard
    _saving = False
    evaluated_at: int | None = None
    """The step of the latest evaluation, which every process knows; rank 0 alone has its rows."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        random_state = self.guard.random_state()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.saw(inputs, random_state, loss)
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        model = self.model
        assert model is not None
        model.eval()  # and stays so while logging: TRL tells by it whose metrics it is averaging
        metrics: dict[str, float] = {}
        for name, evaluator in self.evaluators.items():
            with self.compute_loss_context_manager():
                values = evaluator(model)
            if self.is_world_process_zero():
                self.metrics_log.add("eval", self.state.global_step, {"task": name, **values})
            metrics |= {f"{metric_key_prefix}_{name}_{key}": value for key, value in values.items()}
        losses = [metrics[f"{metric_key_prefix}_{name}_loss"] for name in self.evaluators]
        metrics[f"{metric_key_prefix}_loss"] = sum(losses) / len(losses)
        self.log(metrics)
        self.evaluated_at = self.state.global_step
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        # accelerate wraps the forward in autocast for every engine but FSDP2.
        return self.accelerator.autocast() if self.is_fsdp_enabled else nullcontext()

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(super()._get_output_dir(trial), SAVING) if self._saving else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint under `.saving`, and rename it once all processes have written their files."""
        if self.evaluators and self.evaluated_at != self.state.global_step == self.state.max_steps:
            self.evaluate()  # now: a run that is killed after its last checkpoint has nothing left to evaluate
        run_dir = Path(super()._get_output_dir(trial))
        saving, name = run_dir / SAVING, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(saving, ignore_errors=True)  # of a process that was killed
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        if self.state.best_model_checkpoint == str(saving / name):
            self.state.best_model_checkpoint = str(run_dir / name)
            if self.args.should_save:
                self.state.save_to_json(str(saving / name / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(saving / name)
            put_in_place(saving / name, run_dir / name)
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            for old in outdated(run_dir, self.state.global_step, limit, best):
                os.rename(old, saving / old.name)  # first, so that a half-deleted one is no checkpoint
            shutil.rmtree(saving)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter: the same file under every engine, without gathering the base model on one process."""
        self.guard.check_factors()
        if not self.is_deepspeed_enabled and not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=gathered_state_dict(self.model))  # type: ignore[arg-type]
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_schedules(self.model, Path(output_dir))  # type: ignore[arg-type]
        if self.is_deepspeed_enabled:
            save_state(self.model_wrapped, Path(output_dir), write=self.args.should_save)
            if self.args.should_save:
                assert self.lr_scheduler is not None
                text = json.dumps(self.lr_scheduler.state_dict(), indent=2) + "\n"
                Path(output_dir, SCHEDULER_JSON).write_text(text, encoding="utf-8")
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if self.is_fsdp_enabled:
            # Its policy would round factors to half precision before they are multiplied; autocast rounds the products,
            # as on one process. Dual LoRA's signs would not be those that merging sees.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        load_state(self.model_wrapped, Path(resume_from_checkpoint))
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        with _reading(resume_from_checkpoint):
            self.lr_scheduler.load_state_dict(read_json(Path(resume_from_checkpoint, SCHEDULER_JSON), dict))
        for group, lr in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        before = [] if checkpoint is None or self.is_deepspeed_enabled else settings_of(self.optimizer)
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if before:
                check_optimizer(self.optimizer, before)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            load_state(self.model_wrapped, Path(self.state.best_model_checkpoint or ""))
        else:
            super()._load_best_model()

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        gates = {
            f"{prefix}.{name}"
            for prefix, m in model.named_modules()
            if isinstance(m, (Factors, SharedFactors))
            for name, _ in m.named_parameters(recurse=False)
            if name.rpartition("__")[2] in m.no_decay
        }
        return [name for name in super().get_decay_parameter_names(model) if name not in gates]


@contextmanager
def _reading(checkpoint: str | None) -> Iterator[None]:
    """What the libraries say of a checkpoint that they can't read, as a ConfigError that names it.

    torch reads the pickles in it with its restricted loader, which runs no code of theirs.
    """
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"{checkpoint} can't be read: {type(error).__name__}: {message_of(error)}. Delete it, and --resume goes on "
            "from the one before."
        ) from error


class AnswerTrainer(_TaskEvaluation, SFTTrainer):
    """Causal language models: loss on the answers."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL would write one with each checkpoint, through a link too; the run writes its own at its end."""


class ClassifierTrainer(_TaskEvaluation, Trainer):
    """Sequence classification."""
