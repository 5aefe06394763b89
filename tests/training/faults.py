"""Faults that make a loss, a gradient or a factor of a run NaN or Inf."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from loraplex.recipes.training.nonfinite_search import readable

LAYER = "model.layers.2.mlp.down_proj"


class InfBackward(torch.autograd.Function):
    """The identity, with gradients that are Inf."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, torch.inf)


def layer(trainer) -> nn.Module:
    return trainer.model.get_submodule(f"base_model.model.{LAYER}")


def bad_loss(trainer) -> Callable[[], None]:
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: compute(*args, **kwargs) * torch.nan
    return lambda: delattr(trainer, "compute_loss")


def bad_output(trainer) -> Callable[[], None]:
    return layer(trainer).register_forward_hook(lambda module, args, out: out * torch.inf).remove


def bad_gradient(trainer) -> Callable[[], None]:
    module = layer(trainer)
    forward = module.forward
    module.forward = lambda x: forward(InfBackward.apply(x))
    return lambda: delattr(module, "forward")


def bad_factor(trainer) -> Callable[[], None]:
    trained = {readable(name): p for name, p in trainer.model.named_parameters() if p.requires_grad}
    nn.init.constant_(trained["lora_B of model.layers.1.self_attn.q_proj"], torch.nan)
    return lambda: None


class Faults(TrainerCallback):
    """Installs a fault for the given steps, and looks at the trainer before and after every step."""

    def __init__(self, trainer, steps, fault, look) -> None:
        self.trainer, self.steps, self.fault, self.look = trainer, steps, fault, look
        self.undo: Callable[[], None] = lambda: None

    def on_step_begin(self, args, state, control, **kwargs):
        self.look(self.trainer, state.global_step + 1, "before")
        if state.global_step + 1 in self.steps:
            self.undo = self.fault(self.trainer)

    def on_step_end(self, args, state, control, **kwargs):
        self.undo()
        self.undo = lambda: None
        self.look(self.trainer, state.global_step, "after")


def state_of(trainer) -> dict[str, Any]:
    parts = {"model": trainer.model, "optimizer": trainer.optimizer, "lr": trainer.lr_scheduler}
    return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
