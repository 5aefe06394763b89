"""HTML, Markdown and the terminal show the same sections, and names in them are text."""

from __future__ import annotations

import html
import json
from dataclasses import asdict

import pytest

from loraplex.study.choice import Choice
from loraplex.study.config import StudyConfig
from loraplex.study.page import page
from loraplex.study.report import markdown
from loraplex.study.results import ALL, Cost, Line, TaskResult
from loraplex.study.sections import sections
from loraplex.study.statistics import Difference
from loraplex.study.terminal import print_results
from loraplex.study.update_summary import UpdateSummary

HOSTILE = "<script>alert(1)</script>|\n# x"


@pytest.fixture
def study() -> StudyConfig:
    tree = {
        "title": HOSTILE,
        "model": "m",
        "tasks": {"reviews": {"data": [{"path": "a"}]}},
        "methods": ["lora", "masa"],
        "learning_rates": [1e-3],
        "seeds": [0, 1],
        "output_dir": "o",
    }
    return StudyConfig.model_validate(tree)


@pytest.fixture
def result() -> TaskResult:
    """Two data sets and two metrics; one trial failed and one has not run."""
    found = TaskResult("reviews", "accuracy", ["x", HOSTILE], others=["loss"])
    for method, difference in (("base", None), ("lora", None), ("masa", Difference(0.1, 0.05, 0.2, 2, 2))):
        found.lines += [
            Line(method, data, metric, [0, 1], [0.5, 0.6], 0.55, 0.07, difference)
            for data in ("x", HOSTILE, ALL)
            for metric in ("accuracy", "loss")
        ]
        found.costs[method] = Cost(100, 1, 2000, 3000, 0.1, 12.0, 0.3)
    found.choices = {"lora": Choice(1e-3, {1e-3: 0.5}, "accuracy")}
    found.settings = {"lora": {"r": 8}, "masa": {"r": 4}}
    found.updates = {"lora": [UpdateSummary(3.0, 0.5, 0.9, 1.2, [0.5, 1.0], {}, [HOSTILE])]}
    found.failures, found.missing = [("reviews: lora", HOSTILE)], ["reviews: masa, seed 3"]
    return found


def words(text: str) -> str:
    """A text on one line, as all three show it, without the marks of a format."""
    return " ".join(text.split())


def test_all_formats_show_the_same(study, result, capsys):
    found = sections(study, [result], figures=True)
    titles = [section.title for section in found]
    assert titles[:4] == ["", "Mean of the data sets", "x", HOSTILE]
    assert titles[4:] == [
        "Beside it: loss, mean of the data sets", "Cost", "What the updates look like", "Figures", "What is missing",
    ]  # fmt: skip
    md, web = markdown(study, found), page(study, found, {"python": "3"})
    print_results(study, [result])
    printed = words(capsys.readouterr().out)
    plain, shown = words(html.unescape(web)), words(md.replace("\\|", "|").replace("&lt;", "<"))
    for section in found:
        assert all(words(section.title) in text for text in (plain, shown) if section.title != "Figures")
        for line in section.lines:
            assert words(line) in plain
            assert words(line.split("\n")[0]) in shown
            assert words(line.split("\n")[0]) in printed
        head, rows = section.table or ([], [])
        for cell in [*head, *(cell for row in rows for cell in row)]:
            assert all(words(cell) in text for text in (plain, shown, printed)), cell
    assert web.count("<svg") == len(found[-2].figures) >= 2
    assert "<svg" not in md


def test_names_are_text(study, result):
    found = sections(study, [result], figures=True)
    assert "<script" not in page(study, found, {"python": HOSTILE})
    text = markdown(study, found)
    assert "<script" not in text
    assert "\n# x" not in text


def test_keys_of_results_stay(result):
    """Saved results are read by what people wrote for them."""
    plain = json.loads(json.dumps(result.to_dict()))
    assert list(plain) == [
        "task", "metric", "data", "lines", "costs", "choices", "settings", "curves", "insides", "others", "failures",
        "missing",
    ]  # fmt: skip
    assert plain["insides"]["lora"] == [asdict(summary) for summary in result.updates["lora"]]
