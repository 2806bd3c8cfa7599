"""`pbs-attn bench serve` without vLLM: thresholds, rows, processes of engines, and its table. What
the probe counts is in test_bench_serving_probe.py."""

import importlib.machinery
import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from doc_tables import RESULTS

from pbs_attn import PBSConfig, _library, cli
from pbs_attn._environment import RUN
from pbs_attn._errors import BenchError, DemoError
from pbs_attn._rows import read_rows, write_csv
from pbs_attn.bench import serving, serving_engine
from pbs_attn.bench.options import MODES, ServeOptions
from pbs_attn.bench.shapes import SHAPES

pytest.importorskip("tqdm")
LENGTHS = (8192, 4096)
OPTIONS = ServeOptions(
    preset="smollm2-135m", tokens=LENGTHS, densities=("8192:0.1",), chunk=2048, requests=3,
    request_tokens=4096, answer_tokens=5, rounds=3,
)  # fmt: skip
MINUTE = 60.0


# Thresholds


def test_interpolation_is_straight_on_logarithms():
    points = [(0.1, 0.05), (0.001, 0.8), (0.01, 0.2)]  # in no order
    assert serving_engine.on_logs(points, 0.01) == pytest.approx(0.2)
    assert serving_engine.on_logs(points, math.sqrt(0.001 * 0.01)) == pytest.approx(0.4)
    assert serving_engine.on_logs(points, math.sqrt(0.01 * 0.1)) == pytest.approx(0.1)
    assert serving_engine.on_logs(points, 1e-6) == 0.8
    assert serving_engine.on_logs(points, 0.5) == 0.05
    assert serving_engine.on_logs([(0.1, 3.0), (0.1, 5.0)], 0.1) == 3.0


def test_threshold_for_inverts_the_density():
    found = [(threshold, 0.001 / threshold) for threshold in (0.002, 0.008, 0.032)]
    for density in (0.4, 0.2, 0.05, 0.04):
        threshold = serving_engine.threshold_for(found, density)
        assert threshold == pytest.approx(0.001 / density)
        assert serving_engine.on_logs(found, threshold) == pytest.approx(density)
    assert serving_engine.threshold_for(found, 0.9) == 0.002
    assert serving_engine.threshold_for(found, 0.001) == 0.032


def test_densities_weigh_the_heads_of_all_workers():
    counts = [{0.01: (30.0, 100.0), 0.1: (10.0, 100.0)}, {0.01: (60.0, 100.0), 0.1: (20.0, 100.0)}]
    assert serving_engine.densities_of(counts) == [(0.01, 0.45), (0.1, 0.15)]


# An engine


class FakeLLM:
    """A prefill takes a minute a prompt, a token after the first a second. Two workers visit
    0.001 / threshold."""

    def __init__(self, clock):
        self.clock, self.threshold, self.probed, self.calls = clock, None, None, []

    def generate(self, prompts, sampling, use_tqdm):
        assert (sampling.temperature, sampling.ignore_eos, use_tqdm) == (0, True, False)
        lengths = [len(prompt["prompt_token_ids"]) for prompt in prompts]
        tokens = {token for prompt in prompts for token in prompt["prompt_token_ids"]}
        assert tokens <= set(range(2, SHAPES[OPTIONS.preset].vocab_size)) and len(tokens) > 1000
        self.calls.append((lengths, sampling.max_tokens, self.threshold))
        first = self.clock[0] + MINUTE * len(prompts)
        self.clock[0] = first + sampling.max_tokens - 1
        metrics = SimpleNamespace(first_token_ts=first, last_token_ts=self.clock[0])
        return [SimpleNamespace(metrics=metrics) for _ in prompts]

    def apply_model(self, function):
        name = getattr(function, "func", function).__name__
        given = getattr(function, "keywords", {})
        if name == "set_threshold":
            self.threshold = given["threshold"]
        elif name == "start_probe":
            self.probed = given["thresholds"]
        else:
            assert name == "stop_probe"
            return [{t: (min(1.0, 0.001 / t), 1.0) for t in self.probed} for _ in range(2)]
        return [None, None]


