"""Permuted block-sparse attention in plain float64 PyTorch, one function per stage.

Source: "Sparser Block-Sparse Attention via Token Permutation", arXiv 2510.21270v2. Its own variant
is `permute_per="query_head"`, `num_heavy=None`, `mass="earlier"`.

Names and keyword arguments are those of the ops, with these differences. Everything returned is
float64, int64 or bool. The block mask is a bool tensor (B, Hq, num_q_blocks, num_kv_blocks);
`pack_mask` and `unpack_mask` give the ops' bits. `select_blocks` takes no `k_perm`, since it orders
the keys by `perm` itself. `attend` takes the permutation instead of the permuted K and V: it maps
the selected blocks back to the original keys and masks a dense matrix, so that it shares no step
with a kernel that walks permuted blocks. Defaults are the paper's, but for one order per KV head,
and 8 samples; those of `ops.attention` are PBSConfig's.

B batch, Hq query heads, Hkv key/value heads, Hp = Hkv or Hq heads of the permutation, D head dim.
Query row i stands at position num_keys - num_queries + i.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from rounding import Rounded, candidates_to_e4m3, cut_softmax, rounded_products

# Candidates that replace own keys if there are none, as on CUDA.
FIRST_KEYS = 32


class Layout(NamedTuple):
    """The positions of blocks and segments. `kv_block_size=None` means `block_size`."""

    num_queries: int
    num_keys: int
    block_size: int
    kv_block_size: int | None
    segment_size: int
    is_causal: bool


def score_keys(q, k, *, block_size=128, segment_size=256, scale=None, permute_per="kv_head"):
    """Importance of each key (Eq. 7) among the keys of the complete segments, (B, Hp, num_keys); 0
    elsewhere. One permutation for a group: the mean importance of its query heads. (Appendix G
    averages the queries instead.)"""
    num_keys, num_kv_heads = k.shape[2], k.shape[1]
    num_sorted = num_keys // segment_size * segment_size
    last_queries = q[:, :, -block_size:].double()
    keys = repeat_heads(k, q.shape[1])[:, :, :num_sorted].double()
    importance = (scale_for(q, scale) * last_queries @ keys.mT).softmax(-1).mean(2)
    if permute_per == "kv_head":
        importance = importance.unflatten(1, (num_kv_heads, -1)).mean(2)
    return F.pad(importance, (0, num_keys - num_sorted))


def sort_segments(scores, *, segment_size=256, num_heavy=None):
    """Key row that stands at each place after permuting, (B, Hp, num_keys): Eq. 8 inside each
    segment, block-diagonal with an identity for the incomplete one as Eq. 6. `num_heavy` departs
    from the paper: that many most important keys first, both parts in original order."""
    num_keys = scores.shape[-1]
    num_segments = num_keys // segment_size
    num_sorted = num_segments * segment_size
    segments = scores[..., :num_sorted].unflatten(-1, (num_segments, segment_size))
    order = segments.argsort(dim=-1, descending=True, stable=True)
    if num_heavy is not None:
        heavy, light = order[..., :num_heavy], order[..., num_heavy:]
        order = torch.cat([heavy.sort(-1).values, light.sort(-1).values], -1)
    first_of_segment = torch.arange(0, num_sorted, segment_size)[:, None]
    tail = torch.arange(num_sorted, num_keys).expand(*scores.shape[:-1], -1)
    return torch.cat([(order + first_of_segment).flatten(-2), tail], -1)


def permute_kv(k, v, perm, *, kv_block_size=128):
    """K' and V' (Algorithm 1), (B, Hp, num_keys, D), and the mean of each block of K' over the rows
    it has (Algorithm 2, line 3), (B, Hp, num_kv_blocks, D)."""
    k, v = (repeat_heads(x, perm.shape[1]).double() for x in (k, v))
    rows = perm.long()[..., None].expand_as(k)
    k_perm, v_perm = k.gather(2, rows), v.gather(2, rows)
    return k_perm, v_perm, block_mean(k_perm, kv_block_size)


def select_blocks(
    q,
    k,
    k_mean,
    perm=None,
    *,
    block_size=128,
    kv_block_size=None,
    segment_size=256,
    threshold=0.9,
    is_causal=True,
    scale=None,
    mass="earlier",
    score="mean",
    num_samples=8,
    select_per="query_head",
    window=0,
    dense_tail=0,
):
    """Algorithm 2 (Appendix D.1): bool mask (B, Hq, num_q_blocks, num_kv_blocks) and its counts.
    Blocks of `window` and `dense_tail` are visited besides."""
    layout = Layout(q.shape[2], k.shape[2], block_size, kv_block_size, segment_size, is_causal)
    candidate, _ = block_roles(layout)
    options = {"scale": scale, "mass": mass, "score": score, "num_samples": num_samples}
    options["select_per"] = select_per
    masses = mass_by_score(q, k, k_mean, perm, layout, **options)

    mask = masses[0] >= threshold if mass == "block" else smallest_set(*masses, threshold)
    if threshold == 1:
        mask = candidate.expand_as(mask).clone()
    sink = sink_block(perm, k_mean, q.shape[1], kv_block_size or block_size)
    mask |= torch.arange(mask.shape[-1]) == sink[..., None, None]
    mask |= always_visited(layout, window, dense_tail)
    mask &= candidate
    return mask, mask.sum(-1)


def attend(
    q,
    k,
    v,
    perm,
    block_mask,
    *,
    block_size=128,
    kv_block_size=None,
    segment_size=256,
    is_causal=True,
    scale=None,
):
    """Attention over the visited keys only: (out like q, natural-log LSE (B, Hq, num_queries))."""
    layout = Layout(q.shape[2], k.shape[2], block_size, kv_block_size, segment_size, is_causal)
    return masked_attention(q, k, v, visited_keys(perm, block_mask, layout), scale=scale)


def attention(
    q,
    k,
    v,
    *,
    is_causal=True,
    scale=None,
    block_size=128,
    kv_block_size=None,
    segment_size=256,
    threshold=0.9,
    permute_per="kv_head",
    num_heavy=None,
    mass="earlier",
    score="mean",
    num_samples=8,
    select_per="query_head",
    window=0,
    dense_tail=0,
):
    """The five stages in a row (Algorithm 1 with the queries left in place), like q."""
    scoring = {"scale": scale, "block_size": block_size, "segment_size": segment_size}
    common = {**scoring, "kv_block_size": kv_block_size, "is_causal": is_causal}
    scores = score_keys(q, k, permute_per=permute_per, **scoring)
    perm = sort_segments(scores, segment_size=segment_size, num_heavy=num_heavy)
    k_mean = permute_kv(k, v, perm, kv_block_size=kv_block_size or block_size)[2]
    selection = {"threshold": threshold, "mass": mass, "score": score, "num_samples": num_samples}
    always = {"window": window, "dense_tail": dense_tail}
    selection |= {"select_per": select_per, **always}
    mask, _ = select_blocks(q, k, k_mean, perm, **selection, **common)
    return attend(q, k, v, perm, mask, **common)[0]


def block_roles(layout):
    """The role of each key block for each query block: (candidate, own), bool (num_q_blocks,
    num_kv_blocks) each. Candidates are the permuted blocks that a query block may select. Its own
    blocks, in original order, are always visited."""
    num_queries, num_keys, block_size, kv_block_size, segment_size, is_causal = layout
    kv_block_size = kv_block_size or block_size
    first_position = num_keys - num_queries + torch.arange(0, num_queries, block_size)
    last_position = (first_position + block_size).clamp(max=num_keys) - 1
    own_start = first_position // segment_size * segment_size
    if not is_causal:
        own_start = torch.full_like(own_start, num_keys // segment_size * segment_size)
        last_position = torch.full_like(last_position, num_keys - 1)
    own_start, last_position = own_start[:, None], last_position[:, None]
    block_start = torch.arange(0, num_keys, kv_block_size)
    candidate = block_start + kv_block_size <= own_start
    own = (block_start >= own_start) & (block_start <= last_position)
    return candidate, own


def always_visited(layout, window, dense_tail):
    """Blocks that a query block always visits, bool (num_q_blocks, num_kv_blocks). Some of them are
    not candidates. With a causal mask, they are the blocks of segments that hold one of the
    `window` keys before its first row, and all blocks if it holds one of the last `dense_tail`
    queries."""
    num_queries, num_keys, block_size, kv_block_size, segment_size, is_causal = layout
    first_row = torch.arange(0, num_queries, block_size)[:, None]
    last_row = (first_row + block_size).clamp(max=num_queries) - 1
    first_segment = (num_keys - num_queries + first_row - window).clamp(min=0) // segment_size
    segment = torch.arange(0, num_keys, kv_block_size or block_size) // segment_size
    always = (segment >= first_segment) | (last_row >= num_queries - dense_tail)
    return always & is_causal


def smallest_set(candidate_mass, own_mass, threshold):
    """The smallest set of the heaviest candidates whose mass, with that of the own blocks, reaches
    the threshold."""
    largest_first, order = candidate_mass.sort(dim=-1, descending=True, stable=True)
    reached_before = own_mass[..., None] + F.pad(largest_first.cumsum(-1), (1, -1))
    needed = reached_before < threshold
    return torch.zeros_like(needed).scatter(-1, order, needed)


def block_mass(q, k, k_mean, layout, *, scale=None, mass="earlier"):
    """Algorithm 2, line 5: each candidate's share of the softmax over blocks, (B, Hq, num_q_blocks,
    num_kv_blocks), and the share of the own blocks together, (B, Hq, num_q_blocks). Own blocks take
    part when mass="causal"; with the paper's "earlier" their share is 0."""
    candidate, own = block_roles(layout)
    if mass == "earlier":
        own = torch.zeros_like(own)
    q_mean = scale_for(q, scale) * block_mean(q.double(), layout.block_size)
    k_own = block_mean(k.double(), layout.kv_block_size or layout.block_size)
    permuted = q_mean @ repeat_heads(k_mean, q.shape[1]).double().mT
    original = q_mean @ repeat_heads(k_own, q.shape[1]).mT
    permuted = permuted.masked_fill(~candidate, -torch.inf)
    original = original.masked_fill(~own, -torch.inf)
    share = torch.cat([permuted, original], -1).softmax(-1)
    candidate_share, own_share = share.nan_to_num(0.0).chunk(2, -1)  # NaN: a row without blocks
    return candidate_share, own_share.sum(-1)


