"""README.md is short, and its sentences agree with the CSVs. test_docs_tables.py checks its tables,
and test_docs.py its code and links."""

import statistics

import pytest
from doc_tables import README, assert_figures, find, read, words_of
from front_tables import MODEL, ROWS, first_token, front_quality, rows_of, speed
from preset_tables import PIPELINE, QUALITY, of_preset, ruler_runs, ruler_scores

from pbs_attn import PBSConfig
from pbs_attn.bench.ruler_table import average

RULER_LENGTHS = ("8192", "16384", "32768")


def test_it_is_read_in_three_minutes():
    """Cells of tables and code count as words."""
    assert len(README.read_text().split()) <= 900


def test_figures_of_the_demo():
    dense, pbs = read("demo_smollm2.csv")
    rise = 100 * (float(pbs["perplexity"]) / float(dense["perplexity"]) - 1)
    values = [float(pbs["prefill_s"]), float(dense["prefill_s"]), rise]
    words = (
        "On two threads of a Xeon, the prefill took # s instead of # s, and perplexity rose by # %"
    )
    assert_figures(words, values, README)
    assert {row["threads"] for row in (dense, pbs)} == {"2"}
    assert "Xeon" in dense["device"]


def test_conditions_of_the_speed_table():
    """One GPU and one shape; the operator and the first token visit the same density."""
    rows = [row for file in PIPELINE.values() for row in read(file) if row["fa4_dense_ms"]]
    assert all("H100" in row["device"] for row in rows)
    assert {(row["preset"], row["q_heads"], row["kv_heads"]) for row in rows} == {
        ("llama-3.1-8b", "32", "8")
    }
    assert {row["input"] for row in rows} == {"heavy hitters"}
    for row in rows:
        others = [row[f"{name}_dense_ms"] for name in ("sdpa", "flash", "cudnn")]
        assert all(float(row["fa4_dense_ms"]) < float(ms) for ms in others if ms)
    served = [(row, first_token(row["tokens"])) for row in read(PIPELINE["balanced"])]
    pairs = [(row, pair) for row, pair in served if pair]
    assert len(pairs) == 5
    for row, (dense, own) in pairs:
        assert "H100" in own["device"]
        assert (dense["backend"], own["tp"]) == ("FLASH_ATTN", "1")
        if row["tokens"] == "8192":
            assert_figures("(# for the first token of 8192 tokens)", [own["density"]], README)
        else:
            assert float(own["density"]) == pytest.approx(float(row["density"]), rel=0.05)


def test_figures_of_real_models():
    rows = read("pipeline_models_h100.csv")
    qwen = find(rows, preset="qwen2.5-1.5b", tokens="32768")
    words = "Qwen2.5-Coder-1.5B visits # at 32768 tokens, where the operator is # times as fast"
    texts = of_preset(read(QUALITY["Qwen2.5-Coder-1.5B, 32768"]), "balanced")
    visited = statistics.fmean(float(row["density"]) for row in texts if row["probe"] == "text")
    assert_figures(words, [visited, float(qwen["speedup"])], README)
    assert float(qwen["density"]) == pytest.approx(visited, abs=0.001)
    small = find(rows, preset="smollm2-135m")
    assert float(small["speedup"]) < 1
    assert "On short prompts of small models, dense attention is faster" in words_of(README)


def test_conditions_of_the_quality_table():
    for preset in ROWS:
        rows = rows_of(preset)
        texts = {row["text"] for row in rows if row["probe"] == "text"}
        keys = [row for row in rows if row["probe"] == "pass key"]
        assert len(texts) == 5 and len(keys) == 10, preset
        assert {row["tokens"] for row in rows} == {MODEL.split(", ")[1]} == {"16384"}
    assert len({row["text"] for row in read("ruler_qwen_h200.csv")}) == 7
    _, lines = front_quality()
    assert [line[0].strip("`") for line in lines] == list(ROWS)


def test_figures_of_ruler():
    by_preset = {
        preset: {
            tokens: average(
                [s for place, s in ruler_scores(rows, preset).items() if place[0] == tokens]
            )
            for tokens in RULER_LENGTHS
        }
        for rows, preset, _ in ruler_runs()
        if preset in ("balanced", "fast", "paper")
    }
    most = max(score.error for scores in by_preset.values() for score in scores.values())
    assert_figures("the standard error against dense is at most #", [most], README)
    assert_figures("loses # points at 32768 tokens", [-by_preset["fast"]["32768"].above], README)
    assert "The default loses nothing beyond that error" in words_of(README)
    assert all(score.above > -score.error for score in by_preset["balanced"].values())


def test_speed_table_has_both_measurements():
    _, lines = speed()
    assert [line[0] for line in lines] == ["8192", "16384", "32768", "65536", "131072"]
    assert all(all(line) for line in lines)


def test_the_default_samples_16_of_128_queries():
    assert_figures(
        "The default samples # of # queries",
        [PBSConfig().num_samples, PBSConfig().block_size],
        README,
    )
