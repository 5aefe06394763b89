"""A study from its configuration to its report: search, choose, train, test; each trial in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from loraplex.io.files import write_text
from loraplex.recipes.config.arguments import training_arguments
from loraplex.recipes.config.run_config import ConfigError, RunConfig, build_run
from loraplex.recipes.models.loading import load_skeleton
from loraplex.recipes.prepare import PreparedRun
from loraplex.recipes.progress import note, progress
from loraplex.recipes.training.lock import locked
from loraplex.recipes.training.metrics import METRICS_NAME, read_metrics
from loraplex.recipes.training.result import VERSIONS_NAME, versions
from loraplex.study.choice import Choice, choose
from loraplex.study.config import StudyConfig, to_yaml
from loraplex.study.sizes import Sized, solve
from loraplex.study.trials import JOB_NAME, LOG_NAME, TEST_NAME, Folder, Trial, run_config, searched
from loraplex.study.worker import work

STUDY_NAME = "study.yaml"
SIZES_NAME = "sizes.json"
_POLL = 0.2
"""Seconds after which a signal is answered while all processes run on."""

# A server that has imported everything and done nothing else forks a process per trial: importing takes longer than
# training a small one. Where there is no fork, each imports for itself.
_processes: Any = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
if _processes.get_start_method() == "forkserver":
    _processes.set_forkserver_preload(["loraplex.study.worker"])


@dataclass
class State:
    """What a study has come to."""

    study: StudyConfig
    sizes: dict[str, dict[str, Sized]]
    """Task → method → settings."""
    choices: dict[tuple[str, str], Choice] = field(default_factory=dict)
    """(task, method) → its learning rate; left out where every try failed, or the search is not done."""
    stopped: bool = False
    """Whether a signal ended it early."""

    @property
    def chosen(self) -> list[Trial]:
        """The trials that the report is about: the base model of each task, and each method at its rate."""
        study = self.study
        bases = [Trial(task) for task in study.tasks] if study.task == "sft" else []
        return bases + [
            Trial(task, method, choice.rate, seed)
            for (task, method), choice in self.choices.items()
            for seed in study.seeds
        ]

    @property
    def possible(self) -> list[Trial]:
        """Every training run that the study may come to."""
        study = self.study
        return [
            Trial(task, method, rate, seed)
            for task in study.tasks
            for method in study.methods
            for rate in study.rates(method)
            for seed in dict.fromkeys([*study.searched, *study.seeds])
        ]

    def folder(self, trial: Trial) -> Folder:
        """Where a trial is."""
        return Folder(self.study, trial)

    def run_config(self, trial: Trial) -> RunConfig:
        """What a trial trains."""
        return run_config(self.study, trial, None if trial.is_base else self.sizes[trial.task][trial.method])

    def changed(self, trial: Trial) -> list[str]:
        """The keys in which the trial's run differs from how its folder was begun."""
        tree = self.folder(trial).started_as()
        if tree is None:
            return []
        # Read as a run: keys that came with a later version have their defaults.
        begun = build_run(tree, str(self.folder(trial).path)).model_dump(mode="json")
        now = self.run_config(trial).model_dump(mode="json")
        return [key for key in now if key != "output_dir" and begun[key] != now[key]]


def prepare(study: StudyConfig) -> State:
    """Read the data once, solve the settings and check every trial, before anything is written.

    Raises:
        ConfigError: something in the study is wrong, or differs from how its trials were begun.
    """
    sizes: dict[str, dict[str, Sized]] = {}
    for task in study.tasks:
        run = run_config(study, Trial(task), None)
        labels = _check_data(run, task)
        if labels is None and sizes:  # the same model for every task; a classifier's head follows the task
            sizes[task] = next(iter(sizes.values()))
        else:
            sizes[task] = solve(study, load_skeleton(study.model, study.task, label_names=labels, **study.source))
    state = State(study, sizes)
    for trial in state.possible:
        training_arguments(state.run_config(trial))
        changed = state.changed(trial)
        if changed and state.folder(trial).failure is None:
            raise ConfigError(
                f"{state.folder(trial).path} was begun with another {', '.join(changed)}: give the changed study "
                "another output_dir, or delete the trials that it changes."
            )
    return state


def _check_data(run: RunConfig, task: str) -> list[str] | None:
    """Names of a classifier's classes, once every data set is seen to have what a study needs."""
    prepared = PreparedRun(run)
    for found in prepared.tasks:
        for part in ("eval", "test"):
            if getattr(found, part) is None:
                what = "learning rates are chosen on it" if part == "eval" else "methods are compared on it"
                raise ConfigError(
                    f"tasks.{task}: data set {found.name!r} has no {part} part, and {what}: set {part}_size."
                )
    return prepared.class_names


