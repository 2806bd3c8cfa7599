"""attend on a GPU: against float64 on the same visited set, and against the CPU op."""

from typing import NamedTuple

import pytest
import reference as ref
import torch
from tolerances import assert_attends, assert_output

import pbs_attn
from pbs_attn.ops import HEAD_DIMS

pytestmark = pytest.mark.gpu
ops = torch.ops.pbs


class Problem(NamedTuple):
    num_queries: int
    num_keys: int
    num_q_heads: int
    num_kv_heads: int
    num_perm_heads: int
    block_size: int = 128
    kv_block_size: int = 128
    segment_size: int = 256
    is_causal: bool = True
    kept: float = 0.5  # share of the mask's bits

    @property
    def sizes(self):
        names = ("block_size", "kv_block_size", "segment_size", "is_causal")
        return {name: getattr(self, name) for name in names}


PROBLEMS = [
    Problem(128, 128, 2, 1, 1),
    Problem(300, 300, 4, 2, 2),
    Problem(1000, 1000, 4, 2, 4, kept=0.4),
    Problem(1000, 1000, 4, 2, 2, kv_block_size=64, kept=0.4),
    Problem(1000, 1000, 4, 2, 2, kv_block_size=32, kept=0.4),
    Problem(77, 1111, 4, 1, 1, block_size=64, kv_block_size=32, segment_size=128, kept=0.3),
    Problem(333, 1333, 6, 2, 2, block_size=32, kv_block_size=64, segment_size=128),
    Problem(1, 513, 2, 2, 2),
    Problem(700, 700, 2, 1, 2, kv_block_size=32, is_causal=False),
    Problem(512, 1024, 2, 1, 2, kv_block_size=64, segment_size=512, is_causal=False, kept=0.0),
    Problem(1000, 1000, 2, 1, 1, kept=1.0),
    Problem(1000, 1000, 2, 1, 1, kept=0.0),
    Problem(2100, 2100, 2, 1, 1, segment_size=1024, kept=0.2),
    Problem(1, 1, 2, 1, 1),
]


