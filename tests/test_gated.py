"""Dual LoRA's map without (out, in) matrices kept for backward, against plain autograd in float64."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from loraplex import DualLoraConfig, loss_scale
from loraplex.methods.dual_lora import factors as dual_lora
from loraplex.methods.dual_lora import gated_linear as gated
from loraplex.methods.dual_lora.gated_linear import gated_linear
from loraplex.methods.dual_lora.sign import Sign
from loraplex.numerics import products, rounding

OUT, IN, R1, R2, SCALE = 37, 53, 3, 5, 0.7
HALVES = [torch.bfloat16, torch.float16]
EPS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several tiles, the last of them not full."""
    monkeypatch.setattr(products, "_CPU_TILE", 10 * IN + 3)


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def factors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    shapes = [(R1, IN), (OUT, R1), (R2, IN), (OUT, R2)]
    made = [drawn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    made[3][2] = 0  # a row of D C is zero, and its sign −1
    return tuple(made)


def delta(A: Tensor, B: Tensor, C: Tensor, D: Tensor, scale: float = SCALE) -> Tensor:
    return scale * torch.relu(B @ A) * Sign.apply(D @ C)


def close(found: Tensor, expected: Tensor, eps: float) -> None:
    assert found.shape == expected.shape
    assert ((found.double() - expected).norm() / expected.norm()).item() < eps


def compare(x: Tensor, weight: Tensor | None, bias: Tensor | None, fs: tuple[Tensor, ...], eps: float, run=None):
    """Output and gradients against float64; `x` and `fs` tell what is trained."""
    scale = torch.tensor(SCALE, dtype=torch.promote_types(fs[0].dtype, torch.float32))
    y = (run or gated_linear)(x, fs, scale, weight, bias)
    leaves = [t for t in (x, *fs) if t.requires_grad]
    x64, *f64 = (t.detach().double().requires_grad_(t.requires_grad) for t in (x, *fs))
    total = delta(*f64) if weight is None else delta(*f64) + weight.double()
    expected = linear(x64, total, None if bias is None else bias.double())
    # Small enough for most of Sign's gradients not to be clipped, and some to be.
    dY = 0.02 * drawn(*y.shape, seed=9)
    close(y, expected.detach(), eps)
    with loss_scale(1.0):  # which float16 asks for
        found = torch.autograd.grad(y, leaves, dY.to(y.dtype))
    wanted = torch.autograd.grad(expected, [t for t in (x64, *f64) if t.requires_grad], dY)
    for one, two, of in zip(found, wanted, leaves, strict=True):
        assert one.dtype == of.dtype
        close(one, two, 3 * eps)


@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("dtype", EPS)
def test_output_and_gradients(dtype, with_weight):
    fs = [f.requires_grad_() for f in factors(dtype if dtype == torch.float64 else torch.float32)]
    x = drawn(3, 7, IN, seed=5, dtype=dtype).requires_grad_()
    weight = drawn(OUT, IN, seed=6, dtype=dtype) if with_weight else None
    bias = drawn(OUT, seed=7, dtype=dtype) if with_weight else None
    compare(x, weight, bias, tuple(fs), EPS[dtype])


@pytest.mark.parametrize("trained", [(0,), (1,), (2, 3), (0, 1, 2, 3), ()])
@pytest.mark.parametrize("x_trained", [True, False])
def test_what_is_trained(trained, x_trained):
    if not trained and not x_trained:
        return
    fs = tuple(f.requires_grad_(i in trained) for i, f in enumerate(factors()))
    x = drawn(6, IN, seed=5, dtype=torch.float32).requires_grad_(x_trained)
    compare(x, drawn(OUT, IN, seed=6, dtype=torch.float32), None, fs, EPS[torch.float32])


def test_strides_and_half_precision_factors():
    """A Conv1D's weight is stored (in, out); x is a slice of something."""
    weight = drawn(IN, OUT, seed=6, dtype=torch.float32).T
    x = drawn(4, 2 * IN, 5, seed=5, dtype=torch.float32).transpose(1, 2)[..., ::2].requires_grad_()
    compare(x, weight, None, tuple(f.requires_grad_() for f in factors()), EPS[torch.float32])
    fs = tuple(f.requires_grad_() for f in factors(torch.bfloat16))
    compare(x, weight, None, fs, EPS[torch.bfloat16])


def test_no_tokens_and_one():
    for tokens in (0, 1):
        x = drawn(tokens, IN, seed=5, dtype=torch.float32).requires_grad_()
        fs = tuple(f.requires_grad_() for f in factors())
        y = gated_linear(x, fs, torch.tensor(SCALE), drawn(OUT, IN, seed=6, dtype=torch.float32), None)
        gradients = torch.autograd.grad(y.sum(), [x, *fs])
        assert [g.shape for g in gradients] == [t.shape for t in (x, *fs)]
        assert tokens or not any(g.any() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_library(dtype):
    """torch's own checks: schema, fake tensors, autograd registration, AOT dispatch."""
    x = drawn(3, IN, seed=5, dtype=dtype).requires_grad_()
    fs, weight = (f.requires_grad_() for f in factors()), drawn(OUT, IN, seed=6, dtype=dtype)
    arguments = (x, *fs, torch.tensor(SCALE), weight, drawn(OUT, seed=7, dtype=dtype))
    torch.library.opcheck(torch.ops.loraplex.gated_linear, arguments)


@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("x_trained", [True, False])
@pytest.mark.parametrize("factors_trained", [True, False])
def test_operations_are_counted(with_weight, x_trained, factors_trained):
    """As many as the products that run inside, where torch's counter sees each of them."""
    in_place = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}  # torch does not know these

    def run(call) -> int:
        x = drawn(6, IN, seed=5, dtype=torch.float32).requires_grad_(x_trained)
        fs = tuple(f.requires_grad_(factors_trained) for f in factors())
        weight = drawn(OUT, IN, seed=6, dtype=torch.float32) if with_weight else None
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            call(x, fs, weight)
        return counter.get_total_flops()

    def as_operators(x, fs, weight) -> None:
        y = gated_linear(x, fs, torch.tensor(SCALE), weight, None)
        if y.requires_grad:
            y.sum().backward()

    def inside(x, fs, weight) -> None:
        scale, needs = torch.tensor(SCALE), (x_trained or factors_trained)
        with torch.no_grad():
            y = gated._forward._init_fn(x, *fs, scale, weight, None)
            if needs:
                kept = x if factors_trained else None
                gated._backward._init_fn(torch.ones_like(y), kept, *fs, scale, weight, x_trained)

    counted = run(as_operators)
    assert counted == run(inside)
    # By hand: y, G and dx are products of W's size with the tokens; B A and D C are made twice, and each of the four
    # gradients is one more product of a factor's size. Without x's gradient nothing is built again.
    tokens, ranks = 6, R1 + R2
    by_hand = OUT * IN * tokens * (1 + factors_trained + x_trained)
    by_hand += OUT * IN * ranks * (1 + (factors_trained or x_trained) + 2 * factors_trained)
    assert counted == 2 * by_hand


# Rounding to half precision


def built(weight: Tensor, fs: tuple[Tensor, ...], scale: float, key: int | None = None, dtype=None) -> Tensor:
    """W + ΔW as forward builds it; with a key in place of the factors' own."""
    out = torch.empty_like(weight, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        if key is not None:
            patch.setattr(rounding, "key", lambda *_: torch.tensor(key, dtype=torch.int32))
        gated.fill(out, fs, torch.tensor(scale), weight)
    return out


def neighbours(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The values of `dtype` at and around each of `exact` (float64), the smaller first."""
    nearest = exact.to(dtype)
    to = torch.where(nearest.double() < exact, torch.inf, -torch.inf).to(dtype)
    other = torch.where(nearest.double() == exact, nearest, torch.nextafter(nearest, to)).double()
    return torch.minimum(nearest.double(), other), torch.maximum(nearest.double(), other)


def weights(dtype: torch.dtype) -> Tensor:
    """Of all sizes, below float16's smallest normal number too."""
    return (drawn(OUT, IN, seed=6) * torch.logspace(-8, 0, IN)).to(dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stored", ["half", "float32"])
def test_rounds_to_a_neighbour_and_is_right_on_average(dtype, stored):
    """W is the nearest value of the dtype; what is added to it is rounded up or down, over many keys to its mean."""
    weight, fs = weights(dtype if stored == "half" else torch.float32), factors()
    fs = fs[0], fs[1] * torch.logspace(-7, 0, OUT)[:, None], *fs[2:]
    scale, num_keys = 1e-2, 1000
    exact = (delta(*fs, scale) + weight.to(dtype).float()).double()  # in float32, as it is computed
    low, high = neighbours(exact, dtype)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(2**31 - 1, (num_keys,), generator=generator).tolist()
    sums = torch.stack([built(weight, fs, scale, key, dtype) for key in keys]).double()
    # Products in tiles differ in their last bit from those of a whole matrix.
    slack = 1e-6 * exact.abs() + 1e-12
    assert ((low - slack <= sums) & (sums <= high + slack)).all()
    error = (sums.mean(0) - exact) / (high - low + slack)
    # Each a mean of draws with a standard deviation of half a step at most: five of them for 2,000 elements.
    assert error.abs().max() < 5 * 0.5 / num_keys**0.5 + 0.02
    assert error.mean().abs() < 5 * 0.5 / (num_keys * error.numel()) ** 0.5 + 1e-3


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-4)])
def test_small_changes_survive(dtype, size):
    """An update so small that rounding to the nearest loses a part of it is kept whole on average."""
    weight, fs = drawn(OUT, IN, seed=6, dtype=dtype), factors()
    scale = (size * weight.double().norm() / delta(*(f.double() for f in fs), 1.0).norm()).item()
    wanted = delta(*(f.double() for f in fs), scale)

    def kept(total: Tensor) -> float:
        return (((total.double() - weight.double()) * wanted).sum() / wanted.square().sum()).item()

    nearest = (weight.double() + wanted).to(dtype)
    assert kept(nearest) < 0.9
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(2**31 - 1, (1000,), generator=generator).tolist()
    assert sum(kept(built(weight, fs, scale, key)) for key in keys) / len(keys) == pytest.approx(1, abs=0.02)
    # The keys of a run: those of factors that change a little from step to step.
    steps = []
    for step in range(300):
        moved = tuple(f + 1e-4 * drawn(*f.shape, seed=50 + step, dtype=torch.float32) for f in fs)
        change = delta(*(f.double() for f in moved), scale)
        total = built(weight, moved, scale).double() - weight.double() - change
        steps.append(((total * wanted).sum() / wanted.square().sum()).item())
    assert sum(steps) / len(steps) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_without_an_update_the_sum_is_what_autocast_makes_of_the_weight(dtype, stored):
    weight, fs = weights(stored), factors()
    assert torch.equal(built(weight, fs, 0.0, dtype=dtype), weight.to(dtype))


def test_keys_differ_between_layers_and_after_each_change():
    fs, weight = factors(), drawn(OUT, IN, seed=6, dtype=torch.bfloat16)

    def keys(*changes: tuple[int, tuple[int, int]]) -> set[int]:
        found = {rounding.key(fs, weight).item()}
        for which, at in changes:
            changed = [f.clone() for f in fs]
            changed[which][at] = torch.nextafter(changed[which][at], torch.tensor(torch.inf))
            found.add(rounding.key(tuple(changed), weight).item())
        return found

    assert len(keys()) == len({rounding.key(fs, weight).item() for _ in range(2)}) == 1
    assert len(keys((0, (2, 40)), (1, (30, 1)), (2, (1, 7)), (3, (8, 4)))) == 5
    assert rounding.key(fs, weight + 1) != rounding.key(fs, weight)
    assert rounding.key(fs, weight.T.contiguous().T) == rounding.key(fs, weight)


@pytest.mark.parametrize("dtype", HALVES)
def test_nan_and_infinity_come_through(dtype):
    weight, fs = drawn(OUT, IN, seed=6, dtype=dtype), factors()
    # All bits of the mantissa set, as CUDA's NaN has them: adding to them would overflow.
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    out = torch.empty(2, 2, dtype=dtype)
    values = torch.stack([nan, torch.tensor([torch.inf, -torch.inf])])
    rounding.store(out, values, torch.full((2, 2), 0x1FFF, dtype=torch.int32))
    assert out[0].isnan().all()
    assert out[1].tolist() == [torch.inf, -torch.inf]
    fs[0][0, 0] = torch.nan
    assert built(weight, fs, 1.0)[:, 0].isnan().all()


def test_forward_and_backward_round_alike(monkeypatch):
    """dx of a one-hot dY is a row of the matrix that forward used."""
    seen = []
    fill = gated.fill
    monkeypatch.setattr(gated, "fill", lambda out, *rest: (fill(out, *rest), seen.append(out.clone()))[0])
    fs = tuple(f.requires_grad_() for f in factors())
    x = drawn(OUT, IN, seed=5, dtype=torch.bfloat16).requires_grad_()
    y = gated_linear(x, fs, torch.tensor(1e-3), drawn(OUT, IN, seed=6, dtype=torch.bfloat16), None)
    (dx,) = torch.autograd.grad(y, x, torch.eye(OUT, dtype=torch.bfloat16))
    assert torch.equal(dx, seen[0])


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-4)])
def test_small_updates_survive_as_well_as_in_the_unmerged_form(monkeypatch, dtype, size):
    """Of the effect x ΔWᵀ of a small ΔW both forms keep all on average; rounding to nearest does not."""
    out, inside, tokens = 96, 128, 64
    weight, x = drawn(out, inside, seed=6, dtype=dtype), drawn(tokens, inside, seed=5, dtype=dtype)
    A, B, C, D = (drawn(*shape, seed=i) for i, shape in enumerate([(3, inside), (out, 3), (3, inside), (out, 3)]))
    update = delta(A, B, C, D, 1.0)
    scale = (size * weight.double().norm() / update.norm()).item()
    effect = x.double() @ (scale * update).T
    fs, base = tuple(f.float() for f in (A, B, C, D)), x.double() @ weight.double().T

    def kept(y: Tensor) -> float:
        return (((y - base) * effect).sum() / effect.square().sum()).item()

    apart = linear(x, weight).double() + gated_linear(x, fs, torch.tensor(scale), None, None).double()
    keys = iter(range(10**6))
    monkeypatch.setattr(rounding, "key", lambda *_: torch.tensor(next(keys) * 7919, dtype=torch.int32))
    added = torch.stack([gated_linear(x, fs, torch.tensor(scale), weight, None).double() for _ in range(300)]).mean(0)
    nearest = x.double() @ (weight.double() + scale * update).to(dtype).double().T
    assert abs(kept(added) - 1) < max(0.02, abs(kept(apart) - 1))
    assert kept(nearest) < 0.8


