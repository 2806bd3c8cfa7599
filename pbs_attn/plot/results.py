"""Pictures of the rows of `pbs-attn bench`. Each function takes rows or a CSV with them.

Series differ in marker and dash as well as in colour, and colours differ in lightness. So they
remain distinct in print and for colour-blind readers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from pbs_attn._errors import BenchError, require
from pbs_attn._rows import GIVEN, STAGES, Row, curve_name, one_run, read_rows, summarize

Rows = Sequence[Row] | str | os.PathLike

BLUE, ORANGE, GREEN, PURPLE, GREY = "#1c7ed6", "#e8590c", "#2b8a3e", "#862e9c", "#495057"
DENSITY_LABEL = "density (share of causal block pairs)"
SELECTION_STYLES = {  # colour, dash, marker
    "pbs": (BLUE, "-", "o"),
    "unpermuted": (ORANGE, "--", "s"),
    "pooled": (GREEN, "-.", "^"),
    "window": (PURPLE, ":", "D"),
    "truncated": (GREY, (0, (1, 1)), "x"),
}
PROBE_LABELS = {
    "text": ("last half of texts", "loss above dense, nats a token"),
    "copy": ("a repeated passage", "loss above dense, nats a token"),
    "pass key": ("pass keys", "share read back"),
}
CONTESTANT_STYLES = {
    "pbs": ("PBS attend", BLUE, "-", "o"),
    "fa4_sparse": ("FlashAttention-4, same lists", ORANGE, "--", "s"),
    "flex": ("FlexAttention, same lists", GREEN, "-.", "^"),
    "sdpa_dense": ("SDPA, dense", GREY, ":", "v"),
    "flash_dense": ("SDPA flash, dense", GREY, ":", "x"),
    "cudnn_dense": ("SDPA cuDNN, dense", GREY, ":", "D"),
    "fa4_dense": ("FlashAttention-4, dense", GREY, ":", "P"),
    "flex_dense": ("FlexAttention, dense", GREY, ":", "^"),
}
STAGE_COLOURS = ("#08306b", "#e8590c", "#5c940d", "#f2b705", "#9ecae1")
HATCHES = ("", "//", "..", "xx", "")


def draw_speedup(rows: Rows, path: str | os.PathLike, *, title: str) -> None:
    """Draws the speed-up to the first token against prompt length, and the bound from the linear
    layers. Takes rows of `bench prefill`.

    Raises:
        BenchError: if the rows come from more than one process.
        ImportError: if matplotlib is missing.
    """
    rows = sorted(_rows_of_one_run(rows), key=lambda row: int(row["tokens"]))
    figure = _new_figure(6.4, 4.0)
    tokens = [int(row["tokens"]) for row in rows]
    ax = figure.add_subplot()
    for column, label, style, colour in (
        ("bound", "attention that costs nothing", "--s", ORANGE),
        ("speedup", "PBS", "-o", BLUE),
    ):
        values = [float(row[column]) for row in rows]
        ax.plot(tokens, values, style, color=colour, label=label, zorder=3)
    for row, x in zip(rows, tokens, strict=True):
        y = float(row["speedup"])
        ax.annotate(
            f"{y:.2f}\ndensity {float(row['density']):.2f}",
            (x, y),
            (0, -26),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            zorder=1,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    ax.axhline(1, color="grey", linewidth=0.8, zorder=0)
    ax.set_yscale("log", base=2)
    _set_token_axis(ax, tokens)
    ticks = [t for t in (0.5, 1, 2, 4, 8, 16) if t <= 2 * max(float(row["bound"]) for row in rows)]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.set_ylim(0.5 if min(float(row["speedup"]) for row in rows) < 0.9 else 0.75)
    ax.margins(x=0.08)
    ax.minorticks_off()
    ax.set_ylabel("times as fast to the first token as dense")
    ax.set_title(title, fontsize=10)
    ax.legend(loc="upper left")
    figure.savefig(path, dpi=150)


def draw_quality(rows: Rows, path: str | os.PathLike, *, title: str) -> None:
    """Draws loss or recall against density, one panel per probe. Takes rows of `bench quality`. The
    second of two settings has open markers.

    Raises:
        BenchError: if the rows come from more than one process, or are only those of RULER.
        ImportError: if matplotlib is missing.
    """
    rows = _rows_of_one_run(rows)
    selections = {curve_name(row): row["selection"] for row in rows}
    settings_of = {curve_name(row): row.get("settings", GIVEN) for row in rows}
    first = next(filter(None, settings_of.values()), "")  # "": rows without settings
    curves = summarize(rows)
    if not curves:
        raise BenchError(f"rows to draw must include {', '.join(PROBE_LABELS)}, got none")
    figure = _new_figure(1 + 3.6 * len(curves), 4.2)
    for nth, (probe, by_name) in enumerate(curves.items()):
        ax = figure.add_subplot(1, len(curves), nth + 1)
        for name, points in by_name.items():
            if selections[name] == "dense":
                label = "dense" if probe == "pass key" else None
                ax.axhline(points[0][1], color="grey", linewidth=0.8, label=label)
                continue
            colour, dash, marker = SELECTION_STYLES[selections[name]]
            is_first = settings_of[name] in ("", first)
            ax.plot(
                *zip(*points, strict=True),
                linestyle=dash,
                marker=marker,
                color=colour,
                markerfacecolor=colour if is_first else "white",
                label=name,
            )
        panel, unit = PROBE_LABELS[probe]
        ax.set_title(panel, fontsize=10)
        if probe == "copy":  # the window and the truncated prompt lose the whole passage
            ax.set_yscale("symlog", linthresh=0.1)
        ax.set_xlabel(DENSITY_LABEL)
        ax.set_ylabel(unit)
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def draw_heads(rows: Rows, path: str | os.PathLike, *, title: str) -> None:
    """Draws the density of each layer and query head, averaged over texts, one panel per threshold.
    Takes rows of `bench quality --heads-csv`.

    Raises:
        BenchError: if the rows come from more than one process.
        ImportError: if matplotlib is missing.
    """
    rows = [row for row in _rows_of_one_run(rows) if row.get("selection", "pbs") == "pbs"]
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
    figure.colorbar(image, ax=axes, label=DENSITY_LABEL)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def draw_stages(rows: Rows, path: str | os.PathLike, *, title: str) -> None:
    """Draws the share of each stage in the time of one call, one bar per row of `bench pipeline`.
    The labels have milliseconds, density and speed-up over the best dense kernel.

    Raises:
        BenchError: if the rows come from more than one process.
        ImportError: if matplotlib is missing.
    """
    rows = _rows_of_one_run(rows)
    figure = _new_figure(8.6, 1.6 + 0.42 * len(rows))
    ax = figure.add_subplot()
    suffix = "kernel_ms" if all(row["attend_kernel_ms"] for row in rows) else "ms"
    starts = [0.0] * len(rows)
    totals = [sum(float(row[f"{stage}_{suffix}"]) for stage in STAGES) for row in rows]
    for stage, colour, hatch in zip(STAGES, STAGE_COLOURS, HATCHES, strict=True):
        shares = [
            100 * float(row[f"{stage}_{suffix}"]) / total
            for row, total in zip(rows, totals, strict=True)
        ]
        ax.barh(
            range(len(rows)), shares, left=starts, label=stage, color=colour, hatch=hatch,
            edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        starts = [start + share for start, share in zip(starts, shares, strict=True)]
    names = [
        f"{row['input']}, {_short(int(row['tokens']))}\n{row['permute_per']}, "
        f"key blocks of {row['kv_block_size']}"
        for row in rows
    ]
    ax.set_yticks(range(len(rows)), names, fontsize=7)
    for nth, row in enumerate(rows):
        words = f"{float(row['attention_ms']):.3g} ms, density {float(row['density']):.2f}"
        if row["speedup"]:
            words += f", {float(row['speedup']):.2f} x dense"
        ax.text(101, nth, words, va="center", fontsize=7)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, 100)
    ax.set_xlabel("share of the time of one call, %")
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(STAGES), fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def draw_rates(rows: Rows, path: str | os.PathLike, *, title: str) -> None:
    """Draws throughput on visited blocks against density, one panel per prompt length. Takes rows
    of `bench kernel` on random lists with the widest key blocks.

    Raises:
        BenchError: if the rows come from more than one process.
        ImportError: if matplotlib is missing.
    """
    rows = [row for row in _rows_of_one_run(rows) if row["lists"] == "random"]
    if not rows:
        raise BenchError("rows to draw must include random lists, got none")
    width = max(int(row["kv_block_size"]) for row in rows)
    lengths = sorted({int(row["tokens"]) for row in rows})
    figure = _new_figure(1 + 3.4 * len(lengths), 4.2)
    first = None
    for nth, num_tokens in enumerate(lengths):
        ax = first = figure.add_subplot(1, len(lengths), nth + 1, sharey=first)
        of_panel = [
            row
            for row in rows
            if int(row["tokens"]) == num_tokens and int(row["kv_block_size"]) == width
        ]
        for name, (label, colour, dash, marker) in CONTESTANT_STYLES.items():
            points = [
                (1.0 if name.endswith("dense") else float(row["density"]), row[f"{name}_tflops"])
                for row in of_panel
                if row.get(f"{name}_tflops")
            ]
            if points:
                densities, rates = zip(*sorted((x, float(y)) for x, y in points), strict=True)
                ax.plot(densities, rates, linestyle=dash, marker=marker, color=colour, label=label)
        ax.set_title(f"{num_tokens} tokens", fontsize=10)
        ax.set_xscale("log")
        ticks = (0.05, 0.1, 0.2, 0.5, 1)
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.set_xlabel(DENSITY_LABEL)
    figure.axes[0].set_ylim(0)
    figure.axes[0].set_ylabel("TFLOP/s on visited blocks")
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def _rows_of_one_run(rows: Rows) -> list[Row]:
    rows = read_rows(rows) if isinstance(rows, str | os.PathLike) else list(rows)
    one_run(rows)
    return rows


def _short(num_tokens: int) -> str:
    return f"{num_tokens // 1024}K" if num_tokens % 1024 == 0 else str(num_tokens)


def _set_token_axis(ax, tokens: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(tokens, [_short(num_tokens) for num_tokens in tokens])
    ax.set_xlabel("prompt, tokens")


def _new_figure(width: float, height: float):
    require("matplotlib", "plot")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
