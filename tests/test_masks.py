"""Mask conversions and density."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pbs_attn
from pbs_attn import PBSConfig
from pbs_attn.masks import candidate_blocks


@settings(deadline=None, max_examples=50)
@given(num_blocks=st.integers(1, 100), seed=st.integers(0, 2**31))
def test_round_trips(num_blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    selected = torch.rand(2, 3, 4, num_blocks, generator=generator) < 0.5
    block_mask = pbs_attn.bool_to_mask(selected)
    assert block_mask.dtype == torch.int32
    assert block_mask.shape == (2, 3, 4, -(-num_blocks // 32))
    assert torch.equal(pbs_attn.mask_to_bool(block_mask, num_blocks), selected)
    counts, indices = pbs_attn.mask_to_lists(block_mask, num_blocks)
    assert torch.equal(counts, selected.sum(-1))
    for row_counts, row, bits in zip(
        counts.flatten(), indices.flatten(0, 2), selected.flatten(0, 2), strict=True
    ):
        assert row[:row_counts].tolist() == bits.nonzero().flatten().tolist()
    shuffled = torch.stack([row[:num_blocks].roll(0) for row in indices.flatten(0, 2)])
    again = pbs_attn.lists_to_mask(counts, shuffled.view_as(indices), num_blocks)
    assert torch.equal(again, block_mask)


def test_bit_layout():
    selected = torch.zeros(1, 1, 1, 40, dtype=torch.bool)
    selected[..., [0, 31, 33]] = True
    assert pbs_attn.bool_to_mask(selected).tolist() == [[[[1 - 2**31, 2]]]]


def test_errors():
    with pytest.raises(ValueError, match=r"must be int32, got torch\.int64"):
        pbs_attn.mask_to_bool(torch.zeros(1, 1, 1, 1, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="must have 2 words for 40 key blocks, got 1"):
        pbs_attn.mask_to_bool(torch.zeros(1, 1, 1, 1, dtype=torch.int32), 40)
    with pytest.raises(ValueError, match="must be bool"):
        pbs_attn.bool_to_mask(torch.zeros(1, 1, 1, 40))
    with pytest.raises(ValueError, match=r"must lie in \[0, 4\)"):
        pbs_attn.lists_to_mask(torch.tensor([2]), torch.tensor([[0, 4]]), 4)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("num_q", "num_kv"), [(1000, 1000), (300, 1111), (1, 700), (50, 50)])
@pytest.mark.parametrize("kv_block_size", [32, 128])
def test_density_counts_visited_pairs(num_q, num_kv, is_causal, kv_block_size):
    always = {"window": 0, "dense_tail": 0}
    config = PBSConfig(block_size=64, kv_block_size=kv_block_size, threshold=0.1, **always)
    q = torch.randn(1, 4, num_q, 64)
    k, v = torch.randn(2, 1, 2, num_kv, 64)
    chosen = pbs_attn.select(q, k, v, is_causal=is_causal, config=config)
    measured = pbs_attn.density(
        chosen.block_mask, num_q, num_kv, is_causal=is_causal, config=config
    )
    # The op's own counts, and a count of causal pairs that uses positions only.
    offset = num_kv - num_q
    causal = visited_own = 0
    for first in range(0, num_q, 64):
        last_position = num_kv if not is_causal else offset + min(first + 64, num_q)
        own = (num_kv if not is_causal else offset + first) // 256 * 256
        visited_own += len(range(own, last_position, kv_block_size))
        causal += len(range(0, last_position, kv_block_size))
    expected = (chosen.counts.sum(-1) + visited_own) / causal
    torch.testing.assert_close(measured, expected.float())


def test_density_of_all_and_none():
    config = PBSConfig()
    candidates, own = candidate_blocks(1000, 1000, config=config)
    everything = torch.full((1, 1, 8, 1), -1, dtype=torch.int32)
    assert pbs_attn.density(everything, 1000, 1000, config=config).item() == 1
    nothing = pbs_attn.density(torch.zeros_like(everything), 1000, 1000, config=config)
    assert nothing.item() == pytest.approx((own.sum() / (own + candidates).sum()).item())


@pytest.mark.parametrize(
    ("shape", "num_q", "changes", "message"),
    [
        ((1, 4, 8, 1), 1024, {"block_size": 64}, r"size 16 in dimension 2 \(query blocks\), got"),
        ((1, 4, 8, 1), 1100, {}, r"size 9 in dimension 2 \(query blocks\), got \(1, 4, 8, 1\)"),
        ((1, 4, 1, 1), 1024, {}, r"size 8 in dimension 2 \(query blocks\), got \(1, 4, 1, 1\)"),
        ((1, 4, 8, 2), 1024, {}, "1 words for 32 key blocks, got 2"),
        ((4, 8, 1), 1024, {}, r"4 dimensions \(batch, .*words\), got 3 \(4, 8, 1\)"),
    ],
)
def test_density_refuses_masks_of_other_shapes(shape, num_q, changes, message):
    block_mask = torch.zeros(shape, dtype=torch.int32)
    config = PBSConfig(**changes)
    with pytest.raises(ValueError, match=f"block_mask must have {message}"):
        pbs_attn.density(block_mask, num_q, num_q, config=config)


def test_density_refuses_more_queries_than_keys():
    block_mask = torch.zeros(1, 1, 8, 1, dtype=torch.int32)
    message = r"num_queries must be no more than num_keys \(1000\), got 1024"
    with pytest.raises(ValueError, match=message):
        pbs_attn.density(block_mask, 1024, 1000, config=PBSConfig())
