"""Properties that hold for every input, tested by hypothesis on the CPU ops."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import reference as ref
import torch
from cases import DTYPES, STRIDES, Case, clustered_qkv, run_stages, with_strides
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_attends, assert_output, assert_selects

import pbs_attn  # noqa: F401  (registers the ops)

ops = torch.ops.pbs
TESTS = Path(__file__).parent
seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from(DTYPES)


@st.composite
def cases(draw, **fixed):
    block_size = draw(st.sampled_from([32, 64]))
    kv_block_size = draw(st.sampled_from([None, 32, 64, 128]))
    segment_size = max(block_size, kv_block_size or 0) * draw(st.integers(1, 2))
    num_keys = draw(st.integers(1, min(3 * segment_size + 40, 400)))
    num_kv_heads = draw(st.integers(1, 2))
    score, mass = draw(
        st.sampled_from([("mean", "earlier"), ("mean", "causal"), ("sampled", "block")])
    )
    permute_per = draw(st.sampled_from(["kv_head", "query_head"]))
    can_share = score == "sampled" and permute_per == "kv_head"
    case = Case(
        num_queries=draw(st.one_of(st.just(num_keys), st.integers(1, num_keys))),
        num_keys=num_keys,
        num_q_heads=num_kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=num_kv_heads,
        batch=draw(st.integers(1, 2)),
        block_size=block_size,
        kv_block_size=kv_block_size,
        segment_size=segment_size,
        is_causal=draw(st.booleans()),
        permute_per=permute_per,
        num_heavy=draw(st.one_of(st.none(), st.integers(1, segment_size))),
        mass=mass,
        score=score,
        num_samples=draw(st.integers(1, 32)),
        select_per=draw(st.sampled_from(["query_head", "kv_head"][: 1 + can_share])),
        window=draw(st.sampled_from([0, 0, 1, 64, 10**6])),
        dense_tail=draw(st.sampled_from([0, 0, 1, 64, 10**6])),
        threshold=Case.threshold_for(mass, draw(st.floats(0.05, 0.999))),
    )
    return case._replace(**fixed)


def examples(count):
    """`given` with the arguments' strategies, `count` examples, and no limit on their time."""

    def decorate(**strategies):
        def wrap(test):
            return settings(max_examples=count, deadline=None)(given(**strategies)(test))

        return wrap

    return decorate


few, some = examples(25), examples(60)


def random_perms(case, seed, heads=None):
    noise = torch.rand(
        case.batch,
        heads or case.num_kv_heads,
        case.num_keys,
        generator=torch.Generator().manual_seed(seed),
    )
    return ref.sort_segments(noise, segment_size=case.segment_size).int()


def random_mask(case, seed, density=0.5):
    shape = (case.batch, case.num_q_heads, *ref.block_roles(case.layout)[0].shape)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def attend_with(case, q, k, v, perm, words):
    k_perm, v_perm, _ = ops.permute_kv(k, v, perm, **case.kwargs("permute_kv"))
    return ops.attend(q, k, v, k_perm, v_perm, words, **case.kwargs("attend"))


def assert_same(first, second):
    """Equal bit for bit, with equal shapes and dtypes."""
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@some(case=cases(), seed=seeds, levels=st.sampled_from([1, 3, 10, 2**20]))
def test_permutation_stays_inside_each_segment(case, seed, levels):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (2, 3, case.num_keys), generator=generator).float()
    perm = ops.sort_segments(scores, **case.kwargs("sort_segments")).long()
    num_sorted = case.num_keys // case.segment_size * case.segment_size
    assert (perm[..., num_sorted:] == torch.arange(num_sorted, case.num_keys)).all()

    segments = perm[..., :num_sorted].unflatten(-1, (-1, case.segment_size))
    first_of_segment = torch.arange(0, num_sorted, case.segment_size)[:, None]
    in_order = (first_of_segment + torch.arange(case.segment_size)).expand_as(segments)
    assert torch.equal(segments.sort(-1).values, in_order)

    ranked = scores.gather(-1, perm)[..., :num_sorted].unflatten(-1, (-1, case.segment_size))
    if case.num_heavy is None:
        step, index_step = ranked.diff(dim=-1), segments.diff(dim=-1)
        assert ((step < 0) | ((step == 0) & (index_step > 0))).all()
    else:
        heavy, light = segments[..., : case.num_heavy], segments[..., case.num_heavy :]
        assert (heavy.diff(dim=-1) > 0).all()
        assert (light.diff(dim=-1) > 0).all()
        heavy, light = ranked[..., : case.num_heavy], ranked[..., case.num_heavy :]
        if light.numel():
            assert (heavy.amin(-1) >= light.amax(-1)).all()


