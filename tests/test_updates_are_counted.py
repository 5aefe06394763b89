"""One update is one step of a schedule, whoever makes it; and an optimizer that can't be seen is noticed."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.optim import SGD, AdamW, Optimizer

import loraplex
from helpers import ARCHS, config, shared_state
from loraplex.methods.aslora.shared import AsLoraShared
from loraplex.runtime import hidden_optimizer, optimizer_steps

SCHEDULES: dict[str, dict[str, Any]] = {
    "aslora": {"merge_start_step": 30, "merge_interval": 3, "num_merges": 1},
    "dual_lora": {"warmup_steps": 100, "init_std": 0.3},
}
METHODS = list(SCHEDULES)
pytestmark = pytest.mark.parametrize("method", METHODS)


def adapted(method: str, **settings: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(ARCHS["llama"].build(), config(method, **{**SCHEDULES[method], **settings}))


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    return model(**ARCHS["llama"].inputs(seed=seed)).loss


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def counted(model: nn.Module) -> int:
    """Updates that the schedule has counted."""
    shared = shared_state(model)
    if isinstance(shared, AsLoraShared):
        (steps,) = set(shared.steps.values())
        return steps
    return shared.warmup[0].item()


def counts(model: PeftModel, update: Callable[[], None], times: int = 4) -> list[int]:
    """The schedule's count after each of `times` updates."""
    found = []
    for seed in range(times):
        loss_of(model, seed).backward()
        update()
        model.zero_grad()
        found.append(counted(model))
    return found


# Optimizers around optimizers


