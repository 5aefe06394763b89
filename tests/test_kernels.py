"""The Triton kernels against a plain torch twin in float64: on a GPU, or in Triton's interpreter; compiled without one.

The interpreter needs TRITON_INTERPRET=1 before the kernels are imported, which would disable compiling: so
`test_in_the_interpreter` runs this file a second time, in a process of its own.
"""

# ruff: noqa: E402 (triton is not there on every system)

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loraplex.methods.dual_lora import kernels, launch

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
# bfloat16 in the interpreter too, whose arithmetic in it is wrong: the kernels compute in float32 and round by bits.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF = DTYPES[1:]

runs = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="needs a GPU; test_in_the_interpreter runs it without one"
)
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")

# (out, in), r₁, r₂: ragged, ranks that differ, are 1, no power of two, above 16; many rows, many columns.
SHAPES = [
    ((65, 130), 3, 5),
    ((33, 17), 1, 16),
    ((128, 257), 17, 2),
    ((5, 600), 4, 4),
    ((600, 5), 4, 4),
]


# The twin


def factors(out_features: int, in_features: int, r1: int, r2: int) -> tuple[Tensor, ...]:
    """A, B, C, D. N = D C is exactly 0 in the first row and the first column, and there P = B A is not."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((r1, in_features), (out_features, r1), (r2, in_features), (out_features, r2))
    A, B, C, D = (torch.randn(shape, generator=generator) for shape in shapes)
    C[:, 0] = 0
    D[0] = 0
    return tuple(factor.to(DEVICE) for factor in (A, B, C, D))


def twin(weight: Tensor | None, A: Tensor, B: Tensor, C: Tensor, D: Tensor, scale: Tensor) -> Tensor:
    """W + s · ReLU(B A) ⊙ Sign(D C), float64."""
    A, B, C, D = (factor.double() for factor in (A, B, C, D))
    delta = scale.double() * torch.relu(B @ A) * torch.where(D @ C > 0, 1.0, -1.0)
    return delta if weight is None else weight.double() + delta


def twin_gradients(
    G: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, scale: Tensor, bound: float = 1.0
) -> tuple[Tensor, ...]:
    """dA, dB, dC, dD as written in the paper, float64."""
    G, A, B, C, D, scale = (t.double() for t in (G, A, B, C, D, scale))
    M = scale * (B @ A)
    gM = G * torch.where(D @ C > 0, 1.0, -1.0) * (M > 0)
    gN = (G * torch.relu(M)).clamp(-bound, bound)
    return scale * B.T @ gM, scale * gM @ A.T, D.T @ gN, gN @ C.T


def built(
    dtype: torch.dtype, weight: Tensor | None, fs: tuple[Tensor, ...], scale: Tensor, key: int | None = None
) -> Tensor:
    """Rounded with `key`, or to the nearest value."""
    out = torch.full((len(fs[1]), fs[0].shape[1]), float("nan"), dtype=dtype, device=DEVICE)
    seed = None if key is None or dtype == torch.float32 else torch.tensor(key, device=DEVICE)
    launch.build_with(out, weight, *fs, scale, seed, dtype)
    return out


def gradients(G: Tensor, fs: tuple[Tensor, ...], scale: Tensor, bound: float = 1.0) -> tuple[Tensor, ...]:
    return launch.gradients(G, *fs, scale, number(bound))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def number(value: float) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def rounding(dtype: torch.dtype) -> dict[str, float]:
    """Tolerances: one rounding to `dtype` of values that float32 arithmetic has got right to 1e-5."""
    return {"atol": 2e-5, "rtol": max(1e-5, torch.finfo(dtype).eps)}


# Building W + ΔW


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "r1", "r2"), SHAPES)
def test_build(shape: tuple[int, int], r1: int, r2: int, dtype: torch.dtype) -> None:
    fs, scale, weight = factors(*shape, r1, r2), number(1.7), random(*shape, dtype=dtype)
    out = built(dtype, weight, fs, scale, None)
    torch.testing.assert_close(out.double(), twin(weight, *fs, scale), **rounding(dtype))
    # The twin tells the formula from its neighbour: with the roles of A, B and C, D exchanged it is another matrix.
    A, B, C, D = fs
    assert not torch.allclose(out.double(), twin(weight, C, D, A, B, scale), atol=0.1)


@runs
def test_build_without_a_weight() -> None:
    fs, scale = factors(33, 65, 3, 5), number(0.3)
    out = built(torch.float32, None, fs, scale, None)
    torch.testing.assert_close(out.double(), twin(None, *fs, scale), **rounding(torch.float32))
    # Sign(0) = −1: the first row and column, where N = 0, take −s · ReLU(P).
    expected = -scale * torch.relu(fs[1] @ fs[0])
    torch.testing.assert_close(out[0], expected[0])
    torch.testing.assert_close(out[:, 0], expected[:, 0])
    assert out[0].min() < 0


@runs
def test_build_with_any_strides() -> None:
    """GPT-2's Conv1D keeps Wᵀ; factors and result may be views."""
    A, B, C, D = factors(65, 50, 3, 5)
    scale, weight = number(1.7), random(50, 65, dtype=torch.float16).T
    out = torch.zeros(100, 65, device=DEVICE)
    views = (A.T.contiguous().T, B.T.contiguous().T, C.repeat_interleave(2, 0)[::2], D.repeat_interleave(2, 1)[:, ::2])
    launch.build(out[::2].T, weight, *views, scale)
    torch.testing.assert_close(out[::2].T.double(), twin(weight, A, B, C, D, scale), **rounding(torch.float32))
    assert not out[1::2].any()


