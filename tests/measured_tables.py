"""The tables of docs/choosing.md and docs/experiments.md that are made from committed CSVs.

`python tests/measured_tables.py` writes them into the pages again, each in place of the one with
the same columns. tests/test_docs_tables.py holds the pages against them.
"""

import statistics
import string

from doc_tables import ROOT, find, read

from pbs_attn import PBSConfig
from pbs_attn.bench.ruler_table import average, compare

CHOOSING, EXPERIMENTS = (ROOT / "docs" / name for name in ("choosing.md", "experiments.md"))
PRESETS = ("accurate", "balanced", "fast", "paper")
QUALITY = {
    "Qwen2.5-Coder-1.5B, 32768": "quality_qwen_32768_h200_2.csv",
    "Qwen2.5-Coder-1.5B, 16384": "quality_qwen_16384_h200_2.csv",
    "SmolLM2-135M, 8192": "quality_smollm2_h200_2.csv",
}
PROTOTYPES = "ruler_prototypes_qwen_h200.csv"


def rounded(value, digits=3):
    """Without the sign of a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def mean(rows, column):
    """As a cell: empty where nothing was measured."""
    values = [float(row[column]) for row in rows if row[column] != ""]
    return rounded(statistics.fmean(values)) if values else ""


def of_preset(rows, preset):
    """Those at its own threshold; of "dense", dense's."""
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
    return [name for name in ("dense", *PRESETS) if of_preset(rows, name)]


def lengths_of(rows):
    return sorted({row["tokens"] for row in rows}, key=int)


def ruler_scores(rows, preset):
    """By length and task, beside dense."""
    groups = {}
    for side, name in enumerate((preset, "dense")):
        for row in of_preset(rows, name):
            place = groups.setdefault((row["tokens"], row["text"]), ([], []))
            place[side].append(row)
    return {place: compare(*pair) for place, pair in groups.items()}


# docs/choosing.md


def ruler():
    """The mean over tasks by length."""
    rows = read("ruler_qwen_h200.csv")
    lengths = lengths_of(rows)
    names = ["preset"]
    for length in lengths:
        names += [f"{length} tokens", f"density at {length}"]
    lines = []
    for preset in contestants(rows):
        scores = ruler_scores(rows, preset)
        line = [f"`{preset}`" if preset != "dense" else preset]
        for length in lengths:
            score = average([value for place, value in scores.items() if place[0] == length])
            of_length = [row for row in of_preset(rows, preset) if row["tokens"] == length]
            line.append(rounded(score.mean, 1) if preset == "dense" else str(score))
            line.append(mean(of_length, "density"))
        lines.append(line)
    return names, lines


def quality():
    """Texts, repeats and pass keys."""
    columns = {
        "density": ("text", "density"),
        "loss": ("text", "loss_above_dense"),
        "agreement": ("text", "agreement"),
        "loss of a repeat": ("copy", "loss_above_dense"),
        "keys": ("pass key", "right"),
        "ms a layer": ("text", "op_ms"),
    }
    lines = []
    for model, file in QUALITY.items():
        rows = read(file)
        for preset in contestants(rows):
            line = [model, f"`{preset}`" if preset != "dense" else preset]
            for probe, column in columns.values():
                of_probe = [row for row in of_preset(rows, preset) if row["probe"] == probe]
                line.append(mean(of_probe, column))
            lines.append(line)
    return ["model, tokens", "preset", *columns], lines


def pipeline(preset):
    return [
        row
        for row in read(f"pipeline_{preset}_h200.csv")
        if (row["kv_block_size"], row["permute_per"]) == ("32", "kv_head")
    ]


def operator():
    """Milliseconds beside the best dense kernel of the same run."""
    names = ["tokens", "density"]
    for preset in ("balanced", "fast"):
        names += [f"`{preset}`", f"dense beside `{preset}`", f"dense / `{preset}`"]
    lines = []
    for row in pipeline("balanced"):
        line = [row["tokens"], rounded(float(row["density"]))]
        for each in (row, find(pipeline("fast"), tokens=row["tokens"], preset=row["preset"])):
            dense = [value for name, value in each.items() if name.endswith("_dense_ms") and value]
            line += [rounded(float(each["attention_ms"]), 2), rounded(min(map(float, dense)), 2)]
            line.append(rounded(float(each["speedup"]), 2))
        lines.append(line)
    return names, lines


