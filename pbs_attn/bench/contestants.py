"""The kernels that run beside those of the library: dense attention of torch and FlashAttention-4,
and two kernels that take lists of blocks."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import pbs_attn

from .layers import dense_attention
from .options import DENSE_KERNELS
from .timing import Call

BLOCK = 128  # rows of the blocks in a list, queries and keys
RECOMPILE_LIMIT = 128
SDPA_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

# query (B, Hq, N, D), key and value (B, Hkv, N, D), scale -> (B, Hq, N, D)
Attention = Callable[..., torch.Tensor]


def sdpa_through(backend: str) -> Attention:
    """Dense causal attention by one backend of torch's SDPA, or by "sdpa", its own choice."""
    if backend == "sdpa":
        return dense_attention

    def attend(q, k, v, scale=None):
        with sdpa_kernel(SDPA_BACKENDS[backend]):
            return dense_attention(q, k, v, scale)

    return attend


def dense_calls(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernels: Sequence[str] = DENSE_KERNELS
) -> dict[str, Call]:
    """Dense causal attention, q (B, Hq, N, D), k and v (B, Hkv, N, D). On a GPU, the calls are
    those of `kernels` that can run here. On a CPU, the only call is torch's SDPA."""
    if not kernels:
        return {}
    if q.device.type == "cpu":
        return {"sdpa_dense": lambda: dense_attention(q, k, v)}
    makers = {"fa4": flash4, "flex": flex_dense}  # the others are backends of SDPA

    def make(kernel: str) -> Call | None:
        if kernel in makers:
            return makers[kernel](q, k, v)
        return functools.partial(sdpa_through(kernel), q, k, v)

    return keep_running({f"{kernel}_dense": make(kernel) for kernel in kernels})


def sparse_calls(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visited: torch.Tensor
) -> dict[str, Call]:
    """Other kernels on the same lists of 128-row blocks. visited (B, Hq, query blocks, key blocks)
    is bool and includes the diagonal. FlexAttention masks the diagonal blocks, FlashAttention-4
    computes them whole."""
    if q.device.type == "cpu":
        return {}
    return keep_running({"fa4_sparse": flash4(q, k, v, visited), "flex": flex(q, k, v, visited)})


def flash4(q, k, v, visited: torch.Tensor | None = None) -> Call | None:
    """FlashAttention-4 on the visited blocks, or dense and causal without them. Returns None if it
    is not installed."""
    try:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import _flash_attn_fwd
    except ImportError:
        return None
    tokens_first = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    if visited is None:
        return lambda: _flash_attn_fwd(*tokens_first, causal=True)
    counts, indices = as_lists(visited)
    lists = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=torch.zeros_like(indices),
        full_block_cnt=counts,
        full_block_idx=indices,
        block_size=(BLOCK, BLOCK),
    )
    return lambda: _flash_attn_fwd(*tokens_first, causal=False, block_sparse_tensors=lists)


def flex_dense(q, k, v) -> Call:
    """FlexAttention, dense and causal. The first call makes the mask and compiles the kernel."""

    @functools.cache
    def make() -> Call:
        num_blocks = -(-q.shape[2] // BLOCK)
        visited = torch.ones(1, 1, num_blocks, num_blocks, dtype=torch.bool, device=q.device)
        return flex(q, k, v, visited.tril())

    return lambda: make()()


def flex(q, k, v, visited: torch.Tensor) -> Call:
    """FlexAttention, compiled for this shape, on the visited blocks (B or 1, Hq or 1, query blocks,
    key blocks) with a causal diagonal."""
    from torch.nn.attention.flex_attention import flex_attention

    # A search for the crossover compiles for more shapes than the limit allows by default. Beyond
    # it, fullgraph raises an error where FlexAttention would run without its kernel.
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    block_mask = flex_block_mask(visited, q.shape[2])
    return lambda: compiled(q, k, v, block_mask=block_mask, enable_gqa=True)


def flex_block_mask(visited: torch.Tensor, num_tokens: int):
    """The mask of the visited blocks (B, Hq, query blocks, key blocks), bool. FlexAttention masks
    the diagonal blocks and computes all others whole."""
    from torch.nn.attention.flex_attention import BlockMask

    is_diagonal = torch.eye(visited.shape[-1], dtype=torch.bool, device=visited.device)
    return BlockMask.from_kv_blocks(
        *as_lists(visited & is_diagonal),
        *as_lists(visited & ~is_diagonal),
        BLOCK_SIZE=BLOCK,
        seq_lengths=(num_tokens, num_tokens),
        mask_mod=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx,
    )


def as_lists(visited: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., key blocks) bool -> counts (...) and indices (..., key blocks), int32."""
    counts, indices = pbs_attn.mask_to_lists(pbs_attn.bool_to_mask(visited), visited.shape[-1])
    return counts.contiguous(), indices.contiguous()


def keep_running(calls: dict[str, Call | None]) -> dict[str, Call]:
    """Keeps the calls that run, and prints the others on stderr with the reason."""
    kept = {}
    for name, call in calls.items():
        if call is None:
            continue
        try:
            call()
            torch.cuda.synchronize()
        except Exception as error:  # four libraries may raise an error
            reason = " ".join(str(error).split())[:200]
            print(f"{name} is left out: {reason}", file=sys.stderr)
            continue
        kept[name] = call
    return kept
