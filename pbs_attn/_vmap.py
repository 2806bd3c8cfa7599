"""Batching rules for torch.vmap: every operator adds the vmapped dimension to the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Operands with rows of queries, keys or values may have any strides, and autocast casts them.
ROWS = ("q", "k", "v", "k_perm", "v_perm")


def _fold(tensor: Tensor, in_dim: int | None, size: int, is_row_strided: bool) -> Tensor:
    """Reshapes (..., size, ...), or (batch, ...) if not vmapped, to (size * batch, ...)."""
    batched = tensor.expand(size, *tensor.shape) if in_dim is None else tensor.movedim(in_dim, 0)
    if batched.dim() < 2:
        return batched  # a number, which the operator refuses
    folded = batched.flatten(0, 1)
    # The operators take any strides between rows, but no other gaps.
    if is_row_strided and folded.stride(-1) == 1:
        return folded
    return folded.contiguous()


def _unfold(tensor: Tensor, size: int) -> Tensor:
    unfolded: Tensor = tensor.unflatten(0, (size, tensor.shape[0] // size))
    return unfolded


def batching_rule(name: str) -> Callable[..., tuple[Any, Any]]:
    """The batching rule of operator `name`, for torch.library.register_vmap."""
    op = getattr(torch.ops.pbs, name).default
    is_row_strided = [a.name in ROWS for a in op._schema.arguments]

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any, **kwargs: Any) -> Any:
        size = info.batch_size
        folded = [
            _fold(arg, in_dim, size, strided) if isinstance(arg, Tensor) else arg
            for arg, in_dim, strided in zip(args, in_dims, is_row_strided, strict=False)
        ]
        found = op(*folded, **kwargs)
        if isinstance(found, Tensor):
            return _unfold(found, size), 0
        return tuple(_unfold(out, size) for out in found), (0,) * len(found)

    return rule
