"""The operators inside torch.compile, torch.export and TorchScript."""

import io

import pytest
import torch
import torch._inductor.config
from cases import operator_calls

import pbs_attn
from pbs_attn import PBSConfig
from pbs_attn.ops import OPERATORS

CONFIGS = [
    PBSConfig(),
    PBSConfig(
        block_size=64,
        kv_block_size=32,
        segment_size=128,
        threshold=0.7,
        permute_per="query_head",
        num_heavy=16,
        score="mean",
        mass="causal",
        window=0,
        dense_tail=64,
    ),
    PBSConfig(block_size=32, segment_size=64, select_per="kv_head", window=1),
]


def inputs(num_q=400, num_kv=400, dtype=torch.float32):
    q = torch.randn(1, num_q, 4, 64, dtype=dtype).transpose(1, 2)
    k, v = torch.randn(2, 1, 2, num_kv, 64, dtype=dtype)
    return q, k, v


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "mean", "shared"])
@pytest.mark.parametrize("lengths", [(400, 400), (130, 513)], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, lengths, config):
    tensors, kwargs = operator_calls(*inputs(*lengths), config)[name]
    torch.library.opcheck(getattr(torch.ops.pbs, name).default, tuple(tensors.values()), kwargs)


@pytest.mark.parametrize("name", OPERATORS)
def test_fake_kernels_know_the_defaults(name):
    op = getattr(torch.ops.pbs, name)
    tensors, _ = operator_calls(*inputs(130, 513), PBSConfig.paper())[name]
    on_meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    for real, fake in zip(flat(op(**tensors)), flat(op(**on_meta)), strict=True):
        assert (real.shape, real.dtype) == (fake.shape, fake.dtype)


def flat(found):
    return found if isinstance(found, tuple) else (found,)


def test_compile_has_no_break_and_one_graph_for_all_lengths():
    frames = []

    def counting_backend(graph, example_inputs):
        frames.append(graph)
        return graph.forward

    def layer(q, k, v):
        return pbs_attn.attention(q * 1.0, k, v) + 1.0

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counting_backend)
    for num_kv in (300, 400, 517, 1024):
        tensors = inputs(num_kv - 7, num_kv)
        assert torch.equal(compiled(*tensors), layer(*tensors))
    assert len(frames) == 1


# Its cache does not see when the operator's defaults have changed.
@torch._inductor.config.patch(force_disable_caches=True)
def test_compile_with_inductor():
    def layer(q, k, v):
        return pbs_attn.attention(q * 2.0, k, v) * 0.5

    compiled = torch.compile(layer, fullgraph=True)
    tensors = inputs()
    torch.testing.assert_close(compiled(*tensors), layer(*tensors))


class Layer(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.pbs.attention(q, k, v, threshold=0.1, num_heavy=16, select_per="kv_head")


def test_export_round_trip():
    tokens = torch.export.Dim("tokens", min=2, max=100_000)
    dynamic = {name: {2: tokens} for name in "qkv"}
    program = torch.export.export(Layer(), inputs(), dynamic_shapes=dynamic)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for num_kv in (400, 333):
        tensors = inputs(num_kv, num_kv)
        assert torch.equal(loaded(*tensors), Layer()(*tensors))


def test_jit_script_save_and_load():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Layer()), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    tensors = inputs()
    assert torch.equal(loaded(*tensors), Layer()(*tensors))


def test_out_keeps_the_memory_order_of_q():
    q, k, v = inputs()
    out = pbs_attn.attention(q, k, v)
    assert out.stride() == q.stride()
    assert out.transpose(1, 2).is_contiguous()


def test_one_compiled_function_in_every_mode():
    layer = torch.compile(lambda q, k, v: pbs_attn.attention(q * 1.0, k, v), backend="aot_eager")
    tensors = inputs()
    want = pbs_attn.attention(*tensors)
    leaves = [t.clone().requires_grad_() for t in tensors]
    for _ in range(2):
        assert torch.equal(layer(*tensors), want)
        with torch.no_grad():
            assert torch.equal(layer(*leaves), want)
        with pytest.raises(RuntimeError, match=r"must not require grad.*torch\.no_grad\(\)"):
            layer(*leaves)
        with torch.inference_mode():
            assert torch.equal(layer(*leaves), want)


def test_config_is_checked_without_a_break():
    def layer(q, k, v, config):
        return pbs_attn.attention(q, k, v, config=config)

    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    tensors = inputs()
    assert torch.equal(compiled(*tensors, CONFIGS[1]), layer(*tensors, CONFIGS[1]))
    with pytest.raises(Exception, match="config must be a PBSConfig, got dict"):
        torch.compile(layer, backend="eager")(*tensors, {})
