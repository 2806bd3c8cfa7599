"""What the GPU did during a call: its kernels, their stages and the gaps between them, by
torch.profiler; the memory it took."""

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

PAGES = "copy_pages"  # what no call on plain tensors runs
OTHER = "other"  # kernels of others, memsets and copies


class Interval(NamedTuple):
    """Something the GPU did, in microseconds."""

    name: str
    start: float
    end: float


class Profile(NamedTuple):
    """One call, on average."""

    launches: int
    gaps_ms: float  # while nothing ran, from its first kernel to its last
    stage_ms: dict[str, float]


def stage_of(name: str) -> str:
    """The stage of a kernel, or `PAGES`, by its demangled name, which begins with it; `OTHER` if it
    is not of the library.

    Raises:
        ValueError: if it is of the library and its name begins otherwise.
    """
    found = re.search(r"\bpbs::cuda::.*?(\w+_kernel)[<(]", name)
    if not found:
        return OTHER
    for stage in (*STAGES, PAGES):
        if found[1].startswith(f"{stage}_"):
            return stage
    raise ValueError(f"a kernel's name must begin with its stage, got {name}")


def union_ms(intervals: Iterable[Interval]) -> float:
    """Milliseconds in which at least one of them ran: attend starts beside the kernel before it."""
    total, last_end = 0.0, float("-inf")
    for interval in sorted(intervals, key=lambda interval: interval.start):
        total += max(0.0, interval.end - max(interval.start, last_end))
        last_end = max(last_end, interval.end)
    return total / 1e3


def summarize(intervals: list[Interval], calls: int) -> Profile:
    """One call of `calls` that were recorded, each of which launched the same.

    Raises:
        ValueError: if a stage has no kernel, a kernel of the library no stage, or the launches are
            no multiple of the calls.
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
    """Milliseconds between the first start and the last end in which none of them ran."""
    start = min(interval.start for interval in intervals)
    end = max(interval.end for interval in intervals)
    return (end - start) / 1e3 - union_ms(intervals)


def profile_call(call: Callable[[], object], calls: int = 10) -> Profile:
    """A profile of several calls in a row, after one that only wakes the profiler."""
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
    """Kernels, memsets and copies of a Chrome trace."""
    categories = ("kernel", "gpu_memset", "gpu_memcpy")
    return [
        Interval(event["name"], event["ts"], event["ts"] + event["dur"])
        for event in trace["traceEvents"]
        if event.get("cat") in categories
    ]


def extra_gib(call: Callable[[], object], output_bytes: int = 0) -> float:
    """Memory that a call takes at its peak, without its inputs and so much of its output."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - output_bytes) / 2**30
