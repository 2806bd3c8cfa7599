"""What sampled scores round on CUDA, in plain PyTorch: the reference with the same roundings tells
what a kernel has to find much more sharply than the exact one."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

# What the largest element is mapped to, so that sums of 256 products fit half precision.
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
    """The first permuted keys, (B, H, num_candidates, D), each tile rounded by itself. Keys that
    are candidates of no query count as zeros."""
    rows = F.pad(k_perm[:, :, :num_candidates], (0, 0, 0, -num_candidates % TILE_KEYS))
    tiles = to_e4m3(rows.unflatten(2, (rows.shape[2] // TILE_KEYS, TILE_KEYS)), (-2, -1))
    keys = (x.expand(*x.shape[:3], TILE_KEYS, -1).flatten(2, 3) for x in tiles)
    return Rounded(*(x[:, :, :num_candidates] for x in keys))


def rounded_products(queries, keys):
    """Queries (B, H, rows, D), each rounded by itself, by rounded keys, the sum of products in
    units of both in half precision: (B, H, rows, keys)."""
    rows = to_e4m3(queries, -1)
    sums = (rows.multiples @ keys.multiples.mT).half().double()
    return sums * rows.unit * keys.unit.mT


def cut_softmax(permuted, original, first):
    """Softmax over the logits of candidates and of own keys, (..., keys). Candidates far above the
    own keys together, or without any above the `first` candidates, count as if they were
    MOST_ABOVE powers of two above them."""
    shift = (original if original.shape[-1] else first).logsumexp(-1, keepdim=True)
    above = (permuted - shift).clamp(max=MOST_ABOVE * math.log(2))
    weights = torch.cat([above, original - shift], -1).exp()
    return weights / weights.sum(-1, keepdim=True)
