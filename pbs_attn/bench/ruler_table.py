"""Tables of the RULER rows of `pbs-attn bench quality`: PBS beside dense attention, paired by
prompt."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from pbs_attn._rows import RULER, Row, curve_name

from .report import as_table

BELOW = {"same answers": "agreement", "density": "density"}  # lines below those of tasks


class Score(NamedTuple):
    """In percent: the mean, its difference to dense attention, and the standard error of that
    difference, which is None for a single prompt."""

    mean: float
    above: float
    error: float | None

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.1f}"
        return f"{self.mean:.1f} ({self.above:+.1f}{error})"


def compare(rows: Sequence[Row], dense: Sequence[Row]) -> Score:
    """Compares the rows of one task, length and contestant with those of dense attention on the
    same prompts."""
    of_dense = {row["sample"]: 100 * float(row["right"]) for row in dense}
    scores = {row["sample"]: 100 * float(row["right"]) for row in rows}
    above = [score - of_dense[sample] for sample, score in scores.items()]
    error = statistics.stdev(above) / math.sqrt(len(above)) if len(above) > 1 else None
    return Score(statistics.fmean(scores.values()), statistics.fmean(above), error)


def average(scores: Sequence[Score]) -> Score:
    """The mean over tasks. All tasks have the same weight, however many prompts they have. The
    error covers the choice of prompts only, because the tasks are no sample of other tasks."""
    errors = [score.error for score in scores if score.error is not None]
    error = math.hypot(*errors) / len(scores) if len(errors) == len(scores) else None
    means, above = ([getattr(s, name) for s in scores] for name in ("mean", "above"))
    return Score(statistics.fmean(means), statistics.fmean(above), error)


def format_scores(rows: Sequence[Row]) -> str:
    """A table for each length, with a line for each task and a column for each contestant."""
    rows = [row for row in rows if row["probe"] == RULER]
    tables = []
    for length in dict.fromkeys(row["tokens"] for row in rows):
        title = f"RULER, {length} tokens: score of 100 (above dense ± its standard error)"
        tables.append(f"{title}\n{_table([row for row in rows if row['tokens'] == length])}")
    return "\n\n".join(tables)


def _table(rows: Sequence[Row]) -> str:
    """The table of one length. Below the tasks, it has their mean, the share of answers that equal
    those of dense attention, and the density of the prefill."""
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
    """The name of the contestant. With `--thresholds`, one setting gives several contestants."""
    name = curve_name(row)
    return f"{name} at {row['threshold']}" if row["threshold"] else name
