"""Every misuse has a defined result: an exception in the user's words, or a correct output."""

import contextlib
import mmap

import pytest
import torch
from cases import operator_calls
from sequence_cases import sequence_calls

import pbs_attn
from pbs_attn import PBSConfig, attention
from pbs_attn.masks import candidate_blocks
from pbs_attn.ops import HEAD_DIMS, OPERATORS, SEQUENCE_OPERATORS

PBS = torch.ops.pbs
LENGTHS = {"cu_seqlens_q", "cu_seqlens_k", "seq_lens"}
every_operator = pytest.mark.parametrize("stage", [*OPERATORS, *SEQUENCE_OPERATORS])


def qkv(num_q=300, num_kv=300, num_q_heads=4, num_kv_heads=2, head_dim=64, dtype=torch.float32):
    q = torch.randn(1, num_q_heads, num_q, head_dim).to(dtype)
    k, v = torch.randn(2, 1, num_kv_heads, num_kv, head_dim).to(dtype)
    return q, k, v


def rejects(message, call, *args, error=RuntimeError, **kwargs):
    with pytest.raises(error, match=message) as caught:
        call(*args, **kwargs)
    assert "must" in str(caught.value)
    assert "got" in str(caught.value)


def stage_calls(dtype=torch.float32):
    """The tensors of a call of every operator, by name."""
    tensors = qkv(dtype=dtype)
    calls = operator_calls(*tensors, PBSConfig.paper()) | sequence_calls(*tensors, PBSConfig())
    return {stage: tensors for stage, (tensors, _) in calls.items()}


