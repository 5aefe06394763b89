"""ASLoRA: h_l = W_l x + (α/r) · B_{m(l)} A x; one A, and B's that merge while training runs.

Most cases are scripted: layers of 1×1 weights (or 1×2), whose B's an SGD step puts exactly where the case wants them.
"""

import copy

import pytest
import torch
from naive import IN, OUT, TOKENS, Stack, adapt, base_weight, close, draw, factors, leaf, matvec, randomize
from peft import get_peft_model
from torch import nn
from transformers import TrainerControl, TrainerState

import helpers as h
import loraplex
from loraplex import AsLoraConfig, ScheduleCallback
from loraplex.methods.aslora.merges import distance
from loraplex.methods.aslora.shared import AsLoraShared

R, ALPHA = 2, 5


def config(**kwargs):
    return AsLoraConfig(**{"r": R, "lora_alpha": ALPHA, "merge_start_step": 1, "merge_interval": 1, **kwargs})


def shared(model, adapter="default"):
    return model.base_model.model.loraplex_bank.shared(adapter)


def family(model, index=0, role="q"):
    return factors(model, index, role).family


def own_B(model, index, role="q"):
    """The B that the layer was born with."""
    return shared(model).B(family(model, index, role), index)


def merge_map(model, role="q"):
    """m(l), found by which B each layer reads: its ΔW changes with that B and no other."""
    depth = len(model.base_model.model.layers)
    result = []
    for reader in range(depth):
        f = factors(model, reader, role)
        before = f.delta_weight().detach().clone()
        changed = []
        for owner in range(depth):
            B = own_B(model, owner, role)
            with torch.no_grad():
                kept = B.detach().clone()
                B += 1
                if not torch.equal(f.delta_weight(), before):
                    changed.append(owner)
                B.copy_(kept)
        (only,) = changed
        result.append(only)
    return result


def history(model):
    return [(step, lower, upper) for step, _, lower, upper in shared(model).merge_history()]


class Script:
    """Puts the B's of a toy model at given values, by real optimizer steps."""

    def __init__(self, model, optimizer=None, role="q"):
        self.model, self.role = model, role
        self.optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)

    def step(self, *values):
        """One step after which layer l's own B is values[l], a number or a row."""
        for index, value in enumerate(values):
            B = own_B(self.model, index, self.role)
            B.grad = B.detach() - torch.as_tensor(value, dtype=B.dtype).reshape(B.shape)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for index, value in enumerate(values):
            B = own_B(self.model, index, self.role).detach()
            assert torch.equal(B, torch.as_tensor(value, dtype=B.dtype).reshape(B.shape))


def toy(depth, A=None, in_features=1, r=1, roles=("q",), **kwargs):
    """Layers of a (1, in) weight; A is [[1]] or as given."""
    model = adapt(
        config(r=r, target_modules=list(roles), **kwargs),
        depth=depth,
        in_features=in_features,
        out_features=1,
        roles=roles,
    )
    with torch.no_grad():
        for role in roles:
            f = factors(model, 0, role)
            f.lora_A.copy_(torch.ones(r, in_features) if A is None else torch.as_tensor(A))
    return model


def average(model, optimizer, index, role="q"):
    """The running average of the layer's B, wherever the optimizer's state keeps it."""
    state = optimizer.state[own_B(model, index, role)]
    (value,) = [value for key, value in state.items() if "average" in key]
    return next(iter(value.values())) if isinstance(value, dict) else value


# The equation


def naive_layer(W, A, B, x, scale):
    return torch.stack(
        [
            torch.stack([h + scale * u for h, u in zip(matvec(W, x_t), matvec(B, matvec(A, x_t)), strict=True)])
            for x_t in x
        ]
    )


