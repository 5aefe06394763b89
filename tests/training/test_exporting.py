"""The commands that write what servers load: export, merge, inspect --against, on tiny models."""

from __future__ import annotations

import json
import os
import shutil
from math import isnan

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from runs import entry, write_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import helpers as h
from loraplex import to_plain
from loraplex.commands.cli import main
from loraplex.recipes.adapters import exporting
from loraplex.tuner.calibration import calibrate

EXACT = ("multilora", "multilora-module", "aslora", "masa-sum", "masa-concat")
IDS = torch.tensor([[10, 11, 12, 13, 7], [3, 5, 10, 9, 6]])
LABELS = ["bad", "dull", "good"]


def base_of(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def put(base, folder, method, **settings):
    """Save a `ready` adapter for the causal model in `base`; returns it on its model."""
    change = settings.pop("change", lambda model: None)
    model = get_peft_model(base_of(base), h.config(method, **settings))
    h.ready(model)
    with torch.no_grad():
        change(model)
    model.eval().save_pretrained(folder, save_embedding_layers=False)
    return model


def put_classifier(room, folder, method):
    """The same for a classifier on the room's BertModel, whose checkpoint has no head and other names."""
    torch.manual_seed(5)
    base = AutoModelForSequenceClassification.from_pretrained(room / "bert", num_labels=len(LABELS))
    settings = h.config(method, target_modules=["query", "value"], task_type="SEQ_CLS", **one_merge(method))
    model = get_peft_model(base, settings)
    h.ready(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.eval().save_pretrained(folder)
    (folder / "labels.json").write_text(json.dumps(LABELS))
    return model


def one_merge(method):
    return {"num_merges": 1} if method == "aslora" else {}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def stock(base, folder, auto=AutoModelForCausalLM, **settings):
    """The plain LoRA in `folder` on `base`, by PEFT's own classes."""
    model = PeftModel.from_pretrained(auto.from_pretrained(base, **settings), folder)
    assert not any("loraplex" in type(module).__module__ for module in model.modules())
    return model


def run(capsys, *arguments):
    """The JSON that a command prints."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def text(capsys, *arguments):
    """What a command prints for people, its lines joined."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 0
    return " ".join(capsys.readouterr().out.split())


def error(capsys, *arguments):
    """The message of a command that fails as a user's error."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err.rpartition("error: ")[2]


def near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# Plain LoRA


@pytest.mark.parametrize("method", EXACT)
def test_exact_export(room, tmp_path, method, capsys):
    model = put(room / "llama", tmp_path / "adapter", method)
    expected = logits(model)
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 0.1
    report = run(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "out")
    assert report["exact"]
    assert report["rank"] == {"multilora-module": 12, "aslora": 4, "masa-sum": 4}.get(method, 8)
    assert report["error"] < 1e-6
    assert report["calibration"] is None
    products = h.products(tmp_path / "out")
    for name, delta in h.naive_updates(model).items():
        assert h.relative(products[name], delta) < 1e-6
    assert h.lora_config(tmp_path / "out")["base_model_name_or_path"] == str(room / "llama")
    near(logits(stock(room / "llama", tmp_path / "out")), expected)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "out"]


def test_export_of_a_plain_lora(room, tmp_path, capsys):
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], use_rslora=True, init_lora_weights=False)
    model = get_peft_model(base_of(room / "llama"), settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    run(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "out")
    assert h.lora_config(tmp_path / "out")["lora_alpha"] == 4
    near(logits(stock(room / "llama", tmp_path / "out")), logits(model))
    run(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "merged")
    near(logits(base_of(tmp_path / "merged")), logits(model))


def test_no_weight_of_the_base_is_read(room, tmp_path, capsys):
    """Its config tells the modules' names and shapes: the adapter's file is enough."""
    base = tmp_path / "base"
    shutil.copytree(room / "llama", base)
    expected = logits(put(base, tmp_path / "adapter", "multilora"))
    os.remove(base / "model.safetensors")
    (base / "model.safetensors").write_bytes(b"")
    run(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "out")
    near(logits(stock(room / "llama", tmp_path / "out")), expected)
    assert max(run(capsys, "inspect", tmp_path / "out", "--against", tmp_path / "adapter")["against"].values()) < 1e-6


def test_trained_checkpoint_in_the_middle_of_merging(room, tmp_path, capsys):
    out = tmp_path / "run"
    steps = ["--train.save_steps", "6", "--train.max_steps", "12", "--train.eval_steps", "12"]
    assert main(["train", str(write_run(room, out, "aslora")), *steps]) == 0
    checkpoint = out / "checkpoint-6"
    # Of the two merges per family, that of step 5 is done and that of step 8 is not.
    assert {merge["step"] for merge in run(capsys, "inspect", checkpoint)["merges"]} == {5}
    assert {merge["step"] for merge in run(capsys, "inspect", out)["merges"]} == {5, 8}
    exported = {}
    for name, source in (("middle", checkpoint), ("end", out)):
        report = run(capsys, "export", source, "-o", tmp_path / name)
        assert report["exact"]
        adapter = PeftModel.from_pretrained(base_of(room / "llama"), source)
        exported[name] = logits(stock(room / "llama", tmp_path / name))
        near(exported[name], logits(adapter))
    assert (exported["middle"] - exported["end"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("engine", "rank", "said"),
    [
        ("vllm", 8, "--max-lora-rank 8"),
        ("sglang", 6, "--lora-paths"),
        ("llama.cpp", 6, "convert_lora_to_gguf.py"),
        ("peft", 6, "PeftModel.from_pretrained"),
        ("portable", 6, "lora_alpha 6"),
    ],
)
def test_engines(room, tmp_path, engine, rank, said, capsys):
    model = put(room / "llama", tmp_path / "adapter", "multilora", r=3)
    printed = text(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "out", "--engine", engine)
    assert said in printed
    assert "exact" in printed
    assert h.lora_config(tmp_path / "out")["r"] == rank
    near(logits(stock(room / "llama", tmp_path / "out")), logits(model))


def test_smaller_exact_form(room, tmp_path, capsys):
    """Exact rank deficiency in the float32 file of an adapter: B has two columns that are not zero."""

    def lower(model):
        for name, parameter in h.adapter_parameters(model).items():
            if "lora_B" in name:
                parameter[:, 2:] = 0

    model = put(room / "llama", tmp_path / "adapter", "masa-concat", change=lower)
    assert run(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "whole")["rank"] == 8
    report = run(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "small", "--compress", "exact")
    assert (report["rank"], report["exact"]) == (2, True)
    near(logits(stock(room / "llama", tmp_path / "small")), logits(model))
    ranks = {row["rank"] for row in run(capsys, "inspect", tmp_path / "whole")["modules"]}
    assert ranks == {2}


def errors_of(model, folder):
    products = h.products(folder)
    return {name: h.relative(products[name], delta) for name, delta in h.naive_updates(model).items()}


@pytest.mark.parametrize("method", ["multilora-module", "dual_lora"])
@pytest.mark.parametrize(("option", "value"), [("--rank", "2"), ("--max-error", "0.3")])
def test_approximation_says_its_error(room, tmp_path, method, option, value, capsys):
    model = put(room / "llama", tmp_path / "adapter", method)
    report = run(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "out", option, value)
    assert not report["exact"]
    errors = errors_of(model, tmp_path / "out")
    assert {row["module"]: row["error"] for row in report["modules"]} == pytest.approx(errors, rel=1e-4)
    if option == "--rank":
        assert report["rank"] == 2
    else:
        assert 0.01 < max(errors.values()) <= 0.3
    # The other way to ask: inspect the file against the adapter.
    against = run(capsys, "inspect", tmp_path / "out", "--against", tmp_path / "adapter")["against"]
    assert against == pytest.approx(errors, rel=1e-4)
    printed = text(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "out", option, value, "--force")
    assert f"relative error of ΔW {report['error']:.4g}" in printed
    assert "exact" not in printed


def test_dual_lora_needs_a_rank(room, tmp_path, capsys):
    put(room / "llama", tmp_path / "adapter", "dual_lora")
    for option in ([], ["--compress", "exact"]):
        message = error(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "out", *option)
        assert "--format merged" in message
        assert "--rank R" in message
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype(room, tmp_path, dtype, capsys):
    put(room / "llama", tmp_path / "adapter", "aslora")
    run(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "out", "--dtype", dtype)
    assert {str(t.dtype) for t in h.file_tensors(tmp_path / "out").values()} == {f"torch.{dtype}"}
    run(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "merged", "--dtype", dtype)
    assert {str(t.dtype) for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {f"torch.{dtype}"}
    assert str(base_of(tmp_path / "merged", dtype="auto").dtype) == f"torch.{dtype}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "2", "--max-error", "0.1"], "exclude each other"),
        (["--rank", "2", "--compress", "exact"], "exclude each other"),
        (["--rank", "0"], "rank=0"),
        (["--max-error", "2"], "max_error=2.0"),
        (["--format", "merged", "--rank", "2"], "leave --rank"),
        (["--format", "merged", "--engine", "vllm"], "leave --rank, --engine"),
        (["--calibration", "some.jsonl"], "leave --calibration out"),
    ],
)
def test_options_that_make_no_sense(room, tmp_path, options, message, capsys):
    put(room / "llama", tmp_path / "adapter", "aslora")
    assert message in error(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "out", *options)
    assert os.listdir(tmp_path) == ["adapter"]


def test_unknown_engine_and_format(room, tmp_path, capsys):
    put(room / "llama", tmp_path / "adapter", "aslora")
    for options in (["--engine", "tgi"], ["--format", "gguf"]):
        with pytest.raises(SystemExit) as end:
            main(["export", str(tmp_path / "adapter"), "-o", str(tmp_path / "out"), *options])
        assert end.value.code == 2
        assert options[1] in capsys.readouterr().err


def test_never_overwrites_by_accident(room, tmp_path, capsys):
    put(room / "llama", tmp_path / "adapter", "aslora")
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert "--force" in error(capsys, "export", tmp_path / "adapter", "-o", out)
    # A failed export replaces nothing, with --force too.
    error(capsys, "export", tmp_path / "adapter", "-o", out, "--force", "--rank", "0")
    assert (out / "precious.txt").read_text() == "mine"
    run(capsys, "export", tmp_path / "adapter", "-o", out, "--force")
    assert sorted(os.listdir(out)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def spoil(model):
    name = next(name for name in h.adapter_parameters(model) if "v_proj" in name and "lora_A" in name)
    h.adapter_parameters(model)[name][0, 0] = float("nan")


@pytest.mark.parametrize("method", ["aslora", "dual_lora"])
def test_broken_adapters(room, tmp_path, method, capsys):
    put(room / "llama", tmp_path / "adapter", method, change=spoil)
    for command in (["export", "--rank", "2"], ["merge"], ["merge", "--safe", "--allow-nonfinite"]):
        message = error(capsys, command[0], tmp_path / "adapter", "-o", tmp_path / "out", *command[1:])
        assert "NaN or Inf" in message
        assert "v_proj" in message
    assert os.listdir(tmp_path) == ["adapter"]
    found = run(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "out", "--allow-nonfinite")
    assert any(isnan(module["lost"]) for module in found["modules"])
    text(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "out", "--allow-nonfinite", "--force")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    broken = [key for key, tensor in merged.items() if not tensor.isfinite().all()]
    assert broken
    assert all("v_proj" in key for key in broken)


# MASA's router


@pytest.fixture
def router(room, tmp_path):
    """An adapter with a router, the run that could have made it, and the model."""
    model = put(room / "llama", tmp_path / "adapter", "masa-router")
    return tmp_path / "adapter", write_run(room, tmp_path / "run", "masa"), model


@pytest.mark.parametrize(
    "command", [["export"], ["export", "--format", "merged"], ["merge"], ["export", "--rank", "2"]]
)
def test_router_needs_text(router, tmp_path, command, capsys):
    adapter, _, _ = router
    message = error(capsys, *command[:1], adapter, "-o", tmp_path / "out", *command[1:])
    assert "gates depend on the input" in message
    assert "--calibration" in message
    assert '"sum" or "concat"' in message
    assert not (tmp_path / "out").exists()
    # The run's own data is nowhere to be found; `--data` is no option of these commands.
    message = error(capsys, *command[:1], adapter, "-o", tmp_path / "out", *command[1:], "--calibration")
    assert "--run" in message
    assert "--data " not in message
    assert not (tmp_path / "out").exists()


def test_router_with_text(room, router, tmp_path, capsys):
    adapter, run_file, model = router
    data = json.dumps(entry(room, "more"))
    report = run(capsys, "export", adapter, "-o", tmp_path / "out", "--calibration", data)
    found = report["calibration"]
    deltas = h.naive_updates(model, found["gates"])
    assert sorted(found["errors"]) == sorted(deltas)
    assert all(0 < value < 1 for value in (*found["errors"].values(), found["output_error"]))
    products = h.products(tmp_path / "out")
    for name, delta in deltas.items():
        assert sum(found["gates"][name]) == pytest.approx(1)
        assert h.relative(products[name], delta) < 1e-6
    assert any("approximation" in note for note in report["notes"])
    assert not report["exact"]
    # The run's own data give other gates, and merged weights the same ones.
    own = run(capsys, "export", adapter, "-o", tmp_path / "own", "--run", run_file, "--calibration")["calibration"]
    assert own["gates"] != found["gates"]
    merged = run(capsys, "merge", adapter, "-o", tmp_path / "merged", "--run", run_file, "--calibration")
    assert merged["calibration"] == own
    near(logits(base_of(tmp_path / "merged")), logits(stock(room / "llama", tmp_path / "own")))
    printed = text(capsys, "merge", adapter, "-o", tmp_path / "merged", "--calibration", data, "--force")
    assert f"{found['output_error']:.3g} of the adapter's effect on the outputs (held-out text)" in printed


def test_remember(room, router, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path / "cache"))
    adapter, _, _ = router
    message = error(capsys, "export", adapter, "-o", tmp_path / "out", "--remember")
    assert "--remember is for a LoRA's rank" in message
    data = json.dumps(entry(room, "more"))
    run(capsys, "export", adapter, "-o", tmp_path / "out", "--calibration", data, "--remember")
    h.assert_same(h.file_tensors(to_plain(adapter, room / "llama")), h.file_tensors(tmp_path / "out"))
    put(room / "llama", tmp_path / "dual", "dual_lora")
    run(capsys, "export", tmp_path / "dual", "-o", tmp_path / "two", "--rank", "2", "--remember")
    assert json.loads((tmp_path / "dual" / "loraplex.json").read_text()) == {"format": 1, "rank": 2}
    # The adapter names its base itself.
    h.assert_same(h.file_tensors(to_plain(tmp_path / "dual")), h.file_tensors(tmp_path / "two"))


@pytest.mark.parametrize(("eval_size", "seen", "held_out"), [(16, 64, 16), (6, 64, 6), (None, 48, 16)])
def test_held_out_text_is_not_calibrated_on(room, router, tmp_path, eval_size, seen, held_out, capsys, monkeypatch):
    """What the task holds out is measured on; of a task that holds nothing out, a quarter of what is taken."""
    adapter, _, _ = router
    given = []

    def spy(model, *parts):
        parts = [list(part) for part in parts]
        for part in parts:
            pairs = [pair for batch in part for pair in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
            given.append([tuple(ids[mask.bool()].tolist()) for ids, mask in pairs])
        return calibrate(model, *parts)

    monkeypatch.setattr(exporting, "calibrate", spy)
    data = json.dumps({key: value for key, value in entry(room, eval_size=eval_size).items() if value is not None})
    run(capsys, "export", adapter, "-o", tmp_path / "out", "--calibration", data)
    assert [len(rows) for rows in given] == [seen, held_out]
    # Drawn at random, a few reviews come twice in the file.
    assert len(set(given[0]) & set(given[1])) <= 1
    assert min(map(len, given[0])) > 4


def test_calibration_over_several_data_sets(room, router, tmp_path, capsys, monkeypatch):
    adapter, _, _ = router
    counts = []

    def spy(model, *parts):
        parts = [list(part) for part in parts]
        counts.extend(sum(len(batch["input_ids"]) for batch in part) for part in parts)
        return calibrate(model, *parts)

    monkeypatch.setattr(exporting, "calibrate", spy)
    data = [json.dumps(entry(room)), json.dumps({**entry(room, "more"), "name": "more"})]
    run(capsys, "export", adapter, "-o", tmp_path / "out", "--calibration", *data)
    assert counts == [64, 16]


def test_router_in_its_own_folder(room, router, tmp_path, capsys):
    """run.yaml beside the adapter: --calibration alone is enough."""
    adapter, run_file, _ = router
    shutil.copy(run_file, adapter / "run.yaml")
    report = run(capsys, "export", adapter, "-o", tmp_path / "out", "--calibration")
    assert report["calibration"]["output_error"] > 0


# Classifiers


@pytest.mark.parametrize("method", ["multilora", "aslora", "dual_lora"])
def test_classifier(room, tmp_path, method, capsys):
    """The checkpoint is a BertModel: its names have no prefix, and the head is the adapter's."""
    model = put_classifier(room, tmp_path / "adapter", method)
    expected = logits(model)
    rank = ["--rank", "32"] if method == "dual_lora" else []
    for engine in ("portable", "vllm", "sglang", "llama.cpp"):
        message = error(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "lora", "--engine", engine, *rank)
        assert "classifier.bias" in message
        assert "classifier.weight" in message
        assert "--engine peft" in message
    run(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "lora", "--engine", "peft", *rank)
    near(logits(stock(room / "bert", tmp_path / "lora", AutoModelForSequenceClassification, num_labels=3)), expected)

    report = run(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "merged")
    deltas = h.naive_updates(model)
    assert {row["module"]: row["norm"] for row in report["modules"]} == pytest.approx(
        {name: delta.norm().item() for name, delta in deltas.items()}, rel=1e-5
    )
    assert all(row["lost"] < 1e-5 for row in report["modules"])
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    near(logits(merged), expected)
    assert merged.config.id2label == dict(enumerate(LABELS))
    words = [AutoTokenizer.from_pretrained(folder) for folder in (room / "bert", tmp_path / "merged")]
    assert words[0]("the film is bright")["input_ids"] == words[1]("the film is bright")["input_ids"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "lora", "merged"]


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_classifier_keeps_the_dtype_of_its_checkpoint(room, tmp_path, dtype, capsys):
    base = AutoModelForSequenceClassification.from_pretrained(room / "bert").bert.to(torch.bfloat16)
    base.save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(room / "bert").save_pretrained(tmp_path / "bert")
    put_classifier(tmp_path, tmp_path / "adapter", "multilora")
    options = [] if dtype is None else ["--dtype", dtype]
    run(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "merged", *options)
    kinds = {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()}
    assert kinds == {torch.float32 if dtype else torch.bfloat16}


def test_classifier_on_a_causal_checkpoint(room, tmp_path, capsys):
    """Streamed: the decoder's names are the same, the head comes from the adapter, lm_head stays behind."""
    torch.manual_seed(5)
    shutil.copytree(room / "llama", tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token_id": None}))
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    base.config.pad_token_id = 0
    model = get_peft_model(base, h.config("masa-sum", task_type="SEQ_CLS"))
    h.ready(model)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "labels.json").write_text(json.dumps(LABELS))
    run(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "merged")
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    near(logits(merged), logits(model))
    # The tokenizer's: a decoder finds a text's last token by it.
    assert merged.config.pad_token_id == 0


# Merged


@pytest.mark.parametrize("method", ["dual_lora", "multilora", "aslora"])
def test_merged_checkpoint(room, tmp_path, method, capsys):
    base = tmp_path / "base"
    shutil.copytree(room / "llama", base)
    os.remove(base / "model.safetensors")
    base_of(room / "llama").save_pretrained(base, max_shard_size="40KB")
    (base / "notes.txt").write_text("keep")
    assert len(list(base.glob("*.safetensors"))) > 2
    model = put(base, tmp_path / "adapter", method)
    report = run(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "out", "--format", "merged")
    assert report["lost"] < 1e-6
    near(logits(base_of(tmp_path / "out")), logits(model))
    weights = {path.name for path in base.glob("model*")}
    assert {path.name for path in (tmp_path / "out").glob("model*")} == weights
    for name in ("notes.txt", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    # `merge` is the same command.
    run(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "again")
    assert sorted(os.listdir(tmp_path / "again")) == sorted(os.listdir(tmp_path / "out"))
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_most_of_the_update_is_lost(room, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(room / "llama", base)
    base_of(room / "llama").to(torch.bfloat16).save_pretrained(base)

    def shrink(model):
        for name, parameter in h.adapter_parameters(model).items():
            if "lora_B" in name:
                parameter.mul_(1e-5)

    put(base, tmp_path / "adapter", "multilora", change=shrink)
    printed = text(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "out")
    assert "most of the update of 8 of 8 modules" in printed
    assert "--dtype float32" in printed
    report = run(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "out", "--force")
    assert report["lost"] > 0.5
    printed = text(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "out", "--force", "--dtype", "float32")
    assert "warning" not in printed


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_tied_embeddings(room, tmp_path, settings, capsys):
    base = tmp_path / "base"
    shutil.copytree(room / "llama", base)
    plain = base_of(room / "llama")
    plain.config.tie_word_embeddings = True
    plain.tie_weights()
    plain.save_pretrained(base)
    assert "lm_head.weight" not in load_file(base / "model.safetensors")

    def change(model):
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)

    model = put(base, tmp_path / "adapter", "multilora", change=change, **settings)
    expected = logits(model)
    assert "--format merged" in error(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "out")
    run(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "out")
    near(logits(base_of(tmp_path / "out")), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    if "target_modules" in settings:
        run(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "lora", "--engine", "peft")
        near(logits(stock(base, tmp_path / "lora")), expected)


def test_quantised_base(room, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(room / "llama", base)
    put(base, tmp_path / "adapter", "multilora")
    file = base / "config.json"
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": quantization}))
    assert "quantised" in error(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# inspect


def test_inspect_an_export(room, tmp_path, capsys):
    model = put(room / "llama", tmp_path / "adapter", "multilora", rank_pattern={"v_proj": 3})
    run(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "out", "--engine", "vllm")
    found = run(capsys, "inspect", tmp_path / "out", "--against", tmp_path / "adapter")
    assert (found["method"], found["r"], found["lora_alpha"]) == ("LORA", 8, 8)
    deltas = h.naive_updates(model)
    rows = {row["module"]: row for row in found["modules"]}
    assert sorted(rows) == sorted(found["against"]) == sorted(deltas)
    for name, delta in deltas.items():
        assert rows[name]["rank"] == (6 if name.endswith("v_proj") else 8)
        assert rows[name]["norm"] == pytest.approx(delta.norm().item(), rel=1e-5)
        assert rows[name]["factors"]["lora_A"][0] == 8
        assert found["against"][name] < 1e-6
    printed = text(capsys, "inspect", tmp_path / "out", "--against", tmp_path / "adapter")
    assert "rank" in printed
    assert "error" in printed
    assert "model.layers.3.self_attn.v_proj" in printed


def test_inspect_against_a_wrong_adapter(room, tmp_path, capsys):
    put(room / "llama", tmp_path / "adapter", "multilora")
    put(room / "llama", tmp_path / "other", "aslora", target_modules=["k_proj"])
    run(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "out")
    message = error(capsys, "inspect", tmp_path / "out", "--against", tmp_path / "other")
    assert "no export of this adapter" in message
    assert "k_proj" in message
    assert "not a plain LoRA" in error(capsys, "inspect", tmp_path / "adapter", "--against", tmp_path / "other")
    assert "absent" in error(capsys, "inspect", tmp_path / "out", "--against", tmp_path / "absent")
    assert "adapter_config.json is missing" in error(capsys, "inspect", tmp_path / "out", "--against", room / "llama")


def test_inspect_against_a_router(room, router, tmp_path, capsys):
    """Its ΔW is not constant: there is nothing to compare with, and the message must not send to Python."""
    adapter, _, _ = router
    run(capsys, "export", adapter, "-o", tmp_path / "out", "--calibration", json.dumps(entry(room)))
    assert "gates depend on the input" in error(capsys, "inspect", tmp_path / "out", "--against", adapter)


def test_inspect_dora(room, tmp_path, capsys):
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True, init_lora_weights=False)
    get_peft_model(base_of(room / "llama"), settings).save_pretrained(tmp_path / "dora")
    put(room / "llama", tmp_path / "adapter", "aslora")
    found = run(capsys, "inspect", tmp_path / "dora")
    assert {row["rank"] for row in found["modules"]} == {None}
    assert text(capsys, "inspect", tmp_path / "dora")
    assert "not a plain LoRA" in error(capsys, "inspect", tmp_path / "dora", "--against", tmp_path / "adapter")
