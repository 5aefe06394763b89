"""Dual LoRA: ΔW = α/√(r₁r₂) · ReLU(B A) ⊙ Sign(D C), Sign(0) = −1, straight-through gradient clipped to [−1, 1]."""

import logging
import math

import pytest
import torch
from naive import IN, OUT, TOKENS, Stack, adapt, base_weight, close, draw, factors, layer, leaf, randomize
from transformers import TrainerControl, TrainerState

import loraplex
from loraplex import DualLoraConfig, ScheduleCallback

R1, R2, ALPHA = 3, 2, 5
SCALE = ALPHA / math.sqrt(R1 * R2)


def config(**kwargs):
    return DualLoraConfig(**{"r_magnitude": R1, "r_direction": R2, "lora_alpha": ALPHA, "warmup_steps": 4, **kwargs})


def make(depth=1, dtype=torch.float64, **kwargs):
    """Random factors; one row of BA is zero, another row of DC."""
    model = adapt(config(**kwargs), depth=depth, dtype=dtype)
    randomize(model)
    with torch.no_grad():
        for index in range(depth):
            factors(model, index).lora_B[0] = 0
            factors(model, index).lora_D[1] = 0
    return model


def product(left, right):
    """left @ right, one number at a time."""
    rows, inner, columns = left.shape[0], left.shape[1], right.shape[1]
    return torch.tensor(
        [
            [sum(left[i, k].item() * right[k, j].item() for k in range(inner)) for j in range(columns)]
            for i in range(rows)
        ],
        dtype=torch.float64,
    )


def each(function, *matrices):
    """function applied to the numbers of matrices of one shape."""
    rows, columns = matrices[0].shape
    values = [[float(function(*(m[i, j].item() for m in matrices))) for j in range(columns)] for i in range(rows)]
    return torch.tensor(values, dtype=torch.float64)


def relu(p):
    return p if p > 0 else 0


def sign(q):
    return 1 if q > 0 else -1


def clip(g):
    return max(-1, min(1, g))


def naive_delta(f, factor=1.0):
    P, Q = product(f.lora_B, f.lora_A), product(f.lora_D, f.lora_C)
    return each(lambda p, q: factor * SCALE * relu(p) * sign(q), P, Q)


def naive_gradients(f, W, x, dY, factor=1.0):
    """Gradients from the formulas; s includes the warm-up factor."""
    s = factor * SCALE
    P, Q = product(f.lora_B, f.lora_A), product(f.lora_D, f.lora_C)
    G = product(dY.T, x)
    dP = each(lambda g, p, q: s * g * sign(q) * (p > 0), G, P, Q)
    unclipped = each(lambda g, p: s * g * relu(p), G, P)
    dQ = each(clip, unclipped)
    return {
        "lora_A": product(f.lora_B.T, dP),
        "lora_B": product(dP, f.lora_A.T),
        "lora_C": product(f.lora_D.T, dQ),
        "lora_D": product(dQ, f.lora_C.T),
        "x": product(dY, W + naive_delta(f, factor)),
        "unclipped": unclipped,
    }


def check(model, factor, weight_scale=1.0):
    """Forward and all gradients of a one-layer model against the formulas; returns dQ before clipping."""
    f, W = factors(model), base_weight(model).detach()
    x, dY = leaf(draw(TOKENS, IN)), weight_scale * draw(TOKENS, OUT, seed=3)
    out = model(x[None])[0]
    close(out, product(x, (W + naive_delta(f, factor)).T))
    (out * dY).sum().backward()
    expected = naive_gradients(f, W, x, dY, factor)
    close(x.grad, expected["x"])
    for name in ("lora_A", "lora_B", "lora_C", "lora_D"):
        close(getattr(f, name).grad, expected[name])
    return expected["unclipped"].abs()