def check_equation(model, mapping):
    """Forward and gradients against the loop, layer l reading B of mapping[l]."""
    depth = len(mapping)
    x, weight = leaf(draw(depth, TOKENS, IN)), draw(depth, TOKENS, OUT, seed=3)
    x_ref, A = leaf(x), leaf(factors(model).lora_A)
    B = [leaf(own_B(model, index)) for index in range(depth)]
    expected = torch.stack(
        [
            naive_layer(base_weight(model, index).detach(), A, B[owner], x_ref[index], ALPHA / R)
            for index, owner in enumerate(mapping)
        ]
    )
    actual = model(x)
    close(actual, expected)
    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    close(x.grad, x_ref.grad)
    close(factors(model).lora_A.grad, A.grad)
    for index in range(depth):
        grad = own_B(model, index).grad
        if index in mapping:
            close(grad, B[index].grad)
        else:
            # Zero, not None: DDP fails over a parameter that stops getting gradients.
            assert grad is not None
            assert torch.count_nonzero(grad) == 0


def test_forward_and_gradients_equal_the_loop_before_any_merge():
    model = adapt(config(), depth=3)
    randomize(model)
    check_equation(model, [0, 1, 2])


@pytest.mark.parametrize(("merges", "mapping"), [(1, [0, 2, 2, 3]), (2, [2, 2, 2, 3]), (3, [3, 3, 3, 3])])
def test_forward_and_gradients_equal_the_loop_after_merges(merges, mapping):
    model = adapt(config(num_merges=merges), depth=4)
    randomize(model)
    with torch.no_grad():
        for index, offset in enumerate([0, 5, 6, 20]):
            own_B(model, index).copy_(draw(OUT, R, seed=9) + offset)
    for _ in range(6):
        loraplex.step(model)
    randomize(model)
    check_equation(model, mapping)


def test_A_is_one_for_the_family_and_another_for_another_family():
    model = toy(3, roles=("q", "v"))
    assert factors(model, 0).lora_A is factors(model, 1).lora_A is factors(model, 2).lora_A
    assert factors(model, 0, "v").lora_A is factors(model, 2, "v").lora_A is not factors(model, 0).lora_A


def test_starts_as_lora_and_at_the_base_model():
    model = adapt(config(r=4), depth=3, in_features=400, out_features=6)
    A = factors(model).lora_A
    assert 0.97 / 20 < A.abs().max() <= 1 / 20
    assert A.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.07)
    assert all(torch.count_nonzero(own_B(model, index)) == 0 for index in range(3))
    x = draw(3, TOKENS, 400)
    assert torch.equal(model(x), Stack.forward(model.unload(), x))


def test_parameter_count():
    assert adapt(config(), depth=5).get_nb_trainable_parameters()[0] == R * IN + 5 * R * OUT


# Running averages


def test_averages_are_the_mean_over_all_steps():
    model = toy(3, merge_start_step=100)
    script = Script(model)
    script.step(1, 0, 2)
    script.step(3, 0, -2)
    script.step(8, 0, 3)
    script.step(0, 4, 1)
    means = [average(model, script.optimizer, index).item() for index in range(3)]
    assert means == pytest.approx([3, 1, 1], abs=1e-6)


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        # Means 0, 3½, 4: layers 1 and 2 are closest; after the first step alone, 0 and 1 were.
        ((0, 1, 3), (0, 6, 5), (1, 2)),
        # Means 0, 3, 6½: layers 0 and 1 are closest; going by the second step alone, 1 and 2 are.
        ((0, 1, 9), (0, 5, 4), (0, 1)),
    ],
)
def test_a_merge_compares_the_averages_with_its_own_step_included(first, second, merged):
    model = toy(3, num_merges=1)
    script = Script(model)
    script.step(*first)
    assert history(model) == []
    script.step(*second)
    assert history(model) == [(2, *merged)]


def test_the_lower_layer_reads_the_upper_layers_B_itself():
    model = toy(2, num_merges=1)
    script = Script(model)
    script.step(1, 2)
    script.step(3, 7)
    # The current value, neither an average over steps nor one over layers.
    assert factors(model, 0).delta_weight().item() == pytest.approx(ALPHA * 7)
    assert factors(model, 1).delta_weight().item() == pytest.approx(ALPHA * 7)


# When


def stepper(model, kind):
    """A function that takes one optimizer step with zero gradients."""
    if kind == "explicit":
        return lambda: loraplex.step(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)

    def step():
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()

    return step


