"""`pbs-attn bench scores`, `long` and `cpu`: their rows, and the checks of long prompts."""

import dataclasses

import pytest
import torch

from pbs_attn import PBSConfig, cli
from pbs_attn._environment import RUN
from pbs_attn._errors import BenchError
from pbs_attn._rows import STAGES, read_rows
from pbs_attn.bench import checks, cpu, long, scores, stages
from pbs_attn.bench.options import SWEEPS
from pbs_attn.bench.shapes import SHAPES, Shape

pytest.importorskip("tqdm")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", Shape("llama", 128, 256, 3, 4, 2, 64, 100))
    monkeypatch.setitem(SHAPES, "wide", Shape("llama", 128, 256, 3, 4, 2, 128, 100))


def assert_same_rows(path, rows):
    """The file holds what was returned, and where it was measured."""
    assert read_rows(path) == rows
    assert {(row["run"], row["driver"]) for row in rows} == {(RUN, "")}


def test_rows_of_scores(tmp_path, capsys):
    path = tmp_path / "scores.csv"
    options = scores.Options(
        presets=("tiny", "wide"), tokens=(512, 1024), rounds=1, device="cpu", csv=str(path)
    )
    rows = scores.run(options)
    assert_same_rows(path, rows)
    assert capsys.readouterr().out.split()[: len(scores.TABLE)] == list(scores.TABLE)
    places = [(row["preset"], row["tokens"], row["head_dim"]) for row in rows]
    assert places == [
        *(("tiny", "512", "64"), ("tiny", "1024", "64")),
        *(("wide", "512", "128"), ("wide", "1024", "128")),
    ]
    assert all(float(row[f"{name}_ms"]) > 0 for row in rows for name in scores.CONFIGS)


def test_scores_are_those_of_their_columns(monkeypatch):
    """Each column's call selects with that score; the dense one attends to everything."""
    seen = []

    def record(name):
        right = getattr(stages.Pipeline, name)

        def call(self):
            if hasattr(self, "words"):  # set_threshold, which calls it first, is not timed
                config = self.config
                sampling = config.num_samples, config.select_per
                seen.append((name, config.score, sampling, self.threshold))
            return right(self)

        monkeypatch.setattr(stages.Pipeline, name, call)

    record("select_blocks")
    record("attend")
    scores.run(scores.Options(presets=("tiny",), tokens=(512,), rounds=1, device="cpu"))
    first_round = seen[: len(scores.CONFIGS)]
    assert first_round[0][0] == "attend" and first_round[0][3] == 1
    assert [call[:3] for call in first_round[1:4]] == [
        ("select_blocks", "sampled", (num, "query_head")) for num in scores.SAMPLES
    ]
    assert first_round[4][:3] == ("select_blocks", "sampled", (16, "kv_head"))
    assert first_round[5][:2] == ("select_blocks", "mean")


def test_rows_of_cpu(tmp_path, capsys):
    path = tmp_path / "cpu.csv"
    options = cpu.Options(
        presets=("tiny",), tokens=(1024,), settings="paper", thresholds=(0.4, 1.0), seeds=(0, 1),
        rounds=1, csv=str(path),
    )  # fmt: skip
    rows = cpu.run(options)
    assert_same_rows(path, rows)
    assert capsys.readouterr().out.split()[: len(cpu.TABLE)] == list(cpu.TABLE)
    settings = [(row["threshold"], row["seed"]) for row in rows]
    assert settings == [("0.4", "0"), ("0.4", "1"), ("1.0", "0"), ("1.0", "1")]
    assert [row["density"] == "1.0000" for row in rows] == [False, False, True, True]
    for row in rows:
        times = {name: float(row[f"{name}_ms"]) for name in ("dense", "attention", *STAGES)}
        assert times["dense"] > 0 and times["attention"] > 0
        ratio = times["attention"] / (float(row["density"]) * times["dense"])
        assert float(row["attention_over_density_x_dense"]) == pytest.approx(ratio, rel=0.1)


