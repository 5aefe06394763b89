"""The command under accelerate's launcher: DDP, FSDP2 and ZeRO train as one process does, and resume on any number.

Two processes on CPUs, with gloo; the configurations are those that the documentation names. Every run accumulates
gradients and recomputes activations.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.commands.launch import main as launcher
from safetensors.torch import load_file
from torch.distributed.fsdp import FullyShardedDataParallel

from forking import join, run, start
from loraplex.commands.cli import main

sys.path.append(str(Path(__file__).parents[1] / "training"))
from on_cpus import run_all
from runs import METHODS, furnish, rows, write_run

from test_distributed import adapted, global_batch

pytest.importorskip("deepspeed", reason="ZeRO needs deepspeed, which has no build for this platform")

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
ENGINES: dict[str, tuple[str, dict[str, str]]] = {
    "ddp": ("ddp", {}),
    "fsdp2": ("fsdp2", {}),
    "fsdp2-sharded": ("fsdp2", {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}),
    "zero2": ("zero2", {}),
    "zero3": ("zero3", {}),
}
LAUNCHED = ("fsdp2", "zero3")
"""Engines whose first runs are the launcher's processes; the others' fork in the environment that it gave a script."""
BATCH = 8
RESUMED = ["aslora", "dual_lora", "multilora"]
HALF = {"dtype": "bfloat16", "bf16": True}


def launch(engine: str, script: str, *arguments: Path, folder: Path) -> str:
    """Run a script of this folder in two processes of accelerate's launcher; what was printed."""
    name, variables = ENGINES[engine]
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    if name == "zero3":
        # DeepSpeed leaves parameters whole that are as small as all of these.
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        auto = dict.fromkeys(
            ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"], "auto"
        )
        (folder / "zero3.json").write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": "auto"}, **auto}))
        config["deepspeed_config"] = {"deepspeed_config_file": str(folder / "zero3.json"), "zero3_init_flag": True}
    if "FSDP_STATE_DICT_TYPE" in variables:
        config["fsdp_config"]["fsdp_state_dict_type"] = variables["FSDP_STATE_DICT_TYPE"]
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    command = ["--config_file", str(folder / "accelerate.yaml")]
    command += ["--num_processes", "2", "--main_process_port", str(free_port())]
    command += [str(Path(__file__).with_name(script)), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    done = run(accelerate_launch, command, folder=folder, env=environment)
    return done.stdout + done.stderr


def accelerate_launch(arguments: list[str]) -> None:
    """The program `accelerate launch`."""
    sys.argv = ["accelerate-launch", *arguments]
    launcher()


def launch_again(
    launched: Path, processes: int, jobs: list[dict[str, Any]], folder: Path
) -> tuple[list[list[int]], str]:
    """What `launch` returns, of forks in the environment that the launcher gave in the folder `launched`.

    As under a launcher, all are ended where one fails.
    """
    write_jobs(folder, jobs)
    given = json.loads((launched / "0.environment.json").read_text())
    given = {name: value for name, value in given.items() if not name.startswith("TORCHELASTIC_")}
    port, ranks = str(free_port()), []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        environment = {**given, **{name: str(value) for name, value in place.items()}, "MASTER_PORT": port}
        ranks.append(start(run_all, folder / "jobs.json", folder, out=folder / f"{rank}.log", env=environment))
    codes = join(ranks)
    text = "".join((folder / f"{rank}.log").read_text() for rank in range(processes))
    return codes_of(folder), f"{text}\nexit codes: {codes}"


def write_jobs(folder: Path, jobs: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))


