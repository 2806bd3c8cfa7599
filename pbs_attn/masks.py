"""Block masks: conversions, and how much of the causal area they visit.

A block mask is (batch, query heads, query blocks, words) int32; bit j % 32 of word j // 32 says
that key block j, in permuted order, is selected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import PBSConfig, check_config

_BITS = 32


def _num_words(num_kv_blocks: int) -> int:
    return -(-num_kv_blocks // _BITS)


def mask_to_bool(block_mask: Tensor, num_kv_blocks: int) -> Tensor:
    """Unpacks (..., words) int32 into (..., num_kv_blocks) bool.

    Raises:
        ValueError: if the words are not int32, or their number does not fit ``num_kv_blocks``.
    """
    if block_mask.dtype != torch.int32:
        raise ValueError(f"block_mask must be int32, got {block_mask.dtype}")
    if block_mask.shape[-1] != _num_words(num_kv_blocks):
        raise ValueError(
            f"block_mask must have {_num_words(num_kv_blocks)} words for {num_kv_blocks} key "
            f"blocks, got {block_mask.shape[-1]}"
        )
    shifts = torch.arange(_BITS, dtype=torch.int32, device=block_mask.device)
    bits = (block_mask.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :num_kv_blocks].bool()


def bool_to_mask(selected: Tensor) -> Tensor:
    """Packs (..., key blocks) bool into (..., words) int32.

    Raises:
        ValueError: if ``selected`` is not bool.
    """
    if selected.dtype != torch.bool:
        raise ValueError(f"selected must be bool, got {selected.dtype}")
    num_words = _num_words(selected.shape[-1])
    padded = torch.nn.functional.pad(selected, (0, num_words * _BITS - selected.shape[-1]))
    shifts = torch.arange(_BITS, dtype=torch.int64, device=selected.device)
    words = (padded.unflatten(-1, (num_words, _BITS)).long() << shifts).sum(-1)
    # Wraps words with bit 31 set to negative int32, which is their two's complement.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def mask_to_lists(block_mask: Tensor, num_kv_blocks: int) -> tuple[Tensor, Tensor]:
    """Converts a mask to the lists that FlexAttention and FlashAttention-4 take.

    Returns:
        counts (...) int32, and indices (..., num_kv_blocks) int32. The indices have the selected
        key blocks in ascending order first, and then the others, which ``counts`` cuts off.
    """
    selected = mask_to_bool(block_mask, num_kv_blocks)
    indices = torch.argsort(selected.int(), dim=-1, descending=True, stable=True)
    return selected.sum(-1, dtype=torch.int32), indices.int()


def lists_to_mask(counts: Tensor, indices: Tensor, num_kv_blocks: int) -> Tensor:
    """Inverts ``mask_to_lists``. The order of the indices does not matter.

    Raises:
        ValueError: if a counted index is outside [0, num_kv_blocks).
    """
    rank = torch.arange(indices.shape[-1], device=indices.device)
    is_counted = rank < counts.unsqueeze(-1)
    if (is_counted & ((indices < 0) | (indices >= num_kv_blocks))).any():
        raise ValueError(f"indices must lie in [0, {num_kv_blocks}), got one outside")
    # Entries past the count land in one spare column.
    target = torch.where(is_counted, indices.long(), num_kv_blocks)
    shape = (*indices.shape[:-1], num_kv_blocks + 1)
    selected = torch.zeros(shape, dtype=torch.bool, device=indices.device)
    return bool_to_mask(selected.scatter_(-1, target, True)[..., :num_kv_blocks])


def candidate_blocks(
    num_queries: int, num_keys: int, *, is_causal: bool = True, config: PBSConfig
) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block may select, and how many its own segment adds.

    Returns:
        Two int64 tensors (query blocks). The first counts candidates, which are the key blocks of
        the segments before the query block's own. The second counts own blocks, the last of which
        may be visible in part. Without a causal mask, these are the blocks of all complete
        segments, and the blocks of the incomplete tail.

    Raises:
        TypeError: if ``config`` is not a PBSConfig.
        ValueError: if there are more queries than keys.
    """
    check_config(config)
    if num_queries > num_keys:
        raise ValueError(
            f"num_queries must be no more than num_keys ({num_keys}), got {num_queries}"
        )
    first = torch.arange(0, num_queries, config.block_size) + num_keys - num_queries
    last = (first + config.block_size).clamp(max=num_keys)
    if not is_causal:
        first, last = torch.full_like(first, num_keys), torch.full_like(last, num_keys)
    own_begin = first // config.segment_size * config.segment_size
    num_own = -(-(last - own_begin) // config.key_block_size)
    return own_begin // config.key_block_size, num_own


def _check_query_blocks(block_mask: Tensor, num_query_blocks: int) -> None:
    shape = tuple(block_mask.shape)
    if len(shape) != 4:
        raise ValueError(
            "block_mask must have 4 dimensions (batch, heads, query blocks, words), "
            f"got {len(shape)} {shape}"
        )
    if shape[2] != num_query_blocks:
        raise ValueError(
            f"block_mask must have size {num_query_blocks} in dimension 2 (query blocks), "
            f"got {shape}"
        )


def density(
    block_mask: Tensor,
    num_queries: int,
    num_keys: int,
    *,
    is_causal: bool = True,
    config: PBSConfig,
) -> Tensor:
    """Visited share of the (query block, key block) pairs that dense attention visits.

    PBS visits the selected candidates and the own segment. A dense causal kernel visits every
    pair that holds a visible key.

    Args:
        block_mask: (batch, query heads, query blocks, words) int32.
        num_queries: Nq.
        num_keys: Nkv.
        is_causal: as in the call that made the mask.
        config: the settings that made the mask. The mask does not hold them: with another
            ``segment_size``, or a ``kv_block_size`` that needs as many words, the result is wrong
            and no error is raised.

    Returns:
        (batch, query heads) float32.

    Raises:
        TypeError: if ``config`` is not a PBSConfig.
        ValueError: if there are more queries than keys, or if the mask is not int32, or does not
            have four dimensions, the query blocks of ``num_queries`` and ``block_size``, or the
            words of ``num_keys`` and ``kv_block_size``.
    """
    check_config(config)
    _check_query_blocks(block_mask, -(-num_queries // config.block_size))
    num_kv_blocks = -(-num_keys // config.key_block_size)
    candidates, num_own = (
        t.to(block_mask.device)
        for t in candidate_blocks(num_queries, num_keys, is_causal=is_causal, config=config)
    )
    columns = torch.arange(num_kv_blocks, device=block_mask.device)
    is_candidate = columns < candidates.unsqueeze(-1)
    selected = (mask_to_bool(block_mask, num_kv_blocks) & is_candidate).sum((-2, -1))
    return (selected + num_own.sum()).float() / (candidates + num_own).sum()
