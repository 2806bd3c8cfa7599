"""The operators of sequences on a GPU: against `attention` of each sequence, against the stages on
pages that torch has gathered, and against dense attention in float64."""

import pytest
import reference as ref
import reference_sequences as ref_seq
import torch
from cases import Case
from pages import LAYOUTS, Pages, cu_seqlens
from sequence_cases import (
    IN_ORDER,
    PLANS,
    SETTINGS,
    SHARED,
    SMALL,
    Ragged,
    assert_same,
    assert_sequences,
    draw,
    in_pages,
    lengths_for,
    options_of,
    pages_for,
    steps,
)
from test_sequences_in_order import assert_chunks_are_dense, run_in_order

import pbs_attn
from pbs_attn.ops import HEAD_DIMS

pytestmark = pytest.mark.gpu
ops = torch.ops.pbs
DEVICE = "cuda"
every_half = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)
every_head_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS)


def to_device(*tensors):
    """Moves tensors as a serving engine has them: those that the host reads, which have one
    dimension, stay on the CPU."""
    return [x if x.dim() == 1 else with_strides_of(x, x.to(DEVICE)) for x in tensors]


def with_strides_of(like, x):
    return torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)


def packed(tensors):
    return to_device(*tensors.packed)


@every_half
@every_head_dim
@pytest.mark.parametrize("name", SETTINGS)
def test_varlen_is_attention_of_each_sequence(name, head_dim, dtype):
    settings = SETTINGS[name]._replace(head_dim=head_dim)
    tensors = draw(settings, lengths_for(settings), dtype)
    out = ops.attention_varlen(*packed(tensors), **options_of(settings))
    assert out.dtype == dtype
    alone = [
        ops.attention(*(ref_seq.as_batch(x.to(DEVICE)) for x in qkv), **options_of(settings))
        for qkv in zip(*tensors, strict=True)
    ]
    assert_same([out], [torch.cat([x[0].transpose(0, 1) for x in alone])])


@every_half
@every_head_dim
@pytest.mark.parametrize(
    ("page_size", "layout"), [(16, "nhd"), (48, "hnd"), (256, "apart"), (512, "hnd")]
)
@pytest.mark.parametrize("name", ["small", "fast", "not causal", "paper"])
def test_paged_is_varlen(name, page_size, layout, head_dim, dtype):
    settings = SETTINGS[name]._replace(head_dim=head_dim)
    tensors = draw(settings, lengths_for(settings), dtype)
    operands = to_device(*in_pages(tensors, page_size, layout))
    before = [x.clone() for x in operands]
    out = ops.attention_paged(*operands, **options_of(settings))
    assert_same([out], [ops.attention_varlen(*packed(tensors), **options_of(settings))])
    assert_same(operands, before)


@every_half
@every_head_dim
@pytest.mark.parametrize(
    ("case", "page_size", "layout"),
    [
        (SMALL, 256, "apart"),
        (SMALL._replace(kv_block_size=64, num_samples=16), 512, "hnd"),
        (SHARED._replace(kv_block_size=128, block_size=128), 1024, "nhd"),
    ],
    ids=["32", "64", "128"],
)
@pytest.mark.parametrize("plan", PLANS)
def test_chunks_at_threshold_1_are_dense(plan, case, page_size, layout, head_dim, dtype):
    case = case._replace(head_dim=head_dim)
    assert_chunks_are_dense(case, PLANS[plan], dtype, page_size, layout, device=DEVICE)