def codes_of(folder: Path) -> list[list[int]]:
    """By rank and job; nothing from a launch that died."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("[0-9].json"))]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def job(room: Path, output_dir: Path, method: str, processes: int, **options: Any) -> dict[str, Any]:
    """A run whose global batch is the same for any number of processes."""
    train = {"max_steps": 12, "learning_rate": 5e-3, "eval_steps": 6, "save_steps": 4, "save_total_limit": 9}
    train |= {"weight_decay": 0.1, "lr_scheduler_type": "linear", "warmup_steps": 2, "bf16": False}
    train |= {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "use_cpu": options.pop("alone", False)}
    train["per_device_train_batch_size"] = BATCH // 2 // processes
    changes: dict[str, Any] = {"train": train}
    if options.get("reentrant"):
        train["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    if options.pop("half", False):
        train["bf16"] = True
        changes["dtype"] = "bfloat16"
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    return {"argv": ["train", str(write_run(room, output_dir, method, **changes)), "--debug"], **options}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("room"))


@pytest.fixture(scope="module")
def alone(room: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process, without a launcher."""
    folder = tmp_path_factory.mktemp("alone")
    for method in METHODS:
        assert main(job(room, folder / method, method, 1, alone=True)["argv"]) == 0
    for method in ("aslora", "dual_lora"):
        assert main(job(room, folder / f"{method}-half", method, 1, alone=True, half=True)["argv"]) == 0
    return folder


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def together(engine: str, room: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of two processes."""
    folder = tmp_path_factory.mktemp(engine)
    jobs = [job(room, folder / method, method, 2) for method in METHODS]
    jobs += [job(room, folder / f"{method}-half", method, 2, half=True) for method in ("aslora", "dual_lora")]
    launched = folder / "launch"
    write_jobs(launched, jobs)
    if engine in LAUNCHED:
        text, codes = (
            launch(engine, "on_cpus.py", launched / "jobs.json", launched, folder=launched),
            codes_of(launched),
        )
    else:
        text = launch(engine, "environment.py", launched, folder=launched)
        assert len(list(launched.glob("*.environment.json"))) == 2, text
        codes, text = launch_again(launched, 2, jobs, folder / "forked")
    assert codes == [[0] * len(jobs)] * 2, text
    return folder


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter_model.safetensors")


def losses(run: Path, event: str) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in rows(run) if row["event"] == event])


def assert_same_run(run: Path, alone: Path) -> None:
    for event in ("train", "eval"):
        torch.testing.assert_close(losses(run, event), losses(alone, event), rtol=1e-5, atol=1e-5)
    found, expected = tensors(run), tensors(alone)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one(method: str, together: Path, alone: Path) -> None:
    assert_same_run(together / method, alone / method)
    # Each shared factor once, whole.
    sizes = [(folder / method / "adapter_model.safetensors").stat().st_size for folder in (together, alone)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("method", ["aslora", "dual_lora"])
def test_half_precision(method: str, together: Path, alone: Path) -> None:
    run, expected = together / f"{method}-half", alone / f"{method}-half"
    torch.testing.assert_close(losses(run, "train"), losses(expected, "train"), rtol=2e-3, atol=2e-3)
    assert all(tensor.numel() and tensor.isfinite().all() for tensor in tensors(run).values())


def test_merges_and_warmup_happened(together: Path, alone: Path) -> None:
    merges = {key: t for key, t in tensors(together / "aslora").items() if key.endswith("__merges")}
    assert len(merges) == 2
    for key, tensor in merges.items():
        assert sorted(step for step in tensor[1].tolist() if step) == [5, 8]
        assert torch.equal(tensor, tensors(alone / "aslora")[key])
    warmup = [t for key, t in tensors(together / "dual_lora").items() if key.endswith("warmup")]
    assert [tensor.tolist() for tensor in warmup] == [[6, 6]]


def test_checkpoints_hold_whole_adapters(together: Path) -> None:
    for method in METHODS:
        expected = {key: tensor.shape for key, tensor in tensors(together / method / "checkpoint-12").items()}
        assert expected == {key: tensor.shape for key, tensor in tensors(together / method).items()}
        assert all(tensor.numel() for tensor in tensors(together / method / "checkpoint-4").values())


@pytest.fixture(scope="module")
def resumed(engine: str, together: Path, room: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process goes on from the first checkpoint that two have written."""
    folder = tmp_path_factory.mktemp(f"{engine}-resumed")
    jobs = []
    for method in RESUMED:
        shutil.copytree(together / method, folder / method)
        for later in ("checkpoint-8", "checkpoint-12"):
            shutil.rmtree(folder / method / later)
        (folder / method / "adapter_model.safetensors").unlink()
        again = job(room, folder / method, method, 1)
        shutil.copy(folder / f"{method}.yaml", folder / method / "run.yaml")
        jobs.append({"argv": [*again["argv"], "--resume"]})
    codes, text = launch_again(together / "launch", 1, jobs, folder / "launch")
    assert codes == [[0] * len(jobs)], text
    return folder


@pytest.mark.parametrize("method", RESUMED)
def test_resumes_on_another_number_of_processes(method: str, resumed: Path, alone: Path) -> None:
    assert_same_run(resumed / method, alone / method)


def test_running_averages_go_on(engine: str, resumed: Path, together: Path) -> None:
    """Merges could happen to be the same with averages that start anew."""
    if engine == "ddp":
        files = [folder / "aslora" / "checkpoint-8" / "optimizer.pt" for folder in (resumed, together)]
        states = [torch.load(file, weights_only=True)["state"] for file in files]
        one, two = (
            {f"{i}/{key}": entry[key] for i, entry in s.items() for key in entry if "aslora" in key} for s in states
        )
    else:
        one, two = (load_file(f / "aslora" / "checkpoint-8" / "schedule.safetensors") for f in (resumed, together))
    assert one.keys() == two.keys()
    assert any(key.endswith("aslora_average") for key in one)
    for key, value in two.items():
        torch.testing.assert_close(torch.as_tensor(one[key]), torch.as_tensor(value), rtol=1e-4, atol=1e-6, msg=key)


ZERO3 = pytest.mark.parametrize("engine", ["zero3"], indirect=True, scope="module")


@ZERO3
def test_a_process_that_is_killed_while_saving(together: Path, room: Path, alone: Path, tmp_path: Path) -> None:
    launched, run = together / "launch", tmp_path / "aslora"
    codes, _ = launch_again(launched, 2, [job(room, run, "aslora", 2, dies=1)], tmp_path / "first")
    assert codes == []
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]
    again = job(room, run, "aslora", 2)
    codes, text = launch_again(launched, 2, [{"argv": [*again["argv"], "--resume"]}], tmp_path / "second")
    assert codes == [[0], [0]], text
    assert_same_run(run, alone / "aslora")
    assert not list(run.glob(".*"))


