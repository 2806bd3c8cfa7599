"""Misuse of the operators of sequences: an exception in the user's words."""

import pytest
import torch
from sequence_cases import sequence_calls
from test_errors import rejects

import pbs_attn
from pbs_attn import PBSConfig
from pbs_attn.ops import HEAD_DIMS, SEQUENCE_OPERATORS

PBS = torch.ops.pbs
PAGED = SEQUENCE_OPERATORS[1:]
IN_ORDER = "attention_paged_"


@pytest.fixture
def calls():
    """Tensors by name of one call of each operator: sequences of 1 query and 70 keys, and of 299
    and 299, in 3 pages."""
    q = torch.randn(1, 4, 300, 64)
    k, v = torch.randn(2, 1, 2, 369, 64)
    return {op: tensors for op, (tensors, _) in sequence_calls(q, k, v, PBSConfig()).items()}


def refuses(message, calls, ops=SEQUENCE_OPERATORS, settings=None, **changes):
    """Checks that every operator with these arguments refuses the changed tensors, which are
    functions of the original ones."""
    took_part = [op for op in ops if changes.keys() <= calls[op].keys()]
    assert took_part
    for op in took_part:
        changed = {name: change(calls[op][name]) for name, change in changes.items()}
        rejects(message, getattr(PBS, op), **{**calls[op], **changed}, **settings or {})


