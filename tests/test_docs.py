"""The documents: links lead somewhere, code runs, and tables say what their CSV does."""

import csv
import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch
from tiny_model import SIZES, save_model

from pbs_attn import PBSConfig, cli, density, select
from pbs_attn._rows import STAGES
from pbs_attn.bench import curves
from pbs_attn.bench.options import PERMUTE_PER
from pbs_attn.bench.shapes import SHAPES
from pbs_attn.bench.stages import heavy_hitters

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


@named(DOCUMENTS)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    for link in links:
        if not re.match(r"https?://", link):
            assert (path.parent / link.split("#")[0]).exists(), link


def code_blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def test_pages_have_code_to_run():
    names = {path.stem for path in DOCUMENTS if code_blocks(path)}
    assert {"README", "index", "method", "scoring", "transformers"} <= names


@named([path for path in DOCUMENTS if code_blocks(path) and path.name != "README.md"])
def test_code_runs(path, tmp_path, monkeypatch):
    """The blocks of a document in order, as one program in a folder of its own."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path, transformers.LlamaConfig(**SIZES))
    names = {"path": str(tmp_path)}
    with torch.no_grad():
        for block in code_blocks(path):
            exec(compile(block, str(path), "exec"), names)


README = ROOT / "README.md"


@pytest.mark.parametrize("nth", range(len(code_blocks(README))))
def test_each_block_of_the_readme_runs_as_pasted(nth, tmp_path, monkeypatch):
    """Alone, in a new interpreter's namespace. A model that it names lies where it says."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    block = code_blocks(README)[nth]
    for name in re.findall(r'^path = "(.+?)"', block, re.MULTILINE):
        save_model(tmp_path / name, transformers.LlamaConfig(**SIZES))
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def commands_in(path):
    """Each `pbs-attn` command with options, in code of any kind."""
    text = path.read_text()
    spans = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans += re.findall(r"`([^`]+)`", re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S))
    found = [c for span in spans for c in re.findall(r"pbs-attn [a-z][^&\n]* --[^&]*", span)]
    return [shlex.split(command)[1:] for command in found]


@named([path for path in DOCUMENTS if commands_in(path)])
def test_commands_have_these_options(path, capsys):
    for command in commands_in(path):
        try:
            cli.parse(command)
        except SystemExit as done:
            assert done.code == 0, (command, capsys.readouterr().err)


THRESHOLDS = {
    "block": (0.002, 0.005, 0.01),
    "causal": (0.8, 0.9, 0.97),
    "earlier": (0.5, 0.8, 0.95),
}


def verb_for_more(mass):
    """What to do to `threshold` in order to visit more."""
    q, k, v = (x.float() for x in heavy_hitters(2048, 4, 2, "cpu", 64))
    densities = []
    for threshold in THRESHOLDS[mass]:
        config = PBSConfig(mass=mass, threshold=threshold)
        mask = select(q, k, v, config=config).block_mask
        densities.append(density(mask, 2048, 2048, config=config).mean().item())
    steps = [after - before for before, after in itertools.pairwise(densities)]
    assert all(step > 0.01 for step in steps) or all(step < -0.01 for step in steps), densities
    return "raise" if steps[0] > 0 else "lower"


@pytest.mark.parametrize("mass", THRESHOLDS)
def test_advice_on_the_threshold_has_the_right_direction(mass):
    """By the sentences of the documents and of the command line that name this mass."""
    more = verb_for_more(mass)
    less = {"raise": "lower", "lower": "raise"}[more]
    rows = dict(row for _, rows in tables_in(ROOT / "docs" / "troubleshooting.md") for row in rows)
    for symptom, verb in (("The density is near 1", less), ("Quality suffers", more)):
        (clause,) = [part for part in re.split(r"[;:.]", rows[symptom]) if f'"{mass}"' in part]
        assert re.findall(r"\b(raise|lower)\b", clause) == [verb], clause
    words = "visits more" if more == "raise" else "visits less"
    page = " ".join((ROOT / "docs" / "choosing.md").read_text().split())
    section = page.split("## Threshold")[1]
    rules = re.split(r"With `mass=", section)[1:3]
    (rule,) = [rule for rule in rules if f'"{mass}"' in rule.split(" it is ")[0]]
    assert f"A higher threshold {words}".lower() in rule.lower()
    (text,) = re.findall(r"--threshold T (.*?)\(default", " ".join(demo_help().split()))
    of_block, of_sums = re.split(r"with the others", text)
    assert f"a higher one {words}" in (of_block if mass == "block" else of_sums)


def demo_help():
    subcommands = cli.make_parser()._subparsers._group_actions[0]
    return subcommands.choices["demo"].format_help()


def tables_in(path):
    """Every table as its column names and rows of cells."""
    for table in re.findall(r"(?:^\|.*\n)+", path.read_text(), re.MULTILINE):
        lines = [line.strip().strip("|").split("|") for line in table.splitlines()]
        names, _, *rows = [[cell.strip() for cell in line] for line in lines]
        yield names, rows


def table_with(columns, path=ROOT / "README.md"):
    """Rows of the first table that has these columns."""
    for names, rows in tables_in(path):
        if set(columns) <= set(names):
            assert rows
            return [dict(zip(names, row, strict=True)) for row in rows]
    raise AssertionError(f"no table with {set(columns)} in {path}")


def says(text, value):
    """Whether a rounded figure is that of the value."""
    digits = len(text.split(".")[1]) if "." in text else 0
    return float(text) == pytest.approx(value, abs=0.5001 * 10.0**-digits)


