"""The documents: links resolve, code runs, and tables agree with their CSVs."""

import itertools
import re
import shlex

import pytest
import torch
from doc_tables import (
    BENCHMARKS,
    KERNEL_LOG,
    README,
    RESULTS,
    ROOT,
    assert_figures,
    assert_says,
    find,
    read,
    says,
    table_with,
    tables_in,
    words_of,
)
from tiny_model import SIZES, save_model

from pbs_attn import PBSConfig, cli, density, select
from pbs_attn._rows import STAGES
from pbs_attn.bench import curves
from pbs_attn.bench.options import PERMUTE_PER
from pbs_attn.bench.shapes import SHAPES
from pbs_attn.bench.stages import heavy_hitters

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
    assert {"README", "first-steps", "method", "scoring", "transformers"} <= names


# Those whose code is no single program: see below, and test_recipes.py.
APART = ("README.md", "recipes.md")


@named([path for path in DOCUMENTS if code_blocks(path) and path.name not in APART])
def test_code_runs(path, tmp_path, monkeypatch):
    """Runs the blocks of a document in order, as one program in its own folder."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path, transformers.LlamaConfig(**SIZES))
    names = {"path": str(tmp_path)}
    with torch.no_grad():
        for block in code_blocks(path):
            exec(compile(block, str(path), "exec"), names)


@pytest.mark.parametrize("nth", range(len(code_blocks(README))))
def test_each_block_of_the_readme_runs_as_pasted(nth, tmp_path, monkeypatch):
    """Runs each block alone, in a new namespace. The model that it names is at the path that it
    gives."""
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
    "block": (0.0005, 0.001, 0.003),
    "causal": (0.8, 0.9, 0.97),
    "earlier": (0.5, 0.8, 0.95),
}


def verb_for_more(mass):
    """The verb that describes how to change `threshold` to visit more."""
    q, k, v = (x.float() for x in heavy_hitters(2048, 4, 2, "cpu", 64))
    densities = []
    for threshold in THRESHOLDS[mass]:
        score = "sampled" if mass == "block" else "mean"
        rule = {"score": score, "mass": mass, "threshold": threshold}
        config = PBSConfig(**rule, window=0, dense_tail=0)
        mask = select(q, k, v, config=config).block_mask
        densities.append(density(mask, 2048, 2048, config=config).mean().item())
    steps = [after - before for before, after in itertools.pairwise(densities)]
    assert all(step > 0.01 for step in steps) or all(step < -0.01 for step in steps), densities
    return "raise" if steps[0] > 0 else "lower"


@pytest.mark.parametrize("mass", THRESHOLDS)
def test_advice_on_the_threshold_has_the_right_direction(mass):
    """Checks the sentences of the documents and of the command line that name this mass."""
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


def test_demo_table():
    """The figures of the demo's output are those of its CSV."""
    dense, pbs = read("demo_smollm2.csv")
    text = (ROOT / "docs" / "first-steps.md").read_text()
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
    rows = [row for row in read("kernel_h100.csv") if row["kv_block_size"] == "128"]
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
        dense = [row[f"{name}_dense_ms"] for name in ("flash", "cudnn", "fa4", "flex")]
        assert row["fa4_dense_ms"] == min(dense, key=lambda ms: float(ms or 0))
    text = words_of(BENCHMARKS)
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
        assert words in words_of(BENCHMARKS)


def test_sampled_times():
    rows = read("select_sampled_h100.csv")
    found = table_with({"8 samples", "mean scores"}, ROOT / "docs" / "kernel-log.md")
    assert len(found) == 3
    columns = {"dense": "dense_ms", "8 samples": "sampled_8_ms", "16": "sampled_16_ms"}
    columns |= {"32": "sampled_32_ms", "mean scores": "mean_ms"}
    for said in found:
        row = find(rows, tokens=said["tokens"], q_heads="32")
        assert {c: said[c] for c in columns} == {c: row[n] for c, n in columns.items()}


def test_prefill_table():
    columns = {
        "density": "density",
        "dense": "dense_s",
        "PBS": "pbs_s",
        "speed-up": "speedup",
        "bound": "bound",
    }
    rows = read("prefill_h100.csv")
    found = table_with(columns)
    assert len(found) == len(rows)
    for said in found:
        assert_says(said, find(rows, tokens=said["tokens"]), columns)


