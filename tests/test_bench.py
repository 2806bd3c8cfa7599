"""`pbs-attn bench` on the CPU: what is measured, and what it says."""

import csv
import dataclasses
import importlib.util

import pytest
import torch
from tiny_model import SIZES, VOCABULARY, save_model, save_text

from pbs_attn import PBSConfig, _environment, cli
from pbs_attn._errors import BenchError
from pbs_attn.bench import pipeline, prefill
from pbs_attn.bench.shapes import SHAPES, Shape, build
from pbs_attn.bench.stages import Pipeline, heavy_hitters, reach

pytest.importorskip("transformers")
pytest.importorskip("tqdm")

ROW = dict.fromkeys(prefill.TABLE, "1")
TINY = Shape("llama", 128, 256, 3, 4, 2, 64, 100)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    return prefill.Options(preset="tiny", tokens=(1024, 2048), rounds=(2, 1), device="cpu")


def test_prefill_rows(tiny, tmp_path, capsys):
    options = dataclasses.replace(
        tiny,
        densities=(0.8, 0.6),
        csv=str(tmp_path / "rows.csv"),
        picture=str(tmp_path / "speedup.png"),
    )
    rows = prefill.run(options)
    with (tmp_path / "rows.csv").open() as file:
        assert list(csv.DictReader(file)) == rows
    assert (tmp_path / "speedup.png").stat().st_size > 10_000
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == list(prefill.TABLE)
    assert [line.split()[1] for line in table[1:]] == ["1024", "2048"]
    for row, density in zip(rows, options.densities, strict=True):
        assert float(row["density"]) == pytest.approx(density, abs=0.06)
        times = {name: float(row[f"{name}_s"]) for name in ("dense", "pbs", "linear")}
        assert min(times.values()) > 0
        assert float(row["speedup"]) == pytest.approx(times["dense"] / times["pbs"], rel=0.05)
        assert float(row["bound"]) == pytest.approx(times["dense"] / times["linear"], rel=0.05)
        assert (row["layers"], row["weights"], row["dense_backend"]) == ("3", "random", "sdpa")
    assert len({row["run"] for row in rows}) == 1


@pytest.mark.parametrize(
    ("given", "name", "permute_per", "config", "density"),
    [
        ({}, "balanced", "kv_head", PBSConfig(), 0.96),
        ({"settings": "fast"}, "fast", "kv_head", PBSConfig.fast(), 0.96),
        ({"settings": "paper"}, "paper", "query_head", PBSConfig.paper(), 0.85),
        (
            {"settings": "paper", "permute_per": "kv_head"},
            *("paper", "kv_head"),
            dataclasses.replace(PBSConfig.paper(), permute_per="kv_head"),
            0.85,
        ),
    ],
)
def test_prefill_has_settings_and_their_density(
    given, name, permute_per, config, density, tiny, monkeypatch
):
    ran, right = [], prefill._pbs_attention

    def recorded(config):
        ran.append(config)
        return right(config)

    monkeypatch.setattr(prefill, "_pbs_attention", recorded)
    (row,) = prefill.run(dataclasses.replace(tiny, tokens=(1024,), rounds=(1,), **given))
    assert (row["selection"], row["permute_per"]) == (name, permute_per)
    assert float(row["density"]) == pytest.approx(density, abs=0.04)
    assert [dataclasses.replace(one, threshold=config.threshold) for one in ran] == [config]


@pytest.mark.parametrize(("score", "mass"), [("sampled", "block"), ("mean", "causal")])
def test_densities_are_reached(score, mass):
    tensors = [x.float() for x in heavy_hitters(2048, 4, 2, "cpu", 64)]
    pipeline = Pipeline(*tensors, PBSConfig(score=score, mass=mass, window=0, dense_tail=0))
    for density in (0.3, 0.5):
        assert reach(pipeline, density) == pytest.approx(density, abs=0.01)


