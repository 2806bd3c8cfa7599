"""Code that the benches share: checks of options, the file of rows, and tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from pbs_attn import _environment
from pbs_attn._errors import BenchError, require
from pbs_attn._rows import BEFORE_ATTEND, STAGES, Row, write_csv
from pbs_attn.config import check_threshold


def require_packages(*modules: str) -> None:
    """Raises DemoError if a package that a bench needs is missing."""
    for module in modules:
        require(module, "bench")


def check_tokens(tokens: Sequence[int], least: int) -> None:
    """Raises BenchError if there is no length, or one shorter than `least`."""
    if not tokens or min(tokens) < least:
        raise BenchError(f"--tokens must be at least {least}, got {list(tokens)}")


def check_rounds(rounds: int) -> None:
    """Raises BenchError unless the number is positive."""
    if rounds < 1:
        raise BenchError(f"--rounds must be positive, got {rounds}")


def check_shares(option: str, values: Sequence[float]) -> None:
    """Raises BenchError unless there is at least one value, and all lie in (0, 1]."""
    if not values or not all(0 < value <= 1 for value in values):
        raise BenchError(f"{option} must lie in (0, 1], got {list(values)}")


def check_thresholds(option: str, values: Sequence[float], mass: str) -> None:
    """Raises BenchError if there is no threshold, or one outside the range of this mass. The
    message has the range."""
    if not values:
        raise BenchError(f"{option} must have at least one value, got none")
    for value in values:
        try:
            check_threshold(option, value, mass)
        except ValueError as error:
            raise BenchError(str(error)) from error


def check_densities(densities: Sequence[float] | None, tokens: Sequence[int]) -> None:
    """Raises BenchError unless there is one density for each length, or None for the defaults."""
    if densities is None:
        return
    if len(densities) != len(tokens):
        given, lengths = len(densities), len(tokens)
        raise BenchError(
            f"--densities must have as many values as --tokens, got {given} for {lengths}"
        )
    if tokens:
        check_shares("--densities", densities)


def say_where(files: Sequence[str | None]) -> None:
    """Prints the names of the written files on stderr."""
    written = " and ".join(filter(None, files))
    if written:
        print(f"written: {written}", file=sys.stderr)


def as_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A table of the named columns, right-aligned under their names."""
    lines = [list(columns), *([row[column] for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def stage_columns(suffix: str, stages: tuple[str, ...] = STAGES, prefix: str = "") -> list[str]:
    """The columns of the stages, and one for the sum of all stages before attend."""
    return [f"{prefix}{stage}_{suffix}" for stage in (*stages, "before_attend")]


def by_stage(
    ms: dict[str, float], suffix: str, stages: tuple[str, ...] = STAGES, prefix: str = ""
) -> dict[str, float]:
    """The milliseconds of each stage, and the sum of the stages before attend."""
    total = sum(ms[stage] for stage in BEFORE_ATTEND)
    values = [*(ms[stage] for stage in stages), total]
    return dict(zip(stage_columns(suffix, stages, prefix), values, strict=True))


def as_text(column: str, value: object) -> str:
    """A value of that column as text, rounded as all benches round it."""
    if not isinstance(value, float):
        return str(value)
    if column.endswith("threshold"):  # thresholds of single blocks are small
        return f"{value:.6g}"
    return f"{value:.3f}" if column.endswith("_gib") or column == "speedup" else f"{value:.4f}"


class RowFile:
    """The rows that this process measures, with the columns of `_environment.describe`. If there is
    a path, the file is written after each row, because a longer prompt may fail."""

    def __init__(self, path: str | None, device: torch.device | str):
        self.path, self.about_run = path, _environment.describe(device)
        self.rows: list[Row] = []

    def add(self, *rows: Row) -> None:
        self.rows += [row | self.about_run for row in rows]
        if self.path and self.rows:
            write_csv(self.path, self.rows)
