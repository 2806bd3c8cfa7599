"""Attention of packed sequences, and of sequences in pages that do not change, on the CPU: against
the float64 reference, and against `attention` of each sequence."""

import pytest
import reference_sequences as ref_seq
import torch
from cases import DTYPES
from pages import LAYOUTS, Pages, cu_seqlens
from sequence_cases import (
    SETTINGS,
    SMALL,
    Ragged,
    assert_same,
    assert_sequences,
    draw,
    in_pages,
    lengths_for,
    options_of,
    settled,
)
from test_stages import leave_ones_behind

import pbs_attn
from pbs_attn import PBSConfig

ops = torch.ops.pbs
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_cases_leave_keys_out(name):
    every = SETTINGS[name]._replace(threshold=1.0)
    tensors, sequences = settled(name, torch.float32)
    dense = ref_seq.attention_varlen(*tensors.packed, **options_of(every))
    visited, visible = (sum(s.visited.sum() for s in found) for found in (sequences, dense))
    assert visited < 0.98 * visible


@every_dtype
@pytest.mark.parametrize("name", SETTINGS)
def test_varlen_against_float64(name, dtype):
    tensors, sequences = settled(name, dtype)
    leave_ones_behind(tensors.packed[0])
    out = ops.attention_varlen(*tensors.packed, **options_of(SETTINGS[name]))
    assert_sequences(out, sequences, SETTINGS[name].scale)


@every_dtype
@pytest.mark.parametrize(("page_size", "layout"), [(16, "nhd"), (48, "hnd"), (256, "apart")])
@pytest.mark.parametrize("name", ["small", "balanced", "not causal", "paper"])
def test_paged_against_float64(name, page_size, layout, dtype):
    tensors, _ = settled(name, dtype)
    operands = in_pages(tensors, page_size, layout)
    before = [x.clone() for x in operands]
    leave_ones_behind(operands[0])
    out = ops.attention_paged(*operands, **options_of(SETTINGS[name]))
    sequences = ref_seq.attention_paged(*operands, **options_of(SETTINGS[name]))
    assert_sequences(out, sequences, SETTINGS[name].scale)
    assert_same(operands, before)


@every_dtype
@pytest.mark.parametrize("name", SETTINGS)
def test_varlen_is_attention_of_each_sequence(name, dtype):
    options = options_of(SETTINGS[name])
    tensors = draw(SETTINGS[name], lengths_for(SETTINGS[name]), dtype)
    out = ops.attention_varlen(*tensors.packed, **options)
    alone = [
        ops.attention(*map(ref_seq.as_batch, qkv), **options)[0].transpose(0, 1)
        for qkv in zip(*tensors, strict=True)
    ]
    assert_same([out], [torch.cat(alone)])


@every_layout
@pytest.mark.parametrize("page_size", [16, 48, 256, 512])
@pytest.mark.parametrize("name", SETTINGS)
def test_paged_is_varlen(name, page_size, layout):
    options = options_of(SETTINGS[name])
    tensors = draw(SETTINGS[name], lengths_for(SETTINGS[name]), torch.bfloat16)
    out = ops.attention_paged(*in_pages(tensors, page_size, layout), **options)
    assert_same([out], [ops.attention_varlen(*tensors.packed, **options)])


@pytest.mark.parametrize("lengths", [(), ((0, 0),), ((0, 0), (0, 5)), ((1, 1),)], ids=str)
def test_few_sequences(lengths):
    """Calls with no sequences, and with no queries."""
    tensors = draw(SMALL, [(0, 0), *lengths], torch.float32)
    tensors = Ragged(*(x[1:] for x in tensors))
    nothing = torch.empty(0, 4, 64), torch.empty(0, 2, 64), torch.empty(0, 2, 64)
    packed = (*nothing, *[cu_seqlens([])] * 2) if not lengths else tensors.packed
    num_queries = sum(num_queries for num_queries, _ in lengths)
    out = ops.attention_varlen(*packed, **options_of(SMALL))
    assert out.shape == (num_queries, 4, 64)
    pages = Pages([num_keys for _, num_keys in lengths], 2, 64, torch.float32, 64)
    for n, (k, v) in enumerate(zip(tensors.k, tensors.v, strict=True)):
        pages.write(n, 0, k, v)
    seq_lens = torch.tensor([num_keys for _, num_keys in lengths], dtype=torch.int64)
    lengths = packed[3], seq_lens, pages.table
    assert_same([ops.attention_paged(packed[0], pages.k, pages.v, *lengths)], [out])
    found, before = torch.full_like(out, torch.nan), pages.clone()
    ops.attention_paged_(packed[0], pages.k, pages.v, found, *lengths, **options_of(SMALL))
    assert_same([found, pages.k, pages.v], [out, before.k, before.v])


def test_memory_order_of_the_output():
    """The output has the memory order of q if q has no gaps. q, k and v also come from one
    projection."""
    rows = torch.randn(200, 4 + 2 + 2, 64)
    q, k, v = rows.split([4, 2, 2], 1)
    cu = cu_seqlens([120, 80])
    want = ops.attention_varlen(*(x.contiguous() for x in (q, k, v)), cu, cu)
    assert_same([ops.attention_varlen(q, k, v, cu, cu)], [want])
    by_head = q.transpose(0, 1).contiguous().transpose(0, 1)
    out = ops.attention_varlen(by_head, k, v, cu, cu)
    assert out.stride() == by_head.stride()
    assert_same([out], [want])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_of_both_dtypes(dtype):
    tensors = draw(SMALL, lengths_for(SMALL), torch.float32)
    q, k, v, cu_q, cu_k = tensors.packed
    want = ops.attention_varlen(q, k, v, cu_q, cu_k)
    assert_same([ops.attention_varlen(q, k, v, cu_q.to(dtype), cu_k.to(dtype))], [want])
    q, k, v, cu_q, seq_lens, table = in_pages(tensors, 64, "nhd")
    found = ops.attention_paged(q, k, v, cu_q.to(dtype), seq_lens.to(dtype), table)
    assert_same([found], [want])


@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_python_functions(preset):
    """They pass on every argument, and the settings of a config."""
    config = getattr(PBSConfig, preset)()
    tensors = draw(SMALL, [(300, 600), (290, 290)], torch.float32)
    operands = in_pages(tensors, 256, "nhd")
    for is_causal in (True, False):
        call = {"is_causal": is_causal, "scale": 0.2}
        options = call | config.op_kwargs()
        want = ops.attention_varlen(*tensors.packed, **options)
        assert_same([pbs_attn.attention_varlen(*tensors.packed, **call, config=config)], [want])
        assert_same([pbs_attn.attention_paged(*operands, **call, config=config)], [want])
    q, k, v, *lengths = operands
    results = []
    for run, options in (
        (pbs_attn.attention_paged_, {"config": config}),
        (ops.attention_paged_, config.op_kwargs()),
    ):
        tensors = k.clone(), v.clone(), torch.full_like(q, torch.nan)
        assert run(q, *tensors, *lengths, scale=0.2, **options) is None
        results.append(tensors)
    assert_same(*results)
    assert not torch.equal(results[0][0], k)
