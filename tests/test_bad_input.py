"""Bad input gets an error that names the value and the remedy, and leaves the model as it was."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import helpers as h
import loraplex
from helpers import ARCHS, METHODS, PLAIN, adapted, config, output
from loraplex import AsLoraConfig, DualLoraConfig, MasaConfig, MultiLoraConfig
from loraplex.inspection.describe import describe

LLAMA = ARCHS["llama"]
BATCH = LLAMA.inputs()

every_plain = pytest.mark.parametrize("method", PLAIN)


# Settings


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("r", [0, -1, 2.0, "8", True, None])
def test_rank(method: str, r: Any) -> None:
    with pytest.raises(ValueError, match=rf"r={re.escape(repr(r))}.*integer of at least 1"):
        config(method, r=r, **({"r_magnitude": None, "r_direction": None} if method == "dual_lora" else {}))


@every_plain
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": 0}, r"lora_alpha=0.*positive"),
        ({"lora_alpha": -1.5}, r"lora_alpha=-1\.5.*positive"),
        ({"lora_alpha": float("nan")}, r"lora_alpha=nan.*positive"),
        ({"lora_alpha": float("inf")}, r"lora_alpha=inf.*positive"),
        ({"lora_alpha": "16"}, r"lora_alpha='16'.*positive number"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1\.0.*lora_dropout < 1"),
        ({"lora_dropout": -0.1}, r"lora_dropout=-0\.1.*0 ≤"),
        ({"lora_dropout": "a"}, r"lora_dropout='a'"),
        ({"bias": "some"}, r"bias='some'.*'none', 'all', 'lora_only'"),
        ({"bias": True}, r"bias=True.*'none'"),
        ({"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern\['q_proj'\]=0.*positive"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 1}, r"layers_to_transform=1.*as a list"),
    ],
    ids=str,
)
def test_common_settings(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(method, **settings)


@pytest.mark.parametrize("method", ["multilora", "aslora", "masa-sum"])
def test_rank_pattern(method: str) -> None:
    with pytest.raises(ValueError, match=r"rank_pattern\['q_proj'\]=0.*at least 1"):
        config(method, rank_pattern={"q_proj": 0})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiLoraConfig(num_modules=0), r"num_modules=0.*at least 1"),
        (lambda: MultiLoraConfig(num_modules=1.5), r"num_modules=1\.5.*integer"),
        (lambda: MultiLoraConfig(scaling_granularity="row"), r"scaling_granularity='row'.*'channel', 'module'"),
        (lambda: MasaConfig(num_experts=0), r"num_experts=0.*at least 1"),
        (lambda: MasaConfig(share_layers=0), r"share_layers=0.*at least 1"),
        (lambda: MasaConfig(expert_mixing="mean"), r"expert_mixing='mean'.*'router', 'sum', 'concat'"),
        (lambda: AsLoraConfig(merge_candidates="near"), r"merge_candidates='near'.*'adjacent', 'all'"),
        (lambda: AsLoraConfig(merge_distance="cosine"), r"merge_distance='cosine'.*'factor', 'update'"),
        (lambda: AsLoraConfig(num_merges=-1), r"num_merges=-1.*at least 0"),
        (lambda: AsLoraConfig(num_merges=1.0), r"num_merges=1\.0.*integer"),
        (lambda: AsLoraConfig(merge_start_step=1.5), r"merge_start_step=1\.5.*between 0 and 1"),
        (lambda: AsLoraConfig(merge_start_step=-0.1), r"merge_start_step=-0\.1.*between 0 and 1"),
        (lambda: AsLoraConfig(merge_start_step=float("nan")), r"merge_start_step=nan.*between 0 and 1"),
        (lambda: AsLoraConfig(merge_interval=0), r"merge_interval=0.*at least 1"),
        (lambda: AsLoraConfig(merge_interval="10"), r"merge_interval='10' must be an integer or a number"),
        (lambda: DualLoraConfig(warmup_steps=0), r"warmup_steps=0.*at least 1"),
        (lambda: DualLoraConfig(warmup_steps=1.0), r"warmup_steps=1\.0.*between 0 and 1"),
        (lambda: DualLoraConfig(init_std=0), r"init_std=0.*positive"),
        (lambda: DualLoraConfig(r=1), r"r=1.*at least 2"),
        (lambda: DualLoraConfig(r=4, r_magnitude=4), r"r=4.*r_magnitude=4"),
        (lambda: DualLoraConfig(r_magnitude=0, r_direction=4), r"r_magnitude=0.*at least 1"),
        (lambda: DualLoraConfig(r_magnitude=2, rank_pattern={"q": 4}), r"r_magnitude=2.*rank_pattern"),
    ],
)
def test_own_settings(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Adding


def refuses_to_add(model: Any, settings: Any, message: str) -> None:
    """Both a plain base model and a model that has an adapter refuse `settings` and stay as they were."""
    before = h.snapshot(model, BATCH)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, settings)
    h.assert_unchanged(before, h.snapshot(model, BATCH))
    assert not hasattr(model, "peft_config")
    host = get_peft_model(model, config("aslora"))
    h.ready(host)
    before = h.snapshot(host, BATCH)
    with pytest.raises(ValueError, match=message):
        loraplex.add_adapter(host, "second", settings)
    h.assert_unchanged(before, h.snapshot(host, BATCH))
    # The name is free, and the model takes a good adapter.
    loraplex.add_adapter(host, "second", config("masa-sum"))
    host.set_adapter("second")
    assert torch.equal(output(host, BATCH), output(LLAMA.build(), BATCH))


@every_plain
def test_unknown_target(method: str) -> None:
    refuses_to_add(LLAMA.build(), config(method, target_modules=["absent_proj"]), "absent_proj")


@every_plain
def test_a_typo_among_good_targets(method: str) -> None:
    """Without an error, the run would adapt less than was asked for."""
    refuses_to_add(LLAMA.build(), config(method, target_modules=["q_proj", "v_porj"]), "v_porj")


@every_plain
def test_embedding_target(method: str) -> None:
    settings = config(method, target_modules=["q_proj", "embed_tokens"])
    refuses_to_add(LLAMA.build(), settings, r"embed_tokens is a Embedding.*target_modules|Embedding.*modules_to_save")


@pytest.mark.parametrize("method", ["aslora", "masa-sum"])
def test_ranks_that_differ_in_a_family(method: str) -> None:
    settings = config(method, rank_pattern={r"layers\.1\..*q_proj": 2})
    refuses_to_add(LLAMA.build(), settings, r"layers\.0.*q_proj.*layers\.1.*q_proj.*r=4 and r=2.*one rank")


@pytest.mark.parametrize("method", ["aslora", "masa-sum"])
def test_shapes_that_differ_in_a_family(method: str) -> None:
    model = LLAMA.build()
    layer = model.model.layers[3].mlp
    layer.up_proj = nn.Linear(h.HIDDEN, 20, bias=False)
    layer.gate_proj = nn.Linear(h.HIDDEN, 20, bias=False)
    layer.down_proj = nn.Linear(20, h.HIDDEN, bias=False)
    refused = config(method, target_modules=["q_proj", "up_proj"])
    before = h.snapshot(model, BATCH)
    message = r"layers\.0\.mlp\.up_proj.*layers\.3\.mlp\.up_proj.*\(48, 32\) and \(20, 32\).*exclude_modules"
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, refused)
    h.assert_unchanged(before, h.snapshot(model, BATCH))
    # The remedy helps.
    get_peft_model(model, config(method, target_modules=["up_proj"], exclude_modules=["layers.3.mlp.up_proj"]))


def test_too_many_merges() -> None:
    settings = config("aslora", num_merges=h.LAYERS)
    refuses_to_add(LLAMA.build(), settings, rf"num_merges={h.LAYERS}.*at most {h.LAYERS - 1}")
    get_peft_model(LLAMA.build(), config("aslora", num_merges=h.LAYERS - 1))


def test_merges_on_one_layer() -> None:
    """A family of one layer allows no merge: asked for two, it must not be silent."""
    settings = config("aslora", layers_to_transform=[1], num_merges=2)
    refuses_to_add(LLAMA.build(), settings, r"num_merges=2 is larger than possible")


class Attention(nn.Module):
    """Holds the module whose output projection is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.mha(x, x, x)[0])


