"""Rows of measurements, their files, and the curves made from them, shared by benches, demo and
plots. Nothing here needs torch."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ._errors import BenchError, require

Row = dict[str, str]
Curve = list[tuple[float, float]]  # density, value

PICTURE_FORMATS = (".png", ".pdf", ".svg")
# Columns with one value per stage contain these names.
STAGES = ("score_keys", "sort_segments", "permute_kv", "select_blocks", "attend")
BEFORE_ATTEND = STAGES[:-1]
# The probes of `bench quality` that are swept over thresholds, and the one that is not; its
# settings that come from its own options.
PROBES = ("text", "copy", "pass key")
RULER = "ruler"
GIVEN = "given"


# Files


def can_write(path: Path | str) -> bool:
    """Whether a file can be written there: its folder exists and is writable."""
    path = Path(path)
    folder = path.resolve().parent
    return folder.is_dir() and os.access(folder, os.W_OK) and not path.is_dir()


def check_outputs(
    files: Sequence[str | None], pictures: Sequence[str | None], extra: str = "bench"
) -> None:
    """Checks the paths of the files that are written at the end; None and "" mean no file. A
    message about a missing matplotlib names `extra`, an extra of pbs-attn.

    Raises:
        BenchError: if a file cannot be written, or a picture has no known ending.
        DemoError: if a picture is asked for and matplotlib is missing.
    """
    for path in filter(None, (*files, *pictures)):
        if not Path(path).resolve().parent.is_dir():
            raise BenchError(f"the folder of {path} must exist")
        if not can_write(path):
            raise BenchError(f"{path} must be a file that can be written")
    for path in filter(None, pictures):
        if Path(path).suffix.lower() not in PICTURE_FORMATS:
            raise BenchError(f"a picture must end in {', '.join(PICTURE_FORMATS)}, got {path}")
        require("matplotlib", extra)


def write_csv(path: Path | str, rows: Sequence[Mapping[str, object]]) -> None:
    """Writes a header, and rows with the same columns."""
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: str | os.PathLike) -> list[Row]:
    """The rows of a CSV.

    Raises:
        BenchError: if the file cannot be read.
    """
    try:
        with Path(path).open(newline="") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise BenchError(f"rows must be in a readable file, got {path}") from error


def one_run(rows: Sequence[Row]) -> None:
    """Checks that all rows come from one process. Times of different processes cannot be compared,
    because the clock and the card differ.

    Raises:
        BenchError: if the rows come from more than one, or there are none.
    """
    if not rows:
        raise BenchError("rows to compare must not be empty, got none")
    runs = {row.get("run") for row in rows}
    if len(runs) != 1:
        raise BenchError(f"rows to compare must come from one process, got {len(runs)}")


# Curves of quality against density


def value_of(probe: str) -> str:
    """The column that holds the result of a probe."""
    return "right" if probe == "pass key" else "loss_above_dense"


def curve_name(row: Row) -> str:
    """The selection, and its settings if they have a name."""
    settings = row.get("settings", GIVEN)
    return row["selection"] if settings in ("", GIVEN) else f"{row['selection']}, {settings}"


def summarize(rows: Sequence[Row], value: str | None = None) -> dict[str, dict[str, Curve]]:
    """Means over prompts at each threshold, sorted by density, by probe and `curve_name`.

    `value` names the column to average; the default is `value_of` the probe.
    """
    curves: dict[str, dict[str, Curve]] = {}
    for probe in PROBES:
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if row["probe"] == probe and row[value or value_of(probe)] != "":
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