def replaced(index, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


def test_calls_are_right(calls):
    for op, tensors in calls.items():
        getattr(PBS, op)(**tensors)


@pytest.mark.parametrize("op", SEQUENCE_OPERATORS)
def test_devices(calls, op):
    for name, tensor in calls[op].items():
        is_length = name in ("cu_seqlens_q", "cu_seqlens_k", "seq_lens")
        message = f"{name} must be on the CPU, got meta" if is_length else "must be on one device, "
        rejects(message, getattr(PBS, op), **{**calls[op], name: tensor.to("meta")})


def test_lengths_of_real_tensors_on_meta_compile_to_an_error(calls):
    q, k, v, cu_q, cu_k = calls["attention_varlen"].values()
    compiled = torch.compile(
        lambda *tensors: PBS.attention_varlen(*tensors), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(RuntimeError, match="cu_seqlens_k must be on the CPU, got meta"):
        compiled(q, k, v, cu_q, cu_k.to("meta"))


def test_mixed_dtypes(calls):
    half = torch.Tensor.half
    refuses(r"k must have the dtype of q \(float32\), got float16", calls, k=half)
    refuses(r"v must have the dtype of q \(float32\), got float16", calls, v=half)
    refuses(r"k_cache must have the dtype of q \(float32\), got float16", calls, k_cache=half)
    refuses(r"v_cache must have the dtype of q \(float32\), got float16", calls, v_cache=half)
    refuses(r"out must have the dtype of q \(float32\), got float16", calls, out=half)
    refuses("block_table must be int32, got int64", calls, block_table=torch.Tensor.long)
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seq_lens"):
        for dtype, said in ((torch.float32, "float32"), (torch.int16, "int16")):
            message = f"{name} must be int32 or int64, got {said}"
            refuses(message, calls, **{name: lambda x, dtype=dtype: x.to(dtype)})


@pytest.mark.parametrize("head_dim", [32, 80, 512])
def test_head_dim(calls, head_dim):
    head_dims = f"{', '.join(map(str, HEAD_DIMS[:-1]))} or {HEAD_DIMS[-1]}"
    message = f"q must have a head_dim of {head_dims}, got {head_dim}"
    refuses(message, calls, q=lambda x: x.new_zeros(*x.shape[:2], head_dim))


def test_shapes(calls):
    def first(x):
        return x[0]

    def one_more(x):
        return torch.cat([x, x[:1]])

    refuses(r"q must have 3 dimensions \(tokens, heads, head_dim\), got 2", calls, q=first)
    refuses(r"k must have 3 dimensions .*, got 2", calls, k=first)
    refuses(r"v must have 3 dimensions .*, got 2", calls, v=first)
    pages = r"4 dimensions \(pages, page_size, heads, head_dim\), got 3"
    refuses(f"k_cache must have {pages}", calls, k_cache=first)
    refuses(f"v_cache must have {pages}", calls, v_cache=first)
    refuses(r"out must have 3 dimensions .*, got 2", calls, out=first)
    refuses(r"k must have size 64 in dimension 2 \(head_dim of q\)", calls, k=lambda x: x[..., 1:])
    message = r"k_cache must have size 64 in dimension 3 \(head_dim of q\)"
    refuses(message, calls, k_cache=lambda x: x[..., 1:])
    refuses(r"v must have the shape of k \(369, 2, 64\), got \(370, 2, 64\)", calls, v=one_more)
    refuses(r"v_cache must have the shape of k_cache \(\d, 256, 2, 64\)", calls, v_cache=one_more)
    refuses(r"out must have the shape of q \(300, 4, 64\), got \(301, 4, 64\)", calls, out=one_more)
    refuses(r"out must have the shape of q", calls, out=lambda x: x[:, :3])
    for keys, ops in (("k", SEQUENCE_OPERATORS[:1]), ("k_cache", PAGED)):
        message = rf"q must have a multiple of the heads of {keys} \(2\), got 3"
        refuses(message, calls, ops, q=lambda x: x[:, :3])
        message = rf"q must have a multiple of the heads of {keys} \(0\), got 4"
        refuses(message, calls, ops, **{keys: lambda x: x[..., :0, :]})
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seq_lens"):
        message = rf"{name} must have 1 dimensions \(sequences\), got 2"
        refuses(message, calls, **{name: lambda x: x[None]})
    refuses(r"block_table must have 2 dimensions \(sequences, pages\)", calls, block_table=first)
    message = r"must have size 2 in dimension 0 \(sequences of cu_seqlens_q\), got \(3"
    refuses(f"seq_lens {message}", calls, seq_lens=one_more)
    refuses(f"block_table {message}", calls, block_table=one_more)


def test_more_rows_than_fit_31_bits(calls):
    def huge(x):
        return x[:1, :16].expand(2**27, -1, *x.shape[2:])

    message = "must have fewer than 2\\^31 rows, got 2147483648"
    refuses(f"k_cache {message}", calls, k_cache=huge, v_cache=huge)
    rows = {name: lambda x: x[:1].expand(2**31, -1, -1) for name in ("k", "v")}
    refuses(f"k {message}", calls, **rows)


def test_strides(calls):
    def far(x):
        return x.repeat_interleave(2, -1)[..., ::2]

    for name in ("q", "k", "v", "k_cache", "v_cache", "out", "block_table"):
        message = f"{name} must be contiguous in its last dimension, got stride 2"
        refuses(message, calls, **{name: far})
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seq_lens"):
        message = f"{name} must be contiguous, got a strided view"
        refuses(message, calls, **{name: far})


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_cu_seqlens(calls, name):
    rows = calls["attention_varlen"][name][-1].item()
    tensor = name[-1]
    refuses(f"{name} must begin with 0, got 1", calls, **{name: replaced(0, 1)})
    refuses(f"{name} must begin with 0, got nothing", calls, **{name: lambda x: x[:0]})
    message = f"{name} must not decrease, got {rows} after {rows + 1}"
    refuses(message, calls, **{name: replaced(1, rows + 1)})
    message = rf"{name} must end with the rows of {tensor} \({rows}\), got"
    refuses(f"{message} 1000", calls, **{name: replaced(-1, 1000)})
    refuses(f"{message} 0", calls, **{name: lambda x: x[:1]})


def test_lengths(calls):
    longer = torch.tensor([0, 1, 2, 369])
    message = r"cu_seqlens_k must have the size of cu_seqlens_q \(3\), got 4"
    refuses(message, calls, cu_seqlens_k=lambda x: longer)
    message = r"must give sequence 1 as many keys as queries \(299\) or more, got 298"
    refuses(f"cu_seqlens_k {message}", calls, cu_seqlens_k=replaced(1, 71))
    refuses(f"seq_lens {message}", calls, seq_lens=replaced(1, 298))
    message = r"seq_lens must give sequence 0 as many keys as queries \(1\) or more, got -5"
    refuses(message, calls, seq_lens=replaced(0, -5))


def test_a_sequence_without_queries_has_its_lengths_checked_too(calls):
    ends = torch.tensor([0, 0, 300])
    message = r"seq_lens must give sequence 0 as many keys as queries \(0\) or more, got -1"
    refuses(message, calls, cu_seqlens_q=lambda x: ends, seq_lens=replaced(0, -1))


def test_block_table(calls):
    table = calls[IN_ORDER]["block_table"]
    num_pages = len(calls[IN_ORDER]["k_cache"])
    message = "block_table must have 2 pages for the 299 keys of sequence 1, got 1"
    refuses(message, calls, block_table=lambda x: x[:, :1])
    for bad in (-1, num_pages, 2**31 - 1):
        message = f"block_table must hold pages from 0 to {num_pages - 1}, got {bad}"
        refuses(message, calls, block_table=replaced((1, 1), bad))
    # The others are not read.
    assert table[0, 1] < 0 or table[0, 1] >= num_pages


@pytest.mark.parametrize("page_size", [0, 8, 24, 257])
def test_page_size(calls, page_size):
    def change(x):
        return x.new_zeros(8, page_size, *x.shape[2:])

    message = f"k_cache must have a page_size that is a multiple of 16, got {page_size}"
    refuses(message, calls, k_cache=change, v_cache=change)


@pytest.mark.parametrize(
    ("page_size", "segment_size"), [(128, 256), (48, 256), (768, 256), (768, 384), (256, 384)]
)
def test_page_size_for_an_order(calls, page_size, segment_size):
    def change(x):
        return x.new_zeros(16, page_size, *x.shape[2:])

    message = (
        r"k_cache must have a page_size that is a power of two and a multiple of segment_size "
        rf"\({segment_size}\) for pages that are put in order, got {page_size}"
    )
    changes = {"k_cache": change, "v_cache": change, "block_table": lambda x: x.new_zeros(2, 8)}
    refuses(message, calls, [IN_ORDER], {"segment_size": segment_size}, **changes)
    tensors = {**calls["attention_paged"]}
    tensors |= {name: changed(tensors[name]) for name, changed in changes.items()}
    PBS.attention_paged(**tensors, segment_size=segment_size)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_causal": False}, "is_causal must be true .*, got false"),
        ({"score": "mean", "mass": "causal"}, 'score must be "sampled" .*, got "mean"'),
        ({"permute_per": "query_head"}, 'permute_per must be "kv_head" .*, got "query_head"'),
    ],
)
def test_what_keeps_no_order(calls, settings, message):
    message = message.replace(".*", "for pages that are put in order")
    refuses(message, calls, [IN_ORDER], settings)
    PBS.attention_paged(**calls["attention_paged"], **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.9}, r"threshold must lie in \(0, 0.5\] or be 1 .*, got 0.9"),
        ({"block_size": 48}, "block_size must be 32, 64 or 128, got 48"),
        ({"segment_size": 192}, r"segment_size must be a positive multiple of block_size \(128\)"),
        ({"num_samples": 0}, r"num_samples must lie in \[1, 128\], got 0"),
        ({"mass": "all"}, "mass must be .*, got .all."),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
    ],
)
def test_settings(calls, settings, message):
    refuses(message, calls, settings=settings)


