"""Tables of RULER's rows in `pbs-attn bench quality`: PBS beside dense, paired by prompt."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from pbs_attn._rows import RULER, Row, curve_name

from .report import as_table

BELOW = {"same answers": "agreement", "density": "density"}  # lines below those of tasks


class Score(NamedTuple):
    """Of 100: the mean, what it is above dense, and that difference's standard error, None for a
    single prompt."""

    mean: float
    above: float
    error: float | None

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.1f}"
        return f"{self.mean:.1f} ({self.above:+.1f}{error})"


def compare(rows: Sequence[Row], dense: Sequence[Row]) -> Score:
    """Rows of one task, length and contestant beside dense's of the same prompts."""
    of_dense = {row["sample"]: 100 * float(row["right"]) for row in dense}
    scores = {row["sample"]: 100 * float(row["right"]) for row in rows}
    above = [score - of_dense[sample] for sample, score in scores.items()]
    error = statistics.stdev(above) / math.sqrt(len(above)) if len(above) > 1 else None
    return Score(statistics.fmean(scores.values()), statistics.fmean(above), error)


def average(scores: Sequence[Score]) -> Score:
    """Over tasks, which count alike however many prompts they have. The error is of the prompts:
    the tasks are no sample of others."""
    errors = [score.error for score in scores if score.error is not None]
    error = math.hypot(*errors) / len(scores) if len(errors) == len(scores) else None
    means, above = ([getattr(s, name) for s in scores] for name in ("mean", "above"))
    return Score(statistics.fmean(means), statistics.fmean(above), error)


def format_scores(rows: Sequence[Row]) -> str:
    """A table for each length: one line a task, one column a contestant."""
    rows = [row for row in rows if row["probe"] == RULER]
    tables = []
    for length in dict.fromkeys(row["tokens"] for row in rows):
        title = f"RULER, {length} tokens: score of 100 (above dense ± its standard error)"
        tables.append(f"{title}\n{_table([row for row in rows if row['tokens'] == length])}")
    return "\n\n".join(tables)


def _table(rows: Sequence[Row]) -> str:
    """`rows` of one length. Below the tasks: their mean, the share of answers that are dense's to
    the letter, and the density of the prefill."""
    groups: dict[str, dict[str, list[Row]]] = {}  # by label and task
    for row in rows:
        groups.setdefault(_label(row), {}).setdefault(row["text"], []).append(row)
    tasks = groups["dense"]
    lines = {name: {"task": name} for name in (*tasks, "mean", *BELOW)}
    for label, by_task in groups.items():
        scores = {task: compare(of_task, tasks[task]) for task, of_task in by_task.items()}
        scores["mean"] = average(list(scores.values()))
        for name, score in scores.items():
            lines[name][label] = f"{score.mean:.1f}" if by_task is tasks else str(score)
        of_label = [row for of_task in by_task.values() for row in of_task]
        for name, column in BELOW.items():
            mean = statistics.fmean(float(row[column]) for row in of_label)
            lines[name][label] = f"{mean:.3f}"
    return as_table(list(lines.values()), ["task", *groups])


def _label(row: Row) -> str:
    """The contestant: `--thresholds` gives the same settings several."""
    name = curve_name(row)
    return f"{name} at {row['threshold']}" if row["threshold"] else name
