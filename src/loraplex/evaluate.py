"""Metrics of a task: loss on the answers, accuracy by likelihood, or accuracy and F1 of a classifier.

Loss is the mean over answer tokens, −Σ log p / N, in nats; perplexity is its exponential. A multiple-choice answer is
right when it is the likeliest of the candidates: `accuracy` compares log p(choice | prompt), `accuracy_norm` the same
per character, which does not favour short candidates.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from loraplex.training.encode import Answer, encode_answers, encode_texts
from loraplex.training.progress import progress

if TYPE_CHECKING:
    from loraplex.training.data import Task

Metrics = dict[str, float]

_LOGITS_PER_BATCH = 2**27  # elements; float32 logits and their log-softmax stay near 1 GB


@dataclass
class Evaluator:
    """The held-out part of a task, encoded once and measured as often as wanted."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    max_length: int = 512
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.task.eval is None:
            raise ValueError(
                f"task {self.task.name!r} has no held-out examples: "
                "set eval_fraction, eval_size, eval_split or eval_path."
            )
        desc = f"tokenize {self.task.name}"
        if self.task.kind == "classification":
            texts = encode_texts(self.tokenizer, self.task.eval, self.max_length).to_list()
            # Metrics don't depend on the order; batches of similar length need little padding.
            self._texts = sorted(texts, key=lambda row: len(row["input_ids"]), reverse=True)
        else:
            self._answers = encode_answers(self.tokenizer, self.task.eval, self.max_length, desc)

    def __call__(self, model: nn.Module, label: str = "eval") -> Metrics:
        """Measure `model`, in evaluation mode and without gradients; its mode is restored afterwards."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                if self.task.kind == "classification":
                    return self._classification(model, f"{label} {self.task.name}")
                return self._answering(model, f"{label} {self.task.name}")
        finally:
            model.train(training)

    def _answering(self, model: nn.Module, desc: str) -> Metrics:
        scores = log_likelihoods(model, self._answers, self.tokenizer.pad_token_id, self.batch_size, desc)
        gold = [(group[0], answers[0].length) for group, answers in zip(scores, self._answers, strict=True)]
        tokens = sum(length for _, length in gold)
        loss = -sum(score for score, _ in gold) / max(tokens, 1)
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self.task.multiple_choice:
            metrics |= _choice_accuracy(self.task.eval, [group[1:] for group in scores])
        return metrics | {"examples": len(gold)}

    def _classification(self, model: nn.Module, desc: str) -> Metrics:
        logits, labels = [], []
        with progress(desc, len(self._texts), "example") as bar:
            for start in range(0, len(self._texts), self.batch_size):
                rows = self._texts[start : start + self.batch_size]
                inputs = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
                batch = self.tokenizer.pad(inputs, return_tensors="pt").to(_device(model))
                logits.append(model(**batch).logits.float().cpu())
                labels += [row["labels"] for row in rows]
                bar.update(len(rows))
        scores, classes = torch.cat(logits), torch.tensor(labels)
        predicted = scores.argmax(-1)
        return {
            "loss": nn.functional.cross_entropy(scores, classes).item(),
            "accuracy": (predicted == classes).double().mean().item(),
            "f1": macro_f1(predicted, classes),
            "examples": len(labels),
        }


def macro_f1(predicted: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur of 2·TP / (2·TP + FP + FN)."""
    scores = []
    for c in torch.cat([predicted, labels]).unique():
        hits = ((predicted == c) & (labels == c)).sum().item()
        scores.append(2 * hits / ((predicted == c).sum().item() + (labels == c).sum().item()))
    return sum(scores) / len(scores)


