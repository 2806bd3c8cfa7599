"""Attention of several sequences of different lengths, side by side or with K and V in pages."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops as _ops  # registers torch.ops.pbs  # noqa: F401
from .config import PBSConfig, check_config

_DEFAULT = PBSConfig()


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    config: PBSConfig = _DEFAULT,
) -> Tensor:
    """``pbs_attn.attention`` of sequences that are packed side by side, without padding.

    Sequence i has rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of ``q``, and likewise
    ``cu_seqlens_k`` gives its rows of ``k`` and ``v``, as in FlashAttention. The queries are the
    last positions of their sequence. Sequences run one after the other, so the output of a sequence
    does not depend on its neighbours.

    Args:
        q: (total Nq, query heads, head_dim), any strides with a contiguous last dim.
        k, v: (total Nkv, KV heads, head_dim).
        cu_seqlens_q, cu_seqlens_k: (sequences + 1) int32 or int64: 0, and the sums of the lengths
            up to each sequence. Lengths may be 0, and Nq <= Nkv. They are read on the CPU. If they
            are on a GPU, they are copied first, which waits for the GPU.
        is_causal, scale, config: as in ``pbs_attn.attention``.

    Returns:
        (total Nq, query heads, head_dim) in the dtype and memory order of ``q``.

    Raises:
        RuntimeError: if an argument breaks a rule above or one of ``pbs_attn.attention``.
        TypeError: if ``config`` is not a PBSConfig.
    """
    check_config(config)
    out: Tensor = torch.ops.pbs.attention_varlen(
        q, k, v, cu_seqlens_q.cpu(), cu_seqlens_k.cpu(),
        is_causal=is_causal, scale=scale, **config.op_kwargs("attention_varlen"),
    )  # fmt: skip
    return out


def attention_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    config: PBSConfig = _DEFAULT,
) -> Tensor:
    """``attention_varlen`` with keys and values in pages, as serving engines keep them.

    Key j of sequence i is row j % page_size of page block_table[i, j // page_size]. The function
    first copies the keys and values of a sequence out of their pages. ``attention_paged_`` copies
    less.

    Args:
        q: (total Nq, query heads, head_dim).
        k_cache, v_cache: (pages, page_size, KV heads, head_dim), any strides with a contiguous last
            dim; page_size is a multiple of 16.
        cu_seqlens_q: (sequences + 1) as in ``attention_varlen``.
        seq_lens: (sequences) int32 or int64: Nkv of each sequence, at least its Nq. It is read on
            the CPU, too.
        block_table: (sequences, pages of the longest sequence) int32, on the device of ``q``.
            Entries after a sequence's last page are not read. If a number is not that of a page,
            the output of the sequence is NaN on a GPU, and the CPU raises an error.
        is_causal, scale, config: as in ``pbs_attn.attention``.

    Returns:
        (total Nq, query heads, head_dim) in the dtype and memory order of ``q``.

    Raises:
        RuntimeError: if an argument breaks a rule above or one of ``pbs_attn.attention``.
        TypeError: if ``config`` is not a PBSConfig.
    """
    check_config(config)
    out: Tensor = torch.ops.pbs.attention_paged(
        q, k_cache, v_cache, cu_seqlens_q.cpu(), seq_lens.cpu(), block_table,
        is_causal=is_causal, scale=scale, **config.op_kwargs("attention_paged"),
    )  # fmt: skip
    return out


def attention_paged_(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    config: PBSConfig = _DEFAULT,
) -> None:
    """Causal attention that sorts keys and values inside their pages, for prompts in chunks.

    When a call completes a segment, it permutes the keys and values of the segment by importance
    inside their page, after its queries have seen the original order. Later calls use the new
    order. So a chunk sorts and moves only its own keys, and reads earlier keys in their pages.
    Other attention over the same pages stays exact, because the order of keys does not matter to a
    query that sees all of them. These rules hold:

    - Page size is a power of two and a multiple of ``config.segment_size``, so that a segment lies
      in one page.
    - A query's own segment is in its original order: once a segment is complete and this function
      has seen it, no query of that segment may come again, unless its page is written anew.
    - Key j of a segment that is not yet complete is row j % page_size of its page.

    The importance of a segment's keys comes from the last queries of the call that completes it,
    over the keys from the call's first segment on. Token 0 stays first.

    Args:
        out: (total Nq, query heads, head_dim) in the dtype of ``q``, written.
        k, v: None, or (total Nq, KV heads, head_dim): keys and values of the queries' own positions
            as the pages hold them. A chunk that begins with a segment then copies nothing out of
            its pages. Page numbers are then not checked on a GPU, but every access stays inside
            the caches.
        config: settings with ``score="sampled"`` and ``permute_per="kv_head"``.
        q, k_cache, v_cache, cu_seqlens_q, seq_lens, block_table, scale: as in
            ``attention_paged``. ``k_cache`` and ``v_cache`` are written.

    Raises:
        RuntimeError: if an argument breaks a rule above that can be checked, or one of
            ``pbs_attn.attention``.
        TypeError: if ``config`` is not a PBSConfig.
    """
    check_config(config)
    torch.ops.pbs.attention_paged_(
        q, k_cache, v_cache, out, cu_seqlens_q.cpu(), seq_lens.cpu(), block_table, k, v,
        scale=scale, **config.op_kwargs("attention_paged_"),
    )  # fmt: skip
