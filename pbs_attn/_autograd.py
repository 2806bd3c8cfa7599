"""Whether a derivative would have to flow through a call of an operator, which has none.

A functorch transform (torch.func.grad, jvp, vmap, ...) wraps tensors once per level, and each
wrapper knows only its own level. The functions below therefore walk the levels from the innermost
one outwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch._C._functorch as _functorch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad


def requires_backward(tensors: Sequence[Tensor]) -> bool:
    """Whether one of the tensors requires grad, at the innermost level, and grad mode is on."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def carries_tangent(tensors: Sequence[Tensor]) -> bool:
    """Whether one of the tensors has a forward-mode tangent, at the innermost level, that torch
    would carry on."""
    # Outside of a dual level, which is the usual case, this is one comparison.
    if forward_ad._current_level < 0 or not torch._C._is_fwd_grad_enabled():
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def is_differentiated(*tensors: Tensor) -> bool:
    """Whether a backward or a forward-mode tangent would have to flow through a function of these.

    The answer is yes if a tensor requires grad in grad mode, or carries a forward-mode tangent, at
    any level of functional transforms (torch.func.grad, vjp, jvp, vmap, and combinations of them).
    torch.compile can look neither through wrappers nor for tangents. Inside a transform or a dual
    level that it traces, the answer is yes in grad mode and wherever a tangent may exist.
    """
    is_transformed = torch._C._are_functorch_transforms_active()
    if not is_transformed and forward_ad._current_level < 0:
        return requires_backward(tensors)
    if torch.compiler.is_dynamo_compiling():
        return torch.is_grad_enabled() or forward_ad._current_level >= 0
    if is_transformed:
        return _is_differentiated_at_any_level(tensors)
    return requires_backward(tensors) or carries_tangent(tensors)


def _is_differentiated_at_any_level(tensors: Sequence[Tensor]) -> bool:
    interpreter = retrieve_current_functorch_interpreter()
    level = interpreter.level()
    # A tensor of another level is a constant at this one.
    is_own = [_functorch.maybe_get_level(tensor) == level for tensor in tensors]
    tracked = [
        tensor
        for tensor, own in zip(tensors, is_own, strict=True)
        if own and _functorch.is_gradtrackingtensor(tensor)
    ]
    if requires_backward(tracked) or carries_tangent(tracked):
        return True
    unwrapped = [
        _functorch.get_unwrapped(tensor) if own else tensor
        for tensor, own in zip(tensors, is_own, strict=True)
    ]
    # This also restores the modes in which the transform was called, such as torch.no_grad().
    with interpreter.lower():
        return is_differentiated(*unwrapped)