def draw(problem, dtype, head_dim):
    """q, k, v on the GPU as (B, N, H, D) views, a permutation and a bool mask on the CPU."""
    generator = torch.Generator().manual_seed(problem.num_keys)
    q, k, v = (
        torch.randn(2, rows, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
        for rows, heads in (
            (problem.num_queries, problem.num_q_heads),
            (problem.num_keys, problem.num_kv_heads),
            (problem.num_keys, problem.num_kv_heads),
        )
    )
    segment = problem.segment_size
    perm = torch.arange(problem.num_keys).repeat(2, problem.num_perm_heads, 1)
    for row in perm.flatten(0, 1):
        for start in range(0, problem.num_keys // segment * segment, segment):
            shuffled = torch.randperm(segment, generator=generator)
            row[start : start + segment] = start + shuffled
    num_blocks = [
        -(-problem.num_queries // problem.block_size),
        -(-problem.num_keys // problem.kv_block_size),
    ]
    shape = (2, problem.num_q_heads, *num_blocks)
    mask = torch.rand(shape, generator=generator) < problem.kept
    return q.cuda(), k.cuda(), v.cuda(), perm.int(), mask


def run(problem, q, k, v, perm, mask):
    k_perm, v_perm, _ = ops.permute_kv(k, v, perm.to(k.device), kv_block_size=problem.kv_block_size)
    # The memory of the next outputs holds NaN.
    poison = [torch.full_like(q, torch.nan), torch.full(q.shape[:3], torch.nan, device=q.device)]
    del poison
    words = pbs_attn.bool_to_mask(mask).to(q.device)
    return ops.attend(q, k, v, k_perm, v_perm, words, **problem.sizes)


def run_against_float64(problem, q, k, v, perm, mask):
    out, lse = run(problem, q, k, v, perm, mask)
    layout = ref.Layout(problem.num_queries, problem.num_keys, *problem.sizes.values())
    visited = ref.visited_keys(perm, mask, layout).to(q.device)
    exact, exact_lse = ref.masked_attention(q, k, v, visited)
    assert_attends(out, lse, q, k, v, visited, exact, exact_lse)
    return out


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: "-".join(map(str, p)))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_against_float64(dtype, head_dim, problem):
    q, k, v, perm, mask = draw(problem, dtype, head_dim)
    out = run_against_float64(problem, q, k, v, perm, mask)
    assert out.stride() == q.stride()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("loudest", [8.0, 60.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maxima_that_jump_between_tiles(dtype, loudest, head_dim):
    # Weights are computed against maxima of earlier tiles. Some exceed these by less than a row may
    # keep, some by more, and some leave the range of float32.
    problem = Problem(1500, 1500, 4, 2, 2, kv_block_size=64, kept=0.8)
    q, k, v, perm, mask = draw(problem, dtype, head_dim)
    generator = torch.Generator().manual_seed(1)
    loudness = torch.tensor([0.05, 1.0, 3.0, loudest / 2, loudest])
    blocks = loudness[torch.randint(5, (24,), generator=generator)].repeat_interleave(64)
    k = (k * blocks[:1500, None].to(k)).contiguous()
    run_against_float64(problem, q, k, v, perm, mask)


def test_heads_that_do_not_fit_in_l2_together():
    # Two groups of heads, the second one short; one of its heads is the heaviest.
    problem = Problem(200, 20000, 5, 5, 5, kept=0.02)
    q, k, v, perm, mask = draw(problem, torch.bfloat16, 64)
    mask[0, 4] = True
    run_against_float64(problem, q, k, v, perm, mask)


@pytest.mark.parametrize("problem", PROBLEMS[2:9], ids=lambda p: "-".join(map(str, p)))
def test_agrees_with_the_cpu(problem):
    tensors = draw(problem, torch.bfloat16, 128)
    out, lse = run(problem, *tensors)
    cpu_out, cpu_lse = run(problem, *(t.cpu() for t in tensors))
    torch.testing.assert_close(out.cpu(), cpu_out, rtol=2e-2, atol=4e-3)
    torch.testing.assert_close(lse.cpu(), cpu_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_bitwise_the_same_over_runs_streams_and_graphs(head_dim):
    problem = Problem(2000, 2000, 8, 2, 2, kv_block_size=32, kept=0.3)
    tensors = draw(problem, torch.bfloat16, head_dim)
    q, k, v, perm, mask = tensors
    out, lse = run(problem, *tensors)
    for _ in range(20):
        again = run(problem, *tensors)
        assert torch.equal(again[0], out)
        assert torch.equal(again[1], lse)
    k_perm, v_perm, _ = ops.permute_kv(k, v, perm.cuda(), kv_block_size=32)
    inputs = (q, k, v, k_perm, v_perm, pbs_attn.bool_to_mask(mask).cuda())
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(ops.attend(*inputs, **problem.sizes))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results.append(ops.attend(*inputs, **problem.sizes))
    for _ in range(3):
        for tensor in results[-1]:
            tensor.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(result[0], out) for result in results)
        assert all(torch.equal(result[1], lse) for result in results)


def test_bits_that_are_no_candidates_are_ignored():
    problem = Problem(1000, 1000, 2, 1, 1)
    q, k, v, perm, mask = draw(problem, torch.bfloat16, 128)
    candidate, _ = ref.block_roles(ref.Layout(1000, 1000, *problem.sizes.values()))
    out, _ = run(problem, q, k, v, perm, mask & candidate)
    assert torch.equal(run(problem, q, k, v, perm, mask | ~candidate)[0], out)


def test_mask_words_that_many_ctas_count():
    """The mask has more than 2^19 words, with every bit set in the last one that has candidates, or
    in the first."""
    num_heads, num_keys = 4096, 131073
    q = torch.randn(1, num_heads, 1, 64, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 1, num_keys, 64, device="cuda", dtype=torch.bfloat16)
    words = torch.zeros(1, num_heads, 1, 129, device="cuda", dtype=torch.int32)
    words[:, ::2, :, 127] = -1
    words[:, ::3, :, 0] = -1
    words[:, :, :, 128] = -1  # no candidates
    out, _ = ops.attend(q, k, v, k, v, words, block_size=32, segment_size=32)
    visited = torch.zeros(1, num_heads, 1, num_keys, device="cuda", dtype=torch.bool)
    visited[:, ::2, :, 127 * 1024 : 128 * 1024] = True
    visited[:, ::3, :, :1024] = True
    visited[..., -1] = True
    # Every kind of head, from both ends: the reference repeats the keys for each.
    some = [*range(6), *range(num_heads - 6, num_heads)]
    out, q, visited = out[:, some], q[:, some], visited[:, some]
    exact, _ = ref.masked_attention(q, k, v, visited)
    assert_output(out, q, k, v, visited, exact)


def test_what_cuda_does_not_take():
    problem = Problem(300, 300, 2, 1, 1)
    q, k, v, perm, mask = draw(problem, torch.float32, 64)
    with pytest.raises(RuntimeError, match="q must be bfloat16 or float16 on CUDA, got float32"):
        run(problem, q, k, v, perm, mask)
    q, k, v = q.half(), k.half(), v.half()
    words = pbs_attn.bool_to_mask(mask).cuda()
    with pytest.raises(RuntimeError, match=r"scale must be positive on CUDA, got -1"):
        ops.attend(q, k, v, k, v, words, scale=-1.0)
    shifted = torch.empty(q.numel() + 1, dtype=q.dtype, device="cuda")[1:].view(q.shape)
    with pytest.raises(RuntimeError, match=r"q must start at, .* a multiple of 16 bytes"):
        ops.attend(shifted, k, v, k, v, words)
