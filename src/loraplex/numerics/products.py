"""Products of float32 matrices in full float32, whatever precision torch is told to use.

With `tf32=True`, `torch.set_float32_matmul_precision("high")` and the like, GPUs round the operands of float32 products
to 10 bits, and oneDNN on CPUs to bfloat16's 7. Where the sign of a product decides something, as in Dual LoRA, that
changes results; where an update is merged or exported, it takes from the update what its forward did not lose.

Such products are computed in float64, which no setting reduces. The setting itself is left alone. It belongs to the
process: turning it off for a moment would slow down, and recompile, the work of other threads in that moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Device whose products have a setting → the backend of torch that holds it.
_BACKENDS = {"cuda": "cuda", "cpu": "mkldnn", "xpu": "mkldnn"}

# Older versions have one setting for all devices, beside allow_tf32.
_ONE_SETTING = torch.__version__ < "2.9"  # compared as versions

# In elements.
_CPU_TILE, _GPU_TILE = 1 << 18, 1 << 22


def product(B: Tensor, A: Tensor) -> Tensor:
    """B A `(out, in)` of B `(out, r)` and A `(r, in)`, in the dtype of both, which is float32 or float64."""
    if torch.compiler.is_compiling():
        return torch.ops.loraplex.product(B, A)
    return _in_float64(B, A) if is_reduced(B) else B @ A


def add_product_(total: Tensor, B: Tensor, A: Tensor) -> None:
    """total ← total + B A, for float32 or float64."""
    if is_reduced(B):
        for rows in tiles(total):
            total[rows] += _in_float64(B[rows], A)
    else:
        total.addmm_(B, A)


def tiles(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows to work on at a time: float32 copies stay in a CPU's cache, or a GPU needs few launches."""
    rows, columns = matrix.shape
    step = max(1, (_CPU_TILE if matrix.device.type == "cpu" else _GPU_TILE) // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def is_reduced(matrix: Tensor) -> bool:
    """Whether torch's settings now let it round the operands of a product of matrices like `matrix`."""
    backend = _BACKENDS.get(matrix.device.type)
    return backend is not None and matrix.dtype == torch.float32 and _precision(backend) not in ("ieee", "none")


def _precision(backend: str) -> str:
    """The setting: "ieee" or "none" (not set) for full precision, else "tf32" or "bf16"."""
    if _ONE_SETTING:
        full = torch.get_float32_matmul_precision() == "highest"
        full = full and not (backend == "cuda" and torch.backends.cuda.matmul.allow_tf32)
        return "ieee" if full else "tf32"
    # Not allow_tf32, which raises an error once the setting was made in torch's newer way.
    return getattr(torch.backends, backend).matmul.fp32_precision


def _in_float64(B: Tensor, A: Tensor) -> Tensor:
    return (B.double() @ A.double()).to(B.dtype)


@torch.library.custom_op("loraplex::product", mutates_args=())
def _product(B: Tensor, A: Tensor) -> Tensor:
    """`product` as one operator: compiled code must read the setting when it runs, not when it is compiled."""
    return product(B, A)


@_product.register_fake
def _(B: Tensor, A: Tensor) -> Tensor:
    return B.new_empty(B.shape[0], A.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    B, A = ctx.saved_tensors
    of_B, of_A = ctx.needs_input_grad
    return gradient @ A.T if of_B else None, B.T @ gradient if of_A else None


_product.register_autograd(_differentiate, setup_context=_save)
