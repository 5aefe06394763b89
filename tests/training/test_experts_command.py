"""A mixture of experts through the command line: trained, resumed, measured, merged; a plain LoRA is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from runs import WORDS, rows, tokenizer, without_times, write_run
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from loraplex.commands.cli import main

IDS = torch.tensor([[3, 5, 10, 6, 11, 5], [4, 5, 13, 9, 2, 7]])


@pytest.fixture(scope="module")
def moe(room):
    torch.manual_seed(0)
    size = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Qwen3MoeConfig(
        **size, num_key_value_heads=2, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(room / "moe")
    tokenizer(chat=True).save_pretrained(room / "moe")
    return room


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.parametrize("method", ["aslora", "dual_lora"])
def test_experts(moe, tmp_path, method, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    for folder in (out, again):
        path = write_run(moe, folder, method, model=str(moe / "moe"))
        run = yaml.safe_load(path.read_text())
        run["adapter"] |= {"target_modules": "all-linear"}
        path.write_text(yaml.safe_dump(run))
        assert main(["train", str(path)]) == 0
    shutil.rmtree(again / "checkpoint-12")
    (again / "adapter_model.safetensors").unlink()
    assert main(["train", str(again.with_suffix(".yaml")), "--resume"]) == 0
    assert without_times(rows(out)) == without_times(rows(again))
    assert (out / "adapter_model.safetensors").read_bytes() == (again / "adapter_model.safetensors").read_bytes()

    capsys.readouterr()
    assert main(["inspect", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    named = {row["module"] for row in report["modules"]} | {row["family"] for row in report["shared"]}
    assert any("experts" in name for name in named)
    assert (
        main(["budget", str(moe / "moe"), "--methods", method, "--adapter.target_modules", "all-linear", "--json"]) == 0
    )
    assert main(["export", str(out), "-o", str(tmp_path / "lora"), "--max-error", "0.5"]) == 2
    assert "merge it" in capsys.readouterr().err
    assert main(["merge", str(out), "-o", str(tmp_path / "merged")]) == 0
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(moe / "moe"), out).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, rtol=1e-3, atol=1e-4)
        with adapted.disable_adapter():
            assert not torch.allclose(merged(IDS).logits, adapted(IDS).logits, atol=1e-3)