def sampled_mass(
    q, k, perm, layout, num_samples, *, scale=None, select_per="query_head", rounding=None
):
    """The largest share of its attention that any of a few queries of a block gives each candidate,
    (B, Hq, num_q_blocks, num_kv_blocks), and the own blocks, summed to (B, Hq, num_q_blocks).

    `num_samples` queries of each query block are sampled, or all if it has fewer. The i-th is at
    the end of the i-th of `num_samples` equal parts. With select_per="kv_head", the i-th comes from
    head i modulo the number of heads that share a KV head. A query weighs every candidate key, and
    each own key up to its own position. With rounding="e4m3", queries and candidates are rounded
    and shares are limited, as in the sm90 kernels. With rounding="limited", only shares are
    limited, as in the sm80 kernels."""
    num_queries, num_keys, block_size, kv_block_size, _, is_causal = layout
    candidate, _ = block_roles(layout)
    width, num_heads = kv_block_size or block_size, q.shape[1]
    candidate_ends = (candidate.sum(-1) * width).tolist()
    if perm is None:
        perm = torch.arange(num_keys).expand(*k.shape[:3])
    k_perm, _, _ = permute_kv(k, k, perm)
    if rounding == "e4m3":
        rounded_keys = candidates_to_e4m3(k_perm, max(candidate_ends, default=0))
        rounded_keys = [repeat_heads(x, num_heads) for x in rounded_keys]
    permuted_keys = repeat_heads(k_perm, num_heads)
    original_keys = repeat_heads(k, num_heads).double()
    group = num_heads // k.shape[1] if select_per == "kv_head" else 1
    first_head = torch.arange(num_heads)[:, None] // group * group
    candidate_share, own_share = [], []
    for end, rows in zip(candidate_ends, torch.arange(num_queries).split(block_size), strict=True):
        count = min(num_samples, len(rows))
        nth = torch.arange(count)
        rows = rows[(nth + 1) * len(rows) // count - 1]
        samples = q[:, first_head + nth % group, rows].double()
        permuted = scale_for(q, scale) * samples @ permuted_keys[:, :, :end].mT
        # Own keys follow the candidates, up to the last sample's own position.
        own = torch.arange(end, num_keys)
        if is_causal:
            position = num_keys - num_queries + rows
            own = torch.arange(end, position[-1] + 1)
        original = scale_for(q, scale) * samples @ original_keys[:, :, own].mT
        if is_causal:
            original = original.masked_fill(own > position[:, None], -torch.inf)
        if rounding is not None:
            first = permuted[..., :FIRST_KEYS]
            if rounding == "e4m3":
                met = rounded_products(samples, Rounded(*(x[:, :, :end] for x in rounded_keys)))
                permuted = scale_for(q, scale) * met
            weights = cut_softmax(permuted, original, first)
        else:
            weights = torch.cat([permuted, original], -1).softmax(-1).nan_to_num(0.0)
        padded = F.pad(weights, (0, -len(own) % width))
        share = padded.unflatten(-1, (padded.shape[-1] // width, width)).sum(-1).amax(2)
        num_candidates = end // width
        missing = candidate.shape[1] - num_candidates
        candidate_share.append(F.pad(share[..., :num_candidates], (0, missing)))
        own_share.append(share[..., num_candidates:].sum(-1))
    return torch.stack(candidate_share, 2), torch.stack(own_share, 2)


def mass_by_score(
    q,
    k,
    k_mean,
    perm,
    layout,
    *,
    score,
    num_samples,
    select_per,
    mass="earlier",
    scale=None,
    rounding=None,
):
    """Calls `sampled_mass`, whose `mass` is "block", or `block_mass`, with its arguments."""
    if score == "sampled":
        options = {"scale": scale, "select_per": select_per, "rounding": rounding}
        return sampled_mass(q, k, perm, layout, num_samples, **options)
    return block_mass(q, k, k_mean, layout, scale=scale, mass=mass)


def masses_of(case, q, k, k_mean, perm, *, rounding=None):
    """The masses that a test case asks for."""
    names = ("scale", "mass", "score", "num_samples", "select_per")
    options = {name: getattr(case, name) for name in names}
    return mass_by_score(q, k, k_mean, perm, case.layout, rounding=rounding, **options)


def sink_block(perm, k_mean, num_heads, kv_block_size):
    """The permuted block that holds token 0, (B, num_heads) or, unpermuted, block 0."""
    if perm is None:
        return k_mean.new_zeros(k_mean.shape[0], num_heads, dtype=torch.int64)
    return repeat_heads(perm == 0, num_heads).int().argmax(-1) // kv_block_size


def visited_keys(perm, block_mask, layout):
    """Which keys each query row visits, in ORIGINAL key order: bool (B, Hq, num_queries, num_keys).
    Bits of `block_mask` that are not candidates are ignored."""
    num_queries, num_keys, block_size, kv_block_size, segment_size, is_causal = layout
    candidate, _ = block_roles(layout)
    by_place = (block_mask & candidate).repeat_interleave(kv_block_size or block_size, -1)
    by_place = by_place[..., :num_keys]
    key_at_place = repeat_heads(perm, block_mask.shape[1]).long()[:, :, None].expand_as(by_place)
    selected = torch.zeros_like(by_place).scatter(-1, key_at_place, by_place)
    selected = selected.repeat_interleave(block_size, 2)[:, :, :num_queries]

    key, row = torch.arange(num_keys), torch.arange(num_queries)[:, None]
    if not is_causal:
        return selected | (key >= num_keys // segment_size * segment_size)
    position = num_keys - num_queries + row
    block_position = num_keys - num_queries + row // block_size * block_size
    segment_start = block_position // segment_size * segment_size
    return selected | ((key >= segment_start) & (key <= position))


def masked_attention(q, k, v, visited, *, scale=None):
    """Dense attention (Eqs. 9 and 10) under a bool mask: (out, lse). A row that visits nothing
    gives 0 and -inf."""
    k, v = (repeat_heads(x, q.shape[1]).double() for x in (k, v))
    logits = (scale_for(q, scale) * q.double() @ k.mT).masked_fill(~visited, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0) @ v, logits.logsumexp(-1)


def pack_mask(mask):
    """Bool (..., num_blocks) -> int32 (..., ceil(num_blocks / 32)): bit j % 32 of word j // 32."""
    bits = F.pad(mask, (0, -mask.shape[-1] % 32)).unflatten(-1, (-1, 32)).long()
    return (bits << torch.arange(32)).sum(-1).to(torch.int32)


def unpack_mask(words, num_blocks):
    """The inverse of `pack_mask`."""
    bits = words.long()[..., None] >> torch.arange(32) & 1
    return bits.flatten(-2)[..., :num_blocks].bool()


def repeat_heads(x, num_heads):
    """(B, H, ...) -> (B, num_heads, ...), where head h is head h // (num_heads / H) of x."""
    return x.repeat_interleave(num_heads // x.shape[1], 1)


def block_mean(x, block_size):
    """(B, H, N, D) -> (B, H, ceil(N / block_size), D): mean over the rows each block has."""
    return torch.stack([block.mean(2) for block in x.split(block_size, 2)], 2)


def scale_for(q, scale):
    return q.shape[-1] ** -0.5 if scale is None else scale
