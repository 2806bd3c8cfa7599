"""Splits a batch of rows into runs that take PBS and the rest. This file does not import vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .route import is_last_chunk


class Span(NamedTuple):
    """Neighbouring rows [rows[0], rows[1]) with their queries [tokens[0], tokens[1])."""

    rows: tuple[int, int]
    tokens: tuple[int, int]


@dataclass(frozen=True)
class Run:
    """Neighbouring rows that take PBS with the same settings. The tensors are int32 on the CPU:
    (rows + 1) and (rows)."""

    span: Span
    is_last: bool
    cu_seqlens_q: Tensor
    seq_lens: Tensor


@dataclass(frozen=True)
class Plan:
    """The plan of a batch. `rest` are the spans of the rows that do not take PBS, and
    `rest_metadata` is the engine's metadata of a batch of these rows; None if there are none."""

    runs: tuple[Run, ...]
    rest: tuple[Span, ...]
    rest_metadata: Any = None


def make_plan(
    starts: Sequence[int],
    lengths: Sequence[int],
    rows: Sequence[int],
    prompt_lengths: Sequence[int] | None,
) -> Plan:
    """The plan of a batch in which `rows` take PBS, without the metadata of the rest.

    Row i has queries [starts[i], starts[i + 1]) and lengths[i] keys. `prompt_lengths` shows which
    chunks end their prompt; None if that is not known.
    """
    num_rows = len(starts) - 1
    takes_pbs = dict.fromkeys(range(num_rows))
    for row in rows:
        prompt = None if prompt_lengths is None else prompt_lengths[row]
        takes_pbs[row] = is_last_chunk(lengths[row], prompt)
    runs: list[Run] = []
    rest: list[Span] = []
    first = 0
    for row in range(1, num_rows + 1):
        if row < num_rows and takes_pbs[row] == takes_pbs[first]:
            continue
        span = Span((first, row), (starts[first], starts[row]))
        is_last = takes_pbs[first]
        if is_last is not None:
            runs.append(_run(span, is_last, starts, lengths))
        elif span.tokens[0] < span.tokens[1]:
            rest.append(span)
        first = row
    return Plan(tuple(runs), tuple(rest))


def _run(span: Span, is_last: bool, starts: Sequence[int], lengths: Sequence[int]) -> Run:
    first, end = span.rows
    offsets = [start - starts[first] for start in starts[first : end + 1]]
    return Run(
        span,
        is_last,
        torch.tensor(offsets, dtype=torch.int32),
        torch.tensor(lengths[first:end], dtype=torch.int32),
    )


def take_rows(tensor: Tensor, spans: Sequence[Span]) -> Tensor:
    """The entries of the spans in a tensor with one entry per row; a view if there is one span."""
    return _take(tensor, [span.rows for span in spans])


def take_tokens(tensor: Tensor, spans: Sequence[Span]) -> Tensor:
    """The entries of the spans in a tensor with one entry per token; a view if there is one
    span."""
    return _take(tensor, [span.tokens for span in spans])


def put_tokens(tensor: Tensor, spans: Sequence[Span], values: Tensor) -> None:
    """Writes the entries that `take_tokens` would return."""
    sizes = [end - begin for begin, end in (span.tokens for span in spans)]
    for (begin, end), part in zip((s.tokens for s in spans), values.split(sizes), strict=True):
        tensor[begin:end].copy_(part)


def take_starts(starts: Tensor, spans: Sequence[Span]) -> Tensor:
    """The cumulative query counts of a batch that has only the spans, from those of the whole
    batch, (rows + 1) on any device. Offsets are host data: no value is read from a device."""
    parts, offset = [], 0
    for (first, end), (begin, stop) in spans:
        parts.append(starts[first:end] - (begin - offset))
        offset += stop - begin
    last = spans[-1].rows[1]
    parts.append(starts[last : last + 1] - (spans[-1].tokens[1] - offset))
    return torch.cat(parts)


def _take(tensor: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    parts = [tensor[begin:end] for begin, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def rest_arguments(common: Any, spans: Sequence[Span]) -> dict[str, Any]:
    """The fields of vLLM's CommonAttentionMetadata that differ in a batch of these spans only.

    Args:
        common: the metadata of the whole batch.
        spans: the rows to keep.
    """
    starts = take_starts(common.query_start_loc_cpu, spans)
    fields: dict[str, Any] = {
        "query_start_loc": take_starts(common.query_start_loc, spans),
        "query_start_loc_cpu": starts,
        "num_reqs": sum(end - first for first, end in (span.rows for span in spans)),
        "num_actual_tokens": sum(end - begin for begin, end in (s.tokens for s in spans)),
        "max_query_len": int(starts.diff().max()),
        "max_seq_len": int(take_rows(common.seq_lens_cpu_upper_bound, spans).max()),
    }
    fields |= _taken(common, ROW_FIELDS, take_rows, spans)
    fields |= _taken(common, TOKEN_FIELDS, take_tokens, spans)
    return fields


# Fields with one entry per row, and with one per token.
ROW_FIELDS = (
    "seq_lens",
    "block_table_tensor",
    "is_prefilling",
    "seq_lens_cpu_upper_bound",
    "_seq_lens_cpu",
    "_num_computed_tokens_cpu",
)
TOKEN_FIELDS = ("slot_mapping", "positions")


def _taken(
    common: Any, names: Sequence[str], take: Callable[..., Tensor], spans: Sequence[Span]
) -> dict[str, Tensor]:
    values = {name: getattr(common, name) for name in names}
    return {name: take(value, spans) for name, value in values.items() if value is not None}