@pytest.mark.parametrize("kind", ["explicit", "optimizer"])
def test_the_papers_schedule(kind):
    model = toy(4, merge_start_step=320, merge_interval=240, num_merges=2)
    with torch.no_grad():
        for index, value in enumerate([0, 1, 3, 9]):
            own_B(model, index).fill_(value)
    step, at = stepper(model, kind), {}
    for t in range(1, 1100):
        step()
        at[t] = len(history(model))
    assert [at[t] for t in (240, 320, 559, 560, 799, 800, 1040, 1099)] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert sorted(step for step, _, _ in history(model)) == [560, 800]


def test_the_papers_setting_is_the_default():
    defaults = AsLoraConfig()
    assert (defaults.merge_start_step, defaults.merge_interval) == (None, None)
    assert AsLoraShared.unknown_length == {"merge_start_step": 320, "merge_interval": 240}
    assert (defaults.merge_candidates, defaults.merge_distance) == ("adjacent", "factor")


def test_fractions_of_the_run():
    model = toy(4, merge_start_step=0.25, merge_interval=0.125, num_merges=3)
    loraplex.set_total_steps(model, 16)
    for _ in range(16):
        loraplex.step(model)
    assert sorted(step for step, _, _ in history(model)) == [6, 8, 10]


def test_a_fraction_of_an_unknown_run_stops_the_first_step():
    model = toy(4, merge_start_step=0.25)
    with pytest.raises(RuntimeError, match=r"merge_start_step=0\.25.*set_total_steps"):
        Script(model).step(0, 1, 2, 3)


def test_a_run_that_ends_before_the_last_merge_is_refused():
    model = toy(4, merge_start_step=10, merge_interval=5, num_merges=3)
    with pytest.raises(ValueError, match=r"merge_start_step=10.*step 25.*only 24"):
        loraplex.set_total_steps(model, 24)
    loraplex.set_total_steps(model, 25)


def test_seven_of_twelve_layers_merge_unless_told():
    model = toy(12)
    with torch.no_grad():
        for index in range(12):
            own_B(model, index).fill_(index**2)
    for _ in range(30):
        loraplex.step(model)
    # Neighbours are ever closer towards the bottom, and each group keeps its upper B: 0→1, then 1→2, …
    assert sorted(history(model))[0][:2] == (2, 0)
    assert len(history(model)) == 7
    assert merge_map(model) == [7] * 8 + [8, 9, 10, 11]


def test_no_merges_if_none_are_asked_for():
    model = toy(3, num_merges=0)
    for _ in range(5):
        loraplex.step(model)
    assert merge_map(model) == [0, 1, 2]


# Which


@pytest.mark.parametrize(("candidates", "merged"), [("adjacent", [0, 2, 2]), ("all", [2, 1, 2])])
def test_candidates(candidates, merged):
    # Distances: 0-1 is 5, 1-2 is 4, and 0-2, not adjacent, is 1.
    model = toy(3, num_merges=1, merge_candidates=candidates)
    script = Script(model)
    script.step(0, 5, 1)
    script.step(0, 5, 1)
    assert merge_map(model) == merged


def test_adjacent_means_neighbouring_groups():
    # 1→2 first; then layers 0 and 2 are neighbours, 6 apart.
    model = toy(4, num_merges=2)
    script = Script(model)
    for expected in ([0, 1, 2, 3], [0, 2, 2, 3], [2, 2, 2, 3], [2, 2, 2, 3]):
        script.step(0, 5, 6, 20)
        assert merge_map(model) == expected


def test_a_group_keeps_the_upper_layers_history_and_merges_as_one():
    # 0→1 first. The group is at 4, its upper layer: 5 below layer 2, which is 6 below layer 3. At 2, the mean of the
    # two, or at 0, the lower one, layers 2 and 3 would be the closest.
    model = toy(4, num_merges=3)
    script = Script(model)
    for expected in ([0, 1, 2, 3], [1, 1, 2, 3], [2, 2, 2, 3], [3, 3, 3, 3]):
        script.step(0, 4, 9, 15)
        assert merge_map(model) == expected


