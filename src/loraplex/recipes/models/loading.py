"""Base models and tokenizers: hub ids, local folders, GGUF files, and weights that registry packages carry.

`resolve_model` turns each of these into something that `from_pretrained` loads by itself, so that an adapter's
`base_model_name_or_path` can be loaded again later without this package's help.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from typing_extensions import TypedDict, Unpack

from loraplex.export.base_model import check_base, reading
from loraplex.io.reading import expanded, file_name, relative_path
from loraplex.recipes.config.data_spec import Kind
from loraplex.recipes.models.weights import cached_gguf, package_model
from loraplex.recipes.packages import PACKAGE_PREFIX

DTYPES: dict[str, torch.dtype | str] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": "auto",
}


class Source(TypedDict, total=False):
    """Where weights come from, beside their name; the same for a model and its tokenizer."""

    revision: str | None
    gguf_file: str | None
    trust_remote_code: bool


def resolve_model(model: str, gguf_file: str | None = None, revision: str | None = None) -> str:
    """Return what `from_pretrained` can load: a hub id as it is, or the absolute path of a folder.

    `model` is a hub id, a local folder, a `.gguf` file, or `package:NAME`; `gguf_file` names a file inside
    the folder or the hub repository. A GGUF file is dequantised to float32 once and cached by its content.

    Raises FileNotFoundError for a path that does not exist, ModuleNotFoundError (with the pip command) for
    weights whose package is not installed, ValueError for an unknown package name or a damaged GGUF file.
    """
    if model.startswith(PACKAGE_PREFIX):
        return str(package_model(model.removeprefix(PACKAGE_PREFIX)))
    path = expanded(model)
    if path.is_dir():
        return str(cached_gguf(path / relative_path(gguf_file, "gguf_file")) if gguf_file else path.absolute())
    if path.suffix == ".gguf":
        return str(cached_gguf(path))
    if path.exists():
        raise ValueError(f"model {model!r} is a file, but not a .gguf file: give the folder that holds it")
    if model.startswith((".", "/", "~")):
        raise FileNotFoundError(f"model {model!r} does not exist: give a folder, a .gguf file or a hub id")
    if gguf_file is None:
        return model
    from huggingface_hub import hf_hub_download

    return str(cached_gguf(Path(hf_hub_download(model, gguf_file, revision=revision))))


def load_tokenizer(model: str, **source: Unpack[Source]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `model` (named as in `resolve_model`) and make sure that it can pad.

    A tokenizer without a padding token pads with its end-of-text token, or else its unknown token.
    Raises ValueError if it has neither, and whatever `resolve_model` raises.
    """
    path, options = _resolve(model, source)
    with reading(f"the tokenizer of {model}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **options)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if isinstance(tokenizer.chat_template, dict):
        for name in tokenizer.chat_template:
            file_name(name, f"the tokenizer of {model}, chat_template")  # each is saved as a file
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {model!r} has no pad, eos or unk token: set its pad_token and save it")
    return tokenizer


def load_model(
    model: str,
    task: Kind,
    *,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    **source: Unpack[Source],
) -> PreTrainedModel:
    """Load a base model with a language-model head (`sft`) or a fresh classification head.

    A classification model needs `label_names` or `num_labels`, and gets its tokenizer's padding token id.
    Weights are read from safetensors only: pickled `.bin` files can run code when loaded.

    Raises ValueError for a wrong `task`, `dtype` or number of labels and for a folder without safetensors,
    OSError for a hub model without them, and whatever `resolve_model` raises.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known: choose one of {', '.join(DTYPES)}")
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "use_safetensors": True}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if task == "sft":
        path, source_options = _resolve_weights(model, source)
        with reading(model):
            return AutoModelForCausalLM.from_pretrained(path, **options, **source_options)
    if task != "classification":
        raise ValueError(f"task {task!r} is not known: choose 'sft' or 'classification'")
    names = _label_names(num_labels, label_names)
    path, source_options = _resolve_weights(model, source)
    with reading(model):
        loaded: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            path,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            **options,
            **source_options,
        )
    # Decoders find the last real token by the padding id, and refuse batches without one.
    loaded.config.pad_token_id = load_tokenizer(model, **source).pad_token_id
    return loaded


def load_skeleton(
    model: str, task: Kind, *, label_names: Sequence[str] | None = None, **source: Unpack[Source]
) -> PreTrainedModel:
    """A base model's modules from its config alone, all on the meta device: no weight is read or made.

    A classifier without `label_names` gets the classes that its config names, and needs no tokenizer.

    Raises whatever `load_model` raises for the model's name, the task and the labels.
    """
    path, options = _resolve(model, source)
    auto: Any = AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM
    if label_names is not None:
        names = _label_names(None, label_names)
        options["id2label"] = dict(enumerate(names))
        options["label2id"] = {name: index for index, name in enumerate(names)}
    with reading(model):
        config = AutoConfig.from_pretrained(path, **options)
    if label_names is not None:
        config.pad_token_id = load_tokenizer(model, **source).pad_token_id
    with reading(model), torch.device("meta"):
        skeleton: PreTrainedModel = auto.from_config(config, trust_remote_code=source.get("trust_remote_code", False))
    return skeleton


def base_folder(model: str, **source: Unpack[Source]) -> Path:
    """The folder that holds a base model's safetensors weights, config and tokenizer; a hub model is downloaded.

    Raises whatever `load_model` raises for the model's name.
    """
    path, options = _resolve_weights(model, source)
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
    return Path(snapshot_download(path, revision=options.get("revision"), allow_patterns=wanted))


def _resolve(model: str, source: Source) -> tuple[str, dict[str, Any]]:
    """The loadable path of `model`, and the options that `from_pretrained` still needs for it."""
    path = resolve_model(model, source.get("gguf_file"), source.get("revision"))
    if Path(path).is_dir():
        check_base(Path(path))
    options: dict[str, Any] = {}
    if path == model and source.get("revision") is not None:
        options["revision"] = source["revision"]
    # Without a word from us transformers would ask at the terminal.
    options["trust_remote_code"] = bool(source.get("trust_remote_code"))
    return path, options


def _label_names(num_labels: int | None, label_names: Sequence[str] | None) -> list[str]:
    if label_names is None:
        if num_labels is None or num_labels < 1:
            raise ValueError(f"classification needs label_names or num_labels >= 1, got num_labels={num_labels}")
        return [f"LABEL_{index}" for index in range(num_labels)]
    if num_labels not in (None, len(label_names)):
        raise ValueError(f"num_labels is {num_labels}, but there are {len(label_names)} label names: {label_names}")
    if not label_names or len(set(label_names)) < len(label_names):
        raise ValueError(f"label_names must be distinct and not empty, got {list(label_names)}")
    return list(label_names)


def _resolve_weights(model: str, source: Source) -> tuple[str, dict[str, Any]]:
    """`_resolve`, once it is sure that a local folder holds safetensors weights of a whole model."""
    resolved, options = _resolve(model, source)
    path = Path(resolved)
    if not path.is_dir():
        return resolved, options
    if not any(path.glob("*.safetensors")) and (gguf := sorted(file.name for file in path.glob("*.gguf"))):
        raise ValueError(f"model folder {path} holds GGUF weights: set gguf_file to {gguf[0]!r}")
    if not (path / "config.json").is_file():
        what = "a PEFT adapter: give its base model" if (path / "adapter_config.json").is_file() else "no model"
        raise ValueError(f"model folder {path} has no config.json: it holds {what}")
    if not any(path.glob("*.safetensors")):
        raise ValueError(
            f"model folder {path} has no .safetensors weights, and pickled ones are refused: "
            "load them where you trust them and save them with save_pretrained"
        )
    return resolved, options
