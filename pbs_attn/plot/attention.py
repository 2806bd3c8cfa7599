"""The attention map of one head, with and without permuted keys, and the blocks that PBS visits.

The picture is like Figure 1 of arXiv 2510.21270. Important keys are scattered over many blocks, and
gather in few blocks once the keys of each segment are sorted by importance.
"""

import dataclasses
import math
import os
from typing import NamedTuple

import torch

import pbs_attn
from pbs_attn import PBSConfig
from pbs_attn._errors import require

# The criterion compares the number of key blocks that hold this share of the attention to earlier
# segments.
GATHERED_MASS = 0.9

# Enough rows to rank the heads of a layer; all rows would cost as much as dense attention.
SAMPLED_BLOCKS = 8
SAMPLED_ROW_STEP = 4

WINDOW = 2048  # tokens shown: more than 16 blocks of 128 are hard to distinguish
POOL = 4  # tokens per pixel, in both directions
LARGEST_WEIGHT = 0.1  # on the colour scale, which starts at the weight of uniform attention
VISITED_COLOUR, OWN_COLOUR, TINT = "#e8590c", "#1c7ed6", 0.25


class KeyOrder(NamedTuple):
    """One order of one head's keys and the blocks that the selection picks in it."""

    perm: torch.Tensor  # (Nkv,) key row at each place
    visited: torch.Tensor  # (num_q_blocks, num_kv_blocks) bool, blocks of earlier segments
    density: float
    visited_mass: float
    share_needed: float  # share of the blocks of earlier segments that holds GATHERED_MASS of their
    # mass


@dataclasses.dataclass(frozen=True)
class HeadView:
    """One query head: query (N, D) and key (N, D), float32, on the model's device."""

    layer: int
    head: int
    query: torch.Tensor
    key: torch.Tensor
    scale: float
    config: PBSConfig
    original: KeyOrder
    permuted: KeyOrder

    @property
    def gain(self) -> float:
        return self.original.share_needed - self.permuted.share_needed