# Layers


def model(base: nn.Module | None = None, **settings) -> nn.Module:
    torch.manual_seed(0)
    base = base or nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN, bias=False))
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    config = DualLoraConfig(r_magnitude=R1, r_direction=R2, init_weights=False, target_modules=names, **settings)
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "duallora" in name:
                parameter.mul_(10)
    return adapted.train()


def compute(adapted: nn.Module, form: str) -> nn.Module:
    for module in adapted.modules():
        if isinstance(module, dual_lora.DualLoraFactors):
            module.compute = form
    return adapted


def trained(adapted: nn.Module) -> list[nn.Parameter]:
    return [p for p in adapted.parameters() if p.requires_grad]


def outcome(adapted: nn.Module, x: Tensor, call=None) -> list[Tensor]:
    y = (adapted if call is None else call)(x)
    return [y, *torch.autograd.grad((y.float() ** 2).sum(), [x, *trained(adapted)])]


def assert_alike(found: list[Tensor], expected: list[Tensor], eps: float) -> None:
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == two.dtype
        close(one.detach(), two.detach().double(), eps)


def test_all_forms_are_the_same_function():
    adapted, x = model(), drawn(4, IN, seed=5, dtype=torch.float32).requires_grad_()
    expected = outcome(compute(adapted, "reference"), x)
    for form in ("added", "apart", "auto"):
        assert_alike(outcome(compute(adapted, form), x), expected, 1e-6)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(base_dtype):
    adapted, x = model().to(base_dtype), drawn(64, IN, seed=5, dtype=base_dtype).requires_grad_()
    for module in adapted.modules():
        if isinstance(module, dual_lora.DualLoraFactors):
            module.float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = outcome(compute(adapted, "reference"), x)
        for form in ("added", "apart"):
            assert_alike(outcome(compute(adapted, form), x), expected, 0.03)


