"""Generates the tables of README.md and of some pages of docs/ from CSVs.

`python tests/measured_tables.py` writes them into the pages. Each replaces the table with the same
columns. tests/test_docs_tables.py checks that the pages have them.
"""

import statistics
import string

from doc_tables import BENCHMARKS, README, ROOT, find, lengths_of, mean, read, rounded, signed
from front_tables import front_quality, speed
from preset_tables import (
    PIPELINE,
    best_dense,
    held_out_texts,
    memory,
    operator,
    operator_of_models,
    pairs_of_pipeline,
    quality,
    ruler,
    ruler_tasks,
    tuning_ruler,
    tuning_texts,
)

from pbs_attn.bench.serving import SETTING
from pbs_attn.bench.serving_engine import DECODE, FIRST_TOKEN, THROUGHPUT

CHOOSING, EXPERIMENTS, KERNEL_LOG, SERVING = (
    ROOT / "docs" / f"{name}.md" for name in ("choosing", "experiments", "kernel-log", "serving")
)
SERVED = ("serve_h100.csv", "serve_tp2_h100.csv")  # one file per number of GPUs
PROTOTYPES = "ruler_prototypes_qwen_h200.csv"
SELECTION = "selection_h200.csv"


# docs/kernel-log.md


def select_blocks():
    """Milliseconds of the stage with a summary of the keys, by samples."""
    columns = {
        "0.2.0, 16 samples": "0.2.0",
        "16 samples": "balanced",
        "8 samples": "num_samples=8",
        "16 samples per KV head": "fast",
    }
    rows = read(SELECTION)
    lines = []
    for length in lengths_of(rows):
        by_settings = {row["settings"]: row for row in rows if row["tokens"] == length}
        density = float(by_settings["fast"]["density"])
        line = [length, f"{round(density, 3):g}"]
        for settings in columns.values():
            row = by_settings.get(settings)
            line.append(rounded(float(row["select_blocks_ms"])) if row else "")
        lines.append(line)
    return ["tokens", "density", *columns], lines


def sampled_stage():
    """Milliseconds of the stage, and of `attend` on the blocks of `fast`."""
    lines = []
    for pair in pairs_of_pipeline():
        cells = [rounded(float(row["select_blocks_ms"]), 2) for row in pair]
        dense = best_dense(pair[1])
        cells += [
            rounded(float(pair[1]["attend_ms"]), 2),
            "" if dense is None else rounded(dense, 2),
        ]
        lines.append([pair[0]["tokens"], rounded(float(pair[0]["density"])), *cells])
    names = ["tokens", "density", "select_blocks of `balanced`", "select_blocks of `fast`"]
    return [*names, "attend", "dense"], lines


# docs/serving.md


def served(*whats):
    """Yields each row of PBS, the dense row to compare it with, and the cells that identify it."""
    for rows in map(read, SERVED):
        for row in rows:
            if row["what"] in whats and row["mode"] != "dense":
                shared = {name: row[name] for name in SETTING}
                cells = [row["tp"], f"`{row['mode']}`"]
                yield row, find(rows, mode="dense", **shared), cells


def quotient(dense, row):
    return rounded(float(dense["seconds"]) / float(row["seconds"]), 2)


def first_tokens():
    lines = []
    for row, dense, cells in served(FIRST_TOKEN):
        comes = f"chunks of {row['chunk']}" if row["part"] == "chunked" else "one piece"
        seconds = [rounded(float(side["seconds"]), 2) for side in (dense, row)]
        density = rounded(float(row["density"]))
        lines.append([*cells, row["tokens"], comes, density, *seconds, quotient(dense, row)])
    names = ["GPUs", "preset", "tokens", "the prompt comes in", "density"]
    return [*names, "dense, s", "PBS, s", "dense / PBS"], lines


