"""One trial, in a process of its own: trains it if that is left to do, then tests it if it was asked to.

job.json in its folder says what to do. A process of its own, so that a trial's peak memory is its own, and a crash too.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.inspection.spectra import Analysis
from loraplex.io.files import replaced_file, write_tensors, write_text
from loraplex.io.reading import read_json
from loraplex.recipes.adapters.analysis import analyse_adapter, is_known
from loraplex.recipes.adapters.saved import SavedAdapter
from loraplex.recipes.config.run_config import build_run
from loraplex.recipes.console import quiet
from loraplex.recipes.data.encode import Answer
from loraplex.recipes.data.examples import value_of
from loraplex.recipes.data.rows import read_table
from loraplex.recipes.evaluation import log_likelihoods
from loraplex.recipes.prepare import PreparedRun
from loraplex.recipes.training.checkpoints import checkpoints
from loraplex.recipes.training.memory import explain, is_out_of_memory
from loraplex.recipes.training.metrics import METRICS_NAME, read_metrics
from loraplex.recipes.training.nonfinite import NonFiniteError
from loraplex.recipes.training.run import train
from loraplex.study.config import GeneralText
from loraplex.study.trials import ANALYSIS_NAME, FAILED_NAME, JOB_NAME, LOG_NAME, SCORES_NAME, TEST_NAME


def work(folder: Path, environment: dict[str, str], threads: int) -> None:
    """What a trial's process does: `main`, with its output in a file. Nothing of CUDA is alive before."""
    if hasattr(os, "setsid"):
        os.setsid()  # the terminal's Ctrl-C goes to the study alone, which passes it on once
    os.environ.update(environment)
    torch.set_num_threads(threads)
    with (folder / LOG_NAME).open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    sys.exit(main(folder))


def main(folder: Path) -> int:
    """Do what the folder's job says; returns the exit code: 0, 1 where the trial failed, 128 + signal."""
    job = read_json(folder / JOB_NAME, dict)
    run = PreparedRun(build_run(job["run"], str(folder / JOB_NAME)), resume=bool(checkpoints(folder)))
    _end_with_parent()
    quiet()
    (folder / FAILED_NAME).unlink(missing_ok=True)
    try:
        if not job["base"] and not _trained(folder):
            result = train(run)
            if result.signal is not None:
                return 128 + result.signal
        for checkpoint in checkpoints(folder):
            shutil.rmtree(checkpoint)  # the run is over, and its adapter saved
        if job["test"] and not (folder / TEST_NAME).is_file():
            _test(folder, run, job["base"], job["general_text"])
        if job["test"] and not job["base"] and not (folder / ANALYSIS_NAME).is_file():
            write_text(folder / ANALYSIS_NAME, json.dumps(_analysis(SavedAdapter(folder, run))) + "\n")
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        _write_failure(folder, run, error)
        return 1
    return 0


def _trained(folder: Path) -> bool:
    rows = read_metrics(folder / METRICS_NAME)
    return bool(rows) and rows[-1]["event"] == "end"


def _write_failure(folder: Path, run: PreparedRun, error: Exception) -> None:
    known = isinstance(error, (ValueError, OSError))
    message = explain(run, error) if is_out_of_memory(error) else str(error) if known else repr(error)
    # A run that diverged diverges again; anything else may be tried again.
    failure = {"message": message, "final": isinstance(error, NonFiniteError)}
    write_text(folder / FAILED_NAME, json.dumps(failure, indent=2, ensure_ascii=False) + "\n")
    if not known:
        raise error


def _end_with_parent() -> None:
    """Stop at a checkpoint when the study's process dies, as if it had asked."""

    def watch() -> None:
        if (study := multiprocessing.parent_process()) is not None:
            study.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _test(folder: Path, run: PreparedRun, base: bool, general_text: dict[str, Any] | None) -> None:
    """Score every test example, and write the scores first: test.json says that all is there."""
    evaluators = run.evaluators("test")
    model: Any = run.load_base() if base else SavedAdapter(folder, run).load()
    if torch.cuda.is_available():
        model.to("cuda")
    found, tensors = {}, dict[str, Tensor]()
    for name, evaluator in evaluators.items():
        scores = evaluator.scores(model, "test")
        tensors |= {f"{name}/{key}": values.contiguous() for key, values in scores.items()}
        found[name] = evaluator.summary(scores)
    report: dict[str, Any] = {"tasks": found}
    if general_text is not None:
        spec = GeneralText.model_validate(general_text)
        report["general_text"] = _loss_on_text(
            spec, model, run.tokenizer, run.config.train.max_length, evaluator.batch_size
        )
    with replaced_file(folder / SCORES_NAME) as temporary:
        write_tensors(temporary, tensors)
    write_text(folder / TEST_NAME, json.dumps(report, indent=2) + "\n")


def _analysis(adapter: SavedAdapter) -> dict[str, Any]:
    method = adapter.run.config.method
    try:
        if not is_known(adapter.folder, method):
            return Analysis(method).to_dict()
        return analyse_adapter(adapter).to_dict()
    except Exception as error:
        # The scores stand: the report says what is missing beside them.
        traceback.print_exc()
        return Analysis(method).to_dict() | {"error": f"not analysed: {error}"}


@torch.no_grad()
def _loss_on_text(spec: GeneralText, model: nn.Module, tokenizer: Any, max_length: int, batch_size: int) -> float:
    """Mean −log p per token, in nats."""
    rows = read_table(spec.path, spec.split, spec.subset)
    chosen = random.Random(0).sample(range(len(rows)), min(spec.size, len(rows)))
    texts = [str(value_of(rows[i], spec.column, f"{spec.path}, row {i + 1}")) for i in chosen]
    ids = tokenizer(texts, truncation=True, max_length=max_length, verbose=False)["input_ids"]
    answers = [[Answer(tokens, 1)] for tokens in ids if len(tokens) > 1]
    found = log_likelihoods(model, answers, tokenizer.pad_token_id, batch_size, "general text")
    return -sum(group[0] for group in found) / sum(answer.length for (answer,) in answers)
