"""Selections of blocks, each as an attention function that also returns its density and its
log-sum-exp.

The selections to compare PBS with at equal density are the same scores without permutation, plain
pooled means over all causal blocks, and a sliding window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

import pbs_attn
from pbs_attn import PBSConfig
from pbs_attn.masks import candidate_blocks

ops = torch.ops.pbs

# query (1, Hq, N, D), key and value (1, Hkv, N, D), scale -> output (1, Hq, N, D), density (Hq,),
# LSE (1, Hq, N) over the visited keys
Attention = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def permuted(config: PBSConfig) -> Attention:
    """PBS: keys change places inside their segments."""

    def attend(q, k, v, scale=None):
        chosen = pbs_attn.select(q, k, v, scale=scale, config=config)
        return _attend(q, k, v, chosen.k_perm, chosen.v_perm, chosen.block_mask, scale, config)

    return attend


def unpermuted(config: PBSConfig) -> Attention:
    """The same scores and segments, with every key in its original place."""

    def attend(q, k, v, scale=None):
        places = torch.arange(k.shape[2], dtype=torch.int32, device=k.device)
        perm = places.expand(1, k.shape[1], -1).contiguous()
        _, _, k_mean = ops.permute_kv(k, v, perm, **config.op_kwargs("permute_kv"))
        mask, _ = ops.select_blocks(
            q, k, k_mean, None, scale=scale, **config.op_kwargs("select_blocks")
        )
        return _attend(q, k, v, k, v, mask, scale, config)

    return attend


def with_means(config: PBSConfig) -> PBSConfig:
    """The same config with mean scores. They select by a sum of masses, with the threshold of that
    rule, and for each query head separately."""
    if config.score == "mean":
        return config
    return dataclasses.replace(
        config, score="mean", mass="causal", threshold=None, select_per="query_head"
    )


def pooled(config: PBSConfig) -> Attention:
    """Pooled means over all causal blocks in their original order: each segment is one block."""
    return unpermuted(dataclasses.replace(with_means(config), segment_size=config.block_size))


def window(config: PBSConfig, num_tokens: int, density: float) -> Attention:
    """The first key block, and the blocks before each query block. Their number gives the largest
    density that does not exceed `density`, on prompts of `num_tokens`."""
    config = dataclasses.replace(config, segment_size=config.block_size)
    candidates, _ = candidate_blocks(num_tokens, num_tokens, config=config)
    columns = torch.arange(-(-num_tokens // config.key_block_size))

    def blocks_within(width: int) -> torch.Tensor:
        is_near = columns >= candidates[:, None] - width
        return (is_near | (columns == 0)) & (columns < candidates[:, None])

    def density_of(width: int) -> float:
        words = pbs_attn.bool_to_mask(blocks_within(width)[None, None])
        return pbs_attn.density(words, num_tokens, num_tokens, config=config).item()

    low, high = 0, len(columns)  # density_of grows with the width
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if density_of(middle) <= density else (low, middle - 1)
    selected = blocks_within(low)

    def attend(q, k, v, scale=None):
        words = pbs_attn.bool_to_mask(selected.to(q.device).expand(1, q.shape[1], -1, -1))
        return _attend(q, k, v, k, v, words, scale, config)

    return attend


def _attend(q, k, v, k_perm, v_perm, words, scale, config):
    settings = config.op_kwargs("attend")
    out, lse = ops.attend(q, k, v, k_perm, v_perm, words, scale=scale, **settings)
    num_tokens = q.shape[2]
    density = pbs_attn.density(words, num_tokens, num_tokens, config=config)[0]
    return out, density.cpu(), lse


def recalled_mass(lse: torch.Tensor, q, k, v, scale=None) -> torch.Tensor:
    """The share of dense attention's mass on the visited keys, averaged over the queries of each
    head, (Hq,). `lse` is that of the visited keys."""
    num_words = -(-k.shape[2] // 128 // 32)
    everything = q.new_full(
        (1, q.shape[1], -(-q.shape[2] // 128), num_words), -1, dtype=torch.int32
    )
    _, of_all = ops.attend(q, k, v, k, v, everything, scale=scale)
    return (lse - of_all).exp().mean(-1)[0].cpu()
