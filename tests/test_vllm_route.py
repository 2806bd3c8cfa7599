"""Which layers, steps, rows and pages of vLLM take PBS: the file that decides, and the settings of
the user. Nothing here needs vLLM."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pbs_attn import PBSConfig
from pbs_attn.integrations.vllm import counter, engine, versions
from pbs_attn.integrations.vllm.prompts import prompt_lengths, tell_prompts
from pbs_attn.integrations.vllm.route import (
    Engine,
    Layer,
    Settings,
    Step,
    pbs_rows,
    why_layer_dense,
    why_not_in_place,
    why_row_dense,
    why_step_dense,
)
from pbs_attn.integrations.vllm.settings import KEY, MIN_TOKENS, VARIABLE, read_settings

ROOT = Path(__file__).resolve().parent.parent

LAYER = Layer(attn_type="decoder", head_dim=64, dtype=torch.float32, device_type="cpu")
SETTINGS = Settings(PBSConfig(), min_tokens=1000)


def test_importing_the_plugin_does_not_import_vllm():
    code = (
        "import sys, pbs_attn.integrations.vllm as p\n"
        "assert callable(p.register) and 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_plain_layer_takes_pbs():
    assert why_layer_dense(LAYER, Engine()) is None
    half = LAYER._replace(head_dim=128, dtype=torch.float16)
    assert why_layer_dense(half, Engine()) is None
    assert why_layer_dense(half._replace(cache_dtype="float16"), Engine()) is None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"attn_type": "encoder_only"}, "encoder"),
        ({"window": 4096}, "sliding window"),
        ({"has_softcap": True}, "softcap"),
        ({"has_sinks": True}, "sinks"),
        ({"has_alibi": True}, "ALiBi"),
        ({"cache_dtype": "fp8_e4m3"}, "fp8_e4m3"),
        ({"cache_dtype": "bfloat16", "dtype": torch.float16}, "holds bfloat16"),
        ({"cache_layout": "amx"}, "amx"),
        ({"head_dim": 80}, "head_dim 80"),
        ({"dtype": torch.float64}, "torch.float64"),
        ({"device_type": "cuda"}, "not float32"),
        ({"device_type": "xpu"}, "xpu"),
    ],
)
def test_what_makes_a_layer_dense(change, word):
    assert word in why_layer_dense(LAYER._replace(**change), Engine())


@pytest.mark.parametrize(
    ("fact", "word"),
    [
        ("splits_batches", "dual batch overlap"),
        ("has_rswa", "R-SWA"),
        ("has_prefix_mask", "both directions"),
        ("is_batch_invariant", "VLLM_BATCH_INVARIANT"),
    ],
)
def test_what_makes_all_layers_dense(fact, word):
    assert word in why_layer_dense(LAYER, Engine(**{fact: True}))
    assert "context parallelism" in why_layer_dense(LAYER, Engine(context_parallel=2))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"is_causal": False}, "causal"),
        ({"is_cascade": True}, "cascade"),
        ({"is_draft": True}, "draft"),
        ({"has_prefix_mask": True}, "both directions"),
    ],
)
def test_what_makes_a_step_dense(change, word):
    assert why_step_dense(Step()) is None
    assert word in why_step_dense(Step()._replace(**change))


def test_rows():
    assert why_row_dense(128, 1000, True, SETTINGS) is None
    assert "min_tokens" in why_row_dense(128, 999, True, SETTINGS)
    assert "block" in why_row_dense(127, 5000, True, SETTINGS)
    assert "prompt" in why_row_dense(200, 5000, False, SETTINGS)
    # A decode step, a chunk of a long prompt, a short prompt, a resumed answer, and padding.
    starts, lengths = [0, 1, 513, 613, 913, 913], [4000, 2000, 100, 3000, 0]
    assert pbs_rows(starts, lengths, [False, True, True, False], SETTINGS) == [1]
    assert pbs_rows(starts, lengths, [True] * 5, SETTINGS) == [1, 3]


@pytest.mark.parametrize(
    ("page_size", "config", "fact", "word"),
    [
        (128, PBSConfig(), None, "128 tokens"),
        (384, PBSConfig(), None, "384 tokens"),
        (768, PBSConfig(), None, "power of two"),
        (384, PBSConfig(segment_size=384), None, "power of two"),
        (256, PBSConfig.paper(), None, "sampled"),
        (256, PBSConfig(permute_per="query_head"), None, "KV head"),
        (256, PBSConfig(), "is_hybrid", "hybrid"),
        (256, PBSConfig(), "has_kv_connector", "connector"),
        (256, PBSConfig(), "has_drafts", "speculative"),
        (256, PBSConfig(), "shares_caches", "another"),
    ],
)
def test_pages_that_are_left_in_order(page_size, config, fact, word):
    facts = Engine(**({fact: True} if fact else {}))
    assert word in why_not_in_place(page_size, config, facts)
    assert why_not_in_place(512, PBSConfig(), Engine()) is None


# Settings of the user


def test_settings_of_the_command_line_precede_the_environment():
    assert read_settings({}, {}) == Settings(PBSConfig(), MIN_TOKENS)
    environment = {"PBS_ATTN_VLLM": '{"preset": "fast", "min_tokens": 7}'}
    assert read_settings({}, environment) == Settings(PBSConfig.fast(), 7)
    additional = {"pbs_attn": {"preset": "accurate", "num_heavy": 16}, "other": 1}
    expected = PBSConfig(num_samples=32, threshold=0.0025, num_heavy=16)
    assert read_settings(additional, environment) == Settings(expected, 7)
    assert additional["pbs_attn"] == {"preset": "accurate", "num_heavy": 16}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "quick"}, "preset must be one of .*, got 'quick'"),
        ({"treshold": 0.1}, "settings of pbs_attn must be among .*, got 'treshold'"),
        ({"min_tokens": 0}, "min_tokens must be a positive int, got 0"),
        ({"min_tokens": True}, "min_tokens must be a positive int, got True"),
        ({"threshold": 0.7}, "threshold must lie in"),
        ([1], r"must be a JSON object of settings, got \[1\]"),
    ],
)
def test_bad_settings_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        read_settings({"pbs_attn": given}, {})
    with pytest.raises(ValueError, match=message):
        read_settings({}, {"PBS_ATTN_VLLM": json.dumps(given)})


def test_an_environment_that_is_no_json():
    with pytest.raises(ValueError, match="PBS_ATTN_VLLM must be a JSON object"):
        read_settings({}, {"PBS_ATTN_VLLM": "preset=fast"})


@pytest.mark.parametrize("version", ["0.26.0", "0.27.1", "0.26.1rc0+cu130"])
def test_known_versions(version):
    versions.check_version(version)


@pytest.mark.parametrize("version", ["0.25.9", "0.28.0", "0.32.0", "1.26.0", "dev"])
def test_other_versions_are_refused_by_name(version):
    with pytest.raises(RuntimeError, match=rf"needs vLLM >= 0.26, < 0.28, got {version}"):
        versions.check_version(version)


# What vLLM's configuration says


def vllm_config(**changes):
    parallel = SimpleNamespace(
        decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False
    )
    config = SimpleNamespace(
        parallel_config=parallel,
        model_config=SimpleNamespace(rswa_window=None, is_mm_prefix_lm=False, is_hybrid=False),
        kv_transfer_config=None,
        speculative_config=None,
        compilation_config=SimpleNamespace(static_forward_context={}),
        attention_config=SimpleNamespace(backend=SimpleNamespace(name="CUSTOM")),
        additional_config={},
    )
    for path, value in changes.items():
        *parents, name = path.split("__")
        owner = config
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value)
    return config


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({}, {}),
        ({"parallel_config__decode_context_parallel_size": 2}, {"context_parallel": 2}),
        ({"parallel_config__prefill_context_parallel_size": 4}, {"context_parallel": 4}),
        ({"parallel_config__use_ubatching": True}, {"splits_batches": True}),
        ({"model_config__rswa_window": 128}, {"has_rswa": True}),
        ({"model_config__is_mm_prefix_lm": True}, {"has_prefix_mask": True}),
        ({"model_config__is_hybrid": True}, {"is_hybrid": True}),
        ({"kv_transfer_config": object()}, {"has_kv_connector": True}),
        ({"speculative_config": object()}, {"has_drafts": True}),
        (
            {
                "compilation_config__static_forward_context": {
                    "a": SimpleNamespace(kv_sharing_target_layer_name=None),
                    "b": SimpleNamespace(kv_sharing_target_layer_name="a"),
                }
            },
            {"shares_caches": True},
        ),
    ],
)
def test_facts_of_an_engine(change, fact):
    assert engine.describe_engine(vllm_config(**change)) == Engine(**fact)


def test_batch_invariance_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert engine.describe_engine(vllm_config()).is_batch_invariant
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    assert not engine.describe_engine(vllm_config()).is_batch_invariant


def test_layers_by_their_reason():
    layers = {
        "a": SimpleNamespace(impl=SimpleNamespace()),
        "b": SimpleNamespace(impl=SimpleNamespace(pbs_reason="the layer has a sliding window")),
        "c": SimpleNamespace(impl=SimpleNamespace(pbs_reason=None)),
    }
    config = vllm_config(compilation_config__static_forward_context=layers)
    assert engine.first_pbs_layer(config) == "c"
    assert "another backend" in engine.reason_of(layers["a"])
    assert engine.is_selected(config)
    assert not engine.is_selected(vllm_config(attention_config__backend=None))


# Where prompts end


def test_prompt_lengths_are_known_inside_the_wrapped_method_only():
    class Runner:
        lengths = (5, 7, 9)

        def build(self, number):
            return prompt_lengths(number)

    tell_prompts(Runner, "build", lambda self, number: self.lengths)
    tell_prompts(Runner, "build", lambda self, number: 1 / 0)  # wrapped already
    tell_prompts(Runner, "no_such_method", lambda self: 1 / 0)
    assert Runner().build(2) == [5, 7]
    assert Runner().build(4) is None
    assert prompt_lengths(1) is None
    del Runner.lengths
    assert Runner().build(2) is None


# How many tokens took PBS


@pytest.fixture
def counts(tmp_path, monkeypatch):
    monkeypatch.setenv(counter.FOLDER, str(tmp_path))
    monkeypatch.delenv(counter.SHARED, raising=False)
    counter._file_adder.cache_clear()
    yield tmp_path
    counter._file_adder.cache_clear()


def test_workers_are_summed(counts):
    counter.count_tokens(1000, 24)
    counter.count_tokens(500, 1)
    (counts / "other.tokens").write_bytes(counter.LAYOUT.pack(10, 20))
    (counts / "torn.tokens").write_bytes(b"123")
    assert counter.read_totals(counts) == {"pbs": 1510, "dense": 45}


def test_the_metrics_page_has_the_sums(counts):
    prometheus_client = pytest.importorskip("prometheus_client")
    counter.count_tokens(7, 8)
    registry = prometheus_client.CollectorRegistry()
    registry.register(counter.Collector(counts))
    text = prometheus_client.generate_latest(registry).decode()
    assert 'pbs_attn_prefill_tokens_total{route="pbs"} 7.0' in text
    assert 'pbs_attn_prefill_tokens_total{route="dense"} 8.0' in text


def test_there_is_no_folder_before_the_first_count(tmp_path, monkeypatch):
    prometheus_client = pytest.importorskip("prometheus_client")
    monkeypatch.delenv(counter.FOLDER, raising=False)
    monkeypatch.delenv(counter.SHARED, raising=False)
    monkeypatch.setattr(counter.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(counter.atexit, "register", lambda *_: None)
    monkeypatch.setattr(counter, "_register_once", lambda _: None)
    counter.export()
    monkeypatch.setenv(counter.FOLDER, os.environ[counter.FOLDER])  # removed with the test
    registry = prometheus_client.CollectorRegistry()
    registry.register(counter.Collector(Path(os.environ[counter.FOLDER])))
    assert not list(tmp_path.iterdir())
    assert b"pbs_attn" not in prometheus_client.generate_latest(registry)
    counter._file_adder.cache_clear()
    counter.count_tokens(7, 8)
    counter._file_adder.cache_clear()
    assert b"pbs_attn" in prometheus_client.generate_latest(registry)


def test_without_a_folder_nothing_is_counted(monkeypatch):
    monkeypatch.delenv(counter.FOLDER, raising=False)
    monkeypatch.delenv(counter.SHARED, raising=False)
    counter._file_adder.cache_clear()
    counter.count_tokens(1, 1)
    counter._file_adder.cache_clear()
    assert counter.FOLDER not in os.environ


# What other files say about the plugin


def test_the_page_and_the_package_say_the_same():
    page = " ".join((ROOT / "docs" / "serving.md").read_text().split())
    for text in (
        f"{counter.NAME}_total", VARIABLE, f'"{KEY}"', f"(default {MIN_TOKENS})",
        f"--attention-backend {engine.NAME}", f"at least `block_size` ({PBSConfig().block_size})",
    ):  # fmt: skip
        assert text in page, text
    last = f"{versions.AFTER_LAST[0]}.{versions.AFTER_LAST[1] - 1}"
    first = ".".join(map(str, versions.FIRST))
    assert f"| vLLM | {first} and {last};" in page
    project = (ROOT / "pyproject.toml").read_text()
    after_last = ".".join(map(str, versions.AFTER_LAST))
    assert f'vllm = ["vllm>={first},<{after_last}"]' in project
    entry = re.search(r'"vllm.general_plugins"\]\n\w+ = "(.+?):(\w+)"', project)
    assert callable(getattr(importlib.import_module(entry[1]), entry[2]))
