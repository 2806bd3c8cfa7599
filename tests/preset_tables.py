"""Tables of today's presets, and of the runs that they were chosen on."""

import statistics

from doc_tables import PRESET_COLUMNS, find, lengths_of, mean, read, rounded, signed

from pbs_attn import PBSConfig
from pbs_attn.bench.ruler_table import average, compare

PRESETS = ("accurate", "balanced", "fast", "paper")
QUALITY = {
    "Qwen2.5-Coder-1.5B, 32768": "quality_qwen_32768_h200_2.csv",
    "Qwen2.5-Coder-1.5B, 16384": "quality_qwen_16384_h200_2.csv",
    "Qwen2.5-Coder-1.5B, 8192": "quality_qwen_8192_h200_2.csv",
    "SmolLM2-135M, 8192": "quality_smollm2_h200_2.csv",
}
TUNING = {
    "Qwen2.5-Coder-1.5B, 16384": "quality_tuning_qwen_16384_h200_2.csv",
    "SmolLM2-135M, 8192": "quality_tuning_smollm2_h200_2.csv",
}
MODELS = {"qwen2.5-1.5b": "Qwen2.5-1.5B", "smollm2-135m": "SmolLM2-135M"}
PIPELINE = {
    "balanced": "pipeline_balanced_h100.csv",
    "fast": "pipeline_fast_h100.csv",
}
SAMPLED = {  # by the name of a selection in the rows
    "balanced": "16 per query head",
    "fast": "16 per KV head",
    "fast,num_samples=32": "32 per KV head",
    "select_per=kv_head,num_samples=32": "32 per KV head",
}


def of_preset(rows, preset):
    """The rows of a preset at its own threshold, or those of "dense"."""
    if preset == "dense":
        return [row for row in rows if row["selection"] == "dense"]
    threshold = getattr(PBSConfig, preset)().resolved_threshold
    return [
        row
        for row in rows
        if (row["selection"], row["settings"]) == ("pbs", preset)
        and float(row["threshold"]) == threshold
    ]


def contestants(rows):
    """The presets that were measured, by name, with their labels in a table."""
    names = [name for name in ("dense", *PRESETS) if of_preset(rows, name)]
    return {name: name if name == "dense" else f"`{name}`" for name in names}


def ruler_runs():
    """(rows, preset, label) of each preset that ran RULER. `paper` ran apart from the others, with
    dense attention beside it, on 21 of their 25 prompts per task."""
    rows = read("ruler_qwen_h200.csv")
    runs = [(rows, preset, label) for preset, label in contestants(rows).items()]
    return [*runs, (read("ruler_paper_qwen_h100.csv"), "paper", "`paper`")]


def ruler_scores(rows, preset):
    """Scores by length and task, compared with dense."""
    groups = {}
    for side, name in enumerate((preset, "dense")):
        for row in of_preset(rows, name):
            place = groups.setdefault((row["tokens"], row["text"]), ([], []))
            place[side].append(row)
    return {place: compare(*pair) for place, pair in groups.items()}


# docs/choosing.md


def ruler():
    """Means over tasks, by length."""
    lengths = lengths_of(read("ruler_qwen_h200.csv"))
    names = ["preset"]
    for length in lengths:
        names += [f"{length} tokens", f"density at {length}"]
    lines = []
    for rows, preset, label in ruler_runs():
        scores, line = ruler_scores(rows, preset), [label]
        for length in lengths:
            score = average([value for place, value in scores.items() if place[0] == length])
            of_length = [row for row in of_preset(rows, preset) if row["tokens"] == length]
            line.append(rounded(score.mean, 1) if preset == "dense" else str(score))
            line.append(mean(of_length, "density"))
        lines.append(line)
    return names, lines


def quality_cells(rows):
    """The cells of a row: means over texts and over pass keys."""
    return [
        mean([row for row in rows if row["probe"] == probe], column)
        for probe, column in PRESET_COLUMNS.values()
    ]


def quality():
    """Texts, repeats and pass keys."""
    lines = []
    for model, file in QUALITY.items():
        rows = read(file)
        for preset, label in contestants(rows).items():
            of_name = of_preset(rows, preset)
            lines.append([model, label, *quality_cells(of_name), mean(of_name, "op_ms")])
    return ["model, tokens", "preset", *PRESET_COLUMNS, "ms per layer"], lines


