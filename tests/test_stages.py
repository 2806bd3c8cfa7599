"""Each CPU op against the float64 reference, stage by stage, then all five in one call.

Every op gets the result of the reference for the previous stage, rounded to the dtype that the op
expects. Inputs are drawn until rounding can change no sort across a block border and no selection,
so that integer results must be equal.
"""

import functools
import itertools
import math
from typing import NamedTuple

import pytest
import reference as ref
import torch
from cases import DTYPES, Case, clustered_qkv, run_stages
from tolerances import (
    assert_attends,
    assert_output,
    assert_within_twice,
    is_decided,
)

from pbs_attn.ops import HEAD_DIMS

ops = torch.ops.pbs

CASES = [
    Case(256, 256, num_kv_heads=4),
    Case(
        300, 300, num_q_heads=6, block_size=64, kv_block_size=32, segment_size=128, strides="bnhd"
    ),
    Case(333, 333, num_q_heads=5, num_kv_heads=1, strides="slice"),
    Case(128, 384, mass="causal", threshold=0.7, strides="slice"),
    Case(75, 301, permute_per="query_head", strides="bnhd"),
    Case(150, 331, block_size=64, segment_size=64, mass="causal", scale=0.3),
    Case(1, 259, batch=3, block_size=64, segment_size=64, permute_per="query_head"),
    Case(1, 64, mass="causal"),
    Case(50, 50, permute_per="query_head", strides="slice"),
    Case(7, 7, num_kv_heads=1, mass="causal", strides="bnhd"),
    Case(1, 1),
    Case(65, 65, threshold=0.3, num_heavy=8),
    Case(300, 300, is_causal=False, strides="bnhd", num_heavy=16),
    Case(77, 192, is_causal=False, mass="causal", permute_per="query_head", threshold=0.5),
    Case(77, 231, is_causal=False, mass="causal", num_q_heads=3, num_kv_heads=1, kv_block_size=64),
    Case(20, 50, is_causal=False, permute_per="query_head"),
    Case(700, 700, batch=1, block_size=128, segment_size=256),
    Case(290, 290, kv_block_size=128, segment_size=128, mass="causal", threshold=0.6),
    Case(513, 513, batch=1, block_size=128, kv_block_size=32, segment_size=256, num_heavy=32),
    Case(400, 400, permute_per="query_head", num_heavy=1, threshold=0.6, num_kv_heads=4),
    Case(90, 1300, batch=1, num_q_heads=2, num_kv_heads=1, num_heavy=24, segment_size=128),
    Case(260, 260, threshold=1.0, mass="causal", kv_block_size=64),
]
# Blocks that are always visited, with mean scores.
ALWAYS = [
    Case(331, 331, window=1, strides="slice"),
    Case(300, 300, window=128, dense_tail=33, mass="causal", threshold=0.6, num_heavy=8),
    Case(150, 331, window=10**9, permute_per="query_head", threshold=0.3),
    Case(90, 290, dense_tail=1, threshold=0.3, kv_block_size=64, segment_size=128),
    Case(290, 290, window=64, dense_tail=256, is_causal=False, threshold=0.4),
]
SAMPLED = [
    Case(331, 331, threshold=0.1, num_heavy=8, strides="slice"),
    Case(300, 300, threshold=0.02, is_causal=False, num_samples=32),
    Case(77, 431, threshold=0.3, kv_block_size=64, num_samples=3, permute_per="query_head"),
    Case(1, 259, block_size=64, num_samples=17, scale=0.3, threshold=0.05, strides="bnhd"),
    Case(270, 270, head_dim=256, batch=1, block_size=64, segment_size=128, threshold=0.05),
    Case(700, 700, batch=1, segment_size=192, num_heavy=16, threshold=0.02, num_samples=16),
    Case(613, 900, batch=1, block_size=64, segment_size=320, kv_block_size=32, threshold=0.05),
    Case(1100, 1100, batch=1, block_size=128, kv_block_size=32, segment_size=512, num_heavy=32,
         threshold=0.01, num_samples=16, window=128, dense_tail=256, num_q_heads=2),
    Case(620, 620, batch=1, block_size=128, kv_block_size=128, segment_size=256, threshold=0.02,
         num_samples=16, window=1, select_per="kv_head"),
    Case(331, 331, num_q_heads=6, threshold=0.05, num_samples=5, select_per="kv_head"),
    Case(300, 411, num_q_heads=5, num_kv_heads=1, threshold=0.1, select_per="kv_head",
         num_samples=3, window=70, dense_tail=1, strides="slice"),
    Case(290, 290, is_causal=False, num_kv_heads=4, select_per="kv_head", threshold=0.03),
    Case(300, 300, threshold=0.02, dense_tail=10**9, window=10**9),
    Case(300, 300, threshold=1.0, select_per="kv_head"),
]  # fmt: skip
SAMPLED = [case._replace(score="sampled", mass="block") for case in SAMPLED]
WIDE = [
    Case(*lengths, head_dim=head_dim, batch=1, block_size=64, segment_size=128, strides=strides)
    for head_dim in HEAD_DIMS[1:]
    for lengths, strides in [((200, 331), "bnhd"), ((270, 270), "slice")]
]
WIDE += [Case(600, 600, head_dim=128, batch=1, block_size=128, segment_size=256, strides="bnhd")]
every_case = pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}")
        for case, dtype in itertools.product(CASES + ALWAYS + SAMPLED + WIDE, DTYPES)
    ],
)