# The single figures of the kernel log and of the benchmarks against their CSVs


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
    assert_figures(words, (min(ratios), max(ratios)), BENCHMARKS)


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
        ratio, _ = said["ratio (target)"].split()
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
        ("N 8192, density 0.26 / 1", "8192"),
        ("N 32768, 0.22 / 1", "32768"),
        ("N 131072, 0.20 / 1", "131072"),
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
    low = [("8192", "0.17"), ("8192", "1.00"), ("32768", "0.07"), ("32768", "0.41")]
    assert sorted(low) == sorted(place for place, x in shares["64"].items() if x < 0.97)
    missed = [("8192", "0.12"), ("8192", "0.17")]
    others = [x for place, x in shares["32"].items() if place not in missed]
    words = (
        "64 rows reach # to #. They are below 0.97 at N 8192 with densities 0.17 (#) and 1 (#), "
    )
    words += "and at N 32768 with densities 0.07 (#) and 0.41 (#)"
    ends = min(shares["64"].values()), max(shares["64"].values())
    assert_figures(words, [*ends, *(shares["64"][place] for place in low)])
    words = "32 rows reach # to #, except for # and # at N 8192 with densities 0.12 and 0.17."
    ends = min(others), max(others)
    assert_figures(words, [*ends, *(shares["32"][place] for place in missed)])
    times = [find(rows, lists=lists)["pbs_ms"] for lists in ("uneven", "even")]
    words = (
        "as the others, the kernel takes # ms. It takes # ms when the same work is spread evenly"
    )
    assert_figures(words, times)


def test_log_of_attend_in_the_second_run():
    ratios = {
        (row["tokens"], f"{float(row['density']):.2f}"): float(row["fa4_sparse_ms"])
        / float(row["pbs_ms"])
        for row in read("attend_h200.csv")
        if row["fa4_sparse_ms"]
    }
    words = (
        "In the second run (attend_h200.csv) these ratios are # and #. At N 131072 and densities "
    )
    words += "0.055 and 0.2, the second run has # and #."
    places = [("32768", "0.07"), ("131072", "0.10"), ("131072", "0.05"), ("131072", "0.20")]
    assert_figures(words, [ratios[place] for place in places])


def test_log_of_attend_on_real_lists():
    rows = read("attend_real_h200.csv")
    name = "qwen2.5-coder-1.5b_layer{}_16384"
    wide = find(rows, lists=name.format(26), kv_block_size="128")
    words = "`attend` reaches # TFLOP/s, FlashAttention-4 # on the same lists, and dense "
    words += "FlashAttention-4 #. Key blocks of 64 and 32 rows reach # and #"
    narrow = [rate(rows, lists=name.format(26), kv_block_size=width) for width in ("64", "32")]
    names = ("pbs_tflops", "fa4_sparse_tflops", "fa4_dense_tflops")
    assert_figures(words, [*(wide[name] for name in names), *narrow])
    other = find(rows, lists=name.format(14), kv_block_size="128")
    values = [other["pbs_tflops"], other["density"]]
    assert_figures("does not help, `attend` reaches # at density #", values)
    assert not other["fa4_sparse_ms"]
    assert_figures("the paper's selection, at density # ([attend_real", [wide["density"]])


def test_log_of_attend_by_head_dim():
    rows = [row for row in read("attend_dims_h200.csv") if row["dtype"] == "float16"]
    d64, d128, d256 = (find(rows, head_dim=str(dim)) for dim in (64, 128, 256))
    values = [x[f"{name}_tflops"] for x in (d64, d128) for name in ("pbs", "fa4_sparse")]
    words = "D=64 reaches # TFLOP/s (FlashAttention-4 #), D=128 # (#) and D=256 # ([attend_dims"
    assert_figures(words, [*values, d256["pbs_tflops"]])
    assert not d256["fa4_sparse_ms"]
    assert_figures("With float16 at N 32768 and density #, D=64", [d64["density"]])