@runs
def test_a_scale_of_zero() -> None:
    """The first step of the warm-up: W as it is, and gradients of zero (Sign's is G · ReLU(0))."""
    fs, scale, weight = factors(33, 17, 3, 5), number(0.0), random(33, 17)
    assert torch.equal(built(torch.float32, weight, fs, scale, None), weight)
    assert all(not gradient.any() for gradient in gradients(weight, fs, scale))


@runs
def test_nan_is_not_hidden() -> None:
    fs, scale, weight = factors(33, 17, 3, 5), number(1.7), random(33, 17)
    weight[2, 3] = weight[4, 5] = float("nan")
    for seed in (None, 1):
        out = built(torch.float16, weight, fs, scale, seed)
        assert out.isnan().nonzero().tolist() == [[2, 3], [4, 5]]
    _, _, dC, dD = gradients(torch.full_like(weight, float("nan")), fs, scale)
    assert dC.isnan().all()
    assert dD.isnan().all()
    fs[0][:, 3] = float("nan")
    assert built(torch.float32, None, fs, scale, None)[:, 3].isnan().all()


@runs
def test_ranks_beyond_what_a_program_holds() -> None:
    with pytest.raises(ValueError, match=r"up to 128, not 129: use plain torch"):
        built(torch.float32, None, factors(33, 17, 129, 2), number(1.0), None)


# Rounding at random


@runs
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("wide", [True, False])
def test_random_rounding(dtype: torch.dtype, wide: bool) -> None:
    """The same key rounds alike; each value is one of x's two neighbours; the mean over keys is x."""
    # Out of float16's normal range too (below 6e-5), where its values are 6e-8 apart.
    fs, scale, stored = factors(17, 40, 3, 5), number(1e-3), random(17, 40)
    stored *= torch.logspace(-7, 0, 40, device=DEVICE)
    fs[1][:9] *= 1e-4
    weight = stored if wide else stored.to(dtype)
    # W itself is rounded to the nearest value.
    exact = built(torch.float32, weight.to(dtype).float(), fs, scale).double()
    assert torch.equal(built(dtype, weight, fs, scale, 5), built(dtype, weight, fs, scale, 5))
    assert not torch.equal(built(dtype, weight, fs, scale, 5), built(dtype, weight, fs, scale, 6))

    nearest = exact.to(dtype)
    other = torch.where(nearest.double() < exact, 1, -1) * float("inf")
    other = torch.nextafter(nearest.cpu(), other.to(dtype).cpu()).to(DEVICE).double()
    near, step = nearest.double(), (other - nearest.double()).abs()
    num_seeds = 64
    total = torch.zeros_like(exact)
    for seed in range(num_seeds):
        out = built(dtype, weight, fs, scale, 2**40 + seed).double()
        assert ((out == near) | (out == other)).all()
        total += out
    # The mean of n roundings, of a standard deviation up to step/2 each: 5 σ for 680 elements at once.
    off = (total / num_seeds - exact) / step
    assert off.abs().max() < 5 * 0.5 / num_seeds**0.5
    assert off.mean().abs() < 5 * 0.5 / (num_seeds * off.numel()) ** 0.5


