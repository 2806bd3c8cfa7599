"""Sampled scores on a GPU, against the reference that rounds as the kernel does: settings, sizes,
extreme and missing values."""

import math

import pytest
import reference as ref
import torch
from cases import Case, clustered_qkv
from test_stages_gpu import HALVES, assert_sampled, assert_selection, select_on_gpu

pytestmark = pytest.mark.gpu
LOG2E = math.log2(math.e)
# Tolerance for logits of 40 powers of two, which half precision rounds to 1/32.
LEANING_RTOL = 0.15
ops = torch.ops.pbs

SAMPLED = Case(
    900,
    1100,
    batch=1,
    block_size=64,
    kv_block_size=32,
    segment_size=256,
    num_heavy=32,
    score="sampled",
    mass="block",
    threshold=0.02,
    num_samples=16,
)


def random_perm(case, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(case.batch, case.num_kv_heads, case.num_keys, generator=generator)
    return ref.sort_segments(noise, segment_size=case.segment_size).int()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("window", "dense_tail"), [(0, 0), (100, 70)])
@pytest.mark.parametrize("select_per", ["query_head", "kv_head"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("head_dim", "num_samples", "kv_block_size", "segment_size"),
    [(64, 8, 32, 192), (96, 5, 64, 256), (128, 16, 32, 320), (256, 64, 128, 384)],
)
def test_sampled_score_follows_its_rule(
    head_dim,
    num_samples,
    kv_block_size,
    segment_size,
    is_causal,
    select_per,
    window,
    dense_tail,
    dtype,
):
    case = SAMPLED._replace(
        head_dim=head_dim,
        num_samples=num_samples,
        kv_block_size=kv_block_size,
        segment_size=segment_size,
        is_causal=is_causal,
        select_per=select_per,
        window=window,
        dense_tail=dense_tail,
    )
    assert_selection(case, 0, dtype)


@pytest.mark.parametrize(
    ("stacks_per_unit", "batch", "num_q_heads", "num_kv_heads", "num_queries"),
    [(1, 1, 12, 3, 1300), (2, 1, 36, 9, 1300), (4, 2, 48, 12, 900)],
)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_sampled_score_of_several_units_a_cta(
    head_dim, stacks_per_unit, batch, num_q_heads, num_kv_heads, num_queries
):
    """With every number of stacks (include/pbs/sampled_plan.h). More than 32 samples of a query
    block are one stack. The time of the reference grows with the samples, and empty rows of a stack
    cost it nothing."""
    num_stacks = batch * num_q_heads * -(-num_queries // 64)
    skip_unless_planned(num_stacks, stacks_per_unit, least_units=1.9)
    case = SAMPLED._replace(
        num_queries=num_queries,
        num_keys=num_queries,
        batch=batch,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_samples=33,
    )
    assert_selection(case, 0, torch.bfloat16)


def skip_unless_planned(num_stacks, stacks_per_unit, least_units):
    """Skips unless the sm90 plan has this number of stacks per unit and of units per CTA. Other
    families run with the same sizes, whatever their plans are."""
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    planned = 1 if num_stacks < 2 * num_sms else 2 if num_stacks < 6 * num_sms else 4
    if planned != stacks_per_unit or num_stacks < least_units * stacks_per_unit * num_sms:
        pytest.skip(f"sizes are for about 132 multiprocessors, not {num_sms}")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("head_dim", "heads"), [(64, 1600), (96, 1600), (128, 1600), (256, 900)])
def test_sampled_score_of_very_many_heads(head_dim, heads, dtype):
    """There are enough stacks that the sm80 family makes units of its largest number."""
    case = SAMPLED._replace(
        num_queries=40,
        num_keys=300,
        batch=1,
        num_q_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        num_samples=33,
    )
    assert_selection(case, 0, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("key_parts", [4, 2, 1])
def test_sampled_score_by_key_parts(key_parts, head_dim, dtype):
    """With about the largest number of stacks that still divide the keys of their own segments into
    this many parts, or with a few more than are divided. Each query head has as many rows as a
    stack."""
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    num_kv_heads = {4: num_sms // 4, 2: num_sms // 2, 1: num_sms // 2 + 1}[key_parts]
    case = SAMPLED._replace(
        num_queries=100,
        num_keys=400,
        num_q_heads=4 * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_samples=17,
    )
    assert_selection(case, 0, dtype)


@pytest.mark.parametrize(
    "changed",
    [
        {"num_queries": 200, "num_keys": 200},  # no candidates
        {"num_queries": 200, "num_keys": 200, "is_causal": False},
        {"num_queries": 1},
        {"num_queries": 1, "num_q_heads": 5, "num_kv_heads": 1, "select_per": "kv_head"},
        {"num_queries": 33, "num_keys": 1300, "num_samples": 64},
        {"num_queries": 1024, "num_keys": 1024, "is_causal": False},  # no own keys
        {"num_queries": 500, "num_keys": 1024, "is_causal": False, "segment_size": 1024},
        {"num_queries": 64, "num_keys": 64, "is_causal": False, "segment_size": 64},
        {"num_queries": 200, "dense_tail": 200},  # no block is scored
        {"dense_tail": 10**9},
        {"window": 10**9},
        {"threshold": 1.0},
        {"num_samples": 1},
        {"batch": 3, "num_q_heads": 14, "select_per": "kv_head", "num_samples": 3},
        {"segment_size": 64},
        {"permute_per": "query_head"},
        {"strides": "slice"},
        {"strides": "bnhd", "scale": 0.4},
    ],
    ids=lambda changed: "-".join(f"{name}={value}" for name, value in changed.items()),
)
def test_sampled_score_of_rare_sizes(changed):
    assert_selection(SAMPLED._replace(**changed), 0, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("is_causal", [True, False])
def test_sampled_score_without_a_permutation(is_causal, dtype):
    case = SAMPLED._replace(is_causal=is_causal)
    q, k, _ = clustered_qkv(case, dtype, seed=1)
    assert_sampled(case, q, k)


@pytest.mark.parametrize("sizes", [(0, 300, 300), (1, 0, 300), (0, 0, 0)])
def test_sampled_score_of_nothing(sizes):
    batch, num_queries, num_keys = sizes
    q = torch.empty(batch, 2, num_queries, 64, device="cuda", dtype=torch.bfloat16)
    k = torch.empty(batch, 2, num_keys, 64, device="cuda", dtype=torch.bfloat16)
    num_blocks = -(-num_keys // 128)
    k_mean = torch.empty(batch, 2, num_blocks, 64, device="cuda")
    words, counts = ops.select_blocks(q, k, k_mean, score="sampled", mass="block", threshold=0.1)
    assert words.numel() == counts.numel() == 0


@pytest.mark.parametrize("last", [500, 900])
@pytest.mark.parametrize("factor", [1.0, 300.0, 3000.0])
def test_sampled_score_of_growing_logits(factor, last):
    """Logits grow up to key `last` by hundreds of powers of two. Up to 500, the later query blocks
    find their own segment far below the candidates. These count as if they were 80 powers of two
    above it, and are visited."""
    case = SAMPLED._replace(num_queries=1024, num_keys=1024, block_size=128)
    q, k, _ = clustered_qkv(case, torch.bfloat16, seed=3)
    ramp = torch.arange(1024) / 1024 - (torch.arange(1024) > last).float()
    k[..., 0], q[..., 0] = ramp.bfloat16(), factor
    # If logits are in the hundreds, the rounding of a sum of products changes a weight noticeably.
    mask, masses = assert_sampled(case, q, k, rtol=None if factor == 1 else 0.5)
    if factor == 3000 and last == 500:
        assert (masses[:, :, -1, 8:15] > 0.04).all()
        assert mask[:, :, -1, 8:15].all()


# Levels of tiles, in powers of two: the weight of their keys relative to an own key, for one query
# head after the other. Weights of 2^11 times the range of a row make it move its offset.
LEVELS = [
    [13, 13, 13, 13, 27, 27, 27, 27, 41, 41, 41, 41],
    [6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39],
    [41, 40, 38, 36, 41, 39, 37, 35, 40, 38, 36, 34],
    [0, 0, 0, 0, 0, 0, 13, 12, 14, 25, 26, 27],
]


LEANING_SLOPE = 8.0  # log2(e) times the scale, in powers of two for each unit of a key


def leaning_qk(case, dtype, levels=LEVELS):
    """Queries of each head have their own direction. Keys have a component in it, given by
    `levels`, except for the keys after the last tile."""
    q, k, _ = clustered_qkv(case, dtype, seed=7)
    q[..., : len(levels)] = k[..., : len(levels)] = 0
    for nth, of_head in enumerate(levels):
        q[:, nth :: len(levels), :, nth] = LEANING_SLOPE * case.head_dim**0.5
        by_key = torch.tensor(of_head).repeat_interleave(128) / (LEANING_SLOPE * LOG2E)
        k[:, :, : len(by_key), nth] = by_key.to(dtype)
    return q, k


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("is_causal", "num_own"), [(True, 40), (False, 40), (False, 0)], ids=str)
def test_sampled_score_where_the_own_segment_is_light(is_causal, num_own, head_dim, dtype):
    """Distant keys weigh up to 2^41 times as much, in several tiles one after the other. Without
    own keys, rows compare with the first candidates."""
    case = SAMPLED._replace(
        num_queries=40,
        num_keys=12 * 128 + num_own,
        num_kv_heads=1,
        head_dim=head_dim,
        is_causal=is_causal,
        threshold=0.01,
    )
    assert_leaning(case, dtype)


def test_sampled_score_where_many_own_segments_are_light():
    """The same with four stacks per unit."""
    case = SAMPLED._replace(
        num_queries=20 * 64,
        num_keys=12 * 128 + 40,
        num_q_heads=40,
        num_kv_heads=10,
        is_causal=False,
        num_samples=33,
        threshold=0.01,
    )
    skip_unless_planned(40 * 20, stacks_per_unit=4, least_units=1)
    assert_leaning(case, torch.bfloat16)


@pytest.mark.parametrize("is_heaviest_first", [True, False])
def test_sampled_score_above_the_limit(is_heaviest_first):
    """A distant key of 2^200 times the weight of the own segment and one of 2^98 times count the
    same, whichever comes first. One warpgroup has both, however many share the stack."""
    case = SAMPLED._replace(
        num_queries=40,
        num_keys=12 * 128 + 40,
        num_q_heads=4,
        num_kv_heads=1,
        is_causal=False,
        threshold=0.02,
        num_samples=1,  # another one might hide what this one misses
    )
    heads = len(LEVELS)
    q, k = leaning_qk(case, torch.bfloat16, [[0] * 12] * heads)
    far, near = (200, 98) if is_heaviest_first else (98, 200)
    for key, level in ((70, far), (8 * 128 + 70, near)):
        k[:, :, key, :heads] = level / (LEANING_SLOPE * LOG2E)
    mask, _ = assert_sampled(case, q, k, rtol=LEANING_RTOL)
    assert mask[..., [70 // 32, (8 * 128 + 70) // 32]].all()


def assert_leaning(case, dtype):
    mask, _ = assert_sampled(case, *leaning_qk(case, dtype), rtol=LEANING_RTOL)
    candidate, _ = ref.block_roles(case.layout)
    for nth in range(len(LEVELS)):  # each of them separates heavy blocks from light ones
        chosen = mask[:, nth :: len(LEVELS)]
        assert chosen.sum(-1).min() > 1
        assert not (chosen | ~candidate).all(-1).any()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("q_factor", "k_factor"), [(1e-6, 1e-6), (1e-4, 1e4), (1e4, 1e-4)])
def test_sampled_score_of_extreme_values(q_factor, k_factor, dtype):
    """Values reach the range of float16, and are far below 1 elsewhere: each tile and each row has
    its own scale."""
    q, k, _ = clustered_qkv(SAMPLED, torch.float32, seed=2)
    q, k = ((x * factor).clamp(-60000, 60000) for x, factor in [(q, q_factor), (k, k_factor)])
    largest = max(q.abs().max(), k.abs().max())
    assert largest > 3e4 or q_factor == k_factor
    assert_sampled(SAMPLED, q.to(dtype), k.to(dtype), random_perm(SAMPLED))


@pytest.mark.parametrize("what", ["q", "a query", "k", "a tile"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_sampled_score_of_zeros(is_causal, what):
    """All keys weigh the same, also in tiles of which a row sees a part."""
    case = SAMPLED._replace(segment_size=64, num_samples=4, is_causal=is_causal, threshold=0.05)
    q, k, _ = clustered_qkv(case, torch.bfloat16, seed=4)
    zeroed = {"q": q, "a query": q[:, 1, 15::64], "k": k, "a tile": k[:, :, 512:768]}
    zeroed[what].zero_()
    assert_sampled(case, q, k)


VALUES = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("row", [3, 31, 63])
def test_a_sampled_query_that_is_no_number_visits_everything(row, value):
    """This holds for each of the samples. The other heads and blocks are not affected."""
    case = SAMPLED._replace(num_queries=1024, num_keys=1024, threshold=0.4)
    q, k, _ = clustered_qkv(case, torch.bfloat16, seed=5)
    clean = select_on_gpu(case, q, k)
    q[0, 1, 64 * 14 + row, 7] = value
    mask = select_on_gpu(case, q, k)
    candidate, _ = ref.block_roles(case.layout)
    assert torch.equal(mask[0, 1, 14], candidate[14])
    assert not clean[0, 1, 14].equal(candidate[14])
    mask[0, 1, 14] = clean[0, 1, 14]
    assert torch.equal(mask, clean)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("key", [300, 256, 511])
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_key_that_is_no_number_makes_rows_visit_everything(is_causal, key, value):
    """It affects all rows that see its tile, and no rows of the other KV head."""
    case = SAMPLED._replace(
        num_queries=1100, num_keys=1100, threshold=0.4, is_causal=is_causal, num_samples=32
    )
    q, k, _ = clustered_qkv(case, torch.bfloat16, seed=6)
    clean = select_on_gpu(case, q, k)
    k[0, 1, key, 9] = value
    mask = select_on_gpu(case, q, k)
    candidate, _ = ref.block_roles(case.layout)
    sees = candidate[:, 256 // 32]
    assert sees.any()
    assert torch.equal(mask[0, 2:, sees], candidate[sees].expand(2, -1, -1))
    assert torch.equal(mask[0, :2], clean[0, :2])
    assert not clean[0, :2, sees].equal(candidate[sees].expand(2, -1, -1))
