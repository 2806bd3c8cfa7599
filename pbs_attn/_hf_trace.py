"""Functions of constants that torch.compile calls while it traces, and takes as constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., object])

_functions: list[Callable[..., object]] = []


def constant_in_traces(function: _Function) -> _Function:
    """torch.compiler.assume_constant_result, applied by ``mark``: torch's own imports all of
    torch.compile, which takes longer than the rest of pbs_attn together."""
    _functions.append(function)
    return function


def mark() -> None:
    """Makes the functions known to torch.compile."""
    for function in _functions:
        torch.compiler.assume_constant_result(function)
