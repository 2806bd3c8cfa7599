"""Marks functions of constants, which torch.compile calls during a trace and replaces by their
results."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., object])

_functions: list[Callable[..., object]] = []


def constant_in_traces(function: _Function) -> _Function:
    """Like torch.compiler.assume_constant_result, but applied by ``mark``: torch's own function
    imports all of torch.compile, which takes longer than all the rest of pbs_attn."""
    _functions.append(function)
    return function


def mark() -> None:
    """Registers the functions with torch.compile."""
    for function in _functions:
        torch.compiler.assume_constant_result(function)
