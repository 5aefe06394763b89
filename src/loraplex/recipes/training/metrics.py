"""What a run writes down: `metrics.jsonl`, one object per event, and `loss.png`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loraplex.io.field_types import shown
from loraplex.io.files import replaced_file, write_text
from loraplex.io.reading import parse_json

METRICS_NAME = "metrics.jsonl"
PLOT_NAME = "loss.png"

Row = dict[str, Any]


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics file; a last line that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    data = path.read_bytes()  # whose last line may end within a character
    whole = data[: data.rfind(b"\n") + 1]
    return [_row(line, f"{path}, line {number}") for number, line in enumerate(whole.splitlines(), start=1)]


def _row(line: bytes, where: str) -> Row:
    """One event; its step and kind are there, and an evaluation's task."""
    remedy = "delete the line or the file"
    try:
        row = parse_json(line.decode("utf-8"), where, remedy)
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not UTF-8 text: {remedy}.") from None
    known = isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("event"), str)
    if not known or (row["event"] == "eval" and not isinstance(row.get("task"), str)):
        raise ValueError(f"{where} is {shown(row)}, no event of a run: {remedy}.")
    return dict(row)


class MetricsLog:
    """Rows of a run, appended as they happen: `{"step": 10, "event": "train", "loss": …}`.

    Events: `train` (one row per logged step), `eval` (one per task and evaluation), `end`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._known: set[tuple[Any, ...]] = set()

    def start(self, resumed_step: int | None) -> None:
        """Begin a new file, or keep the rows up to the step that training resumes from."""
        kept = [] if resumed_step is None else read_metrics(self.path)
        self.rows = [row for row in kept if row["event"] != "end" and row["step"] <= (resumed_step or 0)]
        self._known = {_key(row) for row in self.rows}
        write_text(self.path, "".join(_line(row) for row in self.rows))

    def add(self, event: str, step: int, values: Row) -> None:
        """Append one row, unless the same event of the same step is there already."""
        row = {"step": step, "event": event, **{key: _plain(value) for key, value in values.items()}}
        if _key(row) in self._known:
            return
        self._known.add(_key(row))
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def evaluations(self, step: int) -> dict[str, Row]:
        """task → metrics of the evaluation at `step`."""
        rows = [row for row in self.rows if row["event"] == "eval" and row["step"] == step]
        return {row["task"]: {k: v for k, v in row.items() if k not in ("step", "event", "task")} for row in rows}


def _key(row: Row) -> tuple[Any, ...]:
    return row["step"], row["event"], row.get("task")


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    # JSON has no NaN: a loss that ran away is written as null.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot_losses(rows: Iterable[Row], path: Path, title: str) -> None:
    """Draw the training loss and each task's evaluation loss, told apart without colour."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # a name may hold a $
        _plot_losses(rows, path, title)


def _plot_losses(rows: Iterable[Row], path: Path, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(rows)
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: nothing global, no display needed
    axes = figure.subplots()
    train = [(r["step"], r["loss"]) for r in rows if r["event"] == "train" and r.get("loss") is not None]
    if train:
        steps, losses = zip(*train, strict=True)
        window = len(losses) / 20
        axes.plot(steps, losses, color="0.75" if window > 2 else "0.35", linewidth=1.0, label="training")
        if window > 2:
            axes.plot(steps, smooth(losses, window), color="0.35", linewidth=1.8, label="training, smoothed")
    tasks = list(dict.fromkeys(r["task"] for r in rows if r["event"] == "eval"))
    for task, marker, dashes in zip(tasks, "osD^vP*X", ["--", "-.", ":", (0, (5, 1))] * 2, strict=False):
        points = [(r["step"], r["loss"]) for r in rows if r["event"] == "eval" and r["task"] == task]
        points = [point for point in points if point[1] is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True), color="black", linestyle=dashes, marker=marker, markersize=5,
                markerfacecolor="white", linewidth=1.2, label=f"evaluation, {task}",
            )  # fmt: skip
    axes.set(xlabel="step", ylabel="loss (nats)", title=title)
    axes.grid(color="0.9", linewidth=0.6)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small")
    with replaced_file(path) as temporary:
        figure.savefig(temporary, format="png")


def smooth(values: Iterable[float], window: float) -> list[float]:
    """Exponential running mean over about `window` values, corrected for its start."""
    import pandas as pd  # only what draws waits for its import

    return list(pd.Series(list(values), dtype=float).ewm(alpha=1 / window).mean())
