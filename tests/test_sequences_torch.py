"""The operators of sequences inside torch.compile, torch.export, TorchScript, autocast and torch's
transforms."""

import contextlib
import io

import pytest
import torch
import torch._inductor.config
from sequence_cases import assert_same, sequence_calls
from torch.func import grad, jvp, vmap
from torch.library import opcheck

import pbs_attn
from pbs_attn import PBSConfig
from pbs_attn.ops import SEQUENCE_OPERATORS

PBS = torch.ops.pbs
IN_ORDER = "attention_paged_"
WRITTEN = ("k_cache", "v_cache", "out")
CONFIGS = [
    PBSConfig(block_size=32, segment_size=64, num_heavy=8, window=0, dense_tail=0),
    PBSConfig.fast(),
]
every_operator = pytest.mark.parametrize("op", SEQUENCE_OPERATORS)
every_config = pytest.mark.parametrize("config", CONFIGS, ids=["small", "fast"])


def calls(config=CONFIGS[0], dtype=torch.float32, num_q=300):
    q = torch.randn(1, 4, num_q, 64, dtype=dtype)
    k, v = torch.randn(2, 1, 2, num_q + 69, 64, dtype=dtype)
    return sequence_calls(q, k, v, config)


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def result_of(call, op, tensors, **settings):
    """The returned or written tensors."""
    found = call(*tensors.values(), **settings)
    if op != IN_ORDER:
        return [found]
    assert found is None
    return [tensors[name] for name in WRITTEN]


def expected_of(op, tensors, **settings):
    return result_of(getattr(PBS, op), op, copies(tensors), **settings)


@every_config
@every_operator
def test_opcheck(op, config):
    tensors, settings = calls(config)[op]
    opcheck(getattr(PBS, op).default, tuple(tensors.values()), settings)


@every_operator
def test_fake_kernels(op):
    """Shapes are right with real and with fake lengths, and with the defaults of the schema."""
    tensors, _ = calls(PBSConfig())[op]
    for on_meta in (
        {name: tensor.to("meta") for name, tensor in tensors.items()},
        {name: x if x.dim() == 1 else x.to("meta") for name, x in tensors.items()},
    ):
        found = getattr(PBS, op)(**on_meta)
        if op == IN_ORDER:
            assert found is None
        else:
            assert (found.shape, found.dtype) == (tensors["q"].shape, torch.float32)
            assert found.is_meta


@every_operator
def test_written_tensors_count_a_version(op):
    """A backward that has saved a written tensor raises, as after an in-place operation of
    torch."""
    tensors, settings = calls()[op]
    before = {name: tensor._version for name, tensor in tensors.items()}
    getattr(PBS, op)(**tensors, **settings)
    changed = {name for name, tensor in tensors.items() if tensor._version != before[name]}
    assert changed == (set(WRITTEN) if op == IN_ORDER else set())


def test_a_backward_does_not_read_pages_that_were_put_in_order():
    tensors, settings = calls()[IN_ORDER]
    weight = torch.ones(64, requires_grad=True)
    product = (tensors["k_cache"] * weight).sum()
    PBS.attention_paged_(**tensors, **settings)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@torch._inductor.config.patch(force_disable_caches=True)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@every_operator
def test_compiled_without_a_break(op, backend):
    """The Python functions, between operations of torch."""
    tensors, _ = calls()[op]
    function = getattr(pbs_attn, op)

    def layer(q, *others):
        found = function(q * 2.0, *others, config=CONFIGS[0])
        return found if found is None else found * 0.5

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    want = result_of(layer, op, copies(tensors))
    assert_same(result_of(compiled, op, copies(tensors)), want)


@every_operator
def test_one_graph_for_all_lengths(op):
    frames = []

    def counting_backend(graph, example_inputs):
        frames.append(graph)
        return graph.forward

    function = getattr(pbs_attn, op)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counting_backend)
    for num_q in (300, 400, 511):
        tensors, _ = calls(PBSConfig(), num_q=num_q)[op]
        assert_same(result_of(compiled, op, copies(tensors)), expected_of(op, tensors))
    assert len(frames) == 1


class Layer(torch.nn.Module):
    """All three on the same queries."""

    def forward(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
    ) -> torch.Tensor:
        alone = torch.ops.pbs.attention_varlen(q, out, out, cu_seqlens_q, cu_seqlens_q)
        paged = torch.ops.pbs.attention_paged(
            q, k_cache, v_cache, cu_seqlens_q, seq_lens, block_table, threshold=0.1
        )
        torch.ops.pbs.attention_paged_(
            q, k_cache, v_cache, out, cu_seqlens_q, seq_lens, block_table, segment_size=256
        )
        return alone + paged + out


