"""Training in a plain loop, `transformers.Trainer`, TRL's `SFTTrainer` and accelerate: schedules and exact resume."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    Adafactor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import loraplex
from loraplex import AsLoraConfig, DualLoraConfig, MasaConfig, MultiLoraConfig, ScheduleCallback
from loraplex.methods.aslora.shared import AsLoraShared
from loraplex.tuner.schedules import schedules

# PEFT 0.21 and TRL 1.16 use names that transformers 5.23 calls activation_checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

VOCAB, LENGTH, LAYERS = 32, 6, 4
TARGETS = ["q_proj", "v_proj"]
COMMON: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
# Merges at steps 3 and 5; warm-up until step 7. Runs have 8 steps and stop after step 4: between the two merges, and
# in the middle of the warm-up.
STEPS, STOP = 8, 4
CONFIGS: dict[str, Callable[..., Any]] = {
    "MULTILORA": lambda **kw: MultiLoraConfig(**{**COMMON, **kw}),
    "MASA": lambda **kw: MasaConfig(**{**COMMON, "num_experts": 2, **kw}),
    "ASLORA": lambda **kw: AsLoraConfig(
        **{**COMMON, "merge_start_step": 1, "merge_interval": 2, "num_merges": 2, **kw}
    ),
    "DUALLORA": lambda **kw: DualLoraConfig(**{**COMMON, "warmup_steps": 7, "init_std": 0.3, **kw}),
}
METHODS = list(CONFIGS)
SCHEDULED = ["ASLORA", "DUALLORA"]


# Models, data, optimizers


def base_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype)


def adapted(method: str, seed: int = 1, dtype: torch.dtype = torch.float32, **fields: Any) -> PeftModel:
    base = base_model(dtype=dtype)
    torch.manual_seed(seed)
    return get_peft_model(base, CONFIGS[method](**fields), autocast_adapter_dtype=False)


def rows(count: int = 32) -> list[dict[str, list[int]]]:
    tokens = torch.randint(3, VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(2)).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


def batches(count: int, size: int = 4) -> list[Tensor]:
    return [
        torch.randint(3, VOCAB, (size, LENGTH), generator=torch.Generator().manual_seed(100 + i)) for i in range(count)
    ]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def schedule_of(model: nn.Module, adapter: str = "default") -> Any:
    return dict(schedules(model))[adapter]


def progress(model: nn.Module, adapter: str = "default") -> Any:
    """Merges done as (step, family, layer, layer it reads), or [warm-up steps done, steps in all]."""
    shared = dict(schedules(model)).get(adapter)
    if isinstance(shared, AsLoraShared):
        return sorted(shared.merge_history())
    return None if shared is None else shared.warmup.tolist()


def steps_counted(model: nn.Module, optimizer: torch.optim.Optimizer, adapter: str = "default") -> int:
    """How many optimizer steps the schedule of `adapter` has counted."""
    shared = dict(schedules(model))[adapter]
    if isinstance(shared, AsLoraShared):
        counts = {optimizer.state[p].get("aslora_steps", 0) for p in shared.trained()}
        assert len(counts) == 1
        return counts.pop()
    return shared.warmup[0].item()


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Bit for bit, also inside dictionaries and lists."""
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert one == other, where


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.5),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.2, momentum=0.9),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1),
    "adamw-fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, fused=True),
    "adafactor": lambda ps: Adafactor(ps, lr=1e-2, scale_parameter=False, relative_step=False),
    "two-groups": lambda ps: torch.optim.AdamW(
        [{"params": ps[::2], "weight_decay": 0.1}, {"params": ps[1::2], "lr": 2e-2}], lr=1e-2
    ),
}


# A case in which the running averages decide the second merge


def set_B(model: nn.Module, heights: dict[int, float]) -> None:
    """Set the B of each layer to a constant: distances are then differences of `heights`."""
    shared = dict(schedules(model)).get("default")
    if isinstance(shared, AsLoraShared):
        with torch.no_grad():
            for family in shared.families:
                for layer, height in heights.items():
                    shared.B(family, layer).fill_(height)


def early(model: nn.Module) -> None:
    """Before step 1: layers 0 and 1 are the closest, then 1 and 2."""
    set_B(model, {0: 0.0, 1: 0.02, 2: 0.2, 3: 2.0})


def late(model: nn.Module) -> None:
    """After step 4: layers 2 and 3 are the closest now, but on the average over all steps it is still 1 and 2."""
    set_B(model, {2: 1.9})


def expected_merges(second: tuple[int, int] = (1, 2)) -> list[tuple[int, str, int, int]]:
    families = [f"model__layers__N__self_attn__{target}" for target in TARGETS]
    # Layer 0 goes to layer 1 at step 3, and follows layer 1 to layer 2 if that is the second merge.
    first_now = second[1] if second[0] == 1 else 1
    return [(3, f, 0, first_now) for f in families] + [(5, f, *second) for f in families]


EXPECTED = {"ASLORA": expected_merges(), "DUALLORA": [7, 7], "MULTILORA": None, "MASA": None}


