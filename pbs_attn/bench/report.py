"""Rows of measurements as tables, files and pictures."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from pbs_attn import _environment, demo_model

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


def require_packages() -> None:
    """Raises DemoError if one that every bench needs is missing."""
    for module in ("transformers", "tqdm"):
        demo_model.require(module, "bench")


def check_folders(*paths: str | None) -> None:
    """Of files to be written at the end.

    Raises:
        BenchError: if one is missing.
    """
    for path in paths:
        if path and not Path(path).resolve().parent.is_dir():
            raise BenchError(f"the folder of {path} must exist")


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
    figure = _new_figure(6.4, 4.0)
    rows = sorted(rows, key=lambda row: int(row["tokens"]))
    tokens = [int(row["tokens"]) for row in rows]
    ax = figure.add_subplot()
    for column, label, style, colour in (
        ("bound", "attention that costs nothing", "--s", BOUND_COLOUR),
        ("speedup", "PBS", "-o", MEASURED_COLOUR),
    ):
        values = [float(row[column]) for row in rows]
        ax.plot(tokens, values, style, color=colour, label=label, zorder=3)
    for row, x in zip(rows, tokens, strict=True):
        y = float(row["speedup"])
        label = f"{y:.2f}\ndensity {float(row['density']):.2f}"
        ax.annotate(
            label,
            (x, y),
            (0, -26),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            zorder=1,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    ax.axhline(1, color="grey", linewidth=0.8, zorder=0)
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


# Told apart by the colour-blind, and in print by marker and dash.
SELECTION_STYLES = {
    "pbs": ("#1c7ed6", "-", "o"),
    "unpermuted": ("#e8590c", "--", "s"),
    "pooled": ("#2b8a3e", "-.", "^"),
    "window": ("#862e9c", ":", "D"),
    "truncated": ("#495057", (0, (1, 1)), "x"),
}
PROBE_LABELS = {
    "text": ("last half of texts", "loss above dense, nats a token"),
    "copy": ("a repeated passage", "loss above dense, nats a token"),
    "pass key": ("pass keys", "share read back"),
}

# By probe and selection, (density, value).
Curves = dict[str, dict[str, list[tuple[float, float]]]]


def draw_quality(curves: Curves, path: str | os.PathLike, *, title: str) -> None:
    """One panel a probe: what is lost, or found, against the density visited.

    Raises:
        BenchError: if matplotlib is missing.
    """
    figure = _new_figure(1 + 3.6 * len(curves), 3.8)
    for nth, (probe, by_selection) in enumerate(curves.items()):
        ax = figure.add_subplot(1, len(curves), nth + 1)
        for selection, points in by_selection.items():
            if selection == "dense":
                label = "dense" if probe == "pass key" else None
                ax.axhline(points[0][1], color="grey", linewidth=0.8, label=label)
                continue
            colour, dash, marker = SELECTION_STYLES[selection]
            densities, values = zip(*points, strict=True)
            ax.plot(densities, values, linestyle=dash, marker=marker, color=colour, label=selection)
        name, unit = PROBE_LABELS[probe]
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("density (share of causal block pairs)")
        ax.set_ylabel(unit)
    ax.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def draw_heads(rows: Sequence[Row], path: str | os.PathLike, *, title: str) -> None:
    """The density of each layer and query head, mean over texts, one panel a threshold.

    Raises:
        BenchError: if the rows come from more than one process, or matplotlib is missing.
    """
    one_run(rows)
    thresholds = list(dict.fromkeys(row["threshold"] for row in rows))
    shape = [1 + max(int(row[name]) for row in rows) for name in ("layer", "head")]
    figure = _new_figure(1.5 + len(thresholds) * (1 + 0.14 * shape[1]), 1.5 + 0.14 * shape[0])
    axes = []
    for nth, threshold in enumerate(thresholds):
        totals, counts = torch.zeros(shape), torch.zeros(shape)
        for row in rows:
            if row["threshold"] == threshold:
                place = int(row["layer"]), int(row["head"])
                totals[place] += float(row["density"])
                counts[place] += 1
        axes.append(figure.add_subplot(1, len(thresholds), nth + 1))
        image = axes[-1].imshow((totals / counts).numpy(), vmin=0, vmax=1, cmap="cividis")
        axes[-1].set_title(f"threshold {threshold}", fontsize=9)
        axes[-1].set_xlabel("query head")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="density (share of causal block pairs)")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def _new_figure(width: float, height: float):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError("a picture needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")
