"""Permuted block-sparse attention with the arguments of scaled_dot_product_attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops as _ops  # registers torch.ops.pbs  # noqa: F401
from .config import PBSConfig, check_config

_DEFAULT = PBSConfig()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    config: PBSConfig = _DEFAULT,
) -> Tensor:
    """Attention over the key blocks that matter (arXiv 2510.21270, section 3).

    The operator sorts keys by importance inside segments, and selects key blocks for each block of
    queries. Flash attention then visits the selected blocks and each query's own segment, and is
    exact on them.

    There are three differences from ``scaled_dot_product_attention``. The causal mask is aligned
    to the bottom right, as in chunked prefill: query i of Nq has position Nkv - Nq + i. Grouped
    heads need no flag. There is no derivative, neither backward nor forward-mode. ``torch.vmap``
    adds the vmapped dimension to the batch.

    The selection depends on the last queries of the call. If a later token changes, an earlier row
    may attend to other blocks. With a fixed selection, rows stay causal.

    Args:
        query: (batch, query heads, Nq, head_dim), Nq <= Nkv.
        key: (batch, KV heads, Nkv, head_dim); query heads are a multiple of KV heads.
        value: like ``key``.
        is_causal: if true, a query sees only keys at or before its own position.
        scale: factor of the scores; None means 1/sqrt(head_dim).
        config: the settings.

    All three tensors are float32, bfloat16 or float16, on one device, and have
    head_dim 64, 96, 128 or 256. The last dimension must be contiguous, and other strides are free.

    Returns:
        (batch, query heads, Nq, head_dim) in the dtype and memory order of ``query``.

    Raises:
        RuntimeError: if an argument breaks a rule above, requires grad in grad mode, carries a
            forward-mode tangent, or is of a kind (sparse, nested, quantized) or on a device
            without a kernel.
        TypeError: if ``config`` is not a PBSConfig.
    """
    check_config(config)
    out: Tensor = torch.ops.pbs.attention(
        query, key, value, is_causal=is_causal, scale=scale, **config.op_kwargs()
    )
    return out


class Selection(NamedTuple):
    """Results of the first four stages. Hp is the number of KV or query heads (``permute_per``)."""

    scores: Tensor  # (B, Hp, Nkv) float32: importance of each key
    perm: Tensor  # (B, Hp, Nkv) int32: the key row that stands at each permuted row
    k_perm: Tensor  # (B, Hp, Nkv, D)
    v_perm: Tensor  # (B, Hp, Nkv, D)
    k_mean: Tensor  # (B, Hp, key blocks, D) float32
    block_mask: Tensor  # (B, Hq, query blocks, words) int32, see pbs_attn.masks
    counts: Tensor  # (B, Hq, query blocks) int32: selected key blocks


def select(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    config: PBSConfig = _DEFAULT,
) -> Selection:
    """Runs the stages before ``attend`` one by one, to show which blocks would be visited.

    Takes the arguments of ``attention`` and raises the same errors.
    """
    check_config(config)
    pbs = torch.ops.pbs
    scores = pbs.score_keys(query, key, scale=scale, **config.op_kwargs("score_keys"))
    perm = pbs.sort_segments(scores, **config.op_kwargs("sort_segments"))
    k_perm, v_perm, k_mean = pbs.permute_kv(key, value, perm, **config.op_kwargs("permute_kv"))
    call = {"is_causal": is_causal, "scale": scale}
    block_mask, counts = pbs.select_blocks(
        query, key, k_mean, perm, k_perm, **call, **config.op_kwargs("select_blocks")
    )
    return Selection(scores, perm, k_perm, v_perm, k_mean, block_mask, counts)
