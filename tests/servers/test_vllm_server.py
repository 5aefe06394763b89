"""A real vLLM server, asked for our adapter folders by name. Run by `make test-servers`; needs vllm in $LORAPLEX_VLLM.

The server's own noise is what parts its base model from transformers'. An adapter's log-probabilities may part from
those of stock PEFT with the exported LoRA by little more.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import helpers as h
from loraplex import MultiLoraConfig, export_lora
from loraplex.export.wish import Wish
from loraplex.recipes.models.loading import resolve_model

VLLM = os.environ.get("LORAPLEX_VLLM")
pytestmark = pytest.mark.skipif(VLLM is None, reason="LORAPLEX_VLLM does not name the vllm command")

PROMPTS = [[504, 3575, 282, 4649, 314], [57, 6330, 451, 2425, 355, 1041, 28, 564, 3009]]
SERVED = ("multilora", "aslora", "masa-sum", "masa-concat", "dual_lora")
STD = 0.05


def log_probabilities(model: Any, prompt: list[int]) -> Tensor:
    """Of each token of the prompt but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    return logits[range(len(prompt) - 1), prompt[1:]]


@dataclass
class Server:
    """A running server, and what stock PEFT says."""

    port: int
    log: Path
    process: subprocess.Popen[bytes]
    expected: dict[str, list[Tensor]]

    def ask(self, model: str, prompt: list[int]) -> Any:
        """The answer, or the status of a refusal."""
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code

    def log_probabilities(self, model: str, prompt: list[int]) -> Tensor:
        """Of each token of the prompt but the first."""
        found = self.ask(model, prompt)["choices"][0]["prompt_logprobs"][1:]
        return torch.tensor([at[str(token)]["logprob"] for at, token in zip(found, prompt[1:], strict=True)])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    room = tmp_path_factory.mktemp("vllm")
    base = resolve_model("package:smollm2-135m")
    expected = make_adapters(base, room)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"LORAPLEX_VLLM_ADAPTERS": str(room / "adapters"), "LORAPLEX_CACHE": str(room / "cache")}
    settings |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(VLLM), "serve", base, "--served-model-name", "base", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "128", "--enable-lora", "--max-lora-rank", "32", "--max-cpu-loras", "8"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    log = room / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **settings})
        try:
            wait_for(port, process, log)
            yield Server(port, log, process, expected)
        finally:
            process.terminate()
            process.wait(60)


def make_adapters(base: str, room: Path) -> dict[str, list[Tensor]]:
    """Write adapters, whole and broken; returns the log-probabilities of the whole ones by stock PEFT."""
    folder, expected = room / "adapters", {}
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    expected["base"] = [log_probabilities(fresh, prompt) for prompt in PROMPTS]
    for name in SERVED:
        model = get_peft_model(fresh, h.config(name, task_type="CAUSAL_LM", r=8, lora_alpha=12))
        h.fill(model, std=STD)
        h.advance(model)
        model.save_pretrained(folder / name)
        rank = 16 if name == "dual_lora" else None
        export_lora(model, room / "plain" / name, rank=rank)
        if rank is not None:
            model.save_pretrained(folder / "dual-without-rank")
            Wish(rank=rank).write(folder / name)
        plain = PeftModel.from_pretrained(model.unload(), room / "plain" / name)
        expected[name] = [log_probabilities(plain, prompt) for prompt in PROMPTS]
        fresh = plain.unload()
    big = get_peft_model(fresh, MultiLoraConfig(r=64, num_modules=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    big.save_pretrained(folder / "too-large")
    big.save_pretrained(folder / "truncated")
    weights = folder / "truncated" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "being-written").mkdir()
    (folder / "being-written" / "adapter_config.json").write_bytes(
        (folder / "too-large" / "adapter_config.json").read_bytes()
    )
    return expected


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(f"the server did not start:\n{log.read_text()[-4000:]}")


def test_log_probabilities_are_those_of_stock_peft(server: Server) -> None:
    noise = max(
        (server.log_probabilities("base", prompt) - expected).abs().max().item()
        for prompt, expected in zip(PROMPTS, server.expected["base"], strict=True)
    )
    assert noise < 1e-2
    for name in SERVED:
        for prompt, expected, without in zip(PROMPTS, server.expected[name], server.expected["base"], strict=True):
            difference = (server.log_probabilities(name, prompt) - expected).abs().max().item()
            effect = (expected - without).abs().max().item()
            print(f"{name}: effect {effect:.2e}, difference {difference:.2e}, noise {noise:.2e}")
            assert effect > 100 * noise
            assert difference < 5 * noise + 1e-4


@pytest.mark.parametrize(
    ("name", "status", "line"),
    [
        ("nothing", 404, "there is no adapter 'nothing'"),
        ("../plain/aslora", 404, "'../plain/aslora' is no name of an adapter"),
        ("/etc", 404, "'/etc' is no name of an adapter"),
        ("..", 404, "'..' is no name of an adapter"),
        ("a\nb", 404, "is no name of an adapter"),
        ("x" * 1000, 404, "is no name of an adapter"),
        ("dual-without-rank", 404, "adapter 'dual-without-rank' can't be served"),
        ("too-large", 400, "LoRA rank 128 is greater than max_lora_rank 32"),
        ("truncated", 404, "is not a whole safetensors file"),
        ("being-written", 404, "adapter 'being-written' can't be served"),
    ],
)
def test_what_can_t_be_served_leaves_the_server_alive(server: Server, name: str, status: int, line: str) -> None:
    before = server.log.stat().st_size
    assert server.ask(name, PROMPTS[0]) == status
    assert line in server.log.read_bytes()[before:].decode()
    assert server.process.poll() is None
    assert server.ask("multilora", PROMPTS[0])["choices"]


def test_an_adapter_that_is_finished_later_is_served(server: Server) -> None:
    folder = Path(os.path.dirname(server.log)) / "adapters"
    (folder / "being-written").rename(folder / "half")
    (folder / "aslora").rename(folder / "being-written")
    try:
        found = server.log_probabilities("being-written", PROMPTS[0])
        assert torch.equal(found, server.log_probabilities("aslora", PROMPTS[0]))
    finally:
        (folder / "being-written").rename(folder / "aslora")
        (folder / "half").rename(folder / "being-written")
