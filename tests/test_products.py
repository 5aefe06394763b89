"""Settings that let float32 products be rounded (TF32, bfloat16) change no sign, and nothing of what is merged.

Which hardware rounds, and when, differs: here products are rounded wherever the setting allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import helpers as h
from helpers import MERGEABLE, adapted
from loraplex import DualLoraConfig, export_lora
from loraplex.methods.dual_lora import gated_linear as gated
from loraplex.methods.dual_lora.closed_gates import closed_and_negative
from loraplex.numerics import lowrank, products
from loraplex.numerics.products import add_product_, product


def matmul(precision: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(precision)


def backend(*path: str, precision: str) -> Callable[[], None]:
    """torch's newer way, from 2.9 on: of everything, of a backend, or of its products."""

    def set_it() -> None:
        where: Any = torch.backends
        for name in path:
            where = getattr(where, name)
        where.fp32_precision = precision

    return set_it


SETTINGS = {"high": matmul("high"), "medium": matmul("medium")}
if torch.__version__ >= "2.9":
    SETTINGS |= {
        "all tf32": backend(precision="tf32"),
        "mkldnn bf16": backend("mkldnn", "matmul", precision="bf16"),
        "mkldnn tf32": backend("mkldnn", "matmul", precision="tf32"),
    }


class Rounded(TorchDispatchMode):
    """Products of float32 matrices from operands in bfloat16, inside of custom operators too, while a setting holds."""

    PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm)

    OPERATORS: ClassVar = {
        torch.ops.loraplex.gated_linear: gated._forward,
        torch.ops.loraplex.gated_linear_backward: gated._backward,
        torch.ops.loraplex.product: products._product,
    }

    def __init__(self, on: Callable[[], bool]) -> None:
        super().__init__()
        self.on, self.seen = on, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in self.OPERATORS:
            with self:
                return self.OPERATORS[func.overloadpacket]._init_fn(*args, **(kwargs or {}))
        if func.overloadpacket in self.PRODUCTS and self.on():
            self.seen += 1
            *rest, left, right = args
            args = (*rest, *(t.bfloat16().to(t.dtype) if t.dtype == torch.float32 else t for t in (left, right)))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=SETTINGS)
def rounded(request: pytest.FixtureRequest) -> Iterator[Rounded]:
    """A setting in force, and products rounded as it allows."""
    mode = Rounded(lambda: products._precision("mkldnn") in ("tf32", "bf16"))
    with mode:
        SETTINGS[request.param]()
        try:
            yield mode
        finally:
            torch.set_float32_matmul_precision("highest")
            if torch.__version__ >= "2.9":
                for reset in ([], ["mkldnn", "matmul"], ["cuda", "matmul"]):
                    backend(*reset, precision="none")()


K = torch.tensor([1.0, -1, 1, 1, -1, -1, 1, -1])


def fine_signs(form: str) -> nn.Module:
    """W = 0, BA > 0 and D C = ±2⁻¹², which vanishes when D and C are rounded; the signs of each row are K."""
    config = DualLoraConfig(
        r_magnitude=1, r_direction=2, lora_alpha=3, target_modules=["0"], init_weights=False, compute=form
    )
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6, bias=False)), config).train()
    own = model.base_model.model[0].factors("default")
    with torch.no_grad():
        model.base_model.model[0].base_layer.weight.zero_()
        own.lora_A.fill_(1)
        own.lora_B.fill_(1)
        own.lora_C.copy_(torch.stack([1 + K * 2**-12, torch.ones(8)]))
        own.lora_D.copy_(torch.tensor([[1.0, -1.0]]).expand(6, 2))
    return model


def test_the_rounding_is_seen(rounded: Rounded) -> None:
    """Without the remedy all of these signs are lost: what follows can tell."""
    own = fine_signs("auto").base_model.model[0].factors("default")
    assert not (own.lora_D @ own.lora_C).any()
    assert rounded.seen
    assert torch.equal(product(own.lora_D, own.lora_C).sign(), K.expand(6, 8))


