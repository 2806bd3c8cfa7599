"""Counts the calls of each route, and warns when a long prompt goes dense unexpectedly."""

from __future__ import annotations

import re
import threading
import warnings
from dataclasses import dataclass

import torch

from ._hf_route import Call, Route, Settings, fill_in
from ._hf_table import format_table
from ._hf_trace import constant_in_traces

_lock = threading.Lock()
_calls: dict[tuple[str, str, str], list[int]] = {}  # (name, route, reason) -> [calls, traces]
_warned: set[tuple[str, str]] = set()  # (name, reason)


@dataclass(frozen=True)
class RouteCount:
    """How often layers of one implementation took one route for one reason. `calls` counts calls
    that ran. `traces` counts traces by torch.compile, whose graphs do not count their runs."""

    name: str
    route: str
    reason: str
    calls: int
    traces: int


class RouteCounts(list[RouteCount]):
    """A list of RouteCount that prints as a table."""

    def __str__(self) -> str:
        rows = [("name", "route", "calls", "traces", "reason")]
        rows += [(c.name, c.route, str(c.calls), str(c.traces), c.reason) for c in self]
        return format_table(rows)


def routes(name: str | None = None) -> RouteCounts:
    """Counts the routes of all calls of attention layers since register(), most calls first.

    explain() predicts the route of a prompt. This function reports the routes that the calls took,
    with padding, static caches, gradients and decode steps. A padded or packed batch counts once
    for each of its sequences, if one of them takes PBS. A layer inside a compiled graph counts in
    `traces`, once for each time that torch.compile traces it, and its reason has no numbers.
    register() with the same name resets the counts to zero.

    Args:
        name: one registered name; None for all of them.
    """
    with _lock:
        counts = [
            RouteCount(*key, *numbers)
            for key, numbers in _calls.items()
            if name is None or key[0] == name
        ]
    return RouteCounts(sorted(counts, key=lambda count: -(count.calls + count.traces)))


def forget(name: str) -> None:
    """Resets the counts of one registered name."""
    with _lock:
        for key in [key for key in _calls if key[0] == name]:
            del _calls[key]
        for pair in [pair for pair in _warned if pair[0] == name]:
            _warned.discard(pair)


def count(decided: Route, call: Call, settings: Settings) -> None:
    """Counts one call of a layer."""
    if torch.compiler.is_compiling():
        _count_trace(settings.name, decided.kind, decided.reason)
    else:
        _add(settings.name, decided.kind, fill_in(decided.reason, call, settings), 0)


def warn_once(decided: Route, settings: Settings) -> None:
    """Warns that a prompt for which explain() predicts "pbs" took another route."""
    if torch.compiler.is_compiling():
        _warn_in_trace(settings.name, decided.kind, decided.reason)
    else:
        _warn(settings.name, decided.kind, decided.reason)


@constant_in_traces
def _count_trace(name: str, kind: str, reason: str) -> None:
    _add(name, kind, re.sub(r"\{.*?\}", "...", reason), 1)


@constant_in_traces
def _warn_in_trace(name: str, kind: str, reason: str) -> None:
    _warn(name, kind, reason)


def _add(name: str, kind: str, reason: str, column: int) -> None:
    with _lock:
        _calls.setdefault((name, kind, reason), [0, 0])[column] += 1


def _warn(name: str, kind: str, reason: str) -> None:
    with _lock:
        is_known = (name, reason) in _warned
        _warned.add((name, reason))
    if not is_known:
        warnings.warn(
            f"a long prompt took {kind} instead of PBS, and others may have: {reason}. "
            "pbs_attn.transformers.routes() counts the calls; this warning appears once for each "
            "reason",
            stacklevel=4,
        )
