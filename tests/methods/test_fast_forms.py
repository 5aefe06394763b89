"""Packed GEMMs against loops in float64, over dtypes, layouts of x, frozen factors, dropout and autocast."""

import pytest
import torch
from naive import adapt, draw, factors, leaf
from torch import Tensor, nn

from loraplex import AsLoraConfig, MasaConfig, MultiLoraConfig

IN, OUT, R, N, SCALE = 11, 7, 3, 2, 5 / 3
FORMS = {
    "multilora": lambda **kw: MultiLoraConfig(num_modules=N, **kw),
    "multilora-module": lambda **kw: MultiLoraConfig(num_modules=N, scaling_granularity="module", **kw),
    "router": lambda **kw: MasaConfig(num_experts=N, **kw),
    "sum": lambda **kw: MasaConfig(num_experts=N, expert_mixing="sum", **kw),
    "concat": lambda **kw: MasaConfig(num_experts=N, expert_mixing="concat", **kw),
    "aslora": lambda **kw: AsLoraConfig(num_merges=0, **kw),
}
# Of the largest entry: a few roundings of eps, and sums over tens of terms.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
every_form = pytest.mark.parametrize("form", FORMS)


class FixedDropout(nn.Dropout):
    """Zeroes what depends on nothing but the shape, so that the loop can draw the same masks."""

    def __init__(self) -> None:
        super().__init__(0.5)
        self.draws = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        self.draws += 1
        return x * mask(x.shape, self.draws).to(x.dtype)


def mask(shape: torch.Size, draw_number: int) -> Tensor:
    return 2 * (draw(*shape, seed=100 + draw_number) > 0)


def loop(form: str, p: dict[str, Tensor], x: Tensor, dropout: bool) -> Tensor:
    """(α/r) · the paper's sum, module by module."""
    drop = [x * mask(x.shape, i + 1) if dropout else x for i in range(N)]
    A, B = p["lora_A"], p["lora_B"]
    part = [slice(i * R, (i + 1) * R) for i in range(N)]
    if form.startswith("multilora"):
        return SCALE * sum(p["lora_scaling"][i] * (drop[0] @ A[part[i]].T @ B[:, part[i]].T) for i in range(N))
    if form == "router":
        powers = (drop[0] @ p["lora_router"].T).exp()
        gates = powers / powers.sum(-1, keepdim=True)
        return SCALE * sum(gates[..., i : i + 1] * (drop[0] @ A[part[i]].T) for i in range(N)) @ B.T
    if form == "sum":
        return SCALE * sum(drop[i] @ A[part[i]].T for i in range(N)) @ B.T
    if form == "concat":
        return SCALE * sum(drop[0] @ A[part[i]].T @ B[:, part[i]].T for i in range(N))
    return SCALE * (drop[0] @ A.T) @ B.T


def made(form: str, dtype: torch.dtype, dropout: bool = False):
    config = FORMS[form](r=R, lora_alpha=5)
    model = adapt(config, in_features=IN, out_features=OUT).to(dtype).train()
    f = factors(model)
    if dropout:
        f.dropout = FixedDropout()
    parameters = {"lora_A": f.lora_A, "lora_B": f.lora_B, **dict(f.named_parameters())}
    with torch.no_grad():
        for seed, parameter in enumerate(parameters.values()):
            parameter.copy_(draw(*parameter.shape, seed=seed))
    return f, parameters


def inputs(layout: str, dtype: torch.dtype) -> Tensor:
    x = {
        "matrix": lambda: draw(9, IN),
        "one token": lambda: draw(1, 1, IN),
        "vector": lambda: draw(IN),
        "batch": lambda: draw(2, 5, IN),
        "batch of batches": lambda: draw(2, 3, 2, IN),
        "transposed": lambda: draw(IN, 9).T,
        "swapped": lambda: draw(5, 2, IN).transpose(0, 1),
        "sliced": lambda: draw(4, 5, 2 * IN)[::2, :, ::2],
        "no tokens": lambda: draw(0, IN),
    }[layout]()
    return x if dtype == torch.float64 else x.to(dtype)


LAYOUTS = ["matrix", "one token", "vector", "batch", "batch of batches", "transposed", "swapped", "sliced", "no tokens"]


def near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = expected.abs().max().item() if expected.numel() else 1
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * scale)


def compare(form, dtype, layout="batch", dropout=False, trained=None, autocast=False):
    f, parameters = made(form, dtype, dropout)
    for name, parameter in parameters.items():
        parameter.requires_grad_(trained is None or name == trained)
    x = inputs(layout, dtype).requires_grad_(trained is None)
    ours = {name: leaf(p.double()) for name, p in parameters.items()}
    x_ref = leaf(x.double())
    expected = loop(form, ours, x_ref, dropout)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = f(x)
    tolerance = TOLERANCE[torch.bfloat16 if autocast else dtype]
    assert actual.shape == (*x.shape[:-1], OUT)
    near(actual, expected, tolerance)
    weight = draw(*expected.shape, seed=50)
    (expected * weight).sum().backward()
    actual.backward(weight.to(actual.dtype))
    for name, parameter in parameters.items():
        if trained in (None, name):
            assert parameter.grad.dtype == dtype
            near(parameter.grad, ours[name].grad, tolerance)
        else:
            assert parameter.grad is None
    if trained is None:
        near(x.grad, x_ref.grad, tolerance)


@every_form
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtypes(form, dtype, dropout):
    compare(form, dtype, dropout=dropout)


@every_form
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(form, layout):
    compare(form, torch.float64, layout)
    compare(form, torch.float64, layout, dropout=True)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["batch", "swapped"])
def test_autocast(form, dtype, layout):
    compare(form, dtype, layout, autocast=True)


@every_form
@pytest.mark.parametrize("trained", ["lora_A", "lora_B", "lora_scaling", "lora_router"])
def test_one_factor_trained(form, trained):
    if trained in made(form, torch.float64)[1]:
        compare(form, torch.float64, trained=trained)


@every_form
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_decoding(form, layout, dtype):
    f, parameters = made(form, dtype)
    f.eval()
    x = inputs(layout, dtype)
    expected = loop(form, {name: p.double() for name, p in parameters.items()}, x.double(), False)
    with torch.no_grad():
        for _ in range(2):
            near(f(x), expected, TOLERANCE[dtype])
