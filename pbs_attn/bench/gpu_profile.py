"""What the GPU does during a call, measured with torch.profiler: its kernels, their stages and the
gaps between them. Also the memory of a call."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from pbs_attn.ops import STAGES

PAGES = "copy_pages"  # a kernel that calls on plain tensors do not launch
OTHER = "other"  # kernels of other libraries, memsets and copies


class Interval(NamedTuple):
    """Something the GPU did, in microseconds."""

    name: str
    start: float
    end: float


class Profile(NamedTuple):
    """One call, on average."""

    launches: int
    gaps_ms: float  # idle time between its first kernel and its last
    stage_ms: dict[str, float]


def stage_of(name: str) -> str:
    """Returns the stage of a kernel, `PAGES`, or `OTHER` if the kernel is not one of the library's.
    The demangled name of a kernel of the library begins with its stage.

    Raises:
        ValueError: if a kernel of the library has another name.
    """
    found = re.search(r"\bpbs::cuda::.*?(\w+_kernel)[<(]", name)
    if not found:
        return OTHER
    for stage in (*STAGES, PAGES):
        if found[1].startswith(f"{stage}_"):
            return stage
    raise ValueError(f"a kernel's name must begin with its stage, got {name}")


def union_ms(intervals: Iterable[Interval]) -> float:
    """Milliseconds in which at least one of the intervals ran: attend starts before the kernel
    ahead of it ends."""
    total, last_end = 0.0, float("-inf")
    for interval in sorted(intervals, key=lambda interval: interval.start):
        total += max(0.0, interval.end - max(interval.start, last_end))
        last_end = max(last_end, interval.end)
    return total / 1e3


def summarize(intervals: list[Interval], calls: int) -> Profile:
    """The average call of `calls` recorded calls, which all launched the same kernels.

    Raises:
        ValueError: if a stage has no kernel, if a kernel of the library has no stage, or if the
            number of launches is no multiple of `calls`.
    """
    launches, rest = divmod(len(intervals), calls)
    if rest:
        raise ValueError(f"launches must be a multiple of {calls} calls, got {len(intervals)}")
    by_stage = {stage: [] for stage in (*STAGES, PAGES, OTHER)}
    for interval in intervals:
        by_stage[stage_of(interval.name)].append(interval)
    for stage, found in by_stage.items():
        if not found and stage in STAGES:
            names = sorted({interval.name for interval in intervals})
            raise ValueError(f"the profile must contain kernels of {stage}, got {names}")
    stage_ms = {stage: union_ms(found) / calls for stage, found in by_stage.items()}
    in_order = sorted(intervals, key=lambda interval: interval.start)
    by_call = [in_order[i : i + launches] for i in range(0, len(in_order), launches)]
    gaps_ms = sum(map(gaps_between_ms, by_call)) / calls
    return Profile(launches, gaps_ms, stage_ms)


def gaps_between_ms(intervals: list[Interval]) -> float:
    """Milliseconds between the first start and the last end in which no interval ran."""
    start = min(interval.start for interval in intervals)
    end = max(interval.end for interval in intervals)
    return (end - start) / 1e3 - union_ms(intervals)


def profile_call(call: Callable[[], object], calls: int = 10) -> Profile:
    """Profiles several calls in a row, after one call that only starts the profiler."""
    _record(call, 1)
    return summarize(_record(call, calls), calls)


def _record(call: Callable[[], object], calls: int) -> list[Interval]:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        return gpu_work(json.loads(path.read_text()))


def gpu_work(trace: dict) -> list[Interval]:
    """The kernels, memsets and copies of a Chrome trace."""
    categories = ("kernel", "gpu_memset", "gpu_memcpy")
    return [
        Interval(event["name"], event["ts"], event["ts"] + event["dur"])
        for event in trace["traceEvents"]
        if event.get("cat") in categories
    ]


def extra_gib(call: Callable[[], object], output_bytes: int = 0) -> float:
    """The peak memory of a call, without its inputs and without the given size of its output."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - output_bytes) / 2**30
