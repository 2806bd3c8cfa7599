"""The results of `pbs-attn demo`, as printed text and as CSV."""

import dataclasses
import textwrap
from typing import NamedTuple

import torch

from pbs_attn import _environment, _rows, plot


class Run(NamedTuple):
    """One timed prefill."""

    prefill_seconds: float
    attention_seconds: float | None  # None where transformers has no hook to time it by


@dataclasses.dataclass(frozen=True)
class Side:
    """The runs of one attention function in their order, and the results of its output. `choices`
    (tail,) are the most likely next tokens. `continuation` is None if none was asked for.
    """

    implementation: str
    runs: tuple[Run, ...]
    perplexity: float
    choices: torch.Tensor
    continuation: str | None

    @property
    def median(self) -> Run:
        """The run with the median prefill time; of an even number, the faster of the two in the
        middle."""
        return sorted(self.runs, key=lambda run: run.prefill_seconds)[(len(self.runs) - 1) // 2]


@dataclasses.dataclass(frozen=True)
class Report:
    """`density` and `visited_mass` are (layers that took PBS, query heads)."""

    title: str
    device: str
    num_layers: int
    tail: int
    order: tuple[str, ...]  # the sides, in the order of their runs
    dense: Side
    pbs: Side
    density: torch.Tensor
    visited_mass: torch.Tensor
    view: plot.HeadView

    @property
    def agreement(self) -> float:
        """Share of positions in the tail where both sides choose the same next token."""
        return (self.dense.choices == self.pbs.choices).float().mean().item()


def format_report(report: Report) -> str:
    """The printed table, and both continuations if they were asked for."""
    dense, pbs = report.dense, report.pbs
    (dense_s, dense_attention), (pbs_s, pbs_attention) = dense.median, pbs.median
    layers = report.density.mean(1)
    rows = [
        ("", f"dense ({dense.implementation})", "PBS", ""),
        ("prefill, s", _seconds(dense_s), _seconds(pbs_s), _speed_up(dense_s, pbs_s)),
        ("attention alone, s", _seconds(dense_attention), _seconds(pbs_attention),
         _speed_up(dense_attention, pbs_attention)),
        ("every prefill, s", _every(dense), _every(pbs), "ran " + ", ".join(report.order)),
        ("density", "1.000", f"{report.density.mean():.3f}",
         f"layers from {layers.min():.3f} to {layers.max():.3f}"),
        ("attention mass visited", "100.0 %", f"{100 * report.visited_mass.mean():.1f} %",
         "of a sample of queries"),
        (f"perplexity, last {report.tail} tokens", f"{dense.perplexity:.3f}",
         f"{pbs.perplexity:.3f}", f"{100 * (pbs.perplexity / dense.perplexity - 1):+.2f} %"),
        ("same next-token choice", "100.0 %", f"{100 * report.agreement:.1f} %",
         f"last {report.tail} tokens"),
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [report.title, _describe_config(report), ""]
    lines += [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip()
        for row in rows
    ]
    lines += [
        "",
        f"prefill and attention: the median of {len(dense.runs)} runs a side",
        "density: share of the causal block pairs visited, mean over layers and heads",
    ]
    for name, side in (("dense", dense), ("PBS", pbs)):
        if side.continuation is not None:
            lines += ["", f"{name} goes on:", _wrap(side.continuation)]
    return "\n".join(lines)


def write_csv(report: Report, path: str) -> None:
    """Writes a row for each side: its figures, and the environment of the measurement."""
    config = report.view.config
    columns = dataclasses.asdict(config) | {"threshold": config.resolved_threshold}
    columns |= _environment.describe(report.device)
    sides = (
        ("dense", report.dense, 1.0, 1.0, 1.0),
        ("pbs", report.pbs, report.density.mean(), report.visited_mass.mean(), report.agreement),
    )
    rows = [
        {
            "side": name,
            "title": report.title,
            "prefill_s": _seconds(side.median.prefill_seconds),
            "attention_s": _seconds(side.median.attention_seconds),
            "runs": len(side.runs),
            "every_prefill_s": _every(side),
            "density": f"{density:.4f}",
            "visited_mass": f"{mass:.4f}",
            "perplexity": f"{side.perplexity:.4f}",
            "tail_tokens": report.tail,
            "same_choice": f"{agreement:.4f}",
            **columns,
        }
        for name, side, density, mass, agreement in sides
    ]
    _rows.write_csv(path, rows)


def _describe_config(report):
    config = report.view.config
    heavy = "" if config.num_heavy is None else f", {config.num_heavy} heavy keys"
    mass = "causal mass by each block" if config.mass == "block" else f"{config.mass} mass"
    return (
        f"PBS in {len(report.density)} of {report.num_layers} layers: threshold "
        f"{config.resolved_threshold:g} of {mass}, blocks of {config.block_size} queries and "
        f"{config.key_block_size} keys, segments of {config.segment_size}, "
        f"permuted per {config.permute_per}{heavy}"
    )


def _seconds(value):
    return "-" if value is None else f"{value:.2f}"


def _every(side):
    return " ".join(_seconds(run.prefill_seconds) for run in side.runs)


def _speed_up(before, after):
    return "" if before is None or after is None else f"{before / after:.2f} times as fast"


def _wrap(text):
    return textwrap.fill(repr(text), 96, initial_indent="  ", subsequent_indent="  ")
