"""Times torch.ops.pbs.attend on a GPU beside dense attention and FlashAttention-4's block-sparse
kernel on the same block lists.

A list keeps each key block before the query block's own segment with probability p, block 0 and
the own segment always. Rates count 4 * 128 * D operations for every visited key of a block of 128
queries, the diagonal block whole. All contestants of a row run in one process, in turn.

    python benchmarks/attend.py --output benchmarks/results/attend_h200.csv
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import pbs_attn
from pbs_attn import PBSConfig, _environment
from pbs_attn.masks import candidate_blocks

ROWS = 128


def random_list(num_tokens: int, num_heads: int, p: float, config: PBSConfig) -> torch.Tensor:
    """(1, heads, query blocks, key blocks) bool: the selected candidates."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    num_rows, num_columns = num_tokens // ROWS, num_tokens // config.key_block_size
    shape = (1, num_heads, num_rows, num_columns)
    keep = torch.rand(shape, generator=generator, device="cuda") < p
    keep[..., 0] = True
    candidates, _ = candidate_blocks(num_tokens, num_tokens, config=config)
    columns = torch.arange(num_columns, device="cuda")
    return keep & (columns < candidates.cuda()[:, None])


def own_blocks(num_tokens: int, config: PBSConfig) -> torch.Tensor:
    """(query blocks, key blocks) bool: the own segment up to the diagonal, as 128-blocks."""
    candidates, own = candidate_blocks(num_tokens, num_tokens, config=config)
    columns = torch.arange(num_tokens // ROWS)
    return (columns >= candidates[:, None]) & (columns < (candidates + own)[:, None])


def flash4_block_sparse(q, k, v, visited: torch.Tensor) -> Callable | None:
    try:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import _flash_attn_fwd
    except ImportError:
        return None
    counts, indices = pbs_attn.mask_to_lists(pbs_attn.bool_to_mask(visited), visited.shape[-1])
    lists = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=torch.zeros_like(indices),
        full_block_cnt=counts.contiguous(),
        full_block_idx=indices.contiguous(),
        block_size=(ROWS, ROWS),
    )
    tokens_first = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    return lambda: _flash_attn_fwd(*tokens_first, causal=False, block_sparse_tensors=lists)


def flash4_dense(q, k, v) -> Callable | None:
    try:
        from flash_attn.cute.interface import _flash_attn_fwd
    except ImportError:
        return None
    tokens_first = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    return lambda: _flash_attn_fwd(*tokens_first, causal=True)


def cudnn_dense(q, k, v) -> Callable:
    def run():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )

    return run


def interleaved_medians(calls: dict[str, Callable], rounds: int, budget_ms: float) -> dict:
    """Milliseconds a call, from rounds in which every contestant runs a few times in turn."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    repeats = {}
    for name, call in calls.items():
        repeats[name] = max(1, int(budget_ms / _milliseconds(call, 1)))
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_milliseconds(call, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _milliseconds(call: Callable, repeats: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / repeats


def measure(args, num_tokens: int, head_dim: int, dtype: torch.dtype) -> list[dict]:
    q, k, v = (
        torch.randn(1, heads, num_tokens, head_dim, device="cuda", dtype=dtype)
        for heads in (args.q_heads, args.kv_heads, args.kv_heads)
    )
    dense = {"cudnn_dense": cudnn_dense(q, k, v), "fa4_dense": flash4_dense(q, k, v)}
    dense = {name: call for name, call in dense.items() if call is not None}
    dense_operations = 2 * num_tokens**2 * head_dim * args.q_heads
    rows = []
    for p in args.densities:
        for kv_block_size in args.kv_block_sizes:
            config = PBSConfig(kv_block_size=kv_block_size)
            selected = random_list(num_tokens, args.q_heads, p, config)
            words = pbs_attn.bool_to_mask(selected)
            sizes = {"kv_block_size": kv_block_size}
            calls = {"pbs": lambda w=words, s=sizes: torch.ops.pbs.attend(q, k, v, k, v, w, **s)}
            if kv_block_size == ROWS:
                visited = selected | own_blocks(num_tokens, config).cuda()
                calls["fa4_sparse"] = flash4_block_sparse(q, k, v, visited)
                calls |= dense
            calls = {name: call for name, call in calls.items() if call is not None}
            own_keys = own_blocks(num_tokens, config).sum().item() * ROWS * args.q_heads
            keys = selected.sum().item() * kv_block_size + own_keys
            density = pbs_attn.density(words, num_tokens, num_tokens, config=config).mean()
            times = interleaved_medians(calls, args.rounds, args.budget_ms)
            row = {
                "tokens": num_tokens,
                "head_dim": head_dim,
                "dtype": str(dtype).removeprefix("torch."),
                "kv_block_size": kv_block_size,
                "density": f"{density:.4f}",
            }
            for name in ("pbs", "fa4_sparse", "cudnn_dense", "fa4_dense"):
                operations = dense_operations if "dense" in name else 4 * ROWS * head_dim * keys
                ms = times.get(name)
                row[f"{name}_ms"] = f"{ms:.4f}" if ms else ""
                row[f"{name}_tflops"] = f"{operations / ms / 1e9:.1f}" if ms else ""
            rows.append(row | _environment.describe("cuda"))
            print({key: value for key, value in row.items() if value}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--kv-block-sizes", type=int, nargs="+", default=[128, 64, 32])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4, 1.0])
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget-ms", type=float, default=20, help="GPU time of a turn")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    args = parser.parse_args()

    rows = []
    for head_dim in args.head_dims:
        for dtype in args.dtypes:
            for num_tokens in args.tokens:
                rows += measure(args, num_tokens, head_dim, getattr(torch, dtype))
    if args.output:
        _environment.write_csv(args.output, rows)


if __name__ == "__main__":
    main()
