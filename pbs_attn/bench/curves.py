"""Rows of `pbs-attn bench quality` as curves of quality against density, one a selection."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from pbs_attn._rows import Curve, Row, summarize

from .report import as_table

TABLE_DENSITIES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)


def least_density(curve: Curve, goal: float) -> float | None:
    """The density from which on a curve, sorted by density, stays at or below a value, interpolated
    between two of its points; None where it does not stay there."""
    reached = None
    for nth in range(len(curve) - 1, -1, -1):
        density, value = curve[nth]
        if value > goal:
            if reached is None:
                return None
            above, below = curve[nth + 1]
            return density + (above - density) * (value - goal) / (value - below)
        reached = density
    return reached


def at_density(curve: Curve, density: float) -> float | None:
    """The value of a curve, sorted by density, interpolated between two of its points; None outside
    of it."""
    for (left, low), (right, high) in itertools.pairwise(curve):
        if left <= density <= right:
            share = (density - left) / (right - left) if right > left else 0.0
            return low + share * (high - low)
    return None


def format_probe(rows: Sequence[Row], probe: str) -> str:
    """One line a selection, one column a density."""
    columns = ("selection", *(f"{density:g}" for density in TABLE_DENSITIES))
    lines = []
    for name, curve in summarize(rows).get(probe, {}).items():
        values = [
            curve[0][1] if name == "dense" else at_density(curve, density)
            for density in TABLE_DENSITIES
        ]
        cells = ["" if value is None else f"{value:+.3f}" for value in values]
        if probe == "pass key":
            cells = [cell.lstrip("+") for cell in cells]
        lines.append(dict(zip(columns, (name, *cells), strict=True)))
    return as_table(lines, columns)


def goals(rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """By `curve_name`, what PBS takes to reach each goal: the least density, between thresholds,
    and the operator's milliseconds there."""
    by_probe = summarize(rows)
    times = summarize(rows, "op_ms").get("text", {})
    recalled = summarize(rows, "recalled").get("text", {})
    keys = by_probe.get("pass key", {})
    found: dict[str, dict[str, float | None]] = {}
    for name in times | recalled | keys:
        if not name.startswith("pbs"):
            continue
        text = by_probe.get("text", {}).get(name, [])
        found[name] = {
            "loss .02": least_density(text, 0.02),
            "loss .01": least_density(text, 0.01),
            "mass .95": least_density([(x, -y) for x, y in recalled.get(name, [])], -0.95),
            "repeat 1.1": least_density(by_probe.get("copy", {}).get(name, []), math.log(1.1)),
        }
        if "dense" in keys:
            missed = [(x, -y) for x, y in keys[name]]
            found[name]["keys"] = least_density(missed, 0.02 - keys["dense"][0][1])
        for goal in ("loss .02", "loss .01"):
            density = found[name][goal]
            curve = times.get(name, [])
            found[name][f"ms, {goal}"] = None if density is None else at_density(curve, density)
    return found


def format_goals(rows: Sequence[Row]) -> str:
    """`goals` as a table: the loss above dense of texts, the recalled mass, the perplexity of a
    repeat at most 1.1 times dense's, and pass keys within 2 points of dense."""
    lines = []
    for name, values in goals(rows).items():
        cells = {goal: "" if x is None else f"{x:.3f}" for goal, x in values.items()}
        lines.append({"selection": name} | cells)
    return as_table(lines, list(lines[0])) if lines else ""
