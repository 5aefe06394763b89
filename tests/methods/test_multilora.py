"""MultiLoRA: h = W x + (α/r) · Σᵢ cᵢ ⊙ (Bᵢ Aᵢ x)."""

from itertools import combinations

import pytest
import torch
from naive import IN, OUT, TOKENS, Stack, adapt, base_weight, close, draw, factors, leaf, matvec, randomize
from peft import LoraConfig, get_peft_model

from loraplex import MultiLoraConfig

R, ALPHA = 2, 5


def make(n=3, granularity="channel", **kwargs):
    config = MultiLoraConfig(
        **{"r": R, "lora_alpha": ALPHA, "num_modules": n, "scaling_granularity": granularity, **kwargs}
    )
    model = adapt(config)
    randomize(model)
    return model


def naive(W, A, B, c, x, r, scale):
    """A: n matrices (r, in); B: n matrices (out, r); c: n vectors (out) or n scalars; x (tokens, in)."""
    rows = []
    for x_t in x:
        h = matvec(W, x_t)
        for A_i, B_i, c_i in zip(A, B, c, strict=True):
            assert A_i.shape[0] == B_i.shape[1] == r
            update = matvec(B_i, matvec(A_i, x_t))
            for o in range(len(h)):
                h[o] = h[o] + scale * (c_i[o] if c_i.ndim else c_i) * update[o]
        rows.append(torch.stack(h))
    return torch.stack(rows)


def split(f, n, granularity):
    """The n modules' own matrices, as leaves."""
    A = [leaf(f.lora_A[i * R : (i + 1) * R]) for i in range(n)]
    B = [leaf(f.lora_B[:, i * R : (i + 1) * R]) for i in range(n)]
    c = [leaf(f.lora_scaling[i] if granularity == "channel" else f.lora_scaling[i].squeeze()) for i in range(n)]
    return A, B, c


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("granularity", ["channel", "module"])
def test_forward_and_gradients_equal_the_loop(granularity, n, rslora):
    model = make(n, granularity, use_rslora=rslora)
    f = factors(model)
    x, weight = leaf(draw(TOKENS, IN)), draw(TOKENS, OUT, seed=3)
    A, B, c = split(f, n, granularity)
    x_ref = leaf(x)
    scale = ALPHA / 2**0.5 if rslora else ALPHA / 2
    expected = naive(base_weight(model).detach(), A, B, c, x_ref, R, scale)
    actual = model(x[None])[0]
    close(actual, expected)
    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    close(x.grad, x_ref.grad)
    close(f.lora_A.grad, torch.cat([a.grad for a in A]))
    close(f.lora_B.grad, torch.cat([b.grad for b in B], dim=1))
    close(f.lora_scaling.grad, torch.stack([ci.grad for ci in c]).reshape(f.lora_scaling.shape))


@pytest.mark.parametrize("granularity", ["channel", "module"])
def test_delta_weight_is_the_sum_of_the_modules(granularity):
    model = make(3, granularity)
    A, B, c = split(factors(model), 3, granularity)
    expected = torch.zeros(OUT, IN, dtype=torch.float64)
    for i in range(3):
        for o in range(OUT):
            for k in range(R):
                for j in range(IN):
                    scale = c[i][o] if granularity == "channel" else c[i]
                    expected[o, j] += (ALPHA / R) * (scale * B[i][o, k] * A[i][k, j]).item()
    close(factors(model).delta_weight().detach(), expected)


@pytest.mark.parametrize("granularity", ["channel", "module"])
def test_equals_a_plain_lora_of_rank_n_times_r(granularity):
    n = 3
    model = make(n, granularity)
    f = factors(model)
    A, B, c = split(f, n, granularity)
    base = Stack(1).double()
    base.load_state_dict({"layers.0.q.weight": base_weight(model)})
    # lora_alpha n times as large: LoRA divides by its rank n·r.
    lora = get_peft_model(base, LoraConfig(r=n * R, lora_alpha=n * ALPHA, target_modules=["q"]))
    q = lora.base_model.model.layers[0].q
    with torch.no_grad():
        q.lora_A["default"].weight.copy_(torch.cat(A))
        q.lora_B["default"].weight.copy_(
            torch.cat([(ci[:, None] if ci.ndim else ci) * b for ci, b in zip(c, B, strict=True)], dim=1)
        )
    x = draw(1, TOKENS, IN)
    close(model(x), lora(x))
    assert torch.linalg.matrix_rank(f.delta_weight()) == min(n * R, IN, OUT)


@pytest.mark.parametrize("granularity", ["channel", "module"])
def test_only_the_scaling_gets_a_gradient_at_the_start(granularity):
    model = adapt(MultiLoraConfig(r=R, lora_alpha=ALPHA, scaling_granularity=granularity))
    f, x = factors(model), draw(1, TOKENS, IN)
    out = model(x)
    assert torch.equal(out, Stack.forward(model.unload(), x))
    (out * draw(1, TOKENS, OUT, seed=3)).sum().backward()
    assert torch.count_nonzero(f.lora_A.grad) == torch.count_nonzero(f.lora_B.grad) == 0
    assert torch.count_nonzero(f.lora_scaling.grad) == f.lora_scaling.numel()


def test_start_is_kaiming_uniform_with_a_draw_per_module():
    n, r, size = 3, 4, 400
    config = MultiLoraConfig(r=r, lora_alpha=ALPHA, num_modules=n)
    f = factors(adapt(config, in_features=size, out_features=size, dtype=torch.float32))
    assert torch.count_nonzero(f.lora_scaling) == 0
    # LoRA's A: U(−1/√fan_in, 1/√fan_in); fan_in is `in` for A_i (r, in) and r for B_i (out, r).
    modules = [f.lora_A[i * r : (i + 1) * r] for i in range(n)]
    modules_B = [f.lora_B[:, i * r : (i + 1) * r] for i in range(n)]
    for bound, matrices in ((1 / size**0.5, modules), (1 / r**0.5, modules_B)):
        for M in matrices:
            assert 0.98 * bound < M.abs().max() <= bound
            assert M.mean().abs() < 0.06 * bound
            assert M.std().item() == pytest.approx(bound / 3**0.5, rel=0.06)
        for one, other in combinations(matrices, 2):
            correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
            assert correlation.abs() < 0.1


@pytest.mark.parametrize(("granularity", "width"), [("channel", OUT), ("module", 1)])
def test_parameter_count(granularity, width):
    model = make(3, granularity)
    assert model.get_nb_trainable_parameters()[0] == 3 * R * (IN + OUT) + 3 * width


def test_dropout_reaches_the_update_only_while_training():
    model = make(lora_dropout=0.5)
    x = draw(1, TOKENS, IN)
    model.eval()
    close(model(x), make()(x))
    model.train()
    torch.manual_seed(0)
    outputs = torch.stack([model(x) for _ in range(4000)]).detach()
    assert not torch.equal(outputs[0], outputs[1])
    # Inverted dropout: the update's mean is the update without dropout.
    error = outputs.std(0) / 4000**0.5
    assert ((outputs.mean(0) - make()(x)).abs() < 5 * error).all()