def test_what_happens_to_a_stale_B_no_longer_counts():
    # 0→1 at step 2. Then the stale B comes close to layer 2, which must be of no effect.
    model = toy(4, num_merges=2, merge_interval=2, merge_candidates="all")
    script = Script(model)
    for values in [(0, 0, 50, 60)] * 3 + [(5e3, 0, 50, 60)] * 2:
        script.step(*values)
    assert history(model) == [(3, 0, 1), (5, 2, 3)]


def test_one_merge_per_family_and_event():
    model = toy(4, roles=("q", "v"), num_merges=2)
    with torch.no_grad():
        for index, (q, v) in enumerate([(0, 0), (1, 7), (4, 20), (9, 22)]):
            own_B(model, index, "q").fill_(q)
            own_B(model, index, "v").fill_(v)
    maps = []
    for _ in range(4):
        loraplex.step(model)
        maps.append((merge_map(model, "q"), merge_map(model, "v")))
    assert maps == [
        ([0, 1, 2, 3], [0, 1, 2, 3]),
        ([1, 1, 2, 3], [0, 1, 3, 3]),
        ([2, 2, 2, 3], [1, 1, 3, 3]),
        ([2, 2, 2, 3], [1, 1, 3, 3]),
    ]


# Distances

A_SKEWED = [[10.0, 0.0], [0.0, 0.1]]
B_ROWS = [(0.0, 0.0), (1.0, 0.0), (1.0, 3.0)]
"""Factor distances 1 and 3; with A_SKEWED, update distances 10 and 0.3."""


@pytest.mark.parametrize(("metric", "merged"), [("factor", [1, 1, 2]), ("update", [0, 2, 2])])
def test_distances_rank_differently(metric, merged):
    model = toy(3, A=A_SKEWED, in_features=2, r=2, num_merges=1, merge_distance=metric)
    script = Script(model)
    script.step(*B_ROWS)
    script.step(*B_ROWS)
    assert merge_map(model) == merged


@pytest.mark.parametrize(("metric", "merged"), [("factor", [0, 2, 2]), ("update", [0, 2, 2])])
def test_the_same_updates_in_another_basis(metric, merged):
    # A → Q⁻¹A, B → BQ with Q = A_SKEWED: every ΔW as in the test above, yet "factor" decides otherwise.
    rows = [(10 * b0, 0.1 * b1) for b0, b1 in B_ROWS]
    model = toy(3, A=[[1.0, 0.0], [0.0, 1.0]], in_features=2, r=2, num_merges=1, merge_distance=metric)
    script = Script(model)
    script.step(*rows)
    script.step(*rows)
    assert merge_map(model) == merged


def naive_update_distance(B_i, B_j, A):
    total = 0.0
    for o in range(B_i.shape[0]):
        for j in range(A.shape[1]):
            entry = sum((B_i[o, k] - B_j[o, k]).item() * A[k, j].item() for k in range(A.shape[0]))
            total += entry**2
    return total**0.5


def test_distances_against_the_loop_and_under_a_change_of_basis():
    A, B_i, B_j, Q = draw(3, 6), draw(4, 3, seed=3), draw(4, 3, seed=4), draw(3, 3, seed=5)
    entries = sum((B_i[o, k] - B_j[o, k]).item() ** 2 for o in range(4) for k in range(3))
    assert distance(B_i, B_j) == pytest.approx(entries**0.5, rel=1e-12)
    assert distance(B_i, B_j, A) == pytest.approx(naive_update_distance(B_i, B_j, A), rel=1e-12)
    changed = (B_i @ Q, B_j @ Q)
    assert distance(*changed, torch.linalg.solve(Q, A)) == pytest.approx(distance(B_i, B_j, A), rel=1e-9)
    assert distance(*changed) != pytest.approx(distance(B_i, B_j), rel=0.05)