def rejects_in_every_mode(message, call, **operands):
    for mode in (
        contextlib.nullcontext(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.inference_mode(),
    ):
        with mode:
            rejects(message, call, **operands)


@pytest.mark.parametrize(
    "dtype",
    [
        *("float64", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
        *("bool", "complex32", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
        *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    ],
)
@every_operator
def test_dtype(stage, dtype):
    # The stable ABI of torch 2.10 has no name for the last dtype.
    said = "another dtype" if dtype == "float8_e8m0fnu" else dtype
    tensors = stage_calls()[stage]
    first = next(iter(tensors))
    operands = dict(tensors)
    for name in operands.keys() - {"perm", "k_mean", "block_mask", "block_table", *LENGTHS}:
        operands[name] = torch.empty_like(tensors[name], dtype=getattr(torch, dtype))
    rule = "float32" if stage == "sort_segments" else "float32, bfloat16 or float16"
    message = f"{first} must be {rule}, got {said}$"
    rejects_in_every_mode(message, getattr(PBS, stage), **operands)


KINDS = {
    "sparse_coo": lambda t: t.to_sparse(),
    "sparse_csr": lambda t: t.to_sparse_csr(dense_dim=t.dim() - 2),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "nested (jagged)": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch: such tensors are in beta, or deprecated
@pytest.mark.parametrize("kind", KINDS)
@every_operator
def test_tensors_that_are_not_dense(stage, kind):
    said = kind.split()[0]
    tensors = stage_calls()[stage]
    for name in tensors.keys() - LENGTHS:  # no kind has one dimension
        tensor = tensors[name]
        operands = {**tensors, name: KINDS[kind](tensor)}
        message = f"{name} must be a dense tensor on the CPU or a CUDA GPU, got {said} on cpu"
        rejects_in_every_mode(message, getattr(PBS, stage), **operands)


@every_operator
def test_none_for_a_tensor(stage):
    # Autocast does not change these. It would refuse pages of float32 first.
    tensors = stage_calls(torch.bfloat16)[stage]
    optional = {"perm", "k_perm"} if stage == "select_blocks" else set()
    for name in tensors.keys() - optional:
        operands = {**tensors, name: None}
        rejects_in_every_mode(f"{name} must be a tensor, got None", getattr(PBS, stage), **operands)


@pytest.mark.parametrize("config", [{"threshold": 0.1}, None, "fast", PBSConfig])
def test_config_of_another_type(config):
    message = f"config must be a PBSConfig, got {type(config).__name__}"
    chosen = pbs_attn.select(*qkv())
    for call, arguments in (
        (attention, qkv()),
        (pbs_attn.select, qkv()),
        (pbs_attn.density, (chosen.block_mask, 300, 300)),
        (candidate_blocks, (300, 300)),
    ):
        rejects(message, call, *arguments, config=config, error=TypeError)


def test_mixed_dtypes():
    q, k, v = qkv()
    rejects(r"k must have the dtype of q \(float32\), got bfloat16", attention, q, k.bfloat16(), v)
    rejects(r"v must have the dtype of k \(float32\), got float16", attention, q, k, v.half())


@pytest.mark.parametrize("head_dim", [32, 80, 512])
def test_head_dim(head_dim):
    head_dims = f"{', '.join(map(str, HEAD_DIMS[:-1]))} or {HEAD_DIMS[-1]}"
    rejects(
        f"q must have a head_dim of {head_dims}, got {head_dim}",
        attention,
        *qkv(head_dim=head_dim),
    )


def test_shapes():
    q, k, v = qkv()
    rejects(r"q must have 4 dimensions .*got 3", attention, q[0], k, v)
    rejects(r"v must have 4 dimensions .*got 3", attention, q, k, v[0])
    rejects(r"k must have size 64 in dimension 3", attention, q, *qkv(head_dim=128)[1:])
    rejects(r"k must have size 1 in dimension 0", attention, q, k.repeat(2, 1, 1, 1), v)
    rejects(r"v must have the shape of k", attention, q, k, v[:, :, :-1])
    rejects(r"q must have a multiple of the heads of k \(2\), got 3", attention, q[:, :3], k, v)
    rejects(r"q must have a multiple of the heads of k \(0\)", attention, q, k[:, :0], v[:, :0])
    rejects(r"q must have no more rows than k \(299\), got 300", attention, q, k[:, :, 1:], v)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_last_dim_must_be_contiguous(position):
    tensors = list(qkv())
    tensors[position] = tensors[position].transpose(2, 3).contiguous().transpose(2, 3)
    name = "qkv"[position]
    rejects(f"{name} must be contiguous in its last dimension, got stride 300", attention, *tensors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            (
                {"threshold": threshold},
                rf"threshold must lie in \(0, 0.5\] or be 1 with mass \"block\", got {threshold:g}",
            )
            for threshold in (0.0, -1.0, 0.9, 1.01, 2.0, float("nan"), float("inf"))
        ),
        *(
            (
                {"threshold": threshold, "mass": mass, "score": "mean"},
                rf"threshold must lie in \(0, 1\], got {threshold:g}",
            )
            for threshold in (0.0, 1.01, 2.0, float("nan"))
            for mass in ("earlier", "causal")
        ),
        ({"block_size": 48}, "block_size must be .*got 48"),
        ({"block_size": 0}, "block_size must be .*got 0"),
        ({"kv_block_size": 256}, "kv_block_size must be .*got 256"),
        ({"segment_size": 192}, r"segment_size must be a positive multiple of block_size \(128\)"),
        ({"segment_size": 0}, "segment_size must be a positive multiple .*got 0"),
        ({"segment_size": -256}, "segment_size must be a positive multiple .*got -256"),
        (
            {"segment_size": 64, "block_size": 64, "kv_block_size": 128},
            r"segment_size must be a positive multiple of kv_block_size \(128\), got 64",
        ),
        ({"num_heavy": -1}, "num_heavy must not be negative, got -1"),
        ({"mass": "all"}, "mass must be .*got .all."),
        ({"mass": "block", "score": "mean"}, "mass must be .* with score .mean., got .block."),
        *(
            ({"mass": mass}, f'mass must be "block" with score "sampled", got "{mass}"')
            for mass in ("earlier", "causal")
        ),
        ({"permute_per": "head"}, "permute_per must be .*got .head."),
        ({"score": "max"}, "score must be .*got .max."),
        ({"window": -1}, "window must not be negative, got -1"),
        ({"dense_tail": -2}, "dense_tail must not be negative, got -2"),
        ({"select_per": "head"}, "select_per must be .*got .head."),
        (
            {"select_per": "kv_head", "score": "mean", "mass": "causal"},
            'select_per must be "query_head" with score "mean", got "kv_head"',
        ),
        (
            {"select_per": "kv_head", "permute_per": "query_head"},
            'select_per must be "query_head" with an order per query head, got "kv_head"',
        ),
        ({"num_samples": 0}, r"num_samples must lie in \[1, .*128.*\], got 0"),
        ({"num_samples": 129}, r"num_samples must lie in \[1, .*128.*\], got 129"),
    ],
)
def test_meaning(arguments, message):
    rejects(message, PBS.attention, *qkv(), **arguments)
    rejects(message, PBSConfig, error=ValueError, **arguments)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e300])
