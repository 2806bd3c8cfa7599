"""What the vLLM plugin does with a batch: how rows are split, what each part sees, and that all of
the output is written. vLLM's own classes are those of vllm_fakes.py, whose attention is dense."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import vllm_fakes

from pbs_attn.integrations.vllm import counter
from pbs_attn.integrations.vllm.pages import split_cpu_pages, split_pages
from pbs_attn.integrations.vllm.rows import make_plan, take_rows, take_starts, take_tokens

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
NAME = "model.layers.0.attn"
# Decode, the last chunk of a prompt, a short prompt, a chunk in the middle, decode.
QUERIES, KEYS = [1, 300, 90, 512, 1], [700, 1000, 90, 1280, 40]
PREFILLING = [False, True, True, True, False]
PROMPTS = [600, 1000, 90, 9000, 30]


def make_config(**settings):
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False
        ),
        model_config=SimpleNamespace(
            rswa_window=None, is_mm_prefix_lm=False, is_hybrid=False, dtype=torch.float32,
            max_model_len=2048,
        ),
        device_config=SimpleNamespace(device_type="cpu"),
        kv_transfer_config=None,
        speculative_config=None,
        compilation_config=SimpleNamespace(static_forward_context={}),
        attention_config=SimpleNamespace(backend=SimpleNamespace(name="CUSTOM")),
        additional_config={"pbs_attn": {"threshold": 1.0, "min_tokens": 512, **settings}},
    )  # fmt: skip


class Server:
    """One layer and its builder."""

    def __init__(self, monkeypatch, kind="cuda", version="0.26.0", **settings):
        self.config, self.log = make_config(**settings), vllm_fakes.Log()
        self.modules = vllm_fakes.install(monkeypatch, self.config, self.log, version)
        self.module = importlib.import_module(f"pbs_attn.integrations.vllm.{kind}")
        self.impl_module = importlib.import_module("pbs_attn.integrations.vllm.impl")
        names = ("PBSBackend", "PBSCPUBackend")
        self.backend = next(vars(self.module)[n] for n in names if n in vars(self.module))
        self.impl = self.add_layer(NAME)
        self.builder = self.make_builder()

    def add_layer(self, name, window=None):
        impl = self.backend.get_impl_cls()(
            HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, None, window, "auto"
        )
        layer = SimpleNamespace(impl=impl, layer_name=name, kv_sharing_target_layer_name=None)
        self.config.compilation_config.static_forward_context[name] = layer
        return impl

    def make_builder(self):
        names = list(self.config.compilation_config.static_forward_context)
        spec = SimpleNamespace(block_size=256)
        return self.backend.get_builder_cls()(spec, names, self.config, "cpu")

    def forward(self, query, cache, metadata, impl=None):
        output = torch.full_like(query, torch.nan)
        layer = SimpleNamespace(layer_name=NAME)
        (impl or self.impl).forward(layer, query, None, None, cache, metadata, output)
        return output


@pytest.fixture
def server(monkeypatch):
    return Server(monkeypatch)


def make_cache(page_size, layout="NHD", num_pages=None):
    """(pages, KV heads, page size, 2 * head_dim), in either order in memory."""
    num_pages = num_pages or 8192 // page_size
    torch.manual_seed(0)
    if layout == "HND":
        return torch.randn(num_pages, KV_HEADS, page_size, 2 * HEAD_DIM)
    return torch.randn(num_pages, page_size, KV_HEADS, 2 * HEAD_DIM).transpose(1, 2)


def make_table(page_size, keys=KEYS):
    """Pages in no order, none used twice."""
    width = max(keys) // page_size + 1
    order = torch.randperm(8192 // page_size, generator=torch.Generator().manual_seed(1))
    return order[: len(keys) * width].view(len(keys), width).int()


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
    common = vllm_fakes.make_common(QUERIES, KEYS, PREFILLING, make_table(page_size))
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
    # What was ordered in place is the same to dense attention, but for queries in it.
    decode = vllm_fakes.make_common([1] * 5, [n + 1 for n in KEYS], [False] * 5, make_table(256))
    if page_size == 256:
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
    """The settings that each call of the operator gets, with metadata that `build` made and with
    metadata that nobody tells prompts of."""
    seen = []
    for name in ("attention_paged", "attention_paged_"):
        original = vars(server.impl_module)[name]

        def spy(*arguments, name=name, original=original, **settings):
            seen.append((name, settings["config"].dense_tail, settings["scale"]))
            return original(*arguments, **settings)

        monkeypatch.setattr(server.impl_module, name, spy)
    common = vllm_fakes.make_common(QUERIES, KEYS, PREFILLING, make_table(page_size))

    for metadata in (build(common), server.builder.build(0, common)):
        query = torch.randn(sum(QUERIES), HEADS, HEAD_DIM)
        server.forward(query, make_cache(page_size), metadata)
    return seen


def builds_of_runners(server):
    """How each model runner of vLLM has metadata built."""
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
    """An ordinary build of FlashAttention 3 writes its schedule into a buffer that the metadata of
    the whole batch points to."""
    common = vllm_fakes.make_common(QUERIES, KEYS, PREFILLING, make_table(256))
    server.builder.build(0, common)
    assert [is_fast for _, is_fast in server.builder.builds] == [False, True]
    (_, (rest, _)) = server.builder.builds
    assert rest.seq_lens.tolist() == [700, 90, 40] and rest.num_reqs == 3
    assert torch.equal(rest.block_table_tensor, common.block_table_tensor[[0, 2, 4]])
    assert rest.slot_mapping.tolist() == [0, *range(301, 391), 903]


def test_batches_without_a_plan(server):
    table = make_table(256)
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
    """The first runner pads rows, the second one all fields but `is_prefilling`."""
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
    common = vllm_fakes.make_common(QUERIES, KEYS, PREFILLING, make_table(256))
    metadata, cache = builder.build(0, common), make_cache(256)
    before = cache.clone()
    server.forward(torch.randn(sum(QUERIES), HEADS, HEAD_DIM), cache, metadata, window)
    assert window.calls == [metadata] and torch.equal(cache, before)


def test_another_group_of_layers_has_pages_of_its_own(server):
    common = vllm_fakes.make_common(QUERIES, KEYS, PREFILLING, make_table(256))
    cache, query = make_cache(256), torch.randn(sum(QUERIES), HEADS, HEAD_DIM)
    other = common.replace(block_table_tensor=make_table(256).flip(1))
    wanted = expected(query, cache, other)
    metadata = server.builder.build(0, common)
    slots = torch.arange(1000, 1000 + sum(QUERIES))
    new = server.builder.update_block_table(metadata, other.block_table_tensor, slots)
    torch.testing.assert_close(server.forward(query, cache, new), wanted, atol=1e-5, rtol=1e-5)
    assert new.pbs_plan.rest_metadata.slot_mapping.tolist() == [1000, *range(1301, 1391), 1903]
    assert torch.equal(metadata.block_table, common.block_table_tensor)


def test_the_profiling_run_makes_the_longest_call_once(server, monkeypatch):
    calls = []
    monkeypatch.setattr(server.impl_module, "attention_paged_", lambda *a, **_: calls.append(a))
    other = server.add_layer("model.layers.1.attn")
    layers = server.config.compilation_config.static_forward_context
    query = torch.randn(1024, HEADS, HEAD_DIM)
    for _ in range(2):
        for impl, layer in ((server.impl, layers[NAME]), (other, layers["model.layers.1.attn"])):
            output = torch.full_like(query, torch.nan)
            impl.forward(layer, query, None, None, torch.tensor([]), None, output)
            assert not output.any()
    ((q, k_cache, _, _, starts, lengths, table),) = calls
    assert q.shape == query.shape and starts.tolist() == [0, 1024] and lengths.tolist() == [2048]
    assert k_cache.shape == (1, 256, KV_HEADS, HEAD_DIM) and table.shape == (1, 8)


def test_the_log_and_the_counter(server, monkeypatch, tmp_path):
    (line,) = server.log.lines
    assert line.startswith(f"PBS: 1 of 1 attention layers ({NAME}) take prompts of 512 tokens")
    assert "threshold=1.0" in line and line.endswith("Pages of 256 tokens are ordered in place.")
    monkeypatch.setenv(counter.FOLDER, str(tmp_path))
    monkeypatch.delenv(counter.SHARED, raising=False)
    counter._file_adder.cache_clear()
    server.builder.build(0, vllm_fakes.make_common(QUERIES, KEYS, PREFILLING, make_table(256)))
    counter._file_adder.cache_clear()
    assert counter.read_totals(tmp_path) == {"pbs": 812, "dense": 90}


# The backends


def test_the_backend_on_cuda(server):
    backend = server.backend
    assert backend.get_name() == "CUSTOM"
    assert backend.get_builder_cls()._cudagraph_support.name == "UNIFORM_BATCH"
    assert not backend.is_sparse() and not backend.supports_batch_invariance()
    assert backend.get_preferred_block_size(16) == 256
    assert backend.get_preferred_block_size(512) == 512
    server.config.kv_transfer_config = object()  # pages stay in order: no need for long ones
    assert backend.get_preferred_block_size(16) == 16


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_another_version_is_refused_where_the_backend_is_asked_for(monkeypatch, kind):
    with pytest.raises(RuntimeError, match=r"needs vLLM >= 0.26, < 0.28, got 0.32.0"):
        Server(monkeypatch, kind, version="0.32.0")


@pytest.mark.parametrize(
    ("is_cpu", "version", "member", "path"),
    [
        (True, "0.27.1", "CPU_ATTN", "cpu.PBSCPUBackend"),
        (False, "0.27.1", "CUSTOM", "cuda.PBSBackend"),
        (False, "0.32.0", "CUSTOM", "cuda.PBSBackend"),  # importing it tells why not
        (True, "0.32.0", None, None),
    ],
)
def test_what_is_registered(monkeypatch, is_cpu, version, member, path):
    from pbs_attn.integrations.vllm import register

    log = vllm_fakes.Log()
    modules = vllm_fakes.install(monkeypatch, make_config(), log, version)
    modules["vllm.platforms"].current_platform.is_cpu = lambda: is_cpu
    monkeypatch.setattr(counter, "export", lambda: None)
    register()
    registered = modules["vllm.v1.attention.backends.registry"].registered
    expected = {member: f"pbs_attn.integrations.vllm.{path}"} if member else {}
    assert {key.name: value for key, value in registered.items()} == expected
    assert bool(log.lines) == (member is None)


def test_the_cpu_backend_without_custom_is_vllms_own(monkeypatch):
    server = Server(monkeypatch, "cpu")
    server.config.attention_config.backend = None
    impl = server.add_layer(NAME)
    assert "not asked for" in impl.pbs_reason
    assert not server.make_builder().pbs_layers


def test_the_cpu_backend_works_on_a_copy_of_its_pages(monkeypatch):
    """In whose blocks the keys are transposed; two rows share one."""
    server = Server(monkeypatch, "cpu")
    monkeypatch.setattr(
        vllm_fakes.BaseImpl, "pages", lambda self, cache: split_cpu_pages(cache, HEAD_DIM)
    )
    cache = torch.randn(16, KV_HEADS, 256, 2 * HEAD_DIM)
    table = torch.tensor([[3, 5, 7, 1], [3, 2, 9, 0]]).int()
    common = vllm_fakes.make_common([700, 400], [700, 1000], [True] * 2, table)
    query = torch.randn(1100, HEADS, HEAD_DIM)
    metadata = SimpleNamespace(
        query_start_loc=common.query_start_loc, seq_lens=common.seq_lens, block_table=table
    )
    wanted = torch.empty_like(query)
    keys, values = split_cpu_pages(cache.clone(), HEAD_DIM)
    vllm_fakes.dense(query, keys, values, metadata, wanted, HEAD_DIM**-0.5)
    before = cache.clone()
    output = server.forward(query, cache, server.builder.build(0, common))
    torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)
    changed = [i for i in range(16) if not torch.equal(cache[i], before[i])]
    assert changed == [3, 5, 9]  # page 2 was complete before the call
    for a, b in zip(split_cpu_pages(cache, HEAD_DIM), (keys, values), strict=True):
        torch.testing.assert_close(a[changed].sum(1), b[changed].sum(1), atol=1e-3, rtol=1e-3)


def test_a_packed_cpu_cache_is_dense(monkeypatch):
    monkeypatch.setattr(vllm_fakes.BaseImpl, "isa", "amx")
    assert "packed for amx" in Server(monkeypatch, "cpu").impl.pbs_reason


# Layouts and rows


@pytest.mark.parametrize("split", [split_pages, split_cpu_pages])
def test_a_cache_of_another_shape_is_refused(split):
    for shape in ((2, 4, 16, 2, 64), (4, 2, 16, 64)):
        with pytest.raises(ValueError, match=r"kv_cache must be \(blocks, KV heads"):
            split(torch.zeros(shape), HEAD_DIM)


def test_pages_are_views():
    cache = make_cache(16)
    k_cache, v_cache = split_pages(cache, HEAD_DIM)
    assert k_cache.shape == (512, 16, KV_HEADS, HEAD_DIM)
    assert torch.equal(v_cache[5, 3, 1], cache[5, 1, 3, HEAD_DIM:])
    k_cache[7, 2, 0] = 1
    assert (cache[7, 0, 2, :HEAD_DIM] == 1).all()


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