@pytest.mark.parametrize(
    "A",
    [draw(3, 6) * torch.tensor([[1.0], [0], [1]]), draw(3, 1) @ draw(1, 6), torch.zeros(3, 6), draw(3, 2)],
    ids=["zero row", "rank 1", "zero", "fewer columns than rows"],
)
def test_update_distance_with_a_rank_deficient_A(A):
    A = A.double()
    B_i, B_j = draw(4, 3, seed=3), draw(4, 3, seed=4)
    assert distance(B_i, B_j, A) == pytest.approx(naive_update_distance(B_i, B_j, A), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_averages_that_are_not_finite_merge_nothing(value):
    """A NaN is neither smaller nor larger: min() would have taken whichever pair comes first."""
    model = toy(4, num_merges=1)
    loraplex.step(model)
    with torch.no_grad():
        own_B(model, 1).fill_(value)
        own_B(model, 2).fill_(value)
    with pytest.raises(RuntimeError, match=r"step 2.*NaN or Inf.*earlier checkpoint"):
        loraplex.step(model)
    assert history(model) == []


# Optimizers


@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("groups", [False, True])
def test_training_with_an_optimizer_of_torch(optimizer_cls, groups):
    """The averages do not disturb the optimizer, and are the means of what it produced."""
    model, twin = (adapt(config(merge_start_step=4, num_merges=1), depth=3) for _ in range(2))
    parameters, twins = ([p for p in m.parameters() if p.requires_grad] for m in (model, twin))
    if groups:
        split = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.01}]
        split_twins = [{"params": twins[:2]}, {"params": twins[2:], "lr": 0.01}]
    else:
        split, split_twins = parameters, twins
    optimizer = optimizer_cls(split, lr=0.02)
    # The twin's parameters are copied to leaves that no schedule knows.
    bare = [leaf(p) for p in twins]
    by_id = {id(p): b for p, b in zip(twins, bare, strict=True)}
    if groups:
        split_bare = [{**g, "params": [by_id[id(p)] for p in g["params"]]} for g in split_twins]
    else:
        split_bare = bare
    reference = optimizer_cls(split_bare, lr=0.02)
    x, seen = draw(3, TOKENS, IN), []
    for _ in range(4):
        optimizer.zero_grad()
        ((model(x) - 1) ** 2).sum().backward()
        for b, p in zip(bare, parameters, strict=True):
            b.grad = p.grad.clone()
        optimizer.step()
        reference.step()
        for b, p in zip(bare, parameters, strict=True):
            assert torch.equal(b, p)
        seen.append([own_B(model, index).detach().clone() for index in range(3)])
    for index in range(3):
        mean = sum(B[index] for B in seen) / 4
        torch.testing.assert_close(average(model, optimizer, index).double(), mean, rtol=1e-5, atol=1e-6)
    optimizer.zero_grad()
    ((model(x) - 1) ** 2).sum().backward()
    optimizer.step()
    assert len(history(model)) == 1


def test_averages_in_float32_survive_a_checkpoint_of_a_bfloat16_adapter():
    torch.manual_seed(0)
    model = get_peft_model(
        Stack(2).to(torch.bfloat16),
        config(merge_start_step=50, target_modules=["q"]),
        autocast_adapter_dtype=False,
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.bfloat16}
    optimizer, values = torch.optim.SGD(parameters, lr=1.0, momentum=0.5), []
    for step in range(3):
        for p in parameters:
            p.grad = draw(*p.shape, seed=step, dtype=torch.bfloat16)
        optimizer.step()
        values.append(own_B(model, 0).detach().double())
    kept = average(model, optimizer, 0)
    assert kept.dtype == torch.float32
    # More digits than bfloat16 holds.
    torch.testing.assert_close(kept.double(), sum(values) / 3, rtol=1e-6, atol=1e-6)
    before = kept.clone()
    resumed = torch.optim.SGD(parameters, lr=1.0, momentum=0.5)
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(average(model, resumed, 0).float(), before)