def test_every_contestant_runs_the_whole_model(tiny, monkeypatch):
    """Each round calls each attention once a layer, on the synthetic tensors, after one layer of
    warm-up; and the advance of the bar counts runs of the model."""
    calls = []

    def recorded(self, module, *own, **options):
        tensors = self.tensors
        calls.append((module.layer_idx, self.attention))
        assert [x.shape for x in tensors] == [x.shape for x in own[:3]]
        assert [x.stride() for x in tensors] == [x.stride() for x in own[:3]]
        return right(self, module, *own, **options)

    right = prefill.Substitute.__call__
    monkeypatch.setattr(prefill.Substitute, "__call__", recorded)
    prefill.run(dataclasses.replace(tiny, tokens=(1024,), rounds=(2,)))
    attentions = list(dict.fromkeys(attention for _, attention in calls))
    assert len(attentions) == 3
    for attention in attentions:
        layers = [layer for layer, called in calls if called == attention]
        assert layers == [0, *(0, 1, 2) * 2]


def test_contestants_attend_to_the_synthetic_tensors(tiny):
    substitute = prefill._register()
    options = dataclasses.replace(tiny, tokens=(1024,), densities=(1.0,))
    with torch.inference_mode():
        contest = prefill._preset(options, substitute, "cpu")(0)
        q, k, v = contest.tensors
        exact = torch.nn.functional.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True
        )
        for attention in contest.attentions.values():  # at density 1 both are dense
            assert (attention(q, k, v, scale=None) - exact).abs().max() < 0.02


def test_a_given_model_reads_its_text(tmp_path, monkeypatch):
    """Its own queries, keys and values, at its own scale, through every contestant."""
    transformers = pytest.importorskip("transformers")
    save_model(tmp_path, transformers.LlamaConfig(**SIZES))
    ids = torch.randint(VOCABULARY, (900,), generator=torch.manual_seed(1)).tolist()
    save_text(tmp_path / "text.txt", ids)
    seen = []
    right = prefill.Substitute.__call__

    def recorded(self, module, *own, scaling, **options):
        assert self.tensors is None
        seen.append((self.attention, module.layer_idx, own[0].shape[2], scaling))
        return right(self, module, *own, scaling=scaling, **options)

    monkeypatch.setattr(prefill.Substitute, "__call__", recorded)
    options = prefill.Options(
        model=str(tmp_path), text=str(tmp_path / "text.txt"), tokens=(800, 900), rounds=(1,),
        threshold=0.5, device="cpu",
    )  # fmt: skip
    rows = prefill.run(options)
    for row, length in zip(rows, options.tokens, strict=True):
        of_length = [(layer, scale) for _, layer, tokens, scale in seen if tokens == length]
        # Once to record the density; each contestant warms up one layer, then runs both.
        assert of_length == [
            (0, 0.125),
            (1, 0.125),
            *[(0, 0.125)] * 3,
            *[(0, 0.125), (1, 0.125)] * 3,
        ]
        assert (row["weights"], row["activations"], row["layers"]) == ("given", "text.txt", "2")
        assert 0 < float(row["density"]) < 1
        assert row["selection"] == "balanced"
    of_paper = dataclasses.replace(options, settings="paper", threshold=None, tokens=(800,))
    (row,) = prefill.run(of_paper)
    found = row["selection"], row["permute_per"], row["threshold"]
    assert found == ("paper", "query_head", "0.9000")
    with pytest.raises(BenchError, match=r"text.txt must have 1000 tokens, got 900"):
        prefill.run(dataclasses.replace(options, tokens=(1000,)))


def test_rows_before_a_prompt_that_does_not_fit_are_kept(tiny, monkeypatch, tmp_path):
    def measure(self, rounds, advance):
        if self.ids.shape[1] == 2048:
            raise torch.OutOfMemoryError
        return {"tokens": "1024"}

    monkeypatch.setattr(prefill._Contest, "measure", measure)
    with pytest.raises(BenchError, match="--tokens must fit in memory, got 2048"):
        prefill.run(dataclasses.replace(tiny, csv=str(tmp_path / "rows.csv")))
    with (tmp_path / "rows.csv").open() as file:
        assert [row["tokens"] for row in csv.DictReader(file)] == ["1024"]


