"""The vLLM plugin on a batch: how it splits rows, what each part sees, and that it writes the whole
output. vllm_fakes.py replaces vLLM's own classes, with dense attention."""

from types import SimpleNamespace

import pytest
import torch
import vllm_fakes
from vllm_fakes import HEAD_DIM, HEADS, KV_HEADS, NAME, Server, make_cache, make_table

from pbs_attn.integrations.vllm import counter
from pbs_attn.integrations.vllm.pages import split_pages
from pbs_attn.integrations.vllm.rows import make_plan, take_rows, take_starts, take_tokens

# Decode, the last chunk of a prompt, a short prompt, a chunk in the middle, decode.
QUERIES, KEYS = [1, 300, 90, 512, 1], [700, 1000, 90, 1280, 40]
PREFILLING = [False, True, True, True, False]
PROMPTS = [600, 1000, 90, 9000, 30]


def batch(page_size=256):
    table = make_table(page_size, KEYS)
    return vllm_fakes.make_common(QUERIES, KEYS, PREFILLING, table)


@pytest.fixture
def server(monkeypatch):
    return Server(monkeypatch)


def expected(query, cache, common):
    output = torch.full_like(query, torch.nan)
    metadata = SimpleNamespace(
        query_start_loc=common.query_start_loc,
        seq_lens=common.seq_lens,
        block_table=common.block_table_tensor,
    )
    vllm_fakes.dense(query, *split_pages(cache, HEAD_DIM), metadata, output, HEAD_DIM**-0.5)
    return output


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [16, 256])
def test_a_mixed_batch(server, layout, page_size):
    cache = make_cache(page_size, layout)
    common = batch(page_size)
    query = torch.randn(sum(QUERIES), HEADS, HEAD_DIM)
    before = cache.clone()
    metadata = server.builder.build(0, common)
    assert [run.span.rows for run in metadata.pbs_plan.runs] == [(1, 2), (3, 4)]
    output = server.forward(query, cache, metadata)
    torch.testing.assert_close(output, expected(query, before, common), atol=1e-5, rtol=1e-5)
    assert torch.equal(cache, before) == (page_size == 16)
    (rest,) = server.impl.calls
    assert rest.query_start_loc.tolist() == [0, 1, 91, 92]
    assert (rest.max_query_len, rest.max_seq_len) == (90, 700)
    if page_size == 256:
        # In-place order does not change dense attention, except for queries in the sorted segments.
        table = common.block_table_tensor
        decode = vllm_fakes.make_common([1] * 5, [n + 1 for n in KEYS], [False] * 5, table)
        last = torch.randn(5, HEADS, HEAD_DIM)
        results = (expected(last, pages, decode) for pages in (cache, before))
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_chunks_of_a_prompt_in_ordered_pages(server):
    cache, table = make_cache(256), make_table(256, [1300])
    before, a = cache.clone(), 0
    query = torch.randn(1300, HEADS, HEAD_DIM)
    for b in (600, 1000, 1300):
        common = vllm_fakes.make_common([b - a], [b], [True], table)
        output = server.forward(query[a:b], cache, server.builder.build(0, common))
        wanted = expected(query[a:b], before, common)
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)
        a = b
    assert not server.impl.calls and not torch.equal(cache, before)


def test_one_span_of_others_is_written_without_a_copy(server):
    common = vllm_fakes.make_common([1, 600], [300, 600], [False, True], make_table(256, [600] * 2))
    cache, query = make_cache(256), torch.randn(601, HEADS, HEAD_DIM)
    wanted = expected(query, cache, common)
    output = server.forward(query, cache, server.builder.build(0, common))
    torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)


def configs_of(server, monkeypatch, page_size, build):
    """The settings that each call of the operator gets, with metadata from `build`, and with
    metadata without known prompts."""
    seen = []
    for name in ("attention_paged", "attention_paged_"):
        original = vars(server.impl_module)[name]

        def spy(*arguments, name=name, original=original, **settings):
            seen.append((name, settings["config"].dense_tail, settings["scale"]))
            return original(*arguments, **settings)

        monkeypatch.setattr(server.impl_module, name, spy)
    common = batch(page_size)

    for metadata in (build(common), server.builder.build(0, common)):
        query = torch.randn(sum(QUERIES), HEADS, HEAD_DIM)
        server.forward(query, make_cache(page_size), metadata)
    return seen