def test_averages_survive_a_checkpoint_of_the_optimizer():
    model = toy(3, num_merges=1)
    script = Script(model)
    script.step(0, 1, 9)
    resumed = torch.optim.SGD(script.optimizer.param_groups[0]["params"], lr=1.0)
    resumed.load_state_dict(script.optimizer.state_dict())
    Script(model, resumed).step(0, 5, 4)
    # Step 2, by the means over both steps; averages begun anew would say (1, 2), or not merge yet.
    assert history(model) == [(2, 0, 1)]


def test_a_finished_schedule_averages_no_more():
    model = toy(4, num_merges=1)
    script = Script(model)
    script.step(0, 1, 5, 9)
    script.step(0, 1, 5, 9)
    assert len(history(model)) == 1
    kept = [
        {key: value.clone() if torch.is_tensor(value) else value for key, value in script.optimizer.state[B].items()}
        for B in (own_B(model, index) for index in range(4))
    ]
    script.step(9, 8, 7, 6)
    assert kept == [script.optimizer.state[own_B(model, index)] for index in range(4)]
    assert len(history(model)) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips_does_not_count(fused):
    model = adapt(config(merge_start_step=2), depth=2, dtype=torch.float32)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    merges = []
    for overflow in (False, True, False, False):
        optimizer.zero_grad()
        scaler.scale(((model(draw(2, TOKENS, IN, dtype=torch.float32)) - 1) ** 2).sum()).backward()
        if overflow:
            own_B(model, 0).grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        merges.append(len(history(model)))
    # Two layers allow one merge, at the third step that was taken.
    assert merges == [0, 0, 0, 1]


def test_a_loop_that_skips_steps_itself():
    model = toy(2, num_merges=1)
    script = Script(model)
    script.step(0, 1)
    own_B(model, 0).grad = torch.full((1, 1), float("nan"), dtype=torch.float64)
    script.optimizer.zero_grad()  # instead of a step
    assert history(model) == []
    script.step(0, 1)
    assert history(model) == [(2, 0, 1)]


# Encoder and decoder


class EncoderDecoder(nn.Module):
    """Names as in T5: the depth is the first number."""

    def __init__(self, encoder_layers, decoder_layers):
        super().__init__()
        self.encoder = self.stack(encoder_layers)
        self.decoder = self.stack(decoder_layers)

    @staticmethod
    def stack(depth):
        block = [
            nn.ModuleDict({"layer": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(1, 1, bias=False)})])})
            for _ in range(depth)
        ]
        return nn.ModuleDict({"block": nn.ModuleList(block)})

    def forward(self, x):
        for stack in (self.encoder, self.decoder):
            for block in stack["block"]:
                x = block["layer"][0]["q"](x)
        return x


def test_families_of_different_depth():
    model = get_peft_model(EncoderDecoder(12, 4).double(), config(r=1, target_modules=["q"]))
    inner = model.base_model.model
    encoder = [block["layer"][0]["q"].factors("default") for block in inner.encoder["block"]]
    decoder = [block["layer"][0]["q"].factors("default") for block in inner.decoder["block"]]
    assert len({id(f.lora_A) for f in encoder}) == len({id(f.lora_A) for f in decoder}) == 1
    assert encoder[0].lora_A is not decoder[0].lora_A
    with torch.no_grad():
        for index, f in enumerate(encoder):
            f.lora_B.fill_(index**2)
        for f, value in zip(decoder, [0, 9, 10, 20], strict=True):
            f.lora_B.fill_(value)
    for _ in range(12):
        loraplex.step(model)
    # 7 of 12 and, at the same share, 2 of 4.
    scale = ALPHA
    A, A_decoder = encoder[0].lora_A.item(), decoder[0].lora_A.item()
    assert [f.delta_weight().item() / A / scale for f in encoder] == pytest.approx([49] * 8 + [64, 81, 100, 121])
    assert [f.delta_weight().item() / A_decoder / scale for f in decoder] == pytest.approx([10, 10, 10, 20])


def test_more_merges_than_layers_allow_are_refused():
    with pytest.raises(ValueError, match=r"num_merges=4.*at most 3"):
        toy(4, num_merges=4)
    toy(4, num_merges=3)


# Guard rails


