"""Merged checkpoints, written file by file: equal to merging in memory, whole, and honest about rounding.

Expected weights are W from the base's files plus `helpers.naive_updates`.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig

import helpers as h
import loraplex
from helpers import ARCHS, MERGEABLE, config, naive_updates, output, ready, relative
from loraplex.export import checkpoint_files, merged
from loraplex.export.merged import MergedExport, OtherLayout, merge_checkpoint

LLAMA = ARCHS["llama"]
BATCH = LLAMA.inputs()

tied_is_fine = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")


class Room:
    """A sharded base checkpoint, an adapter on it, and the adapter on the checkpoint's skeleton."""

    def __init__(
        self,
        folder: Path,
        method: str,
        arch: str = "llama",
        dtype: torch.dtype = torch.float32,
        shards: str = "30KB",
        change: Callable[[nn.Module], None] | None = None,
        base: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.arch, self.base, self.adapter, self.out = ARCHS[arch], folder / "base", folder / "adapter", folder / "out"
        plain = self.arch.build(**(base or {})).to(dtype)
        plain.config.dtype = dtype
        plain.save_pretrained(self.base, max_shard_size=shards)
        model = get_peft_model(plain, config(method, **{"target_modules": self.arch.targets, **settings}))
        ready(model)
        if change is not None:
            with torch.no_grad():
                change(model)
        self.model = model.eval()
        model.save_pretrained(self.adapter, save_embedding_layers=False)
        self.skeleton = self.load_skeleton()

    def load_skeleton(self) -> PeftModel:
        with torch.device("meta"):
            skeleton = self.arch.auto.from_config(AutoConfig.from_pretrained(self.base))
        return PeftModel.from_pretrained(skeleton, self.adapter, low_cpu_mem_usage=True)

    def merge(self, **settings: Any) -> MergedExport:
        return merge_checkpoint(self.skeleton, self.base, self.out, **settings)

    def reload(self, **settings: Any) -> nn.Module:
        """The merged checkpoint, by transformers alone; every weight must come from the files."""
        model, report = self.arch.auto.from_pretrained(
            self.out, output_loading_info=True, **{"dtype": "auto", **settings}
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        return model.eval()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint; none may come twice."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        assert not set(found) & set(tensors)
        found.update(tensors)
    return found


def check_index(folder: Path) -> None:
    """The index names each tensor's file, and the size of all; a checkpoint of one file has none."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if files == ["model.safetensors"]:
        assert not index.exists()
        return
    content, sizes = json.loads(index.read_text()), 0
    expected = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                expected[key] = file
                sizes += tensors.get_tensor(key).nbytes
    assert content["weight_map"] == expected
    assert content["metadata"]["total_size"] == sizes


def check_merged(room: Room, export: MergedExport, dtype: torch.dtype | None = None) -> None:
    """W + ΔW where the adapter acts, bit for bit the base elsewhere; reported what rounding took away."""
    before, after, deltas = tensors_of(room.base), tensors_of(room.out), naive_updates(room.model)
    assert sorted(after) == sorted(before)
    rows = {module.module: module for module in export.modules}
    assert sorted(rows) == sorted(deltas)
    transposed = room.arch is ARCHS["gpt2"]
    for key, weight in before.items():
        delta = deltas.get(key.removesuffix(".weight"))
        assert after[key].dtype == (dtype or weight.dtype)
        if delta is None:
            assert torch.equal(after[key], weight.to(after[key].dtype)), key
            continue
        delta = delta.T if transposed else delta
        total = weight.double() + delta
        eps = torch.finfo(after[key].dtype).eps
        torch.testing.assert_close(after[key].double(), total, rtol=eps, atol=1e-6)
        row = rows[key.removesuffix(".weight")]
        assert row.norm == pytest.approx(delta.norm().item(), rel=1e-5)
        lost = (after[key].double() - total).norm().item() / delta.norm().item()
        assert row.lost == pytest.approx(lost, rel=1e-2, abs=2e-7)
    missed = sum((row.lost * row.norm) ** 2 for row in rows.values())
    assert export.lost == pytest.approx((missed / sum(row.norm**2 for row in rows.values())) ** 0.5)
    assert json.loads(json.dumps(export.to_dict()))["lost"] == export.lost


# Equal to merging in memory


@pytest.mark.parametrize("method", MERGEABLE)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_file_by_file_equals_merging_in_memory(method: str, arch: str, tmp_path: Path) -> None:
    room = Room(tmp_path, method, arch)
    assert len(list(room.base.glob("*.safetensors"))) > 3
    inputs = room.arch.inputs()
    expected = output(room.model, inputs)
    export = room.merge()
    check_merged(room, export)
    check_index(room.out)
    assert sorted(path.name for path in room.out.glob("*.safetensors")) == sorted(
        path.name for path in room.base.glob("*.safetensors")
    )
    torch.testing.assert_close(output(room.reload(), inputs), expected, rtol=1e-4, atol=1e-5)
    plain = room.model.merge_and_unload().state_dict()
    for key, tensor in tensors_of(room.out).items():
        torch.testing.assert_close(tensor, plain[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arch", ["t5", "roberta", "deberta", "opt", "qwen2"])
def test_other_architectures(arch: str, tmp_path: Path) -> None:
    room = Room(tmp_path, "aslora", arch)
    inputs = room.arch.inputs()
    check_merged(room, room.merge())
    check_index(room.out)
    torch.testing.assert_close(output(room.reload(), inputs), output(room.model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 9}},
        {"layers_to_transform": [0, 2, 4], "target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["v_proj", "lm_head"]},
    ],
)
def test_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    room = Room(tmp_path, "aslora", **settings)
    check_merged(room, room.merge())
    torch.testing.assert_close(output(room.reload(), BATCH), output(room.model, BATCH), rtol=1e-4, atol=1e-5)


def test_one_file(tmp_path: Path) -> None:
    room = Room(tmp_path, "multilora", shards="1GB")
    assert [path.name for path in room.base.glob("*.safetensors")] == ["model.safetensors"]
    check_merged(room, room.merge())
    check_index(room.out)
    assert [path.name for path in room.out.glob("*.safetensors")] == ["model.safetensors"]


def test_reads_what_transformers_reads(tmp_path: Path) -> None:
    """The index names the files of a checkpoint; others may lie beside it, with other values of the same tensors."""
    room = Room(tmp_path, "multilora")
    old = {key: torch.full_like(tensor, 7.0) for key, tensor in tensors_of(room.base).items()}
    save_file(old, room.base / "model-00099-of-00099.safetensors", {"format": "pt"})
    room.merge()
    check_index(room.out)
    torch.testing.assert_close(output(room.reload(), BATCH), output(room.model, BATCH), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shard_is_there", [True, False])
def test_one_file_comes_before_an_index(shard_is_there: bool, tmp_path: Path) -> None:
    """transformers looks for model.safetensors first: an index beside it is left over."""
    room = Room(tmp_path, "multilora", shards="1GB")
    old = {key: torch.full_like(tensor, 7.0) for key, tensor in tensors_of(room.base).items()}
    index = {"metadata": {}, "weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (room.base / "model.safetensors.index.json").write_text(json.dumps(index))
    if shard_is_there:
        save_file(old, room.base / "model-00001-of-00001.safetensors", {"format": "pt"})
    room.merge()
    check_index(room.out)
    torch.testing.assert_close(output(room.reload(), BATCH), output(room.model, BATCH), rtol=1e-4, atol=1e-5)


# Precision


@pytest.mark.parametrize("method", ["multilora", "dual_lora"])
def test_bfloat16_stays_and_its_rounding_is_told(method: str, tmp_path: Path) -> None:
    room = Room(tmp_path, method, dtype=torch.bfloat16)
    export = room.merge()
    check_merged(room, export)
    # Half a unit in the last place of weights far smaller than the update: some, not most.
    assert 1e-4 < export.lost < 0.1
    assert json.loads((room.out / "config.json").read_text())["dtype"] == "bfloat16"
    assert next(room.reload().parameters()).dtype == torch.bfloat16


def test_updates_too_small_for_bfloat16_are_lost(tmp_path: Path) -> None:
    def shrink(model: PeftModel) -> None:
        for name, parameter in h.adapter_parameters(model).items():
            if "lora_B" in name:
                parameter.mul_(1e-5)

    room = Room(tmp_path, "multilora", dtype=torch.bfloat16, change=shrink)
    export = room.merge()
    check_merged(room, export)
    assert export.lost > 0.5
    # The remedy helps.
    export = room.merge(dtype=torch.float32, force=True)
    check_merged(room, export, torch.float32)
    assert export.lost < 0.05


def test_every_tensor_keeps_its_own_dtype(tmp_path: Path) -> None:
    room = Room(tmp_path, "multilora", dtype=torch.bfloat16)
    wide = set()
    for file in room.base.glob("*.safetensors"):
        tensors = load_file(file)
        names = {key for key in tensors if "norm" in key or "layers.1.self_attn.q_proj" in key}
        # Copies: what was loaded is a view of the file that is written now.
        copies = {
            key: tensor.to(torch.float32 if key in names else tensor.dtype, copy=True)
            for key, tensor in tensors.items()
        }
        save_file(copies, file, {"format": "pt"})
        wide |= names
    export = room.merge()
    check_merged(room, export)
    assert {key for key, tensor in tensors_of(room.out).items() if tensor.dtype == torch.float32} == wide
    check_index(room.out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    room = Room(tmp_path, "dual_lora", dtype=torch.bfloat16 if dtype == torch.float32 else torch.float32)
    export = room.merge(dtype=dtype)
    check_merged(room, export, dtype)
    check_index(room.out)
    assert json.loads((room.out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert next(room.reload().parameters()).dtype == dtype


# What belongs together


@tied_is_fine
@pytest.mark.parametrize("method", ["multilora", "dual_lora"])
def test_a_tied_head_gets_a_weight_of_its_own(method: str, tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    room = Room(tmp_path, method, base=tied, target_modules=["q_proj", "lm_head"])
    before, expected = tensors_of(room.base), output(room.model, BATCH)
    assert "lm_head.weight" not in before
    export = room.merge()
    after = tensors_of(room.out)
    assert sorted(set(after) - set(before)) == ["lm_head.weight"]
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    delta = naive_updates(room.model)["lm_head"]
    torch.testing.assert_close(
        after["lm_head.weight"].double(), before["model.embed_tokens.weight"].double() + delta, rtol=1e-6, atol=1e-6
    )
    assert next(row for row in export.modules if row.module == "lm_head").norm == pytest.approx(delta.norm().item())
    check_index(room.out)
    assert json.loads((room.out / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(output(room.reload(), BATCH), expected, rtol=1e-4, atol=1e-5)


@tied_is_fine
def test_a_tied_head_that_was_trained_in_full(tmp_path: Path) -> None:
    """A server that believes a config which says "tied" would not read the head's weight."""
    room = Room(tmp_path, "multilora", base={"tie_word_embeddings": True}, modules_to_save=["lm_head"], change=move)
    room.merge()
    before, after = tensors_of(room.base), tensors_of(room.out)
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], before["model.embed_tokens.weight"])
    assert json.loads((room.out / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(output(room.reload(), BATCH), output(room.model, BATCH), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_tied_weights_that_no_adapter_touches_stay_tied(arch: str, tmp_path: Path) -> None:
    room = Room(tmp_path, "aslora", arch, base={"tie_word_embeddings": True})
    check_merged(room, room.merge())
    assert json.loads((room.out / "config.json").read_text())["tie_word_embeddings"] is True
    inputs = room.arch.inputs()
    torch.testing.assert_close(output(room.reload(), inputs), output(room.model, inputs), rtol=1e-4, atol=1e-5)


def move(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(mark in name for mark in ("_factors.", "_shared.")):
            parameter.add_(torch.randn_like(parameter) * 0.3)


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("roberta", {"task_type": "SEQ_CLS"}),
        ("roberta", {"bias": "all"}),
        ("roberta", {"bias": "lora_only", "modules_to_save": ["classifier"]}),
        ("deberta", {"modules_to_save": ["classifier", "pooler"]}),
        ("llama", {"modules_to_save": ["lm_head", "norm"]}),
    ],
)
@pytest.mark.parametrize("method", ["masa-sum", "dual_lora"])
def test_what_was_trained_in_full_goes_along(method: str, arch: str, settings: dict[str, Any], tmp_path: Path) -> None:
    room = Room(tmp_path, method, arch, change=move, **settings)
    inputs = room.arch.inputs()
    room.merge()
    changed = {
        key for key, tensor in tensors_of(room.base).items() if not torch.equal(tensor, tensors_of(room.out)[key])
    }
    assert len(changed) > len(naive_updates(room.model))
    torch.testing.assert_close(output(room.reload(), inputs), output(room.model, inputs), rtol=1e-4, atol=1e-5)


def test_dtype_of_what_was_trained_in_full(tmp_path: Path) -> None:
    """PEFT keeps the copy that is trained in float32; a bfloat16 checkpoint stays one."""
    room = Room(tmp_path, "multilora", dtype=torch.bfloat16, modules_to_save=["lm_head"], change=move)
    room.merge()
    assert {tensor.dtype for tensor in tensors_of(room.out).values()} == {torch.bfloat16}


def classifier(room: Path, method: str) -> tuple[nn.Module, Path]:
    """A classifier's adapter on a language model's checkpoint, which has no such head."""
    from transformers import AutoModelForSequenceClassification

    LLAMA.build().save_pretrained(room / "base", max_shard_size="30KB")
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained(room / "base", num_labels=4)
    model = get_peft_model(base, config(method, task_type="SEQ_CLS"))
    ready(model)
    with torch.no_grad():
        move(model)
    model.eval().save_pretrained(room / "adapter")
    with torch.device("meta"):
        skeleton = AutoModelForSequenceClassification.from_config(
            AutoConfig.from_pretrained(room / "base", num_labels=4)
        )
    return model, PeftModel.from_pretrained(skeleton, room / "adapter", low_cpu_mem_usage=True)


def test_classifier_on_a_language_model(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model, skeleton = classifier(tmp_path, "aslora")
    merge_checkpoint(skeleton, tmp_path / "base", tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert "score.weight" in after
    assert "lm_head.weight" not in after
    check_index(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForSequenceClassification"]
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = {"input_ids": BATCH["input_ids"]}
    torch.testing.assert_close(output(loaded.eval(), inputs), output(model, inputs), rtol=1e-4, atol=1e-5)


def test_other_files_go_along_but_no_weights(tmp_path: Path) -> None:
    room = Room(tmp_path, "multilora")
    texts = {
        "tokenizer.json": '{"a": 1}',
        "tokenizer_config.json": "{}",
        "special_tokens_map.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "modeling_custom.py": "x = 1\n",
        "LICENSE": "do as you like",
        "vocab.txt": "ä\n",
    }
    for name, text in texts.items():
        (room.base / name).write_text(text, encoding="utf-8")
    weights = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "model.gguf"]
    weights += ["tf_model.h5", "flax_model.msgpack", "model.onnx", "consolidated.00.pth", "rust_model.ot"]
    for name in weights:
        (room.base / name).write_bytes(b"old weights")
    save_file({"layers.0.wq.weight": torch.zeros(2)}, room.base / "consolidated.safetensors")
    # A link to a file of the base itself; the hub's cache holds links to its own files.
    (room.base / "files").mkdir()
    (room.base / "LICENSE").rename(room.base / "files" / "license")
    (room.base / "LICENSE").symlink_to(room.base / "files" / "license")
    generation = (room.base / "generation_config.json").read_bytes()
    room.merge()
    assert {name: (room.out / name).read_text(encoding="utf-8") for name in texts} == texts
    assert (room.out / "generation_config.json").read_bytes() == generation
    assert not {*weights, "consolidated.safetensors"} & set(os.listdir(room.out))
    check_index(room.out)
    # The base is untouched.
    assert (room.base / "pytorch_model.bin").read_bytes() == b"old weights"


# Not more than one file at a time


def test_one_file_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(tmp_path, "dual_lora", dtype=torch.bfloat16)
    opened, written, alive = [], [], []
    write = merged.write_tensors

    class Opened:
        def __init__(self, path: Any, **options: Any) -> None:
            self.path, self.file = Path(path), safe_open(path, **options)

        def __enter__(self) -> Opened:
            assert not opened, "a second file is opened before the first is closed"
            opened.append(self.path.name)
            # Of the files before, at most the tensor that was handled last is still referred to.
            assert len({id(ref()) for ref in alive if ref() is not None}) <= 1
            return self

        def __exit__(self, *_: Any) -> None:
            opened.pop()

        def keys(self) -> list[str]:
            return list(self.file.keys())

        def get_tensor(self, key: str) -> Tensor:
            tensor = self.file.get_tensor(key)
            alive.append(weakref.ref(tensor))
            return tensor

    def record(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
        written.append(path.name)
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        write(path, tensors, **metadata)

    monkeypatch.setattr(checkpoint_files, "safe_open", Opened)
    monkeypatch.setattr(merged, "write_tensors", record)
    room.merge()
    assert sorted(written) == sorted(path.name for path in room.base.glob("*.safetensors"))
    assert len(alive) >= 2 * len(tensors_of(room.base))


def test_base_weights_of_the_model_are_never_used(tmp_path: Path) -> None:
    room = Room(tmp_path, "dual_lora")
    frozen = [p for name, p in room.skeleton.named_parameters() if "duallora" not in name]
    assert all(p.is_meta for p in frozen)
    with h.Watch() as watch:
        room.merge()
    assert not {name for name in watch.meta if "detach" not in name}


# Refused


@pytest.mark.parametrize("method", ["multilora", "dual_lora"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_factors_are_refused(method: str, bad: float, tmp_path: Path) -> None:
    def spoil(model: PeftModel) -> None:
        name = next(name for name in h.adapter_parameters(model) if "layers.2" in name and name.endswith("lora_B"))
        h.adapter_parameters(model)[name][0, 0] = bad

    room = Room(tmp_path, method, change=spoil)
    with pytest.raises(ValueError, match=r"NaN or Inf on .*layers\.2.*earlier checkpoint"):
        room.merge()
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]
    with loraplex.allow_nonfinite(), pytest.raises(ValueError, match=r"layers\.2.*NaN or Inf.*earlier checkpoint"):
        room.merge(safe=True)
    with loraplex.allow_nonfinite():
        room.merge()
    broken = {name for name, tensor in room.reload().named_parameters() if not tensor.isfinite().all()}
    assert broken
    assert all("layers.2" in name for name in broken)


def test_quantised_base(tmp_path: Path) -> None:
    room = Room(tmp_path, "multilora")
    file = room.base / "config.json"
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": quantization}))
    room.skeleton.get_base_model().config.quantization_config = quantization
    with pytest.raises(ValueError, match=r"base is quantised.*unquantised"):
        room.merge()
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_router_needs_calibration(tmp_path: Path) -> None:
    room = Room(tmp_path, "masa-router")
    with pytest.raises(ValueError, match=r"gates depend on the input.*calibrate"):
        room.merge()
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]
    gates = {}
    for index, layer in enumerate(h.layers_of(room.skeleton).values()):
        factors = layer.factors("default")
        gates[factors.module_name] = [0.1 * index, 0.4, 0.6 - 0.1 * index]
        factors.mean_gate = torch.tensor(gates[factors.module_name])
    export = room.merge()
    assert any("approximation" in note for note in export.notes)
    before, after = tensors_of(room.base), tensors_of(room.out)
    for name, delta in naive_updates(room.model, gates).items():
        change = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        assert relative(change, delta) < 1e-6


def test_another_layout_is_left_to_transformers(tmp_path: Path) -> None:
    """GPT-2's published checkpoint has no "transformer." before its names."""
    room = Room(tmp_path, "multilora", "gpt2", shards="1GB")
    tensors = {key.removeprefix("transformer."): t.clone() for key, t in tensors_of(room.base).items()}
    save_file(tensors, room.base / "model.safetensors", {"format": "pt"})
    with pytest.raises(OtherLayout, match=r"no tensor transformer\."):
        room.merge()
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_names_that_transformers_changes_when_it_saves(tmp_path: Path) -> None:
    room = Room(tmp_path, "aslora", "vit")
    assert not set(naive_updates(room.model)) & {key.removesuffix(".weight") for key in tensors_of(room.base)}
    with pytest.raises(OtherLayout, match=r"no tensor vit\."):
        room.merge()
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


# Whole or not at all


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("replacing", [False, True])
def test_an_interrupted_merge_leaves_what_was_there(
    at: int, replacing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(tmp_path, "multilora")
    if replacing:
        room.out.mkdir()
        (room.out / "notes.txt").write_text("mine")
    before, count = contents(tmp_path), 0
    write = merged.write_tensors

    def fail(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
        nonlocal count
        if count == at:
            path.write_bytes(b"half")
            raise OSError("No space left on device")
        count += 1
        write(path, tensors, **metadata)

    with monkeypatch.context() as patch:
        patch.setattr(merged, "write_tensors", fail)
        with pytest.raises(OSError, match="No space"):
            room.merge(force=replacing)
    assert contents(tmp_path) == before
    assert room.out.exists() == replacing
    room.merge(force=replacing)
    check_index(room.out)
    assert not (room.out / "notes.txt").exists()


def test_never_overwrites_by_accident(tmp_path: Path) -> None:
    room = Room(tmp_path, "multilora")
    room.out.mkdir()
    (room.out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out is not empty.*--force"):
        room.merge()
    assert contents(room.out) == {"notes.txt": b"mine"}
