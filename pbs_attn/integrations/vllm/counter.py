"""A Prometheus counter of prefilled tokens by route, beside vLLM's own metrics.

The workers decide and the API server answers /metrics, in different processes. If vLLM has set up
prometheus_client for several processes (PROMETHEUS_MULTIPROC_DIR), a plain counter in the worker is
enough. Otherwise, each worker keeps its two sums in a file of a folder that the first process
chose, and a collector in the server reads them. This file does not import vLLM.
"""

from __future__ import annotations

import atexit
import functools
import mmap
import os
import shutil
import struct
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "pbs_attn_prefill_tokens"  # Prometheus appends _total
HELP = "Prompt tokens that a step computed, by the route of their attention."
ROUTES = ("pbs", "dense")
FOLDER = "PBS_ATTN_VLLM_COUNTS"  # environment variable, for the processes of one server
SHARED = "PROMETHEUS_MULTIPROC_DIR"
LAYOUT = struct.Struct("<2d")


def count_tokens(pbs: int, dense: int) -> None:
    """Adds the prompt tokens of one step."""
    add = _prometheus_adder() if os.environ.get(SHARED) else _file_adder()
    add((pbs, dense))


def export() -> None:
    """Makes this process and its child processes keep sums and report them."""
    try:
        import prometheus_client
    except ImportError:
        return
    if not os.environ.get(FOLDER):
        # Made by the first worker that counts. Without the backend, it is never made.
        folder = str(Path(tempfile.gettempdir()) / f"pbs_attn_{uuid.uuid4().hex}")
        os.environ[FOLDER] = folder
        atexit.register(_remove, folder, os.getpid())
    if not os.environ.get(SHARED):
        _register_once(prometheus_client)


def read_totals(folder: Path) -> dict[str, float]:
    """The sums over all files of a folder, by route."""
    totals = dict.fromkeys(ROUTES, 0.0)
    for path in folder.glob("*.tokens"):
        content = path.read_bytes()
        if len(content) == LAYOUT.size:
            for route, value in zip(ROUTES, LAYOUT.unpack(content), strict=True):
                totals[route] += value
    return totals


class Collector:
    """The collector that prometheus_client calls when /metrics is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        if not self.folder.is_dir():
            return
        family = CounterMetricFamily(NAME, HELP, labels=["route"])
        for route, value in read_totals(self.folder).items():
            family.add_metric([route], value)
        yield family


@functools.cache
def _register_once(prometheus_client: Any) -> None:
    prometheus_client.REGISTRY.register(Collector(Path(os.environ[FOLDER])))


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _prometheus_adder() -> Any:
    import prometheus_client

    counter = prometheus_client.Counter(NAME, HELP, labelnames=["route"])

    def add(tokens: tuple[int, int]) -> None:
        for route, number in zip(ROUTES, tokens, strict=True):
            counter.labels(route=route).inc(number)

    return add


@functools.cache
def _file_adder() -> Any:
    if not os.environ.get(FOLDER):
        return lambda tokens: None
    folder = Path(os.environ[FOLDER])
    folder.mkdir(exist_ok=True)
    with (folder / f"{os.getpid()}.tokens").open("w+b") as file:
        file.write(LAYOUT.pack(0, 0))
        file.flush()
        sums = mmap.mmap(file.fileno(), LAYOUT.size)

    def add(tokens: tuple[int, int]) -> None:
        totals = (a + b for a, b in zip(LAYOUT.unpack(sums[:]), tokens, strict=True))
        sums[:] = LAYOUT.pack(*totals)

    return add
