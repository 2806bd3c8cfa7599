"""`pbs-attn bench chunks` on the CPU: its rows, and that each way runs and counts what it says."""

import dataclasses

import pytest
import torch
from sequence_cases import assert_same

import pbs_attn
from pbs_attn import PBSConfig, cli
from pbs_attn._environment import RUN
from pbs_attn._errors import BenchError
from pbs_attn._rows import read_rows
from pbs_attn.bench import chunks
from pbs_attn.bench.shapes import SHAPES, Shape
from pbs_attn.bench.stages import heavy_hitters

pytest.importorskip("tqdm")
CONFIG = dataclasses.replace(PBSConfig(), window=0, dense_tail=200)
LENGTH, CHUNK = 1500, 384


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", Shape("llama", 128, 256, 3, 4, 2, 64, 100))


@pytest.fixture(scope="module")
def prompt():
    return chunks.Prompt(*(x.float() for x in heavy_hitters(LENGTH, 4, 2, "cpu", 64)), CHUNK)


def prefill(way):
    """All rows (tokens, heads, head_dim), of a prompt in chunks."""
    way.prompt.out.fill_(torch.nan)
    rows = []
    for prepare, call in way.steps():
        prepare()
        rows.append(call())
    return way.prompt.out if rows == [None] * len(rows) else torch.cat(rows)


def test_rows(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    options = chunks.Options(
        preset="tiny", tokens=(1536, 2048), chunks=(512, 1024), densities=(0.8, 0.7), rounds=1,
        device="cpu", csv=str(path),
    )  # fmt: skip
    rows = chunks.run(options)
    assert read_rows(path) == rows
    assert capsys.readouterr().out.split()[: len(chunks.TABLE)] == list(chunks.TABLE)
    sizes = [(row["tokens"], row["chunk"]) for row in rows]
    assert sizes == [("1536", "512"), ("1536", "1024"), ("2048", "512"), ("2048", "1024")]
    for row, density in zip(rows, (0.8, 0.8, 0.7, 0.7), strict=True):
        assert (row["run"], row["page_size"], row["q_heads"], row["kv_heads"]) == (
            *(RUN, "256", "4", "2"),
        )
        for way in chunks.WAYS:
            assert float(row[f"{way}_density"]) == pytest.approx(density, abs=0.05)
            assert 0 < float(row[f"{way}_threshold"]) < 0.5
            assert float(row[f"{way}_ms"]) > 0
        speedup = float(row["paged_ms"]) / float(row["in_order_ms"])
        assert float(row["speedup"]) == pytest.approx(speedup, abs=2e-3)


def test_every_way_is_dense_at_threshold_1(prompt):
    ways = chunks.make_ways(prompt, CONFIG)
    dense = torch.nn.functional.scaled_dot_product_attention(
        prompt.q, prompt.k, prompt.v, is_causal=True, enable_gqa=True
    )
    for name, way in ways.items():
        assert way.set_threshold(1.0) == pytest.approx(1)
        if name == "whole":
            ((_, call),) = way.steps()
            out = call()
        else:
            out = prefill(way).transpose(0, 1)[None]
        torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)


def test_ways_agree_on_a_prompt_of_one_chunk():
    tensors = [x.float() for x in heavy_hitters(900, 4, 2, "cpu", 64)]
    ways = chunks.make_ways(chunks.Prompt(*tensors, 1024), CONFIG)
    shares = {name: way.set_threshold(0.02) for name, way in ways.items()}
    assert shares["paged"] == pytest.approx(shares["whole"])
    # Token 0 takes the place of another key.
    assert shares["in_order"] == pytest.approx(shares["whole"], abs=0.02)
    assert shares["whole"] < 0.95


