"""Medians of contestants that run in turn, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[], object]


def interleaved_medians(
    calls: dict[str, Call], rounds: int, clock: Callable[[Call], float], warm_ups: int = 1
) -> dict[str, float]:
    """Milliseconds of each call, measured with `clock`. Each round runs all calls in turn, after
    `warm_ups` rounds that do not count. Every second round runs backwards, because a GPU that is
    still hot from the call before is slower."""
    times = {name: [] for name in calls}
    for round_idx in range(warm_ups + rounds):
        order = list(calls.items())
        for name, call in reversed(order) if round_idx % 2 else order:
            milliseconds = clock(call)
            if round_idx >= warm_ups:
                times[name].append(milliseconds)
    return {name: statistics.median(values) for name, values in times.items()}


def wall_clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def clock_for(device: torch.device, budget_ms: float) -> Callable[[Call], float]:
    """`cuda_clock` on a GPU, `wall_clock` on a CPU."""
    return cuda_clock(budget_ms) if device.type == "cuda" else wall_clock


def cuda_clock(budget_ms: float) -> Callable[[Call], float]:
    """A clock with CUDA events. It repeats short calls until they take about budget_ms."""
    repeats: dict[Call, int] = {}

    def clock(call: Call) -> float:
        if call not in repeats:
            call()
            repeats[call] = max(1, int(budget_ms / cuda_events(call, 1)))
        return cuda_events(call, repeats[call])

    return clock


def cuda_events(call: Call, repeats: int) -> float:
    """Milliseconds of a call, averaged over `repeats` calls in a row on the current stream."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / repeats
