"""pbs_attn.transformers on tiny random models: the same logits as transformers' own attention at
threshold 1, and the op on exactly the layers that explain() names."""

import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="4.56")

from hf_models import (  # noqa: E402
    ATOL,
    CACHE,
    EXACT,
    FAMILIES,
    HAS_CACHE_POSITION,
    MIN_TOKENS,
    NUM_TOKENS,
    SPARSE,
    WINDOW,
    assert_same,
    build,
    logits,
    registered,  # noqa: F401  a fixture for every test
    tokens,
)
from transformers import DynamicCache, StaticCache, masking_utils  # noqa: E402

import pbs_attn.transformers as integration  # noqa: E402
from pbs_attn._hf_route import Call, Settings, route  # noqa: E402


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_threshold_gives_the_reference_logits(family, op_layers):
    _, _, reference, routes = FAMILIES[family]
    model = build(family)
    ran = op_layers(model)
    actual = logits(model, tokens(batch=2))
    assert [layer.route for layer in integration.explain(model, NUM_TOKENS)] == routes
    assert ran == [idx for idx, kind in enumerate(routes) if kind == "pbs"]
    assert_same(actual, logits(model, tokens(batch=2), reference))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_config_reaches_the_op(family):
    model = build(family)
    exact = logits(model, tokens())
    sparse = logits(model, tokens(), "pbs_sparse")
    assert (exact - sparse).abs().max() > 1000 * ATOL
    # The first segment sees no selected block, so it cannot differ.
    first = SPARSE.segment_size
    assert_same(sparse[:, :first], exact[:, :first])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation(family, op_layers):
    _, _, reference, routes = FAMILIES[family]
    model = build(family)
    ran = op_layers(model)
    options = {"max_new_tokens": 6, "do_sample": False}
    actual = model.generate(tokens(), **options)
    assert len(ran) == routes.count("pbs"), "prefill takes the op once a layer, decode never"
    model.set_attn_implementation(reference)
    assert torch.equal(actual, model.generate(tokens(), **options))


def test_generation_with_a_static_cache():
    model = build("llama")
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    actual = model.generate(tokens(), **options)
    model.set_attn_implementation("sdpa")
    assert torch.equal(actual, model.generate(tokens(), **options))


@pytest.mark.parametrize("family", ["llama", "qwen2_sliding", "gemma2", "gemma3", "gpt_oss"])
def test_left_padding(family, op_layers):
    _, _, reference, routes = FAMILIES[family]
    model = build(family)
    ran = op_layers(model)
    padding = 77
    input_ids = tokens(batch=2)
    input_ids[1, :padding] = 0
    mask = torch.ones_like(input_ids)
    mask[1, :padding] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask, "position_ids": position_ids}
    actual = logits(model, input_ids, **inputs)
    assert ran == [idx for idx, kind in enumerate(routes) if kind == "pbs" for _ in range(2)]
    expected = logits(model, input_ids, reference, **inputs)
    assert_same(actual[mask.bool()], expected[mask.bool()])
    alone = logits(model, input_ids[1:, padding:], reference)
    assert_same(actual[1:, padding:], alone)
    model.set_attn_implementation("pbs_exact")
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask}
    generated = model.generate(input_ids, **options)
    model.set_attn_implementation(reference)
    assert torch.equal(generated, model.generate(input_ids, **options))


def test_mask_without_padding_takes_the_op(op_layers):
    model = build("llama")
    ran = op_layers(model)
    actual = logits(model, tokens(), attention_mask=torch.ones(1, NUM_TOKENS, dtype=torch.long))
    assert ran == [0, 1]
    assert_same(actual, logits(model, tokens(), "sdpa"))


def test_forward_without_cache_takes_the_op(op_layers):
    model = build("llama")
    ran = op_layers(model)
    actual = logits(model, tokens(), use_cache=False)
    assert ran == [0, 1]
    assert_same(actual, logits(model, tokens(), "sdpa"))


def test_mask_given_in_four_dimensions(op_layers):
    model = build("llama")
    ran = op_layers(model)
    mask = torch.ones(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).tril()
    mask[:, 5:9] &= torch.eye(NUM_TOKENS, dtype=torch.bool)[:, 5:9]
    actual = logits(model, tokens(), attention_mask=mask[None, None])
    assert not ran
    assert_same(actual, logits(model, tokens(), "sdpa", attention_mask=mask[None, None]))


def prefill_in_chunks(model, input_ids, lengths, cache):
    return torch.cat(
        [
            logits(model, chunk, use_cache=True, **{CACHE: cache})
            for chunk in input_ids.split(lengths, dim=1)
        ],
        dim=1,
    )