class Push(TrainerCallback):
    """`early` at the start of a fresh run, `late` after its step 4 and before that step's checkpoint."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            early(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STOP:
            late(kwargs["model"])


# Plain PyTorch loop


class Loop:
    """A plain training loop with accumulation, clipping and a scheduler, that can be stopped and resumed."""

    def __init__(self, model: PeftModel, optimizer: str = "adamw", accumulate: int = 2, lr_steps: int = STEPS) -> None:
        self.model, self.accumulate, self.done = model, accumulate, 0
        self.optimizer = OPTIMIZERS[optimizer](trainable(model))
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 - step / (2 * lr_steps))
        self.losses: list[float] = []

    def run(self, until: int, each_step: Callable[[int], None] = lambda step: None) -> Loop:
        self.model.train()
        data = batches(until * self.accumulate)
        for step in range(self.done + 1, until + 1):
            for micro in data[(step - 1) * self.accumulate : step * self.accumulate]:
                loss = loss_of(self.model, micro)
                with loraplex.loss_scale(1.0):  # which Dual LoRA asks for in float16
                    (loss / self.accumulate).backward()
                self.losses.append(loss.item())
            nn.utils.clip_grad_norm_(trainable(self.model), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            each_step(step)
            self.done = step
        return self

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        rest = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "done": self.done,
        }
        torch.save(rest, folder / "training.pt")

    def load(self, folder: Path, edit: Callable[[dict[str, Any]], None] = lambda state: None) -> Loop:
        rest = torch.load(folder / "training.pt", weights_only=True)
        edit(rest["optimizer"])
        self.optimizer.load_state_dict(rest["optimizer"])
        self.scheduler.load_state_dict(rest["scheduler"])
        torch.set_rng_state(rest["rng"])
        self.done = rest["done"]
        return self


def reload(folder: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    return PeftModel.from_pretrained(base_model(dtype=dtype), folder, is_trainable=True, autocast_adapter_dtype=False)


def straight_and_saved(model: PeftModel, folder: Path, optimizer: str = "adamw") -> Loop:
    """A run of all steps that leaves a checkpoint after step 4."""
    early(model)
    torch.manual_seed(5)
    loop = Loop(model, optimizer).run(STOP, lambda step: late(model) if step == STOP else None)
    loop.save(folder)
    return loop.run(STEPS)


def state_in_use(run: Any) -> dict[str, Any]:
    """The optimizer's state, but for what Adafactor notes of the values of parameters that no layer reads any more."""
    state: dict[str, Any] = run.optimizer.state_dict()
    shared = dict(schedules(run.model)).get("default")
    if isinstance(shared, AsLoraShared):
        for name in shared.stale_parameters():
            index = next(i for i, p in enumerate(trainable(run.model)) if p is shared.get_parameter(name))
            state["state"].get(index, {}).pop("RMS", None)
    return state


def assert_equal_runs(one: Loop, other: Loop) -> None:
    assert_same(get_peft_model_state_dict(one.model), get_peft_model_state_dict(other.model))
    assert_same(state_in_use(one), state_in_use(other))
    assert progress(one.model) == progress(other.model)
    assert one.losses[-len(other.losses) :] == other.losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_plain_loop_trains(method: str, optimizer: str) -> None:
    model = adapted(method)
    tokens = batches(1)[0]
    with torch.no_grad():
        before = loss_of(model, tokens).item()
    steps = OPTIMIZERS[optimizer](trainable(model))
    for _ in range(20):
        loss_of(model, tokens).backward()
        steps.step()
        steps.zero_grad()
    with torch.no_grad():
        assert loss_of(model, tokens).item() < before - 0.02
    if method == "ASLORA":
        assert [merge[0] for merge in progress(model)] == [3, 3, 5, 5]
    if method == "DUALLORA":
        assert progress(model) == [7, 7]


@pytest.mark.parametrize("method", SCHEDULED)
@pytest.mark.parametrize("reentrant", [True, False, None], ids=["reentrant", "non-reentrant", "no-checkpointing"])
def test_once_per_update_with_accumulation_and_checkpointing(method: str, reentrant: bool | None) -> None:
    model = adapted(method)
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    counts = []
    loop = Loop(model, accumulate=3)
    loop.run(4, lambda step: counts.append(steps_counted(model, loop.optimizer)))
    assert counts == [1, 2, 3, 4]
    if method == "ASLORA":
        assert [merge[0] for merge in progress(model)] == [3, 3]


def test_gradient_checkpointing_changes_nothing() -> None:
    finals = []
    for reentrant in (None, True, False):
        model = adapted("ASLORA")
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        Loop(model).run(6)
        finals.append(get_peft_model_state_dict(model))
    for other in finals[1:]:
        for key, value in finals[0].items():
            torch.testing.assert_close(other[key], value, msg=key)


