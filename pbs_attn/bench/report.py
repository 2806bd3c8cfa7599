"""Rows of measurements as tables, files and pictures."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from pbs_attn import _environment

Row = dict[str, str]

MEASURED_COLOUR, BOUND_COLOUR = "#1c7ed6", "#e8590c"
RUN = uuid.uuid4().hex[:12]  # of this process


class BenchError(Exception):
    """A mistake of the user's, to be told in one line."""


def describe_run(device: torch.device | str) -> Row:
    """Hardware, versions and the process that measured, as columns."""
    return _environment.describe(device) | {"driver": _driver_version(device), "run": RUN}


def _driver_version(device: torch.device | str) -> str:
    """Of the GPU's driver; empty on a CPU, or where the system does not tell."""
    path = Path("/proc/driver/nvidia/version")
    if torch.device(device).type != "cuda" or not path.exists():
        return ""
    return find_driver_version(path.read_text())


def find_driver_version(text: str) -> str:
    """In what the driver says of itself; empty if it is not there."""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return found[1] if found else ""


def one_run(rows: Sequence[Row]) -> None:
    """Times of different processes say nothing about each other: the clock and the card differ.

    Raises:
        BenchError: if the rows come from more than one.
    """
    runs = {row["run"] for row in rows}
    if len(runs) != 1:
        raise BenchError(f"rows to compare must come from one process, got {len(runs)}")


def as_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Some columns, right-aligned under their names."""
    lines = [list(columns), *([row[column] for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def write_rows(path: str | os.PathLike, rows: list[Row]) -> None:
    """As CSV, after `one_run`."""
    one_run(rows)
    _environment.write_csv(path, rows)


def draw_speedup(rows: Sequence[Row], path: str | os.PathLike, *, title: str) -> None:
    """Speed-up against prompt length, beside the bound that the linear layers set.

    Raises:
        BenchError: if the rows come from more than one process, or matplotlib is missing.
    """
    one_run(rows)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError("a picture needs matplotlib: pip install matplotlib") from error
    rows = sorted(rows, key=lambda row: int(row["tokens"]))
    tokens = [int(row["tokens"]) for row in rows]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    ax = figure.add_subplot()
    for column, label, style, colour in (
        ("bound", "attention that costs nothing", "--s", BOUND_COLOUR),
        ("speedup", "PBS", "-o", MEASURED_COLOUR),
    ):
        values = [float(row[column]) for row in rows]
        ax.plot(tokens, values, style, color=colour, label=label)
    for row, x in zip(rows, tokens, strict=True):
        y = float(row["speedup"])
        label = f"{y:.2f}\ndensity {float(row['density']):.2f}"
        ax.annotate(label, (x, y), (0, -26), textcoords="offset points", ha="center", fontsize=7)
    ax.axhline(1, color="grey", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(tokens, [f"{x // 1024}K" if x % 1024 == 0 else str(x) for x in tokens])
    ticks = [t for t in (0.5, 1, 2, 4, 8, 16) if t <= 2 * max(float(row["bound"]) for row in rows)]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.set_ylim(0.5 if min(float(row["speedup"]) for row in rows) < 0.9 else 0.75)
    ax.margins(x=0.08)
    ax.minorticks_off()
    ax.set_xlabel("prompt, tokens")
    ax.set_ylabel("times as fast to the first token as dense")
    ax.set_title(title, fontsize=10)
    ax.legend(loc="upper left")
    figure.savefig(path, dpi=150)
