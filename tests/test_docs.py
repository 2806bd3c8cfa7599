"""The documents: links lead somewhere, code runs, and tables say what their CSV does."""

import csv
import re
from pathlib import Path

import pytest
import torch
from tiny_model import SIZES, save_model

from pbs_attn.bench import curves

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


@named([path for path in DOCUMENTS if code_blocks(path)])
def test_code_runs(path, tmp_path):
    """The blocks of a document in order, as one program."""
    transformers = pytest.importorskip("transformers")
    save_model(tmp_path, transformers.LlamaConfig(**SIZES))
    names = {"path": str(tmp_path)}
    with torch.no_grad():
        for block in code_blocks(path):
            exec(compile(block, str(path), "exec"), names)


def table_under(heading, columns):
    """Rows of the first table of the README below a heading that has these columns."""
    section = (ROOT / "README.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line] for line in lines]
    start = next(i for i, line in enumerate(lines) if set(columns) <= set(line))
    rows = []
    for line in lines[start + 2 :]:
        if len(line) != len(lines[start]) or set("".join(line)) <= set("-"):
            break
        rows.append(dict(zip(lines[start], line, strict=True)))
    assert rows
    return rows


def says(text, value):
    """Whether a rounded figure is that of the value."""
    digits = len(text.split(".")[1]) if "." in text else 0
    return float(text) == pytest.approx(value, abs=0.5001 * 10.0**-digits)


def read(name):
    with (RESULTS / name).open() as file:
        return list(csv.DictReader(file))


def find(rows, **values):
    (row,) = [row for row in rows if all(row[name] == value for name, value in values.items())]
    return row


def test_operator_table():
    heading = "Speed of the whole operator on a GPU"
    columns = {
        "density": "density",
        "before `attend`": "before_attend_ms",
        "`attend`": "attend_ms",
        "one call": "attention_ms",
        "best dense kernel": "fa4_dense_ms",
        "speed-up": "speedup",
    }
    rows = read("pipeline_h200.csv")
    for said in table_under(heading, columns):
        row = find(rows, tokens=said["tokens"], permute_per="kv_head")
        for column, name in columns.items():
            assert says(said[column], float(row[name])), (said["tokens"], column)
        assert float(row["fa4_dense_ms"]) <= float(row["cudnn_dense_ms"])


def test_stage_table():
    columns = {
        "score_keys": "score_keys",
        "sort_segments": "sort_segments",
        "permute_kv": "permute_kv",
        "select_blocks": "select_blocks",
        "all four": "before_attend",
    }
    rows = read("pipeline_h200.csv")
    for said in table_under("Speed of the whole operator on a GPU", columns):
        per = said["permutation per"].lower().replace(" ", "_")
        row = find(rows, tokens=said["tokens"], permute_per=per)
        for column, name in columns.items():
            microseconds = 1e3 * float(row[f"{name}_kernel_ms"])
            assert says(said[column], microseconds), (said["tokens"], per, column)
        if said["the same in eager PyTorch"]:
            eager = 1e3 * float(row["eager_before_attend_ms"])
            assert says(said["the same in eager PyTorch"], eager)


def test_quality_table():
    selections = {
        "PBS": "pbs",
        "the same without permutation": "unpermuted",
        "pooled means over all causal blocks": "pooled",
        "sliding window": "window",
        "dense, truncated prompt": "truncated",
    }
    probes = {
        "loss of the last half above dense": "text",
        "loss of a repeated passage above dense": "copy",
        "pass keys read back": "pass key",
    }
    by_probe = curves.summarize(read("quality_smollm2_cpu.csv"))
    found = table_under("What it costs", probes)
    assert [said["selection"] for said in found] == list(selections)
    for said in found:
        for column, probe in probes.items():
            curve = by_probe[probe][selections[said["selection"]]]
            assert says(said[column], curves.at_density(curve, 0.4)), (said["selection"], column)


def test_prefill_table():
    columns = {
        "density": "density",
        "dense": "dense_s",
        "PBS": "pbs_s",
        "speed-up": "speedup",
        "bound": "bound",
    }
    rows = read("prefill_h200.csv")
    found = table_under("Time to the first token", columns)
    assert len(found) == len(rows)
    for said in found:
        row = find(rows, tokens=said["tokens"])
        for column, name in columns.items():
            assert says(said[column], float(row[name])), (said["tokens"], column)
