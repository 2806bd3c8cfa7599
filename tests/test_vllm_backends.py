"""The backends of the vLLM plugin on CUDA and on a CPU, their registration, and the layouts of
their caches. vllm_fakes.py replaces vLLM's own classes."""

from types import SimpleNamespace

import pytest
import torch
import vllm_fakes
from vllm_fakes import HEAD_DIM, HEADS, KV_HEADS, NAME, Server, make_cache, make_config

from pbs_attn.integrations.vllm import counter
from pbs_attn.integrations.vllm.pages import split_cpu_pages, split_pages


@pytest.fixture
def server(monkeypatch):
    return Server(monkeypatch)


def test_the_backend_on_cuda(server):
    backend = server.backend
    assert backend.get_name() == "CUSTOM"
    assert backend.get_builder_cls()._cudagraph_support.name == "UNIFORM_BATCH"
    assert not backend.is_sparse() and not backend.supports_batch_invariance()
    assert backend.get_preferred_block_size(16) == 256
    assert backend.get_preferred_block_size(512) == 512
    server.config.kv_transfer_config = object()  # pages stay in order: no need for long ones
    assert backend.get_preferred_block_size(16) == 16


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_another_version_is_refused_where_the_backend_is_asked_for(monkeypatch, kind):
    with pytest.raises(RuntimeError, match=r"needs vLLM >= 0.26, < 0.28, got 0.32.0"):
        Server(monkeypatch, kind, version="0.32.0")


@pytest.mark.parametrize(
    ("is_cpu", "version", "member", "path"),
    [
        (True, "0.27.1", "CPU_ATTN", "cpu.PBSCPUBackend"),
        (False, "0.27.1", "CUSTOM", "cuda.PBSBackend"),
        (False, "0.32.0", "CUSTOM", "cuda.PBSBackend"),  # its import says why not
        (True, "0.32.0", None, None),
    ],
)
def test_what_is_registered(monkeypatch, is_cpu, version, member, path):
    from pbs_attn.integrations.vllm import register

    log = vllm_fakes.Log()
    modules = vllm_fakes.install(monkeypatch, make_config(), log, version)
    modules["vllm.platforms"].current_platform.is_cpu = lambda: is_cpu
    monkeypatch.setattr(counter, "export", lambda: None)
    register()
    registered = modules["vllm.v1.attention.backends.registry"].registered
    expected = {member: f"pbs_attn.integrations.vllm.{path}"} if member else {}
    assert {key.name: value for key, value in registered.items()} == expected
    assert bool(log.lines) == (member is None)


def test_the_cpu_backend_without_custom_is_vllms_own(monkeypatch):
    server = Server(monkeypatch, "cpu")
    server.config.attention_config.backend = None
    impl = server.add_layer(NAME)
    assert "not asked for" in impl.pbs_reason
    assert not server.make_builder().pbs_layers


def test_the_cpu_backend_works_on_a_copy_of_its_pages(monkeypatch):
    """Keys are transposed in the blocks of these pages, and two rows share a block."""
    server = Server(monkeypatch, "cpu")
    monkeypatch.setattr(
        vllm_fakes.BaseImpl, "pages", lambda self, cache: split_cpu_pages(cache, HEAD_DIM)
    )
    cache = torch.randn(16, KV_HEADS, 256, 2 * HEAD_DIM)
    table = torch.tensor([[3, 5, 7, 1], [3, 2, 9, 0]]).int()
    common = vllm_fakes.make_common([700, 400], [700, 1000], [True] * 2, table)
    query = torch.randn(1100, HEADS, HEAD_DIM)
    metadata = SimpleNamespace(
        query_start_loc=common.query_start_loc, seq_lens=common.seq_lens, block_table=table
    )
    wanted = torch.empty_like(query)
    keys, values = split_cpu_pages(cache.clone(), HEAD_DIM)
    vllm_fakes.dense(query, keys, values, metadata, wanted, HEAD_DIM**-0.5)
    before = cache.clone()
    output = server.forward(query, cache, server.builder.build(0, common))
    torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)
    changed = [i for i in range(16) if not torch.equal(cache[i], before[i])]
    assert changed == [3, 5, 9]  # page 2 was complete before the call
    for a, b in zip(split_cpu_pages(cache, HEAD_DIM), (keys, values), strict=True):
        torch.testing.assert_close(a[changed].sum(1), b[changed].sum(1), atol=1e-3, rtol=1e-3)


def test_a_packed_cpu_cache_is_dense(monkeypatch):
    monkeypatch.setattr(vllm_fakes.BaseImpl, "isa", "amx")
    assert "packed for amx" in Server(monkeypatch, "cpu").impl.pbs_reason


@pytest.mark.parametrize("split", [split_pages, split_cpu_pages])
def test_a_cache_of_another_shape_is_refused(split):
    for shape in ((2, 4, 16, 2, 64), (4, 2, 16, 64)):
        with pytest.raises(ValueError, match=r"kv_cache must be \(blocks, KV heads"):
            split(torch.zeros(shape), HEAD_DIM)


def test_pages_are_views():
    cache = make_cache(16)
    k_cache, v_cache = split_pages(cache, HEAD_DIM)
    assert k_cache.shape == (512, 16, KV_HEADS, HEAD_DIM)
    assert torch.equal(v_cache[5, 3, 1], cache[5, 1, 3, HEAD_DIM:])
    k_cache[7, 2, 0] = 1
    assert (cache[7, 0, 2, :HEAD_DIM] == 1).all()
