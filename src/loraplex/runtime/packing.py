"""4-bit weights that bitsandbytes repacks for CPUs with AVX512-BF16.

In evaluation mode, on such a CPU, `Linear4bit.forward` replaces its weight by one in another layout whose scales are
rounded to bfloat16. What the layout can't do, bitsandbytes does not notice: a gradient stops there (without a bias
silently), another device reads the codes in the wrong order, and `state_dict` writes back scales that are not those of
before, or are transposed. So while a model wears adapters, each such layer keeps its exact scales beside the packed
ones, and gets back the layout and the bits of before whenever it does anything but evaluate.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

_EXACT = "loraplex_exact"
"""Where a packed quantisation state holds the state of before; it is copied and freed along with it."""


def guard(model: nn.Module) -> None:
    """Have every 4-bit layer of `model` that bitsandbytes would pack keep its exact scales. Idempotent."""
    for module in model.modules():
        # bitsandbytes sets the mark when it makes a Linear4bit.
        if vars(module).get("support_avx512bf16_for_cpu") and not _is_guarded(module):
            module.register_forward_pre_hook(_before_forward, with_kwargs=True)
            module.register_state_dict_pre_hook(_before_save)


def release(model: nn.Module) -> None:
    """Take off what `guard` put on, and give every layer the bits of before back."""
    for module in model.modules():
        if _is_guarded(module):
            unpack(module)
            # By what they call: handles would not survive a deepcopy of the model.
            for hooks in (module._forward_pre_hooks, module._state_dict_pre_hooks):
                for key in [key for key, hook in hooks.items() if hook in (_before_forward, _before_save)]:
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


def is_packed(weight: Any) -> bool:
    """Whether a 4-bit weight is stored in the layout for CPUs."""
    return bool(getattr(weight.quant_state, "packing_format_for_cpu", False))


def unpacked(weight: Any) -> tuple[Tensor, Any]:
    """A 4-bit weight's data and quantisation state in bitsandbytes' usual layout; `weight` stays as it is.

    Scales that were packed before `guard` had the exact ones are those that the packed kernel uses, bfloat16 numbers.
    """
    state = weight.quant_state
    exact = copy.copy(state.__dict__.get(_EXACT))
    if exact is not None:
        exact.to(weight.device)
    if not is_packed(weight):
        return weight.data, exact or state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    twin = copy.copy(state)  # bitsandbytes writes to the state that it is given
    twin.original_nested = False  # it would quantise the scales a second time
    data, twin = _convert_weight_packed_for_cpu_inverse(weight.data, twin)
    if exact is None:
        # The packed scales are (blocks of a row, rows).
        twin.absmax = twin.absmax.T.float().flatten().contiguous()
    return data, exact or twin


def unpack(module: Any) -> None:
    """Put the weight of a `Linear4bit` back into the usual layout, with the exact scales where they were kept."""
    weight = module.weight
    if weight.quant_state is not None and not weight.is_meta:
        weight.data, weight.quant_state = unpacked(weight)
        module.quant_state = weight.quant_state


def _before_forward(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
    weight, x = module.weight, args[0] if args else kwargs["x"]
    if weight.quant_state is None or weight.is_meta:
        return
    # bitsandbytes' own condition.
    packs = x.device.type == "cpu" and not module.training and not x.requires_grad
    if not packs:
        unpack(module)
    elif not is_packed(weight):
        unpack(module)
        weight.quant_state.__dict__[_EXACT] = copy.copy(weight.quant_state)


def _before_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    unpack(module)


def _is_guarded(module: nn.Module) -> bool:
    return _before_forward in module._forward_pre_hooks.values()
