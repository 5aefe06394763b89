"""MASA: h_l = W_l x + (α/r) · B_l · mixᵢ(A_{g(l),i} x), g(l) the group of adjacent layers."""

import math
from itertools import combinations

import pytest
import torch
from naive import (
    IN,
    OUT,
    TOKENS,
    Stack,
    adapt,
    base_weight,
    close,
    draw,
    factors,
    layer,
    leaf,
    matvec,
    randomize,
)

from loraplex import MasaConfig

R, N, ALPHA = 2, 3, 5
MIXINGS = ["router", "sum", "concat"]


def make(mixing, depth=5, share=2, n=N, random=True, **kwargs):
    roles = kwargs.pop("roles", ("q",))
    sizes = {key: kwargs.pop(key) for key in ("in_features", "out_features") if key in kwargs}
    config = MasaConfig(
        **{"r": R, "lora_alpha": ALPHA, "num_experts": n, "share_layers": share, "expert_mixing": mixing, **kwargs}
    )
    model = adapt(config, depth=depth, roles=roles, **sizes)
    if random:
        randomize(model)
    return model


def naive_layer(W, experts, B, router, x, mixing, scale):
    """experts: n matrices (r, in); B (out, r), or (out, n·r) with "concat"; router (n, in) or None; x (tokens, in)."""
    rows = []
    for x_t in x:
        outputs = [matvec(A_i, x_t) for A_i in experts]
        rank = len(outputs[0])
        if mixing == "concat":
            mixed = [value for output in outputs for value in output]
        else:
            weights = [torch.ones((), dtype=torch.float64)] * len(experts)
            if mixing == "router":
                powers = [logit.exp() for logit in matvec(router, x_t)]
                weights = [power / sum(powers) for power in powers]
            mixed = []
            for k in range(rank):
                total = torch.zeros((), dtype=torch.float64)
                for weight, output in zip(weights, outputs, strict=True):
                    total = total + weight * output[k]
                mixed.append(total)
        rows.append(torch.stack([h + scale * u for h, u in zip(matvec(W, x_t), matvec(B, mixed), strict=True)]))
    return torch.stack(rows)


def expert_list(f, n=N):
    return [f.lora_A[i * f.r : (i + 1) * f.r] for i in range(n)]


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize(
    ("depth", "share", "groups"),
    [(5, 2, [0, 0, 1, 1, 2]), (5, 3, [0, 0, 0, 1, 1]), (3, 1, [0, 1, 2]), (2, 4, [0, 0])],
)
def test_forward_and_gradients_equal_the_loop(mixing, depth, share, groups):
    model = make(mixing, depth, share)
    x, weight = leaf(draw(depth, TOKENS, IN)), draw(depth, TOKENS, OUT, seed=3)
    x_ref = leaf(x)
    # One set of experts per group: layers of a group read, and send gradients to, the same leaves.
    experts = {}
    for index, group in enumerate(groups):
        experts.setdefault(group, [leaf(A) for A in expert_list(factors(model, index))])
    B = [leaf(factors(model, index).lora_B) for index in range(depth)]
    routers = [leaf(factors(model, i).lora_router) if mixing == "router" else None for i in range(depth)]
    expected = torch.stack(
        [
            naive_layer(base_weight(model, i).detach(), experts[g], B[i], routers[i], x_ref[i], mixing, ALPHA / R)
            for i, g in enumerate(groups)
        ]
    )
    actual = model(x)
    close(actual, expected)
    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    close(x.grad, x_ref.grad)
    for index, group in enumerate(groups):
        f = factors(model, index)
        assert f.lora_B.shape == (OUT, N * R if mixing == "concat" else R)
        close(f.lora_B.grad, B[index].grad)
        close(f.lora_A.grad, torch.cat([A.grad for A in experts[group]]))
        if mixing == "router":
            close(f.lora_router.grad, routers[index].grad)


def test_rslora_divides_by_the_root_of_the_rank():
    model = make("sum", depth=1, use_rslora=True)
    f, x = factors(model), draw(1, TOKENS, IN)
    expected = naive_layer(base_weight(model), expert_list(f), f.lora_B, None, x[0], "sum", ALPHA / math.sqrt(R))
    close(model(x)[0], expected)


def test_groups_follow_the_depth_not_the_spelling():
    model = make("sum", depth=12, share=2)
    for index in range(12):
        together = [i for i in range(12) if factors(model, i).lora_A is factors(model, index).lora_A]
        assert together == [index - index % 2, index - index % 2 + 1]


def test_families_do_not_share():
    model = make("sum", depth=2, share=2, roles=("q", "v"), target_modules=["q", "v"])
    q, v = factors(model, 0, "q"), factors(model, 0, "v")
    assert q.lora_A is factors(model, 1, "q").lora_A
    assert v.lora_A is factors(model, 1, "v").lora_A
    assert q.lora_A is not v.lora_A
    (model(draw(2, TOKENS, IN), role="q") ** 2).sum().backward()
    assert q.lora_A.grad is not None
    assert v.lora_A.grad is None


def test_as_many_layers_share_as_there_are_experts_unless_told():
    model = adapt(MasaConfig(r=R, lora_alpha=ALPHA, num_experts=3), depth=7)
    groups = {id(factors(model, i).lora_A) for i in range(7)}
    assert len(groups) == math.ceil(7 / 3)
    assert factors(model, 0).lora_A is factors(model, 2).lora_A is not factors(model, 3).lora_A