class Lookahead(Optimizer):
    """Holds the parameters of the optimizer inside, as torch's base class wants it."""

    def __init__(self, inner: Optimizer, every: int = 2) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.every, self.done = inner, every, 0
        self.slow = [[p.detach().clone() for p in group["params"]] for group in inner.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        self.done += 1
        if self.done % self.every == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for p, s in zip(group["params"], slow, strict=True):
                    p.copy_(s.lerp_(p, 0.5))
        return loss


class Bare:
    """A wrapper that is no optimizer of torch's."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner

    def step(self) -> None:
        self.inner.step()


class Unhooked(Optimizer):
    """A subclass that does without the constructor of its base, as accelerate's."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class Derived(AdamW):
    """Calls its base class's step, which is hooked once an AdamW was made."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Twice(Optimizer):
    """Two gradients, two inner steps, one update."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        self.inner.step()
        self.inner.zero_grad()
        with torch.enable_grad():
            closure().backward()
        self.inner.step()
        self.inner.zero_grad()


class Masters(Optimizer):
    """Holds the parameters; the optimizer inside steps copies of them."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.copies = [nn.Parameter(p.detach().double()) for p in parameters]
        self.inner = AdamW(self.copies, lr=1e-2)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p, c in zip(self.param_groups[0]["params"], self.copies, strict=True):
            c.grad = p.grad.double()
        self.inner.step()
        for p, c in zip(self.param_groups[0]["params"], self.copies, strict=True):
            p.copy_(c)


def by_name(model: nn.Module, mark: str) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if p.requires_grad and mark in name]


def together(*optimizers: Any) -> Callable[[], None]:
    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step


def each_clears(*optimizers: Optimizer) -> Callable[[], None]:
    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def one_per(parts: list[list[nn.Parameter]]) -> list[Optimizer]:
    return [SGD(part, lr=1e-2) for part in parts if part]


def layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """Each parameter alone, the last layers first."""
    return [[p] for p in reversed(trainable(model))]


def with_closure(model: PeftModel, optimizer: Any) -> Callable[[], None]:
    def closure() -> Tensor:
        return loss_of(model)

    return lambda: optimizer.step(closure)


def lbfgs(model: PeftModel) -> Callable[[], None]:
    optimizer = torch.optim.LBFGS(trainable(model), lr=0.1, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss.detach()

    return lambda: optimizer.step(closure)


STACKS: dict[str, Callable[[PeftModel], Callable[[], None]]] = {
    "lookahead": lambda m: Lookahead(AdamW(trainable(m), lr=1e-2)).step,
    "lookahead-twice": lambda m: Lookahead(Lookahead(SGD(trainable(m), lr=1e-2))).step,
    "bare": lambda m: Bare(AdamW(trainable(m), lr=1e-2)).step,
    "unhooked": lambda m: Unhooked(AdamW(trainable(m), lr=1e-2)).step,
    "derived": lambda m: (AdamW(trainable(m)), Derived(trainable(m), lr=1e-2))[1].step,
    "two-inner-steps": lambda m: with_closure(m, Twice(SGD(trainable(m), lr=1e-2))),
    "copies-inside": lambda m: Masters(trainable(m)).step,
    "lbfgs": lbfgs,
    "A-and-B": lambda m: together(*one_per([by_name(m, f"lora_{factor}") for factor in "ABCD"])),
    "by-role": lambda m: together(*one_per([by_name(m, "q_proj"), by_name(m, "v_proj")])),
    "by-role-cleared": lambda m: each_clears(*one_per([by_name(m, "q_proj"), by_name(m, "v_proj")])),
    "by-parameter": lambda m: together(*one_per(layers(m))),
    "wrapped-by-role": lambda m: together(
        *(Lookahead(AdamW(part, lr=1e-2)) for part in (by_name(m, "q_proj"), by_name(m, "v_proj")))
    ),
}


@pytest.mark.parametrize("stack", STACKS)
def test_one_update_is_one_step(method: str, stack: str) -> None:
    model = adapted(method)
    assert counts(model, STACKS[stack](model)) == [1, 2, 3, 4]


@pytest.mark.parametrize("stack", STACKS)
def test_averages_are_of_finished_updates(method: str, stack: str) -> None:
    """After the outermost optimizer is through, not in between: Lookahead changes parameters last."""
    if method != "aslora":
        pytest.skip("Dual LoRA averages nothing")
    model = adapted(method, merge_start_step=50)
    shared, seen = shared_state(model), []
    update = STACKS[stack](model)
    for seed in range(3):
        loss_of(model, seed).backward()
        update()
        model.zero_grad()
        seen.append({f: [shared.B(f, layer).detach().clone() for layer in range(5)] for f in shared.families})
    for family, averages in shared.averages.by_family.items():
        for layer, average in averages.items():
            mean = sum(step[family][layer] for step in seen) / 3
            torch.testing.assert_close(average, mean, rtol=1e-5, atol=1e-6)


def test_an_optimizer_for_each_parameter_in_the_backward_pass(method: str) -> None:
    model = adapted(method)
    for parameter in trainable(model):
        optimizer = SGD([parameter], lr=1e-2)

        def update(p: Tensor, optimizer: Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(update)
    assert counts(model, lambda: None) == [1, 2, 3, 4]


def test_a_step_that_raises_leaves_nothing_behind(method: str) -> None:
    """As Ctrl-C in a notebook: the optimizer's hook after the step is never called."""

    class Fails(SGD):
        fails = True

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise KeyboardInterrupt
            return super().step(closure)

    model = adapted(method)
    inner = Fails(trainable(model), lr=1e-2)
    outer = Lookahead(inner)
    kept = []
    for _ in range(2):
        try:
            outer.step()
        except KeyboardInterrupt as error:
            kept.append(error)  # as IPython does, and with it the frames
    inner.fails = False
    assert counts(model, outer.step, 3) == [1, 2, 3]


def test_steps_inside_another_models_step_count_each(method: str) -> None:
    """Learning to learn: an outer optimizer's closure trains the adapter for a while."""
    model, meta = adapted(method), nn.Parameter(torch.ones(1))
    inner, outer = SGD(trainable(model), lr=1e-2), SGD([meta], lr=0.1)

    def closure() -> Tensor:
        assert counts(model, inner.step, 3) == [1, 2, 3]
        (meta * 2).backward()
        return meta.detach()

    outer.step(closure)
    assert counted(model) == 3


def test_a_step_skipped_inside_a_wrapper_does_not_count(method: str) -> None:
    class Scaled(Optimizer):
        def __init__(self, inner: Optimizer, scaler: torch.amp.GradScaler) -> None:
            super().__init__(inner.param_groups, {})
            self.inner, self.scaler = inner, scaler

        def step(self, closure: Any = None) -> None:
            self.scaler.step(self.inner)
            self.scaler.update()

    model, scaler = adapted(method), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = Scaled(AdamW(trainable(model), lr=1e-2, fused=True), scaler)
    found = []
    for overflow in (True, False, True, False):
        scaler.scale(loss_of(model)).backward()
        if overflow:
            trainable(model)[0].grad.fill_(torch.inf)
        optimizer.step()
        model.zero_grad()
        found.append(counted(model))
    assert found == [0, 1, 1, 2]


def test_alternating_optimizers_each_make_an_update(method: str) -> None:
    model = adapted(method)
    turns = [SGD(by_name(model, role), lr=1e-2) for role in ("q_proj", "v_proj")]
    done = iter(range(8))
    counts(model, lambda: turns[next(done) % 2].step(), 8)
    with torch.enable_grad():
        loss_of(model)  # an update that lacks an optimizer is complete when the next forward begins
    assert counted(model) == 8


@pytest.mark.filterwarnings("ignore")  # dynamo's remarks on torch's own hooks
def test_a_compiled_step(method: str) -> None:
    """It is counted, and what the schedule does then is not compiled: each merge would compile it anew."""
    torch._dynamo.reset()
    model, counter = adapted(method), CompileCounter()
    optimizer = SGD(trainable(model), lr=1e-2)
    assert counts(model, torch.compile(optimizer.step, backend=counter)) == [1, 2, 3, 4]
    assert counter.frame_count <= 3  # torch's own


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_optimizers_that_take_turns_over_the_same_parameters(method: str, kind: Any) -> None:
    """The averages go along from one to the other: none goes on from what it had at its own last step."""
    settings = {"merge_start_step": 50} if method == "aslora" else {}
    model = adapted(method, **settings)
    shared, seen = shared_state(model), []
    turns = [kind(trainable(model), lr=1e-2), SGD(trainable(model), lr=1e-2)]
    found = []
    for seed in range(6):
        loss_of(model, seed).backward()
        turns[seed // 2 % 2].step()
        model.zero_grad()
        found.append(counted(model))
        if method == "aslora":
            seen.append({name: p.detach().clone() for name, p in shared.named_parameters()})
    assert found == [1, 2, 3, 4, 5, 6]
    if method == "aslora":
        for family, averages in shared.averages.by_family.items():
            for layer, average in averages.items():
                mean = sum(step[f"{family}__lora_B_{layer}"] for step in seen) / 6
                torch.testing.assert_close(average, mean, rtol=1e-5, atol=1e-6)


def test_half_of_the_adapter_is_trained(method: str) -> None:
    """The other half keeps its gradients, for an optimizer that never comes."""
    model = adapted(method)
    optimizer = SGD(by_name(model, "q_proj"), lr=1e-2)
    found = []
    for seed in range(4):
        loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(counted(model))
    assert found[1:] == [2, 3, 4]


# loraplex.step beside an optimizer that is seen


@pytest.mark.parametrize("order", ["before", "after", "both"])
def test_telling_of_a_step_that_was_seen_counts_once(method: str, order: str) -> None:
    model = adapted(method)
    optimizer = AdamW(trainable(model), lr=1e-2)

    def update() -> None:
        if order in ("before", "both"):
            loraplex.step(model)
        optimizer.step()
        if order in ("after", "both"):
            loraplex.step(model)

    assert counts(model, update) == [1, 2, 3, 4]


@pytest.mark.parametrize("order", ["before", "after"])
def test_telling_of_two_optimizers_steps(method: str, order: str) -> None:
    model = adapted(method)
    both = together(*one_per([by_name(model, "q_proj"), by_name(model, "v_proj")]))
    told = lambda: loraplex.step(model)  # noqa: E731
    update = together_calls(told, both) if order == "before" else together_calls(both, told)
    assert counts(model, update) == [1, 2, 3, 4]


def together_calls(*calls: Callable[[], None]) -> Callable[[], None]:
    return lambda: [call() for call in calls] and None


def test_told_steps_without_a_backward_pass_count_each(method: str) -> None:
    model = adapted(method)
    for _ in range(3):
        loraplex.step(model)
    assert counted(model) == 3
    optimizer = SGD(trainable(model), lr=1.0)
    for done in range(1, 4):
        for p in trainable(model):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        # The first may be the one that was told of.
        assert counted(model) == 3 + done - 1


# Optimizers that can't be seen


def without_torch(model: nn.Module, to_none: bool = True, lr: float = 1e-2) -> None:
    """An update by hand, as of a library with kernels of its own."""
    for p in trainable(model):
        if p.grad is not None:
            p.data.sub_(p.grad, alpha=lr)
    model.zero_grad(set_to_none=to_none)


def passes_until_stopped(model: nn.Module, update: Callable[[int], None], most: int = 100) -> int:
    for done in range(1, most + 1):
        try:
            loss_of(model).backward()
        except RuntimeError as error:
            assert "loraplex.step(model)" in str(error)  # noqa: PT017
            return done
        update(done)
    raise AssertionError(f"{most} backward passes, and nothing was noticed")


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "neither"])
def test_an_update_without_an_optimizer_is_noticed(method: str, mode: str, to_none: bool) -> None:
    """Whether or not the loop calls model.train(), which get_peft_model does not."""
    model = adapted(method)
    if mode != "neither":
        model.train(mode == "train")
    assert passes_until_stopped(model, lambda _: without_torch(model, to_none)) <= hidden_optimizer.RESETS + 1


