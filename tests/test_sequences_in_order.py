"""Pages that attention_paged_ sorts, on the CPU: the outputs, and the pages afterwards."""

import itertools

import pytest
import reference as ref
import reference_sequences as ref_seq
import torch
import torch.nn.functional as F
from cases import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import LAYOUTS, Pages, cu_seqlens
from sequence_cases import (
    IN_ORDER,
    PLANS,
    SHARED,
    SMALL,
    Ragged,
    assert_same,
    assert_sequences,
    dense,
    draw,
    options_of,
    pages_for,
    settled_chunks,
    steps,
)
from tolerances import assert_within_twice, sdpa_on

ops = torch.ops.pbs
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def run_in_order(pages, step, options):
    """The result of attention_paged_ in an output that held NaN."""
    q = step.q.to(pages.k.device)
    out = torch.full_like(q, torch.nan)
    lengths = step.cu_seqlens_q, step.seq_lens, pages.block_table
    assert ops.attention_paged_(q, pages.k, pages.v, out, *lengths, **options) is None
    return out


@every_dtype
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        *itertools.product(("small", "shared", "sorted"), list(PLANS)[:-1]),
        *itertools.product(("balanced", "fast"), ("at once", "long")),
    ],
)
def test_in_order_against_float64(name, plan, dtype):
    """Checks the output of every call, and every bit of the pages after it."""
    options = options_of(IN_ORDER[name])
    tensors = settled_chunks(name, plan, dtype)
    pages = pages_for(IN_ORDER[name], PLANS[plan], dtype, 256, layout="hnd")
    exact = pages.clone()
    for step in steps(PLANS[plan], tensors, pages, exact):
        lengths = step.cu_seqlens_q, step.seq_lens
        sequences = ref_seq.attention_paged_(
            step.q, exact.k, exact.v, *lengths, exact.table, **options
        )
        out = run_in_order(pages, step, options)
        assert_same([pages.k, pages.v], [exact.k, exact.v])
        assert_sequences(out, sequences)


def assert_chunks_are_dense(case, plan, dtype, page_size, layout, *, seed=0, device="cpu"):
    """Checks chunks at threshold 1. After each call, complete segments hold their keys in another
    order, and everything else in the caches is unchanged."""
    options = options_of(case._replace(threshold=1.0))
    lengths = [(sum(chunks),) * 2 for chunks in zip(*plan, strict=True)]
    tensors = draw(case, lengths, dtype, seed)
    pages = pages_for(case, plan, dtype, page_size, layout=layout, seed=seed).clone(device)
    for step in steps(plan, tensors, pages):
        before = pages.clone(device)
        out = run_in_order(pages, step, options)
        lasts = step.seq_lens.tolist()
        sequences = [
            dense(q[first:last], k[:last], v[:last])
            for q, k, v, first, last in zip(*tensors, step.firsts, lasts, strict=True)
            if last > first
        ]
        assert_sequences(out, sequences)
        for n, (first, last) in enumerate(zip(step.firsts, lasts, strict=True)):
            if last > first:
                assert_ordered(case, before, pages, n, first, last)
        assert_same([pages.k, pages.v], [before.k, before.v])


def assert_ordered(case, before, pages, sequence, first, last):
    """Segments that a chunk completed are permuted, K and V in the same way. Copies them to
    `before`, which is then equal to `pages`."""
    size = case.segment_size
    for begin in range(first // size * size, last // size * size, size):
        old, new = (x.read(sequence, begin, begin + size) for x in (before, pages))
        assert_permuted(old, new)
        if begin == 0:
            assert_same([x[0] for x in new], [x[0] for x in old])
        before.write(sequence, begin, *new)


def assert_permuted(old, new):
    """Rows (tokens, heads, head_dim) of keys and values have another order per head, and stay
    paired."""
    for head in range(old[0].shape[1]):
        pairs = (sorted(torch.cat([x[:, head] for x in kv], -1).tolist()) for kv in (old, new))
        assert next(pairs) == next(pairs)


@every_dtype
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("case", "page_size", "layout"),
    [(SMALL, 64, "apart"), (SMALL, 512, "nhd"), (SHARED, 128, "hnd"), (SHARED, 1024, "apart")],
    ids=["64", "512", "shared-128", "shared-1024"],
)
def test_chunks_at_threshold_1_are_dense(case, page_size, layout, plan, dtype):
    assert_chunks_are_dense(case, PLANS[plan], dtype, page_size, layout)