@pytest.mark.parametrize("way", ["in_order", "paged"])
def test_density_counts_what_the_calls_visit(prompt, way, monkeypatch):
    """By the queries' outputs, where every key has a value of its own: no stage is asked."""
    way = chunks.make_ways(prompt, CONFIG)[way]
    density = way.set_threshold(0.03)
    assert density < 0.9
    visited = total = 0
    is_heavy = torch.zeros_like(prompt.v)
    for first, last in prompt.chunks:
        for begin in range(first, last, CONFIG.block_size):
            end = min(begin + CONFIG.block_size, last)
            total += 4 * -(-end // CONFIG.key_block_size)
    # A key's weight in a block of 64 columns at a time.
    for base in range(0, LENGTH, 64):
        value = is_heavy.clone()
        keys = torch.arange(base, min(base + 64, LENGTH))
        value[:, :, keys, keys - base] = 1
        monkeypatch.setattr(prompt, "v", value)
        out = prefill(way)
        for first, last in prompt.chunks:
            for begin in range(first, last, CONFIG.block_size):
                seen = (out[begin : min(begin + CONFIG.block_size, last)] != 0).any(0)
                visited += seen.sum().item() / CONFIG.key_block_size
    assert visited / total == pytest.approx(density, abs=0.01)


def test_the_last_chunk_alone_has_a_dense_tail(prompt):
    way = chunks.Paged(prompt, CONFIG)
    way.threshold = 0.1
    tails = [way.config_of(last).dense_tail for _, last in prompt.chunks]
    assert tails == [0, 0, 0, 200]
    assert prompt.chunks[-1] == (1152, 1500)


def test_pages_are_written_anew_for_every_prefill(prompt):
    """So that each of them finds a prompt in its own order."""
    way = chunks.InOrder(prompt, CONFIG)
    way.threshold = 0.03
    prefill(way)
    first = prompt.out.clone(), prompt.k_cache.clone(), prompt.v_cache.clone()
    assert not torch.equal(way.k_ordered, prompt.k)
    prefill(way)
    assert_same((prompt.out, prompt.k_cache, prompt.v_cache), first)


def test_times_leave_out_what_prepares(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(chunks.time, "perf_counter", lambda: now[0])

    def takes(seconds):
        def work():
            now[0] += seconds

        return work

    steps = [(takes(100), takes(0.25)), (takes(10), takes(0.5))]
    assert chunks.milliseconds(steps, torch.device("cpu")) == 750


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "100"], "--tokens must be at least 512, got [100]"),
        (["--chunks", "512", "100"], "--chunks must be multiples of 128, got [512, 100]"),
        (["--chunks", "0"], "--chunks must be multiples of 128, got [0]"),
        (["--rounds", "0"], "--rounds must be positive, got 0"),
        (["--densities", "0.5"], "--densities must have as many values as --tokens, got 1 for 2"),
        (["--csv", "/no/such/folder/x.csv"], "the folder of /no/such/folder/x.csv must exist"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, words, capsys):
    assert cli.main(["bench", "chunks", *arguments]) == 2
    assert capsys.readouterr().err == f"pbs-attn bench: {words}\n"


def test_settings_and_their_densities(monkeypatch):
    asked = []

    def reach(way, density):
        asked.append((way.config, density))
        return way.set_threshold(0.01)

    monkeypatch.setattr(chunks, "reach", reach)
    for settings, config in (("default", PBSConfig()), ("accurate", PBSConfig.accurate())):
        asked.clear()
        (row,) = chunks.run(
            chunks.Options(
                preset="tiny", tokens=(2048,), chunks=(1024,), settings=settings, rounds=1,
                device="cpu",
            )
        )  # fmt: skip
        assert row["selection"] == {"default": "balanced"}.get(settings, settings)
        assert asked == [(config, 0.48)] * len(chunks.WAYS)
    assert chunks.Options().settings == "default"


def test_no_settings_with_means(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "chunks", "--settings", "paper"])
    assert "invalid choice: 'paper'" in capsys.readouterr().err
    with pytest.raises(BenchError, match=r"--settings must be of default, .*, got paper"):
        chunks.run(chunks.Options(settings="paper"))
    assert pbs_attn.PBSConfig.paper().score == "mean"