def memory():
    """GiB beyond inputs and output."""
    lines = []
    for row in pipeline("balanced"):
        other = find(pipeline("fast"), tokens=row["tokens"], preset=row["preset"])
        lines.append([row["tokens"], row["extra_gib"], other["extra_gib"]])
    return ["tokens", "GiB with `balanced`", "GiB with `fast`"], lines


# docs/experiments.md


def ruler_tasks():
    """By task, the mean over lengths."""
    rows = read("ruler_qwen_h200.csv")
    lines = {}
    for preset in contestants(rows):
        scores = ruler_scores(rows, preset)
        for task in dict.fromkeys(task for _, task in scores):
            score = average([value for place, value in scores.items() if place[1] == task])
            cell = rounded(score.mean, 1) if preset == "dense" else str(score)
            lines.setdefault(task, []).append(cell)
    names = [name if name == "dense" else f"`{name}`" for name in contestants(rows)]
    return ["task", *names], [[task, *cells] for task, cells in lines.items()]


SETTINGS = (
    *("samples", "pool", "rounding", "threshold"),
    *("dense_tail", "window", "select_per", "correction"),
)
ABOUT = ["row", "samples", "of each", "they see", "threshold", "tail, window"]


def prototypes(run):
    """By the cells that tell their settings. A row has the same letter in all tables."""
    letters, groups = {}, {}
    for row in read(PROTOTYPES):
        if row["selection"] == "dense":
            continue
        settings = tuple(row[name] for name in SETTINGS)
        letter = letters.setdefault(settings, string.ascii_uppercase[len(letters)])
        if row["run"] == run:
            groups.setdefault((letter, *about(*settings)), []).append(row)
    return groups


def about(samples, pool, rounding, threshold, tail, window, per, correction):
    keys = f"every key, {rounding}" if pool == "1" else f"means of {pool}, {rounding}"
    if correction != "none":
        keys += ", correction"
    return samples, per.replace("_", " ").replace("kv", "KV"), keys, threshold, f"{tail}, {window}"


def prototype_scores(run):
    """What the score is above dense and the density, means over tasks, by length."""
    names, lines = ABOUT[:], []
    for settings, rows in prototypes(run).items():
        line = list(settings)
        for length in lengths_of(rows):
            of_length = [row for row in rows if row["tokens"] == length]
            line += [points_above(of_length), mean(of_length, "density")]
        lines.append([*line, points_above(rows)])
    for length in lengths_of(rows):
        names += [f"{length} tokens", f"density at {length}"]
    return [*names, "mean of lengths"], lines


def points_above(rows):
    above = statistics.fmean(float(row["above_dense"]) for row in rows)
    return f"{round(above, 1) + 0.0:+.1f}"


def prototypes_of_three_tasks():
    return prototype_scores("a")


def prototypes_of_five_tasks():
    return prototype_scores("b")


def prototypes_on_texts():
    texts = {"topics.txt": "topics", "code.py": "code"}
    names, lines = ABOUT[:], []
    for settings, rows in prototypes("t").items():
        values = [rounded(float(row[c])) for row in rows for c in ("density", "loss_above_dense")]
        lines.append([*settings, *values])
    for row in rows:
        names += [f"{c}, {texts[row['task']]} {row['tokens']}" for c in ("density", "loss")]
    return names, lines


TABLES = [
    *((CHOOSING, table) for table in (ruler, quality, operator, memory)),
    (EXPERIMENTS, ruler_tasks),
    (EXPERIMENTS, prototypes_of_three_tasks),
    (EXPERIMENTS, prototypes_of_five_tasks),
    (EXPERIMENTS, prototypes_on_texts),
]


def as_markdown(names, lines):
    rows = [f"| {' | '.join(cells)} |\n" for cells in (names, *lines)]
    return "".join([rows[0], "|" + "---|" * len(names) + "\n", *rows[1:]])


def write(path, names, lines):
    """In place of the table that has the same columns."""
    text = path.read_text()
    header = as_markdown(names, [])
    before, found, behind = text.partition(header)
    assert found, f"{path.name} has no table with the columns {names}"
    kept = behind.splitlines(keepends=True)
    while kept and kept[0].startswith("|"):
        del kept[0]
    path.write_text(before + as_markdown(names, lines) + "".join(kept))


if __name__ == "__main__":
    for page, table in TABLES:
        try:
            write(page, *table())
        except FileNotFoundError as error:
            print(f"{table.__name__}: {error.filename} is missing")