@some(case=cases(), seed=seeds)
def test_selection_follows_its_rule(case, seed):
    q, k, v = clustered_qkv(case, torch.float32, seed)
    stages = run_stages(case, q, k, v)
    candidate, _ = ref.block_roles(case.layout)
    mask = ref.unpack_mask(stages.block_mask, candidate.shape[-1])
    masses = ref.masses_of(case, q, k, stages.k_mean, stages.perm)
    sink = ref.sink_block(stages.perm, stages.k_mean, case.num_q_heads, case.kv_block)
    assert_selects(mask, masses, candidate, sink, case)
    assert torch.equal(stages.counts.long(), mask.sum(-1))


@few(case=cases(), seed=seeds, higher=st.floats(0.05, 0.999))
def test_a_higher_threshold_only_adds_blocks(case, seed, higher):
    q, k, v = clustered_qkv(case, torch.float32, seed)
    # For thresholds on a sum. A higher threshold for single blocks removes blocks.
    thresholds = sorted(
        [case.threshold, Case.threshold_for(case.mass, higher)], reverse=case.mass == "block"
    )
    fewer, more = (
        run_stages(case._replace(threshold=threshold), q, k, v).block_mask
        for threshold in thresholds
    )
    assert torch.equal(fewer & more, fewer)


@few(case=cases(threshold=1.0), seed=seeds, dtype=dtypes)
def test_threshold_1_is_dense_attention(case, seed, dtype):
    q, k, v = clustered_qkv(case, dtype, seed)
    out = ops.attention(q, k, v, **case.kwargs("attention"))
    visible = torch.ones(case.num_queries, case.num_keys, dtype=torch.bool)
    if case.is_causal:
        visible = visible.tril(case.num_keys - case.num_queries)
    visible = visible.expand(case.batch, case.num_q_heads, -1, -1)
    exact, _ = ref.masked_attention(q, k, v, visible)
    assert_output(out, q, k, v, visible, exact)


@few(case=cases(), seed=seeds, dtype=dtypes)
def test_permuting_changes_nothing_when_every_block_is_visited(case, seed, dtype):
    """Lemma 3.1, with permutations that are unrelated to importance."""
    q, k, v = clustered_qkv(case, dtype, seed)
    every = ref.pack_mask(random_mask(case, seed, density=2))
    visited = ref.visited_keys(random_perms(case, seed), random_mask(case, 0, 2), case.layout)
    exact = ref.masked_attention(q, k, v, visited)
    for heads in (case.num_kv_heads, case.num_q_heads):
        out, lse = attend_with(case, q, k, v, random_perms(case, seed, heads), every)
        assert_attends(out, lse, q, k, v, visited, *exact)


@few(case=cases(), seed=seeds, dtype=dtypes)
def test_order_inside_a_block_changes_nothing(case, seed, dtype):
    """A partial visited set, held fixed while the rows of each key block are shuffled."""
    q, k, v = clustered_qkv(case, dtype, seed)
    mask, perm = random_mask(case, seed), random_perms(case, seed)
    shuffle = random_perms(case._replace(segment_size=case.kv_block), seed + 1).long()
    num_sorted = case.num_keys // case.segment_size * case.segment_size
    shuffle[..., num_sorted:] = torch.arange(num_sorted, case.num_keys)
    shuffled = perm.gather(-1, shuffle)
    visited = ref.visited_keys(perm, mask, case.layout)
    assert torch.equal(visited, ref.visited_keys(shuffled, mask, case.layout))
    exact = ref.masked_attention(q, k, v, visited)
    for order in (perm, shuffled):
        out, lse = attend_with(case, q, k, v, order, ref.pack_mask(mask))
        assert_attends(out, lse, q, k, v, visited, *exact)


@some(case=cases(), seed=seeds, dtype=dtypes, strides=st.permutations(STRIDES))
def test_strides_change_no_bit(case, seed, dtype, strides):
    """Each tensor has its own strides."""
    q, k, v = clustered_qkv(case, dtype, seed)
    plain = run_stages(case, q, k, v)
    q, k, v = (with_strides(x, kind) for x, kind in zip((q, k, v), strides, strict=True))
    assert_same(plain, run_stages(case, q, k, v))
    k_perm, v_perm = with_strides(plain.k_perm, strides[1]), with_strides(plain.v_perm, strides[0])
    attended = ops.attend(q, k, v, k_perm, v_perm, plain.block_mask, **case.kwargs("attend"))
    assert_same(attended, (plain.out, plain.lse))


