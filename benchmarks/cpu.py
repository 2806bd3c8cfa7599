"""Times the CPU operators, stage by stage and in one call, beside dense attention.

All contestants run in one process, interleaved, on the same threads; each row holds medians.

    python benchmarks/cpu.py --output benchmarks/results/cpu.csv
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

import pbs_attn
from pbs_attn import PBSConfig, _environment
from pbs_attn.bench.layers import dense_attention
from pbs_attn.bench.stages import paper_with
from pbs_attn.bench.timing import interleaved_medians, wall_clock

TARGET = 1.3  # whole op <= TARGET * density * dense


def clustered_inputs(
    num_tokens: int, num_q_heads: int, num_kv_heads: int, head_dim: int, seed: int
):
    """Random q, k, v in which each block of queries leans towards one earlier block of keys.

    Plain normal data has no structure to select from: every block would hold the same mass.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    num_blocks = -(-num_tokens // 128)
    topics = normal(1, num_kv_heads, num_blocks, head_dim)
    of_token = torch.arange(num_tokens) // 128
    earlier = (torch.rand(num_blocks, generator=generator) * torch.arange(num_blocks)).long()
    k = 0.5 * normal(1, num_kv_heads, num_tokens, head_dim) + topics[:, :, of_token]
    wanted = topics[:, :, earlier[of_token]].repeat_interleave(num_q_heads // num_kv_heads, 1)
    q = 0.5 * normal(1, num_q_heads, num_tokens, head_dim) + wanted
    return q, k, normal(1, num_kv_heads, num_tokens, head_dim)


def stage_calls(q, k, v, config: PBSConfig) -> dict[str, Callable[[], object]]:
    """The contestants: dense, the op in one call, and each stage on the outputs of the previous."""
    pbs = torch.ops.pbs
    chosen = pbs_attn.select(q, k, v, config=config)
    return {
        "dense": lambda: dense_attention(q, k, v),
        "attention": lambda: pbs_attn.attention(q, k, v, config=config),
        "score_keys": lambda: pbs.score_keys(q, k, **config.op_kwargs("score_keys")),
        "sort_segments": lambda: pbs.sort_segments(
            chosen.scores, **config.op_kwargs("sort_segments")
        ),
        "permute_kv": lambda: pbs.permute_kv(k, v, chosen.perm, **config.op_kwargs("permute_kv")),
        "select_blocks": lambda: pbs.select_blocks(
            q, k, chosen.k_mean, chosen.perm, **config.op_kwargs("select_blocks")
        ),
        "attend": lambda: pbs.attend(
            q, k, v, chosen.k_perm, chosen.v_perm, chosen.block_mask, **config.op_kwargs("attend")
        ),
    }


def measure(args: argparse.Namespace, threshold: float, seed: int) -> dict[str, object]:
    config = dataclasses.replace(
        paper_with(args.kv_block_size, args.permute_per), threshold=threshold
    )
    q, k, v = (
        t.to(getattr(torch, args.dtype))
        for t in clustered_inputs(args.tokens, args.q_heads, args.kv_heads, args.head_dim, seed)
    )
    block_mask = pbs_attn.select(q, k, v, config=config).block_mask
    density = pbs_attn.density(block_mask, args.tokens, args.tokens, config=config).mean().item()
    times = interleaved_medians(stage_calls(q, k, v, config), args.repeats, wall_clock)
    ratio = times["attention"] / (density * times["dense"])
    return {
        "tokens": args.tokens,
        "q_heads": args.q_heads,
        "kv_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "dtype": args.dtype,
        "kv_block_size": config.key_block_size,
        "permute_per": config.permute_per,
        "threshold": threshold,
        "seed": seed,
        "density": f"{density:.4f}",
        **{f"{name}_ms": f"{ms:.2f}" for name, ms in times.items()},
        "attention_over_density_x_dense": f"{ratio:.3f}",
        **_environment.describe(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--q-heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--kv-block-size", type=int, default=128)
    parser.add_argument("--permute-per", default="kv_head", choices=["kv_head", "query_head"])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.4, 0.7, 0.9, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="CSV file to write")
    args = parser.parse_args()

    rows = []
    for threshold in args.thresholds:
        for seed in args.seeds:
            row = measure(args, threshold, seed)
            rows.append(row)
            print(
                f"threshold {threshold} seed {seed}: density {row['density']}, "
                f"dense {row['dense_ms']} ms, op {row['attention_ms']} ms = "
                f"{row['attention_over_density_x_dense']} x density x dense (target {TARGET})",
                flush=True,
            )
    if args.output:
        _environment.write_csv(args.output, rows)


if __name__ == "__main__":
    main()