@pytest.mark.parametrize("weight_scale", [1.0, 1e-3, 1e3])
def test_forward_and_gradients_equal_the_formulas(weight_scale):
    unclipped = check(make(init_weights=False), factor=1.0, weight_scale=weight_scale)
    open_gates = unclipped[unclipped > 0]
    if weight_scale == 1.0:
        assert (open_gates > 1).any()
        assert (open_gates < 1).any()
    else:
        assert (open_gates > 1).all() if weight_scale > 1 else (open_gates < 1).all()


def test_sign_of_zero_is_minus_one_and_a_closed_gate_passes_nothing():
    model = make(init_weights=False)
    f = factors(model)
    delta = f.delta_weight().detach()
    P = product(f.lora_B, f.lora_A)
    # Row 1 has D C = 0 and an open gate somewhere; row 0 has B A = 0.
    assert (P[1] > 0).any()
    close(delta[1], -SCALE * P[1].clamp(min=0))
    assert torch.count_nonzero(delta[0]) == 0
    (model(draw(1, TOKENS, IN)) ** 2).sum().backward()
    assert torch.count_nonzero(f.lora_B.grad[0]) == torch.count_nonzero(f.lora_D.grad[0]) == 0
    assert torch.count_nonzero(f.lora_D.grad[1]) > 0


@pytest.mark.parametrize("warmup_steps", [4, 3])
def test_warmup_scales_the_update_and_its_gradient_inside_the_clip(warmup_steps):
    for steps_done in range(warmup_steps + 3):
        model = make(warmup_steps=warmup_steps)
        for _ in range(steps_done):
            loraplex.step(model)
        factor = min(1, steps_done / warmup_steps)
        unclipped = check(model, factor)
        # The clip must bite somewhere, or inside and outside it would be the same.
        assert steps_done == 0 or (unclipped > 1).any()


def test_scale_is_alpha_over_the_geometric_mean_of_the_ranks():
    close(factors(make(init_weights=False)).delta_weight().detach().abs().max() / SCALE, largest_magnitude())


def largest_magnitude():
    f = factors(make(init_weights=False))
    return product(f.lora_B, f.lora_A).clamp(min=0).max()


def test_starts_at_the_base_model_with_gaussian_factors():
    model = adapt(DualLoraConfig(r=8, lora_alpha=ALPHA, init_std=0.05), in_features=300, out_features=200)
    f = factors(model)
    for M in (f.lora_A, f.lora_B, f.lora_C, f.lora_D):
        assert M.mean().abs().item() < 0.01
        assert M.std().item() == pytest.approx(0.05, rel=0.1)
        assert (M.abs() > 2 * 0.05).double().mean().item() == pytest.approx(0.0455, abs=0.02)
    assert not torch.equal(f.lora_A, f.lora_C)
    x = draw(1, TOKENS, 300)
    out = model(x)
    assert torch.equal(out, Stack.forward(model.unload(), x))


@pytest.mark.parametrize(("r", "ranks"), [(8, (4, 4)), (7, {3, 4}), (2, (1, 1))])
def test_default_ranks_share_r_between_the_groups(r, ranks):
    model = adapt(DualLoraConfig(r=r, lora_alpha=ALPHA))
    f = factors(model)
    r1, r2 = f.lora_A.shape[0], f.lora_C.shape[0]
    assert f.lora_B.shape == (OUT, r1)
    assert f.lora_D.shape == (OUT, r2)
    assert {r1, r2} == set(ranks)
    # As many parameters as a LoRA of rank r.
    assert model.get_nb_trainable_parameters()[0] == r * (IN + OUT)
    assert f.scaling == pytest.approx(ALPHA / math.sqrt(r1 * r2))


def signs_that_bfloat16_would_lose():
    """A float32 model with W = 0, BA > 0 and D C = ±2⁻¹², which vanishes when D and C are rounded to bfloat16."""
    model = adapt(
        config(r_magnitude=1, r_direction=2, init_weights=False), dtype=torch.float32, in_features=8, out_features=6
    )
    f = factors(model)
    k = torch.tensor([1.0, -1, 1, 1, -1, -1, 1, -1])
    with torch.no_grad():
        base_weight(model).zero_()
        f.lora_A.fill_(1)
        f.lora_B.fill_(1)
        f.lora_C.copy_(torch.stack([1 + k * 2**-12, torch.ones(8)]))
        f.lora_D.copy_(torch.tensor([[1.0, -1.0]]).expand(6, 2))
    return model, k.expand(6, 8)