def test_a_hidden_optimizer_is_noticed_without_train(method: str) -> None:
    model = adapted(method)
    copies = [nn.Parameter(p.detach().clone()) for p in trainable(model)]
    optimizer = SGD(copies, lr=1e-2)

    def run() -> None:
        for seed in range(30):
            loss_of(model, seed).backward()
            optimizer.step()
            model.zero_grad()

    with pytest.raises(RuntimeError, match=r"3 optimizer steps.*ScheduleCallback"):
        run()


def test_parameters_that_are_put_in_place_later_are_watched(method: str) -> None:
    """Casts, loading and sharding replace parameters after the adapter was made."""
    model = adapted(method)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
    assert passes_until_stopped(model, lambda _: without_torch(model)) <= hidden_optimizer.RESETS + 1


def test_swapped_parameters_are_watched(method: str) -> None:
    model = adapted(method)
    for parameter in trainable(model):
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().clone()))
    assert passes_until_stopped(model, lambda _: without_torch(model)) <= hidden_optimizer.RESETS + 1


def test_an_adapter_that_is_switched_on_later_is_watched(method: str) -> None:
    model = adapted(method)
    model.requires_grad_(False)
    loss_of(model)
    model.set_adapter("default")
    assert passes_until_stopped(model, lambda _: without_torch(model)) <= hidden_optimizer.RESETS + 1


