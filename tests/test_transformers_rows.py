"""pbs_attn.transformers on padded and packed batches. Each sequence takes the op by itself, as it
would alone, and each forward reads the mask once. The mask is made only if a layer needs it."""

import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="4.56")

from hf_models import (  # noqa: E402
    CACHE,
    FAMILIES,
    HAS_CACHE_POSITION,
    MIN_TOKENS,
    NUM_TOKENS,
    assert_same,
    build,
    logits,
    registered,  # noqa: F401  a fixture for every test
    tokens,
)
from transformers import masking_utils  # noqa: E402

import pbs_attn._hf_mask as mask_module  # noqa: E402
import pbs_attn.transformers as integration  # noqa: E402
from pbs_attn._hf_rows import Row, RowMask, find_rows  # noqa: E402

ROW = "causal prefill of one sequence of a padded or packed batch"
TOO_SHORT = f"fewer than min_tokens={MIN_TOKENS} keys"


@pytest.fixture
def looks(monkeypatch):
    """A list that grows by the number of values of each read, by name."""
    seen, look = [], mask_module.look

    def spy(tensors):
        seen.append({name: tensor.numel() for name, tensor in tensors.items()})
        return look(tensors)

    monkeypatch.setattr(mask_module, "look", spy)
    return seen


@pytest.fixture
def made(monkeypatch):
    """A list that grows by the shape of each explicit mask."""
    shapes, make = [], masking_utils.sdpa_mask

    def spy(*args, **kwargs):
        mask = make(*args, **kwargs)
        shapes.append(tuple(mask.shape))
        return mask

    monkeypatch.setattr(masking_utils, "sdpa_mask", spy)
    return shapes


def counts(name="pbs_exact"):
    return {(c.route, c.reason): c.calls for c in integration.routes(name)}


def spans_mask(*spans, length=NUM_TOKENS):
    """(B, length): 1 from begin to end of each row."""
    mask = torch.zeros(len(spans), length, dtype=torch.long)
    for row, (begin, end) in zip(mask, spans, strict=True):
        row[begin:end] = 1
    return mask


