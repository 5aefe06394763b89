"""Dual LoRA's gradients under a loss scale are those without one, whoever scales the loss."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

import loraplex
from loraplex import DualLoraConfig
from loraplex.runtime import loss_scaling

IN, OUT, R1, R2 = 23, 17, 3, 5
FORMS = ["added", "apart", "reference"]
COMPUTE = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
POWERS = [8, 16]


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """Every test ends with the scale 1."""
    yield
    gc.collect()
    loss_scaling.forward_begins()
    assert not loss_scaling._passes
    assert not loss_scaling._given
    assert all(bound.item() == 1 for bound in loss_scaling._bounds.values())


def make(form: str = "added", seed: int = 0) -> nn.Module:
    """One layer with a ΔW so large that most of the direction's gradients are clipped, though the loss's are small."""
    torch.manual_seed(seed)
    config = DualLoraConfig(
        r_magnitude=R1, r_direction=R2, lora_alpha=7, target_modules=["0"], init_weights=False, compute=form
    )
    model = get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "duallora" in name:
                parameter.copy_(3 * torch.randn(parameter.shape))
    return model.train()


def inputs() -> Tensor:
    return torch.randn(6, IN, generator=torch.Generator().manual_seed(1))


def loss_of(model: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None, size: float = 0.02) -> Tensor:
    """A loss whose gradients times 2¹⁶ fit into float16: the largest is about 1/4."""
    x = inputs()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        y = model(x)
    return size * (y.float() * torch.linspace(-1, 1, OUT)).sum()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def take(model: nn.Module, scale: float = 1.0) -> list[Tensor]:
    found = [p.grad / scale for p in trained(model)]
    model.zero_grad()
    return found


def unscaled(model: nn.Module, dtype: torch.dtype | None = None) -> list[Tensor]:
    with loraplex.loss_scale(1.0):
        loss_of(model, dtype).backward()
    return take(model)


def assert_alike(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype | None = None) -> None:
    for one, two in zip(found, expected, strict=True):
        if dtype == torch.float16:  # in which the unscaled gradients are partly below its smallest normal number
            assert ((one - two).norm() / two.norm()).item() < 0.01
        else:
            assert torch.equal(one, two)


def differ(found: list[Tensor], expected: list[Tensor]) -> list[bool]:
    """Of A, B, C and D."""
    return [((one - two).norm() / two.norm()).item() > 0.2 for one, two in zip(found, expected, strict=True)]


def test_the_clip_matters_here() -> None:
    """With bounds a thousand times as wide the gradients of C and D are others: what follows can see the clip."""
    for form in FORMS:
        model = make(form)
        expected = unscaled(model)
        with loraplex.loss_scale(1000.0):
            loss_of(model).backward()
        assert differ(take(model), expected) == [False, False, True, True]


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("dtype", COMPUTE)
@pytest.mark.parametrize("form", FORMS)
def test_gradient_scaler(form: str, dtype: str, power: int) -> None:
    model, compute = make(form), COMPUTE[dtype]
    expected = unscaled(model, compute)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**power)
    optimizer = torch.optim.SGD(trained(model), lr=0.0)
    scaler.scale(loss_of(model, compute)).backward()
    scaler.unscale_(optimizer)
    assert_alike(take(model), expected, compute)
    # The scale was that pass's alone.
    if dtype != "float16":
        loss_of(model, compute).backward()
        assert_alike(take(model), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_under_checkpointing(form: str, reentrant: bool) -> None:
    """The second forward, and with reentrant checkpointing a pass of its own, run inside the scaled pass."""
    model = make(form)
    expected = unscaled(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    recomputed = partial(checkpoint, model, use_reentrant=reentrant)
    scaler.scale(loss_of(lambda x: recomputed(x.requires_grad_()))).backward()
    assert_alike(take(model, 2.0**8), expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("form", FORMS)
def test_compiled(form: str) -> None:
    """Compiled once, the backward pass follows a scale that changes."""
    torch._dynamo.reset()
    model = make(form)
    expected = unscaled(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss_of(compiled).backward()
    assert_alike(take(model), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for power in POWERS:
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**power)
            scaler.scale(loss_of(compiled)).backward()
            assert_alike(take(model, 2.0**power), expected)
        loss_of(compiled).backward()
        assert_alike(take(model), expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's, between two graphs
def test_a_compiled_step() -> None:
    """The scaler inside of what is compiled."""
    torch._dynamo.reset()
    model = make()
    expected = unscaled(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

    @torch.compile(backend="aot_eager")
    def step(x: Tensor) -> None:
        scaler.scale(0.02 * (model(x) * torch.linspace(-1, 1, OUT)).sum()).backward()

    step(inputs())
    assert_alike(take(model, 2.0**8), expected)


def test_several_losses_and_passes() -> None:
    """Lists of losses, an iterator, a graph that is used twice, a scale that changes."""
    model = make()
    expected = unscaled(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for scaled in (scaler.scale([loss_of(model)])[0], scaler.scale(([loss_of(model)],))[0][0]):
        scaled.backward()
        assert_alike(take(model, 2.0**8), expected)
    next(iter(scaler.scale(iter([loss_of(model)])))).backward()
    assert_alike(take(model, 2.0**8), expected)

    scaled = scaler.scale(loss_of(model))
    for _ in range(2):
        scaled.backward(retain_graph=True)
        assert_alike(take(model, 2.0**8), expected)
    scaler.update(2.0**4)
    scaler.scale(loss_of(model)).backward()
    assert_alike(take(model, 2.0**4), expected)

    found = torch.autograd.grad(scaler.scale(loss_of(model)), trained(model))
    assert_alike([g / 2.0**4 for g in found], expected)
    scaler.scale(loss_of(model).detach())  # nothing to train, nothing to tell
    torch.amp.GradScaler("cpu", enabled=False).scale(loss_of(model)).backward()
    assert_alike(take(model), expected)


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise KeyError("out of something")


@pytest.mark.parametrize("form", FORMS)
def test_a_pass_that_fails_leaves_no_scale_behind(form: str) -> None:
    model = make(form)
    expected = unscaled(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with pytest.raises(KeyError):
        scaler.scale(_Fails.apply(loss_of(model))).backward()
    loss_of(model).backward()
    assert_alike(take(model), expected)


# Overflow


@pytest.mark.parametrize("only", [None, "AB", "CD", "C", "D"])
@pytest.mark.parametrize("form", FORMS)
def test_an_overflow_is_found_whatever_is_trained(form: str, only: str | None) -> None:
    """The clip makes a finite number of infinity; the scaler must skip the step all the same, and halve the scale."""
    model = make(form)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("duallora" in name and (only is None or name[-1] in only))
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    before = [p.detach().clone() for p in trained(model)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    for step in range(3):
        # dY = 2³⁰ · 0.02 is beyond float16.
        scaler.scale(loss_of(model, torch.float16)).backward()
        assert all(not p.grad.isfinite().all() for p in trained(model))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert all(torch.equal(p, was) for p, was in zip(trained(model), before, strict=True))
        assert scaler.get_scale() == 2.0 ** (29 - step)
    scaler.update(2.0**10)
    scaler.scale(loss_of(model, torch.float16)).backward()
    scaler.step(optimizer)
    assert all(not torch.equal(p, was) for p, was in zip(trained(model), before, strict=True))


def test_an_overflow_in_one_element_is_found() -> None:
    """One infinite element of G where the gate is open: A and B see it; C and D must, too."""
    for form in FORMS:
        model = make(form)
        x = torch.ones(1, IN)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("duallora" in name and name[-1] in "CD")
        factors = model.base_model.model[0].factors("default")
        i, j = (factors.delta_weight() != 0).nonzero()[0].tolist()
        x[0, j], dY = 1e30, torch.zeros(1, OUT)
        dY[0, i] = 1e30
        model(x).backward(dY)
        assert all(not g.isfinite().all() for g in take(model)), form


# float16


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("autocast", [True, False])
def test_float16_without_a_known_scale_is_an_error(form: str, autocast: bool) -> None:
    model = make(form)

    def loss() -> Tensor:
        if autocast:
            return loss_of(model, torch.float16)
        return 0.02 * model(inputs().half()).float().sum()

    if not autocast:
        model.base_model.model[0].base_layer.half()
    with pytest.raises(RuntimeError, match=r"float16, but no loss scale is known.*loraplex\.loss_scale\(scale\)"):
        loss().backward()
    model.zero_grad()
    with loraplex.loss_scale(1.0):
        loss().backward()
    assert all(p.grad.isfinite().all() for p in trained(model))
    # No factor is trained: nothing is clipped.
    for parameter in trained(model):
        parameter.requires_grad_(False)
    x = inputs().to(torch.float32 if autocast else torch.float16).requires_grad_()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        model(x).float().sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_a_scale_that_is_told(form: str) -> None:
    """A number, a tensor, or a function that is asked in each backward pass."""
    model = make(form)
    expected = unscaled(model)
    for scale in (256, 256.0, torch.tensor(256.0), lambda: 256.0, torch.tensor([256.0]).max):
        with loraplex.loss_scale(scale):
            (256 * loss_of(model)).backward()
        assert_alike(take(model, 256), expected)
    scale_now = [4.0]
    with loraplex.loss_scale(lambda: scale_now[0]):
        for _ in range(3):
            scale_now[0] *= 2
            (scale_now[0] * loss_of(model)).backward()
            assert_alike(take(model, scale_now[0]), expected)
        # A scaler knows better.
        torch.amp.GradScaler("cpu", init_scale=2.0**8).scale(loss_of(model)).backward()
        assert_alike(take(model, 2.0**8), expected)
        with loraplex.loss_scale(1):
            loss_of(model).backward()
        assert_alike(take(model), expected)
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be positive"), loraplex.loss_scale(wrong):
            pass


# Trainers


def test_accelerate() -> None:
    """`accelerator.backward` with the scaler that accelerate makes for fp16 on GPUs."""
    model = make()
    expected = unscaled(model)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    prepared = accelerator.prepare_model(model)
    accelerator.backward(loss_of(prepared))
    assert_alike(take(model, 2.0**8), expected)


class _Layer(nn.Module):
    """What the Trainer calls a model: it returns a loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": 0.02 * (self.model(x).float() * torch.linspace(-1, 1, OUT)).sum()}