@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gemma2", "gemma3", "gpt_oss"])
def test_chunked_prefill(family, op_layers):
    _, _, reference, routes = FAMILIES[family]
    model = build(family)
    ran = op_layers(model)
    # The last chunk is shorter than a block and does not take the op, nor does the decode step.
    lengths = [200, 160, 40, 1]
    actual = prefill_in_chunks(model, tokens(), lengths, DynamicCache(config=model.config))
    assert ran == 2 * [idx for idx, kind in enumerate(routes) if kind == "pbs"]
    assert_same(actual, logits(model, tokens(), reference))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "head_dim_80"])
@pytest.mark.parametrize("room", [0, 50])
def test_static_cache(family, room, op_layers):
    reference = FAMILIES[family][2]
    model = build(family)
    ran = op_layers(model)
    cache = StaticCache(config=model.config, max_cache_len=NUM_TOKENS + room)
    # A sliding layer of a static cache cannot be filled in chunks before transformers 5.
    lengths = [200, 200, 1] if family == "llama" else [399, 1, 1]
    actual = prefill_in_chunks(model, tokens(), lengths, cache)
    assert ran == [] or room == 0, "keys behind the last query must be masked"
    assert_same(actual, logits(model, tokens(), reference))


def test_from_pretrained(tmp_path, op_layers):
    model = build("qwen3", "sdpa")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="pbs_exact"
    )
    ran = op_layers(loaded)
    actual = logits(loaded, tokens())
    assert ran == [0, 1]
    assert_same(actual, logits(model, tokens()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, op_layers):
    model = build("llama", initializer_range=0.05).to(dtype)
    ran = op_layers(model)
    actual = logits(model, tokens())
    assert ran == [0, 1] and actual.dtype == dtype
    torch.testing.assert_close(actual, logits(model, tokens(), "sdpa"), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_takes_sdpa(dropout, op_layers):
    model = build("llama", attention_dropout=dropout).train()
    ran = op_layers(model)
    gradients = {}
    for implementation in ("pbs_exact", "sdpa"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        torch.manual_seed(1)
        model(tokens(), labels=tokens()).loss.backward()
        gradients[implementation] = [p.grad.clone() for p in model.parameters()]
    assert not ran
    assert all(g.abs().max() > 0 for g in gradients["pbs_exact"])
    for actual, expected in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(actual, expected)
    model.set_attn_implementation("pbs_exact")
    assert all("training mode" in layer.reason for layer in integration.explain(model))


def test_compile():
    model = build("llama")
    expected = logits(model, tokens(), "sdpa")
    model.set_attn_implementation("pbs_exact")
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(model, backend=backend)
    assert_same(logits(compiled, tokens()), expected)
    if not HAS_CACHE_POSITION:  # otherwise, the mask depends on values that a trace cannot read
        assert targets.count("pbs.attention") == 2
    mask = torch.ones(1, NUM_TOKENS, dtype=torch.long)
    mask[:, :9] = 0
    padded = logits(compiled, tokens(), attention_mask=mask)
    assert_same(padded[:, 9:], logits(model, tokens(), "sdpa", attention_mask=mask)[:, 9:])
    torch.compiler.reset()


def test_explain_names_every_layer():
    routes = integration.explain(build("gemma3"))
    assert [(r.layer_idx, r.route) for r in routes] == [(0, "sdpa"), (1, "pbs")]
    assert [r.name for r in routes] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert f"window of {WINDOW} tokens" in routes[0].reason
    assert len(str(routes).splitlines()) == 3 and "causal prefill" in str(routes)


@pytest.mark.parametrize(
    ("family", "num_tokens", "words"),
    [
        ("llama", MIN_TOKENS - 1, "min_tokens=128"),
        ("llama", 1, "decode"),
        ("head_dim_80", None, "head_dim 80"),
        ("gemma2", None, "softcap"),
        ("gpt_oss", None, "sinks"),
        ("mistral_sliding", None, f"window of {WINDOW}"),
    ],
)
def test_explain_gives_the_reason(family, num_tokens, words):
    assert all(words in layer.reason for layer in integration.explain(build(family), num_tokens))


def test_explain_rejects():
    with pytest.raises(TypeError, match=r"^model must be a transformers model"):
        integration.explain(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^num_tokens must be positive, got 0"):
        integration.explain(build("llama"), 0)


def test_explain_with_another_implementation():
    routes = integration.explain(build("llama", "sdpa"))
    assert [layer.route for layer in routes] == ["sdpa", "sdpa"]
    assert all("register()" in layer.reason for layer in routes)


PLAIN = Call(
    num_queries=512,
    num_keys=2048,
    head_dim=64,
    value_head_dim=64,
    dtype=torch.float32,
    device_type="cpu",
    is_causal=True,
    has_mask=False,
    window=None,
)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "pbs"),
        ({"window": 2048}, "pbs"),
        ({"window": 2047}, "sdpa"),
        ({"num_queries": 1}, "sdpa"),
        ({"num_queries": 63}, "sdpa"),
        ({"num_queries": 64}, "pbs"),
        ({"num_queries": 64, "num_keys": MIN_TOKENS - 1}, "sdpa"),
        ({"num_queries": 64, "num_keys": MIN_TOKENS}, "pbs"),
        ({"num_queries": 2049}, "sdpa"),
        ({"has_mask": True}, "sdpa"),
        ({"is_causal": False}, "sdpa"),
        ({"has_dropout": True}, "sdpa"),
        ({"has_paged_cache": True}, "unsupported"),
        ({"is_training": True}, "sdpa"),
        ({"is_causal": None}, "sdpa"),
        ({"supports_sdpa": False}, "eager"),
        ({"needs_grad": True}, "sdpa"),
        ({"head_dim": 80, "value_head_dim": 80}, "sdpa"),
        ({"value_head_dim": 128}, "sdpa"),
        ({"dtype": torch.float64}, "sdpa"),
        ({"dtype": None}, "sdpa"),
        ({"device_type": "xla"}, "sdpa"),
        ({"device_type": "cuda", "dtype": torch.float32}, "sdpa"),
        ({"has_softcap": True}, "eager"),
        ({"has_sinks": True, "num_queries": 1}, "eager"),
        ({"has_position_bias": True, "has_mask": True}, "eager"),
        ({"has_head_mask": True}, "eager"),
        ({"selects_keys": True}, "unsupported"),
    ],
)
def test_route(changes, kind):
    decided = route(PLAIN._replace(**changes), Settings("pbs_exact", EXACT, MIN_TOKENS))
    assert decided.kind == kind
    assert decided.reason


class Layer(torch.nn.Module):
    """An attention layer whose file (this one) has no eager function."""

    is_causal = True
    num_key_value_groups = 2


def attend(module, num_queries, num_keys, heads_first=False, **kwargs):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, num_queries, 4, 64, generator=generator).transpose(1, 2)
    query = query.contiguous() if heads_first else query
    key, value = torch.randn(2, 1, 2, num_keys, 64, generator=generator)
    function = transformers.AttentionInterface()["pbs_exact"]
    out, weights = function(module, query, key, value, kwargs.pop("mask", None), **kwargs)
    assert weights is None and out.is_contiguous()
    assert out.shape == (1, num_queries, 4, 64)
    return out, query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("window", [None, 1, 30, 300])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 200), (50, 200), (200, 200)])
