"""Every stage on a GPU against the float64 reference, on the problems of the CPU's tests; and the
whole operator: streams, graphs, repeated runs, long inputs."""

import itertools
import random

import pytest
import reference as ref
import torch
from cases import DTYPES, STRIDES, Case, clustered_qkv, run_stages, with_strides
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stages import CASES, WIDE, stages_of
from tolerances import (
    SAMPLED_ATOL,
    SAMPLED_ROUNDING,
    SAMPLED_RTOL,
    assert_output,
    assert_selects,
    assert_smallest_set,
    assert_within_twice,
)

import pbs_attn
from pbs_attn._library import gpu_family
from pbs_attn.ops import HEAD_DIMS

pytestmark = pytest.mark.gpu
ops = torch.ops.pbs
HALVES = [torch.bfloat16, torch.float16]
seeds = st.integers(0, 2**31 - 1)
halves = st.sampled_from(HALVES)
some = settings(max_examples=40, derandomize=True, deadline=None)


def random_case(seed):
    """Draws a case from one seed. If hypothesis drew each option, it would try few cases and many
    similar ones."""
    rng = random.Random(seed)
    block_size = rng.choice([32, 64, 128])
    kv_block_size = rng.choice([None, 32, 64, 128])
    segment_size = max(block_size, kv_block_size or 0) * rng.choice([1, 2, 3, 8])
    num_keys = rng.choice([rng.randint(1, 1500), rng.randint(600, 1500), segment_size])
    num_kv_heads = rng.randint(1, 3)
    score = rng.choice(["mean", "sampled"])
    mass = "block" if score == "sampled" else rng.choice(["earlier", "causal"])
    permute_per = rng.choice(["kv_head", "query_head"])
    can_share = score == "sampled" and permute_per == "kv_head"
    return Case(
        num_queries=rng.choice([num_keys, rng.randint(1, num_keys)]),
        num_keys=num_keys,
        num_q_heads=num_kv_heads * rng.choice([1, 2, 3, 4, 5, 7, 9]),
        num_kv_heads=num_kv_heads,
        head_dim=rng.choice(HEAD_DIMS),
        batch=rng.randint(1, 2),
        block_size=block_size,
        kv_block_size=kv_block_size,
        segment_size=segment_size,
        is_causal=rng.choice([True, True, False]),
        scale=rng.choice([None, None, 0.1]),
        permute_per=permute_per,
        num_heavy=rng.choice([None, rng.randint(1, segment_size)]),
        mass=mass,
        score=score,
        num_samples=rng.choice([1, 8, 16, rng.randint(1, min(block_size, 64))]),
        select_per=rng.choice(["query_head", "kv_head"][: 1 + can_share]),
        window=rng.choice([0, 0, 1, 128, 10**9]),
        dense_tail=rng.choice([0, 0, 1, 200, 10**9]),
        threshold=Case.threshold_for(mass, rng.choice([0.3, 0.6, 0.9, rng.uniform(0.01, 1), 1.0])),
        strides=rng.choice(STRIDES),
    )


random_cases = seeds.map(random_case)


def to_gpu(case, *tensors):
    """Copies with the strides of the case, because `cuda` does not keep those of a slice."""
    return [with_strides(x.cuda(), case.strides) for x in tensors]


def cases_of(dtypes):
    return pytest.mark.parametrize(
        ("case", "dtype"),
        [
            pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}")
            for case, dtype in itertools.product(CASES + WIDE, dtypes)
        ],
    )


def poison(*tensors):
    """Frees GPU memory full of NaN (or -1) in the sizes that an op will allocate."""
    for x in tensors:
        torch.full((x.numel() * x.element_size(),), 0xFF, dtype=torch.uint8, device="cuda")


def assert_scores(case, q, k, logits_dtype=torch.float32):
    options = case.kwargs("score_keys")
    exact = ref.score_keys(q, k, **options)
    poison(exact.float())
    scores = ops.score_keys(*to_gpu(case, q, k), **options).cpu()
    num_sorted = case.num_keys // case.segment_size * case.segment_size
    keys = ref.repeat_heads(k, case.num_q_heads)[:, :, :num_sorted].to("cuda", logits_dtype)
    queries = q[:, :, -case.block_size :].to("cuda", logits_dtype)
    logits = (queries @ keys.mT).float() * ref.scale_for(q, case.scale)
    in_torch = logits.softmax(-1).mean(2).cpu()
    if case.permute_per == "kv_head":
        in_torch = in_torch.unflatten(1, (case.num_kv_heads, -1)).mean(2)
    assert (scores[..., num_sorted:] == 0).all()
    assert_within_twice(scores[..., :num_sorted], in_torch, exact[..., :num_sorted], "scores")


