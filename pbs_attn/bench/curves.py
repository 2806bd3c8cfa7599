"""Turns the rows of `pbs-attn bench quality` into curves of quality against density, one for each
selection."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from pbs_attn._rows import Curve, Row, summarize

from .report import as_table

TABLE_DENSITIES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)


def least_density(curve: Curve, goal: float) -> float | None:
    """The density from which on a curve stays at or below a value, interpolated between two points,
    or None if it does not stay there. The curve is sorted by density."""
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
    """The value of a curve at a density, interpolated between two points, or None outside the
    curve. The curve is sorted by density."""
    for (left, low), (right, high) in itertools.pairwise(curve):
        if left <= density <= right:
            share = (density - left) / (right - left) if right > left else 0.0
            return low + share * (high - low)
    return None


def format_probe(rows: Sequence[Row], probe: str) -> str:
    """A table with a line for each selection and a column for each density."""
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
    """For each PBS `curve_name`, the least density that reaches each goal, interpolated between
    thresholds, and the milliseconds of the operator at that density."""
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
    """Formats `goals` as a table. The goals are the loss of texts above dense, the recalled mass, a
    perplexity of the repeat of at most 1.1 times that of dense, and pass keys within 2 points of
    dense."""
    lines = []
    for name, values in goals(rows).items():
        cells = {goal: "" if x is None else f"{x:.3f}" for goal, x in values.items()}
        lines.append({"selection": name} | cells)
    return as_table(lines, list(lines[0])) if lines else ""