def assert_says(said, row, columns):
    """The cells of a line of a table against the columns of a row of a CSV, by their names."""
    for column, name in columns.items():
        assert says(said[column], float(row[name])), (said, column)


def read(name):
    with (RESULTS / name).open() as file:
        return list(csv.DictReader(file))


def find(rows, **values):
    (row,) = [row for row in rows if all(row[name] == value for name, value in values.items())]
    return row


CHOOSING = ROOT / "docs" / "choosing.md"
# As in the table: samples, keys a mean, threshold, dense tail.
PROTOTYPES = {
    "`PBSConfig()`": ("16", "1", "0.01", "0"),
    "the same, dense tail and window 0.01": ("16", "1", "0.01", "256"),
    "the same, dense tail and window 0.005": ("16", "1", "0.005", "256"),
    "summary of the keys in e4m3, dense tail and window": ("16", "4", "0.005", "256"),
    "the same, 24 samples for the six heads of a KV head": ("24", "4", "0.005", "256"),
}


def test_ruler_of_prototypes():
    """Means over tasks, above dense."""
    rows = [row for row in read("ruler_prototypes_qwen_h200.csv") if row["run"] == "a"]
    found = table_with({"prototype", "density at 8192"}, CHOOSING)
    assert len(found) == len(PROTOTYPES)
    for said in found:
        name = said["prototype"]
        settings = PROTOTYPES.get(name) or PROTOTYPES[f"{name} {said['threshold']}"]
        assert said["threshold"] == settings[2]
        for tokens in ("8192", "16384", "32768"):
            of_length = [
                row
                for row in rows
                if (row["samples"], row["pool"], row["threshold"], row["dense_tail"]) == settings
                and (row["tokens"], row["correction"]) == (tokens, "none")
            ]
            assert len(of_length) == 3
            for text, column in ((f"{tokens} tokens", "above_dense"), (None, "density")):
                mean = sum(float(row[column]) for row in of_length) / 3
                assert says(said[text or f"density at {tokens}"], mean), (name, tokens, column)


def test_summary_loses_repeats():
    rows = read("quality_summary_smollm2_cpu.csv")
    found = table_with({"selection", "density of the repeat"}, CHOOSING)
    assert len(found) == len(rows) / 2
    for said in found:
        place = {name: said[name] for name in ("tokens", "threshold")}
        place["settings"] = said["selection"]
        text = {"loss": "loss_above_dense", "density": "density"}
        assert_says(said, find(rows, probe="text", **place), text)
        copy = {"loss of a repeat": "loss_above_dense", "density of the repeat": "density"}
        assert_says(said, find(rows, probe="copy", **place), copy)


def test_times_with_a_summary():
    """Of select_blocks, by samples."""
    names = {
        "0.2.0, 16 samples": "0.2.0",
        "16 samples": "balanced",
        "8 samples": "num_samples=8",
        "16 samples of a KV head": "fast",
    }
    rows = read("selection_h200.csv")
    found = table_with({"0.2.0, 16 samples"}, KERNEL_LOG)
    assert len(found) == 6
    for said in found:
        for column, settings in names.items():
            if said[column]:
                row = find(rows, tokens=said["tokens"], settings=settings)
                assert_says(said, row, {column: "select_blocks_ms"})


def test_demo_table():
    """What the README shows of the demo's output is in its CSV."""
    dense, pbs = read("demo_smollm2.csv")
    text = README.read_text()
    for label, column, factor in (
        ("prefill, s", "prefill_s", 1),
        ("attention alone, s", "attention_s", 1),
        ("density", "density", 1),
        ("attention mass visited", "visited_mass", 100),
        ("perplexity, last 4096 tokens", "perplexity", 1),
        ("same next-token choice", "same_choice", 100),
    ):
        (said,) = re.findall(rf"^{label} +([\d.]+)(?: %)? +([\d.]+)", text, re.MULTILINE)
        for figure, side in zip(said, (dense, pbs), strict=True):
            assert says(figure, factor * float(side[column])), label
    assert f"{dense['title']}\n" in text


def test_operator_table():
    columns = {
        "density": "density",
        "before `attend`": "before_attend_ms",
        "`attend`": "attend_ms",
        "one call": "attention_ms",
        "best dense kernel": "fa4_dense_ms",
        "speed-up": "speedup",
    }
    rows = read("pipeline_h200.csv")
    for said in table_with(columns):
        row = find(rows, tokens=said["tokens"], permute_per="kv_head")
        assert_says(said, row, columns)
        assert float(row["fa4_dense_ms"]) <= float(row["cudnn_dense_ms"])


def test_kernel_table():
    columns = {
        "`attend`": "pbs",
        "FlashAttention-4, same lists": "fa4_sparse",
        "FlexAttention, same lists": "flex",
        "best dense kernel (FlashAttention-4)": "fa4_dense",
    }
    rows = [row for row in read("kernel_h200.csv") if row["kv_block_size"] == "128"]
    for said in table_with(columns):
        (row,) = [
            row
            for row in rows
            if row["tokens"] == said["tokens"] and says(said["density"], float(row["density"]))
        ]
        for column, name in columns.items():
            assert bool(said[column]) == bool(row[f"{name}_ms"])
            if said[column]:
                assert says(said[column], float(row[f"{name}_tflops"])), (said["tokens"], column)
        dense = [row[f"{name}_dense_ms"] for name in ("flash", "cudnn", "fa4")]
        assert row["fa4_dense_ms"] == min(dense, key=lambda ms: float(ms or 0))
    text = (ROOT / "README.md").read_text()
    for other in ("fa4_sparse", "flex", "fa4_dense"):
        ratios = [
            float(row["pbs_tflops"]) / float(row[f"{other}_tflops"])
            for row in rows
            if row[f"{other}_tflops"]
        ]
        assert f"{min(ratios):.2f} to {max(ratios):.2f} times" in text, other


