"""4-bit weights that bitsandbytes repacks for CPUs with AVX512-BF16.

In evaluation mode, on such a CPU, `Linear4bit.forward` replaces its weight by one in another layout whose scales are
rounded to bfloat16. bitsandbytes does not notice what this layout can't do: a gradient stops there (silently, if there
is no bias), another device reads the codes in the wrong order, and `state_dict` writes scales that are rounded or
transposed. So while a model has adapters, each such layer stores its exact scales beside the packed ones, and returns
to the usual layout, bit for bit, for anything but evaluation.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

_EXACT = "loraplex_exact"
"""The attribute of a packed quantisation state that holds the exact one, which is copied and freed with it."""


def guard(model: nn.Module) -> None:
    """Have every 4-bit layer of `model` that bitsandbytes would pack store its exact scales. Idempotent."""
    for module in model.modules():
        # bitsandbytes sets the mark when it makes a Linear4bit.
        if vars(module).get("support_avx512bf16_for_cpu") and not _is_guarded(module):
            module.register_forward_pre_hook(_before_forward, with_kwargs=True)
            module.register_state_dict_pre_hook(_before_save)


def release(model: nn.Module) -> None:
    """Remove the hooks of `guard`, and return every layer to the usual layout."""
    for module in model.modules():
        if _is_guarded(module):
            unpack(module)
            # Found by the functions they call, since handles would not survive a deepcopy of the model.
            for hooks in (module._forward_pre_hooks, module._state_dict_pre_hooks):
                for key in [key for key, hook in hooks.items() if hook in (_before_forward, _before_save)]:
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


def is_packed(weight: Any) -> bool:
    """Whether a 4-bit weight is stored in the layout for CPUs."""
    return bool(getattr(weight.quant_state, "packing_format_for_cpu", False))


def unpacked(weight: Any) -> tuple[Tensor, Any]:
    """A 4-bit weight's data and quantisation state in bitsandbytes' usual layout; `weight` stays as it is.

    If the weight was packed before `guard`, its scales are those of the packed kernel, rounded to bfloat16.
    """
    state = weight.quant_state
    exact = copy.copy(state.__dict__.get(_EXACT))
    if exact is not None:
        exact.to(weight.device)
    if not is_packed(weight):
        return weight.data, exact or state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    twin = copy.copy(state)  # since bitsandbytes writes to its argument
    twin.original_nested = False  # else it would quantise the scales a second time
    data, twin = _convert_weight_packed_for_cpu_inverse(weight.data, twin)
    if exact is None:
        # The packed scales are (blocks of a row, rows).
        twin.absmax = twin.absmax.T.float().flatten().contiguous()
    return data, exact or twin


def unpack(module: Any) -> None:
    """Return the weight of a `Linear4bit` to the usual layout, with the exact scales if they were stored."""
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
