"""Numbers about updates, from analyses written by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from loraplex.inspection.spectra import Analysis, analyse_lora
from loraplex.study.inside import look_inside

EMPTY = Analysis("X").to_dict()


def spectrum(values: list[float], rank: float, note: str = "") -> dict[str, Any]:
    """What an analysis says of one module."""
    return {"values": values, "effective_rank": rank, "norm": math.hypot(*values), "note": note}


def test_spectra():
    """Means over modules; a shorter spectrum has reached 1 where it ends; ΔW = 0 counts in the norm alone."""
    spectra = [spectrum([3.0, 1.0], 1.75), spectrum([4.0, 4.0, 2.0], 2.9, "a note")]
    zeros = [spectrum([], 0.0), spectrum([0.0, 0.0, 0.0], 0.0, "no note")]
    for more in ([], zeros[:1], zeros[1:], zeros):
        inside = look_inside(EMPTY | {"spectra": spectra + more})
        assert inside.effective_rank == pytest.approx((1.75 + 2.9) / 2)
        assert inside.first == pytest.approx((0.75 + 0.4) / 2)
        assert inside.top == pytest.approx(1)
        assert inside.cumulative == pytest.approx([(0.75 + 0.4) / 2, (1 + 0.8) / 2, 1])
        assert inside.norm == pytest.approx((math.sqrt(10) + 6) / (2 + len(more)))
        assert inside.notes == ["a note"]
    nothing = look_inside(EMPTY | {"spectra": zeros, "error": "not analysed: why"})
    assert (nothing.effective_rank, nothing.cumulative, nothing.norm) == (None, [], 0)
    assert nothing.notes == ["not analysed: why"]


def test_what_methods_have_of_their_own():
    """Means over modules and groups, by hand."""
    inside = look_inside(
        EMPTY
        | {
            "closed": {"q": 0.5, "v": 0.7},
            "negative": {"q": 0.25, "v": 0.75},
            "similarity": {"g": [[1.0, 0.2], [0.2, 1.0]], "h": [[1.0, 0.6], [0.6, 1.0]]},
            "use": {
                "a": {"q": [0.5, 0.5], "v": [1.0, 0.0]},
                "b": {"q": [0.7, 0.3], "v": [0.0, 1.0]},
            },
            "scaling": {"q": [0.1, 0.3], "v": [0.4, 0.2]},
            "merges": [{"step": 3, "family": "q", "layer": 0, "reads": 1}],
        }
    )
    assert inside.closed == pytest.approx(0.6)
    assert inside.negative == pytest.approx(0.5)
    assert inside.similarity == pytest.approx(0.4)
    assert inside.concentration == pytest.approx({"a": 0.75, "b": 0.85})
    assert inside.separation == pytest.approx((0.2 + 1) / 2)
    assert inside.scaling == pytest.approx([0.35, 0.15])
    assert inside.merges == [{"step": 3, "family": "q", "layer": 0, "reads": 1}]


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
