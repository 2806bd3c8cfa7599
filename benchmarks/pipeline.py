"""Times torch.ops.pbs.attention on a GPU, stage by stage and in one call, beside dense attention
and the paper's stages before attention in eager PyTorch.

Inputs are random with heavy hitters: a twentieth of the keys, and all queries, lean towards one
direction a head. The threshold of each row is the one that gives the density asked for, found by
bisection. With --activations, real queries, keys and values at the paper's threshold of 0.9.
All contestants of a row run in one process, in turn; rates of dense kernels are in attend.py.

A stage has three columns: `<stage>_ms`, the op called alone; `<stage>_kernel_ms`, its kernels
within the one call; `<stage>_floor_ms`, what bytes and operations take at the card's rates.
`gaps_ms` is the time within the one call, between its kernels, in which the GPU ran nothing. The
columns `eager_*` belong to eager.py at the same threshold, one permutation a query head in every
row.

    python benchmarks/pipeline.py --output benchmarks/results/pipeline_h200.csv
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import eager
import torch
from attend import dense_calls, runs
from floors import Problem, floors_ms
from gpu_profile import profile_call

from pbs_attn import PBSConfig, _environment
from pbs_attn.bench.stages import BEFORE_ATTEND, PAPER, STAGES, Pipeline, heavy_hitters, reach
from pbs_attn.bench.timing import cuda_clock, interleaved_medians

DENSE = ("cudnn_dense", "fa4_dense")


def stage_columns(suffix: str, stages: tuple[str, ...] = STAGES, prefix: str = "") -> list[str]:
    """One column a stage, and the one of all stages before attend."""
    return [f"{prefix}{stage}_{suffix}" for stage in (*stages, "before_attend")]


COLUMNS = (
    *("input", "tokens", "permute_per", "kv_block_size", "threshold", "density"),
    *stage_columns("ms"),
    *("attention_ms", "gaps_ms", "launches"),
    *stage_columns("kernel_ms"),
    *stage_columns("floor_ms"),
    "extra_gib",
    *stage_columns("ms", BEFORE_ATTEND, "eager_"),
    "eager_extra_gib",
    *(f"{call}_ms" for call in DENSE),
    "speedup",
)


def extra_gib(call: Callable[[], object], output_bytes: int = 0) -> float:
    """Memory that a call takes at its peak, without its inputs and so much of its output."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - output_bytes) / 2**30


def by_stage(
    ms: dict[str, float], suffix: str, stages: tuple[str, ...] = STAGES, prefix: str = ""
) -> dict[str, float]:
    """Columns of milliseconds by stage, and the sum before attend."""
    total = sum(ms[stage] for stage in BEFORE_ATTEND)
    values = [*(ms[stage] for stage in stages), total]
    return dict(zip(stage_columns(suffix, stages, prefix), values, strict=True))


def problem_of(pipeline: Pipeline, density: float) -> Problem:
    q, k = pipeline.q, pipeline.k
    return Problem(
        num_tokens=q.shape[2],
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        perm_heads=pipeline.perm.shape[1],
        head_dim=q.shape[3],
        element_size=q.element_size(),
        density=density,
        config=pipeline.config,
    )


def times_of(pipeline: Pipeline, dense: dict, args) -> dict[str, float]:
    """Every contestant of a row, in turn."""
    inputs = (pipeline.q, pipeline.k, pipeline.v, pipeline.threshold, pipeline.config)
    calls = {stage: getattr(pipeline, stage) for stage in (*STAGES, "attention")}
    calls |= {f"eager_{stage}": call for stage, call in eager.stage_calls(*inputs).items()}
    times = interleaved_medians(calls | dense, args.rounds, cuda_clock(args.budget_ms))
    profile = profile_call(pipeline.attention)
    eager_times = {stage: times[f"eager_{stage}"] for stage in BEFORE_ATTEND}
    values = by_stage(times, "ms") | by_stage(profile.stage_ms, "kernel_ms")
    values |= by_stage(eager_times, "ms", BEFORE_ATTEND, "eager_")
    values |= {f"{call}_ms": times[call] for call in (*dense, "attention")}
    values["gaps_ms"] = profile.gaps_ms
    values["launches"] = profile.launches
    if dense:
        values["speedup"] = min(times[call] for call in dense) / times["attention"]
    return values


def memory_of(pipeline: Pipeline) -> dict[str, float]:
    q, k, v = pipeline.q, pipeline.k, pipeline.v
    eager_call = functools.partial(
        eager.before_attend, q, k, v, pipeline.threshold, pipeline.config
    )
    return {
        "extra_gib": extra_gib(pipeline.attention, q.numel() * q.element_size()),
        "eager_extra_gib": extra_gib(eager_call),
    }


def as_row(values: dict[str, object]) -> dict[str, str]:
    """All columns in order, rounded; empty where there is no value."""
    unknown = values.keys() - set(COLUMNS)
    if unknown:
        raise ValueError(f"values must have a column each, got {sorted(unknown)}")
    return {column: as_text(column, values.get(column, "")) for column in COLUMNS}


def as_text(column: str, value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if column.endswith("_gib") or column == "speedup" else f"{value:.4f}"


def measure(args, name: str, tensors, density: float | None, dense: dict) -> list[dict]:
    rows = []
    for permute_per in args.permute_per:
        for kv_block_size in args.kv_block_sizes:
            config = PBSConfig(kv_block_size=kv_block_size)
            pipeline = Pipeline(*tensors, config, permute_per)
            reached = reach(pipeline, density) if density else pipeline.set_threshold(0.9)
            values = {
                "input": name,
                "tokens": tensors[0].shape[2],
                "permute_per": permute_per,
                "kv_block_size": kv_block_size,
                "threshold": pipeline.threshold,
                "density": reached,
            }
            values |= times_of(pipeline, dense, args) | memory_of(pipeline)
            row = as_row(values | by_stage(floors_ms(problem_of(pipeline, reached)), "floor_ms"))
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
