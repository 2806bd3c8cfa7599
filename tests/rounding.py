"""What sampled scores round on CUDA, in plain PyTorch: the reference with the same roundings tells
what a kernel has to find much more sharply than the exact one."""

import math

import torch
import torch.nn.functional as F

LARGEST_E4M3 = 448.0
MOST_ABOVE = 80  # powers of two


def to_e4m3(x, dims):
    """Rounded to multiples, in e4m3, of the largest magnitude along `dims` over 448. float64."""
    x = x.float()
    unit = x.abs().amax(dims, keepdim=True).clamp(min=1e-30)
    return (x * (LARGEST_E4M3 / unit)).to(torch.float8_e4m3fn).double() * unit / LARGEST_E4M3


def summary_to_e4m3(summary, num_candidates, tile_keys):
    """A summary (B, H, num_keys, D), each tile of so many keys rounded by itself. Keys that are
    candidates of no query count as zeros."""
    num_keys = summary.shape[2]
    candidates = F.pad(summary[:, :, :num_candidates], (0, 0, 0, -num_candidates % tile_keys))
    num_tiles = candidates.shape[2] // tile_keys
    tiles = to_e4m3(candidates.unflatten(2, (num_tiles, tile_keys)), (-2, -1)).flatten(2, 3)
    return F.pad(tiles[:, :, :num_candidates], (0, 0, 0, num_keys - num_candidates))


def cut_softmax(permuted, original, first, num_exact, pool_size, tile_keys):
    """Softmax over the logits of candidates and of own keys, (..., keys). Candidates far above the
    own keys together, or without any above the `first` candidates, count as if they were
    MOST_ABOVE powers of two above them; each of a mean's keys as its part of that."""
    shift = (original if original.shape[-1] else first).logsumexp(-1, keepdim=True)
    is_mean = torch.arange(permuted.shape[-1]) % tile_keys >= num_exact
    most = (MOST_ABOVE - math.log2(pool_size) * is_mean.double()) * math.log(2)
    above = torch.cat([(permuted - shift).minimum(most), original - shift], -1)
    weights = above.exp()
    return weights / weights.sum(-1, keepdim=True)