def test_signs_do_not_depend_on_autocast():
    model, signs = signs_that_bfloat16_would_lose()
    x = torch.eye(8)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(x)[0].T
        merged_under_autocast = factors(model).delta_weight()
    assert torch.equal(autocast.sign().float(), signs)
    assert torch.equal(merged_under_autocast.sign(), signs)
    assert torch.equal(model(x)[0].T.sign(), signs)
    model.merge_adapter()
    assert torch.equal(layer(model, 0).weight.sign(), signs)


def test_gradient_of_the_direction_is_the_same_under_autocast():
    grads = []
    for enabled in (False, True):
        model, _ = signs_that_bfloat16_would_lose()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = model(torch.eye(8)[None])
        # Powers of two: nothing is rounded but what should not be.
        (out.float() * 2**-3).sum().backward()
        grads.append(factors(model).lora_C.grad)
    torch.testing.assert_close(*grads)


# The warm-up as training advances


def train(model, optimizer, steps, seed=5):
    x = draw(1, TOKENS, IN, seed=seed)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) ** 2).sum().backward()
        optimizer.step()


def warmup_factor(model):
    """The factor by which the update is scaled now, measured."""
    f = factors(model)
    full = naive_delta(f)
    ratio = f.delta_weight().detach()[full != 0] / full[full != 0]
    assert ratio.max().item() == pytest.approx(ratio.min().item(), abs=1e-6)
    return ratio.mean().item()


@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_step_advances_the_warmup(optimizer_cls):
    model = make()
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for done in range(7):
        assert warmup_factor(model) == pytest.approx(min(1, done / 4), abs=1e-6)
        train(model, optimizer, 1)


def test_gradient_accumulation_counts_once_per_update():
    model = make()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = draw(1, TOKENS, IN)
    for _ in range(2):
        for _ in range(5):
            (model(x) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert warmup_factor(model) == pytest.approx(0.5, abs=1e-6)


def test_one_explicit_step_beside_a_visible_optimizer_is_not_counted_twice():
    model = make()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    train(model, optimizer, 1)
    loraplex.step(model, optimizer)
    assert warmup_factor(model) == pytest.approx(0.25, abs=1e-6)


def test_warmup_as_a_fraction_of_the_run():
    model = make(warmup_steps=0.5)
    loraplex.set_total_steps(model, 10)
    factor = []
    for _ in range(7):
        factor.append(warmup_factor(model))
        loraplex.step(model)
    assert factor == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1], abs=1e-6)


def test_an_adapter_that_is_not_trained_keeps_its_warmup():
    model = make()
    loraplex.add_adapter(model, "other", config(target_modules=["q"]))
    other = layer(model, 0).factors("other")
    assert not any(p.requires_grad for p in other.parameters())
    # Optimizers are often given all parameters, trainable or not.
    train(model, torch.optim.SGD(model.parameters(), lr=1e-3), 4)
    assert warmup_factor(model) == pytest.approx(1)
    assert torch.count_nonzero(other.delta_weight()) == 0


# Guard rails of the schedule