def decode_and_throughput():
    lines = []
    for row, dense, cells in served(DECODE, THROUGHPUT):
        unit = "tokens/s" if row["what"] == THROUGHPUT else "ms"
        values = []
        for side in (dense, row):
            seconds = float(side["seconds"])
            rate = float(side["tokens"]) / seconds
            values.append(f"{rate:.0f}" if unit == "tokens/s" else f"{1e3 * seconds:.2f}")
        lines.append([*cells, f"{row['what']}, {unit}", *values, quotient(dense, row)])
    return ["GPUs", "preset", "measured", "dense", "PBS", "seconds of dense / of PBS"], lines


def chunks():
    """Milliseconds of the operator on a prompt in chunks, beside one call on all of it."""
    lines = []
    for row in read("chunks_h100.csv"):
        names = ("whole_ms", "in_order_ms", "paged_ms")
        whole, in_order, paged = (float(row[name]) for name in names)
        cells = [f"`{row['selection']}`", row["tokens"], row["chunk"]]
        cells.append(rounded(float(row["in_order_density"])))
        values = (whole, in_order, in_order / whole, paged)
        lines.append([*cells, *(rounded(value, 2) for value in values)])
    names = ["preset", "tokens", "chunk", "density", "one call, ms", "chunks, pages in order, ms"]
    return [*names, "chunks / one call", "chunks, pages copied, ms"], lines


def ruler_through_vllm():
    """Scores of the same prompts through vLLM and through transformers, in percent."""
    through = read("ruler_vllm_qwen_h100.csv")
    alone = {
        (row["settings"] or "dense", row["text"], row["tokens"], row["sample"]): row
        for row in read("ruler_qwen_h200.csv")
    }
    sides = {
        "dense, one piece": ("dense", "33792"),
        "`balanced`, one piece": ("balanced", "33792"),
        "`balanced`, chunks of 8192": ("balanced", "8192"),
    }
    lines = []
    for name, (preset, chunk) in sides.items():
        rows = [r for r in through if (r["preset"] or "dense", r["chunk"]) == (preset, chunk)]
        cells = []
        for tokens in [*lengths_of(rows), None]:
            of = [row for row in rows if tokens in (row["tokens"], None)]
            vllm = [100 * float(row["right"]) for row in of]
            keys = [(preset, row["text"], row["tokens"], row["sample"]) for row in of]
            transformers = [100 * float(alone[key]["right"]) for key in keys]
            gains = [a - b for a, b in zip(vllm, transformers, strict=True)]
            if tokens is None:
                error = statistics.stdev(gains) / len(gains) ** 0.5
                cells.append(f"{signed(statistics.fmean(gains))} ± {error:.1f}")
            else:
                means = (statistics.fmean(vllm), statistics.fmean(transformers))
                cells.append(" / ".join(f"{mean:.1f}" for mean in means))
        lines.append([name, *cells])
    columns = [f"{tokens} tokens" for tokens in lengths_of(rows)]
    return ["in vLLM", *columns, "vLLM above transformers, all lengths"], lines


# docs/experiments.md


def operator_with_summary():
    """Milliseconds of one call with a summary of the keys, and of cuDNN's dense kernel."""
    rows = read(SELECTION)
    lines = []
    for length in lengths_of(rows):
        line = [length]
        for settings in ("balanced", "fast"):
            row = find(rows, tokens=length, settings=settings)
            dense = float(row["cudnn_dense_ms"] or "nan")
            if settings == "balanced":
                line += [rounded(float(row["density"])), "" if dense != dense else f"{dense:.2f}"]
            line.append(f"{float(row['attention_ms']):.2f}")
            line.append(f"{float(row['speedup']):.2f}" if row["speedup"] else "")
        first = [row for row in rows if (row["tokens"], row["settings"]) == (length, "0.2.0")]
        line.append(f"{float(first[0]['attention_ms']):.2f}" if first else "")
        lines.append(line)
    names = ["tokens", "density", "dense", "16 samples", "dense / 16 samples"]
    shared = ["16 samples per KV head", "dense / 16 samples per KV head"]
    return [*names, *shared, "0.2.0's default"], lines


SETTINGS = (
    *("samples", "pool", "rounding", "threshold"),
    *("dense_tail", "window", "select_per", "correction"),
)
ABOUT = ["row", "samples", "per", "keys seen", "threshold", "tail, window"]


