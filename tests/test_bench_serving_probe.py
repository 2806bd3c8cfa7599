"""What `bench serve` runs in vLLM's workers: what the probe counts, against other counts of the
same calls, and its switch in the plugin, whose vLLM is that of vllm_fakes.py."""

import dataclasses

import pytest
import torch
import vllm_fakes
from sequence_cases import assert_same
from vllm_fakes import HEAD_DIM, HEADS, Server, make_cache, make_table

import pbs_attn
from pbs_attn import PBSConfig
from pbs_attn._errors import BenchError
from pbs_attn.bench import chunks, serving_worker
from pbs_attn.bench.serving_engine import densities_of
from pbs_attn.bench.stages import heavy_hitters

CONFIG = dataclasses.replace(PBSConfig(), window=0, dense_tail=200)
LENGTH, CHUNK = 1500, 384
THRESHOLDS = (0.003, 0.01, 0.03)


@pytest.fixture(scope="module")
def prompt():
    return chunks.Prompt(*(x.float() for x in heavy_hitters(LENGTH, 4, 2, "cpu", 64)), CHUNK)


def in_order(prompt, threshold):
    way = chunks.InOrder(prompt, CONFIG)
    return way, way.set_threshold(threshold)


def prefill(prompt, attend, way):
    """The prompt's output, by `attend` over its pages."""
    prompt.out.fill_(torch.nan)
    for first, last in prompt.chunks:
        prompt.write(first, last)
        rows = prompt.tokens(prompt.q, first, last), prompt.k_cache, prompt.v_cache
        out = prompt.out[first:last]
        attend(*rows, out, *way.where(first, last), config=way.config_of(last))
    return prompt.out.clone()


def test_probe_counts_as_density_does_over_ordered_pages_and_chunks(prompt):
    way, _ = in_order(prompt, 0.02)
    probe = serving_worker.Probe(pbs_attn.attention_paged_, THRESHOLDS)
    out = prefill(prompt, probe, way)
    found = densities_of([probe.counts()])
    assert [threshold for threshold, _ in found] == list(THRESHOLDS)
    for threshold, density in found:
        assert density == pytest.approx(way.set_threshold(threshold), rel=1e-6)
    densities = [density for _, density in found]
    assert 0.9 > densities[0] > densities[1] > densities[2] > 0.1
    # The call itself is at its own threshold, and as if nobody counted.
    pages = prompt.k_cache.clone(), prompt.v_cache.clone()
    way.threshold = 0.02
    assert_same((out,), (prefill(prompt, pbs_attn.attention_paged_, way),))
    assert_same((prompt.k_cache, prompt.v_cache), pages)