@every_plain
def test_multihead_attention(method: str) -> None:
    model = Attention()
    types = {name: type(m) for name, m in model.named_modules()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"mha\.out_proj.*MultiheadAttention.*exclude_modules"):
        get_peft_model(model, config(method, target_modules=["out", "out_proj"]))
    assert {name: type(m) for name, m in model.named_modules()} == types
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    get_peft_model(model, config(method, target_modules=["out"], **single(method)))


def single(method: str) -> dict[str, Any]:
    return {"num_merges": 0} if method == "aslora" else {}


@every_plain
def test_existing_name(method: str) -> None:
    model = adapted(method)
    before = h.snapshot(model, BATCH)
    with pytest.raises(ValueError, match="default"):
        loraplex.add_adapter(model, "default", config(method))
    h.assert_unchanged(before, h.snapshot(model, BATCH))


def test_host_of_another_library() -> None:
    from peft import LoraConfig

    model = get_peft_model(LLAMA.build(), LoraConfig(target_modules=["q_proj"]))
    before = h.snapshot(model, BATCH)
    with pytest.raises(ValueError, match=r"LORA.*get_peft_model"):
        loraplex.add_adapter(model, "second", config("masa-sum"))
    h.assert_unchanged(before, h.snapshot(model, BATCH))


def test_another_library_s_adapter(tmp_path: Path) -> None:
    from peft import LoraConfig

    get_peft_model(LLAMA.build(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = adapted("masa-sum")
    before = h.snapshot(model, BATCH)
    with pytest.raises(ValueError, match=r"LORA.*loraplex"):
        loraplex.load_adapter(model, tmp_path, "second")
    h.assert_unchanged(before, h.snapshot(model, BATCH))


# Loading


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_to_nothing(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"")


def garble(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04not a header" * 50)


def drop_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(folder / "adapter_model.safetensors")
        change(state)
        save_file(state, folder / "adapter_model.safetensors")

    edit.__name__ = change.__name__
    return edit


def lose_a_tensor(state: dict[str, torch.Tensor]) -> None:
    del state[sorted(state)[-1]]


def add_a_tensor(state: dict[str, torch.Tensor]) -> None:
    key = next(key for key in sorted(state) if "lora_" in key)
    state[key.replace("0", "9") + "x"] = state[key].clone()


def widen_a_tensor(state: dict[str, torch.Tensor]) -> None:
    key = next(key for key in sorted(state) if "lora_" in key)
    state[key] = torch.cat([state[key], state[key]])


def edit_config(**fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    edit.__name__ = "_".join(fields)
    return edit


def garble_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "MA')


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, r"adapter_model\.safetensors.*not a whole.*again"),
    "empty": (cut_to_nothing, r"adapter_model\.safetensors.*not a whole.*again"),
    "garbled": (garble, r"adapter_model\.safetensors.*not a whole.*again"),
    "missing": (drop_weights, r"adapter_model\.safetensors"),
    "pickle": (pickle_weights, r"adapter_model\.bin.*pickle.*safe_serialization=True"),
    "tensor lost": (edit_tensors(lose_a_tensor), r"lack .*lora_.*incomplete"),
    "tensor added": (edit_tensors(add_a_tensor), r"hold .*x, which this model has no place for"),
    "tensor widened": (edit_tensors(widen_a_tensor), r"lora_.*is \(.*\) in the adapter's weights and \("),
    "other rank in the config": (edit_config(r=6, r_magnitude=None, r_direction=None), r"lora_.* is \("),
    "unknown field": (
        edit_config(future_field=3),
        r"adapter_config\.json has fields.*future_field.*remove the field",
    ),
    "newer version": (
        edit_config(future_field=3, loraplex_version="999.0"),
        r"future_field.*999\.0.*pip install -U loraplex",
    ),
    "bad value": (edit_config(lora_dropout=7), r"lora_dropout=7"),
    # PEFT reads the config first and does not name the file; our own load_adapter does (below).
    "config garbled": (garble_config, r"line 1 column"),
}


def broken_adapter(method: str, kind: str, folder: Path) -> str:
    """Save an adapter of `method`, break it, and return the message to expect."""
    adapted(method).save_pretrained(folder)
    shutil.copytree(folder, folder.with_name("good"))
    spoil, message = BROKEN[kind]
    spoil(folder)
    if method != "dual_lora" and kind == "other rank in the config":
        edit_config(r=6)(folder)
        file = folder / "adapter_config.json"
        fields = json.loads(file.read_text())
        fields = {k: v for k, v in fields.items() if k not in ("r_magnitude", "r_direction")}
        file.write_text(json.dumps(fields))
    return message


@every_plain
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_adapter(method: str, kind: str, tmp_path: Path) -> None:
    message = broken_adapter(method, kind, tmp_path / "bad")
    base = LLAMA.build()
    before = h.snapshot(base, BATCH)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, str(tmp_path / "bad"))
    h.assert_unchanged(before, h.snapshot(base, BATCH))
    # A good file loads, without a warning about what was left behind.
    loaded = PeftModel.from_pretrained(base, tmp_path / "good")
    assert torch.equal(output(loaded, BATCH), output(adapted(method), BATCH))


@pytest.mark.parametrize("method", ["multilora", "aslora"])
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_second_adapter(method: str, kind: str, tmp_path: Path) -> None:
    message = broken_adapter(method, kind, tmp_path / "bad")
    model = adapted("masa-router")
    model.train()
    before = h.snapshot(model, BATCH)
    with pytest.raises(ValueError, match=message):
        loraplex.load_adapter(model, str(tmp_path / "bad"), "second")
    h.assert_unchanged(before, h.snapshot(model, BATCH))
    loraplex.load_adapter(model, tmp_path / "good", "second")
    model.set_adapter("second")
    assert torch.equal(output(model.eval(), BATCH), output(adapted(method), BATCH))


@every_plain
@pytest.mark.parametrize(
    "other",
    [{"hidden_size": 16}, {"num_hidden_layers": 3}, {"num_hidden_layers": 7}, {"num_key_value_heads": 4}],
    ids=str,
)
def test_adapter_for_another_base_model(method: str, other: dict[str, int], tmp_path: Path) -> None:
    adapted(method).save_pretrained(tmp_path)
    base = LLAMA.build(**other)
    before = h.snapshot(base, BATCH)
    with pytest.raises(ValueError, match=r"trained on.*load it onto that base model"):
        PeftModel.from_pretrained(base, tmp_path)
    h.assert_unchanged(before, h.snapshot(base, BATCH))


def test_garbled_config_is_named(tmp_path: Path) -> None:
    adapted("multilora").save_pretrained(tmp_path)
    garble_config(tmp_path)
    model = adapted("masa-sum")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not JSON.*again"):
        loraplex.load_adapter(model, str(tmp_path), "second")
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        loraplex.load_adapter(model, str(tmp_path / "absent"), "second")


def test_failed_reload_keeps_the_adapter(tmp_path: Path) -> None:
    """A trainer's resume loads over the adapter in place; a broken checkpoint must not take it away."""
    model = adapted("aslora", r=2)
    adapted("aslora", r=4).save_pretrained(tmp_path / "checkpoint")
    before = h.snapshot(model, BATCH)
    with pytest.raises(ValueError, match="lora_"):
        model.load_adapter(tmp_path / "checkpoint", "default")
    h.assert_unchanged(before, h.snapshot(model, BATCH))


def test_failed_reload_keeps_an_adapter_made_from_a_file_s_config(tmp_path: Path) -> None:
    adapted("aslora", r=2).save_pretrained(tmp_path / "config")
    adapted("aslora", r=4).save_pretrained(tmp_path / "checkpoint")
    settings = AsLoraConfig.from_pretrained(tmp_path / "config")
    settings.inference_mode = False
    model = get_peft_model(LLAMA.build(), settings)
    h.ready(model.eval())
    before = h.snapshot(model, BATCH)
    with pytest.raises(ValueError, match="lora_"):
        model.load_adapter(tmp_path / "checkpoint", "default")
    h.assert_unchanged(before, h.snapshot(model, BATCH))


def head_with_more_labels(folder: Path) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    for key in [key for key in state if "classifier" in key]:
        state[key] = torch.cat([state[key], state[key]])
    save_file(state, folder / "adapter_model.safetensors")


def head_lost(folder: Path) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    save_file({k: v for k, v in state.items() if "classifier" not in k}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("spoil", [head_with_more_labels, head_lost])
def test_head_that_does_not_fit(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    vit = ARCHS["vit"]
    model = get_peft_model(vit.build(), config("masa-sum", modules_to_save=["classifier"]))
    model.save_pretrained(tmp_path)
    spoil(tmp_path)
    base = vit.build()
    before = h.snapshot(base, vit.inputs())
    with pytest.raises(ValueError, match="classifier"):
        PeftModel.from_pretrained(base, tmp_path)
    h.assert_unchanged(before, h.snapshot(base, vit.inputs()))


# Schedules


@pytest.mark.parametrize(
    ("settings", "value"),
    [(lambda: config("aslora", merge_start_step=0.1), "0.1"), (lambda: config("dual_lora", warmup_steps=0.2), "0.2")],
)
def test_fraction_of_an_unknown_run(settings: Callable[[], Any], value: str) -> None:
    model = get_peft_model(LLAMA.build(), settings()).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**BATCH).loss.backward()
    with pytest.raises(RuntimeError, match=rf"{re.escape(value)}.*set_total_steps"):
        optimizer.step()
    loraplex.set_total_steps(model, 20)
    optimizer.step()


@pytest.mark.parametrize("method", ["aslora", "dual_lora"])
def test_schedule_longer_than_the_run(method: str) -> None:
    model = get_peft_model(LLAMA.build(), config(method))
    with pytest.raises(ValueError, match=r"'default'.*2 optimizer steps.*fractions"):
        loraplex.set_total_steps(model, 2)


@pytest.mark.parametrize("method", ["aslora", "dual_lora"])
def test_hidden_optimizer_stops_the_run(method: str) -> None:
    """The parameters that step are copies, as under an engine that flattens them."""
    model = get_peft_model(LLAMA.build(), config(method)).train()
    h.fill(model)
    copies = [p.detach().clone() for p in h.adapter_parameters(model).values()]
    optimizer = torch.optim.SGD(copies, lr=0.1)

    def steps(count: int) -> None:
        for _ in range(count):
            model(**BATCH).loss.backward()
            for c, p in zip(copies, h.adapter_parameters(model).values(), strict=True):
                c.grad = p.grad
            optimizer.step()
            model.zero_grad()

    with pytest.raises(RuntimeError, match=r"never advances.*ScheduleCallback.*loraplex\.step"):
        steps(10)


# Describing


@pytest.mark.parametrize(
    ("method", "ending", "broken", "message"),
    [
        ("aslora", "__merges", torch.tensor(3), r"merges.*is torch.int64 \(\).*copy or download"),
        ("aslora", "__merges", torch.tensor([[0, 1, 2, 3, 4]]), r"merges.*\(1, 5\).*broken"),
        ("aslora", "__merges", torch.tensor([[0, 1, 2, 3, 9], [0, 0, 0, 0, 0]]), r"merges says that layer 4 reads"),
        ("aslora", "__merges", torch.zeros(2, 5), r"merges.*torch.float32"),
        ("aslora", "__merges", None, r"nothing that says which layers read it"),
        ("dual_lora", "warmup", torch.tensor([7]), r"warmup.*\(1,\)"),
        ("dual_lora", "warmup", torch.tensor([-5, 10]), r"warmup says that -5 of 10"),
    ],
    ids=str,
)
def test_describe_names_a_broken_schedule(
    tmp_path: Path, method: str, ending: str, broken: torch.Tensor | None, message: str
) -> None:
    adapted(method).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if key.endswith(ending)]:
        del tensors[key]
        if broken is not None:
            tensors[key] = broken.clone()  # safetensors refuses a tensor twice
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        describe(tmp_path)


@every_plain
def test_describe_checks_settings(tmp_path: Path, method: str) -> None:
    adapted(method).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers_pattern": "["}))
    with pytest.raises(ValueError, match=r"layers_pattern='\['"):
        describe(tmp_path)