@pytest.mark.parametrize(
    ("given", "place", "mass"),
    [
        ({}, ("balanced", "kv_head", "32"), "block"),
        ({"settings": "fast"}, ("fast", "kv_head", "32"), "block"),
        ({"settings": "paper"}, ("paper", "query_head", "128"), "earlier"),
    ],
)
def test_settings_of_cpu_and_their_thresholds(given, place, mass):
    """Every threshold of the sweep visits another share of these inputs."""
    rows = cpu.run(cpu.Options(presets=("tiny",), tokens=(2048,), seeds=(0,), rounds=1, **given))
    assert [float(row["threshold"]) for row in rows] == list(SWEEPS[mass])
    for row in rows:
        assert (row["selection"], row["permute_per"], row["kv_block_size"]) == place
    densities = [float(row["density"]) for row in rows]
    assert densities == sorted(set(densities))
    assert densities[0] < 0.7 and densities[-1] < 0.97
    assert densities[-1] - densities[0] > 0.08


def test_clustered_inputs_lean_towards_a_block():
    """In each block of queries one earlier block of keys has most of the logits' weight."""
    q, k, v = cpu.clustered_inputs(SHAPES["tiny"], 1024, seed=0)
    assert [x.shape for x in (q, k, v)] == [(1, 4, 1024, 64), *[(1, 2, 1024, 64)] * 2]
    means = [x.unflatten(2, (-1, cpu.BLOCK)).mean(3) for x in (q, k.repeat_interleave(2, 1))]
    shares = (means[0] @ means[1].mT).softmax(-1)
    assert (shares.max(-1).values > 0.99).all()
    wanted = shares.argmax(-1)
    assert (wanted <= torch.arange(8)).all() and (wanted == wanted[:, :1]).all()


def long_run(**others):
    options = long.Options(preset="wide", tokens=(4000,), density=0.6, device="cpu")
    return long.run(dataclasses.replace(options, **others))


def test_rows_of_long(tmp_path, capsys):
    path = tmp_path / "long.csv"
    rows = long_run(
        settings="paper", permute_per=("kv_head", "query_head"), kv_block_sizes=(128, 32),
        csv=str(path),
    )  # fmt: skip
    assert_same_rows(path, rows)
    assert capsys.readouterr().out.split()[: len(long.TABLE)] == list(long.TABLE)
    assert [(row["permute_per"], row["kv_block_size"]) for row in rows] == [
        ("kv_head", "128"),
        ("kv_head", "32"),
        ("query_head", "128"),
        ("query_head", "32"),
    ]
    for row in rows:
        assert list(row)[: len(long.COLUMNS)] == list(long.COLUMNS)
        assert all(float(row[f"{name}_error"]) <= 1 for name in checks.CHECKS)
        assert float(row["density"]) == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize(
    ("settings", "place", "density"),
    [
        ("default", ("balanced", "kv_head", "32"), 0.249),
        ("fast", ("fast", "kv_head", "32"), 0.249),
        ("paper", ("paper", "query_head", "128"), 0.673),
    ],
)
def test_settings_of_long_and_their_density(settings, place, density):
    assert long.Options().settings == "default"
    (row,) = long_run(settings=settings, density=None)
    assert (row["selection"], row["permute_per"], row["kv_block_size"]) == place
    assert float(row["density"]) == pytest.approx(density, abs=0.03)
    assert all(float(row[f"{name}_error"]) <= 1 for name in checks.CHECKS)


def spoil_output(out):
    out[0, :, -1, 0] += 0.1  # the last row is always sampled
    return out


def spoil_scores(scores):
    return scores * 1.001


def spoil_words(words_and_counts):
    return torch.zeros_like(words_and_counts[0]), words_and_counts[1]


def add_words(words_and_counts):
    """Every block is selected."""
    return torch.full_like(words_and_counts[0], -1), words_and_counts[1]


