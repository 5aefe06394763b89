"""The model card of a run: what was trained on what, how well it does, how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from peft import LoraConfig

from loraplex.io.reading import yaml_text
from loraplex.recipes.config.arguments import config_class
from loraplex.recipes.packages import PACKAGE_PREFIX
from loraplex.recipes.training.checkpoints import LABELS_NAME, RUN_NAME
from loraplex.tuner.config import AdapterConfig

if TYPE_CHECKING:
    from loraplex.recipes.config.run_config import RunConfig
    from loraplex.recipes.training.result import Result

_LOAD_OURS = "import loraplex  # registers the adapter's type with PEFT\n"
_AUTO = {"sft": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification"}


def model_card(run: RunConfig, result: Result) -> str:
    """The text of README.md, with its metadata."""
    title = _title(run.method)
    classes = None
    if run.task == "classification":
        classes = len(json.loads((result.output_dir / LABELS_NAME).read_text(encoding="utf-8")))
    return "\n\n".join(
        [
            _metadata(run.method, run.model),
            f"# {title} adapter for {run.model}",
            f"{result.trainable:,} trained parameters, {result.step:,} steps on "
            f"{', '.join(spec.title for spec in run.data)}. The whole configuration is in `{RUN_NAME}`.",
            _table(result),
            _loading(run.method, title, *_base(run.task, run.model, run.gguf_file, classes)),
        ]
    )


def _is_ours(method: str) -> bool:
    return issubclass(config_class(method), AdapterConfig)


def _title(method: str) -> str:
    cls = config_class(method)
    if issubclass(cls, AdapterConfig):
        return cls.title
    return "LoRA" if cls is LoraConfig else method


def _metadata(method: str, model: str) -> str:
    tags = [method, *(["loraplex"] if _is_ours(method) else [])]
    lines = ["library_name: peft", f"tags: {json.dumps(tags)}"]
    # Only a hub id means something to a reader of the metadata.
    if ":" not in model and not Path(model).exists():
        lines.insert(0, f"base_model: {yaml_text(model)}")
    return "\n".join(["---", *lines, "---"])


def _table(result: Result) -> str:
    rows = ["| task | metric | base model | adapted |", "|---|---|---|---|"]
    for task, metrics in result.after.items():
        for name, value in metrics.items():
            if name != "examples" and value is not None:
                before = result.before.get(task, {}).get(name)
                rows.append(f"| {task} | {name} | {'' if before is None else f'{before:.4f}'} | {value:.4f} |")
    return "\n".join(rows) if len(rows) > 2 else "It was not evaluated: no data was held out."


def _loading(method: str, title: str, imported: str, base: str) -> str:
    ours = _LOAD_OURS if _is_ours(method) else ""
    if ":" in method:
        ours = f"import {method.partition(':')[0]}  # registers the adapter's type with PEFT\n"
    needs = "" if not _is_ours(method) else f"This is a {title} adapter: `pip install loraplex`, then\n\n"
    return (
        f"## How to load\n\n{needs}```python\n{ours}from peft import PeftModel\n{imported}\n\n"
        f'base = {base}\nmodel = PeftModel.from_pretrained(base, "path/to/this/folder")\n```\n'
    )


def _base(task: str, model: str, gguf_file: str | None, classes: int | None) -> tuple[str, str]:
    """The import and the call that give the base model."""
    labels = "" if classes is None else f", num_labels={classes}"
    if model.startswith(PACKAGE_PREFIX) or model.endswith(".gguf") or gguf_file:
        gguf = f", gguf_file={_quoted(gguf_file)}" if gguf_file else ""
        call = f'load_model({_quoted(model)}, "{task}"{labels}{gguf})'
        return "from loraplex.recipes.models import load_model", call
    return (
        f"from transformers import {_AUTO[task]}",
        f"{_AUTO[task]}.from_pretrained({_quoted(model)}{labels})",
    )


def _quoted(name: str) -> str:
    """A name as a Python string, which no quote or line end in it can leave."""
    return json.dumps(name, ensure_ascii=False)