@pytest.mark.parametrize("power", [0, 10])
def test_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, power: int) -> None:
    """transformers.Trainer in fp16, with accumulation: the same update whatever the scale, and that of a plain loop."""
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    model = make()
    start = [p.detach().clone() for p in trained(model)]
    settings = {"max_steps": 1, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "max_grad_norm": 0}
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
        save_strategy="no", disable_tqdm=True, dataloader_drop_last=True, remove_unused_columns=False, **settings,
    )  # fmt: skip
    data = [{"x": row} for row in inputs()] * 2
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = Trainer(_Layer(model), arguments, train_dataset=data, optimizers=(optimizer, schedule))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**power)
    trainer.accelerator.native_amp = True
    monkeypatch.setattr(trainer, "_get_train_sampler", lambda *_: None)
    trainer.train()
    moved = [before - p.detach() for before, p in zip(start, trained(model), strict=True)]

    twin = make()
    for _ in range(2):
        with loraplex.loss_scale(1.0):
            (loss_of(twin, torch.bfloat16) / 2).backward()
    for one, two in zip(moved, take(twin), strict=True):
        assert ((one - two).norm() / two.norm()).item() < 1e-3


def test_deepspeed() -> None:
    """Its own loss scaler, by both ways that its engines take."""
    scalers = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    model = make()
    expected = unscaled(model)
    for scaler in (
        scalers.LossScaler(2.0**8),
        scalers.DynamicLossScaler(2.0**8, 1000, 1.0, 1, False),
    ):
        scaler.scale_loss(loss_of(model)).backward()
        assert_alike(take(model, 2.0**8), expected)
        scaler.backward(loss_of(model))
        assert_alike(take(model, 2.0**8), expected)
    loss_of(model).backward()
    assert_alike(take(model), expected)


def test_sharded_scaler() -> None:
    """That of FSDP scales by itself, without torch.amp.GradScaler's method."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    model = make()
    expected = unscaled(model)
    scaler = ShardedGradScaler.__new__(ShardedGradScaler)
    torch.amp.GradScaler.__init__(scaler, "cpu", init_scale=2.0**8)
    scaler.scale(loss_of(model)).backward()
    assert_alike(take(model, 2.0**8), expected)