class Stages(NamedTuple):
    """The results of the reference. Each stage starts from the rounded result of the previous
    one."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scores: torch.Tensor
    perm: torch.Tensor
    k_perm: torch.Tensor
    v_perm: torch.Tensor
    k_mean: torch.Tensor
    mask: torch.Tensor


@functools.cache
def stages_of(case, dtype):
    for seed in range(100):
        stages, is_settled = draw_stages(case, dtype, seed)
        if is_settled:
            return stages
    raise AssertionError(f"no inputs for {case} whose selection rounding cannot change")


def draw_stages(case, dtype, seed):
    q, k, v = clustered_qkv(case, dtype, seed)
    scores = ref.score_keys(q, k, **case.kwargs("score_keys"))
    perm = ref.sort_segments(scores, **case.kwargs("sort_segments"))
    k_perm, v_perm, k_mean = ref.permute_kv(k, v, perm, **case.kwargs("permute_kv"))
    mask, _ = ref.select_blocks(q, k, k_mean, perm, **case.kwargs("select_blocks"))
    masses = ref.masses_of(case, q, k, k_mean, perm)
    is_settled = is_decided(masses, case).all() and sorts_clearly(case, scores)
    return Stages(q, k, v, scores, perm, k_perm, v_perm, k_mean, mask), is_settled


def sorts_clearly(case, scores):
    """Whether neighbours in rank in different key blocks (or parts) differ by 1e-6."""
    num_sorted = case.num_keys // case.segment_size * case.segment_size
    ranked = scores[..., :num_sorted].unflatten(-1, (-1, case.segment_size))
    ranked = ranked.sort(-1, descending=True).values
    borders = torch.arange(case.kv_block, case.segment_size, case.kv_block)
    if case.num_heavy is not None:
        borders = torch.tensor([case.num_heavy])
    above, below = ranked[..., borders - 1], ranked[..., borders]
    return num_sorted == 0 or (above - below > 1e-6 * above).all()


def leave_ones_behind(*tensors):
    """Frees memory full of 0xFF (NaN, or -1) in the sizes that an op will allocate."""
    for x in tensors:
        torch.full((x.numel() * x.element_size(),), 0xFF, dtype=torch.uint8)


@every_case
def test_score_keys(case, dtype):
    q, k, *_ = stages_of(case, dtype)
    assert_scores(case, q, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_score_keys_with_sharp_softmax(dtype):
    """Logits are far beyond the range of exp without the maximum over all keys."""
    case = Case(700, 700, segment_size=128)
    q, k, _ = clustered_qkv(case, dtype, seed=0)
    assert_scores(case, q * 1000, k)


def assert_scores(case, q, k):
    options = case.kwargs("score_keys")
    exact = ref.score_keys(q, k, **options)
    leave_ones_behind(exact.float())
    scores = ops.score_keys(q, k, **options)

    num_sorted = case.num_keys // case.segment_size * case.segment_size
    keys = ref.repeat_heads(k, case.num_q_heads)[:, :, :num_sorted].float()
    logits = q[:, :, -case.block_size :].float() @ keys.mT * ref.scale_for(q, case.scale)
    in_torch = logits.softmax(-1).mean(2)
    if case.permute_per == "kv_head":
        in_torch = in_torch.unflatten(1, (case.num_kv_heads, -1)).mean(2)
    assert scores.dtype == torch.float32
    assert (scores[..., num_sorted:] == 0).all()
    scores, exact = scores[..., :num_sorted], exact[..., :num_sorted]
    assert_within_twice(scores, in_torch, exact, "scores")


@every_case
def test_sort_segments(case, dtype):
    scores = stages_of(case, dtype).scores.float()
    options = case.kwargs("sort_segments")
    leave_ones_behind(scores)
    perm = ops.sort_segments(scores, **options)
    assert perm.dtype == torch.int32
    assert torch.equal(perm.long(), ref.sort_segments(scores, **options))


@pytest.mark.parametrize("num_heavy", [None, 1, 13, 64])
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_sort_segments_with_ties(levels, num_heavy):
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(levels, (2, 3, 300), generator=generator).float()
    perm = ops.sort_segments(scores, segment_size=64, num_heavy=num_heavy)
    exact = ref.sort_segments(scores, segment_size=64, num_heavy=num_heavy)
    assert torch.equal(perm.long(), exact)


@every_case
def test_permute_kv(case, dtype):
    _, k, v, _, perm, exact_k, exact_v, exact_mean, _ = stages_of(case, dtype)
    leave_ones_behind(exact_k.to(dtype), exact_v.to(dtype), exact_mean.float())
    k_perm, v_perm, k_mean = ops.permute_kv(k, v, perm.int(), **case.kwargs("permute_kv"))
    assert torch.equal(k_perm, exact_k.to(dtype))
    assert torch.equal(v_perm, exact_v.to(dtype))
    assert k_mean.dtype == torch.float32
    in_torch = ref.block_mean(exact_k.float(), case.kv_block)
    assert_within_twice(k_mean, in_torch, exact_mean, "k_mean")


@every_case
def test_select_blocks(case, dtype):
    q, k, _, _, perm, k_perm, _, k_mean, exact = stages_of(case, dtype)
    words = ref.pack_mask(exact)
    leave_ones_behind(words)
    tensors = q, k, k_mean.float(), perm.int(), k_perm.to(dtype)
    mask, counts = ops.select_blocks(*tensors, **case.kwargs("select_blocks"))
    assert mask.dtype == counts.dtype == torch.int32
    assert torch.equal(mask, words)
    assert torch.equal(counts.long(), exact.sum(-1))


@pytest.mark.parametrize("mass", ["earlier", "causal"])
@pytest.mark.parametrize("threshold", [0.12, 0.5, 0.55, 0.76, 1.0])
def test_select_blocks_breaks_ties_by_index(threshold, mass):
    """Keys are equal, so all blocks have exactly the same mass. With perm=None, token 0 is in block
    0."""
    q, k = torch.ones(1, 2, 320, 64), torch.full((1, 2, 320, 64), 0.5)
    k_mean = torch.full((1, 2, 10, 64), 0.5)
    sizes = {"block_size": 32, "segment_size": 64, "threshold": threshold, "mass": mass}
    mask, counts = ops.select_blocks(q, k, k_mean, **sizes)
    mask = ref.unpack_mask(mask, 10)
    for i in range(10):
        candidates, own = i // 2 * 2, i % 2 + 1 if mass == "causal" else 0
        if threshold == 0.5 and (candidates + own) % 8 not in (0, 4):
            continue  # sums of thirds or tenths reach one half only in exact arithmetic
        needed = math.ceil(threshold * (candidates + own)) - own
        expected = min(candidates, max(1, needed))
        assert (counts[:, :, i] == expected).all()
        assert (mask[:, :, i] == (torch.arange(10) < expected)).all()


def test_select_blocks_at_threshold_1_keeps_blocks_without_mass():
    """One block holds all mass that float32 can represent. Below threshold 1, it is enough,
    together with the block of token 0."""
    q, k, k_mean = torch.ones(1, 1, 256, 64), torch.zeros(1, 1, 256, 64), torch.zeros(1, 1, 8, 64)
    k_mean[:, :, 3] = 50
    sizes = {"block_size": 32, "segment_size": 64}
    for threshold, expected in [(0.9999, 2), (1.0, 6)]:
        _, counts = ops.select_blocks(q, k, k_mean, threshold=threshold, **sizes)
        assert counts[0, 0, 6:].eq(expected).all()


@pytest.mark.parametrize("row", [31, 40, 63])
def test_a_sample_of_nan_selects_everything(row):
    """This holds for each of the samples: the first, one in the middle, and the last."""
    q, k = torch.randn(2, 1, 2, 256, 64, generator=torch.Generator().manual_seed(0))
    q[0, 0, 192 + row] = torch.nan
    sizes = {"block_size": 64, "segment_size": 64, "num_samples": 64, "threshold": 0.5}
    k_mean = torch.zeros(1, 2, 4, 64)
    _, counts = ops.select_blocks(q, k, k_mean, score="sampled", mass="block", **sizes)
    assert counts[0, 0, 3] == 3
    assert (counts[0, 1, 3] < 3).all()


@pytest.mark.parametrize("num_keys", [384, 300])
def test_select_blocks_means_over_the_rows_that_exist(num_keys):
    """The mean of the own block of queries from 256 on is over all its rows, including those after
    the queries (384 keys), and over no padding (300 keys)."""
    q = torch.ones(1, 1, num_keys, 64)
    k = torch.zeros(1, 1, num_keys, 64)
    k[:, :, 288:] = 0.5 * 128 / 96
    if num_keys == 300:
        k[:, :, 256:] = 0.5
    sizes = {"block_size": 32, "kv_block_size": 128, "segment_size": 128, "mass": "causal"}
    k_mean = torch.zeros(1, 1, 3, 64)
    mask, counts = ops.select_blocks(q, k, k_mean, threshold=0.95, **sizes)
    # exp(8 * 0.5) against two blocks of exp(0): the own share is 0.965.
    assert counts[0, 0, 8:].eq(1).all()
    assert ref.unpack_mask(mask, 3)[0, 0, 8:, 0].all()
    _, counts = ops.select_blocks(q, k, k_mean, threshold=0.99, **sizes)
    assert counts[0, 0, 8:].eq(2).all()


@every_case
def test_attend(case, dtype):
    q, k, v, _, perm, k_perm, v_perm, _, mask = stages_of(case, dtype)
    any_blocks = torch.rand(mask.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    tensors = q, k, v, k_perm.to(dtype), v_perm.to(dtype)
    for blocks in (mask, any_blocks):
        exact_out, exact_lse = ref.attend(q, k, v, perm, blocks, **case.kwargs("attend"))
        leave_ones_behind(q, exact_lse.float())
        words = ref.pack_mask(blocks)
        out, lse = ops.attend(*tensors, words, **case.kwargs("attend"))
        visited = ref.visited_keys(perm, blocks, case.layout)
        assert_attends(out, lse, q, k, v, visited, exact_out, exact_lse, scale=case.scale)
        assert out.stride() == torch.empty_like(q).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [30.0, 1000.0])
def test_attend_with_sharp_softmax(factor, dtype):
    """Logits are far beyond the range of exp without the running maximum."""
    case = Case(200, 200)
    q, k, v, _, perm, k_perm, v_perm, _, mask = stages_of(case, dtype)
    q = q * factor
    exact_out, exact_lse = ref.attend(q, k, v, perm, mask, **case.kwargs("attend"))
    assert exact_lse.abs().max() > 89 / 2 * factor / 30
    words = ref.pack_mask(mask)
    tensors = q, k, v, k_perm.to(dtype), v_perm.to(dtype)
    out, lse = ops.attend(*tensors, words, **case.kwargs("attend"))
    visited = ref.visited_keys(perm, mask, case.layout)
    assert_attends(out, lse, q, k, v, visited, exact_out, exact_lse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_attend_rounds_to_nearest_even(size, dtype):
    """The mean of two neighbouring values is a tie; float16 is subnormal at the smaller size."""
    q = torch.zeros(1, 1, 2, 64, dtype=dtype)
    first = torch.full((64,), size, dtype=dtype).view(torch.int16) + torch.arange(64).short()
    v = torch.stack([first, first + 1]).view(dtype)[None, None]
    words = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    out, _ = ops.attend(q, q, v, q, v, words, block_size=32, segment_size=32)
    assert torch.equal(out[0, 0, 1], v[0, 0].double().mean(0).to(dtype))


@every_case
def test_attention(case, dtype):
    """One call of all five stages visits the same keys, and its output on them is right."""
    stages = stages_of(case, dtype)
    q, k, v = stages[:3]
    exact = ref.attention(q, k, v, **case.kwargs("attention"))
    leave_ones_behind(q)
    out = ops.attention(q, k, v, **case.kwargs("attention"))
    visited = ref.visited_keys(stages.perm, stages.mask, case.layout)
    assert_output(out, q, k, v, visited, exact, scale=case.scale)
    assert out.stride() == torch.empty_like(q).stride()

    by_stage = run_stages(case, q, k, v)
    mask = ref.unpack_mask(by_stage.block_mask, stages.mask.shape[-1])
    assert torch.equal(ref.visited_keys(by_stage.perm, mask, case.layout), visited)
