"""kill -9 at any moment: the run continues from its last whole checkpoint, and its end is that of an unbroken one."""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from pathlib import Path

import pytest
from runs import METHODS, rows, without_times, write_run

from loraplex.commands.cli import main
from loraplex.recipes.training.checkpoints import checkpoints, verify
from loraplex.recipes.training.lock import LOCK_NAME

if sys.platform == "win32":
    pytest.skip("kills processes by signals", allow_module_level=True)
from killing import Launcher, die_at, die_between_renames, die_merging, die_writing

SEED, KILLS = 20, int(os.environ.get("LORAPLEX_KILLS", "2"))
"""Of the random kills, and their number for each of four methods; `make soak` asks for many."""
TRAIN = {"max_steps": 24, "learning_rate": 5e-3, "weight_decay": 0.1, "eval_steps": 5, "save_total_limit": 2}
CHANGES = {
    "aslora": {"save_steps": 1},
    "dual_lora": {"save_steps": 2},
    "masa": {"save_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "multilora": {"save_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 4},
}
LONGER = {"aslora": {"merge_start_step": 2, "merge_interval": 9}, "dual_lora": {"warmup_steps": 15}}
KILLED, CUT = -9, -25


@pytest.fixture(scope="module")
def launch(room) -> Launcher:
    return Launcher(room / "stderr")


@pytest.fixture(scope="module")
def unbroken(room, launch):
    """method → (output folder of a run that nothing stopped, its seconds)."""
    found: dict[str, tuple[Path, float]] = {}

    def make(method: str) -> tuple[Path, float]:
        if method not in found:
            assert launch(room / "none.yaml") == 2  # the first start imports everything
            started = time.monotonic()
            assert launch(configured(room, room / "whole" / method, method)) == 0, launch.errors
            found[method] = room / "whole" / method, time.monotonic() - started
        return found[method]

    return make


def configured(room: Path, output_dir: Path, method: str) -> Path:
    output_dir.parent.mkdir(exist_ok=True)
    adapter = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
    adapter |= METHODS[method] | LONGER.get(method, {})
    return write_run(room, output_dir, method, adapter=adapter, train={**TRAIN, **CHANGES[method]})


def go_on(launch: Launcher, run: Path, **how) -> int:
    """Resume, or start again where that is what the message says; the exit code."""
    out = run.with_suffix("")
    code = launch(run, "--resume", **how) if out.exists() else 2
    if code == 2 and not checkpoints(out):
        assert not out.exists() or "start the run without --resume" in launch.errors
        code = launch(run, **how)
    return code