@pytest.mark.parametrize("method", SCHEDULED)
def test_forward_and_backward_advance_nothing(method: str) -> None:
    """A run interrupted anywhere before the optimizer's step has left no trace in the schedule or the adapter."""
    model = adapted(method)
    loop = Loop(model).run(2)
    before = copy.deepcopy((get_peft_model_state_dict(model), loop.optimizer.state_dict()))
    for tokens in batches(5):
        loss_of(model, tokens).backward()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for register in (
        model.base_model.model.model.layers[2].register_forward_hook,
        model.base_model.model.model.layers[2].register_full_backward_pre_hook,
    ):
        handle = register(interrupt)
        with pytest.raises(KeyboardInterrupt):
            loss_of(model, batches(1)[0]).backward()
        handle.remove()
    model.zero_grad()
    assert_same(before, (get_peft_model_state_dict(model), loop.optimizer.state_dict()))
    assert progress(loop.run(STEPS).model) == progress(Loop(adapted(method)).run(STEPS).model)


@pytest.mark.parametrize("method", SCHEDULED)
def test_evaluation_in_between_changes_nothing(method: str) -> None:
    straight = Loop(adapted(method)).run(STEPS)
    model = adapted(method)

    def evaluate(step: int) -> None:
        model.eval()
        with torch.no_grad():
            loss_of(model, batches(1)[0])
        with model.disable_adapter(), torch.no_grad():
            loss_of(model, batches(1)[0])
        model.train()

    assert_equal_runs(straight, Loop(model).run(STEPS, evaluate))


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("method", SCHEDULED)
def test_a_step_skipped_by_the_gradient_scaler_does_not_count(method: str, fused: bool) -> None:
    model = adapted(method)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    counts = []
    for i, tokens in enumerate(batches(5)):
        scaler.scale(loss_of(model, tokens)).backward()
        if i in (0, 2):
            trainable(model)[0].grad.view(-1)[0] = torch.inf
        before = [p.detach().clone() for p in trainable(model)]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if i in (0, 2):
            assert_same(before, [p.detach() for p in trainable(model)])
        counts.append(steps_counted(model, optimizer))
    assert counts == [0, 1, 1, 2, 3]


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("method", METHODS)
def test_a_scaled_run_ends_at_the_same_parameters(method: str, fused: bool) -> None:
    """A power of two changes no digit of a float32 gradient, and a skipped step none of the others."""

    def run(scale: float, skipped: tuple[int, ...]) -> PeftModel:
        model = adapted(method)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        for i, tokens in enumerate(batches(STEPS)):
            if i in skipped and scale == 1:
                continue
            scaler.scale(loss_of(model, tokens)).backward()
            if i in skipped:
                trainable(model)[-1].grad.view(-1)[-1] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return model

    start, plain, scaled = adapted(method), run(1, (1, 4)), run(2.0**16, (1, 4))
    for first, one, other in zip(trainable(start), trainable(plain), trainable(scaled), strict=True):
        assert not torch.equal(one, first)
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)
    if method == "ASLORA":
        assert progress(scaled) == progress(plain) != []


def test_deepcopy_follows_its_own_optimizer() -> None:
    for method in SCHEDULED:
        model = adapted(method)
        loop = Loop(model).run(2)
        twin = copy.deepcopy(model)
        other = Loop(twin)
        assert progress(twin) == progress(model)
        loop.run(4)
        assert progress(twin) == ([] if method == "ASLORA" else [2, 7])
        here = progress(model)
        other.run(3)
        assert progress(model) == here
        assert progress(twin) != ([] if method == "ASLORA" else [2, 7])
        assert steps_counted(model, loop.optimizer) == 4


@pytest.mark.parametrize("method", SCHEDULED)
def test_two_adapters_trained_in_turn(method: str) -> None:
    model = adapted(method)
    loraplex.add_adapter(model, "second", CONFIGS[method]())
    optimizers, counts = {}, {"default": 0, "second": 0}
    for name in counts:
        model.set_adapter(name)
        optimizers[name] = OPTIMIZERS["adamw"](trainable(model))
    model.train()
    for name in ["default", "second", "second", "default", "second", "second", "second", "second"]:
        model.set_adapter(name)
        loss_of(model, batches(1)[0]).backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        counts[name] += 1
    if method == "ASLORA":
        assert progress(model) == []
        assert [merge[0] for merge in progress(model, "second")] == [3, 3, 5, 5]
    else:
        assert progress(model) == [2, 7]
        assert progress(model, "second") == [6, 7]