def test_shape_table():
    rows = read("pipeline_h200.csv") + read("pipeline_shapes_h200.csv")
    found = table_with({"heads of", "wins from"})
    assert len(found) == 3
    for said in found:
        shapes = [SHAPES[preset] for preset in said["heads of"].split(", ")]
        assert len({(s.num_q_heads, s.num_kv_heads, s.head_dim) for s in shapes}) == 1
        preset = said["heads of"].split(",")[0]
        for tokens in ("8192", "16384", "32768", "65536", "131072"):
            row = find(rows, preset=preset, tokens=tokens, permute_per="kv_head")
            assert says(said[tokens], float(row["speedup"])), (preset, tokens)
            assert said["wins from"] == row["crossover"]
            assert f"{row['q_heads']} / {row['kv_heads']}" == said["query / KV heads"]


def test_stage_table():
    columns = {
        "score_keys": "score_keys",
        "sort_segments": "sort_segments",
        "permute_kv": "permute_kv",
        "select_blocks": "select_blocks",
        "all four": "before_attend",
    }
    rows = read("pipeline_h200.csv")
    for said in table_with(columns):
        per = said["permutation per"].lower().replace(" ", "_")
        row = find(rows, tokens=said["tokens"], permute_per=per)
        for column, name in columns.items():
            microseconds = 1e3 * float(row[f"{name}_kernel_ms"])
            assert says(said[column], microseconds), (said["tokens"], per, column)
        if said["the same in eager PyTorch"]:
            eager = 1e3 * float(row["eager_before_attend_ms"])
            assert says(said["the same in eager PyTorch"], eager)


def test_quality_table():
    """The rows come in the order of these selections, with the second and third of each settings
    said to be those of the first."""
    selections = [
        *("pbs, paper", "unpermuted, paper", "pooled, paper"),
        *("pbs, narrow", "unpermuted, narrow", "pooled, narrow"),
        *("window", "truncated"),
    ]
    files = {"Qwen": "quality_qwen_32768_h200.csv", "SmolLM2": "quality_smollm2_h200.csv"}
    probes = {"loss": "text", "repeat": "copy", "keys": "pass key"}
    columns = [f"{model}: {probe}" for model in files for probe in probes]
    found = table_with(columns)
    assert len(found) == len(selections)
    for model, file in files.items():
        rows = read(file)
        by_probe = curves.summarize(rows)
        for selection, said in zip(selections, found, strict=True):
            for column, probe in probes.items():
                value = curves.at_density(by_probe[probe][selection], 0.3)
                assert says(said[f"{model}: {column}"], value), (model, selection, column)
        keys = [row for row in rows if row["probe"] == "pass key" and row["selection"] == "dense"]
        right = sum(int(row["right"]) for row in keys) / len(keys)
        lengths = " and ".join(sorted({row["tokens"] for row in keys}))
        words = f"{len(keys)} at {lengths} tokens (dense {right:.2f})"
        assert words in " ".join((ROOT / "README.md").read_text().split())


def test_threshold_tables():
    """One a model in the order of these files, each with both settings side by side."""
    path = ROOT / "docs" / "choosing.md"
    tables = [rows for names, rows in tables_in(path) if names[0] == "threshold"]
    files = [f"quality_{name}_h200.csv" for name in ("qwen_32768", "qwen_16384", "smollm2")]
    for file, table in zip(files, tables, strict=True):
        rows = [row for row in read(file) if row["selection"] == "pbs"]
        assert len(table) == len({row["threshold"] for row in rows})
        for threshold, *cells in table:
            for settings, said in (("paper", cells[:4]), ("narrow", cells[4:])):
                values = []
                for probe, columns in (
                    ("text", ("density", "loss_above_dense", "agreement")),
                    ("pass key", ("right",)),
                ):
                    group = [
                        row
                        for row in rows
                        if (row["settings"], row["threshold"], row["probe"])
                        == (settings, threshold, probe)
                    ]
                    values += [sum(float(r[c]) for r in group) / len(group) for c in columns]
                for text, value in zip(said, values, strict=True):
                    assert says(text, value), (file, threshold, settings, values)


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


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_preset_table(page):
    found = table_with({"preset", "loss of a repeat"}, ROOT / page)
    assert len(found) == len(PRESET_ROWS)
    for said in found:
        preset = re.match(r"`(.*?)`", said["preset"]).group(1)
        file, *setting = PRESET_ROWS[preset]
        rows = [row for row in read(file) if row["selection"] == "pbs"]
        for column in said.keys() - {"preset"}:
            probe, name = PRESET_COLUMNS[column]
            values = [
                float(row[name])
                for row in rows
                if [row["settings"], row["threshold"]] == setting and row["probe"] == probe
            ]
            assert says(said[column], sum(values) / len(values)), (preset, column)


UNSEEN = {
    "SmolLM2-135M, 8192": ("quality_smollm2_h100.csv",),
    "Qwen2.5-Coder-1.5B, 16384": ("quality_qwen_16384_h100.csv", "quality_qwen_keys_h100.csv"),
    "Qwen2.5-Coder-1.5B, 32768": ("quality_qwen_32768_h100.csv",),
}


def unseen(model):
    return [row for name in UNSEEN[model] for row in read(name)]


def assert_reaches(said, density, curve):
    """A least density; or the least or the last one that was measured, where that was enough or was
    not."""
    if density is None:
        above = float(said.removeprefix("above "))
        assert above <= curve[-1][0] < above + 0.01, said
    elif density == curve[0][0]:
        assert said.startswith("at most ") and says(said.removeprefix("at most "), density), said
    else:
        assert says(said, density), said


