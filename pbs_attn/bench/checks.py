"""Checks the stages on one input against float64. Rows are sampled: all would take too long.

Each check gives errors as a share of its tolerance:

  output      compares sampled rows with float64 attention over exactly the keys that the block mask
              and the permutation select, in root mean square. The tolerance is twice the error of
              torch's own attention on those keys.
  importance  compares sampled keys with a float64 softmax over all keys, and checks the permutation
              of all keys.
  selection   checks sampled query blocks. With mean scores, the kept blocks must reach the
              threshold in float64, and no smaller set may reach it. With sampled scores, the kept
              blocks must be those whose float64 share reaches the threshold, except blocks whose
              share is close to it.
"""

from __future__ import annotations

import math

import torch

from pbs_attn import PBSConfig, mask_to_bool

from .stages import Pipeline

CHECKS = ("output", "importance", "selection")
SLACK = 2e-4  # a share of the largest value, for bfloat16 rounding where torch is exact
IMPORTANCE_TOLERANCE = 1e-4  # relative
MASS_TOLERANCE = 1e-5
# The largest distance from the threshold, relative to it, of the share of a wrongly selected block,
# by device. On an H100 the scores come from fp8 products: rounding moved the shares of heavy
# hitters by up to 0.2, and the weights of the kernel are within 0.08 of the rounded ones.
SHARE_TOLERANCE = {"cpu": 1e-3, "cuda": 0.5}
CHUNK = 65536  # keys whose float64 scores exist at once

Errors = dict[str, float]  # by place, as shares of the tolerance