# Start


@pytest.mark.parametrize("mixing", MIXINGS)
def test_starts_at_the_base_model(mixing):
    model = make(mixing, random=False)
    assert all(torch.count_nonzero(factors(model, i).lora_B) == 0 for i in range(5))
    x = draw(5, TOKENS, IN)
    assert torch.equal(model(x), Stack.forward(model.unload(), x))


def test_experts_start_kaiming_uniform_with_different_draws():
    size = 400
    model = make("sum", depth=2, share=1, random=False, in_features=size)
    matrices = [A for index in range(2) for A in expert_list(factors(model, index))]
    for A in matrices:
        assert 0.97 / size**0.5 < A.abs().max() <= 1 / size**0.5
        assert A.std().item() == pytest.approx(1 / size**0.5 / 3**0.5, rel=0.07)
    for one, other in combinations(matrices, 2):
        assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs() < 0.15


def test_router_starts_uniform():
    model = make("router", depth=1, random=False)
    f, x = factors(model), draw(1, TOKENS, IN)
    assert torch.count_nonzero(f.lora_router) == 0
    with torch.no_grad():
        f.lora_B.copy_(draw(OUT, R, seed=4))
    mean = sum(expert_list(f)) / N
    close(model(x)[0], naive_layer(base_weight(model), [mean], f.lora_B, None, x[0], "sum", ALPHA / R))


# Mixing


def test_sum_is_linearly_equivalent_to_one_matrix():
    model = make("sum", depth=1)
    f, x = factors(model), draw(1, TOKENS, IN)
    total = expert_list(f)[0] + expert_list(f)[1] + expert_list(f)[2]
    close(model(x)[0], naive_layer(base_weight(model), [total], f.lora_B, None, x[0], "sum", ALPHA / R))
    (model(x) ** 2).sum().backward()
    first, *others = f.lora_A.grad.view(N, R, IN)
    for other in others:
        close(other, first)


@pytest.mark.parametrize(("mixing", "rank"), [("sum", R), ("concat", N * R)])
def test_rank_and_value_of_the_constant_update(mixing, rank):
    model = make(mixing, depth=1, in_features=9, out_features=8)
    f = factors(model)
    delta = f.delta_weight().detach()
    assert torch.linalg.matrix_rank(delta) == rank
    for j in range(9):
        unit = torch.eye(9, dtype=torch.float64)[j : j + 1]
        zero = torch.zeros_like(base_weight(model))
        close(delta[:, j], naive_layer(zero, expert_list(f), f.lora_B, None, unit, mixing, ALPHA / R)[0].detach())


def test_router_merges_with_a_mean_gate_only():
    model = make("router", depth=1)
    f, W = factors(model), base_weight(model).detach().clone()
    with pytest.raises(ValueError, match=r"gates depend on the input.*calibrate"):
        model.merge_adapter()
    assert torch.equal(layer(model, 0).weight, W)
    gate = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    f.mean_gate = gate
    mean = sum(g * A for g, A in zip(gate, expert_list(f), strict=True))
    x = draw(1, TOKENS, IN)
    expected = naive_layer(W, [mean], f.lora_B, None, x[0], "sum", ALPHA / R)
    model.merge_adapter()
    close(model(x)[0], expected)


# Dropout


def opposite_experts(mixing, p):
    """Two experts with A₂ = −A₁: their sum vanishes exactly unless each has a mask of its own."""
    model = make(mixing, depth=1, n=2, lora_dropout=p)
    with torch.no_grad():
        first, second = expert_list(factors(model), 2)
        second.copy_(-first)
    return model


def test_sum_draws_a_mask_per_expert():
    model, x = opposite_experts("sum", 0.5), draw(1, TOKENS, IN)
    base = Stack.forward(model.base_model.model.eval(), x)
    close(base, x @ base_weight(model).T)
    model.train()
    torch.manual_seed(0)
    assert (model(x) - base).abs().max() > 0.1
    (model(x) ** 2).sum().backward()
    first, second = factors(model).lora_A.grad.view(2, R, IN)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("mixing", ["sum", "concat"])
def test_dropout_keeps_the_mean_and_is_off_in_evaluation(mixing):
    model, x = make(mixing, depth=1, lora_dropout=0.3), draw(1, TOKENS, IN)
    exact = make(mixing, depth=1)(x).detach()
    model.eval()
    close(model(x).detach(), exact)
    model.train()
    torch.manual_seed(0)
    outputs = torch.stack([model(x).detach() for _ in range(4000)])
    assert ((outputs.mean(0) - exact).abs() < 5 * outputs.std(0) / 4000**0.5).all()
    assert (outputs.std(0) > 0).all()


# Parameters


@pytest.mark.parametrize(("depth", "share"), [(6, 3), (5, 2), (5, 3), (2, 4)])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_parameter_count(mixing, depth, share):
    width = N * R if mixing == "concat" else R
    expected = math.ceil(depth / share) * N * R * IN + depth * width * OUT
    expected += depth * N * IN if mixing == "router" else 0
    assert make(mixing, depth, share).get_nb_trainable_parameters()[0] == expected


def test_sum_with_a_group_of_n_layers_has_the_count_of_lora():
    depth = 2 * N
    lora = depth * R * (IN + OUT)
    assert make("sum", depth, share=N).get_nb_trainable_parameters()[0] == lora
    assert make("router", depth, share=N).get_nb_trainable_parameters()[0] == lora + depth * N * IN
