"""The reference against naive loops, numbers computed by hand, and lemmas of the paper."""

import itertools
import math

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from rounding import candidates_to_e4m3, to_e4m3

SMALL = {"block_size": 2, "kv_block_size": 2, "segment_size": 4}
# By the rows of a block, the last of each of three equal parts, or all of fewer.
LAST_OF_PARTS = {1: [0], 2: [0, 1], 3: [0, 1, 2], 4: [0, 1, 3]}
LENGTHS = [(13, 13), (12, 12), (5, 14), (1, 11), (8, 12), (3, 3), (6, 21)]


def random_qkv(num_queries, num_keys, *, num_heads=4, num_kv_heads=2, head_dim=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_heads, num_queries), (num_kv_heads, num_keys), (num_kv_heads, num_keys)]
    return [
        torch.randn(2, *shape, head_dim, dtype=torch.float64, generator=generator)
        for shape in shapes
    ]


def random_perm(batch, heads, num_keys, segment_size, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch, heads, num_keys, generator=generator)
    return ref.sort_segments(noise, segment_size=segment_size)


def test_score_keys_by_hand():
    """Two queries, one complete segment of four keys and one key beyond it."""
    log2 = math.log(2)
    k = torch.tensor([0.0, 1, 2, 3, 9]).view(1, 1, 5, 1) * log2
    q = torch.tensor([7.0, 0, 1]).view(1, 1, 3, 1)
    scores = ref.score_keys(q, k, block_size=2, segment_size=4)
    by_zero_query, by_one_query = [1 / 4] * 4, [1 / 15, 2 / 15, 4 / 15, 8 / 15]
    expected = [(a + b) / 2 for a, b in zip(by_zero_query, by_one_query, strict=True)] + [0]
    torch.testing.assert_close(scores, torch.tensor(expected).double().view(1, 1, 5))