def prototypes(run):
    """Groups rows by the cells with their settings. A setting has the same letter in all tables."""
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
    """Score above dense and density, averaged over tasks, by length."""
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
    return signed(above)


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


# docs/benchmarks.md, the sm80 family


def attend_on_sm80():
    """TFLOP/s of attend on lists of key blocks of two widths, and of dense FlashAttention 2."""
    rows = read("kernel_sm80_h100.csv")
    lines = []
    for length in lengths_of(rows):
        of_length = [row for row in rows if row["tokens"] == length]
        (dense,) = {float(row["flash_dense_tflops"]) for row in of_length if row["flash_dense_ms"]}
        for density in sorted({row["density"] for row in of_length}):
            rates = [
                float(find(of_length, density=density, kv_block_size=width)["pbs_tflops"])
                for width in ("128", "32")
            ]
            line = [length, f"{float(density):.3g}", *(f"{rate:.0f}" for rate in rates)]
            lines.append([*line, f"{dense:.0f}", f"{rates[0] / dense:.2f}"])
    names = ["tokens", "density", "128 rows", "32 rows", "FA2, dense", "128 rows / FA2"]
    return names, lines


def other_kernels():
    """How many times as fast the default is as each dense kernel."""
    kernels = {"FlashAttention-4": "fa4", "cuDNN": "cudnn"}
    kernels |= {"FlashAttention 2": "flash", "FlexAttention": "flex"}
    lines = []
    for row in read(PIPELINE["balanced"]):
        if best_dense(row) is None:
            continue
        times = [float(row[f"{kernel}_dense_ms"]) for kernel in kernels.values()]
        gains = [f"{time / float(row['attention_ms']):.1f}" for time in times]
        lines.append([row["tokens"], rounded(float(row["density"])), *gains])
    return ["tokens", "density", *kernels], lines


def operator_on_sm80():
    """Milliseconds of the default and of dense attention, in turn with FA2 alone and with all dense
    kernels."""
    beside_all = read("pipeline_sm80_h100.csv")
    lines = []
    for row in read("pipeline_sm80_fa2_h100.csv"):
        line = [row["tokens"], f"{float(row['density']):.3g}"]
        for side in (row, find(beside_all, tokens=row["tokens"])):
            ours, dense = float(side["attention_ms"]), float(side["flash_dense_ms"])
            line += [f"{ours:.3g}", f"{dense:.3g}", f"{dense / ours:.3g}"]
        lines.append(line)
    names = ["default, ms", "FA2, ms", "FA2 / default"]
    names += [f"{name}, beside all kernels" for name in names]
    return ["tokens", "density", *names], lines


TABLES = [
    (CHOOSING, ruler),
    (README, speed),
    (README, front_quality),
    (CHOOSING, quality),
    (CHOOSING, operator),
    (CHOOSING, operator_of_models),
    (CHOOSING, memory),
    (KERNEL_LOG, select_blocks),
    (KERNEL_LOG, sampled_stage),
    (SERVING, first_tokens),
    (SERVING, chunks),
    (SERVING, ruler_through_vllm),
    (SERVING, decode_and_throughput),
    (EXPERIMENTS, ruler_tasks),
    (EXPERIMENTS, tuning_ruler),
    (EXPERIMENTS, tuning_texts),
    (BENCHMARKS, attend_on_sm80),
    (BENCHMARKS, other_kernels),
    (BENCHMARKS, operator_on_sm80),
    (EXPERIMENTS, held_out_texts),
    (EXPERIMENTS, operator_with_summary),
    (EXPERIMENTS, prototypes_of_three_tasks),
    (EXPERIMENTS, prototypes_of_five_tasks),
    (EXPERIMENTS, prototypes_on_texts),
]


def as_markdown(names, lines):
    rows = [f"| {' | '.join(cells)} |\n" for cells in (names, *lines)]
    return "".join([rows[0], "|" + "---|" * len(names) + "\n", *rows[1:]])


def write(path, names, lines):
    """Replaces the table that has the same columns."""
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
        write(page, *table())
