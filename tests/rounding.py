"""The roundings of sampled scores on CUDA, in plain PyTorch. A reference with the same roundings
predicts the result of a kernel much more sharply than an exact one."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

# The value of the largest element, so that sums of 256 products fit half precision.
LARGEST = 15.0
TILE_KEYS = 128
MOST_ABOVE = 80  # powers of two


class Rounded(NamedTuple):
    """Numbers as multiples of a unit, both float64."""

    multiples: torch.Tensor
    unit: torch.Tensor


def to_e4m3(x, dims):
    """Multiples, in e4m3, of the largest magnitude along `dims` over 15."""
    x = x.float()
    largest = x.abs().amax(dims, keepdim=True).clamp(min=1e-30)
    multiples = (x * (LARGEST / largest)).to(torch.float8_e4m3fn)
    return Rounded(multiples.double(), largest.double() / LARGEST)


def candidates_to_e4m3(k_perm, num_candidates):
    """Rounds the first permuted keys, (B, H, num_candidates, D), each tile by itself. Keys that are
    candidates of no query count as zeros."""
    rows = F.pad(k_perm[:, :, :num_candidates], (0, 0, 0, -num_candidates % TILE_KEYS))
    tiles = to_e4m3(rows.unflatten(2, (rows.shape[2] // TILE_KEYS, TILE_KEYS)), (-2, -1))
    keys = (x.expand(*x.shape[:3], TILE_KEYS, -1).flatten(2, 3) for x in tiles)
    return Rounded(*(x[:, :, :num_candidates] for x in keys))


def rounded_products(queries, keys):
    """Products (B, H, rows, keys) of queries (B, H, rows, D), each rounded by itself, and rounded
    keys. Sums of products, in units of both, have half precision."""
    rows = to_e4m3(queries, -1)
    sums = (rows.multiples @ keys.multiples.mT).half().double()
    return sums * rows.unit * keys.unit.mT


def cut_softmax(permuted, original, first):
    """Softmax over the logits of candidates and of own keys, (..., keys). Candidates far above all
    own keys together count as if they were MOST_ABOVE powers of two above them. Without own keys,
    the `first` candidates take their place."""
    shift = (original if original.shape[-1] else first).logsumexp(-1, keepdim=True)
    above = (permuted - shift).clamp(max=MOST_ABOVE * math.log(2))
    weights = torch.cat([above, original - shift], -1).exp()
    return weights / weights.sum(-1, keepdim=True)