@st.composite
def plans(draw):
    num_sequences = draw(st.integers(1, 3))
    chunk = st.sampled_from([0, 1, 31, 32, 63, 64, 65, 100, 128, 150])
    calls = st.lists(st.tuples(*[chunk] * num_sequences), min_size=1, max_size=5)
    return draw(calls.filter(lambda plan: any(map(any, plan))))


# With enough random inputs, some exceed any tolerance, so the inputs are always the same.
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    plan=plans(),
    seed=st.integers(0, 2**31 - 1),
    dtype=st.sampled_from(DTYPES),
    page_size=st.sampled_from([64, 128, 256]),
    layout=st.sampled_from(LAYOUTS),
    num_heavy=st.sampled_from([None, 0, 1, 8, 64]),
    num_samples=st.integers(1, 32),
)
def test_chunks_of_any_plan(plan, seed, dtype, page_size, layout, num_heavy, num_samples):
    case = SMALL._replace(num_heavy=num_heavy, num_samples=num_samples)
    assert_chunks_are_dense(case, plan, dtype, page_size, layout, seed=seed)


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plan", ["at once", "segments", "inside segments"])
def test_keys_and_values_may_be_given(plan, layout, dtype):
    """The results equal those from the pages bit for bit. Chunks that begin inside a segment read
    the pages."""
    case, options = IN_ORDER["small"], options_of(IN_ORDER["small"])
    lengths = [(sum(chunks),) * 2 for chunks in zip(*PLANS[plan], strict=True)]
    tensors = draw(case, lengths, dtype)
    pages = pages_for(case, PLANS[plan], dtype, 256, layout=layout)
    given = pages.clone()
    for step in steps(PLANS[plan], tensors, pages, given):
        spans = list(zip(step.firsts, step.seq_lens.tolist(), strict=True))
        k, v = (
            torch.cat([x[begin:end] for x, (begin, end) in zip(xs, spans, strict=True)])
            for xs in (tensors.k, tensors.v)
        )
        out, other = run_in_order(pages, step, options), torch.full_like(step.q, torch.nan)
        lengths = step.cu_seqlens_q, step.seq_lens, given.block_table
        assert (
            ops.attention_paged_(step.q, given.k, given.v, other, *lengths, k, v, **options) is None
        )
        assert_same([out, pages.k, pages.v], [other, given.k, given.v])


def test_keys_that_are_given_are_read():
    case, options = IN_ORDER["small"], options_of(IN_ORDER["small"])
    tensors = draw(case, [(300, 300)], torch.float32)
    pages = pages_for(case, ((300,),), torch.float32, 256)
    (step,) = steps(((300,),), tensors, pages)
    lengths = step.cu_seqlens_q, step.seq_lens, pages.block_table
    nothing = torch.full_like(tensors.k[0], torch.nan)
    out = torch.zeros_like(step.q)
    ops.attention_paged_(step.q, pages.k, pages.v, out, *lengths, nothing, nothing, **options)
    assert out.isnan().all()


def test_the_order_is_that_of_importance():
    """A key that all queries look for comes directly after token 0, and keeps its own value."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(128, heads, 64, generator=generator) for heads in (4, 2, 2))
    for head in range(2):
        k[[50, 90], head] = 3 * q[-32:, 2 * head : 2 * head + 2].mean((0, 1)).sign()
    pages = Pages([128], 2, 64, torch.float32, 64)
    pages.write(0, 0, k, v)
    out, cu, lengths = torch.empty_like(q), cu_seqlens([128]), torch.tensor([128])
    options = options_of(SMALL._replace(num_heavy=2))
    ops.attention_paged_(q, pages.k, pages.v, out, cu, lengths, pages.table, **options)
    ordered_k, ordered_v = pages.read(0, 0, 128)
    assert torch.equal(ordered_k[:2], k[[0, 50]])
    assert torch.equal(ordered_v[:2], v[[0, 50]])
    assert (ordered_k[64:66] == k[90]).all(-1).any()


@every_dtype
def test_decoding_over_ordered_pages(dtype):
    """torch's dense attention over the pages equals that over the keys in their original order."""
    plan = PLANS["inside segments"]
    tensors = settled_chunks("small", "inside segments", dtype)
    pages = pages_for(SMALL, plan, dtype, 128)
    for step in steps(plan, tensors, pages):
        run_in_order(pages, step, options_of(SMALL))
    for n, last in enumerate(step.seq_lens.tolist()):
        exact = dense(tensors.q[n][-1:], tensors.k[n], tensors.v[n])
        k, v = map(ref_seq.as_batch, pages.read(n, 0, last))
        assert not torch.equal(k, exact.k)
        out = sdpa_on(exact.q, k, v, exact.visited)
        in_torch = sdpa_on(exact.q, exact.k, exact.v, exact.visited)
        assert_within_twice(out, in_torch, exact.out, "out")


