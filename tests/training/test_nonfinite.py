"""NaN and Inf: the run stops, or leaves the update out, names the module, and keeps what was good before."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from faults import LAYER, Faults, bad_factor, bad_gradient, bad_loss, bad_output, same, state_of
from runs import METHODS, rows, without_times, write_run

import forking
import loraplex.recipes.training.run as run_module
from loraplex.commands.cli import main

TRAIN = {"max_steps": 8, "learning_rate": 5e-3, "eval_steps": None, "save_steps": 3, "per_device_train_batch_size": 4}


@pytest.fixture
def train(monkeypatch) -> Callable[..., int]:
    """Run the command with a fault in some steps."""
    attach = run_module._attach

    def start(run: Path, *options: str, steps=(), fault=bad_loss, look=lambda *_: None, prepare=lambda _: None) -> int:
        def with_faults(trainer, *rest):
            stop = attach(trainer, *rest)
            prepare(trainer)
            trainer.add_callback(Faults(trainer, steps, fault, look))
            return stop

        monkeypatch.setattr(run_module, "_attach", with_faults)
        return main(["train", str(run), *options])

    return start


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (bad_loss, "step 5: the loss is not finite: its module is not known"),
        (bad_output, f"step 5: the loss is not finite: {LAYER} gives Inf, and its inputs are finite."),
        (bad_gradient, f"step 5: the gradient is not finite: the gradient becomes Inf on its way back through {LAYER}"),
        (bad_factor, "step 5: the loss is not finite: lora_B of model.layers.1.self_attn.q_proj holds NaN."),
    ],
)
def test_stops_with_the_last_good_checkpoint(room, tmp_path, train, capfd, fault, message):
    whole, out = tmp_path / "whole", tmp_path / "out"
    kept = {}

    def look(trainer, step, when):
        if step == 5:
            kept.update(files(out / "checkpoint-3"))

    settings = TRAIN | ({"on_nonfinite": "skip"} if fault is bad_factor else {})  # skipping can't mend a factor
    assert train(write_run(room, out, "multilora", train=settings), steps=[5], fault=fault, look=look) == 2
    printed = capfd.readouterr().err
    assert message in printed
    assert f"checkpoint is {out}/checkpoint-3" in printed
    assert f"loraplex train {out}/run.yaml --resume --train.learning_rate 0.0025" in printed
    assert ("on_nonfinite skip" in printed) == (fault is not bad_factor)
    assert "Traceback" not in printed
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    assert files(out / "checkpoint-3") == kept
    assert not list(out.glob("adapter*"))
    found = [row for row in rows(out) if row["event"] == "train"]
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert (found[-1]["loss"] is None) == (fault is not bad_gradient)
    if fault is bad_output:
        assert train(write_run(room, whole, "multilora", train=TRAIN)) == 0
        assert train(out / "run.yaml", "--resume") == 0
        assert without_times(rows(out)) == without_times(rows(whole))
        assert (out / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(("method", "fault"), [(method, bad_gradient) for method in METHODS] + [("aslora", bad_loss)])
def test_skipped_update_changes_nothing(room, tmp_path, train, capfd, method, fault):
    """Step 5 is one of ASLoRA's merges and in Dual LoRA's warm-up."""
    out = tmp_path / "out"
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.3, **METHODS[method]}
    settings = TRAIN | {"on_nonfinite": "skip", "gradient_accumulation_steps": 2}
    run = write_run(room, out, method, train=settings, adapter=adapter)
    before, unchanged = {}, {}

    def look(trainer, step, when):
        if when == "before":
            before.update(state_of(trainer))
        else:
            unchanged[step] = same(before, state_of(trainer))
            assert all(p.grad is None for p in trainer.model.parameters())

    def prepare(trainer):
        find = trainer.guard._find

        def watched(*args):
            generator = torch.get_rng_state()
            gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            kept = copy.deepcopy(gradients)
            hooks = [(*m._forward_hooks, *m._forward_pre_hooks) for m in trainer.model.modules()]
            finding = find(*args)
            assert torch.equal(generator, torch.get_rng_state())
            torch.testing.assert_close(gradients, kept, rtol=0, atol=0, equal_nan=True)
            assert hooks == [(*m._forward_hooks, *m._forward_pre_hooks) for m in trainer.model.modules()]
            return finding

        trainer.guard._find = watched

    assert train(run, steps=[5], fault=fault, look=look, prepare=prepare) == 0
    assert unchanged == {step: step == 5 for step in range(1, 9)}
    assert "step 5 is left out, as the" in capfd.readouterr().err
    found = [(row["step"], row["not_finite"], row["module"]) for row in rows(out) if row["event"] == "skipped"]
    assert found == [(5, "loss", None) if fault is bad_loss else (5, "gradient", LAYER)]
    lost = [row["step"] for row in rows(out) if row["event"] == "train" and row["loss"] is None]
    assert lost == ([5] if fault is bad_loss else [])
    assert (out / "adapter_model.safetensors").is_file()


def test_second_pass_repeats_the_dropout(room, tmp_path, train):
    drawn = []

    def record(trainer):
        modules = [m for n, m in trainer.model.named_modules() if n.endswith("dropout") and "layers.0" in n]
        hooks = [m.register_forward_hook(lambda module, args, out: drawn.append(out.detach())) for m in modules]
        undo = bad_output(trainer)
        return lambda: [undo()] + [hook.remove() for hook in hooks]

    adapter = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "lora_dropout": 0.5}
    settings = TRAIN | {"on_nonfinite": "skip", "gradient_accumulation_steps": 2}
    run = write_run(room, tmp_path / "out", "multilora", train=settings, adapter=adapter)
    assert train(run, steps=[2], fault=record) == 0
    first, second, again = drawn
    assert first.equal(again)
    assert not first.eq(0).equal(second.eq(0)) or first.shape != second.shape


@pytest.mark.parametrize("micro", [0, 1])
def test_any_micro_batch_counts(room, tmp_path, train, capfd, micro):
    def in_one(trainer):
        compute, factors = trainer.compute_loss, iter([torch.nan, 1.0] if micro == 0 else [1.0, torch.nan])
        trainer.compute_loss = lambda *args, **kwargs: compute(*args, **kwargs) * next(factors)
        return lambda: delattr(trainer, "compute_loss")

    settings = TRAIN | {"gradient_accumulation_steps": 2, "logging_steps": 4}
    run = write_run(room, tmp_path / "out", "lora", train=settings)
    assert train(run, steps=[3], fault=in_one) == 2
    assert "step 3: the loss is not finite" in capfd.readouterr().err
    assert [row["step"] for row in rows(tmp_path / "out") if row["event"] == "train"] == [3]


def test_ten_skipped_in_a_row_stop_the_run(room, tmp_path, train, capfd):
    out = tmp_path / "out"
    settings = TRAIN | {"max_steps": 20, "on_nonfinite": "skip"}
    steps = [1, 2, *range(4, 20)]
    assert train(write_run(room, out, "lora", train=settings), steps=steps) == 2
    printed = capfd.readouterr().err
    assert "10 updates in a row were left out" in printed
    assert "on_nonfinite" not in printed
    assert [row["step"] for row in rows(out) if row["event"] == "skipped"] == [1, 2, *range(4, 14)]
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-12"}
    assert train(out / "run.yaml", "--resume", "--train.learning_rate", "1e-3") == 0
    rates = [row["learning_rate"] for row in rows(out) if row["event"] == "train"]
    # Steps 1, 2 and 4 to 12 were left out, and the linear schedule waited for them.
    assert rates == pytest.approx([5e-3] * 3 + [5e-3 * 19 / 20] * 9 + [1e-3 * (19 - step) / 20 for step in range(8)])


def test_all_labels_masked(room, tmp_path, train, capfd):
    def mask(trainer):
        compute = trainer.compute_loss

        def masked(model, inputs, *args, **kwargs):
            inputs["labels"].fill_(-100)
            return compute(model, inputs, *args, **kwargs)

        trainer.compute_loss = masked
        return lambda: delattr(trainer, "compute_loss")

    data = [{"path": str(room / "reviews.jsonl"), "eval_size": 16}]
    settings: dict[str, Any] = {"task": "classification", "model": str(room / "bert"), "data": data, "train": TRAIN}
    run = write_run(room, tmp_path / "out", "multilora", **settings)
    assert train(run, "--adapter.target_modules", "[query]", steps=[2], fault=mask) == 2
    printed = capfd.readouterr().err
    assert "step 2: the loss is not finite: every label of the batch is masked" in printed
    assert "No checkpoint was written yet" in printed


@pytest.mark.parametrize("at_end", [False, True])
def test_broken_factors_are_not_saved(room, tmp_path, train, capfd, at_end):
    """A factor that breaks in the optimizer's own step, just before a checkpoint or after the last one."""
    out = tmp_path / "out"

    def prepare(trainer):
        fit = trainer.train
        if at_end:
            trainer.train = lambda **options: (fit(**options), bad_factor(trainer))

    def look(trainer, step, when):
        if (step, when) == (6, "after") and not at_end:
            bad_factor(trainer)

    settings = TRAIN | ({"max_steps": 6} if at_end else {})
    assert train(write_run(room, out, "multilora", train=settings), prepare=prepare, look=look) == 2
    printed = capfd.readouterr().err
    assert "step 6 is not saved: lora_B of model.layers.1.self_attn.q_proj holds NaN" in printed
    assert f"checkpoint is {out}/checkpoint-{6 if at_end else 3}" in printed
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-3"} | (
        {"checkpoint-6"} if at_end else set()
    )
    assert not list(out.glob("adapter*"))
    assert train(out / "run.yaml", "--resume") == 0


