"""The presets, and the defaults of the operators as the documents give them."""

import csv
import dataclasses
import re
from pathlib import Path

import pytest

from pbs_attn import PBSConfig

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
TUNING = "quality_tuning_smollm2_h100.csv"
# The settings of a preset that differ from the operator's defaults.
PRESETS = {
    "balanced": {},
    "fast": {"select_per": "kv_head", "threshold": 0.01},
    "accurate": {"num_samples": 32, "threshold": 0.0025},
    "paper": {
        "kv_block_size": None,
        "threshold": 0.9,
        "permute_per": "query_head",
        "num_heavy": None,
        "mass": "earlier",
        "score": "mean",
        "window": 0,
        "dense_tail": 0,
    },
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_pinned(name):
    assert getattr(PBSConfig, name)() == dataclasses.replace(PBSConfig(), **PRESETS[name])


def test_changes_of_mass_keep_no_threshold():
    config = dataclasses.replace(PBSConfig(), score="mean", mass="causal")
    assert config.resolved_threshold == 0.95


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


@pytest.mark.parametrize("name", ["paper"])
def test_presets_were_measured_as_they_say(name):
    """Density, loss and pass keys of the docstring are those of the CSV."""
    threshold = f"{getattr(PBSConfig, name)().resolved_threshold:g}"
    rows = rows_of(TUNING, name, threshold)
    words = " ".join(getattr(PBSConfig, name).__doc__.split())
    density, loss, keys = map(
        float,
        re.search(
            r"visits a density of ([\d.]+) .* loss is ([\d.]+) .* recalls ([\d.]+) of 6 pass keys",
            words,
        ).groups(),
    )
    assert density == round(mean_of(rows, "text", "density"), 3)
    assert loss == round(mean_of(rows, "text", "loss_above_dense"), 3)
    assert keys == round(mean_of(rows, "pass key", "right"), 2)
    assert sum(row["probe"] == "pass key" for row in rows) == 6