@runs
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("wide", [True, False])
def test_without_an_update_the_sum_is_the_nearest_weight(dtype: torch.dtype, wide: bool) -> None:
    weight = random(17, 40) * torch.logspace(-7, 4, 40, device=DEVICE)
    # Ties go to even.
    weight[0, 20:24] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-11, -1 - 3 * 2**-11])
    weight = weight if wide else weight.to(dtype)
    out = torch.empty(17, 40, dtype=dtype, device=DEVICE)
    launch.build(out, weight, *factors(17, 40, 3, 5), number(0.0))
    assert torch.equal(out, weight.to(dtype))


@runs
def test_keys_differ_between_layers_and_after_each_change() -> None:
    """The kernel's key, which `build` takes: of the factors and of W, whatever their strides."""
    fs, weight = factors(65, 130, 3, 5), random(65, 130)

    def key(weight: Tensor, *fs: Tensor) -> int:
        return int(launch.key_of(weight, *fs))

    found = {key(weight, *fs), key(weight, *fs), key(weight.T.contiguous().T, *fs)}
    assert len(found) == 1
    found |= {key(weight, *(f * 1.001 if f is one else f for f in fs)) for one in fs} | {key(weight + 1, *fs)}
    assert len(found) == 6
    assert all(0 <= one < 2**63 for one in found)
    A, B, C, D = fs
    half = weight.to(torch.float16)
    outs = [torch.empty_like(half) for _ in range(3)]
    for out, factor in zip(outs, (1, 1, 1.0001), strict=True):
        launch.build(out, half, A, B * factor, C, D, number(1e-3))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert torch.equal(outs[0], built(torch.float16, half, fs, number(1e-3), key(half, *fs)))


@runs
def test_random_rounding_does_not_depend_on_the_tiles() -> None:
    """Keyed by the element's place: a part of W that starts at row 0 and is as wide is rounded alike."""
    A, B, C, D = factors(200, 40, 3, 5)
    whole = built(torch.float16, None, (A, B, C, D), number(1.0), 3)
    assert torch.equal(built(torch.float16, None, (A, B[:70], C, D[:70]), number(1.0), 3), whole[:70])


# Gradients


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "r1", "r2"), SHAPES)
def test_gradients(shape: tuple[int, int], r1: int, r2: int, dtype: torch.dtype) -> None:
    fs, scale, G = factors(*shape, r1, r2), number(1.7), random(*shape, dtype=dtype)
    expected = twin_gradients(G, *fs, scale)
    for name, gradient, exact, factor in zip("ABCD", gradients(G, fs, scale), expected, fs, strict=True):
        assert gradient.dtype == torch.float32
        assert gradient.shape == factor.shape
        assert gradient.is_contiguous()
        error = (gradient.double() - exact).norm() / exact.norm()
        assert error < 1e-6, f"d{name}: {error}"


@runs
@pytest.mark.parametrize("power", [8, 16])
def test_gradients_of_a_scaled_loss(power: int) -> None:
    """Under a loss scale of 2ⁿ they are 2ⁿ times as large, bit for bit, those that are clipped too."""
    fs, scale, G = factors(33, 65, 3, 5), number(1.7), random(33, 65)
    twins = twin_gradients(G, *fs, scale), twin_gradients(G, *fs, scale, bound=100.0)
    assert relative(twins[0][3], twins[1][3]) > 0.1  # many are clipped
    scaled = gradients(G * 2**power, fs, scale, 2.0**power)
    for one, two in zip(scaled, gradients(G, fs, scale), strict=True):
        assert torch.equal(one, two * 2**power)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@runs
def test_gradients_are_those_of_autograd() -> None:
    """The twin's gradients, and Sign's in the method, are one thing; also where s is negative."""
    from loraplex.methods.dual_lora.sign import Sign

    G = random(33, 65)
    for s in (1.7, -0.6):
        A, B, C, D = (factor.double().requires_grad_() for factor in factors(33, 65, 3, 5))
        (s * torch.relu(B @ A) * Sign.apply(D @ C)).backward(G.double())
        for factor, gradient in zip((A, B, C, D), gradients(G, factors(33, 65, 3, 5), number(s)), strict=True):
            torch.testing.assert_close(gradient.double(), factor.grad, atol=1e-4, rtol=1e-5)


@runs
def test_gradients_with_any_strides() -> None:
    A, B, C, D = factors(65, 50, 3, 5)
    scale, G = number(1.7), random(100, 65, dtype=torch.float16)[::2].T
    expected = twin_gradients(G, A, B, C, D, scale)
    views = (A.T.contiguous().T, B.T.contiguous().T, C.repeat_interleave(2, 0)[::2], D.repeat_interleave(2, 1)[:, ::2])
    for gradient, exact in zip(gradients(G, views, scale), expected, strict=True):
        torch.testing.assert_close(gradient.double(), exact, atol=1e-4, rtol=1e-5)


