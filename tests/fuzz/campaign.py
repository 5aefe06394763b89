"""Cases in worker processes: a crash, a hang or a greedy allocation is a finding like any other."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.fuzz import commands, configs, data, interrupts, loading, texts
from tests.fuzz.draw import Draw
from tests.fuzz.mutants import MUTANTS
from tests.fuzz.room import Room
from tests.fuzz.verdict import Result
from tests.fuzz.watch import Watch, limit_memory

KINDS: dict[str, tuple[int, Callable[[Draw, Room, Path, Watch], Result]]] = {
    "adapter": (8, loading.run),
    "config": (2, configs.run),
    "yaml": (3, texts.run),
    "data": (2, data.run),
    "cli": (4, commands.run),
    "interrupt": (1, interrupts.run),
}
"""Kind → how many of twenty cases, and what runs one."""
HANGS = 120.0
"""Seconds by the clock after which a worker is killed."""


def kind_of(index: int) -> str:
    """Which kind the case of this index is."""
    cycle = [kind for kind, (share, _) in KINDS.items() for _ in range(share)]
    return cycle[index % len(cycle)]


def run_case(seed: int, index: int, room: Room, place: Path, watch: Watch) -> Result:
    """One case in the empty folder `place`, which is the working directory meanwhile."""
    kind = kind_of(index)
    start = time.process_time()
    os.chdir(place)
    try:
        result = KINDS[kind][1](Draw(seed, index), room, place, watch)
    finally:
        os.chdir(room.folder)
    result.seconds = time.process_time() - start
    return result


_STATE = ("outcomes", "findings", "done", "cpu", "seconds")


@dataclass
class Campaign:
    """Cases of one seed, and what they found."""

    seed: int
    room: Room
    out: Path | None = None
    """Where findings are kept, each in a folder of its own; None keeps none."""
    prepare: Callable[[], Any] | None = None
    """Called once in each worker: a mutant of the package for the self-check."""
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[str, int] = field(default_factory=dict)
    """Signature → index of the first case."""
    done: int = 0
    cpu: float = 0.0
    seconds: float = 0.0
    """By the clock."""

    def run(self, indices: Iterable[int], jobs: int = 1, enough: Callable[[], bool] = lambda: False) -> None:
        """Run these cases, until there is `enough`."""
        pending, start = iter(indices), time.monotonic()
        workers = [_Worker(self) for _ in range(jobs)]
        try:
            busy = [worker for worker in workers if worker.give(pending)]
            while busy:
                ready = wait([worker.pipe for worker in busy], timeout=5)
                for worker in list(busy):
                    if worker.pipe in ready:
                        self._take(worker.index, worker.receive())
                    elif time.monotonic() - worker.since > HANGS:
                        self._take(worker.index, worker.killed("hangs"))
                    else:
                        continue
                    if enough() or not worker.give(pending):
                        busy.remove(worker)
        finally:
            for worker in workers:
                worker.close()
            self.seconds += time.monotonic() - start

    def save(self) -> None:
        """Note how far the campaign has come, so that `resume` can go on."""
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            state = {name: getattr(self, name) for name in _STATE}
            self._progress.write_text(json.dumps(state, indent=2), encoding="utf-8")

    def resume(self) -> None:
        """Go on where an earlier process with the same `out` and seed stopped."""
        if self.out is not None and self._progress.is_file():
            state = json.loads(self._progress.read_text(encoding="utf-8"))
            for name in _STATE:
                setattr(self, name, state[name])
            self.outcomes = Counter(self.outcomes)

    @property
    def _progress(self) -> Path:
        return (self.out or Path()) / f"progress-{self.seed}.json"

    def summary(self) -> str:
        """Counts, for people."""
        lines = [f"seed {self.seed}: {self.done} cases in {self.seconds:.0f} s ({self.cpu:.0f} s of CPU)"]
        lines += [f"  {count:7d}  {name}" for name, count in sorted(self.outcomes.items())]
        return "\n".join([*lines, f"{len(self.findings)} different findings"])

    def _take(self, index: int, found: dict[str, Any]) -> None:
        self.done += 1
        self.cpu += found["seconds"]
        self.outcomes[f"{found['kind']}: {found['outcome']}"] += 1
        if found["problems"]:
            self.outcomes["findings"] += 1
            if found["signature"] not in self.findings:
                self.findings[found["signature"]] = index
                self._keep(index, found)

    def _keep(self, index: int, found: dict[str, Any]) -> None:
        if self.prepare is None:
            print(line_of(self.seed, index, found), flush=True)
        if self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        folder = self.out / f"{self.seed}-{index}"
        if found.get("place") and Path(found["place"]).is_dir():
            shutil.copytree(found["place"], folder, dirs_exist_ok=True, symlinks=True)
        folder.mkdir(exist_ok=True)
        folder.joinpath("case.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
        with self.out.joinpath("findings.txt").open("a", encoding="utf-8") as file:
            file.write(line_of(self.seed, index, found) + "\n")


def missed_mutants(clean: Campaign, indices: list[int]) -> list[str]:
    """The mutants that these cases do not find; what `clean` found without a mutant does not count."""
    missed = []
    for name, (kind, mutate) in MUTANTS.items():
        campaign = Campaign(clean.seed, clean.room, prepare=mutate)
        fresh = partial(_news, campaign, clean)
        campaign.run((index for index in indices if kind_of(index) == kind), enough=lambda fresh=fresh: bool(fresh()))
        print(f"  {campaign.done:4d} cases  {name}: {next(iter(fresh()), 'NOT FOUND')[:90]}", flush=True)
        missed += [] if fresh() else [name]
    return missed


def _news(campaign: Campaign, clean: Campaign) -> list[str]:
    return [signature for signature in campaign.findings if signature not in clean.findings]


def line_of(seed: int, index: int, found: dict[str, Any]) -> str:
    """One finding in one line."""
    problem = ascii("; ".join(found["problems"]))[1:300]
    return (
        f"{seed}:{index} {found['path']}: {problem} [{found['where']}] ({ascii(' | '.join(found['mutations']))[1:400]})"
    )


class _Worker:
    """A forked process that runs one case after another."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign = campaign
        self.index, self.since = -1, 0.0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.campaign, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, pending: Iterator[int]) -> bool:
        """Send the next case; False if there is none."""
        index = next(pending, None)
        if index is None:
            return False
        self.index, self.since = index, time.monotonic()
        self.pipe.send(index)
        return True

    def receive(self) -> dict[str, Any]:
        """The result, or what the process died of."""
        try:
            found: dict[str, Any] = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return self.killed(f"the process ended with {self.process.exitcode}")
        return found

    def killed(self, why: str) -> dict[str, Any]:
        """End the process, start another, and say so in place of a result."""
        self.close()
        self._start()
        kind = kind_of(self.index)
        result = Result(kind, "?", "died", [why])
        return {**vars(result), "signature": f"{kind}|{why}"}

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(ProcessLookupError):
            if self.process.pid is not None and self.process.is_alive():
                os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.pipe.close()


def _serve(campaign: Campaign, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if campaign.prepare is not None:
        campaign.prepare()
    home = Path(tempfile.mkdtemp(prefix="case-", dir=campaign.room.folder))
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    sys.stderr = sys.stdout
    limit_memory()
    watch = Watch()
    while True:
        try:
            index = pipe.recv()
        except EOFError:
            return
        place = home / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            result = run_case(campaign.seed, index, campaign.room, place, watch)
        except BaseException as error:  # the fuzzer's own mistake must not pass for a crash
            import traceback

            result = Result(kind_of(index), "fuzzer", "broken", [f"fuzzer: {traceback.format_exc()[-1500:]}"])
            result.where = type(error).__name__
        pipe.send({**vars(result), "signature": result.signature, "place": str(place)})