def test_probe_counts_what_outputs_show(prompt, monkeypatch):
    """Every key has a column of the values for itself: a query block that visits it shows it."""
    way, _ = in_order(prompt, 0.03)
    probe = serving_worker.Probe(pbs_attn.attention_paged_, [0.03])
    prefill(prompt, probe, way)
    blocks = [
        (begin, min(begin + CONFIG.block_size, last))
        for first, last in prompt.chunks
        for begin in range(first, last, CONFIG.block_size)
    ]
    visited = 0
    for base in range(0, LENGTH, 64):
        keys = torch.arange(base, min(base + 64, LENGTH))
        values = torch.zeros_like(prompt.v)
        values[:, :, keys, keys - base] = 1
        monkeypatch.setattr(prompt, "v", values)
        out = prefill(prompt, pbs_attn.attention_paged_, way)
        visited += sum((out[begin:end] != 0).any(0).sum().item() for begin, end in blocks)
    total = 4 * sum(-(-end // CONFIG.key_block_size) for _, end in blocks)
    ((_, density),) = densities_of([probe.counts()])
    assert visited / CONFIG.key_block_size / total == pytest.approx(density, abs=0.01)
    assert probe.total == total


def test_probe_counts_each_sequence_of_a_call(prompt):
    """One of them has no queries."""
    way, _ = in_order(prompt, 0.01)
    prefill(prompt, pbs_attn.attention_paged_, way)
    first, last = prompt.chunks[-1]
    config = way.config_of(last)
    q = prompt.tokens(prompt.q, first, last)

    def count(copies, idle):
        probe = serving_worker.Probe(lambda *args, **options: None, [0.01])
        lengths = [last - first] * copies + [0] * idle
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        table = prompt.table.repeat(len(lengths), 1)
        tensors = q.repeat(copies, 1, 1), prompt.k_cache, prompt.v_cache, None
        probe(*tensors, cu_seqlens, torch.tensor([last] * len(lengths)), table, config=config)
        return torch.tensor(probe.counts()[0.01])

    assert torch.equal(count(2, 1), 2 * count(1, 0))


# In the plugin


class Model(torch.nn.Module):
    """Of one layer that takes PBS and one that does not."""

    def __init__(self, impl):
        super().__init__()
        self.layer, self.other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        self.layer.impl = impl


@pytest.fixture
def server(monkeypatch):
    return Server(monkeypatch, threshold=0.2)


def forward(server, query):
    cache, table = make_cache(256), make_table(256, [1300])
    outputs = []
    for first, last in ((0, 768), (768, 1300)):
        common = vllm_fakes.make_common([last - first], [last], [True], table)
        metadata = server.builder.build(0, common)
        outputs.append(server.forward(query[first:last], cache, metadata))
    return torch.cat(outputs)


def test_probe_and_threshold_in_the_plugin(server):
    model, query = Model(server.impl), 3 * torch.randn(1300, HEADS, HEAD_DIM)
    before = server.impl_module.attention_paged_
    out = forward(server, query)
    serving_worker.start_probe(model, thresholds=(0.2, 1.0))
    assert_same((forward(server, query),), (out,))
    counts = serving_worker.stop_probe(model)
    assert server.impl_module.attention_paged_ is before
    (_, density), (_, whole) = densities_of([counts])
    assert 0.1 < density < 0.9 and whole == 1
    serving_worker.set_threshold(model, 1.0)
    assert not torch.equal(forward(server, query), out)
    assert server.impl.pbs_settings.config.threshold == 1.0
    assert server.impl.pbs_chunk_config.threshold == 1.0
    assert server.impl.pbs_chunk_config.dense_tail == 0 < server.impl.pbs_settings.config.dense_tail
    serving_worker.set_threshold(model, 0.2)
    assert_same((forward(server, query),), (out,))


def test_a_model_without_pbs_is_an_error(server):
    model = Model(server.impl)
    serving_worker.start_probe(model, thresholds=(0.02,))
    with pytest.raises(BenchError, match="layers must take PBS in ordered pages, got no call"):
        serving_worker.stop_probe(model)
    server.impl.pbs_reason = "the layer has a sliding window"
    with pytest.raises(BenchError, match="layers of the model must take PBS, got none"):
        serving_worker.set_threshold(model, 0.5)


@torch.no_grad()
def test_weights_give_logits_of_a_spread():
    """Of normalised inputs."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.qkv_proj = torch.nn.Linear(512, 3 * 64, bias=False)
    model.mlp = torch.nn.Linear(512, 512, bias=False)
    model.input_layernorm = torch.nn.LayerNorm(512, bias=False)
    model.q_norm = torch.nn.LayerNorm(64, bias=False)
    numbers = sum(weight.numel() for weight in model.parameters())
    assert serving_worker.set_weights(model) == numbers
    x = torch.randn(2000, 512)
    q, k, _ = model.qkv_proj(x).split(64, 1)
    logits = q @ k.T / 64**0.5
    assert logits.std().item() == pytest.approx(serving_worker.LOGIT_STD, rel=0.1)
    assert model.mlp(x).std().item() == pytest.approx(1, rel=0.1)
    assert model.input_layernorm.weight.unique().tolist() == [1]
    # Models that normalise queries and keys do without the projection's.
    q, k = (torch.nn.functional.normalize(y) * 8 * model.q_norm.weight for y in (q, k))
    assert (q @ k.T / 64**0.5).std().item() == pytest.approx(serving_worker.LOGIT_STD, rel=0.1)
