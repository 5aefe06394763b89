"""Settings for all tests: no network, one thread per worker, the same random numbers in every order."""

import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jinja2
import pytest
import torch

from loraplex.tuner.registry import METHODS


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _little_garbage() -> None:
    """Leave what was imported so far out of every later search for garbage, which would take most of a second."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True, scope="session")
def _templates_compiled_once() -> Iterator[None]:
    """PEFT fills in a template, always the same, for the README beside every adapter that is saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Environment, "compile", functools.lru_cache(jinja2.Environment.compile))
        yield


@pytest.fixture(autouse=True, scope="module")
def _methods_of_the_package() -> Iterator[None]:
    """Take methods out of the registry that a module of tests has put there: others ask which there are."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


SLOWEST_FIRST = ["distributed/test_engines", "study/test_study", "test_exec", "test_placement", "test_contract"]
SLOWEST_FIRST += ["test_whole_loads", "test_autoload", "test_kernels", "test_load_checks", "training/test_kill"]
SLOWEST_FIRST += ["study/test_variants", "test_fuzz", "test_distributed", "training/test_harness", "test_training"]
SLOWEST_FIRST += ["test_quantized", "test_doors", "test_export"]
"""A worker takes one file after another. A long one that is taken last keeps one worker busy while the others wait."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files, and skip GPU tests where there is no GPU."""
    order = {str(Path(__file__).parent / f"{name}.py"): place for place, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: order.get(str(item.path), len(order)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