def test_a_hidden_optimizer_stops_the_run():
    model = adapt(config(merge_start_step=50), depth=3)
    model.train()
    copies = [leaf(p) for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(copies, lr=1e-3)

    def run():
        for _ in range(10):
            (model(draw(3, TOKENS, IN)) ** 2).sum().backward()
            optimizer.step()

    with pytest.raises(RuntimeError, match=r"merge_start_step=50.*ScheduleCallback.*loraplex\.step\(model\)"):
        run()


@pytest.mark.parametrize("kind", ["callback", "explicit"])
def test_a_hidden_optimizer_merges_where_it_is_told_of_steps(kind):
    """As under engines that flatten parameters: those see copies, and gradients are gone when the step is told."""
    model = toy(3, num_merges=1, merge_start_step=0.2, merge_interval=0.1)
    model.train()
    copies = [leaf(p) for p in model.parameters() if p.requires_grad]
    optimizer, callback = torch.optim.SGD(copies, lr=1e-3), ScheduleCallback()
    told = {"model": model, "optimizer": optimizer}
    callback.on_train_begin(None, TrainerState(max_steps=10), None, **told)
    # Means over three steps: 0, 2, 4⅓; after the last step alone layers 0 and 1 are 2 apart, 1 and 2 are 1.
    for values in [(0, 1, 5), (0, 3, 5), (0, 2, 3)]:
        assert history(model) == []
        model(draw(3, TOKENS, 1)).sum().backward()
        optimizer.step()
        with torch.no_grad():
            for index, value in enumerate(values):
                own_B(model, index).fill_(value)
        model.zero_grad()
        if kind == "callback":
            callback.on_step_end(None, TrainerState(), TrainerControl(), **told)
        else:
            loraplex.step(model)
    assert history(model) == [(3, 0, 1)]


def test_an_optimizer_of_another_model_is_no_concern():
    model, other = adapt(config(merge_start_step=50), depth=3), nn.Linear(2, 2)
    model.train()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(20):
        other(torch.ones(1, 2)).sum().backward()
        optimizer.step()


def test_a_new_optimizer_takes_over_from_one_that_is_still_alive():
    # As in a notebook: back to a checkpoint of step 1, with the first run's optimizer still in memory.
    model = toy(3, num_merges=1, merge_start_step=2)
    script = Script(model)
    script.step(0, 1, 9)
    checkpoint = copy.deepcopy(script.optimizer.state_dict())
    script.step(0, 100, 9)
    others = [
        torch.optim.SGD(script.optimizer.param_groups[0]["params"], lr=1.0)
        for _ in range(4)  # whichever is looked at first
    ]
    for optimizer in others:
        optimizer.load_state_dict(copy.deepcopy(checkpoint))
        Script(model, optimizer).step(0, 3, 9)
        means = [average(model, optimizer, index).item() for index in range(3)]
        assert means == pytest.approx([0, 2, 9], abs=1e-6)
        assert history(model) == []


def test_memory_that_is_yet_to_be_filled_is_no_map() -> None:
    """`to_empty` leaves whatever was there; reading it would break every later optimizer step in the process."""
    model = h.adapted("aslora")
    shared = h.shared_state(model)
    maps = {family: list(mapped) for family, mapped in shared.maps.items()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu")
    for buffer in shared.buffers():
        buffer.fill_(1 << 40)
    model.train().eval()
    assert shared.maps == maps
    assert len(list(shared.trained())) == sum(len(set(mapped)) for mapped in maps.values())
    model.load_state_dict(state)
    assert shared.maps == maps


def test_memory_that_was_only_allocated_is_no_map():
    """`to_empty` may find zeros, which no merging leads to: until it is filled, the map stays what it was."""
    model = h.adapted("aslora")
    bank = h.shared_state(model)
    before = {name: list(mapped) for name, mapped in bank.maps.items()}
    with torch.no_grad():
        for buffer in bank.buffers():
            buffer.zero_()
    bank.train()
    for layer in h.layers_of(model).values():
        assert layer.factors("default").lora_B is not None  # its map is looked at again
    assert bank.maps == before