STAGE_ROWS = {
    "score_keys": ("kv_head", "score_keys_kernel_ms", "score_keys_floor_ms"),
    "sort_segments": ("kv_head", "sort_segments_kernel_ms", "sort_segments_floor_ms"),
    "permute_kv": ("kv_head", "permute_kv_kernel_ms", "permute_kv_floor_ms"),
    "select_blocks": ("kv_head", "select_blocks_kernel_ms", "select_blocks_floor_ms"),
    "all, one order per KV head (target)": (
        *("kv_head", "before_attend_kernel_ms", "before_attend_floor_ms"),
    ),
    "sort_segments, one order per query head": (
        *("query_head", "sort_segments_kernel_ms", "sort_segments_floor_ms"),
    ),
    "permute_kv, one order per query head": (
        "query_head",
        "permute_kv_kernel_ms",
        "permute_kv_floor_ms",
    ),
    "all, one order per query head (target)": (
        *("query_head", "before_attend_kernel_ms", "before_attend_floor_ms"),
    ),
}


def test_log_of_the_stages():
    """Microseconds by stage; of `sum of separate calls` the first row belongs to KV heads."""
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
                assert name == "sum of separate calls"
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
    words = "select_blocks takes # and # us at 8192 tokens, # and # at 32768, and # and # at 131072"
    assert_figures(words, times)


def test_log_of_the_whole_operator():
    rows = read("pipeline_bfe7c62_h200.csv")
    lengths = ("8192", "16384", "32768", "65536", "131072")
    of = {
        per: [find(rows, tokens=tokens, permute_per=per) for tokens in lengths]
        for per in PERMUTE_PER
    }
    targets = dict(zip(lengths, ("1.2", "1.6", "2.1", "3.0", "4.0"), strict=True))
    found = table_with({"one order per KV head (target)", "one order per query head"}, KERNEL_LOG)
    assert [said["tokens"] for said in found] == list(lengths)
    for said, own, each in zip(found, of["kv_head"], of["query_head"], strict=True):
        speedup, target = said["one order per KV head (target)"].rstrip(")").split(" (")
        assert target == targets[said["tokens"]]
        assert says(speedup, float(own["speedup"])), said
        assert says(said["density"], float(own["density"])), said
        assert says(said["one order per query head"], float(each["speedup"])), said


def test_log_of_real_activations():
    rows = read("pipeline_real_bfe7c62_h200.csv")

    def column(layer, per, name):
        place = {"input": f"qwen2.5-coder-1.5b_layer{layer}_16384", "permute_per": per}
        return [find(rows, kv_block_size=width, **place)[name] for width in ("128", "64", "32")]

    found = table_with({"layer", "one order per", "128 rows"}, KERNEL_LOG)
    places = [(said["layer"], said["one order per"]) for said in found]
    assert places == list(itertools.product(("26", "14"), ("KV head", "query head")))
    for said, (layer, of) in zip(found, places, strict=True):
        per = of.lower().replace(" ", "_")
        for nth, width in enumerate(("128", "64", "32")):
            figures = said[f"{width} rows"].rstrip(")").split(" (")
            for text, name in zip(figures, ("speedup", "density"), strict=True):
                assert says(text, float(column(layer, per, name)[nth])), (said, name)
    assert {row["threshold"] for row in rows} == {"0.9000"}
    words = "the dense kernel takes # times as long as one call at density # with one order per KV "
    words += "head, and # times as long at # with one order per query head and key blocks of 32"
    first = [column(26, "kv_head", name)[0] for name in ("speedup", "density")]
    last = [column(26, "query_head", name)[2] for name in ("speedup", "density")]
    assert_figures(words, [*first, *last], BENCHMARKS)


def test_long_prompts():
    (default,) = read("long_h100.csv")
    words = "the default settings on 1048576 tokens takes # s at density #"
    assert_figures(words, [float(default["attention_ms"]) / 1e3, default["density"]], BENCHMARKS)
    rows = read("long_h200.csv")
    assert {row["tokens"] for row in rows} == {"1048576"}
    own = find(rows, permute_per="kv_head", kv_block_size="128")
    each = find(rows, permute_per="query_head", kv_block_size="128")
    words = "1048576 tokens takes # s at density # and # GiB beyond its inputs"
    values = [float(own["attention_ms"]) / 1e3, own["density"], own["extra_gib"]]
    assert_figures(words, values, BENCHMARKS)
    words = (
        "density # takes # ms and # GiB beyond inputs and output with one order per KV head, and "
    )
    words += "# ms and # GiB with one order per query head"
    values = [row[name] for row in (own, each) for name in ("attention_ms", "extra_gib")]
    assert_figures(words, [own["density"], *values])
    worst = max(float(row["output_error"]) for row in rows)
    words = (
        "# sampled rows were compared with float64 on the keys they visit. Their root mean square "
    )
    words += "error is at most #"
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
