"""The path from .cu to torch.ops on a GPU; the CPU operator is the reference."""

import pytest
import torch

from pbs_attn.ops import HEAD_DIMS

pytestmark = pytest.mark.gpu


def random_inputs(dtype, head_dim, num_kv, num_perm_heads):
    generator = torch.Generator().manual_seed(num_kv)
    k, v = torch.randn(2, 2, num_kv, 2, head_dim, generator=generator).to(dtype).transpose(2, 3)
    perm = torch.stack([torch.randperm(num_kv, generator=generator) for _ in range(4)])
    perm = perm.int().view(2, 2, num_kv).repeat_interleave(num_perm_heads // 2, 1)
    return k, v, perm


@pytest.mark.parametrize("kv_block_size", [32, 64, 128])
@pytest.mark.parametrize("num_perm_heads", [2, 6])
@pytest.mark.parametrize("num_kv", [1, 77, 1000])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_permute_kv_agrees_with_cpu(dtype, head_dim, num_kv, num_perm_heads, kv_block_size):
    tensors = random_inputs(dtype, head_dim, num_kv, num_perm_heads)
    on_cpu = torch.ops.pbs.permute_kv(*tensors, kv_block_size=kv_block_size)
    on_gpu = torch.ops.pbs.permute_kv(*(t.cuda() for t in tensors), kv_block_size=kv_block_size)
    assert torch.equal(on_gpu[0].cpu(), on_cpu[0])
    assert torch.equal(on_gpu[1].cpu(), on_cpu[1])
    torch.testing.assert_close(on_gpu[2].cpu(), on_cpu[2], rtol=1e-5, atol=1e-6)


def test_permute_kv_on_a_side_stream_and_in_a_graph():
    tensors = [t.cuda() for t in random_inputs(torch.bfloat16, 128, 1000, 2)]
    expected = torch.ops.pbs.permute_kv(*tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for got, want in zip(torch.ops.pbs.permute_kv(*tensors), expected, strict=True):
            assert torch.equal(got, want)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.pbs.permute_kv(*tensors)
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    for got, want in zip(captured, expected, strict=True):
        assert torch.equal(got, want)


def test_bad_permutation_is_visible_and_harmless():
    k, v, perm = (t.cuda() for t in random_inputs(torch.bfloat16, 64, 100, 2))
    perm[0, 0, 3] = 2**31 - 1
    k_perm, _, _ = torch.ops.pbs.permute_kv(k, v, perm)
    assert k_perm[0, 0, 3].isnan().all()
    assert not k_perm[0, 1].isnan().any()


def test_misaligned_rows_are_refused():
    k, v, perm = (t.cuda() for t in random_inputs(torch.bfloat16, 64, 100, 2))
    shifted = torch.empty(k.numel() + 1, dtype=k.dtype, device="cuda")[1:].view(k.shape)
    with pytest.raises(RuntimeError, match=r"k must start at, .* a multiple of 16 bytes"):
        torch.ops.pbs.permute_kv(shifted, v, perm)


def test_mixed_devices():
    k, v, perm = random_inputs(torch.bfloat16, 64, 100, 2)
    with pytest.raises(RuntimeError, match=r"must be on the device of k \(cuda:0\), got cpu"):
        torch.ops.pbs.permute_kv(k.cuda(), v.cuda(), perm)
