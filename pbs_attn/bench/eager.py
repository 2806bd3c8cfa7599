"""The paper's pipeline before attention (arXiv 2510.21270, Algorithms 1 and 2) in eager PyTorch.

As in the paper's code, each query head has a permutation, and K and V are repeated for grouped
heads. The selection rule is that of torch.ops.pbs with permute_per="query_head". Attention on the
selected blocks is left out, because no eager form of it is close to the speed of a kernel:
`pbs-attn bench kernel` times the kernels. Query and key lengths are equal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pbs_attn import PBSConfig
from pbs_attn.masks import candidate_blocks


def repeat_kv(q: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Copies each tensor so that every query head has a head of its own."""
    return [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in tensors]


def score_keys(q: Tensor, k: Tensor, config: PBSConfig) -> Tensor:
    """Importance of each key (Eq. 7), (B, Hq, N) float32. An incomplete last segment has 0."""
    num_tokens = k.shape[2]
    num_scored = num_tokens // config.segment_size * config.segment_size
    last_queries = q[:, :, -config.block_size :]
    logits = last_queries @ k[:, :, :num_scored].mT * q.shape[-1] ** -0.5
    importance = logits.softmax(-1, dtype=torch.float32).mean(2)
    return F.pad(importance, (0, num_tokens - num_scored))


def sort_segments(scores: Tensor, config: PBSConfig) -> Tensor:
    """Returns which key is at each place after every complete segment is sorted: (B, Hq, N)
    int64."""
    num_tokens = scores.shape[-1]
    num_segments = num_tokens // config.segment_size
    num_sorted = num_segments * config.segment_size
    places = torch.arange(num_tokens, device=scores.device)
    segments = scores[..., :num_sorted].unflatten(-1, (num_segments, config.segment_size))
    order = segments.argsort(dim=-1, descending=True, stable=True)
    order = order + places[: num_sorted : config.segment_size, None]
    tail = places[num_sorted:].expand(*scores.shape[:-1], -1)
    return torch.cat([order.flatten(-2), tail], -1)


def permute_kv(k: Tensor, v: Tensor, perm: Tensor, config: PBSConfig) -> tuple[Tensor, ...]:
    """Permuted K and V, and the means of the blocks of permuted K."""
    rows = perm[..., None].expand_as(k)
    k_perm, v_perm = k.gather(2, rows), v.gather(2, rows)
    return k_perm, v_perm, block_means(k_perm, config.key_block_size)


def select_blocks(
    q: Tensor, k_mean: Tensor, perm: Tensor, threshold: float, config: PBSConfig
) -> Tensor:
    """Algorithm 2: bool (B, Hq, query blocks, key blocks), among the blocks of earlier segments."""
    num_tokens, num_blocks = q.shape[2], k_mean.shape[2]
    columns = torch.arange(num_blocks, device=q.device)
    candidates, _ = candidate_blocks(num_tokens, num_tokens, config=config)
    is_candidate = columns < candidates.to(q.device)[:, None]

    scores = block_means(q, config.block_size) @ k_mean.mT * q.shape[-1] ** -0.5
    share = scores.masked_fill(~is_candidate, -torch.inf).softmax(-1).nan_to_num(0.0)
    largest_first, order = share.sort(dim=-1, descending=True, stable=True)
    reached_before = largest_first.cumsum(-1) - largest_first
    needed = (reached_before < threshold) | (threshold == 1)
    mask = torch.zeros_like(needed).scatter(-1, order, needed)

    sink = (perm == 0).int().argmax(-1) // config.key_block_size
    return (mask | (columns == sink[..., None, None])) & is_candidate


def block_means(x: Tensor, size: int) -> Tensor:
    """(B, H, N, D) -> (B, H, ceil(N / size), D) float32. Each mean is over the rows that the block
    has."""
    num_whole = x.shape[2] // size
    whole = x[:, :, : num_whole * size].unflatten(2, (num_whole, size))
    parts = (whole, x[:, :, None, num_whole * size :])
    return torch.cat([part.mean(3, dtype=torch.float32) for part in parts if part.numel()], 2)


def before_attend(
    q: Tensor, k: Tensor, v: Tensor, threshold: float, config: PBSConfig
) -> tuple[Tensor, ...]:
    """Runs all four stages and returns the inputs of attention, (k_perm, v_perm, mask)."""
    k, v = repeat_kv(q, k, v)
    perm = sort_segments(score_keys(q, k, config), config)
    k_perm, v_perm, k_mean = permute_kv(k, v, perm, config)
    return k_perm, v_perm, select_blocks(q, k_mean, perm, threshold, config)


def stage_calls(
    q: Tensor, k: Tensor, v: Tensor, threshold: float, config: PBSConfig
) -> dict[str, Callable[[], object]]:
    """Each stage on the outputs of the stages before it. The first stage also repeats K and V."""
    repeated_k, repeated_v = repeat_kv(q, k, v)
    scores = score_keys(q, repeated_k, config)
    perm = sort_segments(scores, config)
    k_mean = permute_kv(repeated_k, repeated_v, perm, config)[2]
    return {
        "score_keys": lambda: score_keys(q, repeat_kv(q, k, v)[0], config),
        "sort_segments": lambda: sort_segments(scores, config),
        "permute_kv": lambda: permute_kv(repeated_k, repeated_v, perm, config),
        "select_blocks": lambda: select_blocks(q, k_mean, perm, threshold, config),
    }