def test_goals_on_unseen_texts():
    names = {
        "loss at most 0.02": ("text", "loss .02"),
        "loss at most 0.01": ("text", "loss .01"),
        "0.95 of the mass visited": ("text", "mass .95"),
        "a repeat at 1.1 times dense's perplexity": ("copy", "repeat 1.1"),
        "all pass keys but 2 %": ("pass key", "keys"),
    }
    columns = {
        "pbs, balanced": ("`PBSConfig()`", "ms"),
        "pbs, num_samples=8": ("8 samples", "ms of 8 samples"),
        "pbs, paper": ("`paper`", "ms of `paper`"),
    }
    found = table_with({"goal", "ms of `paper`"}, ROOT / "docs" / "choosing.md")
    assert {said["model, tokens"] for said in found} == UNSEEN.keys()
    for said in found:
        rows = unseen(said["model, tokens"])
        probe, goal = names[said["goal"]]
        times = curves.summarize(rows, "op_ms")["text"]
        for name, (cell, ms) in columns.items():
            if name not in times:
                assert said[cell] == said[ms] == ""
                continue
            density = curves.goals(rows)[name][goal]
            assert_reaches(said[cell], density, curves.summarize(rows)[probe][name])
            time = None if density is None else curves.at_density(times[name], density)
            assert said[ms] == "" if time is None else says(said[ms], time), said
    text = " ".join((ROOT / "docs" / "choosing.md").read_text().split())
    dense = [curves.summarize(unseen(model), "op_ms")["text"]["dense"][0][1] for model in UNSEEN]
    assert "takes {:.2f} ms a layer of SmolLM2, {:.2f} and {:.2f} of Qwen".format(*dense) in text
    own, few, paper = (
        curves.goals(unseen("Qwen2.5-Coder-1.5B, 32768"))[name]["ms, loss .01"] for name in columns
    )
    shares = f"{few / paper:.2f} of the time of the paper's settings at a loss of 0.01, and 16 "
    assert f"{shares}samples in {own / paper:.2f}" in text
    masses = [
        curves.goals(unseen("Qwen2.5-Coder-1.5B, 16384"))[name]["mass .95"]
        for name in ("pbs, balanced", "pbs, paper")
    ]
    assert f"from {masses[0] / masses[1]:.2f} of their density on" in text


def test_permutation_on_unseen_texts():
    probes = {"loss": "text", "loss of a repeat": "copy", "keys": "pass key"}
    columns = {
        "`PBSConfig()`": "pbs, balanced",
        "no permutation": "unpermuted, balanced",
        "pooled means": "pooled, balanced",
    }
    found = table_with({"probe", *columns}, ROOT / "docs" / "choosing.md")
    for said in found:
        of_probe = curves.summarize(unseen(said["model, tokens"]))[probes[said["probe"]]]
        for cell, name in columns.items():
            value = curves.at_density(of_probe.get(name, []), float(said["density"]))
            assert said[cell] == "" if value is None else says(said[cell], value), said


def test_readme_of_unseen_texts():
    goals = {model: curves.goals(unseen(model)) for model in UNSEEN}
    text = " ".join((ROOT / "README.md").read_text().split())
    own, paper = ([of[f"pbs, {name}"] for of in goals.values()] for name in ("balanced", "paper"))
    loss = [f"{of['loss .02']:.3f}" for of in own]
    assert "is {} for SmolLM2, {} for Qwen".format(*loss) in text
    assert f"and {loss[2]} at 32768 " in text
    assert "(paper: {:.3f}, {:.3f}, {:.3f})".format(*(of["loss .02"] for of in paper)) in text
    assert f"dense attention from {own[0]['keys']:.3f} on by SmolLM2, and" in text
    assert f"by Qwen at {own[1]['keys']:.3f} already" in text
    assert {of["keys"] for of in paper[:2]} == {None}
    dense = curves.summarize(read("quality_qwen_32768_h100.csv"), "op_ms")["text"]["dense"][0][1]
    words = "after {:.2f} ms with the default, {:.2f} with 8 samples, {:.2f} with the paper"
    words += "'s settings and {:.2f}"
    few = goals["Qwen2.5-Coder-1.5B, 32768"]["pbs, num_samples=8"]
    times = (of["ms, loss .01"] for of in (own[2], few, paper[2]))
    assert words.format(*times, dense) in text


def test_number_of_samples_for_a_larger_model():
    found = table_with({"samples", "least density"}, ROOT / "docs" / "choosing.md")
    names = {"16": "balanced", "8": "num_samples=8", "4": "num_samples=4"}
    goals = curves.goals(read("quality_tuning_qwen_32768_h100.csv"))
    assert [said["samples"] for said in found] == list(names)
    for said in found:
        reached = goals[f"pbs, {names[said['samples']]}"]
        assert says(said["least density"], reached["loss .01"])
        assert says(said["ms"], reached["ms, loss .01"])


def test_recall_of_qwen_layers():
    rows = read("recall_qwen_layers_cpu.csv")
    found = table_with({"settings", "layer 14"}, ROOT / "docs" / "choosing.md")
    assert len(found) == 7
    for said in found:
        settings = said["settings"].strip("`")
        for layer in ("14", "26"):
            curve = sorted(
                (float(row["density"]), -float(row["recalled"]))
                for row in rows
                if (row["settings"], row["layer"]) == (settings, layer)
            )
            value = curves.least_density(curve, -0.95)
            text = said[f"layer {layer}"]
            if value is None:
                assert float(text.removeprefix("above ")) <= curve[-1][0]
            else:
                assert says(text, value), (settings, layer)