def test_keys_and_values_of_the_queries(calls):
    operands = calls["attention_paged_"]
    q = operands["q"]
    num_heads = operands["k_cache"].shape[2]
    k = q[:, :num_heads].clone()

    def refuses(message, k, v):
        rejects(message, PBS.attention_paged_, **operands, k=k, v=v)

    refuses("k and v must be given together, got k alone", k, None)
    refuses("k and v must be given together, got v alone", None, k)
    refuses("v must have the dtype of q .float32., got float16", k, k.half())
    refuses("k must have 3 dimensions .tokens, heads, head_dim., got 4", k[None], k)
    refuses(f"k must have size {len(q)} in dimension 0 .rows of q., got", k[1:], k[1:])
    refuses(f"k must have size {num_heads} in dimension 1 .heads of k_cache., got", q, q)
    refuses(r"v must have the shape of k \(", k, k[1:])


def test_keys_of_the_queries_that_lie_in_the_pages(calls):
    """Pages are sorted while they are still read."""
    operands = calls["attention_paged_"]
    num_queries = len(operands["q"])
    k, v = (operands[name].flatten(0, 1)[:num_queries] for name in ("k_cache", "v_cache"))
    apart = k.clone()
    for pair, message in (
        ((k, apart), "k must share no memory with k_cache"),
        ((v, apart), "k must share no memory with v_cache"),
        ((apart, k), "v must share no memory with k_cache"),
        ((apart, v), "v must share no memory with v_cache"),
    ):
        given = dict(zip("kv", pair, strict=True))
        rejects(message, PBS.attention_paged_, **operands, **given)
    out = operands["out"]
    for name in "kv":
        given = {"k": apart, "v": apart, name: out[:, : k.shape[1]]}
        message = f"out must share no memory with {name}, got 0 bytes"
        rejects(message, PBS.attention_paged_, **operands, **given)


