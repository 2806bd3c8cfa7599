"""Calls of pbs_attn.transformers with properties that only a run shows: gradients, checkpoints,
autocast, compiled graphs and paged caches. explain(), routes() and the calls agree."""

import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

transformers = pytest.importorskip("transformers", minversion="4.56")

from hf_models import (  # noqa: E402
    CACHE,
    EXACT,
    HAS_CACHE_POSITION,
    MIN_TOKENS,
    NUM_TOKENS,
    SPARSE,
    assert_same,
    build,
    logits,
    registered,  # noqa: F401  a fixture for every test
    tokens,
)

import pbs_attn.transformers as integration  # noqa: E402


def taken(name="pbs_exact"):
    """Route -> calls since the last register()."""
    calls = {}
    for entry in integration.routes(name):
        calls[entry.route] = calls.get(entry.route, 0) + entry.calls + entry.traces
    return calls


def reasons(name="pbs_exact"):
    return [entry.reason for entry in integration.routes(name)]


def foreseen(model, num_tokens=NUM_TOKENS):
    return [layer.route for layer in integration.explain(model, num_tokens)]


# Training


def gradients(model, run):
    model.zero_grad()
    run().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_training_has_the_gradients_of_sdpa(use_reentrant):
    model = build("llama", "sdpa").train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    # A reentrant checkpoint needs this if the embedding is not itself checkpointed.
    model.enable_input_require_grads()

    def run():
        return model(tokens(), labels=tokens(), use_cache=False).loss

    expected = gradients(model, run)
    model.set_attn_implementation("pbs_sparse")
    actual = gradients(model, run)
    assert set(foreseen(model)) == set(taken("pbs_sparse")) == {"sdpa"}
    assert actual.keys() == expected.keys() and len(actual) > 10
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name])


def test_frozen_layers_in_training_mode_take_sdpa():
    """They run without gradients in every pass, but must take the same route as the others."""
    model = build("llama", "pbs_sparse").train()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    model.model.norm.requires_grad_(True)
    model(tokens(), labels=tokens()).loss.backward()
    assert taken("pbs_sparse") == {"sdpa": 2}
    assert all("training mode" in reason for reason in reasons("pbs_sparse"))
    model.eval()
    assert set(foreseen(model)) == {"pbs"}


@torch.no_grad()
def test_training_mode_goes_dense_without_gradients_too():
    model = build("llama", "pbs_sparse").train()
    actual = model(tokens()).logits
    assert taken("pbs_sparse") == {"sdpa": 2}
    assert foreseen(model) == ["sdpa", "sdpa"]
    assert_same(actual, logits(model, tokens(), "sdpa"))


def test_reentrant_checkpoint_in_eval_mode_is_refused():
    """Its first pass takes PBS, and its second one cannot: the gradients would be wrong."""
    model = build("llama", "pbs_sparse")
    layer = model.model.layers[0].self_attn
    hidden = torch.randn(1, NUM_TOKENS, model.config.hidden_size, requires_grad=True)
    positions = model.model.rotary_emb(hidden, torch.arange(NUM_TOKENS)[None])

    def attend(states):
        return layer(states, positions, None)[0]

    out = checkpoint(attend, hidden, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        out.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint(attend, hidden, use_reentrant=False).sum().backward()
    by_checkpoint, hidden.grad = hidden.grad, None
    model.set_attn_implementation("sdpa")
    attend(hidden).sum().backward()
    torch.testing.assert_close(by_checkpoint, hidden.grad)


@pytest.mark.parametrize("transform", ["jvp", "vmap"])
def test_functional_transforms_of_a_model_in_grad_mode_take_sdpa(transform):
    model = build("llama", "pbs_sparse")
    layer = model.model.layers[0].self_attn
    hidden = torch.randn(2, NUM_TOKENS, model.config.hidden_size)
    positions = model.model.rotary_emb(hidden[:1], torch.arange(NUM_TOKENS)[None])

    def attend(states):
        return layer(states, positions, None)[0]

    if transform == "vmap":
        # The weights require grad, so the outputs do too, even if vmap hides it.
        actual = torch.vmap(lambda states: attend(states[None])[0])(hidden)
        expected = attend(hidden)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    else:
        # torch's fused SDPA has no forward derivative either; its plain one has.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            _, actual = torch.func.jvp(attend, (hidden,), (hidden,))
            model.set_attn_implementation("sdpa")
            _, expected = torch.func.jvp(attend, (hidden,), (hidden,))
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected)
    assert set(taken("pbs_sparse")) == {"sdpa"}


# Layers that are not causal self-attention