def pairs_of_pipeline():
    """Yields one row of each preset for every length."""
    fast = read(PIPELINE["fast"])
    return [(row, find(fast, tokens=row["tokens"])) for row in read(PIPELINE["balanced"])]


def best_dense(row):
    """Milliseconds of the best dense kernel; None if dense kernels were left out."""
    times = [float(value) for name, value in row.items() if name.endswith("_dense_ms") and value]
    return min(times, default=None)


def operator():
    """Milliseconds of one call beside the best dense kernel of the same run."""
    names = ["tokens", "density"]
    for preset in PIPELINE:
        names += [f"`{preset}`", f"dense beside `{preset}`", f"dense / `{preset}`"]
    lines = []
    for pair in pairs_of_pipeline():
        line = [pair[0]["tokens"], rounded(float(pair[0]["density"]))]
        for row in pair:
            dense, time = best_dense(row), float(row["attention_ms"])
            of_dense = ["", ""] if dense is None else [rounded(dense, 2), rounded(dense / time, 2)]
            line += [rounded(time, 2), *of_dense]
        lines.append(line)
    return names, lines


def operator_of_models():
    """The same at the density that a model reaches."""
    lines = []
    for row in read("pipeline_models_h100.csv"):
        dense, time = best_dense(row), float(row["attention_ms"])
        cells = [rounded(time, 2), rounded(dense, 2), rounded(dense / time, 2)]
        density = rounded(float(row["density"]))
        lines.append([MODELS[row["preset"]], row["tokens"], density, *cells])
    return ["heads of", "tokens", "density", "`balanced`", "dense", "dense / `balanced`"], lines


def memory():
    """GiB beyond inputs and output, the same with both presets."""
    lines = []
    for pair in pairs_of_pipeline():
        (gib,) = {row["extra_gib"] for row in pair}
        lines.append([pair[0]["tokens"], rounded(float(gib), 2)])
    return ["tokens", "GiB"], lines


# docs/experiments.md


def ruler_tasks():
    """By task, means over lengths."""
    rows = read("ruler_qwen_h200.csv")
    lines = {}
    for preset in contestants(rows):
        scores = ruler_scores(rows, preset)
        for task in dict.fromkeys(task for _, task in scores):
            score = average([value for place, value in scores.items() if place[1] == task])
            cell = rounded(score.mean, 1) if preset == "dense" else str(score)
            lines.setdefault(task, []).append(cell)
    names = ["task", *contestants(rows).values()]
    return names, [[task, *cells] for task, cells in lines.items()]


def by_threshold(rows):
    """Rows of PBS by samples and threshold, the highest threshold first."""
    groups = {}
    for row in rows:
        if row["selection"] == "pbs":
            groups.setdefault((SAMPLED[row["settings"]], row["threshold"]), []).append(row)
    order = list(dict.fromkeys(SAMPLED.values()))
    return dict(
        sorted(groups.items(), key=lambda item: (order.index(item[0][0]), -float(item[0][1])))
    )


def tuning_ruler():
    """Points above dense, means over tasks, by length."""
    rows = read("ruler_tuning_qwen_h200.csv")
    names = ["samples", "threshold"]
    for length in lengths_of(rows):
        names += [f"{length} tokens", f"density at {length}"]
    lines = []
    for place, group in by_threshold(rows).items():
        line = list(place)
        for length in lengths_of(rows):
            of_length = [row for row in group if row["tokens"] == length]
            line.append(signed(tuning_points(rows, of_length)) if of_length else "")
            line.append(mean(of_length, "density"))
        lines.append(line)
    return names, lines


def tuning_points(rows, group):
    """The mean score of rows of one length above that of the dense rows in `rows`."""
    length = group[0]["tokens"]
    dense = [row for row in rows if (row["selection"], row["tokens"]) == ("dense", length)]
    return statistics.fmean(
        float(row["score"]) - float(find(dense, text=row["text"])["score"]) for row in group
    )


def thresholds_on_texts(files, last):
    """A line for every measured threshold, with the columns up to `last`."""
    columns = list(PRESET_COLUMNS)
    columns = columns[: columns.index(last) + 1]
    lines = []
    for model, file in files.items():
        for place, group in by_threshold(read(file)).items():
            lines.append([model, *place, *quality_cells(group)[: len(columns)]])
    return ["model, tokens", "samples", "threshold", *columns], lines


def tuning_texts():
    return thresholds_on_texts(TUNING, "loss of a repeat")


def held_out_texts():
    return thresholds_on_texts(QUALITY, "keys")
