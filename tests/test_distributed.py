"""Plain loops in two processes, under DDP and FSDP2, train as one process does on the same global batch."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import forking
from loraplex import (
    AsLoraConfig,
    DualLoraConfig,
    MasaConfig,
    MultiLoraConfig,
    gathered_state_dict,
    load_schedules,
    save_schedules,
)
from loraplex.methods.aslora.shared import AsLoraShared
from loraplex.methods.dual_lora.warmup import DualLoraShared
from loraplex.tuner.schedules import schedules

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

STEPS, BATCH, VOCAB = 7, 4, 32
ENGINES = ("ddp", "fsdp2", "zero1")
COMMON: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 12,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}
CASES: dict[str, Any] = {
    "MULTILORA": lambda: MultiLoraConfig(**COMMON),
    "MASA": lambda: MasaConfig(**COMMON, num_experts=2),
    "ASLORA": lambda: AsLoraConfig(**COMMON, merge_start_step=1, merge_interval=2, num_merges=2),
    "DUALLORA": lambda: DualLoraConfig(**COMMON, warmup_steps=5, init_std=0.3),
}


def adapted(method: str) -> PeftModel:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )
    model = get_peft_model(base, CASES[method]())
    for name, shared in schedules(model):
        if name == "default" and isinstance(shared, AsLoraShared):
            # Clear distances: rounding must not decide which layers are merged.
            for family in shared.families:
                for layer in range(4):
                    nn.init.constant_(shared.B(family, layer), 0.1 * layer**2)
    return model


def global_batch(step: int) -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, 6), generator=torch.Generator().manual_seed(step))


def progress(model: nn.Module) -> Any:
    shared = dict(schedules(model)).get("default")
    if isinstance(shared, AsLoraShared):
        return [[list(merge) for merge in sorted(shared.merge_history())], shared.maps]
    return shared.warmup.tolist() if isinstance(shared, DualLoraShared) else None


def distribute(model: PeftModel, engine: str) -> nn.Module:
    if engine in ("ddp", "zero1"):
        return DistributedDataParallel(model, find_unused_parameters=False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def optimizer_of(model: PeftModel, engine: str) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if engine == "zero1":
        # Here, since pytest makes an error of a warning in its import.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=1e-2)
    return torch.optim.AdamW(parameters, lr=1e-2)


def train(
    method: str, rank: int = 0, world: int = 1, engine: str = "alone", folder: Path | None = None
) -> dict[str, Any]:
    """Losses, progress and adapter after a run; each rank takes its share of the same global batches.

    With a folder the run stops half-way, keeps what a resume needs there, and goes on in a model made anew.
    """
    peft_model = adapted(method)
    model = peft_model if engine == "alone" else distribute(peft_model, engine)
    optimizer = optimizer_of(peft_model, engine)
    model.train()
    losses = []
    for step in range(STEPS):
        if folder is not None and step == STEPS // 2:
            peft_model, model, optimizer = made_anew(method, peft_model, optimizer, engine, folder)
        share = global_batch(step).chunk(world)[rank]
        loss = model(input_ids=share, labels=share).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    state = whole_adapter(peft_model)
    return {"losses": losses, "progress": progress(peft_model), "adapter": state}


def whole_adapter(model: PeftModel) -> dict[str, Tensor]:
    gathered = get_peft_model_state_dict(model, state_dict=gathered_state_dict(model))
    return {key: tensor.clone() for key, tensor in gathered.items()}


def made_anew(
    method: str, model: PeftModel, optimizer: torch.optim.Optimizer, engine: str, folder: Path
) -> tuple[PeftModel, nn.Module, torch.optim.Optimizer]:
    """Another model, wrapped and trained as far as `model`, as a program of its own would make it."""
    options = StateDictOptions(full_state_dict=True)
    if engine == "zero1":
        optimizer.consolidate_state_dict(to=0)
        said = [optimizer.state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(said)
        (moments,) = said
    else:
        moments = get_optimizer_state_dict(model, optimizer, options=options)
    folder.mkdir(parents=True, exist_ok=True)
    save_schedules(model, folder)
    state = whole_adapter(model)
    dist.barrier()
    again = adapted(method)
    set_peft_model_state_dict(again, state)
    wrapped = distribute(again, engine)
    optimizer = optimizer_of(again, engine)
    if engine == "zero1":
        optimizer.load_state_dict(moments)
    else:
        set_optimizer_state_dict(again, optimizer, moments, options=options)
    check_missing(again)
    load_schedules(again, folder)
    wrapped.train()
    return again, wrapped, optimizer


def check_missing(model: PeftModel) -> None:
    """Without `load_schedules` the averages are missing: on all ranks, before an update changes anything."""
    if CASES["ASLORA"]().peft_type != model.peft_type:
        return
    with pytest.raises(RuntimeError, match=r"from step 3.*load_schedules"):
        dict(schedules(model))["default"].step()


def disagree(rank: int, world: int, engine: str) -> Any:
    """Averages differ between ranks as rounding might let them; what each rank merged then."""
    model = adapted("ASLORA")
    wrapped = model if engine == "plain" else distribute(model, engine)
    optimizer = optimizer_of(model, engine)
    optimizer.param_groups[0]["lr"] = 0.0  # the B's stay where `adapted` put them
    for step in range(3):
        share = global_batch(step).chunk(world)[rank]
        wrapped(input_ids=share, labels=share).loss.backward()
        if rank == 1 and step == 2:
            # Layers 2 and 3 become the closest here.
            shared = dict(schedules(model))["default"]
            for family, averages in shared.averages.by_family.items():
                averages[2].add_(0.75)
                assert shared.maps[family] == [0, 1, 2, 3]
        optimizer.step()
        optimizer.zero_grad()
    return progress(model)


def worker(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        runs = {f"{engine}-{method}": train(method, rank, world, engine) for engine in ENGINES for method in CASES}
        for engine in ("fsdp2", "zero1"):
            runs[f"resumed.{engine}-ASLORA"] = train(
                "ASLORA", rank, world, engine, Path(folder) / f"checkpoint.{engine}"
            )
        adapters = {f"{run}/{key}": t for run, result in runs.items() for key, t in result.pop("adapter").items()}
        save_file(adapters, Path(folder) / f"{rank}.safetensors")
        told = {engine: disagree(rank, world, engine) for engine in ("plain", *ENGINES)}
        (Path(folder) / f"{rank}.json").write_text(json.dumps(runs))
        (Path(folder) / f"{rank}.disagree.json").write_text(json.dumps(told))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw, for every method; one start of the processes serves all tests."""
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forking.run_ranks(worker, 2, 2, port, str(folder), folder=folder)
    found = [read_runs(folder, rank) for rank in range(2)]
    for rank, runs in enumerate(found):
        runs["disagree"] = json.loads((folder / f"{rank}.disagree.json").read_text())
    return found