def by_stages(case, q, k, v):
    """One sequence, (1, heads, tokens, head_dim), whose keys before the own segments are in order
    already: which keys it visits, in the order of k, its output in float64, and all keys and values
    in the order that pages are left in."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    first = (num_keys - num_queries) // case.segment_size * case.segment_size
    own = k[:, :, first:], v[:, :, first:]
    scores = ops.score_keys(q, own[0], **case.kwargs("score_keys"))
    if first == 0 and num_keys >= case.segment_size:
        scores[..., 0] = torch.inf
    perm = ops.sort_segments(scores, **case.kwargs("sort_segments"))
    ordered = ops.permute_kv(*own, perm, **case.kwargs("permute_kv"))
    k_perm, v_perm = (
        torch.cat([x[:, :, :first], y], 2) for x, y in zip((k, v), ordered[:2], strict=True)
    )
    num_blocks = -(-num_keys // case.kv_block)
    k_mean = torch.full((1, case.num_kv_heads, num_blocks, case.head_dim), torch.nan)
    words, _ = ops.select_blocks(
        q, k, k_mean.to(q.device), None, k_perm, **case.kwargs("select_blocks")
    )
    places = torch.arange(first).expand(1, case.num_kv_heads, -1)
    perm = torch.cat([places, perm.cpu() + first], -1)
    layout = case._replace(num_queries=num_queries, num_keys=num_keys).layout
    mask = ref.unpack_mask(words.cpu(), num_blocks)
    visited = ref.visited_keys(perm, mask, layout).to(q.device)
    exact, _ = ref.masked_attention(q, k, v, visited, scale=case.scale)
    return visited, exact, k_perm, v_perm


@every_half
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "plan", "page_size"),
    [
        ("small", "at once", 64),
        ("small", "inside segments", 256),
        ("small", "single tokens", 512),
        ("shared", "inside segments", 256),
        ("shared", "segments", 1024),
        ("sorted", "inside segments", 1024),
        ("balanced", "long", 256),
        ("fast", "long", 512),
    ],
)
def test_chunks_are_the_stages_on_gathered_pages(name, plan, page_size, layout, dtype):
    """Selection and sorting see the same numbers, so pages are equal bit for bit."""
    case = IN_ORDER[name]
    lengths = [(sum(chunks),) * 2 for chunks in zip(*PLANS[plan], strict=True)]
    tensors = draw(case, lengths, dtype)
    pages = pages_for(case, PLANS[plan], dtype, page_size, layout=layout).clone(DEVICE)
    for step in steps(PLANS[plan], tensors, pages):
        before = pages.clone(DEVICE)
        out = run_in_order(pages, step, options_of(case))
        sequences = []
        for n, q in enumerate(step.q.to(DEVICE).split(step.cu_seqlens_q.diff().tolist())):
            if len(q) == 0:
                continue
            last = step.seq_lens[n].item()
            q, k, v = map(ref_seq.as_batch, (q, *before.read(n, 0, last)))
            visited, exact, k_perm, v_perm = by_stages(case, q, k, v)
            sequences.append(ref_seq.Sequence(q, k, v, None, None, None, visited, exact))
            assert_same(map(ref_seq.as_batch, pages.read(n, 0, last)), (k_perm, v_perm))
            before.write(n, 0, *pages.read(n, 0, last))
        assert_sequences(out, sequences, scale=case.scale)
        assert_same([pages.k, pages.v], [before.k, before.v])


def test_long_chunks_of_many_sequences():
    """There are enough keys that every kernel has several tiles per CTA, and pages are far
    apart."""
    case = Case(
        0, 0, batch=1, num_q_heads=4, num_kv_heads=2, head_dim=128, block_size=128,
        kv_block_size=32, segment_size=256, num_heavy=32, score="sampled", mass="block",
        threshold=0.01, num_samples=16, window=128,
    )  # fmt: skip
    plan = ((1500, 700, 2500), (1000, 2048, 1), (1300, 300, 1000))
    assert_chunks_are_dense(case, plan, torch.bfloat16, 256, "hnd", device=DEVICE)


# Streams, graphs and memory


def small_calls(dtype=torch.bfloat16):
    """Arguments of all three operators, on the device. A function makes the pages for each call."""
    tensors = draw(SMALL, lengths_for(SMALL), dtype)
    q, k_cache, v_cache, *lengths = to_device(*in_pages(tensors, 256, "nhd"))
    return packed(tensors), (q, k_cache, v_cache), lengths


def run_all(varlen, paged, lengths):
    """The results of all three operators. The pages that change are copies."""
    q, *caches = paged
    ordered = [x.clone() for x in caches]
    out = torch.full_like(q, torch.nan)
    found = [
        ops.attention_varlen(*varlen, **options_of(SMALL)),
        ops.attention_paged(*paged, *lengths, **options_of(SMALL)),
    ]
    ops.attention_paged_(q, *ordered, out, *lengths, **options_of(SMALL))
    return [*found, out, *ordered]


def test_the_same_over_runs_and_streams():
    calls = small_calls()
    want = run_all(*calls)
    for _ in range(5):
        assert_same(run_all(*calls), want)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run_all(*calls)
    torch.cuda.synchronize()
    assert_same(found, want)


def test_captured_in_a_graph():
    """Lengths are fixed at the capture. The page numbers are read when the graph runs."""
    varlen, paged, lengths = small_calls()
    want = run_all(varlen, paged, lengths)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_all(varlen, paged, lengths)
    for x in captured:
        x.fill_(torch.nan)
    graph.replay()
    assert_same(captured, want)
    _, k_cache, v_cache = paged
    table = lengths[2]
    moved = torch.randperm(len(k_cache), device=table.device)
    is_page = (table >= 0) & (table < len(k_cache))
    k_cache.copy_(k_cache[moved.argsort()].clone())
    v_cache.copy_(v_cache[moved.argsort()].clone())
    table.copy_(torch.where(is_page, moved[table.clamp(0, len(k_cache) - 1).long()], table))
    graph.replay()
    assert_same(captured[:3], want[:3])


def test_nothing_waits_for_the_gpu():
    calls = small_calls()
    run_all(*calls)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_all(*calls)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_pages_take_the_memory_that_the_docs_say():
    """docs/ops.md, Memory: the memory of attention, and copies of the keys and values."""
    num_keys, num_heads, head_dim = 20000, 2, 128
    q, k, v = (
        torch.randn(num_keys, heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
        for heads in (8, num_heads, num_heads)
    )
    cu, lengths = cu_seqlens([num_keys]), torch.tensor([num_keys])
    caches = [x[: num_keys // 16 * 16].unflatten(0, (-1, 16)) for x in (k, v)]
    table = torch.arange(num_keys // 16, device=DEVICE, dtype=torch.int32)[None]
    calls = {
        "varlen": lambda: ops.attention_varlen(q, k, v, cu, cu),
        "paged": lambda: ops.attention_paged(q, *caches, cu, lengths, table),
    }
    peaks = {}
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        call()
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    documented = 2 * 2 * num_heads * num_keys * head_dim
    assert peaks["varlen"] < peaks["paged"] <= peaks["varlen"] + documented


# Valid and invalid arguments on a GPU


@pytest.mark.parametrize("bad", [-1, 10**6, 2**31 - 1])
def test_bad_pages_are_visible_and_harmless(bad):
    """The table is on the GPU, where a kernel cannot raise an error."""
    tensors = draw(SMALL, ((300, 300), (200, 290), (1, 600)), torch.bfloat16)
    q, k_cache, v_cache, cu, lengths, table = to_device(*in_pages(tensors, 256, "nhd"))
    options = options_of(SMALL)
    want = ops.attention_paged(q, k_cache, v_cache, cu, lengths, table, **options)
    table[1, 1] = bad
    table[2, 0] = bad
    out = ops.attention_paged(q, k_cache, v_cache, cu, lengths, table, **options)
    assert_same([out[:300]], [want[:300]])
    assert out[300:].isnan().all()
    before = [x.clone() for x in (k_cache, v_cache)]
    out = torch.zeros_like(q)
    ops.attention_paged_(q, k_cache, v_cache, out, cu, lengths, table, **options)
    assert not out[:300].isnan().any()
    assert out[300:].isnan().all()
    of_first = table[0, :2].long()
    for cache, old in zip((k_cache, v_cache), before, strict=True):
        assert not torch.equal(cache[of_first], old[of_first])
        cache[of_first] = old[of_first]
    assert_same([k_cache, v_cache], before)


def test_lengths_on_the_gpu():
    """The Python functions copy them. The operators, which never wait, refuse them."""
    varlen, paged, (cu, lengths, table) = small_calls()
    where = cu.to(DEVICE), lengths.to(DEVICE), table
    on_gpu = [x.to(DEVICE) for x in varlen]
    want = ops.attention_varlen(*varlen)
    assert_same([pbs_attn.attention_varlen(*on_gpu)], [want])
    assert_same([pbs_attn.attention_paged(*paged, *where)], [want])
    out = torch.full_like(want, torch.nan)
    q, k_cache, v_cache = paged
    expected = [k_cache.clone(), v_cache.clone(), out.clone()]
    ops.attention_paged_(q, *expected, cu, lengths, table)
    pbs_attn.attention_paged_(q, k_cache, v_cache, out, *where)
    assert_same([k_cache, v_cache, out], expected)
    message = "cu_seqlens_q must be on the CPU, got cuda:0"
    with pytest.raises(RuntimeError, match=message):
        ops.attention_varlen(*on_gpu)
    with pytest.raises(RuntimeError, match=message):
        ops.attention_paged(*paged, *where)
    with pytest.raises(RuntimeError, match=message):
        ops.attention_paged_(q, k_cache, v_cache, out, *where)
    with pytest.raises(RuntimeError, match="seq_lens must be on the CPU, got cuda:0"):
        ops.attention_paged(*paged, cu, where[1], table)


def test_what_cuda_does_not_take():
    varlen, paged, lengths = small_calls()
    with pytest.raises(RuntimeError, match="q must be bfloat16 or float16 on CUDA"):
        ops.attention_varlen(*(x.float() if x.is_floating_point() else x for x in varlen))
    with pytest.raises(RuntimeError, match="scale must be positive on CUDA, got -1"):
        ops.attention_paged(*paged, *lengths, scale=-1.0)
    with pytest.raises(RuntimeError, match=r"block_table must be on the device of q \(cuda:0\)"):
        ops.attention_paged(*paged, *lengths[:2], lengths[2].cpu())
    with pytest.raises(RuntimeError, match="k_cache must be on the device of q"):
        ops.attention_paged(paged[0], paged[1].cpu(), paged[2].cpu(), *lengths)
    q = paged[0]
    shifted = torch.empty(q.numel() + 1, dtype=q.dtype, device=DEVICE)[1:].view(q.shape)
    with pytest.raises(RuntimeError, match=r"out must start at, .* a multiple of 16 bytes"):
        ops.attention_paged_(*paged, shifted, *lengths)
    with pytest.raises(RuntimeError, match=r"q must start at, .* a multiple of 16 bytes"):
        ops.attention_paged(shifted, *paged[1:], *lengths)


def test_no_sequences():
    tensors = draw(SMALL, [(0, 0), (0, 40)], torch.bfloat16)
    assert ops.attention_varlen(*packed(Ragged(*tensors))).shape == (0, 4, 64)
    pages = Pages([0, 40], 2, 64, torch.bfloat16, 256).clone(DEVICE)
    nothing = torch.empty(0, 4, 64, device=DEVICE, dtype=torch.bfloat16)
    lengths = cu_seqlens([0, 0]), torch.tensor([0, 40]), pages.block_table
    assert ops.attention_paged(nothing, pages.k, pages.v, *lengths).shape == (0, 4, 64)
    ops.attention_paged_(nothing, pages.k, pages.v, torch.empty_like(nothing), *lengths)
    assert pages.k.isnan().all()


def test_compiled():
    varlen, paged, lengths = small_calls()
    compiled = torch.compile(pbs_attn.attention_varlen, fullgraph=True)
    assert_same([compiled(*varlen)], [pbs_attn.attention_varlen(*varlen)])
    compiled = torch.compile(pbs_attn.attention_paged, fullgraph=True)
    assert_same([compiled(*paged, *lengths)], [pbs_attn.attention_paged(*paged, *lengths)])