@pytest.mark.parametrize("form", ["added", "apart", "reference"])
def test_signs_of_dual_lora(rounded: Rounded, form: str) -> None:
    """In forward, backward, merging and what is exported."""
    model = fine_signs(form)
    own = model.base_model.model[0].factors("default")
    y = model(torch.eye(8))
    assert torch.equal(y.T.sign(), K.expand(6, 8))
    # dY = k for each token: dB sums k·k where the sign is right, and 0 where all are −1.
    dB, dA = torch.autograd.grad(y, [own.lora_B, own.lora_A], K[:, None].expand(8, 6))
    assert torch.allclose(dB, torch.full((6, 1), 8 * own.scaling), rtol=0.01)
    assert torch.allclose(dA, torch.full((1, 8), 6 * own.scaling), rtol=0.01)
    assert torch.equal(own.delta_weight().sign(), K.expand(6, 8))
    assert torch.equal(own.by_rows()(slice(2, 4)).sign(), K.expand(2, 8))
    assert closed_and_negative(own.matrices) == (0, 0.5)
    model.merge_adapter()
    assert torch.equal(model.base_model.model[0].base_layer.weight.sign(), K.expand(6, 8))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("form", ["added", "apart", "reference"])
def test_compiled_code_asks_when_it_runs(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """A setting that is made after compiling is followed."""
    torch._dynamo.reset()
    model, asked = fine_signs(form), []
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(torch.eye(8)).sum().backward()
    monkeypatch.setattr(products, "_precision", lambda name: asked.append(name) or "tf32")
    in_float64 = products._in_float64
    monkeypatch.setattr(products, "_in_float64", lambda B, A: asked.append("float64") or in_float64(B, A))
    with torch._dynamo.config.patch(error_on_recompile=True):
        y = compiled(torch.eye(8))
        assert asked.count("float64") == 2
        assert torch.equal(y.T.sign(), K.expand(6, 8))
        y.sum().backward()
    assert asked.count("float64") == (2 if form == "reference" else 4)


@pytest.mark.parametrize("method", MERGEABLE)
def test_merging_and_exporting_are_exact_in_every_setting(rounded: Rounded, method: str, tmp_path: Any) -> None:
    model = adapted(method)
    exact = h.naive_updates(model)
    layers = {name.removeprefix(h.ROOT): layer for name, layer in h.layers_of(model).items()}
    before = {name: layer.get_base_layer().weight.detach().double().clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        assert h.relative(layer.factors("default").delta_weight(), exact[name]) < 1e-5
    if layers and next(iter(layers.values())).factors("default").lora_form() is not None:
        export_lora(model, tmp_path)
        for name, update in h.products(tmp_path).items():
            assert h.relative(update, exact[name]) < 1e-5
    model.merge_adapter()
    for name, layer in layers.items():
        merged = layer.get_base_layer().weight.detach().double() - before[name]
        assert h.relative(merged, exact[name]) < 1e-5


def test_products_are_exact_in_every_setting(rounded: Rounded) -> None:
    B, A = torch.randn(70, 5), torch.randn(5, 90)
    exact = B.double() @ A.double()
    total = torch.ones(70, 90)
    assert h.relative(product(B, A), exact) < 1e-6
    add_product_(total, B, A)
    assert h.relative(total, exact + 1) < 1e-6
    svd = lowrank.randomized_svd(lambda rows: exact[rows].float(), 70, 90, 5)
    assert svd.error(5) < 1e-5
    assert h.relative(svd.U * svd.S @ svd.V, exact) < 1e-5


def test_gradients_of_the_product() -> None:
    """To second order, as compiled code and `compute="reference"` ask for them."""
    B, A = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (3, 5)))
    torch.library.opcheck(torch.ops.loraplex.product, (B, A))
    assert torch.autograd.gradcheck(torch.ops.loraplex.product, (B, A))
    assert torch.autograd.gradgradcheck(torch.ops.loraplex.product, (B, A))


def test_the_setting_is_left_alone(rounded: Rounded) -> None:
    before = products._precision("mkldnn"), products._precision("cuda")
    product(torch.randn(3, 2), torch.randn(2, 3))
    assert (products._precision("mkldnn"), products._precision("cuda")) == before


def test_without_a_setting_products_are_torchs() -> None:
    """No float64 where nothing is rounded."""
    B, A = torch.randn(7, 3), torch.randn(3, 9)
    assert not products.is_reduced(B)
    assert torch.equal(product(B, A), B @ A)