def test_under_activation_checkpointing():
    """The recomputed forward rounds as the first one did."""
    adapted, x = model().to(torch.bfloat16), drawn(64, IN, seed=5, dtype=torch.bfloat16).requires_grad_()
    expected = outcome(adapted, x)
    # Whatever torch's generators do: they are not restored here.
    found = outcome(adapted, x, partial(checkpoint, adapted, use_reentrant=False, preserve_rng_state=False))
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(dtype):
    torch._dynamo.reset()
    adapted, x = model().to(dtype), drawn(6, IN, seed=5, dtype=dtype).requires_grad_()
    expected = outcome(adapted, x)
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    assert_alike(outcome(adapted, x, compiled), expected, EPS[dtype])
    # Steps change what is rounded, and compile nothing.
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for parameter in trained(adapted):
            parameter.mul_(1.01)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_alike(outcome(adapted, x, compiled), outcome(adapted, x), EPS[dtype])


def test_evaluation_in_half_precision_is_exact_and_repeats():
    adapted, x = model().to(torch.bfloat16).eval(), drawn(6, IN, seed=5, dtype=torch.bfloat16)
    assert torch.equal(adapted(x), adapted(x))
    reference = compute(adapted, "reference")(x)
    close(compute(adapted, "auto")(x), reference.double(), EPS[torch.bfloat16])


