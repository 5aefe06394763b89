"""Whole studies of the command, on tiny models."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from runs import entry

import forking
from loraplex.commands.cli import main
from loraplex.study.config import load_study
from loraplex.study.sizes import nearest_size

TARGETS = {"target_modules": ["q_proj", "v_proj"]}


def study(room: Path, folder: Path, **changes: Any) -> Path:
    """Two methods and LoRA, two rates, two seeds."""
    tree = {
        "model": str(room / "llama"),
        "tasks": {"reviews": {"data": [entry(room, test_size=20)]}},
        "methods": ["lora", "masa", "dual_lora"],
        "budget": "lora:r=3",
        "adapter": {**TARGETS, "warmup_steps": 2},
        "alpha_over_r": 2,
        "learning_rates": [1e-3, 1e-2],
        "seeds": [0, 1],
        "train": {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 2},
        "general_text": {"path": str(room / "more.jsonl"), "size": 10},
        "output_dir": str(folder / "out"),
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**tree, **changes}))
    return path


def test_a_study(room, tmp_path, capsys):
    """Search, choice, test, report; a second call runs nothing."""
    path, out = study(room, tmp_path), tmp_path / "out"
    assert main(["compare", str(path)]) == 0
    printed = capsys.readouterr()
    assert "6 runs to choose learning rates, 3 more to compare" in printed.err
    assert "report.html" in printed.out
    results = json.loads((out / "results.json").read_text())["tasks"][0]
    lines = {line["method"]: line for line in results["lines"] if line["metric"] == "accuracy"}
    assert lines.keys() == {"base", "lora", "masa", "dual_lora"}
    losses = {line["method"]: line for line in results["lines"] if line["metric"] == "loss"}
    assert losses.keys() == lines.keys()  # beside the metric that decides
    assert all(len(lines[method]["values"]) == 2 for method in ("lora", "masa", "dual_lora"))
    assert results["metric"] == "accuracy"

    # The rate is the one whose eval accuracy is best; ties go to the lower loss.
    for method, choice in results["choices"].items():
        seen = {}
        for rate in ("0.001", "0.01"):
            rows = [
                json.loads(line)
                for line in (out / "cells/reviews" / method / f"lr-{rate}/seed-0/metrics.jsonl")
                .read_text()
                .splitlines()
            ]
            (last,) = [row for row in rows if row["event"] == "eval"]
            seen[float(rate)] = (-last["accuracy"], last["loss"])
        assert choice["rate"] == min(seen, key=seen.__getitem__)
        unchosen = out / "cells/reviews" / method / f"lr-{0.011 - choice['rate']:g}"
        assert [f.name for f in unchosen.iterdir()] == ["seed-0"]
        assert not (unchosen / "seed-0/test.json").exists()  # the test part is read at the chosen rate only

    cell = out / "cells/reviews/masa" / f"lr-{results['choices']['masa']['rate']:g}" / "seed-1"
    assert {"run.yaml", "metrics.jsonl", "adapter_model.safetensors", "test.json", "output.log"} <= set(
        os.listdir(cell)
    )
    assert not list(cell.glob("checkpoint-*"))
    assert main(["eval", str(cell), "--test", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["tasks"]["reviews"]["adapted"]
    tested = json.loads((cell / "test.json").read_text())["tasks"]["reviews"]
    assert again == pytest.approx(tested)
    assert tested["accuracy"] == lines["masa"]["values"][1]
    assert tested["loss"] == pytest.approx(losses["masa"]["values"][1])

    # What the updates look like agrees with `inspect --plots`, which reads the same adapter.
    assert main(["inspect", str(cell), "--plots", str(tmp_path / "plots"), "--with-data", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)["analysis"]
    (_, masa) = results["insides"]["masa"]
    assert masa["effective_rank"] == pytest.approx(fmean(s["effective_rank"] for s in seen["spectra"]))
    assert masa["first"] == pytest.approx(fmean(s["share_of_first"] for s in seen["spectra"]))
    assert masa["cumulative"][-1] == pytest.approx(1)
    gates = seen["expert_use"]["reviews"]
    assert masa["measures"]["largest gate, reviews"] == pytest.approx(fmean(map(max, gates.values())))
    assert masa["measures"].keys() == {"similarity of experts", "largest gate, reviews"}
    assert all(0 < dual["measures"]["closed gates, %"] < 1 for dual in results["insides"]["dual_lora"])
    assert all(1 <= lora["effective_rank"] <= 3 for lora in results["insides"]["lora"])

    # LoRA of r=3 is its own budget; the others come as near as their rank allows.
    costs = results["costs"]
    assert costs["lora"]["excess"] == 0
    assert costs["lora"]["parameters"] == 4 * 3 * (32 + 32 + 32 + 16)
    assert abs(costs["dual_lora"]["excess"]) <= 4 * (32 + 32 + 32 + 16) / 2
    assert costs["masa"]["perplexity"] > 1
    assert costs["masa"]["file_bytes"] == (cell / "adapter_model.safetensors").stat().st_size
    assert results["settings"]["masa"]["lora_alpha"] == 2 * results["settings"]["masa"]["r"]

    html = (out / "report.html").read_text()
    assert html.count("<svg") == 5
    assert not re.search(r'(src|href)="(?!#)|<script|@import|url\((?!#)', html)  # nothing from outside the page
    report = (out / "report.md").read_text()
    assert "| base model | " in report
    assert "### What the updates look like" in report
    with (out / "results.csv").open() as file:
        assert {row["method"] for row in csv.DictReader(file)} == lines.keys()

    stamp = {file: file.stat().st_mtime_ns for file in out.rglob("adapter_model.safetensors")}
    assert main(["compare", str(path)]) == 0
    assert {file: file.stat().st_mtime_ns for file in out.rglob("adapter_model.safetensors")} == stamp

    # A cell begun before a key existed has that key's default.
    begun = cell / "run.yaml"
    text = begun.read_text()
    assert "  chat: true\n" in text
    begun.write_text(text.replace("  chat: true\n", ""))
    assert main(["compare", str(path), "--report"]) == 0

    assert main(["compare", str(path), "--adapter.warmup_steps", "3"]) == 2
    assert "begun with another adapter" in capsys.readouterr().err


CELL = Path("out/cells/reviews/lora/lr-0.001/seed-0")


def started(room: Path, folder: Path, train: dict[str, int], *more: str) -> tuple[list[str], BaseProcess]:
    """The command on a study of LoRA alone, and a process of its own that runs it."""
    path = study(room, folder, methods=["lora"], adapter=TARGETS, learning_rates=[1e-3], train=train)
    command = ["compare", str(path), "--seeds", "[0]", *more]
    return command, forking.start(main, command, out=folder / "out.txt", err=folder / "err.txt")


def test_killed_and_continued(room, tmp_path):
    """kill -9 of the study while a cell trains: the cell stops by itself, and the next call goes on from there."""
    cell = tmp_path / CELL
    command, process = started(room, tmp_path, {"max_steps": 150, "save_steps": 10})
    until(lambda: any((p / "files.json").exists() for p in cell.glob("checkpoint-*")))
    process.kill()
    process.join(60)
    until(lambda: not (cell / ".lock").exists())
    rows = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
    assert 0 < rows[-1]["step"] < 150
    assert main(command) == 0
    assert "continuing from" in (cell / "output.log").read_text()
    assert (cell / "test.json").is_file()


def test_a_signal_stops_at_a_checkpoint(room, tmp_path):
    """SIGTERM: the running cell saves, the command says how to go on."""
    cell = tmp_path / CELL
    train = {"max_steps": 4000, "save_steps": 4000}
    _, process = started(room, tmp_path, train, "--train.logging_steps", "1")
    until(lambda: (cell / "metrics.jsonl").exists() and (cell / "metrics.jsonl").read_text().count("\n") > 3)
    os.kill(process.pid, signal.SIGTERM)
    process.join(120)
    err = (tmp_path / "err.txt").read_text()
    assert process.exitcode == 130, err
    assert re.search(r"continue with: loraplex compare \S+study.yaml --seeds '\[0\]' --train.logging_steps 1\n", err)
    assert list(cell.glob("checkpoint-*"))


def until(condition: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_cell_that_fails_does_not_end_the_study(room, tmp_path, capsys):
    """A diverging rate is out; a method that can't be trained is named; the rest is compared."""
    path = study(
        room, tmp_path, methods={"lora": None, "rslora": {"method": "lora", "adapter": {"use_rslora": True}}},
        adapter=TARGETS, learning_rates=[1e-3, 1e30], general_text=None, seeds=[0],
    )  # fmt: skip
    assert main(["compare", str(path), "--jobs", "2"]) == 0
    printed = capsys.readouterr()
    assert "failed: reviews: lora, learning rate 1e+30, seed 0: " in printed.err
    results = json.loads((tmp_path / "out/results.json").read_text())["tasks"][0]
    assert results["choices"]["rslora"]["tried"]["1e+30"] is None
    assert results["choices"]["rslora"]["rate"] == 1e-3
    log = tmp_path / "out/cells/reviews/lora/lr-1e+30/seed-0/failed.json"
    written = log.stat().st_mtime_ns
    assert json.loads(log.read_text())["final"]
    assert main(["compare", str(path), "--report"]) == 0
    assert main(["compare", str(path)]) == 0
    assert log.stat().st_mtime_ns == written  # it would diverge again
    # With another configuration it is a new run.
    assert main(["compare", str(path), "--train.weight_decay", "0.1"]) == 2
    assert "begun with another train" in capsys.readouterr().err
    for folder in (tmp_path / "out/cells/reviews").glob("*/lr-0.001"):
        shutil.rmtree(folder)
    assert main(["compare", str(path), "--train.weight_decay", "0.1"]) == 0
    assert log.stat().st_mtime_ns != written


