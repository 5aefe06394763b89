"""The report as one page of HTML with everything in it: no script, no other file, nothing from the network."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment

from loraplex.study.config import StudyConfig, to_yaml
from loraplex.study.sections import Section, setup

EXPLAINED = (
    "Every method had the same number of learning rates to try. The rate was chosen on the eval parts with the seeds "
    "of the search; the test parts were read once, by the runs at the chosen rate.",
    "± is the standard deviation over seeds. The interval of a difference is d ± t · √(s²/S + v): s² is the variance "
    "of the difference between the S seeds, v the variance of a paired bootstrap over test examples, t a Student "
    "quantile with Satterthwaite's degrees of freedom. “Wins” counts seeds. A verdict is given only where the "
    "interval leaves zero out.",
    "What the updates look like: means over the adapted modules. Effective rank is exp(−Σ p log p) with p = σ / Σ σ. "
    "A gate is closed where B A ≤ 0; negative signs are a share of the open gates. Similarity of experts is linear CKA "
    "without centring; the largest gate is that of the expert a module uses most, on average over tokens; separation "
    "of data sets is half of Σ |g − g'| between their mean gates.",
    "Peak memory is that of the process on a CPU and of the accelerator elsewhere; s/step is the median of a training "
    "step without evaluation and saving.",
)


def page(study: StudyConfig, found: list[Section], made: dict[str, Any]) -> str:
    """The page's text. Names and messages may come from anywhere: the template escapes all but our own figures.

    Args:
        study: what was compared.
        found: its sections, with their figures.
        made: the versions of what made it.
    """
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8")
    )
    text: str = template.render(
        study=study,
        setup=setup(study),
        sections=found,
        explained=EXPLAINED,
        yaml=to_yaml(study),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        made=", ".join(f"{name} {version}" for name, version in made.items()),
    )
    return text