def test_sequences_that_share_pages():
    """The pages of a prefix that one sequence has completed serve another one without change."""
    options = options_of(SMALL)
    (q, k, v) = draw(SMALL, [(300, 300), (290, 290)], torch.float32)
    k[1][:128], v[1][:128] = k[0][:128], v[0][:128]
    tensors = Ragged(q, k, v)
    pages = pages_for(SMALL, ((300, 290),), torch.float32, 64)
    own_table = pages.table.clone()
    for step in steps(((128, 0),), tensors, pages):
        run_in_order(pages, step, options)
    pages.table[1, :2] = pages.table[0, :2]
    before = pages.clone()
    for n in range(2):
        pages.write(n, 128, k[n][128:], v[n][128:])
    rows = cu_seqlens([172, 162]), torch.tensor([300, 290])
    queries = torch.cat([q[0][128:], q[1][128:]])
    alone = pages.clone()
    out = torch.full_like(queries, torch.nan)
    ops.attention_paged_(queries, pages.k, pages.v, out, *rows, pages.table, **options)
    assert_same(pages.read(1, 0, 128), before.read(0, 0, 128))

    # The second sequence has its own pages.
    alone.table = own_table
    alone.write(1, 0, *before.read(0, 0, 128))
    found = torch.full_like(queries[172:], torch.nan)
    lengths = cu_seqlens([162]), rows[1][1:], alone.table[1:]
    ops.attention_paged_(queries[172:], alone.k, alone.v, found, *lengths, **options)
    assert_same([found], [out[172:]])
    assert_same(alone.read(1, 0, 290), pages.read(1, 0, 290))


def test_rows_between_those_of_the_output_stay():
    tensors = settled_chunks("small", "at once", torch.float32)
    pages = pages_for(SMALL, PLANS["at once"], torch.float32, 64)
    (step,) = steps(PLANS["at once"], tensors, pages)
    other, options = pages.clone(), options_of(SMALL)
    want = run_in_order(pages, step, options)
    larger = torch.full((len(want) + 2, 6, 72), 7.0)
    out = larger[1:-1, 1:-1, :64]
    lengths = step.cu_seqlens_q, step.seq_lens, other.table
    ops.attention_paged_(step.q, other.k, other.v, out, *lengths, **options)
    assert_same([out, other.k, other.v], [want, pages.k, pages.v])
    out.fill_(7.0)
    assert (larger == 7).all()


def test_a_chunk_in_order_is_attention_where_it_is_the_whole_prompt():
    """The results are equal bit for bit if token 0 is the most important key of its segment."""
    tensors = draw(SMALL, [(300, 300)], torch.bfloat16)
    k = tensors.k[0]
    k[0] = 4 * F.normalize(tensors.q[0][-32:].float().mean((0, 1)), dim=0).to(k) * 8
    pages = pages_for(SMALL, ((300,),), torch.bfloat16, 64)
    (step,) = steps(((300,),), tensors, pages)
    out = run_in_order(pages, step, options_of(SMALL))
    assert_same([out], [ops.attention_varlen(*tensors.packed, **options_of(SMALL))])
    perm = ref.sort_segments(
        ops.score_keys(*map(ref_seq.as_batch, (tensors.q[0], k)), **SMALL.kwargs("score_keys")),
        **SMALL.kwargs("sort_segments"),
    )
    assert (perm[:, :, 0] == 0).all()
