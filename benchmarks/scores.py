"""Times `select_blocks` on a GPU by score, beside `attend` with everything visited.

Inputs are those of `pbs-attn bench pipeline`. All contestants of a row run in one process, in turn;
a row holds medians.

    python benchmarks/scores.py --output benchmarks/results/select_sampled_h100.csv
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from pbs_attn import PBSConfig, _environment
from pbs_attn.bench.stages import Pipeline, heavy_hitters
from pbs_attn.bench.timing import cuda_clock, interleaved_medians

ROUNDS = 5
BUDGET_MS = 20.0  # of a clock reading, at least one call
SAMPLES = (8, 16, 32)


def measure(num_tokens: int, q_heads: int, kv_heads: int, head_dim: int) -> dict[str, object]:
    tensors = heavy_hitters(num_tokens, q_heads, kv_heads, head_dim=head_dim)
    base = PBSConfig()
    configs = {"dense": PBSConfig(threshold=1.0)}
    configs |= {f"sampled_{num}": dataclasses.replace(base, num_samples=num) for num in SAMPLES}
    configs["mean"] = PBSConfig(score="mean", mass="causal")
    calls = {}
    for name, config in configs.items():
        pipeline = Pipeline(*tensors, config)
        pipeline.set_threshold(config.resolved_threshold)
        calls[name] = pipeline.attend if name == "dense" else pipeline.select_blocks
    times = interleaved_medians(calls, ROUNDS, cuda_clock(BUDGET_MS))
    return {
        "tokens": num_tokens,
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "kv_block_size": base.key_block_size,
        **{f"{name}_ms": f"{times[name]:.3f}" for name in configs},
        **_environment.describe("cuda"),
    }


def shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split("x"))
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"must be TOKENSxQ_HEADSxKV_HEADSxHEAD_DIM, got {text}")
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes",
        type=shape,
        nargs="+",
        default=[
            *((tokens, 32, 8, 128) for tokens in (8192, 32768, 131072)),
            (8192, 9, 3, 64),
            (32768, 12, 2, 128),
        ],
        metavar="TOKENSxQ_HEADSxKV_HEADSxHEAD_DIM",
    )
    parser.add_argument("--output", type=Path, help="CSV file to write")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it times kernels on a GPU, and torch finds no CUDA device")
    rows = []
    with torch.inference_mode():
        for sizes in args.shapes:
            row = measure(*sizes)
            rows.append(row)
            times = {name: value for name, value in row.items() if name.endswith("_ms")}
            print("x".join(map(str, sizes)), times, flush=True)
    if args.output:
        _environment.write_csv(args.output, rows)


if __name__ == "__main__":
    main()