@pytest.mark.parametrize("permute_per", ["kv_head", "query_head"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_score_keys_naively(lengths, permute_per):
    q, k, _ = random_qkv(*lengths)
    scores = ref.score_keys(q, k, block_size=2, segment_size=4, scale=0.7, permute_per=permute_per)
    num_queries, num_keys = lengths
    num_sorted = num_keys - num_keys % 4
    per_query_head = torch.zeros(2, 4, num_keys, dtype=torch.float64)
    rows = range(max(0, num_queries - 2), num_queries)
    for b, h, row in itertools.product(range(2), range(4), rows):
        weights = [
            math.exp(0.7 * (q[b, h, row] @ k[b, h // 2, j]).item()) for j in range(num_sorted)
        ]
        for j, weight in enumerate(weights):
            per_query_head[b, h, j] += weight / sum(weights) / len(rows)
    expected = per_query_head
    if permute_per == "kv_head":
        expected = (per_query_head[:, 0::2] + per_query_head[:, 1::2]) / 2
    torch.testing.assert_close(scores, expected)
    if num_sorted:
        torch.testing.assert_close(scores.sum(-1), torch.ones(scores.shape[:2]).double())


@pytest.mark.parametrize(
    ("num_heavy", "expected"),
    [
        (None, [1, 3, 0, 2, 6, 4, 5, 7, 8, 9]),
        (2, [1, 3, 0, 2, 4, 6, 5, 7, 8, 9]),
        (1, [1, 0, 2, 3, 6, 4, 5, 7, 8, 9]),
        (4, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_sort_segments_by_hand(num_heavy, expected):
    """Ties go to the lower index; the last two keys form no segment and stay."""
    scores = torch.tensor([[[0.2, 0.9, 0.1, 0.3, 0.5, 0.5, 0.6, 0.1, 0.0, 8.0]]])
    perm = ref.sort_segments(scores, segment_size=4, num_heavy=num_heavy)
    assert perm.tolist() == [[expected]]


def test_permute_kv_is_the_block_diagonal_matrix_of_eq_6():
    _, k, v = random_qkv(10, 10)
    perm = random_perm(2, 4, 10, 4)
    k_perm, v_perm, k_mean = ref.permute_kv(k, v, perm, kv_block_size=4)
    matrix = F.one_hot(perm, 10).double()
    inside_one_segment = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4), torch.eye(2))
    assert (matrix * (1 - inside_one_segment) == 0).all()
    for head in range(4):
        torch.testing.assert_close(k_perm[:, head], matrix[:, head] @ k[:, head // 2])
        torch.testing.assert_close(v_perm[:, head], matrix[:, head] @ v[:, head // 2])
    for block, rows in enumerate([slice(0, 4), slice(4, 8), slice(8, 10)]):
        torch.testing.assert_close(k_mean[:, :, block], k_perm[:, :, rows].mean(2))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_visited_keys_naively(lengths, is_causal):
    """Decides each key of each row alone, from the rule in words."""
    num_queries, num_keys = lengths
    layout = ref.Layout(num_queries, num_keys, 2, 2, 4, is_causal)
    perm = random_perm(2, 2, num_keys, 4)
    shape = (2, 4, -(-num_queries // 2), -(-num_keys // 2))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5
    visited = ref.visited_keys(perm, mask, layout)
    for b, h, row, place in itertools.product(
        range(2), range(4), range(num_queries), range(num_keys)
    ):
        key = perm[b, h // 2, place].item()
        position = num_keys - num_queries + row
        first_of_block = num_keys - num_queries + row - row % 2
        own_start = first_of_block - first_of_block % 4 if is_causal else num_keys - num_keys % 4
        if key >= own_start:
            expected = key <= position or not is_causal
        else:
            expected = mask[b, h, row // 2, place // 2].item()
        assert visited[b, h, row, key].item() == expected


def test_block_roles_of_an_unaligned_chunk():
    """Six queries at positions 7 to 12 of 13 keys, blocks of 2, segments of 4."""
    candidate, own = ref.block_roles(ref.Layout(6, 13, 2, 2, 4, True))
    assert candidate.tolist() == [
        [True, True, False, False, False, False, False],
        [True, True, True, True, False, False, False],
        [True, True, True, True, False, False, False],
    ]
    # Positions 7 and 8 are in two segments. Both belong to the segment of 7.
    assert own.tolist() == [
        [False, False, True, True, True, False, False],
        [False, False, False, False, True, True, False],
        [False, False, False, False, True, True, True],
    ]
    candidate, own = ref.block_roles(ref.Layout(6, 13, 2, 2, 4, False))
    assert candidate.tolist() == [[True] * 6 + [False]] * 3
    assert own.tolist() == [[False] * 6 + [True]] * 3


def blocks_with_masses(masses, *, tail_mass=None):
    """q, k, k_mean that give the last query block these candidate masses (segments of 4 keys)."""
    blocks = torch.tensor(masses, dtype=torch.float64).log()
    num_keys = 2 * len(masses) + 2
    q = torch.ones(1, 1, num_keys, 1, dtype=torch.float64)
    k = torch.full((1, 1, num_keys, 1), -9.0, dtype=torch.float64)
    if tail_mass is not None:
        k[:, :, -2:] = math.log(tail_mass)
    k_mean = torch.cat([blocks, torch.zeros(1, dtype=torch.float64)]).view(1, 1, -1, 1)
    return q, k, k_mean


@pytest.mark.parametrize(
    ("masses", "threshold", "expected"),
    [
        ([0.1, 0.4, 0.3, 0.2], 0.35, [0, 1]),  # one block reaches; block 0 holds token 0
        ([0.1, 0.4, 0.3, 0.2], 0.69, [0, 1, 2]),
        ([0.1, 0.4, 0.3, 0.2], 0.71, [0, 1, 2, 3]),
        ([0.4, 0.1, 0.3, 0.2], 0.65, [0, 2]),
        ([0.25, 0.25, 0.25, 0.25], 0.5, [0, 1]),  # ties to the lower index, and = reaches
        ([1e-30, 1.0, 1e-30, 1e-30], 1.0, [0, 1, 2, 3]),
    ],
)
def test_selection_by_hand(masses, threshold, expected):
    q, k, k_mean = blocks_with_masses(masses)
    mask, counts = ref.select_blocks(q, k, k_mean, threshold=threshold, scale=1.0, **SMALL)
    assert mask[0, 0, -1].nonzero().flatten().tolist() == expected
    assert counts[0, 0, -1] == len(expected)


@pytest.mark.parametrize(
    ("tail_mass", "threshold", "expected"),
    [
        (1.0, 0.5, [0]),  # the own block alone reaches it: only the block of token 0 is added
        (1.0, 0.6, [0, 1]),
        (1.0, 0.71, [0, 1, 2]),
        (3.0, 0.9, [0, 1, 2]),
    ],
)
def test_selection_of_causal_mass_by_hand(tail_mass, threshold, expected):
    """Candidates weigh 0.1, 0.4, 0.3 and 0.2, the one own block `tail_mass`."""
    q, k, k_mean = blocks_with_masses([0.1, 0.4, 0.3, 0.2], tail_mass=tail_mass)
    options = {"threshold": threshold, "scale": 1.0, "mass": "causal"}
    mask, _ = ref.select_blocks(q, k, k_mean, **options, **SMALL)
    assert mask[0, 0, -1].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("mass", ["earlier", "causal"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_selected_set_is_the_smallest_by_brute_force(is_causal, mass):
    q, k, v = random_qkv(9, 21, head_dim=4, seed=5)
    perm = random_perm(2, 2, 21, 4)
    k_mean = ref.permute_kv(k, v, perm, kv_block_size=4)[2]
    options = {"block_size": 2, "kv_block_size": 4, "segment_size": 4, "is_causal": is_causal}
    options |= {"scale": 2.0}
    mask, _ = ref.select_blocks(q, k, k_mean, perm, threshold=0.8, mass=mass, **options)
    layout = ref.Layout(9, 21, 2, 4, 4, is_causal)
    candidate, own = ref.block_roles(layout)
    sizes = set()
    for b, h, i in itertools.product(range(2), range(4), range(5)):
        q_mean = q[b, h, 2 * i : 2 * i + 2].mean(0)
        weight = {j: math.exp(2 * (q_mean @ k_mean[b, h // 2, j])) for j in range(6)}
        own_weight = 0.0
        if mass == "causal":
            for j in own[i].nonzero().flatten().tolist():
                own_weight += math.exp(2 * (q_mean @ k[b, h // 2, 4 * j : 4 * j + 4].mean(0)))
        blocks = candidate[i].nonzero().flatten().tolist()
        needed = 0.8 * (sum(weight[j] for j in blocks) + own_weight)
        best = min(
            (
                subset
                for size in range(len(blocks) + 1)
                for subset in itertools.combinations(blocks, size)
                if sum(weight[j] for j in subset) + own_weight >= needed
            ),
            key=lambda subset: (len(subset), -sum(weight[j] for j in subset)),
        )
        sink = (perm[b, h // 2] == 0).nonzero().item() // 4
        assert set(mask[b, h, i].nonzero().flatten().tolist()) == {*best, sink}
        sizes.add(len(best))
    assert len(sizes) > 2


@pytest.mark.parametrize(
    ("window", "dense_tail", "expected"),
    [
        (0, 0, [[], [], []]),
        (1, 0, [[], [], []]),  # keys 6, 8 and 10, each of the own segment
        (2, 0, [[], [2, 3], []]),  # and 5, 7 and 9
        (4, 0, [[0, 1], [2, 3], [2, 3]]),
        (9, 0, [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]),
        (0, 1, [[], [], [0, 1, 2, 3]]),
        (0, 2, [[], [], [0, 1, 2, 3]]),
        (0, 3, [[], [0, 1, 2, 3], [0, 1, 2, 3]]),
        (1, 99, [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]),
    ],
)
def test_window_and_tail_by_hand(window, dense_tail, expected):
    """Six queries at positions 7 to 12 of 13 keys, blocks of 2, segments of 4."""
    layout = ref.Layout(6, 13, 2, 2, 4, True)
    candidate, _ = ref.block_roles(layout)
    found = ref.always_visited(layout, window, dense_tail) & candidate
    assert [row.nonzero().flatten().tolist() for row in found] == expected
    assert not ref.always_visited(layout._replace(is_causal=False), window, dense_tail).any()


@pytest.mark.parametrize("select_per", ["query_head", "kv_head"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("lengths", [(13, 13), (5, 14)])
def test_sampled_mass_naively(lengths, is_causal, select_per):
    q, k, v = random_qkv(*lengths)
    num_queries, num_keys = lengths
    perm = random_perm(2, 2, num_keys, 4)
    k_perm = ref.permute_kv(k, v, perm)[0]
    layout = ref.Layout(*lengths, 4, 2, 4, is_causal)
    candidate, _ = ref.block_roles(layout)
    mass, _ = ref.sampled_mass(q, k, perm, layout, 3, scale=0.7, select_per=select_per)
    for b, h, i in itertools.product(range(2), range(4), range(-(-num_queries // 4))):
        num_rows = min(4, num_queries - 4 * i)
        largest = [0.0] * candidate.shape[1]
        for nth, row in enumerate(LAST_OF_PARTS[num_rows]):
            head = h if select_per == "query_head" else h // 2 * 2 + nth % 2
            position = num_keys - num_queries + 4 * i + row

            def weight(key, query=q[b, head, 4 * i + row]):
                return math.exp(0.7 * (query @ key).item())

            shares = {}
            for j in candidate[i].nonzero().flatten().tolist():
                shares[j] = sum(map(weight, k_perm[b, h // 2, 2 * j : 2 * j + 2]))
            own_start = (num_keys - num_queries + 4 * i if is_causal else num_keys) // 4 * 4
            keys = range(own_start, position + 1 if is_causal else num_keys)
            total = sum(shares.values()) + sum(weight(k[b, h // 2, key]) for key in keys)
            for j, share in shares.items():
                largest[j] = max(largest[j], share / total)
        torch.testing.assert_close(mass[b, h, i], torch.tensor(largest).double())


def test_e4m3_by_hand():
    """Three bits of mantissa, and steps of 2^-9 in units of the largest over 15."""
    x = torch.tensor([[15.0, 8.4, 9.6, 1.1, 0.0009], [-1.5, 0.84, 0.96, 0.11, 0.0]])
    expected = torch.tensor([[15.0, 8.0, 10.0, 1.125, 0.0], [-15.0, 8.0, 10.0, 1.125, 0.0]])
    found = to_e4m3(x, -1)
    assert torch.equal(found.multiples, expected.double())
    torch.testing.assert_close(found.unit, torch.tensor([[1.0], [0.1]]).double())
    x[1] *= 10  # now one unit for all
    found = to_e4m3(x, (0, 1))
    assert found.unit.tolist() == [[1.0]]
    assert found.multiples[1].tolist() == [-15.0, 8.0, 10.0, 1.125, 0.0]
    assert not to_e4m3(torch.zeros(2, 3), -1).multiples.any()


def test_tiles_of_candidates_have_their_own_units():
    """Of 200 keys, 160 are candidates. Each tile is rounded by its largest element, and the second
    tile ignores the keys after the candidates."""
    k_perm = torch.full((1, 1, 200, 2), 1.1)
    k_perm[0, 0, 3, 0], k_perm[0, 0, 130, 1], k_perm[0, 0, 170, 0] = -15.0, 30.0, 1000.0
    found = candidates_to_e4m3(k_perm, 160)
    assert found.multiples.shape == (1, 1, 160, 2)
    assert found.unit[0, 0, :, 0].tolist() == [1.0] * 128 + [2.0] * 32
    rounded = (found.multiples * found.unit)[0, 0]
    assert rounded[3].tolist() == [-15.0, 1.125]
    assert rounded[130].tolist() == [1.125, 30.0]  # 0.55 in steps of a sixteenth
    assert candidates_to_e4m3(k_perm, 0).multiples.shape == (1, 1, 0, 2)


def test_rounded_mass_by_hand():
    """The keys of two blocks are rounded by the largest of their tile. Own keys do not count in it,
    and are exact."""
    k = torch.zeros(1, 1, 95, 2)
    k[0, 0, :32, 0] = 8.25
    k[0, 0, 0] = torch.tensor([15.0, 1.125])
    k[0, 0, 32:64, 0] = 9.75
    k[0, 0, 32, 1] = -15.0
    k[0, 0, 64:, 0] = 8.25
    k[0, 0, 70, 1] = 30.0
    layout = ref.Layout(1, 95, 32, 32, 64, True)
    q = torch.tensor([[[[15.0, 1.125]]]])
    masses, own = ref.sampled_mass(q, k, None, layout, 1, scale=0.01, rounding="e4m3")
    # The one row of the query has 15 as its largest, so that it stays what it is. So has the tile:
    # 8.25 becomes 8, and 9.75 becomes 10. The first key's sum, 226.265625, loses its last bits.
    first = 31 * math.exp(1.2) + math.exp(2.2625)
    second = 31 * math.exp(1.5) + math.exp(1.33125)
    owns = 30 * math.exp(1.2375) + math.exp(1.575)
    expected = torch.tensor([first, second, 0.0]).double() / (first + second + owns)
    torch.testing.assert_close(masses[0, 0, 0], expected)
    torch.testing.assert_close(own[0, 0, 0].item(), owns / (first + second + owns))


def test_rounded_mass_is_limited_above_the_own_keys():
    """One candidate block is far above the own keys, and another is much further above."""
    q, k = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 65, 1)
    k[0, 0, :32], k[0, 0, 32:64] = 100.0, 200.0
    layout = ref.Layout(1, 65, 32, 32, 64, True)
    exact, _ = ref.sampled_mass(q, k, None, layout, 1, scale=1.0)
    torch.testing.assert_close(exact[0, 0, 0], torch.tensor([0.0, 1.0, 0.0]).double())
    cut, _ = ref.sampled_mass(q, k, None, layout, 1, scale=1.0, rounding="e4m3")
    torch.testing.assert_close(cut[0, 0, 0], torch.tensor([0.5, 0.5, 0.0]).double())


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("num_keys", [600, 640])
def test_rounded_masses_stay_near_the_exact_ones(num_keys, is_causal):
    """Without own keys, too: 640 that are not causal."""
    q, k, _ = random_qkv(300, num_keys)
    perm = random_perm(2, 2, num_keys, 128)
    layout = ref.Layout(300, num_keys, 64, 32, 128, is_causal)
    exact, exact_own = ref.sampled_mass(q, k, perm, layout, 8)
    rounded, own = ref.sampled_mass(q, k, perm, layout, 8, rounding="e4m3")
    torch.testing.assert_close(rounded, exact, rtol=0.25, atol=1e-6)
    torch.testing.assert_close(own, exact_own, rtol=0.1, atol=1e-6)
    assert ((rounded - exact).abs() > 1e-4 * exact).any()


def test_the_block_of_token_0_is_found_through_the_permutation():
    q, k, k_mean = blocks_with_masses([1e-9, 1e-9, 1.0, 1e-9])
    perm = torch.tensor([[[3, 1, 2, 0, 4, 5, 6, 7, 8, 9]]])
    mask, _ = ref.select_blocks(q, k, k_mean, perm, threshold=0.5, scale=1.0, **SMALL)
    assert mask[0, 0, -1].nonzero().flatten().tolist() == [1, 2]
    assert not mask[0, 0, :2].any(), "the first segment has no earlier block"


@pytest.mark.parametrize("permute_per", ["kv_head", "query_head"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_threshold_1_is_dense_attention(lengths, is_causal, permute_per):
    q, k, v = random_qkv(*lengths)
    options = {"is_causal": is_causal, "permute_per": permute_per, "threshold": 1.0, **SMALL}
    out = ref.attention(q, k, v, scale=0.8, **options)
    visible = torch.ones(lengths, dtype=torch.bool)
    if is_causal:
        visible = visible.tril(lengths[1] - lengths[0])
    dense = F.scaled_dot_product_attention(q, k, v, visible, scale=0.8, enable_gqa=True)
    torch.testing.assert_close(out, dense)


def test_attention_under_a_permutation_of_keys_is_attention():
    """Lemma 3.1: with every block selected, any permutation inside the segments gives the same."""
    q, k, v = random_qkv(13, 13)
    everything = torch.ones(2, 4, 7, 7, dtype=torch.bool)
    identity = torch.arange(13).expand(2, 2, -1)
    out, lse = ref.attend(q, k, v, identity, everything, **SMALL)
    for seed in range(5):
        permuted = ref.attend(q, k, v, random_perm(2, 2, 13, 4, seed=seed), everything, **SMALL)
        torch.testing.assert_close(permuted, (out, lse))


def test_attend_equals_attention_over_the_gathered_permuted_blocks():
    """The last query row by its definition: selected blocks of K' and V', then its own segment."""
    q, k, v = random_qkv(13, 13)
    perm = random_perm(2, 4, 13, 4)
    k_perm, v_perm, _ = ref.permute_kv(k, v, perm, kv_block_size=2)
    mask = torch.zeros(2, 4, 7, 7, dtype=torch.bool)
    mask[:, :, :, [0, 3]] = True
    out, lse = ref.attend(q, k, v, perm, mask, **SMALL)
    for head in range(4):
        rows = [0, 1, 6, 7]
        keys = torch.cat([k_perm[:, head, rows], k[:, head // 2, 12:]], 1)
        values = torch.cat([v_perm[:, head, rows], v[:, head // 2, 12:]], 1)
        weights = (keys @ q[:, head, 12, :, None] / math.sqrt(3)).exp()
        torch.testing.assert_close(lse[:, head, 12], weights.sum((1, 2)).log())
        torch.testing.assert_close(out[:, head, 12], (weights * values).sum(1) / weights.sum(1))


def test_a_row_that_visits_nothing_gives_zero():
    q, k, v = random_qkv(8, 8)
    nothing = torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    perm = random_perm(2, 2, 8, 4)
    out, lse = ref.attend(q, k, v, perm, nothing, is_causal=False, **SMALL)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("num_blocks", [1, 31, 32, 33, 70])
def test_mask_bits(num_blocks):
    mask = torch.rand(2, 3, num_blocks, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0, 0, -1] = True
    words = ref.pack_mask(mask)
    assert words.dtype == torch.int32
    assert words.shape == (2, 3, -(-num_blocks // 32))
    for index in itertools.product(range(2), range(3), range(num_blocks)):
        word = words[index[0], index[1], index[2] // 32].item() & 0xFFFFFFFF
        assert word >> index[2] % 32 & 1 == mask[index].item()
    assert torch.equal(ref.unpack_mask(words, num_blocks), mask)