def builds_of_runners(server):
    """The way in which each model runner of vLLM builds metadata."""
    worker = "vllm.v1.worker"
    first = server.modules[f"{worker}.gpu_model_runner"].GPUModelRunner(server.builder, PROMPTS)
    states = server.modules[f"{worker}.gpu.model_states.default"].DefaultModelState(server.builder)
    batch = SimpleNamespace(prefill_len_np=PROMPTS)
    return {
        "first": first._build_attention_metadata,
        "second": lambda common: states.prepare_attn(batch, common),
    }


@pytest.mark.parametrize("runner", ["first", "second"])
@pytest.mark.parametrize(
    ("page_size", "name"), [(256, "attention_paged_"), (64, "attention_paged")]
)
def test_only_last_chunks_have_a_dense_tail(server, monkeypatch, page_size, name, runner):
    known, unknown = [(name, 128), (name, 0)], [(name, 128), (name, 128)]
    wanted = [(*pair, HEAD_DIM**-0.5) for pair in known + unknown]
    build = builds_of_runners(server)[runner]
    assert configs_of(server, monkeypatch, page_size, build) == wanted


def test_metadata_of_the_rest_is_built_fast(server):
    """An ordinary build of FlashAttention 3 would write its schedule into a buffer that the
    metadata of the whole batch points to."""
    common = batch()
    server.builder.build(0, common)
    assert [is_fast for _, is_fast in server.builder.builds] == [False, True]
    (_, (rest, _)) = server.builder.builds
    assert rest.seq_lens.tolist() == [700, 90, 40] and rest.num_reqs == 3
    assert torch.equal(rest.block_table_tensor, common.block_table_tensor[[0, 2, 4]])
    assert rest.slot_mapping.tolist() == [0, *range(301, 391), 903]


def test_batches_without_a_plan(server):
    table = make_table(256, KEYS)
    common = vllm_fakes.make_common(QUERIES, KEYS, PREFILLING, table)
    builder = server.builder
    decode = vllm_fakes.make_common([1] * 5, KEYS, [True] * 5, table)
    assert builder.build(0, decode).pbs_plan is None
    assert builder.build(0, common, fast_build=True).pbs_plan is None
    assert builder.build(256, common).pbs_plan is None
    assert builder.build(0, common.replace(causal=False)).pbs_plan is None
    assert builder.build(0, common.replace(mm_req_doc_ranges={})).pbs_plan is None
    assert builder.build(0, common.replace(is_prefilling=None)).pbs_plan is None
    assert builder.build(0, common.replace(seq_lens_cpu_upper_bound=None)).pbs_plan is None
    assert builder.build_for_cudagraph_capture(common).pbs_plan is None
    text = "\n".join(server.log.lines)
    for word in ("draft", "cascade", "not causal", "both directions", "on the host"):
        assert text.count(word) == 1, word


def test_padding_behind_the_rows(server):
    """The first runner pads rows, and the second pads all fields except `is_prefilling`."""
    queries, keys = [600, 0, 0], [600, 0, 0]
    table, prefilling = make_table(256, [600] * 3), torch.tensor([True])
    common = vllm_fakes.make_common(queries, keys, [True], table, num_actual_tokens=640)
    plan = server.builder.build(0, common.replace(is_prefilling=prefilling)).pbs_plan
    assert [run.span.rows for run in plan.runs] == [(0, 1)] and not plan.rest


def test_a_dense_layer_beside_one_that_takes_pbs(server):
    window = server.add_layer("model.layers.1.attn", window=512)
    builder = server.make_builder()
    assert "2 attention layers" in server.log.lines[-2] or "1 of 2" in server.log.lines[-2]
    assert "stay dense: the layer has a sliding window" in server.log.lines[-1]
    common = batch()
    metadata, cache = builder.build(0, common), make_cache(256)
    before = cache.clone()
    server.forward(torch.randn(sum(QUERIES), HEADS, HEAD_DIM), cache, metadata, window)
    assert window.calls == [metadata] and torch.equal(cache, before)