def test_recall_of_qwen():
    rows = read("recall_qwen_8192_cpu.csv")
    of_bench = {"selection": "pbs", "probe": "text", "loss_above_dense": "", "op_ms": ""}
    goals = curves.goals([row | of_bench for row in rows])
    found = table_with({"settings", "0.95 of the mass"}, ROOT / "docs" / "choosing.md")
    assert {said["settings"].strip("`") for said in found} == {row["settings"] for row in rows}
    for said in found:
        value = goals[f"pbs, {said['settings'].strip('`')}"]["mass .95"]
        assert says(said["0.95 of the mass"], value), said


def test_goals_table():
    goals = curves.goals(read(TUNING))
    names = {
        "`PBSConfig()`": "pbs, balanced",
        "8 samples": "pbs, num_samples=8",
        "32 samples (`accurate`)": "pbs, accurate",
        "an order a query head, 64 heavy keys": "pbs, permute_per=query_head,num_heavy=64",
        '`mass="causal"`': "pbs, mass=causal",
        '`mass="causal"`, 8 samples': "pbs, mass=causal,num_samples=8",
        "`paper`": "pbs, paper",
    }
    columns = {
        "the loss is at most 0.02": "loss .02",
        "0.95 of dense's attention mass is visited": "mass .95",
        "a repeat has 1.1 times dense's perplexity": "repeat 1.1",
        "all keys but 2 % are read": "keys",
    }
    found = table_with(columns, ROOT / "docs" / "choosing.md")
    assert len(found) == len(names)
    densest = curves.summarize(read(TUNING))["text"]
    for said in found:
        name = names[said["settings"]]
        for column, goal in columns.items():
            assert_reaches(said[column], goals[name][goal], densest[name])
    of_causal = curves.goals(read("quality_tuning_causal_smollm2_h100.csv"))
    long, short = (
        [f"{of_causal[name][goal]:.3f}" for goal in columns.values()]
        for name in ("pbs, segment_size=512", "pbs")
    )
    words = "are {}, {}, {} and {}, those of 256 {}, {}, {} and {}".format(*long, *short)
    assert words in " ".join((ROOT / "docs" / "choosing.md").read_text().split())


def curves_of_prototypes(name):
    rows = [{**row, "selection": row["variant"], "settings": ""} for row in read(name)]
    return curves.summarize(rows)


def test_antidiagonal_table():
    by_probe = curves_of_prototypes("quality_antidiagonal_smollm2_cpu.csv")
    column = "a block weighs, at 4096 tokens"
    names = {
        "the largest share of 16 queries": "s16 max top",
        "its antidiagonals, stride 8": "antidiagonal 8",
        "its antidiagonals, stride 16": "antidiagonal 16",
        "its antidiagonals, stride 8, no permutation": "antidiagonal 8 unpermuted",
    }
    found = table_with({column, "loss of a repeat"}, ROOT / "docs" / "choosing.md")
    assert {said[column] for said in found} == names.keys()
    for said in found:
        for cell, probe in (("loss", "text"), ("loss of a repeat", "copy")):
            value = curves.at_density(by_probe[probe][names[said[column]]], 0.2)
            assert says(said[cell], value), said


def test_prototype_tables():
    by_probe = curves_of_prototypes("quality_prototypes_smollm2_h100.csv")
    variants = {
        "a block weighs": {
            "the largest share of 16 queries": "s16 max",
            "the root mean square of 16": "s16 rms",
            "the mean of 16": "s16",
            "the mean of 32": "s32",
            "half the mean of 8, half the pooled mean": "s8 mix mean",
            "the mean of 8": "s8",
            "the attention of the means of 16 groups of 8 queries": "g16",
            "pooled means, narrow blocks": "narrow mean",
        },
        "with the mean of 16, changed": {
            "nothing": "s16",
            "each head in the order that visits less": "s16 both",
            "no permutation": "s16 unpermuted",
            "a full sort": "s16 sort",
            "16 heavy keys": "s16 heavy16",
            "64 heavy keys": "s16 heavy64",
            "importance from sampled queries of all blocks": "s16 imp samp",
            "the segment before the own always visited": "s16 window1",
            "blocks above a fixed share instead of a threshold on the sum": "s16 abs",
            "key blocks of 64": "s16 kv64",
        },
    }
    for column, names in variants.items():
        found = table_with({column, "loss of a repeat"}, ROOT / "docs" / "choosing.md")
        assert {said[column] for said in found} == names.keys()
        for said in found:
            name = names[said[column]]
            for cell, probe in (("loss", "text"), ("loss of a repeat", "copy")):
                curve = by_probe[probe][name]
                value = curves.at_density(curve, 0.2)
                if value is None or said[cell].startswith("at most"):
                    value = next(y for x, y in reversed(curve) if x <= 0.201)
                assert says(said[cell].removeprefix("at most "), value), (name, cell)


def test_sampled_times():
    rows = read("select_sampled_h100.csv")
    found = table_with({"8 samples", "mean scores"}, ROOT / "docs" / "kernel-log.md")
    assert len(found) == 3
    columns = {"dense": "dense_ms", "8 samples": "sampled_8_ms", "16": "sampled_16_ms"}
    columns |= {"32": "sampled_32_ms", "mean scores": "mean_ms"}
    for said in found:
        row = find(rows, tokens=said["tokens"], q_heads="32")
        assert {c: said[c] for c in columns} == {c: row[n] for c, n in columns.items()}
    last = find(rows, tokens="131072", q_heads="32")
    words = f"{float(last['sampled_16_ms']):.1f} ms of the {float(last['dense_ms']):.1f} that dense"
    text = " ".join((ROOT / "README.md").read_text().split())
    assert words in text
    assert f"mean scores of the same blocks take {float(last['mean_ms']):.1f} (" in text