class Sample:
    """A query row of a head, and the keys it may see."""

    def __init__(self, pipeline: Pipeline, head: int, row: int):
        q, k, v = pipeline.q, pipeline.k, pipeline.v
        config = pipeline.config
        first_row = row // config.block_size * config.block_size
        block = slice(first_row, first_row + config.block_size)
        kv_head = head * k.shape[1] // q.shape[1]
        perm = pipeline.perm[0, head * pipeline.perm.shape[1] // q.shape[1]].long()
        self.place = f"head {head}, row {row}"
        self.head, self.first_row = head, first_row
        self.own_start = first_row // config.segment_size * config.segment_size
        self.q, self.k, self.v = q[0, head, row], k[0, kv_head], v[0, kv_head]
        self.q_block = q[0, head, block]
        self.permuted_keys = perm[: self.own_start].view(-1, config.key_block_size)
        num_blocks = -(-k.shape[2] // config.key_block_size)
        words = pipeline.words[0, head, row // config.block_size]
        self.selected = mask_to_bool(words, num_blocks)[: len(self.permuted_keys)]
        self.is_sink = (self.permuted_keys == 0).any(-1)
        self.is_always = self._find_always(config, q.shape[2])
        own_keys = torch.arange(self.own_start, row + 1, device=q.device)
        self.visited_keys = torch.cat([self.permuted_keys[self.selected].flatten(), own_keys])

    def _find_always(self, config: PBSConfig, num_tokens: int) -> torch.Tensor:
        """Returns which candidates the window or the dense tail selects."""
        blocks = torch.arange(len(self.permuted_keys), device=self.permuted_keys.device)
        segments = blocks * config.key_block_size // config.segment_size
        first_segment = max(self.first_row - config.window, 0) // config.segment_size
        last_row = min(self.first_row + config.block_size, num_tokens) - 1
        return (segments >= first_segment) | (last_row >= num_tokens - config.dense_tail)


def sample_rows(pipeline: Pipeline, count: int) -> list[tuple[int, int]]:
    """Returns (head, row) pairs: the first and the last row, both sides of some segment borders,
    and random rows."""
    generator = torch.Generator().manual_seed(0)
    num_q_heads, num_tokens = pipeline.q.shape[1:3]
    segment_size = pipeline.config.segment_size
    ends = torch.tensor([0, num_tokens - 1])
    borders = segment_size * torch.randint(1, num_tokens // segment_size, (3,), generator=generator)
    anywhere = torch.randint(num_tokens, (count - 8,), generator=generator)
    rows = torch.cat([ends, borders - 1, borders, anywhere])
    heads = torch.randint(num_q_heads, (count,), generator=generator)
    return list(zip(heads.tolist(), rows.tolist(), strict=True))


def check_output(out: torch.Tensor, pipeline: Pipeline, rows: list[tuple[int, int]]) -> Errors:
    errors = {}
    for head, row in rows:
        sample = Sample(pipeline, head, row)
        q = sample.q[None, None, None]
        k, v = (x[sample.visited_keys][None, None] for x in (sample.k, sample.v))
        weights = (q.double() @ k.double().mT * q.shape[-1] ** -0.5).softmax(-1)
        exact = (weights @ v.double()).flatten()
        in_torch = torch.nn.functional.scaled_dot_product_attention(q, k, v).flatten()
        allowed = 2 * root_mean_square(in_torch - exact) + SLACK * exact.abs().max()
        errors[sample.place] = (root_mean_square(out[0, head, row] - exact) / allowed).item()
    return errors


def root_mean_square(x: torch.Tensor) -> torch.Tensor:
    """Summarises the errors of a row. The largest error alone does not compare two implementations
    well."""
    return x.square().mean().sqrt()


def check_importance(pipeline: Pipeline, num_checked: int = 3, num_keys: int = 4096) -> Errors:
    """Checks the first and the last key of the complete segments, and some others, in some
    heads."""
    generator = torch.Generator().manual_seed(0)
    num_perm_heads, num_tokens = pipeline.scores.shape[1:]
    num_scored = num_tokens // pipeline.config.segment_size * pipeline.config.segment_size
    keys = torch.randint(num_scored, (num_keys,), generator=generator).to(pipeline.k.device)
    keys[0], keys[1] = 0, num_scored - 1
    errors = {}
    if pipeline.scores[..., num_scored:].any():
        errors["the incomplete segment, which must score 0"] = math.inf
    if not sorts_segments(pipeline, num_scored):
        errors["the permutation"] = math.inf
    for head in torch.randperm(num_perm_heads, generator=generator)[:num_checked].tolist():
        exact = exact_importance(pipeline, head, keys, num_scored)
        error = (pipeline.scores[0, head, keys] - exact).abs()
        allowed = IMPORTANCE_TOLERANCE * (exact + 0.01 * exact.max())
        errors[f"head {head} of the permutation"] = (error / allowed).max().item()
    return errors


def sorts_segments(pipeline: Pipeline, num_scored: int) -> bool:
    """Whether keys change places inside complete segments only, with the most important ones first:
    all keys sorted by importance, or the `num_heavy` most important ones first and both parts in
    their original order."""
    segment_size, perm = pipeline.config.segment_size, pipeline.perm
    num_heavy = pipeline.config.num_heavy
    places = torch.arange(perm.shape[-1], device=perm.device)
    segments = perm[..., :num_scored].unflatten(-1, (-1, segment_size))
    stays = segments.sort(-1).values == places[:num_scored].view(-1, segment_size)
    ranked = pipeline.scores.gather(-1, perm.long())[..., :num_scored]
    ranked = ranked.unflatten(-1, (-1, segment_size))
    if num_heavy is None:
        is_ordered = (ranked.diff(dim=-1) <= 0).all()
    else:
        least_heavy = ranked[..., :num_heavy].amin(-1)
        parts = segments[..., :num_heavy], segments[..., num_heavy:]
        is_ordered = (least_heavy >= ranked[..., num_heavy:].amax(-1)).all()
        is_ordered &= all(bool((part.diff(dim=-1) > 0).all()) for part in parts)
    tail_stays = perm[..., num_scored:] == places[num_scored:]
    return bool(stays.all() and is_ordered and tail_stays.all())


def exact_importance(
    pipeline: Pipeline, perm_head: int, keys: torch.Tensor, num_scored: int
) -> torch.Tensor:
    """The softmax over all scored keys, averaged over the last queries of the heads, in float64."""
    q, k, num_perm_heads = pipeline.q[0], pipeline.k[0], pipeline.perm.shape[1]
    heads = q.unflatten(0, (num_perm_heads, -1))[perm_head]
    queries = heads[:, -pipeline.config.block_size :].double() * q.shape[-1] ** -0.5
    k = k[perm_head * k.shape[0] // num_perm_heads]
    chunks = k[:num_scored].split(CHUNK)
    totals = [(queries @ chunk.double().mT).logsumexp(-1) for chunk in chunks]
    total = torch.stack(totals).logsumexp(0)
    return (queries @ k[keys].double().mT - total[..., None]).exp().mean((0, 1))


def check_selection(pipeline: Pipeline, rows: list[tuple[int, int]]) -> Errors:
    errors = {}
    for head, row in rows:
        sample = Sample(pipeline, head, row)
        if sample.own_start == 0:
            continue
        if not sample.selected[sample.is_sink].all():
            errors[sample.place + ", block of token 0"] = math.inf
        if not sample.selected[sample.is_always].all():
            errors[sample.place + ", window and dense tail"] = math.inf
        excess = excess_of_shares if pipeline.config.score == "sampled" else excess_of_mass
        errors[sample.place] = excess(pipeline, sample)
    return errors


def excess_of_mass(pipeline: Pipeline, sample: Sample) -> float:
    mass = exact_mass(sample)
    # The block of token 0 is always kept, so it may or may not belong to the smallest set.
    kept = (sample.selected, sample.selected & ~sample.is_sink)
    excess = min(distance_from_smallest(mass, mask, pipeline.threshold) for mask in kept)
    return excess / MASS_TOLERANCE


def excess_of_shares(pipeline: Pipeline, sample: Sample) -> float:
    """Returns the error of the wrongly selected block whose share is farthest from the threshold,
    as a factor."""
    if pipeline.threshold == 1:
        return 0.0 if sample.selected.all() else math.inf
    shares = exact_shares(pipeline, sample)
    is_free = sample.is_sink | sample.is_always
    is_wrong = ((shares >= pipeline.threshold) != sample.selected) & ~is_free
    if not is_wrong.any():
        return 0.0
    factor = (shares[is_wrong] / pipeline.threshold).log().abs().max().item()
    return factor / math.log1p(SHARE_TOLERANCE[shares.device.type])


def exact_shares(pipeline: Pipeline, sample: Sample) -> torch.Tensor:
    """For each candidate, the largest share of attention that a sampled query gives it, in
    float64."""
    config, q = pipeline.config, pipeline.q[0]
    num_rows = len(sample.q_block)
    nth = torch.arange(min(config.num_samples, num_rows), device=q.device)
    rows = sample.first_row + (nth + 1) * num_rows // len(nth) - 1
    group = q.shape[0] // pipeline.k.shape[1] if config.select_per == "kv_head" else 1
    heads = sample.head // group * group + nth % group
    queries = q[heads, rows].double() * q.shape[-1] ** -0.5
    keys = sample.permuted_keys.flatten().split(CHUNK)
    candidates = torch.cat([queries @ sample.k[chunk].double().mT for chunk in keys], -1)
    own_keys = torch.arange(sample.own_start, sample.first_row + num_rows, device=q.device)
    own = queries @ sample.k[own_keys].double().mT
    own = own.masked_fill(own_keys > rows[:, None], -torch.inf)
    total = torch.cat([candidates, own], -1).logsumexp(-1, keepdim=True)
    by_block = (candidates - total).exp().unflatten(-1, (-1, config.key_block_size))
    return by_block.sum(-1).amax(0)


def exact_mass(sample: Sample) -> torch.Tensor:
    """For each candidate, its share of the softmax over the float64 mean scores."""
    means = sample.k[sample.permuted_keys].mean(1, dtype=torch.float64)
    q_mean = sample.q_block.mean(0, dtype=torch.float64)
    return (means @ q_mean * q_mean.shape[-1] ** -0.5).softmax(0)


def distance_from_smallest(mass: torch.Tensor, kept: torch.Tensor, threshold: float) -> float:
    """Returns the largest of three errors: the mass that is missing, the mass that is kept in
    excess, and the margin by which a block that was left out outweighs one that was kept."""
    reached = mass[kept].sum()
    amiss = [torch.zeros_like(reached)]
    if not kept.all():
        amiss.append(threshold - reached)
    if kept.any():
        amiss.append(reached - mass[kept].min() - threshold)
    if kept.any() and not kept.all():
        amiss.append(mass[~kept].max() - mass[kept].min())
    return torch.stack(amiss).max().item()


def check(pipeline: Pipeline, out: torch.Tensor, count: int) -> dict[str, Errors]:
    """Runs all CHECKS on `count` rows. `out` (1, Hq, N, D) is the output of the whole operator."""
    rows = sample_rows(pipeline, count)
    errors = (
        check_output(out, pipeline, rows),
        check_importance(pipeline),
        check_selection(pipeline, rows),
    )
    return dict(zip(CHECKS, errors, strict=True))


def worst(errors: Errors) -> tuple[str, float]:
    """Returns the place and the size of the largest error. NaN counts as the largest."""
    return max(errors.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