def compare_orders(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    layer: int,
    scale: float | None,
    config: PBSConfig,
) -> list[HeadView]:
    """The blocks that the selection visits for each query head, with permuted keys and without.

    Args:
        query: (1, Hq, N, D).
        key, value: (1, Hkv, N, D).
        layer: copied into the result.
        scale: of the logits; None for 1/sqrt(D).
        config: the same for both orders, except that the second leaves the keys in place.

    Returns:
        Hq views. `density` covers all rows; `visited_mass` and `share_needed` are means over
        SAMPLED_BLOCKS query blocks.
    """
    num_q_heads, num_tokens, head_dim = query.shape[1:]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    orders = []
    for order_config in (dataclasses.replace(config, num_heavy=0), config):
        selection = pbs_attn.select(query, key, value, scale=scale, config=order_config)
        density = pbs_attn.density(selection.block_mask, num_tokens, num_tokens, config=config)
        num_kv_blocks = selection.k_mean.shape[2]
        visited = pbs_attn.mask_to_bool(selection.block_mask, num_kv_blocks)
        orders.append((selection.perm[0].cpu().long(), visited[0].cpu(), density[0].tolist()))

    views = []
    for head in range(num_q_heads):
        head_query = query[0, head].float()
        head_key = key[0, head * key.shape[1] // num_q_heads].float()
        samples = _sample_rows(head_query, head_key, scale, config)
        in_orders = [
            _describe_order(perm[head * len(perm) // num_q_heads], visited[head], density[head],
                            samples, config)
            for perm, visited, density in orders
        ]  # fmt: skip
        views.append(HeadView(layer, head, head_query, head_key, scale, config, *in_orders))
    return views


def _attention_rows(query, key, scale, rows):
    """(len(rows), N) float32 probabilities of causal attention, on the CPU."""
    rows = rows.to(query.device)
    logits = scale * query[rows] @ key.T
    positions = torch.arange(key.shape[0], device=key.device)
    return logits.masked_fill_(positions > rows[:, None], -math.inf).softmax(-1).cpu()


def _sample_rows(query, key, scale, config):
    """(query block, its mean attention row) for blocks spread over the sequence."""
    num_q_blocks = math.ceil(query.shape[0] / config.block_size)
    first = config.segment_size // config.block_size  # earlier blocks have no earlier segment
    blocks = torch.linspace(first, num_q_blocks - 1, SAMPLED_BLOCKS).long().unique().tolist()
    samples = []
    for block in blocks:
        start = block * config.block_size
        stop = min(start + config.block_size, query.shape[0])
        rows = torch.arange(start, stop, SAMPLED_ROW_STEP)
        samples.append((block, _attention_rows(query, key, scale, rows).mean(0)))
    return samples


def _describe_order(perm, visited, density, samples, config):
    width = config.key_block_size
    masses, shares = [], []
    for block, row in samples:
        own_start = block * config.block_size // config.segment_size * config.segment_size
        earlier = row[perm[:own_start]].view(-1, width).sum(-1)
        seen = visited[block, : len(earlier)]
        masses.append(float(row[own_start:].sum() + earlier[seen].sum()))
        largest_first = earlier.sort(descending=True).values.cumsum(0)
        needed = int((largest_first < GATHERED_MASS * largest_first[-1]).sum()) + 1
        shares.append(needed / len(earlier))
    return KeyOrder(perm, visited, density, sum(masses) / len(masses), sum(shares) / len(shares))


class _Map(NamedTuple):
    """The lower right corner of the map, pooled. Rows and columns start at token `start`."""

    attention: torch.Tensor  # (pixels, pixels) largest weight of each cell, 0 where not causal
    visited: torch.Tensor  # (query blocks, key blocks) bool
    own: torch.Tensor  # the same, for the own segment
    start: int


def _make_map(view: HeadView, order: KeyOrder) -> _Map:
    config, num_tokens = view.config, view.query.shape[0]
    segment, width = config.segment_size, config.key_block_size
    start = max(0, (num_tokens - WINDOW) // segment * segment)
    padded = math.ceil((num_tokens - start) / segment) * segment
    attention = torch.zeros(padded // POOL, padded // POOL)
    blocks = range(start // config.block_size, math.ceil(num_tokens / config.block_size))
    visited = torch.zeros(len(blocks), padded // width, dtype=torch.bool)
    own = torch.zeros_like(visited)
    for i, block in enumerate(blocks):
        first = block * config.block_size
        last = min(first + config.block_size, num_tokens) - 1
        own_start = first // segment * segment
        rows = _attention_rows(view.query, view.key, view.scale, torch.arange(first, last + 1))
        # The own segment is always visited in original order.
        columns = torch.cat([order.perm[start:own_start], torch.arange(own_start, num_tokens)])
        cells = torch.zeros(config.block_size, padded)
        cells[: len(rows), : len(columns)] = rows[:, columns]
        pooled = cells.view(config.block_size // POOL, POOL, padded // POOL, POOL).amax((1, 3))
        attention[i * len(pooled) : (i + 1) * len(pooled)] = pooled
        own[i, (own_start - start) // width : (last - start) // width + 1] = True
        before = slice(start // width, own_start // width)
        visited[i, : before.stop - before.start] = order.visited[block, before]
    return _Map(attention, visited, own, start)


def draw_attention(view: HeadView, path: str | os.PathLike, *, title: str) -> None:
    """Writes the picture to `path`. The ending gives the format.

    Both panels show the last WINDOW queries and keys. Visited blocks are tinted and outlined. Those
    of the own segment have a second colour.

    Raises:
        ImportError: if matplotlib is missing.
    """
    require("matplotlib", "plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it would look for a display and keep the figure in a global list.
    figure = Figure(figsize=(14, 7.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    panels = (("Original key order", view.original), ("Permuted key order", view.permuted))
    for ax, (name, order) in zip(axes, panels, strict=True):
        image = _draw_panel(ax, view, order)
        ax.set_title(
            f"{name}: density {order.density:.2f}, {order.visited_mass:.1%} of the mass visited"
        )
    axes[0].set_ylabel("query (token)")
    axes[0].set_xlabel("key (token)")
    axes[1].set_xlabel("place of the key (each segment sorted by importance)")
    bar = figure.colorbar(image, ax=axes, shrink=0.85, pad=0.01)
    bar.set_label(f"attention weight (largest of {POOL} x {POOL} tokens)")
    _add_legend(figure)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _draw_panel(ax, view, order):
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LogNorm

    map_, config = _make_map(view, order), view.config
    stop = map_.start + POOL * len(map_.attention)
    image = ax.imshow(
        map_.attention.numpy(),
        cmap="Greys",
        norm=LogNorm(1 / len(view.query), LARGEST_WEIGHT, clip=True),
        extent=(map_.start, stop, stop, map_.start),
        interpolation="nearest",
    )
    size = (config.block_size, config.key_block_size)
    for blocks, colour in ((map_.visited, VISITED_COLOUR), (map_.own, OWN_COLOUR)):
        tint = torch.zeros(*blocks.shape, 4)
        tint[blocks] = torch.tensor([*_rgb(colour), TINT])
        bottom = map_.start + size[0] * len(blocks)
        ax.imshow(
            tint.numpy(), extent=(map_.start, stop, bottom, map_.start), interpolation="nearest"
        )
        lines = _outline(blocks, map_.start, *size)
        ax.add_collection(LineCollection(lines, colors=colour, linewidths=1.2))
    ax.set_xlim(map_.start, stop)
    ax.set_ylim(stop, map_.start)
    return image


def _rgb(colour):
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def _outline(blocks, start, height, width):
    """The lines between set and unset blocks, in token coordinates."""
    padded = torch.nn.functional.pad(blocks.int(), (1, 1, 1, 1))
    lines = []
    for y, x in padded.diff(dim=0)[:, 1:-1].nonzero().tolist():
        top, left = start + y * height, start + x * width
        lines.append([(left, top), (left + width, top)])
    for y, x in padded.diff(dim=1)[1:-1].nonzero().tolist():
        top, left = start + y * height, start + x * width
        lines.append([(left, top), (left, top + height)])
    return lines


def _add_legend(figure):
    from matplotlib.patches import Patch

    entries = (
        (VISITED_COLOUR, "selected block of an earlier segment"),
        (OWN_COLOUR, "own segment, always visited, in original order"),
        ("#808080", "no tint: skipped"),
    )
    patches = [
        Patch(facecolor=(*_rgb(colour), TINT if colour != "#808080" else 0), edgecolor=colour,
              label=label)
        for colour, label in entries
    ]  # fmt: skip
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
