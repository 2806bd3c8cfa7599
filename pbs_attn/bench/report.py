"""Rows of measurements as tables and files."""

from __future__ import annotations

import csv
import os
import re
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from pbs_attn import _environment
from pbs_attn._errors import BenchError, require
from pbs_attn.config import check_threshold
from pbs_attn.demo_model import PICTURE_FORMATS

Row = dict[str, str]

RUN = uuid.uuid4().hex[:12]  # of this process


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


def require_packages(*modules: str) -> None:
    """Raises DemoError if one that a bench needs is missing."""
    for module in modules:
        require(module, "bench")


def check_outputs(
    files: Sequence[str | None], pictures: Sequence[str | None], extra: str = "bench"
) -> None:
    """Of what is written at the end: None and "" stand for none. `extra`, of pbs-attn, is what a
    message about a missing matplotlib names.

    Raises:
        BenchError: if a file cannot be written, or a picture has no known ending.
        DemoError: if matplotlib is missing and a picture is asked for.
    """
    for path in filter(None, (*files, *pictures)):
        if not Path(path).resolve().parent.is_dir():
            raise BenchError(f"the folder of {path} must exist")
        if not _environment.can_write(path):
            raise BenchError(f"{path} must be a file that can be written")
    for path in filter(None, pictures):
        if Path(path).suffix.lower() not in PICTURE_FORMATS:
            raise BenchError(f"a picture must end in {', '.join(PICTURE_FORMATS)}, got {path}")
        require("matplotlib", extra)


def check_shares(option: str, values: Sequence[float]) -> None:
    """Raises BenchError unless there are some, all of them in (0, 1]."""
    if not values or not all(0 < value <= 1 for value in values):
        raise BenchError(f"{option} must lie in (0, 1], got {list(values)}")


def check_thresholds(option: str, values: Sequence[float], mass: str) -> None:
    """Raises BenchError unless `mass` may be compared with all of them."""
    for value in values:
        try:
            check_threshold(option, value, mass)
        except ValueError as error:
            raise BenchError(str(error)) from error


def check_densities(densities: Sequence[float] | None, tokens: Sequence[int]) -> None:
    """Raises BenchError unless there is one a length, or None for the default of each."""
    if densities is None:
        return
    if len(densities) != len(tokens):
        given, lengths = len(densities), len(tokens)
        raise BenchError(f"--densities must be as many as --tokens, got {given} for {lengths}")
    if tokens:
        check_shares("--densities", densities)


def say_where(files: Sequence[str | None]) -> None:
    """Names on stderr what was written."""
    written = " and ".join(filter(None, files))
    if written:
        print(f"written: {written}", file=sys.stderr)


def one_run(rows: Sequence[Row]) -> None:
    """Times of different processes say nothing about each other: the clock and the card differ.

    Raises:
        BenchError: if the rows come from more than one, or there are none.
    """
    if not rows:
        raise BenchError("rows must be there to be compared, got none")
    runs = {row.get("run") for row in rows}
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


class RowFile:
    """Rows that this process measures, each with what `describe_run` says. A file, if there is a
    path, holds those so far at any time: a longer prompt may fail."""

    def __init__(self, path: str | None, device: torch.device | str):
        self.path, self.about_run = path, describe_run(device)
        self.rows: list[Row] = []

    def add(self, *rows: Row) -> None:
        self.rows += [row | self.about_run for row in rows]
        if self.path and self.rows:
            write_rows(self.path, self.rows)


def read_rows(path: str | os.PathLike) -> list[Row]:
    """Of a CSV that `write_rows` wrote.

    Raises:
        BenchError: if it cannot be read.
    """
    try:
        with Path(path).open(newline="") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise BenchError(f"rows must lie in a file that can be read, got {path}") from error