def assert_same_layer(found):
    tensors, _ = calls(PBSConfig())[IN_ORDER]
    first, second = copies(tensors), copies(tensors)
    assert_same([found(*first.values())], [Layer()(*second.values())])
    assert_same(first.values(), second.values())


def test_export_round_trip():
    tensors, _ = calls(PBSConfig())[IN_ORDER]
    program = torch.export.export(Layer(), tuple(copies(tensors).values()))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    assert_same_layer(torch.export.load(buffer).module())


def test_jit_script_save_and_load():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Layer()), buffer)
    buffer.seek(0)
    assert_same_layer(torch.jit.load(buffer))


def test_autocast_casts_tokens_but_no_pages():
    """Pages are a cache, not an operand of one call, so they and `out` keep their dtype."""
    many, few = calls(), calls(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for op in SEQUENCE_OPERATORS:
            tensors, settings = few[op]
            want = expected_of(op, tensors, **settings)
            tensors = copies(tensors) | {"q": tensors["q"].float()}
            assert_same(result_of(getattr(PBS, op), op, tensors, **settings), want)
            tensors, settings = many[op]
            if op == "attention_varlen":
                assert getattr(PBS, op)(**tensors, **settings).dtype == torch.bfloat16
                continue
            with pytest.raises(RuntimeError, match=r"k_cache must have the dtype of q \(bfloat16"):
                getattr(PBS, op)(**tensors, **settings)


@every_operator
def test_inference_mode_and_no_grad(op):
    tensors, settings = calls()[op]
    want = expected_of(op, tensors, **settings)
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            given = copies(tensors)
            assert_same(result_of(getattr(PBS, op), op, given, **settings), want)
    with torch.inference_mode():
        given = copies(tensors)
    # Tensors without a version counter, outside of the mode that made them.
    assert_same(result_of(getattr(PBS, op), op, given, **settings), want)


@every_operator
def test_derivatives_are_refused_for_every_tensor(op):
    tensors, settings = calls()[op]
    function = getattr(PBS, op)

    def scalar_of(name):
        def scalar(x):
            result = result_of(function, op, {**tensors, name: x}, **settings)
            return torch.stack([part.sum() for part in result]).sum()

        return scalar

    for name in [name for name, tensor in tensors.items() if tensor.is_floating_point()]:
        leaf = tensors[name].clone().requires_grad_()
        no_backward = rf"pbs::{op} has no backward: .*; wrap the call in torch\.no_grad\(\)"
        with pytest.raises(RuntimeError, match=no_backward):
            function(**{**tensors, name: leaf}, **settings)
        with torch.no_grad():
            function(**{**tensors, name: leaf}, **settings)
        with pytest.raises(RuntimeError, match=f"pbs::{op} has no backward"):
            grad(scalar_of(name))(tensors[name])
        with pytest.raises(RuntimeError, match=f"pbs::{op} has no derivative"):
            jvp(scalar_of(name), (tensors[name],), (tensors[name],))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", SEQUENCE_OPERATORS[:2])
def test_vmap_is_torchs_own_loop(op):
    tensors, settings = calls()[op]
    function = getattr(PBS, op)
    q = torch.stack([tensors["q"], tensors["q"] * 2])
    others = list(tensors.values())[1:]
    found = vmap(lambda x: function(x, *others, **settings))(q)
    for n in range(2):
        assert_same([found[n]], [function(q[n], *others, **settings)])


def test_vmap_refuses_what_writes():
    tensors, settings = calls()[IN_ORDER]
    before = copies(tensors)
    stacked = [torch.stack([x, x]) for x in tensors.values()]
    with pytest.raises(
        RuntimeError, match="Batching rule not implemented for pbs::attention_paged_"
    ):
        vmap(lambda *given: PBS.attention_paged_(*given, **settings))(*stacked)
    assert_same(tensors.values(), before.values())
    for pair, tensor in zip(stacked, tensors.values(), strict=True):
        assert_same(pair, [tensor, tensor])


@every_operator
def test_one_compiled_function_in_every_mode(op):
    tensors, settings = calls()[op]
    want = expected_of(op, tensors, **settings)
    function = torch.compile(
        lambda *given: getattr(PBS, op)(*given, **settings), backend="aot_eager"
    )
    for mode in (contextlib.nullcontext(), torch.no_grad(), torch.inference_mode()):
        with mode:
            assert_same(result_of(function, op, copies(tensors)), want)
    leaf = tensors["q"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"pbs::{op} has no backward"):
        function(leaf, *list(copies(tensors).values())[1:])