def test_call_without_a_mask_is_bottom_right(num_queries, num_keys, window, heads_first):
    out, query, key, value = attend(
        Layer(), num_queries, num_keys, heads_first, scaling=0.2, sliding_window=window
    )
    distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
    visible = (distance >= 0) & (distance < (window or num_keys))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, scale=0.2
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_call_of_a_layer_that_is_not_causal():
    out, query, key, value = attend(Layer(), 150, 200, is_causal=False)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_call_without_an_eager_function():
    with pytest.raises(ValueError, match="eager_attention_forward"):
        attend(Layer(), 150, 200, softcap=30.0)


def test_call_with_keys_of_its_own_choice():
    with pytest.raises(ValueError, match="indexer"):
        attend(Layer(), 150, 200, indices=torch.zeros(1, 150, 8, dtype=torch.long))


def build_mask(q_length, kv_length, q_offset, **kwargs):
    """Calls the registered mask function as the installed transformers does."""
    if HAS_CACHE_POSITION:
        queries = {"cache_position": torch.arange(q_offset, q_offset + q_length)}
    else:
        queries = {"q_length": q_length, "q_offset": q_offset, "device": "cpu"}
    function = transformers.AttentionMaskInterface()["pbs_exact"]
    return function(batch_size=1, kv_length=kv_length, **queries, **kwargs)


def looks_causal(batch_idx, head_idx, q_idx, kv_idx):
    return kv_idx <= q_idx


def prefix(batch_idx, head_idx, q_idx, kv_idx):
    return kv_idx < 4


