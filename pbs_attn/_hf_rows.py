"""The sequences of a padded or packed batch, and the mask that passes them to the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Row(NamedTuple):
    """One sequence: the keys from `begin` to `end` of one row of the batch. Its last `num_queries`
    tokens have queries in this call."""

    batch_idx: int
    begin: int
    end: int
    num_queries: int


def find_rows(
    num_queries: int, visible: Tensor, sequence_ids: Tensor | None, position_ids: Tensor | None
) -> tuple[Row, ...] | None:
    """The sequences of a batch to which one of the last `num_queries` tokens belongs, in order.

    Args:
        visible: (B, Nkv) bool: False for padding. All three tensors are on the CPU.
        sequence_ids: (B, Nkv) int: tokens of one sequence share a number. None: one sequence per
            row.
        position_ids: (B, Nkv) int: positions that define causality; None for the indices.

    Returns:
        None if a first and a last key do not describe each sequence: if padding or another sequence
        lies inside one, or positions do not rise by one.
    """
    numbers = torch.zeros_like(visible, dtype=torch.long) if sequence_ids is None else sequence_ids
    joined = visible[:, 1:] & visible[:, :-1] & (numbers[:, 1:] == numbers[:, :-1])
    if position_ids is not None and not (position_ids.diff(dim=-1)[joined] == 1).all():
        return None
    edge = torch.zeros_like(visible[:, :1])
    begins = (visible & ~torch.cat([edge, joined], dim=-1)).nonzero()
    ends = (visible & ~torch.cat([joined, edge], dim=-1)).nonzero()
    names = zip(begins[:, 0].tolist(), numbers[begins[:, 0], begins[:, 1]].tolist(), strict=True)
    if len(set(names)) < len(begins):
        return None
    first_query = visible.shape[-1] - num_queries
    rows = (
        Row(batch_idx, begin, last + 1, last + 1 - max(begin, first_query))
        for (batch_idx, begin), last in zip(begins.tolist(), ends[:, 1].tolist(), strict=True)
    )
    return tuple(row for row in rows if row.num_queries > 0)


# Reading these methods, and attributes of these types, needs no values of the mask.
_METHODS = {
    Tensor.dim,
    Tensor.size,
    Tensor.stride,
    Tensor.storage_offset,
    Tensor.is_contiguous,
    Tensor._is_view,
    Tensor.untyped_storage,
    Tensor.is_floating_point,
    torch.is_floating_point,
}
_TYPES = (int, tuple, type(None), torch.dtype, torch.device, torch.layout)


class RowMask(Tensor):
    """A boolean mask (B, 1, Nq, Nkv) that is made when its values are read.

    The attention function reads `rows` instead, so the mask may never be made. Every operation of
    torch gets the explicit mask, except for those that read only metadata. The operation may write
    to the mask, now or through a view. From then on, `rows` is None, and only the explicit mask
    counts.
    """

    rows: tuple[Row, ...] | None
    _make: Callable[[], Tensor]
    _explicit: Tensor | None

    @staticmethod
    def __new__(
        cls: type[RowMask],
        rows: tuple[Row, ...],
        make: Callable[[], Tensor],
        shape: tuple[int, ...],
        device: torch.device,
    ) -> RowMask:
        # One element in memory, whatever the shape.
        element = torch.empty_strided(shape, (0,) * 4, dtype=torch.bool, device=device)
        mask = Tensor._make_subclass(cls, element)
        mask.rows, mask._make, mask._explicit = rows, make, None
        return mask

    def explicit(self) -> Tensor:
        """The mask as an ordinary tensor, outside of traces the same one each time."""
        if self._explicit is not None:
            return self._explicit
        explicit = self._make()
        # A graph that keeps a tensor here would be traced again for each mask.
        if not torch.compiler.is_compiling():
            self._explicit = explicit
        return explicit

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METHODS or func.__name__ == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                told = func(*args, **kwargs)
            if func in _METHODS or isinstance(told, _TYPES):
                return told
        if func is Tensor.to:
            return _move(*args, **kwargs)
        handed_out: list[tuple[RowMask, Tensor]] = []

        def hand_out(mask: RowMask) -> Tensor:
            handed_out.append((mask, mask.explicit()))
            return handed_out[-1][1]

        args, kwargs = tree_map_only(RowMask, hand_out, (args, kwargs))
        result = func(*args, **kwargs)
        # A number shares no memory with the mask, and no operation that writes to the mask returns
        # one.
        if not isinstance(result, (int, float)):
            for mask, explicit in handed_out:
                mask.rows, mask._explicit = None, explicit
        return result


def _move(mask: RowMask, *args: Any, **kwargs: Any) -> Tensor:
    """`mask.to(...)`: a model that spans several devices moves its mask from one to the next."""
    element = torch.zeros((), dtype=torch.bool, device=mask.device)
    moved = element.to(*args, **kwargs)
    if moved is element:
        return mask
    if mask.rows is None or moved.dtype != torch.bool:
        return mask.explicit().to(*args, **kwargs)
    return RowMask(mask.rows, lambda: mask._make().to(*args, **kwargs), mask.shape, moved.device)


def rows_of(mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Row, ...] | None:
    """The sequences that a mask describes; None if the values of the mask must be used."""
    # A trace would hold for these rows only.
    if not isinstance(mask, RowMask) or torch.compiler.is_compiling():
        return None
    shape = (query.shape[0], 1, query.shape[2], key.shape[2])
    return mask.rows if mask.shape == shape else None


def attend_rows(
    rows: tuple[Row, ...],
    attend: Callable[[Row, Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dtype: torch.dtype | None,
) -> Tensor:
    """Calls `attend` for the slices of each row. Returns (B, Nq, Hq, D), with zeros outside of
    sequences."""
    batch, num_heads, num_queries, head_dim = query.shape
    out = query.new_zeros((batch, num_queries, num_heads, head_dim), dtype=dtype)
    for row in rows:
        last = row.end - key.shape[2] + num_queries
        place = slice(row.batch_idx, row.batch_idx + 1)
        queries, keys = slice(last - row.num_queries, last), slice(row.begin, row.end)
        out[place, queries] = attend(
            row, query[place, :, queries], key[place, :, keys], value[place, :, keys]
        )
    return out
