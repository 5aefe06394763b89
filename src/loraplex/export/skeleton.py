"""An adapter on its base model's modules, of which only the config is read, so that it can be exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from loraplex.export.base_model import check_base, reading
from loraplex.export.lora import Rank, export_lora
from loraplex.export.wish import Wish
from loraplex.io.reading import message_of
from loraplex.tuner.adapter_files import check_adapter_files
from loraplex.tuner.calibration import set_mean_gates

_CLASSES: dict[str | None, Any] = {
    None: AutoModelForCausalLM,
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": AutoModel,
}


def write_plain(adapter: Path, base: str, wish: Wish, target: Path) -> None:
    """Export the adapter in `adapter` as a plain LoRA into the folder `target`.

    Raises:
        ValueError: the files are not an adapter for this base model, or ΔW has no plain form.
        OSError: the base model's config can't be read.
    """
    check_adapter_files(str(adapter))
    model = load_on_config(adapter, base)
    if wish.mean_gates is not None:
        set_mean_gates(model, wish.mean_gates)
    export_lora(model, target, rank=Rank(wish.exact, wish.rank, wish.max_error))


def load_on_config(adapter: Path, base: str) -> PeftModel:
    """The saved adapter on its base model's modules, whose weights stay on the meta device.

    Code that comes with a base model is never run, whatever the adapter's files ask for.

    Raises:
        ValueError: the files are not an adapter for this base model.
        OSError: the base model's config can't be read.
    """
    if Path(base).is_dir():
        check_base(Path(base))
    with reading(base):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    task = _task(adapter)
    if task not in _CLASSES:
        raise ValueError(
            f"{adapter} was trained for {task}, with a head of its own that a plain LoRA can't carry: merge it "
            "(loraplex export --format merged)."
        )
    with reading(base), torch.device("meta"):
        skeleton = _CLASSES[task].from_config(config, trust_remote_code=False)
    try:
        # On the CPU: a server's GPU has no room for us.
        model = PeftModel.from_pretrained(skeleton, str(adapter), low_cpu_mem_usage=True, torch_device="cpu")
    except (ValueError, OSError, MemoryError):
        raise
    except Exception as error:
        # PEFT checks little of a config before it computes with it: a broken one ends in any kind of error.
        raise ValueError(f"{adapter} does not fit the base model {base}: {message_of(error)}") from error
    return model.eval()


def _task(adapter: Path) -> str | None:
    from peft import PeftConfig

    task = PeftConfig.from_pretrained(str(adapter)).task_type
    return None if task is None else str(getattr(task, "value", task))
