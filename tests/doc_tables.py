"""Helpers for tests of documents: tables of a page, rows of committed CSVs, and comparison of
rounded figures with values."""

import csv
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KERNEL_LOG = ROOT / "docs" / "kernel-log.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"


def tables_in(path):
    """Yields the column names and the rows of cells of every table."""
    for table in re.findall(r"(?:^\|.*\n)+", path.read_text(), re.MULTILINE):
        lines = [line.strip().strip("|").split("|") for line in table.splitlines()]
        names, _, *rows = [[cell.strip() for cell in line] for line in lines]
        yield names, rows


def table_with(columns, path=BENCHMARKS):
    """The rows of the first table that has these columns."""
    for names, rows in tables_in(path):
        if set(columns) <= set(names):
            assert rows
            return [dict(zip(names, row, strict=True)) for row in rows]
    raise AssertionError(f"no table with {set(columns)} in {path}")


def says(text, value):
    """Whether a rounded figure equals the value to its digits."""
    digits = len(text.split(".")[1]) if "." in text else 0
    return float(text) == pytest.approx(value, abs=0.5001 * 10.0**-digits)


def assert_says(said, row, columns):
    """Compares the cells of a table row with the columns of a CSV row, by their names."""
    for column, name in columns.items():
        assert says(said[column], float(row[name])), (said, column)


def read(name):
    with (RESULTS / name).open() as file:
        return list(csv.DictReader(file))


def find(rows, **values):
    (row,) = [row for row in rows if all(row[name] == value for name, value in values.items())]
    return row


def words_of(path):
    return " ".join(path.read_text().split())


def figures(pattern, path=KERNEL_LOG):
    """The figures at the places of `#` in a sentence of a document."""
    number = r"(\d*\.?\d+)"
    escaped = re.escape(pattern).replace(r"\ ", r"\s+").replace(r"\#", number)
    (found,) = re.findall(escaped, words_of(path))
    return [found] if isinstance(found, str) else list(found)


def assert_figures(pattern, values, path=KERNEL_LOG):
    """Compares the figures of a sentence with values, each to its digits."""
    said = figures(pattern, path)
    assert len(said) == len(values), (pattern, said, values)
    for text, value in zip(said, values, strict=True):
        assert says(text, float(value)), (pattern, text, value)


# Cells of tables that are generated from CSVs


def rounded(value, digits=3):
    """Rounds without the sign of a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def mean(rows, column):
    """The mean of a column as a cell, which is empty if nothing was measured."""
    values = [float(row[column]) for row in rows if row[column] != ""]
    return rounded(statistics.fmean(values)) if values else ""


def lengths_of(rows):
    return sorted({row["tokens"] for row in rows}, key=int)


def signed(value, digits=1):
    return f"{round(value, digits) + 0.0:+.{digits}f}"


# The first generation of the selection, up to 0.2.0: held-out texts, and presets


HELD_OUT = {
    "SmolLM2-135M, 8192": ("quality_smollm2_h100.csv",),
    "Qwen2.5-Coder-1.5B, 16384": ("quality_qwen_16384_h100.csv", "quality_qwen_keys_h100.csv"),
    "Qwen2.5-Coder-1.5B, 32768": ("quality_qwen_32768_h100.csv",),
}


def held_out(model):
    return [row for name in HELD_OUT[model] for row in read(name)]


TUNING = "quality_tuning_smollm2_h100.csv"
TUNING_FAST = "quality_tuning_fast_smollm2_h100.csv"
PRESET_ROWS = {
    "PBSConfig.fast()": (TUNING_FAST, "num_samples=8", "0.008"),
    "PBSConfig()": (TUNING, "balanced", "0.01"),
    "PBSConfig.accurate()": (TUNING, "accurate", "0.01"),
    "PBSConfig.paper()": (TUNING, "paper", "0.9"),
}
PRESET_COLUMNS = {
    "density": ("text", "density"),
    "loss": ("text", "loss_above_dense"),
    "agreement": ("text", "agreement"),
    "loss of a repeat": ("copy", "loss_above_dense"),
    "keys": ("pass key", "right"),
}


def assert_presets(found):
    """Compares a table of the presets of 0.2.0 with its CSVs."""
    assert len(found) == len(PRESET_ROWS)
    for said in found:
        preset = re.match(r"`(.*?)`", said["preset"]).group(1)
        file, *setting = PRESET_ROWS[preset]
        rows = [row for row in read(file) if row["selection"] == "pbs"]
        for column in said.keys() & PRESET_COLUMNS.keys():
            probe, name = PRESET_COLUMNS[column]
            values = [
                float(row[name])
                for row in rows
                if [row["settings"], row["threshold"]] == setting and row["probe"] == probe
            ]
            assert says(said[column], sum(values) / len(values)), (preset, column)