@pytest.mark.parametrize("method", SCHEDULED)
def test_an_adapter_that_is_not_trained_stays(method: str) -> None:
    """Inactive, but its parameters are in the optimizer: `AdamW(model.parameters())` is common."""
    model = adapted(method)
    loraplex.add_adapter(model, "second", CONFIGS[method]())
    model.set_adapter("second")
    before = progress(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(4):
        loss_of(model, batches(1)[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert progress(model) == before
    assert progress(model, "second") not in ([], [0, 7])


@pytest.mark.parametrize("method", SCHEDULED)
def test_two_optimizers_on_one_adapter_count_one_update(method: str) -> None:
    """One optimizer for q_proj, one for v_proj, both stepped at every update."""
    model = adapted(method)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW([p for n, p in named if t in n], lr=1e-2) for t in TARGETS]
    for _ in range(4):
        loss_of(model, batches(1)[0]).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    if method == "ASLORA":
        assert [merge[0] for merge in progress(model)] == [3, 3]
        assert {o.state[p]["aslora_steps"] for o in optimizers for p in o.state if "aslora_steps" in o.state[p]} == {4}
    else:
        assert progress(model) == [4, 7]


# Fractions and lengths


FRACTIONS: dict[str, dict[str, float]] = {
    "ASLORA": {"merge_start_step": 0.25, "merge_interval": 0.25},
    "DUALLORA": {"warmup_steps": 0.5},
}
TOO_LONG: dict[str, dict[str, int]] = {"ASLORA": {"merge_start_step": 5}, "DUALLORA": {"warmup_steps": 9}}


@pytest.mark.parametrize("method", SCHEDULED)
def test_a_fraction_without_the_runs_length_stops(method: str) -> None:
    model = adapted(method, **FRACTIONS[method])
    with pytest.raises(RuntimeError, match=r"ScheduleCallback.*set_total_steps"):
        Loop(model).run(1)
    loraplex.set_total_steps(model, STEPS)
    Loop(model).run(STEPS)
    if method == "ASLORA":
        assert [merge[0] for merge in progress(model)] == [4, 4, 6, 6]
    else:
        assert progress(model) == [4, 4]


# Trainer


def trainer(
    model: nn.Module, folder: Path, callbacks: tuple[Any, ...] = (), metrics: Any = None, **kwargs: Any
) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    data = Dataset.from_list(rows(64))
    return Trainer(
        model=model,
        args=TrainingArguments(**{**arguments, **kwargs}),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        compute_metrics=metrics,
        callbacks=list(callbacks),
    )


def losses_of(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "user", "assistant", *(f"w{i}" for i in range(VOCAB - 5))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }} </s> {% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    )
    return made


def sft_trainer(
    model: nn.Module,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    config: Any = None,
    callbacks: tuple[Any, ...] = (),
    **kwargs: Any,
) -> SFTTrainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "assistant_only_loss": True,
        "max_length": 32,
        "seed": 3,
    }
    chats = [
        {
            "messages": [
                {"role": "user", "content": " ".join(f"w{t - 5}" for t in row["input_ids"] if t >= 5)},
                {"role": "assistant", "content": f"w{i % 3} w7 w8"},
            ]
        }
        for i, row in enumerate(rows(64))
    ]
    return SFTTrainer(
        model=model,
        args=SFTConfig(**{**arguments, **kwargs}),
        train_dataset=Dataset.from_list(chats),
        processing_class=tokenizer,
        peft_config=config,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("method", METHODS)
def test_trainer_trains(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    run = trainer(model, tmp_path, max_steps=24, gradient_accumulation_steps=2, max_grad_norm=0.5, learning_rate=0.05)
    run.train_dataset = run.eval_dataset
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.02
    if method == "ASLORA":
        assert [merge[0] for merge in progress(model)] == [3, 3, 5, 5]
    if method == "DUALLORA":
        assert progress(model) == [7, 7]


@pytest.mark.parametrize("method", METHODS)
def test_sft_trainer_trains(method: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    run = sft_trainer(base_model(), tmp_path, tokenizer, CONFIGS[method](), max_steps=16, gradient_accumulation_steps=2)
    run.train()
    losses = losses_of(run)
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.2
    if method == "ASLORA":
        assert [merge[0] for merge in progress(run.model)] == [3, 3, 5, 5]
    if method == "DUALLORA":
        assert progress(run.model) == [7, 7]


class Count(TrainerCallback):
    """The schedule's count after each update."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counts.append(steps_counted(kwargs["model"], kwargs["optimizer"]))


@pytest.mark.parametrize("callback", [True, False], ids=["callback", "no-callback"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", SCHEDULED)
def test_trainer_advances_once_per_update(method: str, reentrant: bool, callback: bool, tmp_path: Path) -> None:
    count = Count()
    run = trainer(
        adapted(method, **({"num_merges": 1, "merge_interval": 5} if method == "ASLORA" else {})),
        tmp_path,
        (ScheduleCallback(), count) if callback else (count,),
        max_steps=6 if method == "ASLORA" else 7,
        gradient_accumulation_steps=3,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    run.train()
    if method == "ASLORA":
        assert count.counts == [1, 2, 3, 4, 5, 6]
        assert [merge[0] for merge in progress(run.model)] == [6, 6]
    else:
        assert count.counts == [1, 2, 3, 4, 5, 6, 7]


class StopAt(TrainerCallback):
    """Ends a run early."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


CALLBACKS = pytest.mark.parametrize("callbacks", [(), (ScheduleCallback(),)], ids=["no-callback", "callback"])
"""Trainers take the callback by themselves; that of the user is not counted beside it."""


@CALLBACKS
@pytest.mark.parametrize("method", SCHEDULED)
def test_trainer_with_fractions(method: str, callbacks: tuple[Any, ...], tmp_path: Path) -> None:
    model = adapted(method, **FRACTIONS[method])
    # 64 rows in batches of 4, two at a time: 8 updates in one epoch, a length that only the trainer knows.
    trainer(model, tmp_path, callbacks, max_steps=-1, num_train_epochs=1, gradient_accumulation_steps=2).train()
    if method == "ASLORA":
        assert [merge[0] for merge in progress(model)] == [4, 4, 6, 6]
    else:
        assert progress(model) == [4, 4]


@CALLBACKS
@pytest.mark.parametrize("method", SCHEDULED)
def test_sft_trainer_with_fractions(
    method: str, callbacks: tuple[Any, ...], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = CONFIGS[method](**FRACTIONS[method])
    run = sft_trainer(base_model(), tmp_path, tokenizer, config, callbacks)
    run.train()
    if method == "ASLORA":
        assert [merge[0] for merge in progress(run.model)] == [4, 4, 6, 6]
    else:
        assert progress(run.model) == [4, 4]


OPEN: dict[str, dict[str, None]] = {
    "ASLORA": {"merge_start_step": None, "merge_interval": None, "num_merges": None},
    "DUALLORA": {"warmup_steps": None},
}


@CALLBACKS
@pytest.mark.parametrize("method", SCHEDULED)
def test_defaults_are_shares_of_the_run(method: str, callbacks: tuple[Any, ...], tmp_path: Path) -> None:
    """A script that changed the class name alone trains for 30 steps."""
    config = CONFIGS[method](**OPEN[method])
    model = get_peft_model(base_model(), config)
    trainer(model, tmp_path, callbacks, max_steps=30).train()
    saved = model.peft_config["default"]
    if method == "ASLORA":
        merges = LAYERS * 7 // 12
        interval = int(0.25 * 30 / merges)
        assert sorted({merge[0] for merge in progress(model)}) == [2 + interval * (i + 1) for i in range(merges)]
        assert (saved.merge_start_step, saved.merge_interval) == (2, interval)
        assert (config.merge_start_step, config.merge_interval) == (None, None)
    else:
        assert progress(model) == [3, 3]
        assert (saved.warmup_steps, config.warmup_steps) == (3, None)  # the user's may serve another run


@pytest.mark.parametrize("method", SCHEDULED)
def test_a_resume_makes_the_same_of_the_defaults(method: str, tmp_path: Path) -> None:
    """A plain loop goes on with what the Trainer that knew the length made of them."""
    model = get_peft_model(base_model(), CONFIGS[method](**OPEN[method]))
    loraplex.set_total_steps(model, 30)
    loop = Loop(model)
    loop.run(2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
    for _, shared in schedules(loaded):
        assert shared.last_step() == next(schedules(model))[1].last_step() <= 10


@CALLBACKS
@pytest.mark.parametrize("method", SCHEDULED)
def test_checkpoints_on_the_way_raise_no_alarm(
    method: str, callbacks: tuple[Any, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on after them; an adapter that is saved by hand before its schedule has ended is another matter."""
    model = adapted(method)
    saving = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2}
    trainer(model, tmp_path, (*callbacks, StopAt(3)), **saving).train()
    assert "is saved" not in caplog.text
    model.save_pretrained(tmp_path)
    assert "is saved" in caplog.text


@pytest.mark.parametrize("method", SCHEDULED)
def test_defaults_never_stop_a_short_run(method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One step to see whether a script works at all."""
    model = get_peft_model(base_model(), CONFIGS[method](**OPEN[method]))
    trainer(model, tmp_path, max_steps=1).train()
    assert ("ends at step" in caplog.text) == (method == "ASLORA")  # whose merges come after its first step


@pytest.mark.parametrize("callbacks", [(), (ScheduleCallback(),)], ids=["alone", "callback"])
def test_a_frozen_adapter_stops_no_run(callbacks: tuple[Any, ...], tmp_path: Path) -> None:
    """Its merges that never came are no matter of a run that trains another adapter."""
    model = adapted("ASLORA", merge_start_step=500)
    model.add_adapter("other", CONFIGS["ASLORA"](num_merges=0))
    model.set_adapter("other")
    trainer(model, tmp_path, callbacks, max_steps=1).train()


@pytest.mark.parametrize("method", SCHEDULED)
def test_a_run_shorter_than_the_schedule_stops_at_its_start(method: str, tmp_path: Path) -> None:
    model = adapted(method, **TOO_LONG[method])
    before = copy.deepcopy(get_peft_model_state_dict(model))
    with pytest.raises(ValueError, match="8 optimizer steps"):
        trainer(model, tmp_path, (ScheduleCallback(),)).train()
    assert_same(before, get_peft_model_state_dict(model))


# accelerate


@pytest.mark.parametrize("method", METHODS)
def test_accelerate(method: str) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = adapted(method)
    optimizer = OPTIMIZERS["adamw"](trainable(model))
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    loader = torch.utils.data.DataLoader(torch.stack(batches(1)[0].split(1)).squeeze(1).repeat(10, 1), batch_size=2)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    with torch.no_grad():
        before = loss_of(model, batches(1)[0]).item()
    model.train()
    counts = []
    for tokens in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, tokens))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trainable(model), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and method == "DUALLORA":
            counts.append(progress(model)[0])
    with torch.no_grad():
        assert loss_of(model, batches(1)[0]).item() < before - 0.02
    if method == "ASLORA":
        assert [merge[0] for merge in progress(model)] == [3, 3, 5, 5]
    if method == "DUALLORA":
        assert counts == [1, 2, 3, 4, 5, 6, 7, 7, 7, 7]


# Exact resume


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-fused", "momentum", "sgd", "adafactor", "two-groups"])
@pytest.mark.parametrize("method", METHODS)
def test_plain_loop_resumes_bit_for_bit(method: str, optimizer: str, tmp_path: Path) -> None:
    straight = straight_and_saved(adapted(method, lora_dropout=0.2), tmp_path, optimizer)
    assert progress(straight.model) == EXPECTED[method]
    torch.manual_seed(99)
    model = reload(tmp_path)
    assert_equal_runs(straight, Loop(model, optimizer).load(tmp_path).run(STEPS))


@pytest.mark.parametrize("method", METHODS)
def test_plain_loop_resumes_into_an_existing_model(method: str, tmp_path: Path) -> None:
    """As trainers resume: the adapter's weights, but not its config, go into a model that is there already."""
    straight = straight_and_saved(adapted(method, lora_dropout=0.2), tmp_path)
    model = adapted(method, seed=77, lora_dropout=0.2)
    model.load_adapter(str(tmp_path), "default", is_trainable=True, autocast_adapter_dtype=False)
    assert_equal_runs(straight, Loop(model).load(tmp_path).run(STEPS))


@pytest.mark.parametrize("candidates", ["adjacent", "all"])
@pytest.mark.parametrize("distance", ["factor", "update"])
def test_resume_under_every_merge_rule(candidates: str, distance: str, tmp_path: Path) -> None:
    model = adapted("ASLORA", merge_candidates=candidates, merge_distance=distance)
    straight = straight_and_saved(model, tmp_path)
    assert progress(straight.model) == EXPECTED["ASLORA"]
    assert_equal_runs(straight, Loop(reload(tmp_path)).load(tmp_path).run(STEPS))


def test_restarted_averages_would_merge_otherwise(tmp_path: Path) -> None:
    """The control of the tests above: their case can tell averages that were restored from averages that were not."""
    straight_and_saved(adapted("ASLORA"), tmp_path)

    def restart_at_current_B(optimizer: dict[str, Any]) -> None:
        model = reload(tmp_path)
        for index, parameter in enumerate(trainable(model)):
            if "aslora_average" in optimizer["state"][index]:
                optimizer["state"][index]["aslora_average"] = parameter.detach().clone()

    def forget(optimizer: dict[str, Any]) -> None:
        for state in optimizer["state"].values():
            for key in ("aslora_average", "aslora_steps"):
                state.pop(key, None)

    restarted = Loop(reload(tmp_path)).load(tmp_path, restart_at_current_B).run(STEPS)
    assert progress(restarted.model) == expected_merges(second=(2, 3))
    with pytest.raises(RuntimeError, match=r"from step 4.*optimizer\.load_state_dict.*restart_averages"):
        Loop(reload(tmp_path)).load(tmp_path, forget).run(5)


@pytest.mark.parametrize("stop", [2, STOP])
@pytest.mark.parametrize("into", ["new", "existing"])
def test_lost_averages_stop_the_run(into: str, stop: int, tmp_path: Path) -> None:
    """A fresh optimizer, before the first merge or after it: the merges would come late, not at all, or be others."""
    loop = Loop(adapted("ASLORA")).run(stop)
    loop.save(tmp_path)
    if into == "new":
        model = reload(tmp_path)
    else:
        model = adapted("ASLORA", seed=77)
        model.load_adapter(str(tmp_path), "default", is_trainable=True, autocast_adapter_dtype=False)
    merged = progress(model)
    with pytest.raises(RuntimeError, match=rf"from step {stop}.*optimizer\.load_state_dict.*restart_averages"):
        Loop(model).run(1)
    assert progress(model) == merged
    # Another run, from this adapter: merges that were done count, and the next is due after its own steps.
    loraplex.restart_averages(model)
    Loop(model).run(STEPS)
    assert sorted(merge[0] for merge in progress(model))[-2:] == ([5, 5] if stop == 2 else [3, 3])


def test_another_optimizer_in_the_same_process_goes_on(tmp_path: Path) -> None:
    """The averages are in memory still, though the optimizer that kept them is gone."""
    model = adapted("ASLORA")
    early(model)
    torch.manual_seed(5)
    first = Loop(model, "sgd").run(STOP, lambda step: late(model) if step == STOP else None)
    second = Loop(model, "sgd")
    second.done = first.done
    del first
    gc.collect()
    second.run(STEPS)
    assert progress(model) == EXPECTED["ASLORA"]
    assert steps_counted(model, second.optimizer) == 5  # the schedule's last step


def test_a_finished_adapter_is_fine_tuned_afresh(tmp_path: Path) -> None:
    loop = Loop(adapted("ASLORA")).run(STEPS)
    loop.save(tmp_path)
    merges = progress(loop.model)
    assert len(merges) == 4
    model = reload(tmp_path)
    Loop(model).run(3)
    assert progress(model) == merges
    # As today's files: the count is kept only while merges are to come.
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert [t[1, -1].item() for key, t in stored.items() if key.endswith("__merges")] == [0, 0]


def test_files_without_a_count_still_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    straight_and_saved(adapted("ASLORA"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    stored = load_file(file)
    for key, tensor in stored.items():
        if key.endswith("__merges"):
            assert tensor[1, -1] == STOP
            tensor[1, -1] = 0
    save_file(stored, file, {"format": "pt"})
    model = reload(tmp_path)
    assert [merge[0] for merge in progress(model)] == [3, 3]
    Loop(model).run(2)
    assert any("averages start anew" in record.getMessage() for record in caplog.records)


def test_averages_of_another_step_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(adapted("ASLORA")).run(2)
    state = copy.deepcopy(loop.optimizer.state_dict())
    loop.run(STOP).save(tmp_path)
    other = Loop(reload(tmp_path))
    other.optimizer.load_state_dict(state)
    other.run(1)
    assert any("of step 4" in r.getMessage() and "of step 2" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [
        (torch.bfloat16, "adamw"),
        (torch.bfloat16, "adamw-fused"),
        (torch.bfloat16, "sgd"),
        (torch.float16, "momentum"),
    ],
    ids=["bf16-adamw", "bf16-adamw-fused", "bf16-sgd", "fp16-momentum"],
)
@pytest.mark.parametrize("method", SCHEDULED)
def test_resume_with_half_precision_adapters(method: str, dtype: torch.dtype, optimizer: str, tmp_path: Path) -> None:
    """`Optimizer.load_state_dict` casts floating-point state to the parameter's dtype; averages are float32."""
    straight = straight_and_saved(adapted(method, dtype=dtype), tmp_path, optimizer)
    assert progress(straight.model) == EXPECTED[method]
    model = reload(tmp_path, dtype)
    assert {p.dtype for p in trainable(model)} == {dtype}
    assert_equal_runs(straight, Loop(model, optimizer).load(tmp_path).run(STEPS))


def test_averages_survive_half_precision_resume(tmp_path: Path) -> None:
    """The averages themselves, right after loading: later merges hang on them even if this one would not."""
    model = adapted("ASLORA", dtype=torch.bfloat16)
    early(model)
    loop = Loop(model).run(STOP)
    loop.save(tmp_path)
    resumed = Loop(reload(tmp_path, torch.bfloat16)).load(tmp_path)
    assert_same(loop.optimizer.state_dict(), resumed.optimizer.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_resume_through_distributed_checkpoint_state(method: str, tmp_path: Path) -> None:
    """FSDP2 and accelerate restore an optimizer through these functions, which first take a step of their own."""
    model = adapted(method)
    early(model)
    loop = Loop(model).run(STOP, lambda step: late(model) if step == STOP else None)
    options = StateDictOptions(ignore_frozen_params=True)
    adapter = copy.deepcopy(get_peft_model_state_dict(model))
    state = copy.deepcopy(get_optimizer_state_dict(model, loop.optimizer, options=options))
    rest = (loop.scheduler.state_dict(), loop.done)
    loop.run(STEPS)
    resumed = Loop(adapted(method, seed=77))
    set_peft_model_state_dict(resumed.model, adapter)
    set_optimizer_state_dict(resumed.model, resumed.optimizer, state, options=options)
    resumed.scheduler.load_state_dict(rest[0])
    resumed.done = rest[1]
    resumed.run(STEPS)
    assert progress(resumed.model) == EXPECTED[method]
    assert_equal_runs(loop, resumed)


def assert_equal_trainers(one: Trainer, other: Trainer) -> None:
    assert_same(get_peft_model_state_dict(one.model), get_peft_model_state_dict(other.model))
    assert_same(one.optimizer.state_dict(), other.optimizer.state_dict())
    assert progress(one.model) == progress(other.model)
    assert losses_of(one) == losses_of(other)


@pytest.mark.parametrize("method", METHODS)
def test_trainer_resumes_bit_for_bit(method: str, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": STOP, "gradient_accumulation_steps": 2}
    straight = trainer(adapted(method, lora_dropout=0.2), tmp_path, (Push(), ScheduleCallback()), **saving)
    straight.train()
    assert progress(straight.model) == EXPECTED[method]
    model = adapted(method, seed=77, lora_dropout=0.2)
    resumed = trainer(model, tmp_path, (ScheduleCallback(),), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert_equal_trainers(straight, resumed)


@pytest.mark.parametrize("method", METHODS)
def test_sft_trainer_resumes_bit_for_bit(method: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    saving = {"save_strategy": "steps", "save_steps": STOP, "gradient_accumulation_steps": 2}
    straight = sft_trainer(base_model(), tmp_path, tokenizer, CONFIGS[method](lora_dropout=0.2), (Push(),), **saving)
    straight.train()
    assert progress(straight.model) == EXPECTED[method]
    torch.manual_seed(77)
    resumed = sft_trainer(base_model(), tmp_path, tokenizer, CONFIGS[method](lora_dropout=0.2), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert_equal_trainers(straight, resumed)


@pytest.mark.parametrize("method", SCHEDULED)
def test_trainer_resumes_with_fractions(method: str, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 5}
    straight = trainer(adapted(method, **FRACTIONS[method]), tmp_path, (ScheduleCallback(),), **saving)
    straight.train()
    resumed = trainer(adapted(method, seed=77, **FRACTIONS[method]), tmp_path, (ScheduleCallback(),), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_equal_trainers(straight, resumed)


@pytest.mark.parametrize("method", SCHEDULED)
def test_the_best_model_is_loaded_at_the_end(method: str, tmp_path: Path) -> None:
    """Going back to a checkpoint goes back to its merge map and its warm-up step too."""
    model = adapted(method)
    run = trainer(
        model,
        tmp_path,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="step",
        greater_is_better=False,
        metrics=lambda prediction: {"step": run.state.global_step},
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    assert progress(model) == ([] if method == "ASLORA" else [2, 7])
    if method == "ASLORA":
        assert all(mapped == list(range(LAYERS)) for mapped in schedule_of(model).maps.values())


# An optimizer that can't be seen


class Hidden(torch.optim.SGD):
    """Steps flat copies of the parameters, as ZeRO does."""

    def __init__(self, parameters: list[nn.Parameter], lr: float = 0.1) -> None:
        self.real = parameters
        super().__init__([nn.Parameter(p.detach().clone()) for p in parameters], lr=lr)

    def step(self, closure: Any = None) -> None:
        for flat, real in zip(self.param_groups[0]["params"], self.real, strict=True):
            flat.data.copy_(real)
            flat.grad = real.grad
        super().step(closure)
        with torch.no_grad():
            for flat, real in zip(self.param_groups[0]["params"], self.real, strict=True):
                real.copy_(flat)


def hidden_run(model: PeftModel, steps: int, after: Callable[[], None] = lambda: None) -> None:
    optimizer = Hidden(trainable(model))
    model.train()
    for tokens in batches(steps):
        loss_of(model, tokens).backward()
        optimizer.step()
        after()
        model.zero_grad()


@pytest.mark.parametrize("method", SCHEDULED)
def test_a_hidden_optimizer_stops_with_the_remedy(method: str) -> None:
    with pytest.raises(RuntimeError, match=r"ScheduleCallback.*loraplex\.step\(model\)"):
        hidden_run(adapted(method), STEPS)


@pytest.mark.parametrize("method", SCHEDULED)
def test_the_explicit_step_remedies_a_hidden_optimizer(method: str) -> None:
    model = adapted(method)
    hidden_run(model, STEPS, lambda: loraplex.step(model))
    if method == "ASLORA":
        assert [merge[0] for merge in progress(model)] == [3, 3, 5, 5]
    else:
        assert progress(model) == [7, 7]


@CALLBACKS
@pytest.mark.parametrize("method", SCHEDULED)
def test_the_callback_remedies_a_hidden_optimizer(method: str, callbacks: tuple[Any, ...], tmp_path: Path) -> None:
    model = adapted(method)
    run = trainer(model, tmp_path, callbacks)
    run.optimizer = Hidden(trainable(model))
    run.train()
    if method == "ASLORA":
        assert [merge[0] for merge in progress(model)] == [3, 3, 5, 5]
    else:
        assert progress(model) == [7, 7]


@pytest.mark.parametrize("told", [False, True], ids=["untold", "told"])
def test_the_callback_finds_averages_in_another_folder(told: bool, tmp_path: Path) -> None:
    """A Trainer does not tell its callbacks where it resumes from; averages of a hidden optimizer lie there."""
    saving = {"save_strategy": "steps", "save_steps": STOP}
    straight = trainer(adapted("ASLORA"), tmp_path / "one", (Push(), ScheduleCallback()), **saving)
    straight.optimizer = Hidden(trainable(straight.model))
    straight.train()
    assert progress(straight.model) == EXPECTED["ASLORA"]
    checkpoint = tmp_path / "one" / f"checkpoint-{STOP}"
    callback = ScheduleCallback(resume_from=checkpoint if told else None)
    resumed = trainer(adapted("ASLORA", seed=77), tmp_path / "other", (callback,), **saving)
    resumed.optimizer = Hidden(trainable(resumed.model))
    if told:
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert progress(resumed.model) == EXPECTED["ASLORA"]
    else:
        with pytest.raises(RuntimeError, match=r"from step 4.*ScheduleCallback\(resume_from=checkpoint\)"):
            resumed.train(resume_from_checkpoint=str(checkpoint))


def test_another_models_optimizer_may_step_more_often() -> None:
    """An unrelated model is updated at every micro-batch, the adapter only at every eighth."""
    model, other = adapted("DUALLORA"), nn.Linear(2, 2)
    optimizer, others = OPTIMIZERS["adamw"](trainable(model)), torch.optim.SGD(other.parameters(), lr=0.1)
    model.train()
    for i, tokens in enumerate(batches(16)):
        loss_of(model, tokens).backward()
        other(torch.ones(1, 2)).sum().backward()
        others.step()
        if i % 8 == 7:
            optimizer.step()
            optimizer.zero_grad()
    assert progress(model) == [2, 7]