class CrossAttention(torch.nn.Module):
    """A layer of a model like Mllama. Nothing says whether it is causal."""

    num_key_value_groups = 2

    def forward(self, hidden_states, cross_attention_states):
        return self.attend(hidden_states, cross_attention_states)


class UnknownAttention(torch.nn.Module):
    num_key_value_groups = 2

    def forward(self, hidden_states):
        return self.attend(hidden_states)


def attend(module, num_queries=150, num_keys=200):
    query = torch.randn(1, 4, num_queries, 64)
    key, value = torch.randn(2, 1, 2, num_keys, 64)
    function = transformers.AttentionInterface()["pbs_exact"]
    out, _ = function(module.eval(), query, key, value, None)
    return out, query, key, value


def sdpa(query, key, value, mask=None):
    key, value = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2)


@pytest.mark.parametrize("sizes", [(150, 200), (200, 200)])
def test_cross_attention_that_does_not_say_so_sees_every_key(sizes):
    out, *tensors = attend(CrossAttention(), *sizes)
    torch.testing.assert_close(out, sdpa(*tensors))
    assert reasons() == ["the layer is not causal"]


def test_a_layer_that_does_not_tell_is_causal_and_dense():
    """transformers' own SDPA takes it. PBS does not guess."""
    out, *tensors = attend(UnknownAttention())
    mask = torch.ones(150, 200, dtype=torch.bool).tril(50)
    torch.testing.assert_close(out, sdpa(*tensors, mask))
    assert reasons() == ["the layer does not tell whether it is causal"]


def test_a_config_that_is_not_causal():
    model = build("llama")
    if HAS_CACHE_POSITION:
        pytest.skip("transformers 4 does not read config.is_causal")
    model.config.is_causal = False
    assert foreseen(model) == ["sdpa", "sdpa"]
    actual = logits(model, tokens())
    assert taken() == {"sdpa": 2}
    assert set(reasons()) == {layer.reason for layer in integration.explain(model, NUM_TOKENS)}
    assert_same(actual, logits(model, tokens(), "eager"))