@cases_of(HALVES)
def test_score_keys(case, dtype):
    q, k, *_ = stages_of(case, dtype)
    assert_scores(case, q, k)


@some
@given(case=random_cases, seed=seeds, dtype=halves)
def test_score_keys_of_random_shapes(case, seed, dtype):
    q, k, _ = clustered_qkv(case, dtype, seed)
    assert_scores(case, q, k)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_score_keys_of_several_chunks(head_dim, dtype):
    case = Case(700, 2900, head_dim=head_dim, block_size=128, segment_size=256, batch=1)
    q, k, _ = clustered_qkv(case, dtype, seed=0)
    assert_scores(case, q, k)
    # Logits are far beyond the range of exp without the maximum over all keys, and even their last
    # float32 bits matter. The comparison is therefore with torch's product in the same dtype.
    assert_scores(case, q * 30, k, logits_dtype=dtype)


@pytest.mark.parametrize("head_dim", [96, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 7])
def test_score_keys_of_long_parts(group, head_dim):
    """There are enough key heads that a CTA has a large part of one, and its keys pass all stages
    more than once."""
    heads = {"num_q_heads": 70 * group, "num_kv_heads": 70}
    case = Case(64, 1100, **heads, head_dim=head_dim, batch=1, block_size=64, segment_size=128)
    q, k, _ = clustered_qkv(case, torch.bfloat16, seed=0)
    assert_scores(case, q, k)


@cases_of([torch.float32])
def test_sort_segments(case, dtype):
    scores = stages_of(case, dtype).scores.float()
    options = case.kwargs("sort_segments")
    poison(scores)
    perm = ops.sort_segments(scores.cuda(), **options)
    assert torch.equal(perm.cpu().long(), ref.sort_segments(scores, **options))


@pytest.mark.parametrize("segment_size", [64, 100, 256, 4096])
@pytest.mark.parametrize("num_heavy", [None, 1, 13, 64, 5000])
@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
def test_sort_segments_agrees_with_cpu(levels, num_heavy, segment_size):
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(-levels, levels, (2, 3, 9001), generator=generator).float()
    scores[0, 1, ::7] = torch.nan
    scores[1, 0, ::5] = -0.0
    scores[1, 1, ::3] = torch.inf
    options = {"segment_size": segment_size, "num_heavy": num_heavy}
    perm = ops.sort_segments(scores.cuda(), **options)
    assert torch.equal(perm.cpu(), ops.sort_segments(scores, **options))


@some
@given(case=random_cases, seed=seeds, levels=st.sampled_from([1, 3, 10, 2**20]))
def test_sort_segments_of_random_shapes(case, seed, levels):
    generator = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.num_q_heads, case.num_keys)
    scores = torch.randint(-levels, levels, shape, generator=generator).float()
    options = case.kwargs("sort_segments")
    poison(scores)
    perm = ops.sort_segments(scores.cuda(), **options)
    assert torch.equal(perm.cpu(), ops.sort_segments(scores, **options))


@some
@given(case=random_cases, seed=seeds, dtype=st.sampled_from(DTYPES))
def test_permute_kv_of_random_shapes(case, seed, dtype):
    _, k, v = clustered_qkv(case, dtype, seed)
    num_heads = case.num_q_heads if case.permute_per == "query_head" else case.num_kv_heads
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(case.batch, num_heads, case.num_keys, generator=generator)
    perm = ref.sort_segments(noise, segment_size=case.segment_size).int()
    expected = ops.permute_kv(k, v, perm, **case.kwargs("permute_kv"))
    poison(*expected)
    got = ops.permute_kv(*to_gpu(case, k, v), perm.cuda(), **case.kwargs("permute_kv"))
    k_perm, v_perm, k_mean = (x.cpu() for x in got)
    assert torch.equal(k_perm, expected[0])
    assert torch.equal(v_perm, expected[1])
    torch.testing.assert_close(k_mean, expected[2], rtol=1e-5, atol=1e-6)


@cases_of([torch.float32, *HALVES])
def test_select_blocks(case, dtype):
    q, k, _, _, perm, _, _, k_mean, exact = stages_of(case, dtype)
    words = ref.pack_mask(exact)
    poison(words)
    tensors = (t.cuda() for t in (q, k, k_mean.float(), perm.int()))
    mask, counts = ops.select_blocks(*tensors, **case.kwargs("select_blocks"))
    assert torch.equal(mask.cpu(), words)
    assert torch.equal(counts.cpu().long(), exact.sum(-1))