def test_training_in_half_precision_repeats_until_the_factors_change():
    adapted, x = model().to(torch.bfloat16), drawn(6, IN, seed=5, dtype=torch.bfloat16)
    first = adapted(x)
    assert torch.equal(adapted(x), first)
    matrix = [built_of(adapted)]
    with torch.no_grad():
        trained(adapted)[0][0, 0] *= 1.01
    assert not torch.equal(built_of(adapted), matrix[0])


def built_of(adapted: nn.Module) -> Tensor:
    """Of the first layer, where the first column of A does not count."""
    layer = adapted.base_model.model[0]
    own = layer.factors("default")
    fs = tuple(gated.wide(f.detach()) for f in (own.lora_A, own.lora_B, own.lora_C, own.lora_D))
    return built(layer.weight.detach(), fs, own.scaling)[:, 1:]


def test_dropout_reads_its_own_input():
    adapted, x = model(lora_dropout=0.5), drawn(4, IN, seed=5, dtype=torch.float32).requires_grad_()
    torch.manual_seed(1)
    expected = outcome(compute(adapted, "reference"), x)
    for form in ("auto", "added"):
        torch.manual_seed(1)
        assert_alike(outcome(compute(adapted, form), x), expected, 1e-6)


def kept_for_backward(adapted: nn.Module, x: Tensor) -> list[Tensor]:
    """What autograd saves, parameters left out."""
    own = {t.untyped_storage().data_ptr() for t in adapted.parameters()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapted(x)
    return [t for t in saved if t.untyped_storage().data_ptr() not in own]


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.1}, {"compute": "apart"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_as_large_as_the_weight_is_kept(dtype, settings, autocast):
    tokens = 4
    adapted, x = model(**settings).to(dtype), drawn(tokens, IN, seed=5, dtype=dtype).requires_grad_()
    if autocast and settings:
        # The frozen layer itself keeps a cast copy of its weight then.
        dtype, adapted = torch.bfloat16, adapted.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert max(t.numel() for t in kept_for_backward(adapted, x)) == tokens * IN
        reference = kept_for_backward(compute(adapted, "reference"), x)
    assert sum(t.numel() == OUT * IN for t in reference) >= 3 * 2


@pytest.mark.parametrize("change", ["hook", "pre-hook", "patched", "trained"])
def test_a_base_layer_that_others_watch_is_called(change):
    adapted = model()
    layer, calls = adapted.base_model.model[0].base_layer, []
    if change == "hook":
        layer.register_forward_hook(lambda *_: calls.append(1))
    elif change == "pre-hook":
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    elif change == "patched":  # as accelerate does it
        forward = layer.forward
        layer.forward = lambda x: (calls.append(1), forward(x))[1]
    else:
        layer.weight.requires_grad_()
        adapted(drawn(2, IN, seed=5, dtype=torch.float32)).sum().backward()
        assert layer.weight.grad.any()
        return
    adapted(drawn(2, IN, seed=5, dtype=torch.float32))
    assert calls == [1]


def test_conv1d():
    adapted, x = model(nn.Sequential(Conv1D(OUT, IN))), drawn(2, 3, IN, seed=5, dtype=torch.float32).requires_grad_()
    expected = outcome(compute(adapted, "reference"), x)
    assert_alike(outcome(compute(adapted, "added"), x), expected, 1e-6)


def test_wrong_dtypes_are_left_to_the_base_layer_to_refuse():
    with pytest.raises(RuntimeError, match="dtype"):
        model()(drawn(2, IN, seed=5, dtype=torch.bfloat16))


def test_says_once_which_form_runs_and_why(caplog):
    dual_lora._announce.cache_clear()
    adapted, x = model(), drawn(2, IN, seed=5, dtype=torch.float32)
    with caplog.at_level(logging.INFO, logger="loraplex"):
        for _ in range(3):
            adapted(x)
        compute(adapted, "apart")(x)
        adapted.base_model.model[0].base_layer.register_forward_hook(lambda *_: None)
        compute(adapted, "auto")(x)
    assert [record.message for record in caplog.records] == [
        "Dual LoRA computes x (W + ΔW)ᵀ by torch tiles on cpu: one product for each layer.",
        "Dual LoRA computes x Wᵀ + x ΔWᵀ by torch tiles on cpu: compute='apart'.",
        "Dual LoRA computes x Wᵀ + x ΔWᵀ by torch tiles on cpu: the base weight is quantised, sharded, trained, or has "
        "hooks.",
    ]


def test_unknown_form():
    with pytest.raises(ValueError, match="compute"):
        DualLoraConfig(compute="fast")


# Evaluation with ΔW kept


def test_delta_is_kept_in_evaluation_only_and_follows_changes(monkeypatch):
    made = []
    make = dual_lora.delta_weight
    monkeypatch.setattr(dual_lora, "delta_weight", lambda *a: (made.append(1), make(*a))[1])
    adapted, x = model(nn.Sequential(nn.Linear(IN, OUT)), cache_delta=True), drawn(2, IN, seed=5, dtype=torch.float32)
    factors_ = next(m for m in adapted.modules() if isinstance(m, dual_lora.DualLoraFactors))

    def check(times: int) -> None:
        made.clear()
        for _ in range(2):
            close(adapted(x), compute(adapted, "reference")(x).double(), 1e-6)
            compute(adapted, "auto")
        assert len(made) == times

    check(0)  # training
    adapted.eval()
    check(0)  # with gradients
    with torch.no_grad():
        check(1)
        check(0)
        factors_.lora_C.mul_(-1)
        check(1)
        factors_.shared.warmup.copy_(torch.tensor([1, 3]))
        check(1)
        with torch.autocast("cpu", torch.bfloat16):
            assert adapted(x).dtype == torch.bfloat16
        check(1)
        adapted.train().eval()
        check(1)
    assert {key.rpartition(".")[2] for key in adapted.state_dict() if "lora" in key} == {
        *("lora_A", "lora_B", "lora_C", "lora_D"),
        "warmup",
    }


# A whole model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_of_a_step_is_loras_and_one_layers_buffer(monkeypatch, dtype):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from memory import allocations

    layers, wide, narrow, tokens, r = 6, 320, 192, 32, 4

    def extra(config: PeftConfig) -> int:
        torch.manual_seed(0)
        base = nn.Sequential(*(nn.Linear(*shape) for _ in range(layers) for shape in ((narrow, wide), (wide, narrow))))
        adapted = get_peft_model(base.to(dtype), config, autocast_adapter_dtype=False).train()
        x = torch.randn(tokens, narrow, dtype=dtype, requires_grad=True)
        adapted(x).float().sum().backward()  # what is allocated once only does not count
        adapted.zero_grad()
        x.grad = None
        with allocations(x.device) as found:
            adapted(x).float().sum().backward()
        return found.peak

    targets = [str(i) for i in range(2 * layers)]
    lora = extra(LoraConfig(r=r, target_modules=targets))
    ours = extra(DualLoraConfig(r=r, target_modules=targets, init_weights=False))
    naive = extra(DualLoraConfig(r=r, target_modules=targets, init_weights=False, compute="reference"))
    buffer = wide * narrow * dtype.itemsize
    # Beside the buffer: a few float32 tiles, the factors in float32, and dx of one layer.
    assert ours - lora < buffer + 12 * products._CPU_TILE * 4 + 10 * r * (wide + narrow) * 4
    assert naive - lora > 2 * layers * 3 * buffer
