"""The trainers of a run: TRL's SFTTrainer and transformers' Trainer, with our evaluation and weight decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer
from trl import SFTTrainer

from loraplex.evaluate import Evaluator
from loraplex.training.metrics import MetricsLog
from loraplex.training.nonfinite import NonFiniteGuard

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class _TaskEvaluation(_Base):
    """Evaluates every task with the evaluator that `loraplex eval` uses, and writes a row for each."""

    evaluators: dict[str, Evaluator]
    metrics_log: MetricsLog
    guard: NonFiniteGuard

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        random_state = self.guard.random_state()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.saw(inputs, random_state, loss)
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.guard.check_factors()
        super().save_model(output_dir, _internal_call)

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
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        # MultiLoRA's scaling starts at zero and is a gate: decay would pull the whole update back to nothing.
        names = super().get_decay_parameter_names(model)
        return [name for name in names if "lora_scaling" not in name]


class AnswerTrainer(_TaskEvaluation, SFTTrainer):
    """Causal language models: loss on the answers."""


class ClassifierTrainer(_TaskEvaluation, Trainer):
    """Sequence classification."""