@pytest.mark.parametrize("mass", ["earlier", "causal"])
@pytest.mark.parametrize("threshold", [0.12, 0.55, 0.76, 1.0])
def test_select_blocks_agrees_with_cpu_on_ties(threshold, mass):
    q, k = torch.ones(1, 2, 320, 64), torch.full((1, 2, 320, 64), 0.5)
    k_mean = torch.full((1, 2, 10, 64), 0.5)
    sizes = {"block_size": 32, "segment_size": 64, "threshold": threshold, "mass": mass}
    expected = ops.select_blocks(q, k, k_mean, **sizes)
    got = ops.select_blocks(q.cuda(), k.cuda(), k_mean.cuda(), **sizes)
    assert all(torch.equal(g.cpu(), e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("mass", ["earlier", "causal"])
@pytest.mark.parametrize(
    ("num_keys", "block_size", "kv_block_size"), [(20000, 128, 128), (40000, 128, 32)]
)
def test_select_blocks_of_long_rows_takes_the_smallest_set(
    num_keys, block_size, kv_block_size, mass
):
    case = Case(
        512,
        num_keys,
        batch=1,
        num_q_heads=2,
        num_kv_heads=1,
        block_size=block_size,
        kv_block_size=kv_block_size,
        segment_size=256,
        mass=mass,
    )
    q, k, _ = clustered_qkv(case, torch.bfloat16, seed=0)
    k_mean = ref.block_mean(k.double(), kv_block_size)
    options = case.kwargs("select_blocks")
    mask, _ = ops.select_blocks(q.cuda(), k.cuda(), k_mean.float().cuda(), **options)
    masses = ref.block_mass(q, k, k_mean, case.layout, mass=mass)
    candidate, _ = ref.block_roles(case.layout)
    sink = torch.zeros(1, 2, dtype=torch.long)
    words = ref.unpack_mask(mask.cpu(), k_mean.shape[2])
    assert_smallest_set(words, *masses, candidate, sink, 0.9, eps=1e-4)


def select_on_gpu(case, q, k, perm=None, **changed):
    """Calls sampled scores twice, checks that masks and counts are equal, and returns the mask.
    Without a permutation, the keys are in their original order."""
    k_perm = None
    num_heads = case.num_kv_heads if perm is None else perm.shape[1]
    num_blocks = -(-case.num_keys // case.kv_block)
    if perm is not None:
        k_perm, _, _ = ops.permute_kv(k, k, perm, **case.kwargs("permute_kv"))
        k_perm, perm = to_gpu(case, k_perm)[0], perm.cuda()
    # Sampled scores do not read it.
    k_mean = torch.full((case.batch, num_heads, num_blocks, case.head_dim), torch.nan)
    tensors = *to_gpu(case, q, k), k_mean.cuda(), perm, k_perm
    options = case.kwargs("select_blocks") | changed
    candidate, _ = ref.block_roles(case.layout)
    mask = candidate.expand(case.batch, case.num_q_heads, -1, -1)
    poison(ref.pack_mask(mask), mask.sum(-1).int(), torch.empty(2**24))  # and the workspace
    words, counts = ops.select_blocks(*tensors, **options)
    again, counts_again = ops.select_blocks(*tensors, **options)
    assert torch.equal(words, again)
    assert torch.equal(counts, counts_again)
    mask = ref.unpack_mask(words.cpu(), num_blocks)
    assert torch.equal(counts.cpu().long(), mask.sum(-1))
    return mask


def family():
    """The family of the kernels that calls use here."""
    return gpu_family(torch.cuda.get_device_capability())


def assert_sampled(case, q, k, perm=None, *, rtol=None):
    """Sampled scores on CUDA against the reference with the same roundings. Blocks that are always
    visited, and those that are not candidates, are exact. `rtol` is that of sm90, if logits are so
    large that its roundings matter."""
    kernels = family()
    if rtol is None or kernels != "sm90":
        rtol = SAMPLED_RTOL[kernels]
    candidate, _ = ref.block_roles(case.layout)
    masses = ref.masses_of(case, q, k, None, perm, rounding=SAMPLED_ROUNDING[kernels])
    assert not masses[0].isnan().any()
    if perm is None:
        sink = torch.zeros(case.batch, case.num_q_heads, dtype=torch.long)
    else:
        sink = ref.sink_block(perm, None, case.num_q_heads, case.kv_block)
    mask = select_on_gpu(case, q, k, perm)
    eps = rtol * case.threshold + SAMPLED_ATOL
    assert_selects(mask, masses, candidate, sink, case, eps=eps)
    return mask, masses[0]


def assert_selection(case, seed, dtype):
    q, k, v = clustered_qkv(case, dtype, seed)
    scores = ops.score_keys(q, k, **case.kwargs("score_keys"))
    perm = ops.sort_segments(scores, **case.kwargs("sort_segments"))
    if case.score == "sampled":
        return assert_sampled(case, q, k, perm)
    k_perm, _, k_mean = ops.permute_kv(k, v, perm, **case.kwargs("permute_kv"))
    candidate, _ = ref.block_roles(case.layout)
    masses = ref.masses_of(case, q, k, k_mean, perm)
    sink = ref.sink_block(perm, k_mean, case.num_q_heads, case.kv_block)
    options = case.kwargs("select_blocks")
    poison(ref.pack_mask(candidate.expand(case.batch, case.num_q_heads, -1, -1)))
    q, k, k_perm = to_gpu(case, q, k, k_perm)
    words, counts = ops.select_blocks(q, k, k_mean.cuda(), perm.cuda(), k_perm, **options)
    mask = ref.unpack_mask(words.cpu(), k_mean.shape[2])
    assert_selects(mask, masses, candidate, sink, case, eps=1e-4)
    assert torch.equal(counts.cpu().long(), mask.sum(-1))


@some
@given(case=random_cases, seed=seeds, dtype=st.sampled_from(DTYPES))
def test_select_blocks_of_random_shapes_follows_its_rule(case, seed, dtype):
    if case.score == "sampled" and dtype == torch.float32:
        dtype = torch.bfloat16
    assert_selection(case, seed, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mass", ["earlier", "causal"])
@pytest.mark.parametrize("head_dim", [64, 96])
def test_select_blocks_of_many_tiles_takes_the_smallest_set(head_dim, mass, dtype):
    """There are enough query blocks that a CTA works on several tiles of them, one loaded ahead."""
    case = Case(4000, 4000, num_q_heads=8, head_dim=head_dim, mass=mass, permute_per="query_head")
    assert_selection(case, 0, dtype)


def test_nan_visits_everything():
    q = torch.randn(1, 2, 1024, 64, device="cuda", dtype=torch.bfloat16)
    q[0, 0, 900] = torch.nan
    k_mean = torch.randn(1, 2, 8, 64, device="cuda")
    _, counts = ops.select_blocks(q, q, k_mean, threshold=0.3)
    assert counts[0, 0, 7] == 6
    assert counts[0, 1, 7] < 6


def assert_attention(case, q, k, v):
    """One call of all five stages visits the same keys as separate calls, and its output on them is
    right."""
    q, k, v = to_gpu(case, q, k, v)
    by_stage = run_stages(case, q, k, v)
    mask = ref.unpack_mask(by_stage.block_mask.cpu(), by_stage.k_mean.shape[2])
    visited = ref.visited_keys(by_stage.perm.cpu(), mask, case.layout).cuda()
    exact, _ = ref.masked_attention(q, k, v, visited, scale=case.scale)
    poison(q)
    out = ops.attention(q, k, v, **case.kwargs("attention"))
    assert out.stride() == torch.empty_like(q).stride()
    assert_output(out, q, k, v, visited, exact, scale=case.scale)


@cases_of(HALVES)
def test_attention(case, dtype):
    assert_attention(case, *stages_of(case, dtype)[:3])


@some
@given(case=random_cases, seed=seeds, dtype=halves)
def test_attention_of_random_shapes(case, seed, dtype):
    assert_attention(case, *clustered_qkv(case, dtype, seed))


def test_attention_over_runs_streams_and_graphs():
    case = Case(3000, 3000, num_q_heads=8, head_dim=128, block_size=128, segment_size=256)
    q, k, v = (t.cuda() for t in clustered_qkv(case, torch.bfloat16, seed=0))
    out = ops.attention(q, k, v)
    for _ in range(20):
        assert torch.equal(ops.attention(q, k, v), out)
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results += [ops.attention(q, k, v) for _ in range(5)]
    torch.cuda.synchronize()
    assert all(torch.equal(result, out) for result in results)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.attention(q, k, v)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, out)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_other_device():
    """Tensors are on a GPU that is not the current one."""
    case = Case(700, 700, head_dim=128, block_size=128, segment_size=256)
    tensors = [x.cuda(0) for x in clustered_qkv(case, torch.bfloat16, seed=0)]
    on_other = [x.to("cuda:1") for x in tensors]
    with torch.cuda.device(0):
        expected = (*run_stages(case, *tensors), ops.attention(*tensors))
        got = (*run_stages(case, *on_other), ops.attention(*on_other))
        assert torch.cuda.current_device() == 0
    for x, y in zip(got, expected, strict=True):
        assert x.device == torch.device("cuda:1")
        assert torch.equal(x.cpu(), y.cpu())


@pytest.mark.parametrize("permute_per", ["kv_head", "query_head"])
@pytest.mark.parametrize(
    ("score", "mass"), [("mean", "earlier"), ("mean", "causal"), ("sampled", "block")]
)
def test_extra_memory_is_what_the_docs_say(score, mass, permute_per):
    """docs/ops.md, Memory."""
    num_tokens, heads, kv_heads, head_dim, block, samples = 20000, 8, 2, 128, 128, 16
    q = torch.randn(1, heads, num_tokens, head_dim, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, kv_heads, num_tokens, head_dim, device="cuda", dtype=torch.bfloat16)
    perm_heads = heads if permute_per == "query_head" else kv_heads
    blocks = -(-num_tokens // block)
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    documented = 8 * perm_heads * num_tokens
    if family() == "sm80":  # lists of selected keys
        documented += 8 * 2 * num_sms * (-(-num_tokens // 32) + 2)
    documented += 2 * 2 * perm_heads * num_tokens * head_dim
    if score == "sampled":
        tiles, stacks = -(-num_tokens // 128), perm_heads * -(-blocks * heads // perm_heads // 4)
        stacks_per_unit = 2 if stacks < 6 * num_sms else 4
        workspace = perm_heads * tiles * (128 * head_dim + 16) + 64 * stacks * (head_dim + 16)
        workspace += 2048 * num_sms * stacks_per_unit * -(-tiles // 2) + 640
        documented += max(0, workspace - 2 * heads * num_tokens * head_dim)
    else:
        documented += 4 * (perm_heads + kv_heads * (mass == "causal")) * blocks * head_dim
    documented += heads * blocks * (4 * -(-blocks // 32) + 16)
    documented += 4 * heads * num_tokens
    documented += 1024 * max(heads, 528 * heads // kv_heads)
    # Rows of 16 samples, four of them to a stack.
    options = {"kv_block_size": block, "num_heavy": None, "num_samples": samples, "score": score}
    options |= {"mass": mass, "permute_per": permute_per}
    ops.attention(q, k, k, **options)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    # The requested memory: the allocator gives up to a MiB more per tensor.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    out = ops.attention(q, k, k, **options)
    torch.cuda.synchronize()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    # The output is allocated last. If an earlier stage has the peak, the output is not part of it.
    assert peak - before - out.numel() * out.element_size() <= documented
    assert peak - before > documented / 2


def test_attention_does_not_wait_for_the_gpu():
    q = torch.randn(1, 4, 1000, 64, device="cuda", dtype=torch.bfloat16)
    ops.attention(q, q, q)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.attention(q, q, q)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_attention():
    q = torch.randn(1, 4, 1000, 64, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(pbs_attn.attention, fullgraph=True)
    assert torch.equal(compiled(q, q, q), pbs_attn.attention(q, q, q))


def test_what_cuda_does_not_take():
    q = torch.randn(1, 2, 300, 64, device="cuda")
    half = q.bfloat16()
    for call in (ops.attention, lambda *qkv, **options: ops.score_keys(*qkv[:2], **options)):
        with pytest.raises(RuntimeError, match="q must be bfloat16 or float16 on CUDA"):
            call(q, q, q)
        with pytest.raises(RuntimeError, match="scale must be positive on CUDA"):
            call(half, half, half, scale=-1.0)
    shifted = torch.empty(half.numel() + 1, dtype=half.dtype, device="cuda")[1:].view(half.shape)
    with pytest.raises(RuntimeError, match=r"v must start at, .* a multiple of 16 bytes"):
        ops.attention(half, half, shifted)
    with pytest.raises(RuntimeError, match="segment_size must be at most 4096 on CUDA, got 8192"):
        ops.attention(half, half, half, segment_size=8192)
    long = torch.empty(1, 1, 1_050_000, 256, dtype=half.dtype, device="cuda")
    with pytest.raises(RuntimeError, match=r"k must have at most \d+ key blocks of .* got 32813"):
        ops.attention(long[:, :, :64], long, long, kv_block_size=32, score="mean", mass="causal")
    with pytest.raises(RuntimeError, match="num_samples must be at most 64 on CUDA, got 65"):
        ops.attention(half, half, half, num_samples=65)
    with pytest.raises(RuntimeError, match="segment_size must be at most 4096 on CUDA, got 8192"):
        ops.sort_segments(torch.zeros(1, 1, 300, device="cuda"), segment_size=8192)