def test_files_by_default(tiny, tmp_path, monkeypatch, capsys):
    """Of the command's name, in the working directory; '' for none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prefill._Contest, "measure", lambda *_: ROW)
    command = ["bench", "prefill", "--preset", "qwen2.5-1.5b", "--layers", "1", "--device", "cpu"]
    command += ["--tokens", "512"]
    assert cli.main(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prefill.csv", "prefill.png"]
    assert "written: prefill.csv and prefill.png" in capsys.readouterr().err
    assert cli.main([*command, "--csv", "x.csv", "--picture", ""]) == 0
    assert "written: x.csv\n" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 3


def test_a_gpu_that_is_full_is_told_in_one_line(monkeypatch, capsys):
    def run(options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. And so on")

    monkeypatch.setattr(pipeline, "run", run)
    assert cli.main(["bench", "pipeline", "--device", "cpu"]) == 2
    words = "a shorter prompt would fit: CUDA out of memory"
    assert capsys.readouterr().err == f"pbs-attn bench: {words}\n"


def test_other_tensors_are_refused(tiny):
    substitute = prefill._register()
    model = build(TINY, max_tokens=1024, device="cpu", attn_implementation=prefill.NAME)
    substitute.tensors = tuple(torch.zeros(1, 4, 512, 64) for _ in range(3))
    with pytest.raises(BenchError, match=r"tensors must be \(1, 4, 600, 64\)"):
        model(input_ids=torch.zeros(1, 600, dtype=torch.long))


@pytest.mark.parametrize(
    ("preset", "billions"),
    [("llama-3.1-8b", 8.03), ("qwen3-8b", 8.19), ("qwen2.5-1.5b", 1.78), ("mha-32x128", 6.74)],
)
def test_presets_have_the_parameters_of_their_models(preset, billions):
    """Qwen2.5 ties its embeddings, which here are two: 1.54 + 0.23."""
    prefill._register()
    model = build(SHAPES[preset], max_tokens=1024, device="meta", attn_implementation=prefill.NAME)
    count = sum(x.numel() for x in model.parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "100"], "--tokens must be at least 512, got [100]"),
        (["--rounds", "0"], "--rounds must be positive, got [0]"),
        (["--layers", "0"], "--layers must be 1 to 32, got 0"),
        (["--layers", "33"], "--layers must be 1 to 32, got 33"),
        (
            ["--rounds", "1", "2"],
            "--rounds must have one value or as many as --tokens, got 2 for 6",
        ),
        (["--densities", "0.1"], "--densities must have as many values as --tokens, got 1 for 6"),
        (["--tokens", "1024", "--densities", "1.5"], "--densities must lie in (0, 1], got [1.5]"),
        (
            ["--model", "x", "--layers", "1"],
            "--layers and --densities must be used with --preset, got --model",
        ),
        (["--text", "x"], "--text must be used with --model: random weights read nothing"),
        (
            ["--model", "x", "--threshold", "2"],
            '--threshold must lie in (0, 0.5] or be 1 with mass "block", got 2.0',
        ),
        (
            ["--model", "x", "--settings", "paper", "--threshold", "2"],
            "--threshold must lie in (0, 1], got 2.0",
        ),
        (["--csv", "/no/such/folder/x.csv"], "the folder of /no/such/folder/x.csv must exist"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, words, capsys):
    assert cli.main(["bench", "prefill", "--device", "cpu", *arguments]) == 2
    assert capsys.readouterr().err == f"pbs-attn bench: {words}\n"


@pytest.mark.parametrize(
    ("bench", "missing"),
    [
        *(("kernel", "tqdm"), ("pipeline", "tqdm"), ("prefill", "tqdm"), ("quality", "tqdm")),
        *(("scores", "tqdm"), ("long", "tqdm"), ("cpu", "tqdm")),
        *(("prefill", "transformers"), ("quality", "transformers")),
        *(("kernel", "matplotlib"), ("pipeline", "safetensors")),
    ],
)
def test_missing_packages_are_named(bench, missing, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name)
    )
    assert cli.main(["bench", bench]) == 2
    words = f"the bench needs {missing}, which is not installed: pip install 'pbs-attn[bench]'"
    assert capsys.readouterr().err == f"pbs-attn bench: {words}\n"


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:19:52 UTC 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build",
    ],
)
def test_driver_version(line):
    assert (
        _environment.find_driver_version(line + "\nGCC version:  gcc version 12.3.0\n")
        == "580.65.06"
    )
    assert _environment.find_driver_version("nothing of the kind") == ""