@runs
def test_gradients_are_the_same_each_time() -> None:
    fs, G = factors(65, 600, 3, 5), random(65, 600)
    first, second = (gradients(G, fs, number(1.7)) for _ in range(2))
    assert all(map(torch.equal, first, second))


# Without a GPU


@compiles
def test_in_the_interpreter() -> None:
    """Everything above, in a process with TRITON_INTERPRET=1."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
    assert " passed" in run.stdout


TARGETS = {  # and the bytes of shared memory that a program may have there
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def compiled(
    kernel: Any, target: GPUTarget, config: triton.Config, dtype: str, rank: int, unit: str, weight: str = ""
) -> Any:
    """As at a launch on contiguous matrices of a size that 16 divides, those whose strides are named in `unit`."""
    function = kernel.fn if isinstance(kernel, triton.runtime.Autotuner) else kernel
    constants = {"R1": rank, "R2": rank, "DTYPE": getattr(triton.language, NAMES[dtype]), **config.kwargs}
    constants |= {"SAMPLE": launch._SAMPLE} | ({"key": None} if dtype == "fp32" else {})
    constants |= {name: 1 for name in function.arg_names if name in unit.split()}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    dtypes = dict.fromkeys(("A", "B", "C", "D", "scale", "bound", "dB", "dD"), "*fp32") | {"key": "*i64"}
    dtypes |= {"out": f"*{dtype}", "G": f"*{dtype}", "weight": f"*{weight or dtype}"}
    signature, attributes = {}, {}
    for place, name in enumerate(function.arg_names):
        signature[name] = "constexpr" if name in constants else dtypes.get(name, "i32")
        if name not in constants:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **launch._OPTIONS}
    return triton.compile(source, target=target, options=options)


CASES = {  # kernel, and which of its strides are 1
    "build": (kernels.build_kernel, "out_column weight_column A_column B_column C_column D_column"),
    "dB, dD": (kernels.gradients_kernel, "G_column A_column B_column C_column D_column dB_column dD_column"),
    "dA, dC": (kernels.gradients_kernel, "G_row A_row B_row C_row D_row dB_column dD_column"),
}


@compiles
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TARGETS)
def test_compiles(name: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every config, dtype and the highest rank fit into shared memory, and no product is rounded to TF32."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    target, shared = TARGETS[name]
    kernel, unit = CASES[case]
    # Not each dtype with each config, which takes minutes: the largest tiles are float32's in the last config.
    variants = [(d, 16, config) for d, config in zip(("fp16", "bf16", "fp32"), kernels.CONFIGS, strict=True)]
    if name in ("sm_90", "gfx942"):
        variants += [("bf16", kernels.MAX_RANK, kernels.CONFIGS[0])]
    for dtype, rank, config in variants:
        binary = compiled(kernel, target, config, dtype, rank, unit)
        assert binary.metadata.shared <= shared, (dtype, rank, config)
        code = binary.asm["amdgcn" if name == "gfx942" else "ptx"]
        assert "tf32" not in code, (dtype, rank, config)
        assert "xf32" not in code, (dtype, rank, config)
        # Products on float32 units: tensor cores have none on CUDA.
        assert re.search(r"v_mfma_f32_\w+x\w*_?f32" if name == "gfx942" else r"fma\.rn\.f32", code)
        assert not re.search(r"\b(mma|wgmma|tcgen05)\b", code)


@compiles
@pytest.mark.parametrize("name", TARGETS)
def test_a_float32_weight_and_the_key_compile(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under autocast, where W is rounded on the way."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    target, shared = TARGETS[name]
    kernel, unit = CASES["build"]
    for dtype in ("bf16", "fp16"):
        binary = compiled(kernel, target, kernels.CONFIGS[0], dtype, 16, unit, weight="fp32")
        assert binary.metadata.shared <= shared
    assert compiled(kernels.key_kernel, target, triton.Config({}), "bf16", 16, unit).metadata.shared <= shared


@compiles
def test_which_configs_are_tried() -> None:
    """Fewer for higher ranks, at least one for the highest."""
    tried = [len(kernels._fitting(kernels.CONFIGS, {}, R1=rank, R2=rank)) for rank in (16, 32, 64, kernels.MAX_RANK)]
    assert tried == [3, 3, 2, 1]