def test_heads_that_permutation_harms():
    rows = read("heads_smollm2_h100.csv")
    gains = {}
    for row in rows:
        sign = 1 if row["selection"] == "pbs" else -1
        place = row["layer"], row["head"]
        gains[place] = gains.get(place, 0.0) + sign * float(row["density"]) / 5
    harmed = [gain for gain in gains.values() if gain > 1e-9]
    assert {row["threshold"] for row in rows} == {f"{PBSConfig().resolved_threshold:g}"}
    words = f"{len(harmed)} of {len(gains)} heads visit more"
    text = " ".join((ROOT / "docs" / "choosing.md").read_text().split())
    assert words in text
    assert f"by at most {max(harmed):.4f} of all pairs" in text


def test_heads_of_a_larger_model():
    """Those that need a higher density for 0.95 of their mass in permuted order."""
    points = {}
    for row in read("heads_qwen_8192_cpu.csv"):
        place = row["layer"], int(row["head"])
        point = float(row["density"]), -float(row["recalled"])
        points.setdefault(place, {}).setdefault(row["selection"], []).append(point)
    losses = [
        curves.least_density(sorted(of["pbs"]), -0.95)
        - curves.least_density(sorted(of["unpermuted"]), -0.95)
        for of in points.values()
    ]
    harmed = [loss for loss in losses if loss > 0]
    words = f"{len(harmed)} of {len(losses)} need more, by at most {max(harmed):.4f}, and the mean "
    words += f"head {-sum(losses) / len(losses):.3f} less"
    assert words in " ".join((ROOT / "docs" / "choosing.md").read_text().split())


def test_settings_table():
    by_probe = curves.summarize(read("quality_settings_cpu.csv"))
    probes = {"loss of the last half": "text", "loss of a repeat": "copy"}
    found = table_with({"settings", *probes}, ROOT / "docs" / "choosing.md")
    assert len(found) == len(by_probe["text"]) - 1  # all but dense
    for said in found:
        for column, probe in probes.items():
            curve = by_probe[probe]["pbs, " + said["settings"].strip("`")]
            assert says(said[column], curves.at_density(curve, 0.4)), (said["settings"], column)


def test_prefill_table():
    columns = {
        "density": "density",
        "dense": "dense_s",
        "PBS": "pbs_s",
        "speed-up": "speedup",
        "bound": "bound",
    }
    rows = read("prefill_h200.csv")
    found = table_with(columns)
    assert len(found) == len(rows)
    for said in found:
        assert_says(said, find(rows, tokens=said["tokens"]), columns)


# The kernel log and the README's single figures against their CSVs


KERNEL_LOG = ROOT / "docs" / "kernel-log.md"


def words_of(path):
    return " ".join(path.read_text().split())


def figures(pattern, path=KERNEL_LOG):
    """The figures that stand where a sentence of a document has `#`."""
    number = r"(\d*\.?\d+)"
    escaped = re.escape(pattern).replace(r"\ ", r"\s+").replace(r"\#", number)
    (found,) = re.findall(escaped, words_of(path))
    return [found] if isinstance(found, str) else list(found)


def assert_figures(pattern, values, path=KERNEL_LOG):
    """A sentence's figures against values, each to the digits that it shows."""
    said = figures(pattern, path)
    assert len(said) == len(values), (pattern, said, values)
    for text, value in zip(said, values, strict=True):
        assert says(text, float(value)), (pattern, text, value)


def test_cpu_table():
    rows = read("cpu.csv")
    columns = {"density": "density", "dense": "dense_ms", "`attention`": "attention_ms"}
    columns |= {stage: f"{stage}_ms" for stage in STAGES}
    columns["`attention` / (density × dense)"] = "attention_over_density_x_dense"
    found = table_with(columns)
    assert {said["threshold"] for said in found} == {row["threshold"] for row in rows}
    for said in found:
        assert_says(said, find(rows, threshold=said["threshold"], seed="0"), columns)
    ratios = [float(row["attention_over_density_x_dense"]) for row in read("cpu_avx2.csv")]
    assert {row["cpu_capability"] for row in read("cpu_avx2.csv")} == {"avx2"}
    words = "the last column lies between # and #"
    assert_figures(words, (min(ratios), max(ratios)), README)


def test_log_of_attend_beside_flash_attention():
    """The table of attend beside FlashAttention-4."""
    rows = read("attend_fa4_h200.csv")
    columns = {"attend": "pbs", "FA4 block-sparse": "fa4_sparse"}
    columns |= {"cuDNN dense": "cudnn_dense", "FA4 dense": "fa4_dense"}
    found = table_with(columns, KERNEL_LOG)
    of_table = [r for r in rows if (r["lists"], r["kv_block_size"]) == ("random", "128")]
    assert len(found) == len(of_table)
    for said in found:
        (row,) = [
            row
            for row in of_table
            if row["tokens"] == said["tokens"] and says(said["density"], float(row["density"]))
        ]
        rates = {name: row[f"{name}_tflops"] for name in columns.values()}
        for column, name in columns.items():
            assert bool(said[column]) == bool(rates[name]), said
            assert not rates[name] or says(said[column], float(rates[name])), said
        ratio, _ = said["ratio (asked)"].split()
        assert says(ratio, float(row["fa4_sparse_ms"]) / float(row["pbs_ms"])), said
        if rates["fa4_dense"]:
            dense = max(float(rates["cudnn_dense"]), float(rates["fa4_dense"]))
            assert says(said["attend / best dense"], float(rates["pbs"]) / dense), said