def test_out_of_rows_in_one_place(calls):
    operands = calls["attention_paged_"]
    for dim in (0, 1):
        out = operands["out"].narrow(dim, 0, 1).expand_as(operands["out"])
        message = f"out must have memory for each row, got stride 0 in dimension {dim}"
        rejects(message, PBS.attention_paged_, **operands | {"out": out})


@pytest.mark.parametrize("op", ["attention_paged", "attention_paged_"])
def test_lengths_that_are_none_of_tokens(calls, op):
    for length in (2**31, 2**63 - 1):
        lengths = torch.full_like(calls[op]["seq_lens"], 1000, dtype=torch.int64)
        lengths[-1] = length
        message = f"seq_lens must give sequence 1 fewer than 2\\^31 keys, got {length}"
        rejects(message, getattr(PBS, op), **calls[op] | {"seq_lens": lengths})


@pytest.mark.parametrize("op", ["attention_paged", "attention_paged_"])
def test_a_cache_without_a_page(calls, op):
    none = {name: calls[op][name][:0] for name in ("k_cache", "v_cache")}
    rejects(r"k_cache must have a page, got \(0, ", getattr(PBS, op), **calls[op] | none)


@pytest.mark.parametrize("other", ["q", "k_cache", "v_cache"])
def test_out_that_shares_memory(calls, other):
    operands = calls["attention_paged_"]
    shape = operands["out"].shape
    room = torch.zeros(operands[other].numel() + operands["out"].numel())
    shared = torch.as_strided(room, operands[other].shape, operands[other].contiguous().stride())
    last = shared.numel() - 1
    inside = room[last:][: operands["out"].numel()].view(shape)
    operands = operands | {other: shared}
    message = f"out must share no memory with {other}, got -{4 * last} bytes from its start"
    rejects(message, PBS.attention_paged_, **operands | {"out": inside})
    behind = room[last + 1 :][: operands["out"].numel()].view(shape)
    PBS.attention_paged_(**operands | {"out": behind})


def test_nothing_is_written_where_an_argument_is_wrong(calls):
    tensors = {name: x.clone() for name, x in calls[IN_ORDER].items()}
    wrong = {**tensors, "block_table": replaced((1, 1), 99)(tensors["block_table"])}
    rejects("block_table must hold pages", PBS.attention_paged_, **wrong)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, calls[IN_ORDER][name]), name


@pytest.mark.parametrize("config", [{"threshold": 0.1}, None, "fast", PBSConfig])
@pytest.mark.parametrize("op", SEQUENCE_OPERATORS)
def test_config_of_another_type(calls, op, config):
    message = f"config must be a PBSConfig, got {type(config).__name__}"
    call = getattr(pbs_attn, op)
    rejects(message, call, *calls[op].values(), config=config, error=TypeError)


@pytest.mark.parametrize("op", SEQUENCE_OPERATORS)
def test_cuda_that_is_not_there(calls, op):
    # Redispatching by hand reaches the CUDA registration on a machine without a GPU.
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    no_driver = "the NVIDIA driver must be one for CUDA .* got none"
    is_built = pbs_attn.build_info()["cuda"]
    error = no_driver if is_built else f"{op} has no CUDA kernel: .* CPU-only"
    with pytest.raises(RuntimeError, match=error):
        getattr(PBS, op).default.redispatch(cuda, *calls[op].values())
    assert pbs_attn.has_kernel(op, "cpu")