def positions_of(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def make_mask(attention_mask=None, sequence_ids=None, num_queries=NUM_TOKENS):
    """The result of the registered mask function, called as the installed transformers calls it."""
    batch_size = len(attention_mask if sequence_ids is None else sequence_ids)
    kv_length = NUM_TOKENS
    offset = kv_length - num_queries
    if HAS_CACHE_POSITION:
        queries = {"cache_position": torch.arange(offset, kv_length)}
    else:
        queries = {"q_length": num_queries, "q_offset": offset, "device": "cpu"}
    if sequence_ids is not None:
        packed = masking_utils.packed_sequence_mask_function(sequence_ids)
        queries["mask_function"] = masking_utils.and_masks(
            masking_utils.causal_mask_function, packed
        )
        queries["allow_is_causal_skip"] = False
    function = transformers.AttentionMaskInterface()["pbs_exact"]
    mask = None if attention_mask is None else attention_mask.bool()
    return function(batch_size=batch_size, kv_length=kv_length, attention_mask=mask, **queries)


class Layer(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 2


def attend(query, key, value, mask=None, name="pbs_sparse", **kwargs):
    function = transformers.AttentionInterface()[name]
    return function(Layer().eval(), query, key, value, mask, **kwargs)[0]


def random_inputs(batch, num_queries=NUM_TOKENS, num_keys=NUM_TOKENS, dtype=torch.float32):
    query = torch.randn(batch, num_queries, 4, 64, dtype=dtype).transpose(1, 2)
    key, value = torch.randn(2, batch, 2, num_keys, 64, dtype=dtype)
    return query, key, value


def assert_rows_are_as_alone(out, rows, query, key, value):
    """Rows are equal bit for bit, and the rest is zero."""
    covered = torch.zeros(out.shape[:2], dtype=torch.bool)
    for batch_idx, begin, end, num_queries in rows:
        last = end - key.shape[2] + query.shape[2]
        one, queries = slice(batch_idx, batch_idx + 1), slice(last - num_queries, last)
        alone = attend(
            query[one, :, queries].contiguous(),
            key[one, :, begin:end].contiguous(),
            value[one, :, begin:end].contiguous(),
        )
        assert torch.equal(out[one, queries], alone)
        assert not covered[one, queries].any()
        covered[one, queries] = True
    assert not out[~covered].any()


PADDED = {
    "left": [(77, NUM_TOKENS), (0, NUM_TOKENS)],
    "right": [(0, 300), (0, NUM_TOKENS), (0, 129)],
    "both": [(40, 350), (77, NUM_TOKENS), (0, 200)],
    "empty row": [(0, 0), (60, NUM_TOKENS)],
    "short row": [(NUM_TOKENS - 50, NUM_TOKENS), (60, NUM_TOKENS), (0, 1)],
}


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDED)
def test_each_padded_row_is_as_alone(padding, looks, made):
    spans = PADDED[padding]
    inputs = random_inputs(len(spans))
    mask = make_mask(spans_mask(*spans))
    out = attend(*inputs, mask)
    rows = [(b, begin, end, end - begin) for b, (begin, end) in enumerate(spans) if end > begin]
    long = sum(end - begin >= MIN_TOKENS for _, begin, end, _ in rows)
    assert counts("pbs_sparse").get(("pbs", ROW)) == long > 0
    assert counts("pbs_sparse").get(("sdpa", TOO_SHORT), 0) == len(rows) - long
    assert_rows_are_as_alone(out, rows, *inputs)
    assert len(looks) == 1 and made == []


@torch.no_grad()
def test_each_packed_sequence_is_as_alone(looks, made):
    lengths = [[150, 20, NUM_TOKENS - 170], [NUM_TOKENS - 200, 199, 1]]
    ids = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(part)) for part in lengths])
    inputs = random_inputs(2)
    out = attend(*inputs, make_mask(sequence_ids=ids))
    assert counts("pbs_sparse") == {("pbs", ROW): 4, ("sdpa", TOO_SHORT): 2}
    rows = [
        (batch_idx, sum(part[:idx]), sum(part[: idx + 1]), part[idx])
        for batch_idx, part in enumerate(lengths)
        for idx in range(3)
    ]
    assert_rows_are_as_alone(out, rows, *inputs)
    assert len(looks) == 1 and made == []


@torch.no_grad()
@pytest.mark.parametrize("num_queries", [100, 64])
def test_a_chunk_of_each_row_is_as_alone(num_queries):
    """The queries are at the end of the keys of their row, wherever that is."""
    spans = [(77, NUM_TOKENS), (0, NUM_TOKENS - 30), (NUM_TOKENS - 80, NUM_TOKENS), (0, 250)]
    inputs = random_inputs(4, num_queries)
    first = NUM_TOKENS - num_queries
    out = attend(*inputs, make_mask(spans_mask(*spans), num_queries=num_queries))
    # The last row ends before the chunk begins.
    rows = [(b, begin, end, end - max(begin, first)) for b, (begin, end) in enumerate(spans[:3])]
    assert_rows_are_as_alone(out, rows, *inputs)
    assert counts("pbs_sparse")["pbs", ROW] == (2 if num_queries == 100 else 1)


@torch.no_grad()
def test_autocast_of_rows():
    inputs = random_inputs(2)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*inputs, make_mask(spans_mask(*PADDED["left"])))
        assert out.dtype == torch.bfloat16
        assert_rows_are_as_alone(
            out, [(0, 77, NUM_TOKENS, NUM_TOKENS - 77), (1, 0, NUM_TOKENS, NUM_TOKENS)], *inputs
        )