CAUSAL = masking_utils.causal_mask_function
ONES, HOLE = torch.ones(1, 12, dtype=torch.bool), torch.arange(12)[None] != 2
NO_PADDING = torch.zeros(1, dtype=torch.int)
ONE_SEQUENCE = masking_utils.packed_sequence_mask_function(torch.zeros(1, 12, dtype=torch.int))
TWO_SEQUENCES = masking_utils.packed_sequence_mask_function((torch.arange(12)[None] > 5).int())


@pytest.mark.parametrize(
    ("q_length", "q_offset", "changes", "is_plain"),
    [
        (12, 0, {}, True),
        (5, 7, {}, True),
        (5, 7, {"attention_mask": ONES}, True),
        (5, 7, {"attention_mask": HOLE}, False),
        (5, 7, {"attention_mask": ONES[:, :11]}, False),
        (5, 0, {}, False),
        (5, 6, {}, False),
        (5, 7, {"kv_offset": 3}, False),
        (5, 7, {"mask_function": looks_causal}, False),
        (12, 0, {"mask_function": masking_utils.or_masks(CAUSAL, prefix)}, False),
        (12, 0, {"mask_function": masking_utils.and_masks(CAUSAL, prefix)}, False),
        (12, 0, {"mask_function": masking_utils.sliding_window_causal_mask_function(12)}, True),
        (12, 0, {"mask_function": masking_utils.sliding_window_causal_mask_function(11)}, False),
        (12, 0, {"mask_function": masking_utils.sliding_window_overlay(12)}, False),
        (
            12,
            0,
            {"mask_function": masking_utils.chunked_causal_mask_function(12, NO_PADDING)},
            True,
        ),
        (
            12,
            0,
            {"mask_function": masking_utils.chunked_causal_mask_function(7, NO_PADDING)},
            False,
        ),
        (12, 0, {"mask_function": masking_utils.and_masks(CAUSAL, ONE_SEQUENCE)}, True),
        (12, 0, {"mask_function": masking_utils.and_masks(CAUSAL, TWO_SEQUENCES)}, False),
    ],
)
def test_mask_function(q_length, q_offset, changes, is_plain):
    mask = build_mask(q_length, 12, q_offset, **changes)
    assert (mask is None) == is_plain
    kv_offset = changes.get("kv_offset", 0)
    expected = torch.zeros(q_length, 12, dtype=torch.bool)
    visible = changes.get("mask_function", CAUSAL)
    padding = torch.zeros(12 + kv_offset, dtype=torch.bool)
    given = changes.get("attention_mask", torch.ones(1, len(padding), dtype=torch.bool))[0]
    padding[: len(given)] = given
    for row in range(q_length):
        for column in range(12):
            q_idx, kv_idx = torch.tensor(row + q_offset), torch.tensor(column + kv_offset)
            expected[row, column] = visible(0, 0, q_idx, kv_idx) & padding[kv_idx]
    if mask is None:
        mask = torch.ones(q_length, 12, dtype=torch.bool).tril(12 - q_length)[None, None]
    assert torch.equal(mask, expected[None, None])


@pytest.mark.skipif(HAS_CACHE_POSITION, reason="offsets come as cache_position")
def test_mask_function_obeys_its_caller():
    assert build_mask(5, 12, torch.tensor(7)) is None
    assert build_mask(5, 12, torch.tensor(6)) is not None
    assert build_mask(5, 12, 7, allow_is_causal_skip=False) is not None


def test_mask_function_refuses_a_model_without_the_interface():
    """It would misread the mask, and transformers checks no name that somebody registered."""
    assert transformers.BigBirdPegasusForCausalLM is not None  # loads the model's file
    with pytest.raises(ValueError, match="attention interface"):
        build_mask(12, 12, 0, config=transformers.BigBirdPegasusConfig())


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "sdpa"},
        {"name": "eager"},
        {"name": "my_flash"},
        {"name": "paged|pbs"},
        {"name": "someone/kernel"},
        {"name": ""},
        {"min_tokens": 0},
        {"min_tokens": 1.5},
        {"config": {"threshold": 0.9}},
    ],
)
def test_register_rejects(arguments):
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(arguments))} must "):
        integration.register(**arguments)


def test_register_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers >= 4\.56"):
        integration.register()


def test_register_with_old_transformers(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.55.4")
    with pytest.raises(ImportError, match=r">= 4\.56, got 4\.55\.4"):
        integration.register()


def test_import_leaves_transformers_alone():
    """It also leaves torch's compiler alone, whose import takes as long as that of all the rest of
    torch."""
    code = (
        "import sys, pbs_attn, pbs_attn.transformers; "
        "assert not {'transformers', 'torch._dynamo'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
