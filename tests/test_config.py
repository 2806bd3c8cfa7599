"""The presets, and that the operators' defaults are what the documents say."""

import csv
import dataclasses
import re
from pathlib import Path

import pytest

from pbs_attn import PBSConfig

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
TUNING = "quality_tuning_smollm2_h100.csv"
# What else than the operator's defaults a preset has.
PRESETS = {
    "balanced": {},
    "fast": {"threshold": 0.008, "num_samples": 8},
    "accurate": {"num_samples": 32},
    "paper": {
        "kv_block_size": None,
        "threshold": 0.9,
        "permute_per": "query_head",
        "num_heavy": None,
        "mass": "earlier",
        "score": "mean",
    },
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_pinned(name):
    assert getattr(PBSConfig, name)() == dataclasses.replace(PBSConfig(), **PRESETS[name])


def test_changes_of_mass_keep_no_threshold():
    assert dataclasses.replace(PBSConfig(), mass="causal").resolved_threshold == 0.95


def test_the_default_is_balanced():
    assert PBSConfig() == PBSConfig.balanced()
    assert PBSConfig.paper(threshold=0.7) == dataclasses.replace(PBSConfig.paper(), threshold=0.7)


def rows_of(file, settings, threshold):
    with (RESULTS / file).open() as lines:
        return [
            row
            for row in csv.DictReader(lines)
            if (row["selection"], row["settings"], row["threshold"]) == ("pbs", settings, threshold)
        ]


def mean_of(rows, probe, column):
    values = [float(row[column]) for row in rows if row["probe"] == probe]
    return sum(values) / len(values)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_were_measured_as_they_say(name):
    """Density, loss and pass keys of the docstring are those of the CSV."""
    settings = "num_samples=8" if name == "fast" else name
    file = "quality_tuning_fast_smollm2_h100.csv" if name == "fast" else TUNING
    threshold = f"{getattr(PBSConfig, name)().resolved_threshold:g}"
    rows = rows_of(file, settings, threshold)
    words = " ".join(getattr(PBSConfig, name).__doc__.split())
    density, loss, keys = map(
        float, re.search(r"density ([\d.]+), loss ([\d.]+), keys ([\d.]+\d)", words).groups()
    )
    assert density == round(mean_of(rows, "text", "density"), 3)
    assert loss == round(mean_of(rows, "text", "loss_above_dense"), 3)
    assert keys == round(mean_of(rows, "pass key", "right"), 2)
    assert sum(row["probe"] == "pass key" for row in rows) == 6


def test_fast_was_measured_on_a_larger_model_as_it_says():
    file = "quality_qwen_32768_h100.csv"
    rows = rows_of(file, "num_samples=8", f"{PBSConfig.fast().threshold:g}")
    with (RESULTS / file).open() as lines:
        dense = [row for row in csv.DictReader(lines) if row["selection"] == "dense"]
    values = [mean_of(rows, "text", name) for name in ("density", "loss_above_dense", "op_ms")]
    words = "visits {:.3f}, loses {:.3f}, and takes {:.2f} ms a layer instead of {:.2f} dense"
    words = words.format(*values, mean_of(dense, "text", "op_ms"))
    doc = " ".join(PBSConfig.fast.__doc__.split())
    assert words in doc
    highest = re.search(r"from threshold ([\d.]+\d) down", doc).group(1)
    keys = "quality_qwen_keys_h100.csv"
    for threshold, is_read in (("0.04", False), (highest, True), ("0.015", True), ("0.01", True)):
        right = mean_of(rows_of(keys, "num_samples=8", threshold), "pass key", "right")
        assert (right == 1) == is_read