def rate(rows, **values):
    return float(find(rows, **values)["pbs_tflops"])


def test_log_of_attend():
    rows = read("attend_h200.csv")
    table = table_with({"version (commit)", "learnt"}, KERNEL_LOG)
    (version_5,) = [said for said in table if said["version (commit)"].startswith("5 ")]
    assert version_5["version (commit)"] == f"5 ({rows[0]['commit']})"
    random = [row for row in rows if row["lists"] == "random"]
    wide = [row for row in random if row["kv_block_size"] == "128"]
    for column, tokens in (
        ("N 8192, density .26 / 1", "8192"),
        ("N 32768, .22 / 1", "32768"),
        ("N 131072, .20 / 1", "131072"),
    ):
        density = re.search(r"\.(\d\d)", column)[1]
        for text, start in zip(version_5[column].split(" / "), (density, "1"), strict=True):
            (row,) = [
                row
                for row in wide
                if row["tokens"] == tokens
                and (f"{float(row['density']):.2f}" in (f"0.{start}", f"{start}.00"))
            ]
            assert says(text, float(row["pbs_tflops"])), (column, text)
    narrow = {}
    for row in random:
        place = row["tokens"], f"{float(row['density']):.2f}"
        narrow.setdefault(row["kv_block_size"], {})[place] = float(row["pbs_tflops"])
    shares = {
        width: {place: x / narrow["128"][place] for place, x in narrow[width].items()}
        for width in ("64", "32")
    }
    words = "64: # to #, below .97 at N 8192, density .17 (#) and 1 (#), and at N 32768, .07 (#) "
    words += "and .41 (#); 32: # to #, but # and # at N 8192, density .12 and .17."
    low = [("8192", "0.17"), ("8192", "1.00"), ("32768", "0.07"), ("32768", "0.41")]
    assert sorted(low) == sorted(place for place, x in shares["64"].items() if x < 0.97)
    missed = [("8192", "0.12"), ("8192", "0.17")]
    others = [x for place, x in shares["32"].items() if place not in missed]
    assert_figures(
        words,
        [
            *(min(shares["64"].values()), max(shares["64"].values())),
            *(shares["64"][place] for place in low),
            *(min(others), max(others)),
            *(shares["32"][place] for place in missed),
        ],
    )
    times = [find(rows, lists=lists)["pbs_ms"] for lists in ("uneven", "even")]
    assert_figures("as dense as the others: # ms against # ms for the same spread evenly", times)


def test_log_of_attend_in_the_second_run():
    ratios = {
        (row["tokens"], f"{float(row['density']):.2f}"): float(row["fa4_sparse_ms"])
        / float(row["pbs_ms"])
        for row in read("attend_h200.csv")
        if row["fa4_sparse_ms"]
    }
    words = "in the second run (attend_h200.csv) these are # and #, and N 131072, .055 and .2 "
    words += "are # and # where"
    places = [("32768", "0.07"), ("131072", "0.10"), ("131072", "0.05"), ("131072", "0.20")]
    assert_figures(words, [ratios[place] for place in places])


def test_log_of_attend_on_real_lists():
    rows = read("attend_real_h200.csv")
    name = "qwen2.5-coder-1.5b_layer{}_16384"
    wide = find(rows, lists=name.format(26), kv_block_size="128")
    assert_figures("attend_real_h200.csv)): #,", [wide["pbs_tflops"]])
    words = "FlashAttention-4 # on the same lists, # dense; key blocks of 64 and 32 rows # and #"
    narrow = [rate(rows, lists=name.format(26), kv_block_size=width) for width in ("64", "32")]
    assert_figures(words, [wide["fa4_sparse_tflops"], wide["fa4_dense_tflops"], *narrow])
    other = find(rows, lists=name.format(14), kv_block_size="128")
    values = [other["density"], other["pbs_tflops"]]
    assert_figures("does not help, density #: #, without FlashAttention-4", values)
    assert not other["fa4_sparse_ms"]
    assert_figures("the paper's selection, density #, [attend_real", [wide["density"]])


def test_log_of_attend_by_head_dim():
    rows = [row for row in read("attend_dims_h200.csv") if row["dtype"] == "float16"]
    d64, d128, d256 = (find(rows, head_dim=str(dim)) for dim in (64, 128, 256))
    values = [x[f"{name}_tflops"] for x in (d64, d128) for name in ("pbs", "fa4_sparse")]
    words = "float16 D=64 # (FlashAttention-4 #), D=128 # (#), D=256 # (it takes"
    assert_figures(words, [*values, d256["pbs_tflops"]])
    assert not d256["fa4_sparse_ms"]
    assert_figures("N 32768, density # ([attend_dims", [d64["density"]])


STAGE_ROWS = {
    "score_keys": ("kv_head", "score_keys_kernel_ms", "score_keys_floor_ms"),
    "sort_segments": ("kv_head", "sort_segments_kernel_ms", "sort_segments_floor_ms"),
    "permute_kv": ("kv_head", "permute_kv_kernel_ms", "permute_kv_floor_ms"),
    "select_blocks": ("kv_head", "select_blocks_kernel_ms", "select_blocks_floor_ms"),
    "all, permutation a KV head (asked)": (
        *("kv_head", "before_attend_kernel_ms", "before_attend_floor_ms"),
    ),
    "sort_segments, a query head": (
        *("query_head", "sort_segments_kernel_ms", "sort_segments_floor_ms"),
    ),
    "permute_kv, a query head": ("query_head", "permute_kv_kernel_ms", "permute_kv_floor_ms"),
    "all, permutation a query head (asked)": (
        *("query_head", "before_attend_kernel_ms", "before_attend_floor_ms"),
    ),
}