def run_study(state: State, jobs: int | None = None) -> State:
    """Run what is left to run; a finished trial is never run again, a failed one that may succeed is.

    Args:
        state: of `prepare`.
        jobs: trials at a time; None: one per GPU, or one.
    """
    study, folder = state.study, Path(state.study.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder), _Runner(state, jobs).signals() as runner:
        write_text(folder / STUDY_NAME, to_yaml(study))
        write_text(folder / VERSIONS_NAME, json.dumps(versions(), indent=2) + "\n")
        write_text(folder / SIZES_NAME, json.dumps(_plain(state.sizes), indent=2) + "\n")
        for trial in state.possible:
            if state.changed(trial):  # it failed, and its remedy was another configuration
                shutil.rmtree(state.folder(trial).path)
        runner.run(list(searched(study)), "search")
        state.choices = choose_rates(state)
        runner.run(state.chosen, "final", test=True)
        state.stopped = runner.signal is not None
    return state


def choose_rates(state: State) -> dict[tuple[str, str], Choice]:
    """Each method's learning rate for each task, where the search has come far enough."""
    study, found = state.study, {}
    for task in study.tasks:
        for method in study.methods:
            tries = {
                rate: [state.folder(Trial(task, method, rate, seed)) for seed in study.searched]
                for rate in study.rates(method)
            }
            if (choice := choose(tries, study.metric)) is not None:
                found[task, method] = choice
    return found


def _plain(sizes: dict[str, dict[str, Sized]]) -> dict[str, Any]:
    return {task: {method: asdict(sized) for method, sized in found.items()} for task, found in sizes.items()}


class _Runner:
    """Processes for trials, as many at a time as there is room for."""

    def __init__(self, state: State, jobs: int | None) -> None:
        self.state = state
        gpus = torch.cuda.device_count()
        self.slots = [str(i % gpus) if gpus else "" for i in range(jobs or gpus or 1)]
        self.threads = max(1, torch.get_num_threads() // (1 if gpus else len(self.slots)))
        self.signal: int | None = None

    @contextmanager
    def signals(self) -> Iterator[_Runner]:
        """Pass Ctrl-C and SIGTERM on to the trials, which then save a checkpoint and end."""
        before = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def run(self, trials: Sequence[Trial], phase: str, test: bool = False) -> None:
        """Run the trials of these that are not done; their output goes to files beside them."""
        waiting = [trial for trial in trials if not self._done(trial, test)]
        running: dict[BaseProcess, tuple[Trial, str]] = {}
        free, told, shown = list(self.slots), False, 0.0
        bar = progress(phase, len(trials), "trial", leave=True, delay=0.0, initial=len(trials) - len(waiting))
        with bar:
            while running or (waiting and self.signal is None):
                while free and waiting and self.signal is None:
                    slot, trial = free.pop(0), waiting.pop(0)
                    running[self._start(trial, slot, test)] = trial, slot
                wait([process.sentinel for process in running], timeout=_POLL)
                if self.signal is not None and not told:
                    told = True
                    note("\nstopping: running trials save a checkpoint (once more: stop at once)")
                    for process in running:
                        process.terminate()
                for process in [p for p in running if p.exitcode is not None]:
                    trial, slot = running.pop(process)
                    free.append(slot)
                    bar.update(self._done(trial, test))
                    self._report(trial, process.exitcode or 0, bar)
                if sys.stderr.isatty() and time.monotonic() > shown + 1:
                    shown = time.monotonic()
                    bar.set_postfix_str("; ".join(self._position(trial) for trial, _ in running.values()))

    def _done(self, trial: Trial, test: bool) -> bool:
        folder = self.state.folder(trial)
        if folder.failure is not None:
            return bool(folder.failure["final"])
        if test and (folder.test is None or not (trial.is_base or folder.analysed)):
            return False
        return trial.is_base or folder.outcome is not None

    def _start(self, trial: Trial, slot: str, test: bool) -> BaseProcess:
        study, folder = self.state.study, self.state.folder(trial)
        folder.path.mkdir(parents=True, exist_ok=True)
        text = study.general_text
        job = {
            "run": self.state.run_config(trial).model_dump(mode="json"),
            "base": trial.is_base,
            "test": test,
            "general_text": None if text is None else text.model_dump(),
        }
        write_text(folder.path / JOB_NAME, json.dumps(job, indent=2) + "\n")
        environment = {}
        if slot:
            devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = devices[int(slot)] if devices != [""] else slot
        process = _processes.Process(target=work, args=(folder.path, environment, self.threads))
        process.start()
        return process

    def _report(self, trial: Trial, code: int, bar: tqdm[Any]) -> None:
        folder = self.state.folder(trial)
        if code == 0:
            if not sys.stderr.isatty():
                bar.write(f"done: {trial}", file=sys.stderr)
        elif self.signal is None:
            message = (folder.failure or {"message": f"ended with code {code}"})["message"]
            bar.write(f"failed: {trial}: {message.splitlines()[0]} (see {folder.path / LOG_NAME})", file=sys.stderr)

    def _position(self, trial: Trial) -> str:
        folder = self.state.folder(trial)
        rows = read_metrics(folder.path / METRICS_NAME)
        if trial.is_base or (rows and rows[-1]["event"] == "end"):
            step = "test" if not (folder.path / TEST_NAME).is_file() else "done"
        else:
            step = f"step {rows[-1]['step']}" if rows else "starting"
        return f"{trial.method} {trial.rate:g} seed {trial.seed} {step}" if not trial.is_base else f"base {step}"