def test_random_kills(engine: str, together: Path, room: Path, alone: Path, tmp_path: Path) -> None:
    """Of one process of two, at any moment; LORAPLEX_KILLS asks for a longer series."""
    whole, run = together / "aslora", tmp_path / "aslora"
    seconds = (whole / "adapter_model.safetensors").stat().st_mtime - (whole / "run.yaml").stat().st_mtime
    draw = random.Random(list(ENGINES).index(engine))
    killed: list[tuple[int, float]] = []
    for number in itertools.count():
        if not (resumes := any(run.glob("checkpoint-*"))):
            shutil.rmtree(run, ignore_errors=True)
        going_on = job(room, run, "aslora", 2)
        going_on["argv"] += ["--resume"] * resumes
        if len(killed) < int(os.environ.get("LORAPLEX_KILLS", "1")):
            going_on["dies_after"] = draw.randrange(2), draw.uniform(0.1, 0.7) * seconds
        codes, text = launch_again(together / "launch", 2, [going_on], tmp_path / f"launch-{number}")
        if codes == [[0], [0]]:
            assert_same_run(run, alone / "aslora")
            assert not list(run.glob(".*"))
            if "dies_after" not in going_on:
                break
            shutil.rmtree(run)
        else:
            assert "dies_after" in going_on, text
            assert "-9" in text.rpartition("exit codes: ")[2], text
            killed.append(going_on["dies_after"])
    print(f"{engine}: a run takes {seconds:.1f} s; (rank, after s) killed: {killed}")


@ZERO3
def test_reentrant_checkpointing_under_zero3_is_refused(together: Path, room: Path, tmp_path: Path) -> None:
    """It would lose all but one layer's gradient of a shared factor, without a word."""
    jobs = [job(room, tmp_path / "masa", "masa", 2, reentrant=True)]
    codes, text = launch_again(together / "launch", 2, jobs, tmp_path / "launch")
    assert codes == []
    assert "Reentrant activation checkpointing" in text
    assert "'use_reentrant': False" in text


def test_fsdp1_is_refused_by_the_command(room: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    assert main(["train", str(write_run(room, tmp_path / "out", "masa"))]) == 2
    assert "fsdp_version: 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fsdp1_is_refused_by_the_layers(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(adapted("MASA"), use_orig_params=True, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=r"FSDP1.*fully_shard"):
            model(input_ids=global_batch(0))
    finally:
        dist.destroy_process_group()


def test_data_parallel_is_refused() -> None:
    # As nn.DataParallel copies modules; copying their parameters before would need GPUs.
    with pytest.raises(ValueError, match=r"nn\.DataParallel.*torchrun"):
        [module._replicate_for_data_parallel() for module in adapted("DUALLORA").modules()]
