"""The two tables of README.md: latency and quality of the presets."""

from doc_tables import HELD_OUT, find, lengths_of, mean, read, rounded
from preset_tables import (
    PIPELINE,
    QUALITY,
    best_dense,
    of_preset,
    ruler_runs,
    ruler_scores,
)

from pbs_attn.bench.ruler_table import average
from pbs_attn.bench.serving_engine import FIRST_TOKEN

SERVED = "serve_h100.csv"
MODEL = "Qwen2.5-Coder-1.5B, 16384"
ROWS = ("dense", "balanced", "fast", "paper")


def faster(dense, own, digits=2):
    """A time, with the speed-up over dense attention in parentheses."""
    return f"{own:.{digits}f} ({dense / own:.1f}×)"


def first_token(tokens):
    """Rows of dense attention and of the default, for a prompt in one piece on one GPU; None if the
    length was not measured."""
    rows = [row for row in read(SERVED) if (row["what"], row["part"]) == (FIRST_TOKEN, "whole")]
    if tokens not in lengths_of(rows):
        return None
    return tuple(find(rows, tokens=tokens, mode=mode) for mode in ("dense", "balanced"))


def speed():
    """Milliseconds of one call, and seconds to the first token through vLLM."""
    names = ["tokens", "density", "dense, ms", *(f"`{preset}`, ms" for preset in PIPELINE)]
    names += ["first token, dense, s", "first token, `balanced`, s"]
    lines = []
    fast = read(PIPELINE["fast"])
    for own in read(PIPELINE["balanced"]):
        dense = best_dense(own)
        if dense is None:
            continue
        line = [own["tokens"], rounded(float(own["density"])), rounded(dense, 2)]
        for row in (own, find(fast, tokens=own["tokens"])):
            line.append(faster(best_dense(row), float(row["attention_ms"])))
        served = first_token(own["tokens"])
        if served is None:
            line += ["", ""]
        else:
            seconds = [float(row["seconds"]) for row in served]
            line += [rounded(seconds[0], 2), faster(*seconds)]
        lines.append(line)
    return names, lines


def rows_of(preset):
    """Rows of texts and pass keys. Those of `paper` come from the first generation of the
    selection: its settings have not changed since."""
    rows = of_preset(read(QUALITY[MODEL]), preset)
    if rows or preset != "paper":
        return rows
    return of_preset([row for name in HELD_OUT[MODEL] for row in read(name)], preset)


def front_quality():
    """Density, loss and pass keys at one length, and scores of RULER by length."""
    runs = {preset: rows for rows, preset, _ in ruler_runs()}
    lengths = lengths_of(runs["dense"])
    names = ["preset", "density", "loss", "keys", *(f"RULER, {length}" for length in lengths)]
    lines = []
    for preset in ROWS:
        rows = rows_of(preset)
        texts = [row for row in rows if row["probe"] == "text"]
        keys = [row for row in rows if row["probe"] == "pass key"]
        line = [preset if preset == "dense" else f"`{preset}`"]
        line += [mean(texts, "density"), mean(texts, "loss_above_dense"), mean(keys, "right")]
        scores = ruler_scores(runs[preset], preset)
        for length in lengths:
            of_length = [score for place, score in scores.items() if place[0] == length]
            line.append(rounded(average(of_length).mean, 1))
        lines.append(line)
    return names, lines