@pytest.fixture
def measure(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(serving_engine.time, "perf_counter", lambda: clock[0])
    fake = SimpleNamespace(SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", fake)

    def run(mode, part):
        llm = FakeLLM(clock)
        about = dict.fromkeys(serving_engine.COLUMNS, "x") | {"mode": mode, "part": part}
        return llm, list(serving_engine.Engine(llm, OPTIONS, mode, part, about).rows())

    return run


def test_rows_of_a_dense_engine(measure):
    llm, rows = measure("dense", "chunked")
    assert llm.threshold is None and llm.probed is None
    assert all(row["threshold"] == row["density"] == "" for row in rows)
    assert [(row["what"], row["tokens"], row["seconds"]) for row in rows] == [
        ("first token", "8192", "60.000000"),
        ("first token", "4096", "60.000000"),
        ("decode step", "4096", "1.000000"),
        ("throughput", str(3 * (4096 + 5)), "184.000000"),
    ]
    assert [len(row["rounds"].split()) for row in rows] == [3, 3, 5, 1]
    assert all(tuple(row) == serving_engine.COLUMNS for row in rows)
    # One that does not count comes before each.
    assert [n for lengths, n, _ in llm.calls] == [1] * 8 + [129] * 5 + [2, 5]
    assert llm.calls[-1][0] == [4096] * 3


def test_rows_of_pbs_state_threshold_and_density(measure):
    llm, rows = measure("balanced", "chunked")
    default = PBSConfig.balanced().resolved_threshold
    said = [(row["what"], row["threshold"], row["density"]) for row in rows]
    assert said == [
        ("first token", "0.01000", "0.1000"),  # the density asked for
        ("first token", f"{default:.5f}", "0.2000"),  # of a length without one
        ("decode step", f"{default:.5f}", "0.2000"),
        ("throughput", f"{default:.5f}", "0.2000"),
    ]
    timed = [threshold for lengths, n, threshold in llm.calls if lengths == [8192]]
    assert timed == [None] + [pytest.approx(0.01)] * 5  # two probes, a warm-up, three rounds
    assert {threshold for lengths, _, threshold in llm.calls if 4096 in lengths} == {default}


def test_prompts_in_one_piece_have_first_tokens_alone(measure):
    _, rows = measure("fast", "whole")
    assert [row["what"] for row in rows] == ["first token"] * 2


def test_what_vllm_is_made_with():
    dense = serving_engine.llm_options(OPTIONS, "dense", "whole")
    assert dense["attention_backend"] == "FLASH_ATTN" and "additional_config" not in dense
    assert dense["max_num_batched_tokens"] == 8192 and dense["max_model_len"] == 8192 + 129
    assert dense["compilation_config"] == {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
    pbs = serving_engine.llm_options(OPTIONS, "fast", "chunked")
    assert pbs["attention_backend"] == "CUSTOM" and pbs["max_num_batched_tokens"] == 2048
    assert pbs["additional_config"] == {"pbs_attn": {"preset": "fast"}}
    same = {"max_model_len", "max_num_seqs", "gpu_memory_utilization", "enable_prefix_caching"}
    assert {name: dense[name] for name in same} == {name: pbs[name] for name in same}
    quick = serving_engine.llm_options(ServeOptions(fast_start=True), "dense", "whole")
    assert quick["compilation_config"]["mode"] == 0
    assert quick["compilation_config"]["cudagraph_mode"] == "FULL_DECODE_ONLY"


@pytest.mark.parametrize("preset", SHAPES)
def test_every_preset_is_a_model_of_transformers(preset):
    transformers = pytest.importorskip("transformers")
    config = serving_engine.model_config(SHAPES[preset], 9000)
    (name,) = config["architectures"]
    assert hasattr(transformers, name)
    made = transformers.AutoConfig.for_model(**config)
    sizes = made.num_hidden_layers, made.num_key_value_heads, made.max_position_embeddings
    assert sizes == (SHAPES[preset].num_layers, SHAPES[preset].num_kv_heads, 9000)


# Processes of engines


def test_command_line_of_an_engine():
    command = serving.engine_command(OPTIONS, "fast", "whole")
    assert command[:3] == [sys.executable, "-m", serving_engine.__name__]
    asked = serving_engine.from_json(command[3])
    assert asked == {"options": OPTIONS, "mode": "fast", "part": "whole", "run": RUN}


def row_of(mode, part, seconds, what="first token", tokens="8192", **others):
    values = dict.fromkeys(serving_engine.COLUMNS, "") | {"tp": "1", "run": RUN}
    chunk = {"whole": "8192", "chunked": "2048"}[part]
    values |= {"mode": mode, "part": part, "chunk": chunk, "what": what, "tokens": tokens}
    return values | {"seconds": str(seconds), "density": "" if mode == "dense" else "0.1"} | others


@pytest.fixture
def machine(monkeypatch):
    """One where engines could start."""
    find = importlib.util.find_spec
    spec = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: spec if name == "vllm" else find(name, *more),
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(_library, "missing_gpu_support", lambda: None)
    plugins = SimpleNamespace(names={"pbs_attn"})
    monkeypatch.setattr(serving.importlib.metadata, "entry_points", lambda group: plugins)
    return plugins


def engines(monkeypatch, **scripts):
    """In place of engines, scripts by mode and part."""
    monkeypatch.setattr(
        serving,
        "engine_command",
        lambda options, mode, part: [sys.executable, "-c", scripts[f"{mode}_{part}"]],
    )


def printing(*rows, end=""):
    lines = [f"print('\\n' + {serving_engine.MARK!r} + {json.dumps(row)!r})" for row in rows]
    noise = "import os, sys; print('loading', end=''); print('a warning', file=sys.stderr)"
    return "\n".join([noise, *lines, end])


def test_rows_come_from_processes(machine, monkeypatch, tmp_path, capsys):
    rows = [row_of("dense", "whole", 4.0), row_of("fast", "whole", 1.6)]
    engines(monkeypatch, dense_whole=printing(rows[0]), fast_whole=printing(rows[1]))
    path = tmp_path / "rows.csv"
    options = ServeOptions(parts=("whole",), modes=("dense", "fast"), csv=str(path))
    assert serving.run(options) == rows == read_rows(path)
    out = capsys.readouterr().out
    assert out == serving.format_table(rows) + "\n" and "2.500" in out
    log = (tmp_path / "serve_fast_whole.log").read_text()
    assert "loading" in log and "a warning" in log and serving_engine.MARK not in log


def test_an_engine_that_fails_leaves_the_rows_of_the_others(machine, monkeypatch, tmp_path, capsys):
    first, last = row_of("dense", "whole", 4.0), row_of("fast", "whole", 2.0)
    failing = printing(first, end="raise SystemExit(3)")
    engines(monkeypatch, dense_whole=failing, fast_whole=printing(last))
    path = tmp_path / "rows.csv"
    options = ServeOptions(parts=("whole",), modes=("dense", "fast"), csv=str(path))
    log = tmp_path / "serve_dense_whole.log"
    with pytest.raises(BenchError, match=rf"got failures of dense whole, whose log is {log}$"):
        serving.run(options)
    assert read_rows(path) == [first, last]
    assert "2.000" in capsys.readouterr().out


def test_no_engine_starts_after_the_time_limit(machine, monkeypatch, tmp_path, capsys):
    row = row_of("dense", "whole", 4.0)
    engines(monkeypatch, dense_whole=printing(row))
    now = iter([0.0, 5.0, 11.0])
    monkeypatch.setattr(serving, "time", SimpleNamespace(monotonic=lambda: next(now)))
    options = ServeOptions(
        parts=("whole",), modes=("dense", "fast"), time_limit=10, csv=str(tmp_path / "rows.csv")
    )
    assert serving.run(options) == [row]
    assert "fast whole is left out: --time-limit is over" in capsys.readouterr().err


def test_engines_have_what_the_user_set(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")
    names = list(serving.ENVIRONMENT)
    code = f"""
import json, os
print({serving_engine.MARK!r} + json.dumps([os.environ[name] for name in {names}]))
"""
    rows = []
    assert serving.run_engine([sys.executable, "-c", code], tmp_path / "log", rows.append) == 0
    (found,) = rows
    expected = serving.ENVIRONMENT | {"VLLM_USE_FLASHINFER_SAMPLER": "1"}
    assert dict(zip(names, found, strict=True)) == expected


# The table


def test_table(tmp_path, capsys):
    rows = [
        row_of("dense", "whole", 4.0),
        row_of("balanced", "whole", 1.6),
        row_of("dense", "chunked", 4.5),
        row_of("balanced", "chunked", 2.25),
        row_of("fast", "chunked", 1.5, what="throughput"),
    ]
    assert list(serving.speedups(rows).values()) == [2.5, 2.0]
    assert list(serving.gains_in_chunks(rows).values()) == [0.8]
    path = tmp_path / "rows.csv"
    write_csv(path, rows)
    assert cli.main(["bench", "serve", "--table", str(path)]) == 0
    head, *lines, last = capsys.readouterr().out.splitlines()
    columns = "dense balanced balanced density dense / balanced fast fast density dense / fast"
    assert " ".join(head.split("tokens")[1].split()) == columns
    cells = [line.split()[-5:] for line in lines]
    assert cells[0] == ["8192", "4.0000", "1.6000", "0.1", "2.500"]
    assert cells[1][1:] == ["4.5000", "2.2500", "0.1", "2.000"]
    assert lines[2].split()[-3:] == ["8192", "1.5000", "0.1"]
    assert last == "balanced, 8192 tokens: the speed-up in chunks is 0.800 of the one in one piece"


def test_rows_of_other_sizes_are_not_compared():
    rows = [row_of("dense", "whole", 4.0, tp="2"), row_of("fast", "whole", 2.0)]
    assert serving.speedups(rows) == {}
    rows = [row_of("dense", "whole", 4.0, what="decode step"), row_of("fast", "whole", 2.0)]
    assert serving.speedups(rows) == {}


def test_committed_rows_have_the_columns():
    rows = serving.read_table(RESULTS / "serve_h100.csv")
    assert tuple(rows[0]) == serving_engine.COLUMNS
    for row in rows:
        rounds = sorted(map(float, row["rounds"].split()))
        assert float(row["seconds"]) == pytest.approx(rounds[len(rounds) // 2], abs=6e-5)
        assert bool(row["threshold"]) == bool(row["density"]) == (row["mode"] != "dense")
        assert row["mode"] in MODES


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "100"], "--tokens must be at least 4096, got [100]"),
        (["--request-tokens", "100"], "--request-tokens must be at least 4096, got 100"),
        (["--chunk", "64"], "--chunk must be at least 128, got 64"),
        (["--requests", "-1"], "--requests must be at least 0, got -1"),
        (["--answer-tokens", "0"], "--answer-tokens must be at least 1, got 0"),
        (["--rounds", "0"], "--rounds must be positive, got 0"),
        (["--csv", "/no/such/folder/x.csv"], "the folder of /no/such/folder/x.csv must exist"),
        (["--tensor-parallel-size", "3"], "--tensor-parallel-size must be at most 2, got 3"),
        *(
            (
                ["--densities", "32768:0.1", text],
                f"--densities must be TOKENS:DENSITY, such as 32768:0.05, got {text}",
            )
            for text in ("0.05", "32768:5", "32768:0", "a:0.5", "8192:nan")
        ),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, words, machine, capsys):
    assert cli.main(["bench", "serve", *arguments]) == 2
    assert capsys.readouterr().err == f"pbs-attn bench: {words}\n"


def test_a_machine_without_vllm_or_gpu_is_told(machine, monkeypatch):
    machine.names.clear()
    with pytest.raises(DemoError, match="pbs_attn must be installed where vLLM finds its plugin"):
        serving.run(OPTIONS)
    monkeypatch.setattr(_library, "missing_gpu_support", lambda: "the GPU is idle")
    with pytest.raises(DemoError, match="needs kernels for the GPU: the GPU is idle"):
        serving.run(OPTIONS)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DemoError, match="bench serve needs a CUDA GPU, but torch finds none"):
        serving.run(OPTIONS)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else find(name)
    )
    with pytest.raises(DemoError, match=r"needs vllm, .* pip install 'pbs-attn\[vllm\]'"):
        serving.run(OPTIONS)


def test_a_csv_of_another_bench_is_refused(tmp_path):
    with pytest.raises(BenchError, match=r"CSV must be of bench serve, got .*: there is no column"):
        serving.read_table(RESULTS / "kernel_h200.csv")
    with pytest.raises(BenchError, match="rows must be in a readable file"):
        serving.read_table(tmp_path / "none.csv")