@pytest.mark.parametrize("settings", ["default", "fast", "paper"])
@pytest.mark.parametrize(
    ("method", "spoil", "check"),
    [
        ("attention", spoil_output, "output"),
        ("attention", lambda out: out.fill_(torch.nan), "output"),
        ("score_keys", spoil_scores, "importance"),
        ("sort_segments", lambda perm: perm.roll(1, -1), "importance"),
        ("select_blocks", spoil_words, "selection"),
        ("select_blocks", add_words, "selection"),
    ],
)
def test_long_run_fails_when_a_stage_is_wrong(monkeypatch, method, spoil, check, settings):
    right = getattr(stages.Pipeline, method)
    monkeypatch.setattr(stages.Pipeline, method, lambda self: spoil(right(self)))
    words = rf"must be within the tolerance, got .*{check} .*\(permute_per=kv_head, "
    with pytest.raises(BenchError, match=words):
        long_run(permute_per=("kv_head",), settings=settings)


def pipeline_of(config):
    made = stages.Pipeline(*(x.float() for x in stages.heavy_hitters(4000, 4, 2, "cpu")), config)
    stages.reach(made, 0.4)
    return made


@pytest.mark.parametrize("config", [PBSConfig(), PBSConfig.fast(), PBSConfig.accurate()], ids=str)
def test_the_check_of_sampled_scores_knows_every_setting(config):
    """Blocks selected otherwise by a little are wrong, and none of those selected as it says."""

    def error(made):
        rows = checks.sample_rows(made, 24)
        return checks.worst(checks.check_selection(made, rows))[1]

    made = pipeline_of(config)
    assert error(made) == 0
    threshold = made.threshold
    made.set_threshold(threshold * 1.5)
    made.threshold = threshold
    assert error(made) > 1
    for name, other in (("num_samples", 8), ("window", 0), ("dense_tail", 0)):
        made.config = dataclasses.replace(config, **{name: other})
        made.set_threshold(threshold)
        made.config = config
        assert error(made) > 1, name
    other = "query_head" if config.select_per == "kv_head" else "kv_head"
    made.config = dataclasses.replace(config, select_per=other)
    made.set_threshold(threshold)
    made.config = config
    assert error(made) > 1


def test_the_check_of_importance_knows_the_partition():
    made = pipeline_of(PBSConfig())
    scored = 3840  # complete segments
    assert checks.sorts_segments(made, scored)
    made.perm = made.perm.clone()
    made.perm[..., [0, 1]] = made.perm[..., [1, 0]]  # two heavy keys, out of their order
    assert not checks.sorts_segments(made, scored)
    made.perm = pipeline_of(PBSConfig(num_heavy=16)).perm  # too few
    assert not checks.sorts_segments(made, scored)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scores", "--tokens", "100"], "--tokens must be at least 512, got [100]"),
        (["scores", "--rounds", "0"], "--rounds must be positive, got 0"),
        (["cpu", "--tokens", "100"], "--tokens must be at least 512, got [100]"),
        (["cpu", "--rounds", "0"], "--rounds must be positive, got 0"),
        (
            ["cpu", "--settings", "paper", "--thresholds", "0.9", "2"],
            "--thresholds must lie in (0, 1], got 2.0",
        ),
        (
            ["cpu", "--thresholds", "0.01", "0.9"],
            '--thresholds must lie in (0, 0.5] or be 1 with mass "block", got 0.9',
        ),
        (["long", "--tokens", "100"], "--tokens must be at least 2048, got [100]"),
        (["long", "--density", "2"], "--density must lie in (0, 1], got [2.0]"),
        (["long", "--samples", "7"], "--samples must be at least 8, got 7"),
        (
            ["cpu", "--csv", "/no/such/folder/x.csv"],
            "the folder of /no/such/folder/x.csv must exist",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, words, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert capsys.readouterr().err == f"pbs-attn bench: {words}\n"