def test_log_of_the_stages():
    """Microseconds by stage; of `called one by one` the first row belongs to KV heads."""
    rows = read("pipeline_bfe7c62_h200.csv")
    (lines,) = [
        lines
        for names, lines in tables_in(KERNEL_LOG)
        if names == ["", "8192", "floor", "32768", "floor", "131072", "floor"]
    ]
    apart = iter(("kv_head", "query_head"))
    for name, *cells in lines:
        for nth, tokens in enumerate(("8192", "32768", "131072")):
            of = {per: find(rows, tokens=tokens, permute_per=per) for per in PERMUTE_PER}
            said, floor = cells[2 * nth].split(" (")[0], cells[2 * nth + 1]
            if name in STAGE_ROWS:
                per, time, least = STAGE_ROWS[name]
                assert says(said, 1e3 * float(of[per][time])), (name, tokens)
                assert says(floor, 1e3 * float(of[per][least])), (name, tokens)
            elif name.startswith("extra memory"):
                for text, per in zip(said.split(" / "), PERMUTE_PER, strict=True):
                    assert says(text, float(of[per]["extra_gib"])), (name, tokens)
            else:
                assert name == "called one by one and added up"
                per = next(apart) if nth == 0 else per
                assert says(said, 1e3 * float(of[per]["before_attend_ms"])), (per, tokens)
    assert next(apart, None) is None


def test_log_of_narrow_blocks():
    rows = read("pipeline_blocks_h200.csv")
    times = [
        1e3 * float(find(rows, tokens=tokens, kv_block_size=width)["select_blocks_kernel_ms"])
        for tokens in ("8192", "32768", "131072")
        for width in ("64", "32")
    ]
    words = "select_blocks takes # and #, # and #, # and #; the other stages the same"
    assert_figures(words, times)


def test_log_of_the_whole_operator():
    rows = read("pipeline_bfe7c62_h200.csv")
    lengths = ("8192", "16384", "32768", "65536", "131072")
    of = {
        per: [find(rows, tokens=tokens, permute_per=per) for tokens in lengths]
        for per in PERMUTE_PER
    }
    words = "# (1.2) at 8192 tokens and density #, # (1.6) at 16384 and #, # (2.1) at 32768 and #, "
    words += "# (3.0) at 65536 and #, # (4.0) at 131072 and #. One permutation a query head: "
    words += "#, #, #, # and #."
    by_kv_head = [row[name] for row in of["kv_head"] for name in ("speedup", "density")]
    assert_figures(words, [*by_kv_head, *(row["speedup"] for row in of["query_head"])])


def test_log_of_real_activations():
    rows = read("pipeline_real_bfe7c62_h200.csv")

    def column(layer, per, name):
        place = {"input": f"qwen2.5-coder-1.5b_layer{layer}_16384", "permute_per": per}
        return [find(rows, kv_block_size=width, **place)[name] for width in ("128", "64", "32")]

    words = "layer 26, KV head, #, # and # at densities #, # and #; query head #, # and # at #, # "
    words += "and #; layer 14 #, #, # (#, #, #) and #, #, # (#, #, #)."
    values = [
        value
        for layer in (26, 14)
        for per in PERMUTE_PER
        for name in ("speedup", "density")
        for value in column(layer, per, name)
    ]
    assert_figures(words, values)
    assert {row["threshold"] for row in rows} == {"0.9000"}
    words = "one call takes # times less than the dense kernel at density #, one permutation a KV "
    words += "head, and # times less at #, one a query head and key blocks of 32 rows"
    first = [column(26, "kv_head", name)[0] for name in ("speedup", "density")]
    last = [column(26, "query_head", name)[2] for name in ("speedup", "density")]
    assert_figures(words, [*first, *last], README)


def test_long_prompts():
    rows = read("long_h200.csv")
    assert {row["tokens"] for row in rows} == {"1048576"}
    own = find(rows, permute_per="kv_head", kv_block_size="128")
    each = find(rows, permute_per="query_head", kv_block_size="128")
    words = "1048576 tokens takes # s at density # and # GiB beyond its inputs"
    values = [float(own["attention_ms"]) / 1e3, own["density"], own["extra_gib"]]
    assert_figures(words, values, README)
    words = (
        "density # ([long_h200.csv](../benchmarks/results/long_h200.csv)): # ms and # GiB beyond "
    )
    words += (
        "inputs and output with one permutation a KV head, # ms and # GiB with one a query head"
    )
    values = [row[name] for row in (own, each) for name in ("attention_ms", "extra_gib")]
    assert_figures(words, [own["density"], *values])
    worst = max(float(row["output_error"]) for row in rows)
    words = "# sampled rows against float64 on the keys they visit, in root mean square: at most #"
    assert_figures(words, [own["sampled_rows"], worst])
    of_kv_head = [row for row in rows if row["permute_per"] == "kv_head"]
    words = "select_blocks takes #, # and # ms of #, # and # with key blocks of 128, 64 and 32"
    names = ("select_blocks_ms", "attention_ms")
    assert_figures(words, [row[name] for name in names for row in of_kv_head])


def test_every_csv_is_read_or_named():
    """By the name of the file, in a test or in a document."""
    files = sorted(RESULTS.glob("*.csv"))
    assert files
    text = "\n".join(path.read_text() for path in [*DOCUMENTS, *ROOT.glob("tests/*.py")])
    assert not [path.name for path in files if path.name not in text]