def fuse_into_backward(model: nn.Module, lr: float = 1e-2) -> None:
    def update(p: Tensor) -> None:
        p.data.sub_(p.grad, alpha=lr)
        p.grad = None

    for p in trainable(model):
        p.register_post_accumulate_grad_hook(update)


def test_updates_fused_into_the_backward_pass_are_noticed(method: str) -> None:
    """No gradient is ever left, as under LOMO; the parameter's value tells."""
    model = adapted(method, init_weights=False) if method == "dual_lora" else adapted(method)
    if method == "dual_lora":
        # A warm-up that has begun, since the first step changes nothing.
        shared_state(model).warmup.copy_(torch.tensor([1, 100]))
    fuse_into_backward(model)
    assert passes_until_stopped(model, lambda _: None) <= 64


@pytest.mark.parametrize("shown", ["seen", "told"])
def test_long_accumulation_is_no_alarm(method: str, shown: str) -> None:
    model = adapted(method)
    optimizer = AdamW(trainable(model), lr=1e-2)
    for seed in range(200):
        loss_of(model, seed % 5).backward()
    if shown == "seen":
        optimizer.step()
    else:
        del optimizer
        gc.collect()
        without_torch(model)
        loraplex.step(model)
    assert counted(model) == 1


def test_gradients_that_an_engine_takes_at_once_are_no_alarm(method: str) -> None:
    """ZeRO moves each micro-batch's gradient into buffers of its own, in the course of the backward pass."""
    model = adapted(method)
    sums = {p: torch.zeros_like(p) for p in trainable(model)}

    def take(p: Tensor) -> None:
        sums[p].add_(p.grad)
        p.grad = None

    for p in trainable(model):
        p.register_post_accumulate_grad_hook(take)
    for update in range(1, 3):
        for seed in range(100):
            loss_of(model, seed % 5).backward()
        for p, total in sums.items():
            p.data.sub_(total, alpha=1e-3)
            total.zero_()
        loraplex.step(model)
        assert counted(model) == update


def test_skipped_updates_are_no_alarm(method: str) -> None:
    """A gradient scaler may skip a dozen steps while it looks for its scale; the gradients are reset each time."""
    model = adapted(method)
    optimizer = AdamW(trainable(model), lr=1e-2)
    for seed in range(40):
        loss_of(model, seed % 5).backward()
        optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()
    assert counted(model) == 1


def test_a_finished_schedule_watches_for_nothing(method: str) -> None:
    model = adapted(method, **({"num_merges": 0} if method == "aslora" else {"warmup_steps": 1}))
    if method == "dual_lora":
        loraplex.step(model)
    for _ in range(2 * hidden_optimizer.RESETS):
        loss_of(model).backward()
        without_torch(model)


def test_the_last_resort(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_optimizer, "BACKWARDS", 20)
    model = adapted(method)
    assert passes_until_stopped(model, lambda _: None) == 21


# Hooks


@pytest.fixture
def _nothing_alive() -> Iterator[None]:
    gc.collect()
    yield
    gc.collect()


@pytest.mark.usefixtures("_nothing_alive")
def test_hooks_exist_while_a_schedule_does(method: str) -> None:
    from torch.optim import optimizer as torchs

    if optimizer_steps._subscribers:
        pytest.skip("another test's model is still alive")
    hooks = torchs._global_optimizer_pre_hooks, torchs._global_optimizer_post_hooks
    before = [dict(known) for known in hooks]
    plain = get_peft_model(ARCHS["llama"].build(), config("multilora"))
    assert [dict(known) for known in hooks] == before
    model = adapted(method)
    twin = copy.deepcopy(model)
    assert [len(known) for known in hooks] == [len(known) + 1 for known in before]
    del model
    gc.collect()
    assert [len(known) for known in hooks] == [len(known) + 1 for known in before]
    assert counts(twin, SGD(trainable(twin), lr=1e-2).step, 2) == [1, 2]
    del twin, plain
    gc.collect()
    assert [dict(known) for known in hooks] == before