def test_scale(scale):
    rejects("scale must be finite, got", attention, *qkv(), scale=scale)


def test_attention_checks_everything_before_it_works():
    q, k, v = qkv()
    v[:] = float("nan")
    rejects("mass must be", PBS.attention, q, k, v, mass="none")


def test_requires_grad():
    q, k, v = qkv()
    for tensor in (q, k, v):
        tensor.requires_grad_()
        with pytest.raises(RuntimeError, match=r"must not require grad.*torch\.no_grad\(\)"):
            attention(q, k, v)
        with torch.no_grad():
            assert not attention(q, k, v).requires_grad
        with torch.inference_mode():
            attention(q, k, v)
        tensor.requires_grad_(False)


def test_mixed_devices():
    q, k, v = qkv()
    rejects("must be on one device, got cpu and meta", attention, q, k.to("meta"), v)
    rejects("must be on one device, got cpu and meta", attention, q, k, v.to("meta"))


def test_other_operators_check_their_own_arguments():
    q, k, v = qkv()
    chosen = pbs_attn.select(q, k, v)
    rejects("scores must be float32, got float64", PBS.sort_segments, chosen.scores.double())
    rejects(r"scores must have 3 dimensions", PBS.sort_segments, chosen.scores[0])
    rejects("scores must be contiguous", PBS.sort_segments, chosen.scores.transpose(1, 2))
    rejects("segment_size must be positive", PBS.sort_segments, chosen.scores, segment_size=0)
    rejects("perm must be int32, got int64", PBS.permute_kv, k, v, chosen.perm.long())
    rejects("perm must have size 300 in dim", PBS.permute_kv, k, v, chosen.perm[:, :, 1:])
    rejects("k must be float32, bfloat16", PBS.permute_kv, k.double(), v.double(), chosen.perm)
    rejects(
        "k_mean must have size 3 in dimension 2",
        PBS.select_blocks,
        q,
        k,
        chosen.k_mean[:, :, 1:].contiguous(),
    )
    three_heads = chosen.k_mean[:, :1].repeat(1, 3, 1, 1)
    rejects(r"k_mean must have 2 heads .* or 4", PBS.select_blocks, q, k, three_heads)
    attend = (q, k, v, chosen.k_perm, chosen.v_perm)
    rejects("block_mask must be int32", PBS.attend, *attend, chosen.block_mask.long())
    rejects("block_mask must have size 3", PBS.attend, *attend, chosen.block_mask[:, :, 1:])
    rejects(
        "v_perm must have size 2 in dimension 1",
        PBS.attend,
        q,
        k,
        v,
        chosen.k_perm,
        chosen.v_perm.repeat(1, 2, 1, 1),
        chosen.block_mask,
    )


@pytest.mark.parametrize("bad", [-1, 300, 2**31 - 1])
def test_permutation_out_of_range(bad):
    _, k, v = qkv()
    perm = torch.arange(300, dtype=torch.int32).expand(1, 2, 300).clone()
    perm[0, 1, 7] = bad
    rejects(f"perm must hold key rows from 0 to 299, got {bad}", PBS.permute_kv, k, v, perm)


@pytest.mark.parametrize("shape", [(0, 4, 300), (1, 0, 300), (1, 4, 0)])
def test_empty(shape):
    batch, num_heads, num_q = shape
    q = torch.randn(batch, num_heads, num_q, 64)
    k, v = torch.randn(2, batch, 2, 300, 64)
    for config in (PBSConfig(), PBSConfig.fast(), PBSConfig.paper()):
        assert attention(q, k, v, config=config).shape == q.shape
    chosen = pbs_attn.select(q, k, v)
    assert torch.equal(chosen.perm.sort(-1).values, torch.arange(300).expand_as(chosen.perm))


