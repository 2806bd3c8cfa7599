"""Rows of `pbs-attn bench quality` as curves of quality against density, one a selection."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from .report import Row, as_table

PROBES = ("text", "copy", "pass key")
GIVEN = "given"  # the settings of the command's own options
TABLE_DENSITIES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)

Curve = list[tuple[float, float]]  # density, value


def value_of(probe: str) -> str:
    """The column that tells how well a probe went."""
    return "right" if probe == "pass key" else "loss_above_dense"


def curve_name(row: Row) -> str:
    """The selection, and its settings where they have a name."""
    settings = row.get("settings", GIVEN)
    return row["selection"] if settings in ("", GIVEN) else f"{row['selection']}, {settings}"


def summarize(rows: Sequence[Row], value: str | None = None) -> dict[str, dict[str, Curve]]:
    """By probe and `curve_name`, the means over prompts at each threshold, by density.

    `value` names another column than `value_of` the probe.
    """
    curves: dict[str, dict[str, Curve]] = {}
    for probe in PROBES:
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if row["probe"] == probe:
                groups.setdefault((curve_name(row), row["threshold"]), []).append(row)
        for (name, _), group in groups.items():
            density, mean = (
                sum(float(row[column]) for row in group) / len(group)
                for column in ("density", value or value_of(probe))
            )
            curves.setdefault(probe, {}).setdefault(name, []).append((density, mean))
    for by_name in curves.values():
        for curve in by_name.values():
            curve.sort()
    return curves


def at_density(curve: Curve, density: float) -> float | None:
    """Between two points of a curve that was sorted by density; None outside of it."""
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
