"""Attention of sequences side by side and in pages, in plain float64 PyTorch, on the stages of
`reference`.

Names, arguments and shapes are those of the ops. Every function runs one sequence after the other
and returns them as `Sequence`s, from which `joined` makes what an op gives. Keyword arguments are
those of `reference.attention`.
"""

from itertools import pairwise
from typing import NamedTuple

import reference as ref
import torch


class Sequence(NamedTuple):
    """One sequence that has queries, as a batch of one: its inputs and results."""

    q: torch.Tensor  # (1, Hq, Nq, D)
    k: torch.Tensor  # (1, Hkv, Nkv, D), in the order of `visited`
    v: torch.Tensor
    scores: torch.Tensor  # importance of the keys that were sorted
    perm: torch.Tensor  # (1, Hp, Nkv): the row of k at each place
    masses: tuple  # of the candidates and the own blocks, by reference.mass_by_score
    visited: torch.Tensor  # bool (1, Hq, Nq, Nkv)
    out: torch.Tensor  # (1, Hq, Nq, D)


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
    begins = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    return [
        attend_alone(*(as_batch(x) for x in (q[first:end], k[low:high], v[low:high])), **options)
        for (first, end), (low, high) in begins
        if end > first
    ]


def attention_paged(q, k_cache, v_cache, cu_seqlens_q, seq_lens, block_table, **options):
    found = []
    for n, (first, end) in enumerate(pairwise(cu_seqlens_q.tolist())):
        rows = rows_of(block_table[n], int(seq_lens[n]), k_cache.shape[1])
        tensors = q[first:end], k_cache[rows], v_cache[rows]
        if end > first:
            found.append(attend_alone(*map(as_batch, tensors), **options))
    return found


def attention_paged_(q, k_cache, v_cache, cu_seqlens_q, seq_lens, block_table, **options):
    """Writes both caches, too."""
    found = []
    for n, (first, end) in enumerate(pairwise(cu_seqlens_q.tolist())):
        if end == first:
            continue
        rows = rows_of(block_table[n], int(seq_lens[n]), k_cache.shape[1])
        queries, k, v = map(as_batch, (q[first:end], k_cache[rows], v_cache[rows]))
        scores, perm = order_own(queries, k, **options)
        found.append(attend_in_order(queries, k, v, scores, perm, **options))
        for cache, x in ((k_cache, k), (v_cache, v)):
            ordered = x.gather(2, perm[..., None].expand_as(x))
            cache[rows] = ordered[0].transpose(0, 1)
    return found


def order_own(q, k, *, segment_size, num_heavy, block_size, scale=None, **others):
    """The importance of the keys from the first segment of the queries on, and the order of all
    keys. Earlier keys stay in place, and token 0 is the most important key of its segment."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    first = (num_keys - num_queries) // segment_size * segment_size
    sizes = {"block_size": block_size, "segment_size": segment_size, "scale": scale}
    scores = ref.score_keys(q, k[:, :, first:], permute_per="kv_head", **sizes)
    if first == 0 and num_keys >= segment_size:
        scores[..., 0] = torch.inf
    own = ref.sort_segments(scores, segment_size=segment_size, num_heavy=num_heavy)
    before = torch.arange(first).expand(*own.shape[:2], -1)
    return scores, torch.cat([before, own + first], -1)


def attend_alone(q, k, v, **options):
    """Like `reference.attention`, but also returns the visited keys."""
    scores = ref.score_keys(q, k, **of(options, *SCORING, "permute_per"))
    perm = ref.sort_segments(scores, **of(options, "segment_size", "num_heavy"))
    return attend_in_order(q, k, v, scores, perm, **options)


def attend_in_order(q, k, v, scores, perm, **options):
    width = options["kv_block_size"] or options["block_size"]
    k_mean = ref.permute_kv(k, v, perm, kv_block_size=width)[2]
    layout = ref.Layout(q.shape[2], k.shape[2], *of(options, *LAYOUT).values())
    common = of(options, *LAYOUT, "scale")
    mask, _ = ref.select_blocks(q, k, k_mean, perm, **common, **of(options, *SELECTING, *ALWAYS))
    masses = ref.mass_by_score(q, k, k_mean, perm, layout, **of(options, *SELECTING[1:], "scale"))
    visited = ref.visited_keys(perm, mask, layout)
    out, _ = ref.masked_attention(q, k, v, visited, scale=options["scale"])
    return Sequence(q, k, v, scores, perm, masses, visited, out)


SCORING = ("block_size", "segment_size", "scale")
LAYOUT = ("block_size", "kv_block_size", "segment_size", "is_causal")
SELECTING = ("threshold", "mass", "score", "num_samples", "select_per")
ALWAYS = ("window", "dense_tail")


def of(options, *names):
    return {name: options[name] for name in names}


def as_batch(x):
    """(N, H, D) -> (1, H, N, D)."""
    return x.transpose(0, 1)[None]


def rows_of(pages, num_keys, page_size):
    """The pages of the first keys of a sequence, and their rows in these pages."""
    key = torch.arange(num_keys)
    return pages.long()[key // page_size], key % page_size


def joined(sequences):
    """(total Nq, Hq, D)."""
    return torch.cat([sequence.out[0].transpose(0, 1) for sequence in sequences])
