"""Times torch.ops.pbs.attend on a GPU beside dense attention and FlashAttention-4's block-sparse
kernel on the same block lists.

A list keeps each key block of 128 rows before the query block's own segment with probability p,
block 0 and the own segment always; lists of narrower key blocks visit as many keys. Rates count
4 * 128 * D operations for every visited key of a block of 128
queries, the diagonal block whole. All contestants of a row run in one process, in turn. The column
`lists` says where the lists come from: `random`; `uneven` and `even`, one head 30 times as dense as
the others beside the same number of blocks spread evenly; or the file of real queries, keys and
values that went through the paper's selection.

    python benchmarks/attend.py --uneven --output benchmarks/results/attend_h200.csv
    python benchmarks/attend.py --tokens --activations layer.safetensors --output real.csv
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import pbs_attn
from pbs_attn import PBSConfig, _environment
from pbs_attn.bench.layers import dense_attention
from pbs_attn.bench.timing import cuda_clock, interleaved_medians
from pbs_attn.masks import candidate_blocks

ROWS = 128


def random_list(
    num_tokens: int, num_heads: int, p: float | torch.Tensor, config: PBSConfig
) -> torch.Tensor:
    """(1, heads, query blocks, key blocks) bool: the selected candidates. p: one for all heads, or
    (heads, 1, 1). Key blocks narrower than 128 rows visit, in every query block, as many keys as
    those of 128 rows do, at random too."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def noise(width: int) -> torch.Tensor:
        """Uniform in [0, 1) where a key block is a candidate, 2 elsewhere."""
        shape = (1, num_heads, num_tokens // ROWS, num_tokens // width)
        values = torch.rand(shape, generator=generator, device="cuda")
        values[..., : ROWS // width] = -1  # the first 128 keys, always
        of_width = dataclasses.replace(config, kv_block_size=width)
        candidates, _ = candidate_blocks(num_tokens, num_tokens, config=of_width)
        columns = torch.arange(shape[-1], device="cuda")
        return values.masked_fill_(columns >= candidates.cuda()[:, None], 2)

    selected = noise(ROWS) < p
    if config.key_block_size == ROWS:
        return selected
    counts = selected.sum(-1, keepdim=True) * (ROWS // config.key_block_size)
    values = noise(config.key_block_size)
    last = values.sort(-1).values.gather(-1, (counts - 1).clamp(min=0))
    return (values <= last) & (counts > 0)


def own_blocks(num_tokens: int, config: PBSConfig) -> torch.Tensor:
    """(query blocks, key blocks) bool: the own segment up to the diagonal, as 128-blocks."""
    candidates, own = candidate_blocks(num_tokens, num_tokens, config=config)
    columns = torch.arange(num_tokens // ROWS)
    return (columns >= candidates[:, None]) & (columns < (candidates + own)[:, None])


def flash4(q, k, v, visited: torch.Tensor | None = None) -> Callable | None:
    """FlashAttention-4 on the visited blocks, or dense and causal; None if it is not installed."""
    try:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import _flash_attn_fwd
    except ImportError:
        return None
    tokens_first = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    if visited is None:
        return lambda: _flash_attn_fwd(*tokens_first, causal=True)
    counts, indices = pbs_attn.mask_to_lists(pbs_attn.bool_to_mask(visited), visited.shape[-1])
    lists = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=torch.zeros_like(indices),
        full_block_cnt=counts.contiguous(),
        full_block_idx=indices.contiguous(),
        block_size=(ROWS, ROWS),
    )
    return lambda: _flash_attn_fwd(*tokens_first, causal=False, block_sparse_tensors=lists)


def cudnn_dense(q, k, v) -> Callable:
    def run():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return dense_attention(q, k, v)

    return run


def dense_calls(tensors) -> dict[str, Callable | None]:
    return {"cudnn_dense": cudnn_dense(*tensors), "fa4_dense": flash4(*tensors)}


def runs(call: Callable | None) -> bool:
    """Whether a contestant takes this shape; says why not."""
    if call is None:
        return False
    try:
        call()
        torch.cuda.synchronize()
    except Exception as error:
        print("left out:", " ".join(str(error).split())[:200], flush=True)
        return False
    return True


def measure_lists(args, tensors, permuted, selected, config: PBSConfig, lists: str, dense) -> dict:
    """One row: attend on these lists, beside the dense calls and FlashAttention-4."""
    q, k, v = tensors
    num_heads, num_tokens, head_dim = q.shape[1:]
    words = pbs_attn.bool_to_mask(selected)
    calls = {
        "pbs": lambda: torch.ops.pbs.attend(
            q, k, v, *permuted, words, kv_block_size=config.key_block_size
        )
    }
    own = own_blocks(num_tokens, config)
    if config.key_block_size == ROWS:
        calls["fa4_sparse"] = flash4(*tensors, selected | own.cuda())
        calls |= dense
    calls = {name: call for name, call in calls.items() if runs(call)}
    own_keys = own.sum().item() * ROWS * num_heads
    keys = selected.sum().item() * config.key_block_size + own_keys
    operations = 4 * ROWS * head_dim * keys
    dense_operations = 2 * num_tokens**2 * head_dim * num_heads
    density = pbs_attn.density(words, num_tokens, num_tokens, config=config).mean()
    times = interleaved_medians(calls, args.rounds, cuda_clock(args.budget_ms))
    row = {
        "lists": lists,
        "tokens": num_tokens,
        "head_dim": head_dim,
        "dtype": str(q.dtype).removeprefix("torch."),
        "kv_block_size": config.key_block_size,
        "density": f"{density:.4f}",
    }
    for name in ("pbs", "fa4_sparse", "cudnn_dense", "fa4_dense"):
        done = dense_operations if "dense" in name else operations
        ms = times.get(name)
        row[f"{name}_ms"] = f"{ms:.4f}" if ms else ""
        row[f"{name}_tflops"] = f"{done / ms / 1e9:.1f}" if ms else ""
    print({key: value for key, value in row.items() if value}, flush=True)
    return row | _environment.describe("cuda")


def random_tensors(args, num_tokens: int, head_dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [
        torch.randn(1, heads, num_tokens, head_dim, device="cuda", dtype=dtype)
        for heads in (args.q_heads, args.kv_heads, args.kv_heads)
    ]


def measure(args, num_tokens: int, head_dim: int, dtype: torch.dtype) -> list[dict]:
    tensors = random_tensors(args, num_tokens, head_dim, dtype)
    dense = dense_calls(tensors)
    rows = []
    for p in args.densities:
        for kv_block_size in args.kv_block_sizes:
            config = PBSConfig(kv_block_size=kv_block_size)
            selected = random_list(num_tokens, args.q_heads, p, config)
            # The dense kernels do the same whatever the list.
            beside = dense if p >= args.dense_from else {}
            rows.append(
                measure_lists(args, tensors, tensors[1:], selected, config, "random", beside)
            )
    return rows


def measure_uneven(args, num_tokens: int) -> list[dict]:
    """The last head visits 30 times what each other one does; then the same, spread evenly."""
    tensors = random_tensors(args, num_tokens, 128, torch.bfloat16)
    config = PBSConfig()
    uneven = torch.full((args.q_heads, 1, 1), 0.02, device="cuda")
    uneven[-1] = 0.6
    return [
        measure_lists(
            args,
            tensors,
            tensors[1:],
            random_list(num_tokens, args.q_heads, p, config),
            config,
            lists,
            {},
        )
        for lists, p in (("uneven", uneven), ("even", uneven.mean()))
    ]


def measure_activations(args, path: Path) -> list[dict]:
    """Queries, keys and values of a model through the paper's selection, repeated to all heads."""
    from safetensors.torch import load_file

    loaded = load_file(path)
    q, k, v = (loaded[name] for name in "qkv")
    rows = []
    for kv_block_size in args.kv_block_sizes:
        config = PBSConfig(kv_block_size=kv_block_size)
        chosen = pbs_attn.select(q, k, v, config=config)
        selected = pbs_attn.mask_to_bool(chosen.block_mask, -(-k.shape[2] // kv_block_size))
        repeats = args.kv_heads // k.shape[1]
        tensors, permuted = (
            [t.cuda().repeat(1, repeats, 1, 1) for t in group]
            for group in ((q, k, v), (chosen.k_perm, chosen.v_perm))
        )
        dense = dense_calls(tensors)
        selected = selected.cuda().repeat(1, repeats, 1, 1)
        rows.append(measure_lists(args, tensors, permuted, selected, config, path.stem, dense))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 32768, 131072])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--kv-block-sizes", type=int, nargs="+", default=[128, 64, 32])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4, 1.0])
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument(
        "--dense-from", type=float, default=0.4, help="density to compare with dense from"
    )
    parser.add_argument("--uneven", action="store_true", help="add lists of uneven heads")
    parser.add_argument(
        "--activations", type=Path, nargs="*", default=[], help="safetensors: q, k, v"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget-ms", type=float, default=20, help="GPU time of a turn")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    args = parser.parse_args()

    rows = []
    for head_dim in args.head_dims:
        for dtype in args.dtypes:
            for num_tokens in args.tokens:
                rows += measure(args, num_tokens, head_dim, getattr(torch, dtype))
    if args.uneven:
        rows += measure_uneven(args, 32768)
    for path in args.activations:
        rows += measure_activations(args, path)
    if args.output:
        _environment.write_csv(args.output, rows)


if __name__ == "__main__":
    main()