def test_no_keys():
    q, k, v = (t[:, :, :0] for t in qkv())
    assert attention(q, k, v).shape == (1, 4, 0, 64)


def test_nan_input_stays_visible():
    q, k, v = qkv(num_q=700, num_kv=700)
    k[0, 0, 10] = float("nan")
    out = attention(q, k, v)
    assert out[0, :2, 10:].isnan().any()
    assert not out[0, 2:].isnan().any()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_later_values_that_are_not_finite_leave_earlier_rows_alone(bad):
    """If the own segment counts, its block visits everything, as dense attention would."""
    q, k, v = qkv()
    own = slice(256, 290)
    want, dense = (
        attention(q, k, v, config=c) for c in (PBSConfig.paper(), PBSConfig(threshold=1.0))
    )
    by_score = PBSConfig(window=0, dense_tail=0)
    earlier = attention(q, k, v, config=by_score)[:, :, :256]
    k[:, :, 290:] = bad
    v[:, :, 290:] = bad
    assert torch.equal(attention(q, k, v, config=PBSConfig.paper())[:, :, own], want[:, :, own])
    found = attention(q, k, v, config=by_score)
    assert torch.equal(found[:, :, :256], earlier)
    torch.testing.assert_close(found[:, :, own], dense[:, :, own])


def test_extreme_scores_do_not_overflow():
    q, k, v = qkv(num_q=700, num_kv=700)
    out = attention(q * 1e4, k * 1e4, v, config=PBSConfig(threshold=1.0))
    dense = torch.nn.functional.scaled_dot_product_attention(
        q.double() * 1e4, k.double() * 1e4, v.double(), is_causal=True, enable_gqa=True
    )
    # A softmax this sharp picks one key; a near-tie may fall either way after rounding.
    is_close = (out.double() - dense).abs().amax(-1) < 1e-3
    assert out.isfinite().all()
    assert is_close.float().mean() > 0.99


def test_device_without_kernel():
    q, k, v = (t.to("meta") for t in qkv())
    assert attention(q, k, v).device.type == "meta"  # shapes only
    assert not pbs_attn.has_kernel("attention", "xpu")
    assert pbs_attn.has_kernel("attention", "cpu")


@pytest.mark.parametrize("stage", ["score_keys", "attention"])
def test_cuda_that_is_not_there(stage):
    # Redispatching by hand reaches the CUDA registration on a machine without a GPU.
    q, k, v = qkv()
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    args = (q, k) if stage == "score_keys" else (q, k, v)
    no_driver = "the NVIDIA driver must be one for CUDA .* got none"
    error = no_driver if pbs_attn.build_info()["cuda"] else f"{stage} has no CUDA kernel"
    with pytest.raises(RuntimeError, match=error):
        getattr(PBS, stage).default.redispatch(cuda, *args)


def test_autocast_brings_operands_to_one_dtype():
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k.bfloat16(), v)
        chosen = pbs_attn.select(q, k, v)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    assert chosen.k_perm.dtype == torch.bfloat16
    assert chosen.k_mean.dtype == torch.float32


def far_apart(tensor, dim):
    """The same values with a stride of 2^31 + 8 elements in `dim`. Most of the memory is never
    touched."""
    strides = list(tensor.stride())
    strides[dim] = 2**31 + 8
    size = (sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)) + 1) * 2
    no_reserve = 0x4000  # MAP_NORESERVE, which mmap names from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=tensor.dtype)
    return memory.as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
def test_strides_past_31_bits(dim):
    q, k, v = torch.randn(3, 2, 2, 140, 64).bfloat16()
    config = PBSConfig(block_size=32, segment_size=64, window=0, dense_tail=0)
    try:
        far = [far_apart(tensor, dim) for tensor in (q[:, :, 40:].contiguous(), k, v)]
    except OSError:
        pytest.skip("this machine reserves no such range of addresses")
    want = attention(q[:, :, 40:], k, v, config=config)
    assert torch.equal(attention(*far, config=config), want)
    for found, expected in zip(
        pbs_attn.select(*far, config=config),
        pbs_attn.select(q[:, :, 40:], k, v, config=config),
        strict=True,
    ):
        assert torch.equal(found, expected)
