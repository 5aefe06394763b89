"""The module in which numbers stop being finite is named: the innermost one, in forward and in backward order."""

from __future__ import annotations

import pytest
import torch
from faults import InfBackward
from torch import nn

from loraplex.recipes.training.nonfinite_search import Trace, readable


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base_model.model.model.layers.3.mlp.up_proj", "model.layers.3.mlp.up_proj"),
        ("base_model.model.layers.3.q_proj.dual_factors.default", "the adapter of layers.3.q_proj"),
        ("base_model.model.layers.3.q_proj.dual_factors.default.lora_B", "lora_B of layers.3.q_proj"),
        ("base_model.model.layers.3.q_proj.dual_factors.default.dropout", "dropout of layers.3.q_proj"),
        ("base_model.model.layers.3.q_proj.lora_A.default.weight", "lora_A of layers.3.q_proj"),
        ("base_model.model.loraplex_bank.aslora_shared.default.h__N__q_proj__lora_B_3", "lora_B_3 of h.N.q_proj"),
    ],
)
def test_names_are_those_that_people_use(name, said):
    assert readable(name) == said


class Block(nn.Module):
    """Two layers, a residual and an in-place product; a module and a bare function stand between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fault = nn.Linear(3, 3), nn.Linear(3, 3), nn.Identity()
        self.function = lambda y: y

    def forward(self, x, attention_mask=None):
        y = self.first(x)
        y *= 2
        return x + self.second(self.function(self.fault(y)))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_trace_names_the_innermost_module(checkpointed):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            mask = torch.full((3, 3), -torch.inf)
            for block in self.blocks:
                if checkpointed:
                    x = torch.utils.checkpoint.checkpoint(block, x, attention_mask=mask, use_reentrant=False)
                else:
                    x = block(x, attention_mask=mask)
            return x

    model = Model()

    def found() -> str | None:
        with Trace(model) as trace:
            trace.backward(model(torch.ones(2, 3, requires_grad=True)).sum())
        return trace.finding and trace.finding.module

    assert found() is None
    model.blocks[1].fault.forward = InfBackward.apply
    assert found() == "blocks.1.fault"
    model.blocks[1].function = InfBackward.apply
    assert found() == "blocks.1"
    model.blocks[2].function = lambda y: y / 0
    assert found() == "blocks.2"
    model.blocks[2].function = lambda y: y
    nn.init.constant_(model.blocks[2].second.weight, torch.inf)
    assert found() == "blocks.2.second"
    model.blocks[0].forward = lambda x, attention_mask: x / 0
    assert found() == "blocks.0"
    assert all(p.grad is None for p in model.parameters())