def test_a_fraction_of_an_unknown_run_stops_the_first_step():
    model = make(warmup_steps=0.5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.raises(RuntimeError, match=r"warmup_steps=0\.5.*set_total_steps"):
        train(model, optimizer, 1)


def test_a_run_shorter_than_the_warmup_is_refused():
    with pytest.raises(ValueError, match=r"warmup_steps=4.*step 4.*only 3"):
        loraplex.set_total_steps(make(), 3)
    loraplex.set_total_steps(make(), 4)


def test_saving_in_the_middle_of_the_warmup_says_so(caplog, tmp_path):
    """A run that is shorter than the warm-up, and nothing else to tell."""
    model = make()
    with caplog.at_level(logging.WARNING, logger="loraplex"):
        model.save_pretrained(tmp_path)
        assert not caplog.records  # nothing was trained
        train(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3), 3)
        model.save_pretrained(tmp_path)
        assert "'default' is saved at step 3 of 4 of its warm-up (warmup_steps=4)" in caplog.text
        assert "75 % of its strength" in caplog.text
        caplog.clear()
        train(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3), 1)
        model.save_pretrained(tmp_path)
    assert not caplog.records


def hidden_optimizer(model):
    """As engines that flatten parameters do it: the optimizer steps on copies."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    copies = [p.detach().clone().requires_grad_() for p in parameters]
    optimizer = torch.optim.SGD(copies, lr=1e-3)

    def step():
        x = draw(1, TOKENS, IN, seed=5)
        (model(x) ** 2).sum().backward()
        for p, copy in zip(parameters, copies, strict=True):
            copy.grad, p.grad = p.grad, None
        optimizer.step()
        with torch.no_grad():
            for p, copy in zip(parameters, copies, strict=True):
                p.copy_(copy)

    return optimizer, step


def test_a_hidden_optimizer_stops_the_run():
    model = make()
    model.train()
    _, step = hidden_optimizer(model)

    def run():
        for _ in range(10):
            step()

    with pytest.raises(RuntimeError, match=r"ScheduleCallback.*loraplex\.step\(model\)"):
        run()


def test_a_hidden_optimizer_with_explicit_steps_trains():
    model = make()
    model.train()
    _, step = hidden_optimizer(model)
    for _ in range(10):
        step()
        loraplex.step(model)
    assert warmup_factor(model) == pytest.approx(1)


def test_a_hidden_optimizer_is_no_error_once_the_warmup_is_done():
    model = make()
    model.train()
    for _ in range(4):
        loraplex.step(model)
    _, step = hidden_optimizer(model)
    for _ in range(10):
        step()


def test_other_models_optimizers_are_no_concern():
    model, other = make(), torch.nn.Linear(3, 3)
    model.train()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(20):
        other(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert warmup_factor(model) == 0


def test_another_optimizer_beside_the_adapters_own_is_no_concern():
    model, other = make(), torch.nn.Linear(3, 3)
    model.train()
    own = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(10):
        (model(draw(1, TOKENS, IN)) ** 2).sum().backward()
        other(torch.ones(1, 3)).sum().backward()
        foreign.step()
        own.step()
    assert warmup_factor(model) == pytest.approx(1)


@pytest.mark.parametrize("visible", [False, True])
def test_callback_advances_once_per_step(visible):
    model = make(warmup_steps=0.4)
    model.train()
    callback, state = ScheduleCallback(), TrainerState(max_steps=10)
    if visible:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

        def step():
            train(model, optimizer, 1)
    else:
        optimizer, step = hidden_optimizer(model)
    callback.on_train_begin(None, state, None, model=model, optimizer=optimizer)
    factor = []
    for _ in range(6):
        factor.append(warmup_factor(model))
        step()
        callback.on_step_end(None, state, TrainerControl(), model=model, optimizer=optimizer)
    assert factor == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1], abs=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips_does_not_count(fused):
    model = make(dtype=torch.float32)
    loraplex.step(model)  # at factor 0 all gradients are zero, and none could overflow
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    x = draw(1, TOKENS, IN, dtype=torch.float32)
    counted = []
    for overflow in (False, True, False):
        optimizer.zero_grad()
        scaler.scale((model(x) ** 2).sum()).backward()
        if overflow:
            factors(model).lora_B.grad.fill_(float("inf"))
        before = factors(model).lora_A.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, factors(model).lora_A) is overflow
        counted.append(warmup_factor(model))
    assert counted == pytest.approx([0.5, 0.5, 0.75], abs=1e-5)
