"""The header-only C++ parts, through a pybind11 module that is built only for the tests."""

import math
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import reference as ref
import rounding
import sanitize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pbs_attn._library import gpu_capabilities, runs_on
from pbs_attn.ops import HEAD_DIMS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def native(tmp_path_factory):
    build_dir = tmp_path_factory.mktemp("native")
    configure = ["-S", ROOT, "-B", build_dir, "-G", "Ninja", "-DPBS_BUILD_TEST_MODULE=ON"]
    for arguments in (
        [*configure, f"-DPython_EXECUTABLE={sys.executable}"],
        ["--build", build_dir],
    ):
        result = subprocess.run(["cmake", *arguments], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    sys.path.insert(0, str(build_dir))
    try:
        import pbs_native
    finally:
        sys.path.remove(str(build_dir))
    return pbs_native


@settings(deadline=None, max_examples=300)
@given(
    num_q=st.integers(1, 2000),
    num_earlier=st.integers(0, 2000),
    block_size=st.sampled_from([32, 64, 128]),
    kv_block_size=st.sampled_from([32, 64, 128]),
    segments=st.integers(1, 4),
    is_causal=st.booleans(),
    data=st.data(),
)
def test_query_block_partitions_what_is_visible(
    native, num_q, num_earlier, block_size, kv_block_size, segments, is_causal, data
):
    num_kv = num_q + num_earlier
    segment_size = 128 * segments
    idx = data.draw(st.integers(0, -(-num_q // block_size) - 1))
    block = native.query_block(
        idx, num_q, num_kv, block_size, kv_block_size, segment_size, is_causal
    )
    rows = range(idx * block_size, min((idx + 1) * block_size, num_q))
    assert (block.first_row, block.num_rows) == (rows.start, len(rows))
    assert block.first_position == num_earlier + rows.start
    # Candidates end where the own range begins, at a segment boundary: no overlap and no gap.
    assert block.num_candidates * kv_block_size == block.own_begin
    assert block.own_begin % segment_size == 0
    if is_causal:
        # Candidates lie before the first row, and the own range ends at the last row's position.
        assert block.own_begin <= block.first_position < block.own_begin + segment_size
        assert block.own_end == num_earlier + rows.stop <= num_kv
    else:
        assert block.own_end == num_kv
        assert num_kv - block.own_begin < segment_size


@settings(deadline=None, max_examples=200)
@given(
    words=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5),
    data=st.data(),
)
def test_selected_walks_the_set_bits_below_the_limit(native, words, data):
    num_candidates = data.draw(st.integers(0, 32 * len(words)))
    expected = [j for j in range(num_candidates) if words[j // 32] >> j % 32 & 1]
    assert native.selected(words, num_candidates) == expected


@settings(deadline=None, max_examples=200)
@given(
    num_q=st.integers(1, 1000),
    num_earlier=st.integers(0, 1000),
    num_selected=st.integers(0, 40),
    kv_block_size=st.sampled_from([32, 64, 128]),
    tile_keys=st.sampled_from([64, 128]),
    is_causal=st.booleans(),
)
def test_key_tiles_show_every_row_what_it_visits(
    native, num_q, num_earlier, num_selected, kv_block_size, tile_keys, is_causal
):
    num_kv = num_q + num_earlier
    block = native.query_block(0, num_q, num_kv, 128, kv_block_size, 256, is_causal)
    tiles = native.key_tiles(block, num_selected, kv_block_size, tile_keys, is_causal)

    def visible(tile_idx, row):
        return min(max(native.visible_keys(tiles, tile_idx, row, tile_keys), 0), tile_keys)

    selected = range(tiles.num_own, tiles.total)
    for row in (0, block.num_rows // 2, block.num_rows - 1):
        # Original keys: each one that the row sees, once, and no other.
        seen = []
        for i in range(tiles.num_own):
            begin = block.own_begin + native.own_tile_begin(tiles, i, tile_keys)
            seen += range(begin, begin + visible(i, row))
        end = block.first_position + row + 1 if is_causal else num_kv
        assert sorted(seen) == list(range(block.own_begin, end))
        # All selected blocks are there, and a tile that they do not fill comes first.
        sizes = [visible(i, row) for i in selected]
        assert sum(sizes) == num_selected * kv_block_size
        assert all(size == tile_keys for size in sizes[1:])
        # The tiles after the masked ones need no mask.
        assert all(visible(i, row) == tile_keys for i in range(tiles.num_masked, tiles.total))
    if tiles.total > tiles.num_own:
        assert visible(tiles.num_own, 0) == tiles.first_selected_size


@settings(deadline=None, max_examples=200)
@given(
    num_selected=st.integers(1, 40),
    kv_block_size=st.sampled_from([32, 64, 128]),
    tile_keys=st.sampled_from([64, 128]),
)
def test_tiles_are_packed_from_selected_blocks(native, num_selected, kv_block_size, tile_keys):
    block = native.query_block(40, 6000, 6000, 128, kv_block_size, 256, True)
    tiles = native.key_tiles(block, num_selected, kv_block_size, tile_keys, True)
    chunk_rows = min(kv_block_size, tile_keys)
    rows = list(range(0, num_selected * kv_block_size, chunk_rows))
    first_chunks = tiles.first_selected_size // chunk_rows
    packed = native.pack(rows, first_chunks, tile_keys // chunk_rows, chunk_rows)
    assert len(packed) == tiles.total - tiles.num_own
    # Every chunk comes once. Empty places of the first tile come after the used ones, and before
    # the first row.
    assert all(row == -chunk_rows for row in packed[0][first_chunks:])
    visited = packed[0][:first_chunks] + [row for tile in packed[1:] for row in tile]
    assert sorted(visited) == rows


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tiles_fit_in_shared_memory(native, head_dim):
    q, k, v = native.stages(head_dim)
    assert q >= 1
    assert min(k, v) >= 2  # the next tile's load has to overlap with this one's products
    rows = q * 128 + (k + v) * native.tile_keys(head_dim)
    assert native.tile_bytes(head_dim) == 2 * head_dim * rows
    barriers = 1024
    used = native.tile_bytes(head_dim) + native.swizzle_bytes + barriers
    assert used <= native.shared_bytes_per_cta


@settings(deadline=None, max_examples=200)
@given(
    num_q_blocks=st.integers(1, 20),
    num_kv_heads=st.integers(1, 9),
    heads_per_kv=st.integers(1, 4),
    fitting=st.integers(0, 12),
)
def test_work_groups_hold_everything_once(
    native, num_q_blocks, num_kv_heads, heads_per_kv, fitting
):
    num_heads = num_kv_heads * heads_per_kv
    groups = native.WorkGroups(num_q_blocks, num_heads, heads_per_kv, 1000, 1000 * fitting + 1)
    assert groups.heads_per_group % heads_per_kv == 0
    assert groups.heads_per_group <= max(1, fitting) * heads_per_kv
    assert (groups.num_groups() - 1) * groups.heads_per_group < num_heads
    tiles = []
    for group_idx in range(groups.num_groups()):
        blocks = [native.work_tile(groups, group_idx, i) for i in range(groups.blocks_per_group())]
        # The last query blocks first, and heads that share keys side by side.
        assert [block for _, block in blocks] == sorted((b for _, b in blocks), reverse=True)
        assert {head // groups.heads_per_group for head, _ in blocks} == {group_idx}
        tiles += [tile for tile in blocks if tile[0] < num_heads]
    assert sorted(tiles) == [(h, b) for h in range(num_heads) for b in range(num_q_blocks)]


@settings(deadline=None, max_examples=200)
@given(
    num_q_blocks=st.integers(0, 20),
    num_kv_heads=st.integers(1, 9),
    heads_per_kv=st.integers(1, 4),
    fitting=st.integers(0, 12),
)
def test_every_place_of_every_group_is_drawn_once(
    native, num_q_blocks, num_kv_heads, heads_per_kv, fitting
):
    """The first two a head of all groups, then the others group by group, then nothing."""
    num_heads = num_kv_heads * heads_per_kv
    groups = native.WorkGroups(num_q_blocks, num_heads, heads_per_kv, 1000, 1000 * fitting + 1)
    num_groups, num_blocks = groups.num_groups(), groups.blocks_per_group()
    num_first = min(num_blocks, 2 * groups.heads_per_group)
    expected = [
        (rank, place)
        for places in (range(num_first), range(num_first, num_blocks))
        for rank in range(num_groups)
        for place in places
    ]
    total = num_groups * num_blocks
    assert [native.drawn_place(groups, idx) for idx in range(total)] == expected
    assert sorted(expected) == list(product(range(num_groups), range(num_blocks)))
    for idx in (total, total + 1, total + 500):  # a CTA draws until it is told
        assert native.drawn_place(groups, idx)[0] >= num_groups


@given(most=st.integers(1, 2**31 - 1), data=st.data())
def test_order_bins_descend(native, most, data):
    keys = data.draw(st.lists(st.integers(0, most), min_size=1, max_size=20))
    per_key = (native.order_bins - 1) / most
    bins = [native.order_bin(count, most, per_key) for count in sorted(keys)]
    assert bins == sorted(bins, reverse=True)
    assert min(bins) >= 0 and max(bins) < native.order_bins
    assert native.order_bin(most, most, per_key) == 0


@pytest.mark.parametrize("num_heads", [1, 7, 32])
def test_order_layout_parts_do_not_overlap(native, num_heads):
    groups = native.WorkGroups(5, num_heads, 1, 1000, 3000)
    counter, order, unsorted, group_at, weights, size = native.order_layout(groups)
    num_blocks = groups.num_groups() * groups.blocks_per_group()
    assert order > counter and order % 2 == 0
    assert unsorted - order == 2 * num_blocks
    assert group_at - unsorted == num_blocks
    assert weights - group_at == size - weights == groups.num_groups()


@settings(deadline=None, max_examples=300)
@given(
    is_first_pass=st.booleans(),
    num_keys=st.one_of(st.integers(0, 3000), st.integers(0, 2**22)),
    num_kv_heads=st.integers(1, 300),
    heads_per_kv=st.integers(1, 64),
    head_dim=st.sampled_from(HEAD_DIMS),
)
def test_score_plan_deals_out_everything(
    native, is_first_pass, num_keys, num_kv_heads, heads_per_kv, head_dim
):
    shape = (num_keys, num_kv_heads, heads_per_kv, 132, head_dim)
    plan = native.score_plan(is_first_pass, *shape)
    # Groups and parts hold all heads and all keys, and none is empty.
    assert 0 < plan.heads_per_group <= 4
    assert 0 <= plan.heads_per_group * plan.num_groups - heads_per_kv < plan.heads_per_group
    assert plan.keys_per_part % 256 == 0
    unused = plan.keys_per_part * plan.num_parts - num_keys
    assert 0 <= unused < plan.keys_per_part
    used = native.score_shared_bytes(plan, is_first_pass, heads_per_kv, head_dim)
    assert used <= native.shared_bytes_per_cta
    assert plan.num_stages * native.score_stage_rows(is_first_pass) >= 256
    if is_first_pass:
        assert plan.num_stages % 2 == 0
        # After queries, keys and barriers: a state of 16 bytes for each thread and each of its
        # blocks.
        tile = 256 * head_dim
        rest = used - (plan.heads_per_group + plan.num_stages) * tile
        in_last = heads_per_kv - (plan.num_groups - 1) * plan.heads_per_group
        most = max(map(native.blocks_per_warpgroup, (plan.heads_per_group, in_last)))
        assert rest >= most * native.score_warpgroups * 128 * 16 + native.swizzle_bytes


@pytest.mark.parametrize("is_first_pass", [True, False])
def test_score_plan_fills_the_gpu_once(native, is_first_pass):
    plan = native.score_plan(is_first_pass, 131072, 8, 4, 132, 128)
    assert (plan.heads_per_group, plan.num_groups, plan.num_parts) == (4, 1, 16)


def test_score_plan_refuses_what_does_not_fit(native):
    assert native.score_plan(False, 4096, 1, 500, 132, 128).num_stages == 0


@settings(deadline=None, max_examples=300)
@given(
    num_keys=st.one_of(st.integers(0, 3000), st.integers(0, 2**22), st.just(2**31 - 1)),
    num_walks=st.integers(1, 1000),
    num_sms=st.integers(1, 200),
)
def test_score_parts_hold_all_keys(native, num_keys, num_walks, num_sms):
    parts = native.score_parts(num_keys, num_walks, num_sms)
    assert parts.keys_per_part > 0 and parts.keys_per_part % 128 == 0
    assert 0 <= parts.keys_per_part * parts.num_parts - num_keys < parts.keys_per_part
    # At most four waves of CTAs, unless there are more walks, of at most 2^30 keys each.
    fewest = num_walks * -(-max(num_keys, 1) // 2**30)
    assert num_walks * parts.num_parts <= max(fewest, 4 * native.score_ctas_per_sm * num_sms)


@pytest.mark.parametrize("num_walks", [8, 32])
def test_score_parts_fill_the_gpu_once(native, num_walks):
    parts = native.score_parts(131072, num_walks, 132)
    assert parts.num_parts * num_walks == 256  # of 264 places


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_score_ring_fits_twice_in_small_shared_memory(native, head_dim):
    stage_rows, num_stages, num_bytes = native.score_ring(head_dim)
    assert 128 % stage_rows == 0
    assert num_stages >= 3  # one in work, two on their way
    assert num_bytes == num_stages * stage_rows * (2 * head_dim + 4)
    # A multiprocessor of compute capability 8.6 has 100 KB, and reserves 1 KB per CTA.
    assert native.score_ctas_per_sm * (num_bytes + 1024) <= 100 * 1024


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4])
def test_a_warpgroup_meets_few_blocks(native, num_heads):
    """Every fourth product, of all tiles by all blocks of the heads in turn."""
    for warpgroup in range(native.score_warpgroups):
        products = range(warpgroup, 48 * native.score_warpgroups, native.score_warpgroups)
        blocks = [product % (2 * num_heads) for product in products]
        met = native.blocks_per_warpgroup(num_heads)
        assert len(set(blocks)) == met
        assert blocks == blocks[:met] * (len(blocks) // met)


SELECT_SIZES = {
    "head_dim": st.sampled_from(HEAD_DIMS),
    "is_float": st.booleans(),
    "block_size": st.sampled_from([32, 64, 128]),
    "kv_block_size": st.sampled_from([32, 64, 128]),
    "segments": st.integers(1, 32),
}


@settings(deadline=None, max_examples=300)
@given(num_heads=st.integers(1, 64), num_tokens=st.integers(1, 2**23), **SELECT_SIZES)
def test_select_tiles_fit(
    native, num_heads, num_tokens, head_dim, is_float, block_size, kv_block_size, segments
):
    sizes = (block_size, kv_block_size, 128 * segments)
    tiles, most = native.select_tiles(num_heads, num_tokens, head_dim, is_float, *sizes)
    assert tiles.shared_bytes <= native.shared_bytes_per_cta
    assert (tiles.rows > 0) == (math.ceil(num_tokens / kv_block_size) <= most)
    assert tiles.rows <= native.logit_rows
    if is_float:
        assert tiles.num_slots == 0
    elif tiles.rows > 0:
        assert tiles.num_slots >= 1
    assert most >= (30900 if head_dim == 256 else 39100)  # docs/ops.md, Errors


@pytest.mark.parametrize(("num_tokens", "rows"), [(8192, 4), (16384, 8), (32768, 16), (131072, 16)])
def test_select_tiles_keep_every_cta_busy(native, num_tokens, rows):
    tiles, _ = native.select_tiles(32, num_tokens, 128, False, 128, 128, 256)
    assert tiles.rows == rows
    assert tiles.num_slots >= 3  # 96 KiB


# Per multiprocessor: compute capability 8.6, 8.9 and 12.0; 8.0; 10.0.
SHARED_BYTES_SM80 = [100 * 1024, 164 * 1024, 228 * 1024]


@settings(deadline=None, max_examples=300)
@given(
    num_heads=st.integers(1, 64),
    num_tokens=st.integers(1, 2**22),
    num_sms=st.integers(1, 200),
    shared_bytes=st.sampled_from(SHARED_BYTES_SM80),
    **SELECT_SIZES,
)
def test_select_tiles_fit_sm80(
    native,
    num_heads,
    num_tokens,
    num_sms,
    shared_bytes,
    head_dim,
    is_float,
    block_size,
    kv_block_size,
    segments,
):
    sizes = (head_dim, is_float, block_size, kv_block_size, 128 * segments)
    tiles, most = native.select_tiles_sm80(num_heads, num_tokens, *sizes, num_sms, shared_bytes)
    num_blocks = math.ceil(num_tokens / kv_block_size)
    if shared_bytes == SHARED_BYTES_SM80[0]:
        assert shared_bytes - 1024 == native.small_shared_bytes_per_cta
        assert (tiles.rows > 0) == (num_blocks <= most)
    elif num_blocks <= most:
        assert tiles.rows > 0
    assert tiles.rows <= native.logit_rows_sm80
    assert most >= (22100 if head_dim == 256 else 23100)  # docs/ops.md, Errors
    # SelectShared (sm80/select_blocks/mean/mean.cu), and rows with three zeros behind.
    entries = num_blocks + math.ceil((128 * segments + block_size) / kv_block_size)
    fixed = 4 * native.logit_rows_sm80 * (head_dim + 128) + 16
    assert tiles.shared_bytes >= fixed + 4 * tiles.rows * (entries + 3)
    assert (tiles.shared_bytes - fixed) % 16 == 0
    if tiles.rows > 0:
        assert tiles.shared_bytes <= shared_bytes - 1024


@pytest.mark.parametrize(
    ("num_tokens", "shared_bytes", "rows", "num_ctas"),
    [
        (8192, 100 * 1024, 4, 2),
        (16384, 100 * 1024, 4, 2),
        (32768, 100 * 1024, 8, 2),
        (131072, 100 * 1024, 8, 2),
        (131072, 228 * 1024, 8, 2),
        (262144, 100 * 1024, 5, 2),
        (262144, 164 * 1024, 8, 2),
        (524288, 100 * 1024, 5, 1),
        (1048576, 100 * 1024, 2, 1),
        (1048576, 164 * 1024, 4, 1),
    ],
)
def test_select_tiles_sm80_by_length(native, num_tokens, shared_bytes, rows, num_ctas):
    """For 32 heads on 132 multiprocessors, which have room for this many CTAs."""
    sizes = (32, num_tokens, 128, False, 128, 128, 256)
    tiles, _ = native.select_tiles_sm80(*sizes, 132, shared_bytes)
    assert tiles.rows == rows
    assert min(2, shared_bytes // (tiles.shared_bytes + 1024)) == num_ctas


class SampledCase(NamedTuple):
    """Arguments of sampled_plan."""

    batch: int
    num_q_heads: int
    num_kv_heads: int
    num_perm_heads: int
    num_q: int
    num_kv: int
    head_dim: int
    block_size: int
    kv_block_size: int
    segment_size: int
    is_causal: bool
    num_samples: int
    shares_heads: bool
    num_sms: int

    @property
    def num_q_blocks(self):
        return -(-self.num_q // self.block_size)


@st.composite
def sampled_cases(draw):
    block_size, kv_block_size = (draw(st.sampled_from([32, 64, 128])) for _ in range(2))
    num_kv_heads = draw(st.integers(1, 3))
    num_q_heads = num_kv_heads * draw(st.integers(1, 5))
    num_perm_heads = draw(st.sampled_from([num_kv_heads, num_q_heads]))
    num_q = draw(st.integers(1, 2000))
    return SampledCase(
        draw(st.integers(1, 2)),
        num_q_heads,
        num_kv_heads,
        num_perm_heads,
        num_q,
        num_q + draw(st.integers(0, 2000)),
        draw(st.sampled_from(HEAD_DIMS)),
        block_size,
        kv_block_size,
        max(block_size, kv_block_size) * draw(st.integers(1, 8)),
        draw(st.booleans()),
        draw(st.integers(1, min(64, block_size))),
        num_perm_heads == num_kv_heads and draw(st.booleans()),
        draw(st.integers(1, 150)),
    )


def pairs_of(case, plan, unit_idx):
    """First head and query block of each pair of a unit, as unit_of and SampledUnit::pair
    (common/select_blocks/sampled/units.cuh) find them."""
    group, in_group = divmod(unit_idx, plan.units_per_perm * plan.heads_per_group)
    first_head = group * plan.heads_per_group
    num_heads = min(plan.heads_per_group, plan.num_perm_heads - first_head)
    from_longest, head = divmod(in_group, num_heads)
    b, hp = divmod(first_head + head, case.num_perm_heads)
    num_pairs = plan.stacks_per_unit * plan.pairs_per_stack
    first = (plan.units_per_perm - 1 - from_longest) * num_pairs
    heads_per_perm = case.num_q_heads // case.num_perm_heads
    heads_per_selection = heads_per_perm // plan.selections_per_perm
    pairs = []
    for idx in range(first, min(first + num_pairs, plan.pairs_per_perm)):
        block_idx, selection = divmod(idx, plan.selections_per_perm)
        hq = hp * heads_per_perm + selection * heads_per_selection
        pairs.append((b * case.num_q_heads + hq, block_idx))
    return pairs


@settings(deadline=None, max_examples=200)
@given(case=sampled_cases())
def test_sampled_rows_fill_a_stack(native, case):
    plan = native.sampled_plan(*case)
    assert plan.rows_per_pair in (1, 2, 4, 8, 16, 32, 64)
    assert plan.rows_per_pair / 2 < case.num_samples <= plan.rows_per_pair
    assert plan.pairs_per_stack * plan.rows_per_pair == native.stack_rows == 64
    # Every pair has a stack, every stack a unit, and none of either is empty.
    assert plan.stacks_per_perm * plan.pairs_per_stack - plan.pairs_per_perm >= 0
    assert (plan.stacks_per_perm - 1) * plan.pairs_per_stack < plan.pairs_per_perm
    assert plan.units_per_perm * plan.stacks_per_unit - plan.stacks_per_perm >= 0
    assert (plan.units_per_perm - 1) * plan.stacks_per_unit < plan.stacks_per_perm


@settings(deadline=None, max_examples=200)
@given(case=sampled_cases())
def test_many_stacks_make_units_of_many(native, case):
    plan = native.sampled_plan(*case)
    num_stacks = plan.stacks_per_perm * plan.num_perm_heads
    sizes = [num_stacks >= 2 * case.num_sms, num_stacks >= 6 * case.num_sms]
    assert plan.stacks_per_unit == native.stacks_per_unit[sum(sizes)]


@settings(deadline=None, max_examples=200)
@given(case=sampled_cases())
def test_few_stacks_share_their_own_keys_among_more_warps(native, case):
    """There are as many parts as leave room for all stacks at once, with four CTAs per
    multiprocessor."""
    plan = native.sampled_plan(*case)
    num_stacks = plan.stacks_per_perm * plan.num_perm_heads
    fits = [parts for parts in (2, 4) if parts * num_stacks <= 4 * case.num_sms]
    assert plan.key_parts == (max([1, *fits]) if case.head_dim <= 128 else 1)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    ("num_stacks", "key_parts", "stacks_per_unit"),
    [
        (1, 4, 1),
        (132, 4, 1),
        (133, 2, 1),
        (263, 2, 1),
        (264, 2, 2),
        (265, 1, 2),
        (791, 1, 2),
        (792, 1, 4),
    ],
)
def test_sampled_plan_by_number_of_stacks(native, num_stacks, key_parts, stacks_per_unit, head_dim):
    """On 132 multiprocessors. One query block per head is one stack."""
    heads = (num_stacks,) * 3
    case = SampledCase(1, *heads, 64, 600, head_dim, 64, 32, 256, True, 16, False, 132)
    plan = native.sampled_plan(*case)
    assert plan.stacks_per_perm * plan.num_perm_heads == num_stacks
    assert plan.key_parts == (key_parts if head_dim <= 128 else 1)
    assert plan.stacks_per_unit == stacks_per_unit


@pytest.mark.parametrize("family", ["sm90", "sm80"])
def test_the_sanitizer_reaches_every_sampled_kernel(native, family):
    """On 132 multiprocessors: launch_samples and launch_scores of select_blocks/sampled."""
    plan_of = native.sampled_plan if family == "sm90" else native.sampled_plan_sm80
    samples, scores = set(), set()
    for case, dtype in sanitize.cases():
        if case.score != "sampled":
            continue
        by_query_head = case.permute_per == "query_head"
        plan = plan_of(
            case.batch,
            case.num_q_heads,
            case.num_kv_heads,
            case.num_q_heads if by_query_head else case.num_kv_heads,
            case.num_queries,
            case.num_keys,
            case.head_dim,
            case.block_size,
            case.kv_block,
            case.segment_size,
            case.is_causal,
            case.num_samples,
            case.select_per == "kv_head",
            132,
        )
        assert plan.num_tiles > 0
        samples.add((dtype, case.head_dim, plan.key_parts))
        scores.add((dtype if family == "sm80" else None, case.head_dim, plan.stacks_per_unit))
    dtypes = (sanitize.BFLOAT16, sanitize.FLOAT16)
    narrow = [head_dim for head_dim in HEAD_DIMS if head_dim <= 128]
    wide = [head_dim for head_dim in HEAD_DIMS if head_dim > 128]
    assert samples == {*product(dtypes, narrow, (1, 2, 4)), *product(dtypes, wide, (1,))}
    if family == "sm90":  # which multiplies elements of one byte, whatever they were
        assert scores == set(product((None,), HEAD_DIMS, native.stacks_per_unit))
    else:
        few = native.stacks_per_unit[:2]
        kernels = {*product(dtypes, narrow, native.stacks_per_unit), *product(dtypes, wide, few)}
        assert scores == kernels


@settings(deadline=None, max_examples=200)
@given(case=sampled_cases())
def test_sampled_units_hold_every_query_block_once(native, case):
    plan = native.sampled_plan(*case)
    assert 1 <= plan.heads_per_group <= plan.num_perm_heads
    heads_per_perm = case.num_q_heads // case.num_perm_heads
    assert plan.selections_per_perm == (1 if case.shares_heads else heads_per_perm)
    found = []
    for unit_idx in range(plan.units_per_perm * plan.num_perm_heads):
        pairs = pairs_of(case, plan, unit_idx)
        assert pairs
        # One permutation, so that all stacks read the same keys.
        assert len({head // heads_per_perm for head, _ in pairs}) == 1
        # The first sees the fewest keys, the last the most.
        assert pairs == sorted(pairs, key=lambda pair: pair[1])
        found += pairs
    step = heads_per_perm // plan.selections_per_perm
    heads = range(0, case.batch * case.num_q_heads, step)
    assert sorted(found) == list(product(heads, range(case.num_q_blocks)))


@settings(deadline=None, max_examples=200)
@given(case=sampled_cases(), random=st.randoms())
def test_sampled_units_are_drawn_once(native, case, random):
    """As SampledLoader draws them: each CTA first takes its own unit, and then those from the
    counter."""
    plan = native.sampled_plan(*case)
    num_units = plan.units_per_perm * plan.num_perm_heads
    assert 0 < plan.num_ctas <= min(case.num_sms, num_units)
    drawn = list(range(plan.num_ctas))  # of each CTA that is at work
    counter = 0
    found = []
    while drawn:
        cta = random.randrange(len(drawn))
        if drawn[cta] < num_units:
            found.append(drawn[cta])
            drawn[cta] = plan.num_ctas + counter
            counter += 1
        else:
            del drawn[cta]
    assert sorted(found) == list(range(num_units))


@settings(deadline=None, max_examples=500)
@given(case=sampled_cases())
def test_sampled_tables_hold_what_units_see(native, case):
    plan = native.sampled_plan(*case)
    sizes = (case.block_size, case.kv_block_size, case.segment_size)
    blocks = [
        native.query_block(idx, case.num_q, case.num_kv, *sizes, case.is_causal)
        for idx in range(case.num_q_blocks)
    ]
    seen = [block.num_candidates * case.kv_block_size for block in blocks]
    assert seen == sorted(seen)
    assert native.sampled_keys == rounding.TILE_KEYS
    assert max(seen) <= plan.num_tiles * native.sampled_keys < max(seen) + native.sampled_keys
    # Candidates end with a sum of weights, so that no sum mixes candidates and other keys.
    assert not any(end % native.sum_keys for end in seen)


@settings(deadline=None, max_examples=200)
@given(case=sampled_cases())
def test_sampled_plan_of_sm80(native, case):
    """Two CTAs per multiprocessor, whose warps hold the queries of at most four stacks in
    registers. With 256 columns, one CTA holds two stacks. Operands are not copied."""
    is_wide = case.head_dim > 128
    plan = native.sampled_plan_sm80(*case)
    at_once = case.num_sms * (1 if is_wide else 2)
    num_stacks = plan.stacks_per_perm * plan.num_perm_heads
    wanted = native.stacks_per_unit[(num_stacks >= 2 * at_once) + (num_stacks >= 6 * at_once)]
    assert plan.stacks_per_unit == min(wanted, 2 if is_wide else 4)
    assert plan.units_per_perm == math.ceil(plan.stacks_per_perm / plan.stacks_per_unit)
    assert plan.num_ctas == min(at_once, plan.units_per_perm * plan.num_perm_heads)
    key_tiles, stacks, rows, tables, counter, end = native.sampled_workspace_sm80(plan)
    assert key_tiles == stacks == rows == 0
    assert tables >= num_stacks * native.stack_rows * native.sampled_row_bytes
    assert counter - tables >= plan.num_ctas * plan.stacks_per_unit * native.table_bytes(plan)
    tables_in_docs = 1024 * at_once * plan.stacks_per_unit * math.ceil(case.num_kv / 256)
    assert counter < end <= 1024 * num_stacks + tables_in_docs + 640  # docs/ops.md, Memory


@pytest.mark.parametrize(
    "empty", ["batch", "num_q", "num_kv"], ids=["no batch", "no queries", "no keys"]
)
def test_sampled_plan_of_nothing(native, empty):
    sizes = {"batch": 2, "num_q": 64, "num_kv": 64} | {empty: 0}
    num_q = min(sizes["num_q"], sizes["num_kv"])
    shape = (sizes["batch"], 4, 2, 2, num_q, sizes["num_kv"], 64)
    plan = native.sampled_plan(*shape, 32, 32, 64, True, 8, False, 132)
    assert plan.num_ctas == 0
    assert plan.heads_per_group >= 1


def documented_parts(case, plan):
    """docs/ops.md, Memory: the keys, the sampled queries, the tables."""
    perms = case.batch * case.num_perm_heads
    tiles = math.ceil(case.num_kv / 128)
    rows = next(2**i for i in range(7) if 2**i >= case.num_samples)
    selections = 1 if case.shares_heads else case.num_q_heads // case.num_perm_heads
    stacks = perms * math.ceil(case.num_q_blocks * selections * rows / 64)
    warpgroups = 2 if stacks < 6 * case.num_sms else 4
    return [
        perms * tiles * (128 * case.head_dim + 16),
        64 * stacks * (case.head_dim + 16),
        2048 * case.num_sms * warpgroups * math.ceil(tiles / 2),
    ]


@settings(deadline=None, max_examples=300)
@given(case=sampled_cases())
def test_sampled_workspace_holds_its_parts(native, case):
    plan = native.sampled_plan(*case)
    *begins, end = native.sampled_workspace(plan)
    stacks = plan.num_perm_heads * plan.stacks_per_perm
    tables = plan.num_ctas * native.sampled_tables * plan.stacks_per_unit
    sizes = [
        plan.num_perm_heads * plan.num_tiles * native.key_tile_bytes(case.head_dim),
        stacks * native.stack_bytes(case.head_dim),
        stacks * native.stack_rows * native.sampled_row_bytes,
        tables * native.table_bytes(plan),
        4,
    ]
    assert begins[0] == 0
    for begin, size, following in zip(begins, sizes, [*begins[1:], end], strict=True):
        assert begin % 128 == 0
        assert 0 <= following - (begin + size) < 128
    assert native.sampled_row_bytes == 16  # one load
    # Two bytes for every 32 keys of each row; those of two tiles are read at once.
    num_reads = math.ceil(plan.num_tiles / 2)
    assert native.table_bytes(plan) == 2 * num_reads * native.stack_rows * 256 // 32
    assert native.tiles_per_read * native.sampled_keys == native.sums_per_read * native.sum_keys
    assert 2 * native.sums_per_read == 16
    # Vectors and bulk copies of 16 bytes reach every tile, stack and table.
    assert native.key_tile_bytes(case.head_dim) % 16 == 0
    assert native.stack_bytes(case.head_dim) % (16 * 128) == 0
    assert native.table_bytes(plan) % 16 == 0
    assert end <= sum(documented_parts(case, plan)) + 640


def test_sampled_workspace_in_the_docs(native):
    text = " ".join((ROOT / "docs" / "ops.md").read_text().split())
    ends = []
    for num_tokens in (131072, 1048576):
        shape = (1, 32, 8, 8, num_tokens, num_tokens, 128)
        case = SampledCase(*shape, 128, 32, 256, True, 16, False, 132)
        plan = native.sampled_plan(*case)
        ends.append(f"{native.sampled_workspace(plan)[-1] / 2**30:.2f}")
        parts = ", ".join(f"{part / 2**30:.2f}" for part in documented_parts(case, plan))
        assert f"{parts} GiB at {num_tokens} tokens" in text
    assert f"{ends[0]} GiB at 131072 tokens and {ends[1]} GiB at 1048576" in text


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_sampled_tiles_fit_in_shared_memory(native, head_dim):
    """SampledTraits::Shared, sm90/select_blocks/sampled/unit_walk.cuh."""
    stages = native.sampled_key_stages(head_dim)
    assert stages >= 2  # the next tile's load has to overlap with this one's product
    assert native.key_tile_bytes(head_dim) == 128 * head_dim + 16
    stage = math.ceil(native.key_tile_bytes(head_dim) / native.swizzle_bytes) * native.swizzle_bytes
    for num_stacks in native.stacks_per_unit:
        assert native.sum_warpgroups % num_stacks == 0  # as many warpgroups for each of them
        queries = num_stacks * native.stack_bytes(head_dim)
        totals = 4 * native.sum_warpgroups * native.stack_rows
        weights = 4 * native.sampled_tables * num_stacks * native.stack_rows
        drawn = 4 * (native.drawn_units + 1)  # up to the alignment of a barrier
        barriers = 8 * (2 * stages + 2 * native.drawn_units + native.sampled_tables)
        used = queries + stages * stage + totals + weights + drawn + barriers
        # The struct ends at a multiple of its alignment, and starts at one.
        used = math.ceil(used / native.swizzle_bytes) * native.swizzle_bytes
        assert used + native.swizzle_bytes <= native.shared_bytes_per_cta


@settings(deadline=None, max_examples=300)
@given(
    num_q=st.integers(1, 700),
    num_earlier=st.integers(0, 700),
    block_size=st.sampled_from([32, 64, 128]),
    kv_block_size=st.sampled_from([32, 64, 128]),
    segments=st.integers(1, 4),
    is_causal=st.booleans(),
    window=st.one_of(st.integers(0, 800), st.just(2**40)),
    dense_tail=st.one_of(st.integers(0, 800), st.just(2**40)),
)
def test_scored_blocks_are_those_not_visited_anyhow(
    native, num_q, num_earlier, block_size, kv_block_size, segments, is_causal, window, dense_tail
):
    num_kv, segment_size = num_q + num_earlier, 128 * segments
    layout = ref.Layout(num_q, num_kv, block_size, kv_block_size, segment_size, is_causal)
    candidate, _ = ref.block_roles(layout)
    always = ref.always_visited(layout, window, dense_tail)
    in_tail = ref.always_visited(layout, -(2**40), dense_tail).all(-1)
    for idx in range(len(candidate)):
        scored, is_in_tail = native.scored_blocks(idx, *layout, window, dense_tail)
        expected = candidate[idx] & ~always[idx]
        assert expected.nonzero().flatten().tolist() == list(range(scored))
        assert is_in_tail == in_tail[idx]


def test_capability(native, monkeypatch):
    monkeypatch.delenv("PBS_GPU_FAMILY", raising=False)
    for major, minor in product(range(5, 13), range(10)):
        error = native.capability_error(10 * major + minor, "")
        assert (error == "") == runs_on((major, minor))
        if error:
            assert error.startswith(
                f"q must be on a GPU of compute capability {gpu_capabilities()}"
            )
            assert error.endswith(f"got {major}.{minor}")


@pytest.mark.parametrize(
    ("capability", "wanted", "families"),
    [(90, "sm80", None), (90, "sm90", None), (80, "sm90", "sm80"), (90, "sm70", "sm90 or sm80")],
)
def test_a_family_by_name(native, capability, wanted, families):
    error = native.capability_error(capability, wanted)
    if families is None:
        assert error == ""
        return
    assert error == (
        f"PBS_GPU_FAMILY must be empty or {families} on a GPU of compute capability "
        f"{capability / 10}, got {wanted}"
    )


@pytest.mark.parametrize(
    "driver, toolkit, found",
    [
        (12080, 13000, "one for CUDA 12.8"),
        (11040, 12090, "one for CUDA 11.4"),
        (0, 12090, "none"),
        (12000, 12090, None),
        (13000, 12090, None),
        (13000, 13020, None),
    ],
)
def test_driver(native, driver, toolkit, found):
    """A driver runs what toolkits of its own major version compiled, and of older ones."""
    error = native.driver_error(driver, toolkit)
    rule = f"the NVIDIA driver must be one for CUDA {toolkit // 1000}.0 or newer, got {found}: "
    assert error.startswith(rule) if found else error == ""


def test_exp2(native):
    points = torch.linspace(-126, 0, 5001).tolist()
    worst = max(abs(native.exp2(x) / 2.0**x - 1) for x in points)
    assert worst < 1.5e-7
    assert native.exp2(0.0) == 1.0
    assert native.exp2(-126.5) == native.exp2(-1e30) == native.exp2(-math.inf) == 0.0
    assert math.isnan(native.exp2(math.nan))


def test_every_half_widens_like_torch(native):
    words = torch.arange(2**16, dtype=torch.int32)
    expected = words.to(torch.uint16).view(torch.float16).float()
    for word, want in zip(words.tolist(), expected.tolist(), strict=True):
        got = native.half_to_float(word)
        assert got == want or (math.isnan(got) and math.isnan(want))


def test_rounding_like_torch(native):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20_000,), generator=generator, dtype=torch.int64)
    random_bits = bits.to(torch.int32).view(torch.float32)
    around_halves = torch.randn(20_000, generator=generator) * 2.0 ** torch.randint(
        -26, 18, (20_000,), generator=generator
    )
    edges = torch.tensor([0.0, -0.0, 65504.0, 65519.0, 65520.0, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25])
    ties = torch.arange(2048, 4096, dtype=torch.float32) + 0.5
    values = torch.cat([random_bits, around_halves, edges, -edges, ties, ties.neg()])
    for dtype, convert in (
        (torch.float16, native.float_to_half),
        (torch.bfloat16, native.float_to_bfloat16),
    ):
        expected = values.to(dtype)
        got = torch.tensor([convert(x) for x in values.tolist()], dtype=torch.int32)
        got = got.to(torch.uint16).view(dtype)
        is_nan = expected.isnan()
        assert torch.equal(got.isnan(), is_nan)
        assert torch.equal(got[~is_nan].view(torch.int16), expected[~is_nan].view(torch.int16))