def test_a_classifier_and_another_of_pefts_methods(room, tmp_path):
    """No base model, F1; LoHa's rank follows the budget, and the head is in every count."""
    data = [{"path": str(room / "reviews.jsonl"), "eval_size": 16, "test_size": 20}]
    path = study(
        room, tmp_path, model=str(room / "bert"), task="classification", tasks={"reviews": data},
        methods={"lora": None, "loha": {"adapter": {"alpha": 4}}}, adapter={"target_modules": ["query", "value"]},
        learning_rates=[1e-3], general_text=None, metric="f1",
    )  # fmt: skip
    assert main(["compare", str(path)]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())["tasks"][0]
    assert {line["method"] for line in results["lines"]} == {"lora", "loha"}
    assert results["metric"] == "f1"
    # A pair of factors for each of LoHa's two products: r = 1 and r = 2 are as far off.
    assert results["settings"]["loha"] == {"target_modules": ["query", "value"], "alpha": 4, "r": 1}
    assert results["costs"]["loha"]["excess"] == -4 * (32 + 32)
    # Its updates are none that we know; no failure is made of that.
    assert not list((tmp_path / "out").rglob("failed.json"))
    assert [inside["effective_rank"] for inside in results["insides"]["loha"]] == [None, None]
    assert [inside["notes"] for inside in results["insides"]["loha"]] == [[], []]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "dora"}, "reference is 'dora', but methods has only lora, masa, dual_lora"),
        ({"methods": {"base": {"method": "lora"}, "lora": None}}, "'base' is the unadapted model's name"),
        ({"methods": {"lora": {"learning_rates": [1e-3]}}}, "has 1 learning rates, the study 2"),
        ({"methods": ["lora", "qlora"]}, "method is 'qlora'"),
        ({"methods": {"lora": None, "x": {"method": "no.such:Config"}}}, "but there is no module no"),
        ({"methods": {"lora": None, "x": {"method": "peft:PeftConfig"}}}, "PEFT does not know it"),
        ({"methods": {"lora": None, "x": {"method": "peft:Nope"}}}, "peft has no PeftConfig of the name 'Nope'"),
        ({"seeds": [0, 0]}, "each may stand here once"),
        ({"train": {"seed": 3}}, "train.seed can't be set in a study: use seeds"),
        ({"train": {"max_stepz": 3}}, "max_stepz"),
        ({"budget": "lora"}, "budget lora: give a number"),
        ({"budget": "lora:s=3"}, "adapter.s"),
        ({"learning_rate": 1e-3}, "did you mean 'learning_rates'"),
        ({"adapter": {"rank": 3}}, "adapter.rank: no method of the study has this field"),
        ({"methods": ["lora"], "adapter": {"target_modules": ["nope"]}}, "budget lora:r=3: Target modules"),
    ],
)
def test_wrong_studies(room, tmp_path, capsys, changes, message):
    """Each is refused before anything is written, with the value and the remedy."""
    path = study(room, tmp_path, **changes)
    assert main(["compare", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_data_without_a_test_part(room, tmp_path, capsys):
    """Comparing on what rates were chosen by would be no comparison."""
    path = study(room, tmp_path, tasks={"reviews": {"data": [entry(room)]}})
    assert main(["compare", str(path)]) == 2
    assert "has no test part, and methods are compared on it: set test_size" in capsys.readouterr().err


def test_dry_run(room, tmp_path, capsys):
    """Methods, settings, number of runs; nothing is written."""
    assert main(["compare", str(study(room, tmp_path)), "--dry-run"]) == 0
    printed = capsys.readouterr().err
    assert "6 runs to choose learning rates, 3 more to compare" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("target", "expected"), [(100, 10), (104, 10), (105, 10), (106, 11), (1, 1), (5000, 500)])
def test_nearest_size(target, expected):
    """Ten parameters for each step; ties go to the smaller size."""
    for first in (1, 3, 64, 900):
        assert nearest_size(lambda size: 10 * size, target, first) == expected


def test_a_size_that_is_never_reached():
    with pytest.raises(ValueError, match="7 parameters, whatever the size"):
        nearest_size(lambda size: 7, 100, 4)
    with pytest.raises(ValueError, match="fewer than 100"):
        nearest_size(lambda size: min(size, 50), 100, 4)


def test_sizes_below_the_smallest_are_passed_over():
    """A method that needs two ranks is not refused because one was tried."""

    def parameters(size: int) -> int:
        if size < 5:
            raise ValueError("r must be at least 5")
        return 10 * size

    for first in (5, 6, 40):
        assert nearest_size(parameters, 12, first) == 5
        assert nearest_size(parameters, 66, first) == 7


def test_studies_in_the_repository():
    """They parse, and name methods that exist."""
    for path in Path(__file__).parents[2].glob("configs/studies/*.yaml"):
        assert len(load_study(path).seeds) >= 5, path