def test_another_group_of_layers_has_pages_of_its_own(server):
    common = batch()
    cache, query = make_cache(256), torch.randn(sum(QUERIES), HEADS, HEAD_DIM)
    other = common.replace(block_table_tensor=make_table(256, KEYS).flip(1))
    wanted = expected(query, cache, other)
    metadata = server.builder.build(0, common)
    slots = torch.arange(1000, 1000 + sum(QUERIES))
    new = server.builder.update_block_table(metadata, other.block_table_tensor, slots)
    torch.testing.assert_close(server.forward(query, cache, new), wanted, atol=1e-5, rtol=1e-5)
    assert new.pbs_plan.rest_metadata.slot_mapping.tolist() == [1000, *range(1301, 1391), 1903]
    assert torch.equal(metadata.block_table, common.block_table_tensor)


@pytest.mark.parametrize("page_size", [16, 256])
def test_the_profiling_run_makes_the_longest_call_once(server, monkeypatch, page_size):
    """It uses the operator for blocks of this size."""
    server.config.cache_config.block_size = page_size
    calls = []

    def spy(*arguments, **settings):
        calls.append(arguments)
        return torch.zeros_like(arguments[0])

    name = "attention_paged_" if page_size == 256 else "attention_paged"
    monkeypatch.setattr(server.impl_module, name, spy)
    other = server.add_layer("model.layers.1.attn")
    layers = server.config.compilation_config.static_forward_context
    query = torch.randn(1024, HEADS, HEAD_DIM)
    for _ in range(2):
        for impl, layer in ((server.impl, layers[NAME]), (other, layers["model.layers.1.attn"])):
            output = torch.full_like(query, torch.nan)
            impl.forward(layer, query, None, None, torch.tensor([]), None, output)
            assert not output.any()
    (arguments,) = calls
    q, k_cache = arguments[:2]
    starts, lengths, table = arguments[4:7] if page_size == 256 else arguments[3:6]
    assert q.shape == query.shape and starts.tolist() == [0, 1024] and lengths.tolist() == [2048]
    assert k_cache.shape == (1, page_size, KV_HEADS, HEAD_DIM)
    assert table.shape == (1, 2048 // page_size)


def test_the_log_and_the_counter(server, monkeypatch, tmp_path):
    (line,) = server.log.lines
    assert line.startswith(f"PBS: 1 of 1 attention layers ({NAME}) take prompts of 512 tokens")
    assert "threshold=1.0" in line and line.endswith("Pages of 256 tokens are ordered in place.")
    monkeypatch.setenv(counter.FOLDER, str(tmp_path))
    monkeypatch.delenv(counter.SHARED, raising=False)
    counter._file_adder.cache_clear()
    server.builder.build(0, batch())
    counter._file_adder.cache_clear()
    assert counter.read_totals(tmp_path) == {"pbs": 812, "dense": 90}


# Rows


def test_rows_next_to_each_other_are_one_run():
    starts, lengths = [0, 200, 500, 501, 901, 901], [200, 900, 9, 400, 0]
    plan = make_plan(starts, lengths, [0, 1, 3], None)
    assert [run.span for run in plan.runs] == [((0, 2), (0, 500)), ((3, 4), (501, 901))]
    assert plan.runs[0].cu_seqlens_q.tolist() == [0, 200, 500]
    assert plan.runs[0].seq_lens.tolist() == [200, 900]
    assert plan.runs[1].cu_seqlens_q.tolist() == [0, 400]
    assert plan.rest == (((2, 3), (500, 501)),)
    plan = make_plan(starts, lengths, [0, 1, 3], [200, 901, 9, 400])
    assert [(run.span.rows, run.is_last) for run in plan.runs] == [
        *(((0, 1), True), ((1, 2), False), ((3, 4), True)),
    ]


def test_parts_of_a_batch():
    starts = torch.tensor([0, 2, 5, 6, 10]).int()
    spans = make_plan(starts.tolist(), [9] * 4, [1], None).rest
    assert take_starts(starts, spans).tolist() == [0, 2, 3, 7]
    assert take_rows(torch.arange(4), spans).tolist() == [0, 2, 3]
    assert take_tokens(torch.arange(12), spans).tolist() == [0, 1, *range(5, 10)]
    one = take_tokens(starts, spans[:1])
    assert one.data_ptr() == starts.data_ptr()
