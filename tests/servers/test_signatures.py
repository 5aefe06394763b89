"""Our stand-ins for vLLM and SGLang against the real packages' source, and SGLang's own hook on its own class.

Run by `make test-servers`: LORAPLEX_VLLM names the vllm command, LORAPLEX_SGLANG a folder with SGLang's unpacked wheel.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import helpers as h
from helpers import ARCHS, adapted

STUBS = Path(__file__).parent.parent / "stubs"
VLLM, SGLANG = os.environ.get("LORAPLEX_VLLM"), os.environ.get("LORAPLEX_SGLANG")


def site_packages() -> Path:
    """Where the vllm command's environment has its packages."""
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    python = Path(str(VLLM)).parent / "python"
    return Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


def arguments(root: Path, module: str, cls: str, function: str) -> list[str]:
    """Names of a method's arguments, in order."""
    tree = ast.parse((root / module).read_text())
    body = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == cls)
    method = next(
        node
        for node in body.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == function
    )
    kind = "async " if isinstance(method, ast.AsyncFunctionDef) else ""
    return [kind, *(argument.arg for argument in method.args.args)]


def fields(root: Path, module: str, cls: str) -> list[str]:
    """Names of a class's fields, in order."""
    tree = ast.parse((root / module).read_text())
    body = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == cls)
    return [
        node.target.id for node in body.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


@pytest.mark.skipif(VLLM is None, reason="LORAPLEX_VLLM does not name the vllm command")
@pytest.mark.parametrize(
    ("cls", "function"),
    [
        ("LoRAResolver", "resolve_lora"),
        ("_LoRAResolverRegistry", "get_supported_resolvers"),
        ("_LoRAResolverRegistry", "register_resolver"),
        ("_LoRAResolverRegistry", "get_resolver"),
    ],
)
def test_vllm(cls: str, function: str) -> None:
    module = "vllm/lora/resolver.py"
    assert arguments(site_packages(), module, cls, function) == arguments(STUBS, module, cls, function)


@pytest.mark.skipif(VLLM is None, reason="LORAPLEX_VLLM does not name the vllm command")
def test_vllm_requests_and_ranks() -> None:
    from loraplex.export.servers import ENGINES

    root, module = site_packages(), "vllm/lora/request.py"
    assert fields(root, module, "LoRARequest")[:3] == fields(STUBS, module, "LoRARequest")
    tree = ast.parse((root / "vllm/config/lora.py").read_text())
    ranks = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "MaxLoRARanks"
    )
    assert isinstance(ranks, ast.Subscript)
    assert ast.literal_eval(ranks.slice) == ENGINES["vllm"].ranks


RUN_HOOK = """
import json, sys
from sglang.srt.plugins.hook_registry import HookRegistry
from loraplex.integrations import sglang as door
door.register()
HookRegistry.apply_hooks()
assert door.TARGET in HookRegistry._patched
from sglang.srt.lora.lora_config import LoRAConfig
config = LoRAConfig(sys.argv[1], base_vocab_size=61)
found = [config.path, config.r, config.lora_alpha, sorted(config.target_modules), config.lora_added_tokens_size]
print(json.dumps(found))
"""


@pytest.mark.skipif(SGLANG is None, reason="LORAPLEX_SGLANG does not name SGLang's unpacked wheel")
def test_sglang_s_own_hook_on_its_own_class(tmp_path: Path) -> None:
    """Two files of the wheel, which import little; the rest of SGLang wants a GPU's packages."""
    module = "sglang/srt/lora/lora_config.py"
    real = Path(str(SGLANG))
    assert arguments(real, module, "LoRAConfig", "__init__") == arguments(STUBS, module, "LoRAConfig", "__init__")
    for name in (module, "sglang/srt/plugins/hook_registry.py"):
        place = tmp_path / "packages" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes((real / name).read_bytes())
    ARCHS["llama"].config().save_pretrained(tmp_path / "base")
    adapted("masa-sum").save_pretrained(tmp_path / "adapter")
    settings = h.lora_config(tmp_path / "adapter") | {"base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    path = os.pathsep.join([str(tmp_path / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "LORAPLEX_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", RUN_HOOK, str(tmp_path / "adapter")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, *rest = json.loads(done.stdout.splitlines()[-1])
    assert Path(found).parent == tmp_path / "cache" / "plain"
    assert rest == [4, 4, ["q_proj", "v_proj"], 0]