def scaled(trainer, scale: float) -> None:
    """fp16 with a gradient scaler, which accelerate itself allows on GPUs only."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.accelerator.native_amp = True


@pytest.fixture
def fp16(monkeypatch) -> None:
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")


@pytest.mark.usefixtures("fp16")
def test_overflow_of_scaled_gradients_is_the_scalers_affair(room, tmp_path, train, capfd):
    run = write_run(room, tmp_path / "out", "lora", train=TRAIN)
    scales = []

    def look(trainer, step, when):
        scales.append(trainer.accelerator.scaler.get_scale())

    assert train(run, steps=[1, 2, 3, 4, 5], fault=bad_gradient, prepare=lambda t: scaled(t, 4.0), look=look) == 2
    assert "step 4: the gradient is not finite" in capfd.readouterr().err
    assert scales[::2] == [4.0, 2.0, 1.0, 0.5]


@pytest.mark.usefixtures("fp16")
def test_skipped_loss_leaves_the_scale(room, tmp_path, train):
    run = write_run(room, tmp_path / "out", "lora", train=TRAIN | {"on_nonfinite": "skip"})
    scales = []

    def look(trainer, step, when):
        scales.append(trainer.accelerator.scaler.get_scale())

    assert train(run, steps=[2, 3], prepare=lambda t: scaled(t, 1024.0), look=look) == 0
    assert scales == [1024.0] * 16
    assert [row["step"] for row in rows(tmp_path / "out") if row["event"] == "skipped"] == [2, 3]


def worker(rank: int, port: int, folder: Path) -> None:
    """Rank 1 alone meets a fault, in step 3; what this rank saw is left in a file."""
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in where.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    attach, seen = run_module._attach, {"code": {}, "unchanged": {}, "finding": []}
    before = {}

    def look(trainer, step, when):
        if when == "before":
            before.update(state_of(trainer))
            return
        seen["unchanged"][step] = same(before, state_of(trainer))
        seen["adapter"] = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]

    def with_fault(trainer, *rest):
        stop = attach(trainer, *rest)
        trainer.add_callback(Faults(trainer, [3] if rank == 1 else [], bad_output, look))
        agree = trainer.guard._agree
        trainer.guard._agree = lambda *args: (found := agree(*args), seen["finding"].append(found[0].module))[0]
        return stop

    run_module._attach = with_fault
    for action in ("stop", "skip"):
        seen["code"][action] = main(["train", str(folder / f"{action}.yaml")])
    torch.save(seen, folder / f"{rank}.pt")


def test_ranks_stop_and_skip_together(room, tmp_path):
    for action in ("stop", "skip"):
        settings = TRAIN | {"save_steps": 2, "use_cpu": True, "on_nonfinite": action}
        write_run(room, tmp_path / action, "aslora", train=settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forking.run_ranks(worker, 2, port, tmp_path, folder=tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["code"] == other["code"] == {"stop": 2, "skip": 0}
    assert one["unchanged"] == other["unchanged"] == {step: step == 3 for step in range(1, 9)}
    assert one["finding"] == other["finding"] == [LAYER, LAYER]
    assert same(one["adapter"], other["adapter"])
    assert [path.name for path in (tmp_path / "stop").glob("checkpoint-*")] == ["checkpoint-2"]
    assert [(row["step"], row["loss"]) for row in rows(tmp_path / "stop") if row["event"] == "train"][-1] == (3, None)
    skipped = [row for row in rows(tmp_path / "skip") if row["event"] == "skipped"]
    assert [(row["step"], row["not_finite"], row["module"]) for row in skipped] == [(3, "loss", LAYER)]