# Autocast


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_autocast_takes_the_op(family, weights):
    """Rotary embeddings leave float32 queries and keys beside 16-bit values."""
    model = build(family, initializer_range=0.05).to(weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert foreseen(model) == ["pbs", "pbs"]
        actual = logits(model, tokens())
        assert taken() == {"pbs": 2}
        torch.testing.assert_close(actual, logits(model, tokens(), "sdpa"), atol=0.05, rtol=0.05)


# torch.compile


def compiled_logits(model, **kwargs):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    out = logits(torch.compile(model, backend=backend), tokens(), **kwargs)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    torch.compiler.reset()
    return out, targets.count("pbs.attention")


needs_transformers_5 = pytest.mark.skipif(
    HAS_CACHE_POSITION, reason="a compiled prefill of transformers 4 goes dense"
)


@needs_transformers_5
@pytest.mark.parametrize("family", ["llama", "mistral_wide"])
@pytest.mark.parametrize("gives_positions", [False, True])
def test_compiled_prefill_takes_the_op(family, gives_positions):
    model = build(family)
    kwargs = {"position_ids": torch.arange(NUM_TOKENS)[None]} if gives_positions else {}
    actual, num_ops = compiled_logits(model, **kwargs)
    assert num_ops == 2
    assert [(c.route, c.calls, c.traces > 0) for c in integration.routes("pbs_exact")] == [
        ("pbs", 0, True)
    ]
    assert_same(actual, logits(model, tokens(), "sdpa"))


@needs_transformers_5
@pytest.mark.parametrize("family", ["llama", "mistral_sliding"])
def test_compiled_prefill_that_goes_dense(family):
    """Without a cache transformers makes a mask of position_ids, whose values a trace cannot read;
    and a window that is too short stays one."""
    model = build(family)
    promised = set(foreseen(model)) == {"pbs"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual, num_ops = compiled_logits(model, use_cache=family != "llama")
    assert num_ops == 0 and set(taken()) == {"sdpa"}
    assert any("instead of PBS" in str(w.message) for w in caught) == promised
    assert "{" not in "".join(reasons())
    assert_same(actual, logits(model, tokens(), "sdpa"))


def test_one_compiled_model_in_every_mode():
    """A trace does not reuse the mode or the registration of an earlier one."""
    model = build("llama")
    expected = {name: logits(model, tokens(), name) for name in ("sdpa", "pbs_sparse")}
    model.set_attn_implementation("pbs_exact")
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert_same(logits(compiled, tokens()), expected["sdpa"])
        with torch.inference_mode():
            assert_same(compiled(tokens()).logits, expected["sdpa"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled(tokens(), labels=tokens()).loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
        model.zero_grad()
    integration.register("pbs_exact", config=SPARSE, min_tokens=MIN_TOKENS)
    again = logits(compiled, tokens())
    torch.compiler.reset()
    if HAS_CACHE_POSITION:
        assert_same(again, expected["sdpa"])
    else:
        assert_same(again, expected["pbs_sparse"])


# Counts and warnings


def test_routes_count_what_happened():
    model = build("gemma3")
    model.generate(tokens(), max_new_tokens=3, do_sample=False)
    counts = {(c.route, c.reason): c.calls for c in integration.routes("pbs_exact")}
    # Layer 0 has a window; a decode step of either layer is dense.
    assert counts["pbs", "causal prefill"] == 1
    assert counts["sdpa", "the window of 96 tokens is shorter than the keys"] == 1
    assert counts["sdpa", "a decode step has one query"] == 4
    assert sum(counts.values()) == 6
    table = str(integration.routes("pbs_exact")).splitlines()
    assert table[0].split() == ["name", "route", "calls", "traces", "reason"]
    assert len(table) == 4 and table[1].startswith("pbs_exact  sdpa")
    integration.register("pbs_exact", config=EXACT, min_tokens=MIN_TOKENS)
    assert integration.routes("pbs_exact") == []


def test_routes_keeps_names_apart():
    model = build("llama")
    logits(model, tokens())
    logits(model, tokens(), "pbs_sparse")
    assert [c.name for c in integration.routes("pbs_sparse")] == ["pbs_sparse"]
    assert {c.name for c in integration.routes()} >= {"pbs_exact", "pbs_sparse"}


def padded(model):
    mask = torch.ones(1, NUM_TOKENS, dtype=torch.long)
    mask[:, :9] = 0
    return logits(model, tokens(), attention_mask=mask)


def padded_inside(model):
    mask = torch.ones(1, NUM_TOKENS, dtype=torch.long)
    mask[:, 9:12] = 0
    return logits(model, tokens(), attention_mask=mask)


def in_a_static_cache(model):
    cache = transformers.StaticCache(config=model.config, max_cache_len=NUM_TOKENS + 9)
    return logits(model, tokens(), **{CACHE: cache})


def with_gradients(model):
    return model(tokens()).logits


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (padded_inside, "padding"),
        (in_a_static_cache, "static cache"),
        (with_gradients, "gradients"),
    ],
)
def test_a_long_prompt_that_goes_dense_says_so_once(call, word):
    model = build("llama")
    assert foreseen(model) == ["pbs", "pbs"]
    with pytest.warns(UserWarning, match=rf"instead of PBS.*{word}.*routes\(\)"):
        call(model)
    assert taken() == {"sdpa": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(model)


@pytest.mark.parametrize("family", ["mistral_sliding", "head_dim_80", "gemma2"])
def test_what_explain_calls_dense_goes_dense_in_silence(family):
    model = build(family)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*instead of PBS")
        padded(model)
        logits(model, tokens())
        model.eval()(tokens()[:, :100])
        model.train()(tokens())


# Devices of layers, and caches in pages


def test_explain_knows_where_an_offloaded_layer_computes():
    accelerate = pytest.importorskip("accelerate")
    model = build("llama")
    expected = logits(model, tokens(), "sdpa")
    model.set_attn_implementation("pbs_exact")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    assert foreseen(model) == ["pbs", "pbs"]
    assert_same(logits(model, tokens()), expected)
    assert taken() == {"pbs": 2}


def test_explain_of_a_model_without_weights():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(build("llama").config).eval()
    model.set_attn_implementation("pbs_exact")
    assert all("device meta" in layer.reason for layer in integration.explain(model, NUM_TOKENS))


def test_continuous_batching_is_refused_in_our_words():
    model = build("llama")
    options = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=2)
    with pytest.raises(ValueError, match=r"^attn_implementation must be transformers' own for"):
        model.generate_batch(inputs=[[3, 4, 5]], generation_config=options)


class PagedAttentionCache:
    """A class with the name of the cache of continuous batching."""


def test_call_with_a_cache_in_pages():
    layer = CrossAttention().eval()
    query, key, value = torch.randn(3, 1, 2, 200, 64)
    function = transformers.AttentionInterface()["pbs_exact"]
    with pytest.raises(ValueError, match="in pages"):
        function(layer, query, key, value, None, is_causal=True, cache=PagedAttentionCache())
    out, _ = function(layer, query, key, value, None, is_causal=True, cache=object())
    assert out.shape == (1, 200, 2, 64) and taken() == {"unsupported": 1, "pbs": 1}