@few(case=cases(), seed=seeds, dtype=dtypes)
def test_one_tensor_as_several_heads_changes_no_bit(case, seed, dtype):
    """A stride of 0, as `expand` gives it, reads the same as copies."""
    q, k, v = clustered_qkv(case, dtype, seed)
    shape = (case.batch, case.num_kv_heads, -1, -1)
    k, v = (x[:1, :1].expand(shape) for x in (k, v))
    assert_same(run_stages(case, q, k, v), run_stages(case, q, k.contiguous(), v.contiguous()))


@few(case=cases(batch=3), seed=seeds, dtype=dtypes)
def test_batch_neighbours_change_no_bit(case, seed, dtype):
    q, k, v = clustered_qkv(case, dtype, seed)
    together = run_stages(case, q, k, v)
    for b in range(3):
        alone = run_stages(case, *(x[b : b + 1] for x in (q, k, v)))
        assert_same(alone, (x[b : b + 1] for x in together))


@few(case=cases(num_q_heads=6, num_kv_heads=2), seed=seeds, dtype=dtypes)
def test_other_groups_of_heads_change_no_bit(case, seed, dtype):
    q, k, v = clustered_qkv(case, dtype, seed)
    together = run_stages(case, q, k, v)
    alone = run_stages(case, q[:, 3:], k[:, 1:], v[:, 1:])
    for x, y in zip(alone, together, strict=True):
        assert_same([x], [y[:, y.shape[1] // 2 :]])


@few(case=cases(), seed=seeds, dtype=dtypes)
def test_the_number_of_threads_changes_no_bit(case, seed, dtype):
    q, k, v = clustered_qkv(case, dtype, seed)
    num_threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_stages(case, q, k, v))
    finally:
        torch.set_num_threads(num_threads)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@some(case=cases(is_causal=True), seed=seeds, dtype=dtypes, data=st.data())
def test_a_later_token_never_influences_an_earlier_row(case, seed, dtype, data):
    """With a fixed permutation and mask, rows before token t keep every bit when K and V change
    from t on. (The selection itself depends on the last queries, so it is not part of this
    test.)"""
    first_position = case.num_keys - case.num_queries
    changed = data.draw(st.integers(first_position, case.num_keys - 1), label="first changed token")
    q, k, v = clustered_qkv(case, dtype, seed)
    perm, words = random_perms(case, seed), ref.pack_mask(random_mask(case, seed))
    num_earlier = changed - first_position
    group = case.num_q_heads // case.num_kv_heads
    before = attend_with(case, q, k, v, perm, words)
    k, v = k.clone(), v.clone()
    k[:, :, changed:] = 30 * q[:, ::group, num_earlier : num_earlier + 1]
    v[:, :, changed:] = 9000
    after = attend_with(case, q, k, v, perm, words)
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[:, :, :num_earlier], y[:, :, :num_earlier])
    assert (after[0][:, ::group, num_earlier] > 8000).all(), "its own row must see the new token"


@few(case=cases(), seed=seeds, dtype=dtypes)
def test_bits_that_are_no_candidates_are_ignored(case, seed, dtype):
    q, k, v = clustered_qkv(case, dtype, seed)
    candidate, _ = ref.block_roles(case.layout)
    mask, perm = random_mask(case, seed), random_perms(case, seed)
    clean = ref.pack_mask(mask & candidate)
    unused_bits = ~ref.pack_mask(torch.ones_like(mask))
    noisy = ref.pack_mask(mask | ~candidate) | unused_bits
    assert_same(attend_with(case, q, k, v, perm, clean), attend_with(case, q, k, v, perm, noisy))


@few(case=cases(), seed=seeds, dtype=dtypes)
def test_attention_is_its_five_stages_bit_for_bit(case, seed, dtype):
    q, k, v = clustered_qkv(case, dtype, seed)
    out = ops.attention(q, k, v, **case.kwargs("attention"))
    assert_same([out], [run_stages(case, q, k, v).out])


@few(case=cases(), seed=seeds, dtype=dtypes)
def test_stages_give_the_same_bits_twice(case, seed, dtype):
    q, k, v = clustered_qkv(case, dtype, seed)
    assert_same(run_stages(case, q, k, v), run_stages(case, q, k, v))


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_narrower_instruction_sets(capability):
    """The kernels for CPUs with shorter vectors, on lengths that leave remainders."""
    lengths = "200of331 or 331of331 or 333of333 or 7of7"
    pytest_quietly = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*pytest_quietly, TESTS / "test_stages.py", "-k", lengths],
        env={**os.environ, "PBS_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