def _choice_accuracy(rows: Any, scores: list[list[float]]) -> Metrics:
    plain = normed = 0
    for row, group in zip(rows, scores, strict=True):
        texts = [choice if isinstance(choice, str) else choice[-1]["content"] for choice in row["choices"]]
        per_character = [score / max(len(text), 1) for score, text in zip(group, texts, strict=True)]
        plain += max(range(len(group)), key=group.__getitem__) == row["answer"]
        normed += max(range(len(group)), key=per_character.__getitem__) == row["answer"]
    return {"accuracy": plain / len(scores), "accuracy_norm": normed / len(scores)}


@dataclass
class _Pass:
    """One sequence to run, and the answers that it scores: (number of the answer, its start, its tokens)."""

    tokens: list[int]
    answers: list[tuple[int, Answer]]

    @property
    def first(self) -> int:
        """First position whose logits are needed."""
        return min(answer.start for _, answer in self.answers) - 1


def log_likelihoods(
    model: nn.Module, groups: Sequence[Sequence[Answer]], pad: int, batch_size: int, desc: str
) -> list[list[float]]:
    """Σ log p of the answer's tokens, for each answer of each group.

    Answers of a group whose inputs continue each other share a pass: with one-token choices, all of them and the
    right answer cost a single one. Batches hold sequences of similar length.
    """
    passes: list[_Pass] = []
    number = 0
    for group in groups:
        numbered = list(enumerate(group, start=number))
        passes += _shared_passes(numbered)
        number += len(group)
    sums = torch.zeros(number, dtype=torch.float64)
    passes.sort(key=lambda p: len(p.tokens), reverse=True)
    vocabulary = _base(model).get_input_embeddings().weight.shape[0]
    with progress(desc, len(passes), "pass") as bar:
        for batch in _batches(passes, batch_size, vocabulary):
            for index, values in _score(model, batch, pad):
                sums.index_add_(0, index, values)
            bar.update(len(batch))
    flat = iter(sums.tolist())
    return [[next(flat) for _ in group] for group in groups]


def _shared_passes(answers: Iterable[tuple[int, Answer]]) -> list[_Pass]:
    passes: list[_Pass] = []
    for number, answer in sorted(answers, key=lambda item: len(item[1].tokens), reverse=True):
        needed = answer.tokens[:-1]  # the last token is predicted, not read
        for other in passes:
            if other.tokens[: len(needed)] == needed:
                other.answers.append((number, answer))
                break
        else:
            passes.append(_Pass(needed, [(number, answer)]))
    return passes


def _batches(passes: Sequence[_Pass], batch_size: int, vocabulary: int) -> Iterator[list[_Pass]]:
    batch: list[_Pass] = []
    for item in passes:
        if batch:
            positions = len(batch[0].tokens) - min(p.first for p in (*batch, item))
            if len(batch) == batch_size or (len(batch) + 1) * positions * vocabulary > _LOGITS_PER_BATCH:
                yield batch
                batch = []
        batch.append(item)
    if batch:
        yield batch


def _score(model: nn.Module, batch: Sequence[_Pass], pad: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(numbers of answers, log-probabilities to add to them) of one batch, padded on the right."""
    device = _device(model)
    width = max(len(p.tokens) for p in batch)
    ids = torch.tensor([p.tokens + [pad] * (width - len(p.tokens)) for p in batch], device=device)
    mask = torch.tensor([[1] * len(p.tokens) + [0] * (width - len(p.tokens)) for p in batch], device=device)
    wanted = [
        (row, position, answer.tokens[position + 1], number)
        for row, p in enumerate(batch)
        for number, answer in p.answers
        for position in range(answer.start - 1, len(answer.tokens) - 1)
    ]
    rows, positions, targets, numbers = torch.tensor(wanted, device=device).T
    kept, columns = positions.unique(return_inverse=True)
    if "logits_to_keep" in inspect.signature(_base(model).forward).parameters:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
    else:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, kept]
    chosen = logits[rows, columns].float()
    values = chosen.gather(1, targets[:, None]).squeeze(1) - chosen.logsumexp(-1)
    yield numbers.cpu(), values.double().cpu()


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
