"""Examples as tokens, in one way for training and for evaluation: what is scored is what was trained.

A prompt that is too long loses its middle, never its end; the answer is kept. TRL's own truncation cuts at the end,
where the answer is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from loraplex.export.base_model import reading
from loraplex.recipes.progress import progress
from loraplex.runtime.parallel import full_shape

_CHUNK = 256  # examples per call of the tokenizer


@dataclass(frozen=True)
class Answer:
    """A prompt and an answer to it: `tokens[start:]` is the answer."""

    tokens: list[int]
    start: int

    @property
    def length(self) -> int:
        """Number of answer tokens."""
        return len(self.tokens) - self.start


def encode_answers(tokenizer: PreTrainedTokenizerBase, rows: Dataset, max_length: int, desc: str) -> list[list[Answer]]:
    """For each row the right answer, ended as the model should end it, and then its `choices`, not ended."""
    encoded: list[list[Answer]] = []
    with reading(_name(tokenizer)), progress(desc, len(rows), "example") as bar:
        for chunk in _chunks(rows):
            encoded += _encode_chunk(tokenizer, chunk, max_length)
            bar.update(len(chunk))
    return encoded


def encode_training(tokenizer: PreTrainedTokenizerBase, rows: Dataset, max_length: int) -> Dataset:
    """`input_ids` and `labels`, with -100 on every token that is no answer."""
    answers = [answers[0] for answers in encode_answers(tokenizer, rows, max_length, "tokenize")]
    answers = [answer for answer in answers if answer.length > 0]
    return Dataset.from_dict(
        {
            "input_ids": [answer.tokens for answer in answers],
            "labels": [[-100] * answer.start + answer.tokens[answer.start :] for answer in answers],
        }
    )


def encode_texts(tokenizer: PreTrainedTokenizerBase, rows: Dataset, max_length: int) -> Dataset:
    """Classification: the tokenizer's own columns and `labels`; long texts are cut at the end."""
    pair = ("text_pair",) if "text_pair" in rows.column_names else ()

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        texts = [batch[column] for column in ("text", *pair)]
        return {**tokenizer(*texts, truncation=True, max_length=max_length), "labels": batch["label"]}

    with reading(_name(tokenizer)):
        return rows.map(encode, batched=True, remove_columns=rows.column_names, desc="tokenize", keep_in_memory=True)


def check_vocabulary(tokens: Iterable[list[int]], model: Any) -> None:
    """Raise a ValueError if a tokenizer that is not the model's writes tokens which the model does not know."""
    known = full_shape(model.get_input_embeddings().weight)[0]  # ZeRO-3 holds none of it between its uses
    for sequence in tokens:
        if sequence and not 0 <= min(sequence) <= max(sequence) < known:
            raise ValueError(
                f"The tokenizer writes token {max(sequence)}, but the model has {known} of them: put the model's own "
                "tokenizer into its folder."
            )


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"text by the tokenizer of {tokenizer.name_or_path}"


def _chunks(rows: Dataset) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), _CHUNK):
        yield rows.select(range(start, min(start + _CHUNK, len(rows)))).to_list()


def _encode_chunk(
    tokenizer: PreTrainedTokenizerBase, chunk: Sequence[dict[str, Any]], max_length: int
) -> list[list[Answer]]:
    prompts, ended = [], []
    choices: list[list[str]] = []
    for row in chunk:
        prompts.append(_prompt_text(tokenizer, row["prompt"]))
        ended.append(_full_text(tokenizer, row["prompt"], row["completion"]))
        choices.append([_choice_text(tokenizer, row["prompt"], choice) for choice in row.get("choices") or ()])
    special = isinstance(chunk[0]["prompt"], str)  # a chat template writes the special tokens itself
    prompt_ids = _tokens(tokenizer, prompts, special)
    full_ids = _tokens(tokenizer, ended, special)
    choice_ids = iter(_tokens(tokenizer, [text for texts in choices for text in texts], special))
    return [
        _fit([_split(prompt, ids) for ids in (full, *(next(choice_ids) for _ in texts))], max_length)
        for prompt, full, texts in zip(prompt_ids, full_ids, choices, strict=True)
    ]


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int]]:
    # verbose=False: a text beyond the model's length is cut here, so a warning about it would mislead.
    return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"] if texts else []


def _prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))


def _full_text(tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any) -> str:
    if isinstance(prompt, str):
        end = tokenizer.eos_token or ""
        return prompt + completion + ("" if completion.endswith(end) else end)
    return str(tokenizer.apply_chat_template(prompt + completion, tokenize=False))


def _choice_text(tokenizer: PreTrainedTokenizerBase, prompt: Any, choice: Any) -> str:
    if isinstance(prompt, str):
        return str(prompt + choice)
    text = _full_text(tokenizer, prompt, choice)
    content = choice[-1]["content"]
    at = text.rfind(content)
    return text[: at + len(content)] if at >= 0 else text


def _split(prompt: list[int], full: list[int]) -> Answer:
    # Tokens may merge across the boundary: the answer starts where the two part, which can be before the prompt's end.
    same = 0
    for a, b in zip(prompt, full, strict=False):
        if a != b:
            break
        same += 1
    return Answer(full, max(1, min(same, len(full))))  # nothing comes before the first token to predict it from


def _fit(answers: list[Answer], max_length: int) -> list[Answer]:
    """Cut all answers' prompts to the same room, so that they stay comparable."""
    longest = max(answer.length for answer in answers)
    room = max(2, max_length - longest)
    return [_cut(answer, room, max_length) for answer in answers]


def _cut(answer: Answer, room: int, max_length: int) -> Answer:
    tokens, start = answer.tokens, answer.start
    if start > room:
        head = room // 2
        tokens = tokens[:head] + tokens[start - (room - head) :]
        start = room
    return Answer(tokens[:max_length], start)