def read_runs(folder: Path, rank: int) -> dict[str, Any]:
    runs = json.loads((folder / f"{rank}.json").read_text())
    for path, tensor in load_file(folder / f"{rank}.safetensors").items():
        run, key = path.split("/")
        runs[run].setdefault("adapter", {})[key] = tensor
    return runs


RESUMED = ["resumed.fsdp2", "resumed.zero1"]
RUNS = [*(f"{engine}-{method}" for engine in ENGINES for method in CASES), *(f"{name}-ASLORA" for name in RESUMED)]


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_train_as_one(run: str, ranks: list[dict[str, Any]]) -> None:
    alone = train(run.partition("-")[2])
    for rank in ranks:
        assert rank[run]["progress"] == alone["progress"]
        torch.testing.assert_close(torch.tensor(rank[run]["losses"]), torch.tensor(alone["losses"]))
        for key, value in alone["adapter"].items():
            torch.testing.assert_close(rank[run]["adapter"][key], value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("run", RUNS)
def test_both_processes_hold_the_same_adapter(run: str, ranks: list[dict[str, Any]]) -> None:
    one, other = (rank[run]["adapter"] for rank in ranks)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("engine", [*ENGINES, *RESUMED])
def test_merges_happened(engine: str, ranks: list[dict[str, Any]]) -> None:
    """Steps went on after each merge, so a parameter without a gradient would have stopped the run."""
    history, maps = ranks[0][f"{engine}-ASLORA"]["progress"]
    assert [merge[0] for merge in history] == [3, 3, 5, 5]
    assert all(mapped == [2, 2, 2, 3] for mapped in maps.values())


@pytest.mark.parametrize("engine", ENGINES)
def test_warmup_happened(engine: str, ranks: list[dict[str, Any]]) -> None:
    assert ranks[0][f"{engine}-DUALLORA"]["progress"] == [5, 5]


@pytest.mark.parametrize("engine", ["plain", *ENGINES])
def test_the_first_rank_decides(engine: str, ranks: list[dict[str, Any]]) -> None:
    """Rank 1 would have merged layers 2 and 3."""
    one, other = (rank["disagree"][engine] for rank in ranks)
    assert one == other
    history, _ = one
    assert [merge[0] for merge in history] == [3, 3]
    assert [merge[2:] for merge in history] == [[0, 1], [0, 1]]
