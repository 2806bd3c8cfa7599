"""Times torch.ops.pbs.attention on a GPU, stage by stage and in one call, beside dense attention.

Inputs are random with heavy hitters: a twentieth of the keys, and all queries, lean towards one
direction a head. The threshold of each row is the one that gives the density asked for, found by
bisection. With --activations, real queries, keys and values at the paper's threshold of 0.9.
All contestants of a row run in one process, in turn; rates of dense kernels are in attend.py.

    python benchmarks/pipeline.py --output benchmarks/results/pipeline_h200.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from attend import dense_calls, runs
from timing import cuda_clock, interleaved_medians

import pbs_attn
from pbs_attn import PBSConfig, _environment

ops = torch.ops.pbs
STAGES = ("score_keys", "sort_segments", "permute_kv", "select_blocks", "attend")
# Tokens and density of the paper's Table 5.
PAPER = {8192: 0.58, 16384: 0.49, 32768: 0.41, 65536: 0.29, 131072: 0.22}


def heavy_hitters(num_tokens: int, q_heads: int, kv_heads: int) -> list[torch.Tensor]:
    """q, k, v of head_dim 128 in bfloat16."""
    generator = torch.Generator(device="cuda").manual_seed(num_tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    direction = normal(1, kv_heads, 1, 128)
    heavy = torch.rand(1, kv_heads, num_tokens, 1, generator=generator, device="cuda") < 0.05
    k = normal(1, kv_heads, num_tokens, 128) + heavy * direction
    q = normal(1, q_heads, num_tokens, 128)
    q += direction.repeat_interleave(q_heads // kv_heads, 1)
    return [q.bfloat16(), k.bfloat16(), normal(1, kv_heads, num_tokens, 128).bfloat16()]


class Pipeline:
    """One input and one configuration; each stage on the outputs of those before."""

    def __init__(self, q, k, v, config: PBSConfig, permute_per: str):
        self.q, self.k, self.v = q, k, v
        self.config, self.permute_per = config, permute_per
        self.blocks = {
            "block_size": config.block_size,
            "kv_block_size": config.key_block_size,
            "segment_size": config.segment_size,
        }
        self.scores = self.score_keys()
        self.perm = self.sort_segments()
        self.k_perm, self.v_perm, self.k_mean = self.permute_kv()

    def set_threshold(self, threshold: float) -> float:
        """The density that it gives."""
        self.threshold = threshold
        self.words, _ = self.select_blocks()
        num_tokens = self.q.shape[2]
        return (
            pbs_attn.density(self.words, num_tokens, num_tokens, config=self.config).mean().item()
        )

    def score_keys(self):
        sizes = {"block_size": self.config.block_size, "segment_size": self.config.segment_size}
        return ops.score_keys(self.q, self.k, **sizes, permute_per=self.permute_per)

    def sort_segments(self):
        return ops.sort_segments(self.scores, segment_size=self.config.segment_size)

    def permute_kv(self):
        return ops.permute_kv(self.k, self.v, self.perm, kv_block_size=self.config.key_block_size)

    def select_blocks(self):
        return ops.select_blocks(
            self.q, self.k, self.k_mean, self.perm, threshold=self.threshold, **self.blocks
        )

    def attend(self):
        return ops.attend(
            self.q, self.k, self.v, self.k_perm, self.v_perm, self.words, **self.blocks
        )

    def attention(self):
        return ops.attention(
            self.q,
            self.k,
            self.v,
            threshold=self.threshold,
            permute_per=self.permute_per,
            **self.blocks,
        )


def reach(pipeline: Pipeline, density: float) -> float:
    """The density reached, as near as bisection over the threshold comes."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        if pipeline.set_threshold(middle) < density:
            low = middle
        else:
            high = middle
    return pipeline.set_threshold(high)


def extra_memory(pipeline: Pipeline) -> int:
    """Bytes that one call takes beyond its inputs and its output."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = pipeline.attention()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()


def measure(args, name: str, tensors, density: float | None, dense: dict) -> list[dict]:
    rows = []
    for permute_per in args.permute_per:
        for kv_block_size in args.kv_block_sizes:
            config = PBSConfig(kv_block_size=kv_block_size)
            pipeline = Pipeline(*tensors, config, permute_per)
            reached = reach(pipeline, density) if density else pipeline.set_threshold(0.9)
            calls = {stage: getattr(pipeline, stage) for stage in (*STAGES, "attention")} | dense
            times = interleaved_medians(calls, args.rounds, cuda_clock(args.budget_ms))
            best_dense = min((times[call] for call in dense), default=None)
            row = {
                "input": name,
                "tokens": tensors[0].shape[2],
                "permute_per": permute_per,
                "kv_block_size": kv_block_size,
                "threshold": f"{pipeline.threshold:.4f}",
                "density": f"{reached:.4f}",
            }
            row |= {f"{stage}_ms": f"{times[stage]:.4f}" for stage in STAGES}
            row["before_attend_ms"] = f"{sum(times[stage] for stage in STAGES[:-1]):.4f}"
            row["attention_ms"] = f"{times['attention']:.4f}"
            row["extra_gib"] = f"{extra_memory(pipeline) / 2**30:.3f}"
            for call in ("cudnn_dense", "fa4_dense"):
                row[f"{call}_ms"] = f"{times[call]:.4f}" if call in times else ""
            row["speedup"] = f"{best_dense / times['attention']:.3f}" if best_dense else ""
            print({key: value for key, value in row.items() if value}, flush=True)
            rows.append(row | _environment.describe("cuda"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=list(PAPER))
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--kv-block-sizes", type=int, nargs="+", default=[128])
    parser.add_argument(
        "--permute-per", nargs="+", default=["kv_head"], choices=["kv_head", "query_head"]
    )
    parser.add_argument(
        "--activations", type=Path, nargs="*", default=[], help="safetensors: q, k, v"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget-ms", type=float, default=20, help="GPU time of a turn")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    args = parser.parse_args()

    rows = []
    for num_tokens in args.tokens:
        tensors = heavy_hitters(num_tokens, args.q_heads, args.kv_heads)
        dense = {key: call for key, call in dense_calls(tensors).items() if runs(call)}
        rows += measure(args, "heavy_hitters", tensors, PAPER.get(num_tokens, 0.3), dense)
        del tensors, dense
    for path in args.activations:
        from safetensors.torch import load_file

        loaded = load_file(path)
        repeats = args.kv_heads // loaded["k"].shape[1]
        tensors = [loaded[part].cuda().repeat(1, repeats, 1, 1) for part in "qkv"]
        dense = {key: call for key, call in dense_calls(tensors).items() if runs(call)}
        rows += measure(args, path.stem, tensors, None, dense)
    if args.output:
        _environment.write_csv(args.output, rows)


if __name__ == "__main__":
    main()
