"""Tolerances of results against float64.

The largest error against float64 is at most twice the largest error that torch's own operation
makes in the same dtype on the same data, plus a small absolute term for where torch is exact.
"""

import torch
import torch.nn.functional as F
from reference import always_visited, repeat_heads, scale_for, smallest_set

# The absolute term, as a share of the largest value: a few roundings of float32 arithmetic, or of
# the result's own dtype.
SLACK = {torch.float32: 1e-6, torch.float16: 2e-5, torch.bfloat16: 2e-4}

# Tolerance of the share of a sampled query on CUDA against the reference with the same roundings,
# by GPU family. All families round to bfloat16 before they compute a share. On sm90, weights are
# also within 5 %, and sums have half precision. There, weights below 2^-20 of those of the own keys
# may count as 0: 128 of them are the absolute term.
SAMPLED_ROUNDING = {"sm90": "e4m3", "sm80": "limited"}
SAMPLED_RTOL = {"sm90": 0.08, "sm80": 0.02}
SAMPLED_ATOL = 128 * 2**-20

NEVER = torch.tensor(False)  # only the block of token 0 is always visited


def assert_within_twice(actual, torch_result, exact, what, *, least=0.0):
    """Fails unless max|actual - exact| <= 2 max|torch_result - exact| + slack; NaN fails too. The
    slack is a share of the largest value, or of `least`."""
    assert actual.shape == exact.shape, f"{what} has shape {tuple(actual.shape)}"
    error = largest(actual.double() - exact)
    slack = SLACK[actual.dtype] * max(largest(exact), least)
    allowed = 2 * largest(torch_result.double() - exact) + slack
    assert error <= allowed, f"{what}: error {error:.3e} against float64, allowed {allowed:.3e}"


def assert_output(out, q, k, v, visited, exact, *, scale=None):
    """`out` against torch's SDPA on the same visited set; 0 in rows that visit nothing."""
    assert out.dtype == q.dtype
    assert (out[~visited.any(-1)] == 0).all()
    assert_within_twice(out, sdpa_on(q, k, v, visited, scale=scale), exact, "out")


def assert_attends(out, lse, q, k, v, visited, exact_out, exact_lse, *, scale=None):
    """`out` as `assert_output`, and `lse` against torch's float32; -inf in rows without a key."""
    assert_output(out, q, k, v, visited, exact_out, scale=scale)
    assert lse.dtype == torch.float32
    some = visited.any(-1)
    assert (lse[~some] == -torch.inf).all()
    logits = q.float() @ repeat_heads(k, q.shape[1]).float().mT * scale_for(q, scale)
    torch_lse = logits.masked_fill(~visited, -torch.inf).logsumexp(-1)
    # An error of a logarithm is the share of an error of the sum, however small the logarithm is.
    assert_within_twice(lse[some], torch_lse[some], exact_lse[some], "lse", least=1.0)


def sdpa_on(q, k, v, visited, *, scale=None):
    """torch's own attention on a visited set (B, Hq, Nq, Nkv); 0 in rows that visit nothing."""
    k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visited, scale=scale)
    return out.masked_fill(~visited.any(-1, keepdim=True), 0)


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def assert_smallest_set(
    mask, candidate_mass, own_mass, candidate, sink, threshold, *, always=NEVER, eps=1e-5
):
    """Every row of `mask` keeps the smallest set of the heaviest candidates whose mass reaches
    `threshold`, and also the blocks `sink` (B, Hq) and `always` (query blocks, key blocks). `eps`
    is the largest effect of rounding on a sum or a mass."""
    is_sink = assert_takes_sink(mask, candidate, sink)
    masses = candidate_mass, own_mass
    # Blocks that are always visited show nothing about the set, so they are as float64 says.
    by_mass = torch.where(always, smallest_set(*masses, threshold), mask) & candidate
    with_sink, without_sink = (
        is_smallest_set(kept, *masses, candidate, threshold, eps)
        for kept in (by_mass | (is_sink & candidate), by_mass & ~is_sink)
    )
    assert (with_sink | without_sink).all(), "not the smallest set that reaches the threshold"


def assert_takes_sink(mask, candidate, sink):
    """Every row keeps only candidates, including the block `sink` (B, Hq). Returns its place."""
    is_sink = torch.arange(mask.shape[-1]) == sink[..., None, None]
    assert not (mask & ~candidate).any(), "a selected block is no candidate"
    assert (mask | ~(is_sink & candidate)).all(), "the block of token 0 is not selected"
    return is_sink


def assert_each_reaches(
    mask, candidate_mass, candidate, sink, threshold, *, always=NEVER, eps=1e-5
):
    """Every row of `mask` keeps the candidates that reach `threshold` by themselves, and also the
    blocks `sink` (B, Hq) and `always` (query blocks, key blocks). With 1, it keeps all candidates.
    `eps` is the largest effect of rounding on a mass."""
    threshold = -1.0 if threshold == 1 else threshold
    is_free = assert_takes_sink(mask, candidate, sink) | always
    assert (mask | ~candidate | (candidate_mass < threshold + eps)).all(), "a block is missing"
    assert (~mask | is_free | (candidate_mass > threshold - eps)).all(), "a block is too light"


def assert_selects(mask, masses, candidate, sink, case, **options):
    """Checks the rule of a case for its masses (of candidates, and of own blocks)."""
    always = always_visited(case.layout, case.window, case.dense_tail)
    assert (mask | ~(always & candidate)).all(), "a block of the window or the tail is missing"
    rule = candidate, sink, case.threshold
    if case.mass == "block":
        assert_each_reaches(mask, masses[0], *rule, always=always, **options)
    else:
        assert_smallest_set(mask, *masses, *rule, always=always, **options)


def is_smallest_set(mask, candidate_mass, own_mass, candidate, threshold, eps):
    reached = own_mass + (candidate_mass * mask).sum(-1)
    reaches = (reached >= threshold - eps) | (mask == candidate).all(-1)
    lightest_kept = candidate_mass.masked_fill(~mask, torch.inf).amin(-1)
    heaviest_left = candidate_mass.masked_fill(mask | ~candidate, -torch.inf).amax(-1)
    falls_below_without = (reached - lightest_kept < threshold + eps) | ~mask.any(-1)
    return reaches & falls_below_without & (lightest_kept >= heaviest_left - eps)


def is_decided(masses, case, *, eps=1e-5):
    """Rows whose selection no rounding below `eps` can change, bool (B, Hq, num_q_blocks)."""
    candidate_mass, own_mass = masses
    threshold = case.threshold
    if threshold == 1:
        return torch.ones_like(own_mass, dtype=torch.bool)
    if case.mass == "block":
        always = always_visited(case.layout, case.window, case.dense_tail)
        return (always | ((candidate_mass - threshold).abs() > eps)).all(-1)
    ranked = F.pad(candidate_mass.sort(-1, descending=True).values, (0, 1))
    reached_before = own_mass[..., None] + F.pad(ranked.cumsum(-1), (1, -1))
    crosses_clearly = ((reached_before - threshold).abs() > eps).all(-1)
    is_cut = (reached_before < threshold) & (reached_before + ranked >= threshold)
    step_down = -F.pad(ranked, (0, 1)).diff(dim=-1)
    return crosses_clearly & ~(is_cut & (step_down < eps)).any(-1)