@torch.no_grad()
def test_a_batch_of_short_rows_is_dense_at_once(made):
    spans = [(NUM_TOKENS - 50, NUM_TOKENS), (0, 100)]
    inputs = random_inputs(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = attend(*inputs, make_mask(spans_mask(*spans)))
    ((route, reason),) = counts("pbs_sparse")
    assert route == "sdpa" and f"min_tokens={MIN_TOKENS} keys and a block of 64" in reason
    assert made == [(2, 1, NUM_TOKENS, NUM_TOKENS)]
    assert out.isfinite().all()
    for batch_idx, (begin, end) in enumerate(spans):
        part = [tensor[batch_idx : batch_idx + 1, :, begin:end] for tensor in inputs]
        torch.testing.assert_close(out[batch_idx : batch_idx + 1, begin:end], attend(*part))


# Whole models


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2_sliding", "gemma3", "llama4"])
@pytest.mark.parametrize("padding", PADDED)
def test_padded_batch_of_a_model(family, padding, op_layers, looks):
    """Layers with a window get their mask; those without take the op row by row."""
    model = build(family)
    ran = op_layers(model)
    spans = PADDED[padding]
    mask = spans_mask(*spans)
    inputs = {"attention_mask": mask, "position_ids": positions_of(mask)}
    actual = logits(model, tokens(len(spans)), **inputs)
    long = sum(end - begin >= MIN_TOKENS for begin, end in spans)
    assert ran == [
        idx for idx, kind in enumerate(FAMILIES[family][3]) if kind == "pbs" for _ in range(long)
    ]
    # In transformers 4, Llama 4 also makes a mask of chunks, which hold all keys here.
    assert len(looks) == (2 if family == "llama4" and HAS_CACHE_POSITION else 1)
    assert actual.isfinite().all()
    expected = logits(model, tokens(len(spans)), "sdpa", **inputs)
    assert_same(actual[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_packed_batch_of_a_model(family, op_layers, looks, made):
    model = build(family)
    ran = op_layers(model)
    lengths = [150, 20, NUM_TOKENS - 170]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    actual = logits(model, tokens(), position_ids=position_ids, use_cache=False)
    layers = [idx for idx, kind in enumerate(FAMILIES[family][3]) if kind == "pbs"]
    assert ran == [idx for idx in layers for _ in range(2)]
    assert len(looks) == 1 and len(made) == 2 - len(layers)
    parts = [logits(model, part, "sdpa") for part in tokens().split(lengths, dim=1)]
    assert_same(actual, torch.cat(parts, dim=1))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_chunked_prefill_of_a_padded_batch(family, side, op_layers):
    model = build(family)
    ran = op_layers(model)
    mask = spans_mask(*PADDED[side])
    input_ids, position_ids = tokens(len(mask)), positions_of(mask)
    cache = transformers.DynamicCache(config=model.config)
    actual, begin = [], 0
    for end in (200, 330, 400, NUM_TOKENS):
        chunk = {
            "attention_mask": mask[:, :end],
            "position_ids": position_ids[:, begin:end],
            CACHE: cache,
        }
        actual.append(logits(model, input_ids[:, begin:end], use_cache=True, **chunk))
        begin = end
    layers = [idx for idx, kind in enumerate(FAMILIES[family][3]) if kind == "pbs"]
    # A row takes the op in each chunk in which it has a block of queries: one that ends at 129 in
    # the first, one that ends at 300 in two, and the others in three.
    assert len(ran) == len(layers) * {"left": 5, "right": 6}[side]
    inputs = {"attention_mask": mask, "position_ids": position_ids}
    expected = logits(model, input_ids, "sdpa", **inputs)
    assert_same(torch.cat(actual, dim=1)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_from_a_left_padded_batch(num_beams, looks):
    model = build("llama")
    mask = spans_mask((77, NUM_TOKENS), (0, NUM_TOKENS), (NUM_TOKENS - 50, NUM_TOKENS))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "attention_mask": mask}
    actual = model.generate(tokens(3), num_beams=num_beams, **options)
    assert counts() == {
        ("pbs", ROW): 2 * 2 * num_beams,
        ("sdpa", TOO_SHORT): 2 * num_beams,
        ("sdpa", "a decode step has one query"): 2 * 3,
    }
    assert len(looks) == 4, "one a forward, of any number of layers"
    assert all(look["visible"] == 1 for look in looks[1:]), "a decode step needs no rows"
    model.set_attn_implementation("sdpa")
    assert torch.equal(actual, model.generate(tokens(3), num_beams=num_beams, **options))


def test_a_mask_is_made_once_for_the_layers_that_need_it(made):
    model = build("llama", num_hidden_layers=4)
    for idx in (1, 3):  # in training mode, they take SDPA
        model.model.layers[idx].self_attn.train()
    mask = spans_mask(*PADDED["both"])
    inputs = {"attention_mask": mask, "position_ids": positions_of(mask)}
    actual = logits(model, tokens(3), **inputs)
    assert counts()["pbs", ROW] == 2 * 3
    assert made == [(3, 1, NUM_TOKENS, NUM_TOKENS)]
    expected = logits(model, tokens(3), "sdpa", **inputs)
    assert_same(actual[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("holes", ["inside a row", "a sequence in two parts"])
def test_rows_with_holes_take_the_mask(holes):
    inputs = random_inputs(1)
    ids = torch.zeros(1, NUM_TOKENS, dtype=torch.long)
    ids[:, 100:150] = 1
    with torch.no_grad():
        mask = make_mask(1 - ids) if holes == "inside a row" else make_mask(sequence_ids=ids)
        attend(*inputs, mask)
    assert type(mask) is torch.Tensor
    ((route, reason),) = counts("pbs_sparse")
    assert route == "sdpa" and "not plain causal" in reason


@torch.no_grad()
def test_a_mask_of_other_shapes_is_taken_by_its_values():
    """Here it has one row for a batch of two, or covers more tokens than there are keys."""
    inputs = random_inputs(2)
    out = attend(*inputs, make_mask(spans_mask((77, NUM_TOKENS))))
    assert {route for route, _ in counts("pbs_sparse")} == {"sdpa"}
    same = attend(*inputs, make_mask(spans_mask(*[(77, NUM_TOKENS)] * 2)), name="pbs_exact")
    torch.testing.assert_close(out[:, 77:], same[:, 77:])
    longer = torch.arange(NUM_TOKENS + 9)[None] // 200
    assert type(make_mask(sequence_ids=longer)) is torch.Tensor
    assert type(make_mask(sequence_ids=longer[:, :NUM_TOKENS])) is RowMask


def test_grad_mode_gets_an_ordinary_mask():
    """Nothing takes PBS there, and code that wraps a model for training expects an ordinary
    tensor."""
    assert type(make_mask(spans_mask(*PADDED["left"]))) is torch.Tensor
    with torch.no_grad():
        assert type(make_mask(spans_mask(*PADDED["left"]))) is RowMask


# torch.compile


def graph_breaks():
    return sum(torch._dynamo.utils.counters["graph_break"].values())


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_model_takes_the_mask(dynamic):
    """A trace cannot read a mask. It goes dense, with no more graph breaks than SDPA."""
    model = build("llama")
    mask = spans_mask(*PADDED["left"])
    outputs, breaks = {}, {}
    for name in ("sdpa", "pbs_exact"):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model.set_attn_implementation(name)
        compiled = torch.compile(model, backend="eager", dynamic=dynamic)
        outputs[name] = logits(compiled, tokens(2), attention_mask=mask)[mask.bool()]
        breaks[name] = graph_breaks()
    torch.compiler.reset()
    assert breaks["pbs_exact"] == breaks["sdpa"]
    assert {c.route for c in integration.routes("pbs_exact")} == {"sdpa"}
    assert_same(outputs["pbs_exact"], outputs["sdpa"])


def test_compiled_layers_of_a_model_take_the_mask():
    """They get the mask from outside of the trace, and are not traced more often than with a
    tensor."""
    torch.compiler.reset()
    graphs, traces = [], []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    model = build("llama")
    for layer in model.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    for begin in (9, 100, 200):
        mask = spans_mask((begin, NUM_TOKENS), (0, NUM_TOKENS))
        inputs = {"attention_mask": mask, "position_ids": positions_of(mask)}
        actual = logits(model, tokens(2), "pbs_exact", **inputs)
        traces.append(len(graphs))
        assert_same(
            actual[mask.bool()], logits(build("llama", "sdpa"), tokens(2), **inputs)[mask.bool()]
        )
    torch.compiler.reset()
    assert len(set(traces)) == 1 and graphs
    assert {c.route for c in integration.routes("pbs_exact")} == {"sdpa"}


# The mask, and the values that are read from it


@pytest.fixture
def row_mask():
    explicit = torch.ones(4, 4, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    made = []

    def make():
        made.append(explicit.clone())
        return made[-1]

    mask = RowMask((Row(0, 0, 4, 4),), make, explicit.shape, torch.device("cpu"))
    return mask, explicit, made


def test_row_mask_answers_for_its_shape_without_being_made(row_mask):
    mask, explicit, made = row_mask
    assert isinstance(mask, torch.Tensor)
    assert mask.shape == explicit.shape and mask.dim() == mask.ndim == 4 and mask.size(2) == 4
    assert mask.dtype == torch.bool and mask.device == explicit.device
    assert not mask.is_floating_point() and not torch.is_floating_point(mask)
    assert mask.to("cpu", non_blocking=True) is mask.to(dtype=torch.bool) is mask
    moved = mask.to("meta")
    assert moved.rows == mask.rows and moved.is_meta and moved.shape == mask.shape
    assert made == [] and mask.rows is not None
    assert moved.explicit().is_meta


@pytest.mark.parametrize(
    "operation",
    [
        lambda mask: mask[:, :, :, :3],
        lambda mask: mask.float(),
        lambda mask: mask & mask.logical_not(),
        lambda mask: torch.cat([mask, mask]),
        lambda mask: torch.where(mask, 0.0, -1.0),
        lambda mask: mask.data,
        lambda mask: mask.unbind()[1],
        lambda mask: mask.to(torch.float16),
        lambda mask: mask.masked_fill_(mask[:, :, :, :1], False),
        lambda mask: mask.clone().__setitem__(0, False) or mask,
    ],
)
def test_an_operation_on_a_row_mask_gets_an_ordinary_tensor(operation, row_mask):
    mask, explicit, made = row_mask
    actual, expected = operation(mask), operation(explicit)
    assert type(actual) in (torch.Tensor, RowMask)
    assert torch.equal(actual, expected) and len(made) == 1


@pytest.mark.parametrize("compiles", [False, True])
def test_what_writes_to_a_row_mask_is_seen_by_the_next_layer(compiles, row_mask):
    mask, explicit, _ = row_mask

    def change(mask):
        mask[0, 0, 3, 0] = False
        mask[:, :, :, 1:].logical_not_()

    (torch.compile(change, backend="eager", fullgraph=True) if compiles else change)(mask)
    torch.compiler.reset()
    change(explicit)
    assert mask.rows is None and torch.equal(mask.explicit(), explicit)


VISIBLE = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
ALL = torch.ones(1, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("num_queries", "visible", "sequence_ids", "position_ids", "rows"),
    [
        (6, VISIBLE, None, None, [(0, 1, 6, 5), (1, 0, 4, 4)]),
        (3, VISIBLE, None, None, [(0, 1, 6, 3), (1, 0, 4, 1)]),
        (2, VISIBLE, None, None, [(0, 1, 6, 2)]),
        (6, torch.tensor([[1, 1, 0, 1, 1, 1]]).bool(), None, None, None),
        (6, ALL, [[0, 0, 1, 1, 1, 2]], None, [(0, 0, 2, 2), (0, 2, 5, 3), (0, 5, 6, 1)]),
        (6, ALL, [[3, 3, 1, 1, 1, 3]], None, None),
        (6, ALL, [[0, 0, 1, 1, 1, 1]], [[0, 1, 5, 6, 7, 8]], [(0, 0, 2, 2), (0, 2, 6, 4)]),
        (6, ALL, [[0, 0, 1, 1, 1, 1]], [[0, 1, 0, 1, 1, 2]], None),
        (6, VISIBLE[:2], [[9, 0, 0, 1, 1, 1], [0, 0, 0, 1, 9, 9]], None, 4),
    ],
)
def test_find_rows(num_queries, visible, sequence_ids, position_ids, rows):
    sequence_ids = None if sequence_ids is None else torch.tensor(sequence_ids)
    position_ids = None if position_ids is None else torch.tensor(position_ids)
    found = find_rows(num_queries, visible, sequence_ids, position_ids)
    if rows == 4:
        rows = [(0, 1, 3, 2), (0, 3, 6, 3), (1, 0, 3, 3), (1, 3, 4, 1)]
    assert found == (None if rows is None else tuple(rows))