def check_same(broken: Path, whole: Path) -> None:
    assert without_times(rows(broken)) == without_times(rows(whole))
    assert [row["event"] for row in rows(broken)].count("end") == 1
    assert names(broken) == names(whole)
    newest = checkpoints(whole)[0].name
    for name in ("adapter_model.safetensors", "adapter_config.json", "loss.png", f"{newest}/optimizer.pt"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    assert [verify(checkpoint) for checkpoint in checkpoints(broken)] == [None, None]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("method", CHANGES)
def test_random_kills(room, tmp_path, launch, unbroken, method):
    whole, seconds = unbroken(method)
    run = configured(room, tmp_path / method, method)
    draw = random.Random(SEED + list(METHODS).index(method))
    killed: list[float] = []
    while len(killed) < KILLS:
        after = draw.uniform(0.2, 0.65) * seconds
        code = launch(run, *["--resume"] * bool(checkpoints(tmp_path / method)), kill_after=after)
        if code == 0:
            check_same(tmp_path / method, whole)
            shutil.rmtree(tmp_path / method)
        else:
            assert code == KILLED, launch.errors
            killed.append(round(after, 3))
    print(f"{method}: seed {SEED}, killed after {killed} s")
    assert go_on(launch, run) == 0, launch.errors
    check_same(tmp_path / method, whole)


MERGING = ["merges[1, lower] = t", "self.maps[family] = mapped", "gone = state_of("]
BEFORE = ["os.rename .metrics.jsonl.*.tmp", "os.mkdir .saving/checkpoint-*", "os.rename .saving/checkpoint-*"]
BEFORE += ["os.rename checkpoint-*", "os.remove optimizer.pt", "os.remove files.json"]
WRITING = ["adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
WRITING = [f".saving/checkpoint-*/{name}" for name in (*WRITING, "trainer_state.json", "files.json")]
WRITING += [".lock", ".run.yaml.*.tmp", ".metrics.jsonl.*.tmp", "metrics.jsonl"]
FINISHED = ["os.rename .adapter_model.safetensors.*.tmp", "os.rename .loss.png.*.tmp"]
WRITING_FINISHED = [".adapter_model.safetensors.*.tmp", ".loss.png.*.tmp", ".README.md.*.tmp", "metrics.jsonl"]
LAST = ["os.rename .adapter-*/adapter_model.safetensors", "os.rmdir .saving"]


def test_kills_at_chosen_moments(room, tmp_path, launch, unbroken):
    """Inside a merge, before each change in the output folder, and in the middle of each file."""
    whole, _ = unbroken("aslora")
    out = tmp_path / "aslora"
    run = configured(room, out, "aslora")

    def die(prepare, *given) -> None:
        assert go_on(launch, run, prepare=prepare, given=given) == KILLED, (given, launch.errors)

    def die_halfway(name: str) -> None:
        after = length(whole, name) // 2
        code = go_on(launch, run, prepare=die_writing, given=(out, f"open {name}", after))
        assert code == CUT, (name, launch.errors)
        if name == "metrics.jsonl":
            assert not (out / name).read_text().endswith("\n")
        elif not name.endswith(".safetensors"):  # whose size is set before it is written
            assert after in {path.stat().st_size for path in out.rglob("*") if path.is_file()}

    def end() -> None:
        assert go_on(launch, run) == 0, launch.errors
        check_same(out, whole)

    for line in MERGING:
        die(die_merging, line)
    for operation in BEFORE:
        die(die_at, out, operation)
    for name in WRITING:
        die_halfway(name)
    for operation in ["os.mkdir .adapter-*", *FINISHED]:
        die(die_at, out, operation)
    for name in WRITING_FINISHED:
        die_halfway(name)
    end()
    for operation in LAST:
        shutil.rmtree(checkpoints(out)[0])
        die(die_at, out, operation)
        end()


def length(whole: Path, name: str) -> int:
    """Of what is written; of metrics.jsonl a line."""
    if name in (".lock", "metrics.jsonl"):
        return 40
    if name.startswith(".saving"):
        return (checkpoints(whole)[-1] / Path(name).name).stat().st_size
    return (whole / name.removeprefix(".").removesuffix(".*.tmp")).stat().st_size


@pytest.mark.parametrize(
    ("name", "damage", "die", "left"),
    [
        ("optimizer.pt", "cut off", die_at, True),
        ("scheduler.pt", "missing", die_between_renames, False),
        ("files.json", "cut off", die_between_renames, False),
    ],
)
def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    room, tmp_path, launch, unbroken, name, damage, die, left
):
    """Even if it is killed before a whole checkpoint takes the damaged one's place, or where neither stands."""
    whole, _ = unbroken("aslora")
    out, newest = tmp_path / "aslora", checkpoints(whole)[0].name
    run = configured(room, out, "aslora")
    shutil.copytree(whole, out)
    file = out / newest / name
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    given = (out, "os.rename .saving/checkpoint-*")
    assert launch(run, "--resume", prepare=die, given=given) == KILLED, launch.errors
    assert f"warning: {newest}: {name} is {damage}" in launch.errors
    assert (out / newest).exists() == left
    assert launch(run, "--resume") == 0, launch.errors
    check_same(out, whole)


def test_second_process_is_refused(room, tmp_path, launch, unbroken, capsys):
    whole, _ = unbroken("aslora")
    out = tmp_path / "aslora"
    run = configured(room, out, "aslora")
    process = launch.start(run)
    while not (out / LOCK_NAME).exists():
        time.sleep(0.01)
    time.sleep(0.05)
    assert main(["train", str(run), "--resume"]) == 2
    assert f"error: {out} is in use by process {process.pid}: " in capsys.readouterr().err
    process.join()
    check_same(out, whole)
