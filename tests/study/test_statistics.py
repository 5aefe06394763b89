"""Differences between methods and how sure they are, against cases worked out by hand and against simulation."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from loraplex.recipes.evaluation import macro_f1
from loraplex.study.statistics import Difference, difference_of, value


def answers(*correct: int) -> dict[str, torch.Tensor]:
    return {"nll": torch.ones(len(correct)), "correct": torch.tensor(correct).bool()}


def test_values():
    """Each metric on all examples."""
    losses = {"nll": torch.tensor([2.0, 6.0]), "tokens": torch.tensor([1, 3])}
    assert value("loss", losses) == 2.0  # per token, not per example
    assert value("loss", {"nll": torch.tensor([1.0, 2.0])}) == 1.5
    assert value("accuracy", answers(1, 0, 0, 1, 1)) == pytest.approx(0.6)
    predicted, label = torch.tensor([0, 2, 2, 4, 0]), torch.tensor([0, 2, 4, 4, 2])
    assert value("f1", {"predicted": predicted, "label": label}) == pytest.approx(macro_f1(predicted, label))


def test_a_difference_by_hand():
    """Three seeds, four examples, all examples alike: only the seeds vary."""
    ours = [answers(1, 1, 1, 1), answers(1, 1, 1, 1), answers(0, 0, 0, 0)]
    theirs = [answers(0, 0, 0, 0)] * 3
    found = difference_of("accuracy", {"a": ours}, {"a": theirs})
    assert (found.mean, found.wins, found.seeds) == (pytest.approx(2 / 3), 2, 3)
    reach = stats.t.ppf(0.975, 2) * math.sqrt(1 / 3 / 3)  # s² = 1/3
    assert (found.low, found.high) == (pytest.approx(2 / 3 - reach), pytest.approx(2 / 3 + reach))
    assert found.verdict(lower_is_better=False) == ""


def test_examples_vary_too():
    """Seeds agree, so the error is that of a mean of examples: √(p(1 − p)/n), to the bootstrap's own noise."""
    ours, theirs = answers(*[1] * 30 + [0] * 70), answers(*[0] * 100)
    found = difference_of("accuracy", {"a": [ours] * 4}, {"a": [theirs] * 4})
    reach = stats.t.ppf(0.975, 99) * math.sqrt(0.3 * 0.7 / 100)
    assert found.high - found.mean == pytest.approx(reach, rel=0.08)
    assert found.verdict(lower_is_better=False) == "better"
    assert found.verdict(lower_is_better=True) == "worse"


def test_the_mean_of_data_sets():
    """Data sets weigh alike, whatever their size; two with independent noise are surer than one."""
    ours = {"a": [answers(*[1] * 30 + [0] * 70)] * 3, "b": [answers(*[1] * 5 + [0] * 5)] * 3}
    theirs = {"a": [answers(*[0] * 100)] * 3, "b": [answers(*[0] * 10)] * 3}
    found = difference_of("accuracy", ours, theirs)
    assert found.mean == pytest.approx(0.4)
    error = math.sqrt(0.3 * 0.7 / 100 + 0.5 * 0.5 / 10) / 2
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, 109) * error, rel=0.08)


def test_pairing():
    """What both methods get wrong alike does not widen the interval."""
    hard = answers(*[0] * 50 + [1] * 50)
    ours, theirs = [hard] * 3, [hard] * 3
    assert difference_of("accuracy", {"a": ours}, {"a": theirs}) == Difference(0.0, 0.0, 0.0, 0, 3)


def test_one_seed_says_nothing_about_others():
    """No interval, and no verdict."""
    found = difference_of("accuracy", {"a": [answers(1, 1)]}, {"a": [answers(0, 0)]})
    assert (found.mean, found.low, found.verdict(False)) == (1.0, None, "")


def test_loss_lower_is_better():
    """The sign of a verdict follows the metric."""
    ours = [{"nll": torch.full((50,), 1.0 + 0.01 * seed)} for seed in range(3)]
    theirs = [{"nll": torch.full((50,), 2.0 + 0.011 * seed)} for seed in range(3)]
    found = difference_of("loss", {"a": ours}, {"a": theirs}, lower_is_better=True)
    assert (found.wins, found.verdict(True)) == (3, "better")


@pytest.mark.parametrize(("between", "examples"), [(0.3, 60), (0.02, 60), (0.1, 400)])
def test_intervals_hold_what_they_promise(between, examples):
    """A true difference of 0.2 lies in about 95 of 100 intervals, whether seeds vary or examples do."""
    generator, inside, runs = torch.Generator().manual_seed(0), 0, 250
    for run in range(runs):
        # loss of example e with seed s: difficulty, a seed's own shift, noise; the test set is drawn anew each time
        shift = (
            between * torch.randn(5, 1, generator=generator) + 0.2 + 0.5 * torch.randn(1, examples, generator=generator)
        )
        theirs = torch.randn(1, examples, generator=generator).expand(5, -1)
        ours = theirs + shift + 0.3 * torch.randn(5, examples, generator=generator)
        sides = ([{"nll": row} for row in side] for side in (ours, theirs))
        found = difference_of("loss", *({"a": side} for side in sides), seed=run)
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 0.2 <= found.high
    assert 0.92 <= inside / runs <= 0.995
