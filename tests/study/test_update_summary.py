"""Numbers about updates, from analyses written by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from loraplex.inspection.spectra import Analysis, analyse_lora
from loraplex.study.update_summary import summarize_updates
from loraplex.tuner.findings import Fact, GateUse, Handover, Handovers, Matrices, OverLayers, Panel

EMPTY = Analysis("X").to_dict()


def spectrum(values: list[float], rank: float, note: str = "") -> dict[str, Any]:
    """What an analysis says of one module."""
    return {"values": values, "effective_rank": rank, "norm": math.hypot(*values), "note": note}


def test_spectra():
    """Means over modules; a shorter spectrum has reached 1 where it ends; ΔW = 0 counts in the norm alone."""
    spectra = [spectrum([3.0, 1.0], 1.75), spectrum([4.0, 4.0, 2.0], 2.9, "a note")]
    zeros = [spectrum([], 0.0), spectrum([0.0, 0.0, 0.0], 0.0, "no note")]
    for more in ([], zeros[:1], zeros[1:], zeros):
        inside = summarize_updates(EMPTY | {"spectra": spectra + more})
        assert inside.effective_rank == pytest.approx((1.75 + 2.9) / 2)
        assert inside.first == pytest.approx((0.75 + 0.4) / 2)
        assert inside.top == pytest.approx(1)
        assert inside.cumulative == pytest.approx([(0.75 + 0.4) / 2, (1 + 0.8) / 2, 1])
        assert inside.norm == pytest.approx((math.sqrt(10) + 6) / (2 + len(more)))
        assert inside.notes == ["a note"]
    nothing = summarize_updates(EMPTY | {"spectra": zeros, "error": "not analysed: why"})
    assert (nothing.effective_rank, nothing.cumulative, nothing.norm) == (None, [], 0)
    assert nothing.notes == ["not analysed: why"]


def test_what_methods_have_of_their_own():
    """Means over modules, groups and pairs of tasks, by hand; and the plain values of each finding."""
    panels = [
        Panel("closed", "closed", {"q": 0.5, "v": 0.7}, "closed, %"),
        Panel("size", "size 1", {"q": 0.1, "v": 0.4}),
        Panel("size", "size 2", {"q": 0.3, "v": 0.2}),
    ]
    pairs = {"g": [[1.0, 0.2], [0.2, 1.0]], "h": [[1.0, 0.6], [0.6, 1.0]]}
    use = {"a": {"q": [0.5, 0.5], "v": [1.0, 0.0]}, "b": {"q": [0.7, 0.3], "v": [0.0, 1.0]}}
    findings = [
        OverLayers("gates", "Gates", panels),
        Matrices("alike", "Alike", "similarity", pairs),
        GateUse("use", "Use", "expert", use),
        Handovers("merges", "Merges", "B", [Handover(3, "q", 0, 1)], {"q": 2}),
        Fact("warmup", "warm-up", "1 of 2 steps", [1, 2]),
    ]
    analysis = Analysis("X", findings=findings).to_dict()
    assert summarize_updates(analysis).measures == pytest.approx(
        {
            "closed, %": 0.6,
            "similarity": 0.4,
            "separation of data sets": (0.2 + 1) / 2,
            "largest gate, a": 0.75,
            "largest gate, b": 0.85,
        }
    )
    assert analysis["closed"] == {"q": 0.5, "v": 0.7}
    assert analysis["size"] == {"q": [0.1, 0.3], "v": [0.4, 0.2]}
    assert (analysis["alike"], analysis["use"], analysis["warmup"]) == (pairs, use, [1, 2])
    assert analysis["merges"] == [{"step": 3, "family": "q", "layer": 0, "reads": 1}]
    with pytest.raises(KeyError, match="gates, alike, use, merges, warmup"):
        Analysis("X", findings=findings).finding("x")


def test_an_analysis_of_an_earlier_version_has_no_measures():
    """Its spectra count all the same."""
    old = {key: value for key, value in EMPTY.items() if key != "measures"} | {"closed": {"q": 0.5}, "use": {}}
    assert summarize_updates(old | {"spectra": [spectrum([3.0, 1.0], 1.75)]}).first == 0.75


@pytest.mark.parametrize("start", [True, "pissa"])
def test_a_lora_that_changed_its_base_says_so(tmp_path, start):
    """PiSSA takes its first B A out of W, so that B A is not what it has learned."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(6, 6)

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["proj"], init_lora_weights=start))
    model.save_pretrained(tmp_path)
    (spectrum,) = analyse_lora(str(tmp_path)).spectra
    assert spectrum.note == ("B A, with what pissa took out of the base weight" if start == "pissa" else "")
