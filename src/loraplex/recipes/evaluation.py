"""Metrics of a task: loss on the answers, accuracy by likelihood, or accuracy and F1 of a classifier.

Loss is the mean over answer tokens, −Σ log p / N, in nats; perplexity is its exponential. A multiple-choice answer is
right when it is the likeliest of the candidates: `accuracy` compares log p(choice | prompt), `accuracy_norm` the same
per character, which does not favour short candidates.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from loraplex.recipes.data.encode import Answer, check_vocabulary, encode_answers, encode_texts
from loraplex.recipes.progress import progress
from loraplex.runtime.placement import input_device

if TYPE_CHECKING:
    from loraplex.recipes.data.tasks import Task

Metrics = dict[str, float]

_LOGITS_PER_BATCH = 2**27  # elements; float32 logits and their log-softmax stay near 1 GB


Scores = dict[str, Tensor]
"""Per held-out example, `(examples,)` each. Answers: `nll` −Σ log p of the right one, its `tokens`, and of candidates
whether the right one is the likeliest, `correct` and, per character, `correct_norm`; `exact`: whether it is what the
model generates. Classes: `nll`, `predicted`,
`label`, `correct`."""


@dataclass
class Evaluator:
    """A held-out part of a task, encoded once and measured as often as wanted."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    max_length: int = 512
    batch_size: int = 16
    part: Literal["eval", "test"] = "eval"

    def __post_init__(self) -> None:
        rows = getattr(self.task, self.part)
        if rows is None:
            raise ValueError(
                f"task {self.task.name!r} has no held-out examples: "
                f"set {', '.join(f'{self.part}_{name}' for name in ('fraction', 'size', 'split'))} or {self.part}_path."
            )
        self._rows: Any = rows
        if self.task.kind == "classification":
            texts = encode_texts(self.tokenizer, rows, self.max_length).to_list()
            # Batches of similar length need little padding.
            self._texts = sorted(enumerate(texts), key=lambda item: len(item[1]["input_ids"]), reverse=True)
        else:
            desc = f"tokenize {self.task.name}"
            self._answers = encode_answers(self.tokenizer, rows, self.max_length, desc)

    def __call__(self, model: nn.Module, label: str = "eval") -> Metrics:
        """Measure `model`: means over its `scores`."""
        return self.summary(self.scores(model, label))

    def scores(self, model: nn.Module, label: str = "eval") -> Scores:
        """Measure `model` on each example, in evaluation mode without gradients; its mode is restored afterwards."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                if self.task.kind == "classification":
                    return self._classification(model, f"{label} {self.task.name}")
                return self._answering(model, f"{label} {self.task.name}")
        finally:
            model.train(training)

    def summary(self, scores: Scores) -> Metrics:
        """Means: per answer token for the loss, per example for accuracies."""
        nll = scores["nll"]
        if self.task.kind == "classification":
            return {
                "loss": nll.mean().item(),
                "accuracy": scores["correct"].double().mean().item(),
                "f1": macro_f1(scores["predicted"], scores["label"]),
                "examples": len(nll),
            }
        loss = (nll.sum() / scores["tokens"].sum().clamp(min=1)).item()
        names = (("accuracy", "correct"), ("accuracy_norm", "correct_norm"), ("exact_match", "exact"))
        accuracies = {name: scores[key].double().mean().item() for name, key in names if key in scores}
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **accuracies, "examples": len(nll)}

    def _answering(self, model: nn.Module, desc: str) -> Scores:
        found = log_likelihoods(model, self._answers, self.tokenizer.pad_token_id, self.batch_size, desc)
        scores = {
            "nll": torch.tensor([-group[0] for group in found], dtype=torch.float64),
            "tokens": torch.tensor([answers[0].length for answers in self._answers]),
        }
        if "choices" in self._rows.column_names:
            scores |= _right_choices(self._rows, [group[1:] for group in found])
        if self.task.generate:
            scores["exact"] = self._generated(model, self.task.generate, desc)
        return scores

    def _generated(self, model: nn.Module, length: int, desc: str) -> Tensor:
        """Whether greedy decoding, up to `length` tokens, writes the right answer; white space around it is free."""
        exact = torch.zeros(len(self._answers), dtype=torch.bool)
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        order = sorted(range(len(self._answers)), key=lambda i: self._answers[i][0].start, reverse=True)
        with progress(f"{desc}, generating", len(order), "example") as bar:
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                prompts = [
                    {"input_ids": answer.tokens[: answer.start]}
                    for answer, *_ in map(self._answers.__getitem__, chosen)
                ]
                batch = self.tokenizer.pad(prompts, return_tensors="pt", padding_side="left").to(input_device(model))
                with _own_settings(_base(model)):
                    written = model.generate(  # type: ignore[operator]
                        **batch, max_new_tokens=length, do_sample=False, eos_token_id=end, pad_token_id=pad
                    )[:, batch["input_ids"].shape[1] :]
                for index, tokens in zip(chosen, written, strict=True):
                    answer = self._answers[index][0]
                    exact[index] = self._text(tokens) == self._text(answer.tokens[answer.start :])
                bar.update(len(chosen))
        return exact

    def _text(self, tokens: Any) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()  # type: ignore[union-attr]

    def _classification(self, model: nn.Module, desc: str) -> Scores:
        check_vocabulary((row["input_ids"] for _, row in self._texts), _base(model))
        order: list[int] = []
        logits, labels = [], []
        with progress(desc, len(self._texts), "example") as bar:
            for start in range(0, len(self._texts), self.batch_size):
                numbers, rows = zip(*self._texts[start : start + self.batch_size], strict=True)
                inputs = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
                batch = self.tokenizer.pad(inputs, return_tensors="pt").to(input_device(model))
                logits.append(model(**batch).logits.float().cpu())
                labels += [row["labels"] for row in rows]
                order += numbers
                bar.update(len(rows))
        back = torch.tensor(order).argsort()
        values, label = torch.cat(logits)[back], torch.tensor(labels)[back]
        predicted = values.argmax(-1)
        nll = nn.functional.cross_entropy(values.double(), label, reduction="none")
        return {"nll": nll, "predicted": predicted, "label": label, "correct": predicted == label}


def macro_f1(predicted: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur of 2·TP / (2·TP + FP + FN)."""
    scores = []
    for c in torch.cat([predicted, labels]).unique():
        hits = ((predicted == c) & (labels == c)).sum().item()
        scores.append(2 * hits / ((predicted == c).sum().item() + (labels == c).sum().item()))
    return sum(scores) / len(scores)


def _right_choices(rows: Any, scores: list[list[float]]) -> Scores:
    plain, normed = [], []
    for row, group in zip(rows, scores, strict=True):
        texts = [choice if isinstance(choice, str) else choice[-1]["content"] for choice in row["choices"]]
        # Without the space that joins prompt and answer: lm-evaluation-harness counts like this.
        per_character = [score / max(len(text.strip()), 1) for score, text in zip(group, texts, strict=True)]
        plain.append(max(range(len(group)), key=group.__getitem__) == row["answer"])
        normed.append(max(range(len(group)), key=per_character.__getitem__) == row["answer"])
    return {"correct": torch.tensor(plain), "correct_norm": torch.tensor(normed)}


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
    check_vocabulary((answer.tokens for group in groups for answer in group), _base(model))
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
    device = input_device(model)
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


@contextmanager
def _own_settings(base: Any) -> Iterator[None]:
    """Generate without the settings beside the base model: with its beams or penalties decoding is not greedy."""
    theirs = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = theirs


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
