"""The operators on a CPU, by stage and in one call, beside dense attention.

Inputs are random, and each block of queries prefers one earlier block of keys. Plain normal data
has no structure to select from: every block would have the same mass. The column `selection` has
the name of the preset. `attention_over_density_x_dense` is the time of the one call, divided by the
density times the time of dense attention. At 1, the time falls in proportion to the density.
"""

from __future__ import annotations

import itertools

import torch

from pbs_attn import PBSConfig
from pbs_attn._rows import STAGES, Row, check_outputs

from .layers import dense_attention
from .options import SWEEPS
from .options import CpuOptions as Options
from .report import (
    RowFile,
    as_table,
    check_rounds,
    check_thresholds,
    check_tokens,
    require_packages,
    say_where,
)
from .settings import config_of, configs_of, name_of
from .shapes import SHAPES, Shape, check_preset
from .stages import Pipeline
from .timing import Call, interleaved_medians, wall_clock

BLOCK = 128  # queries that prefer the same block of keys
TABLE = (
    *("preset", "tokens", "dtype", "permute_per", "kv_block_size", "threshold", "seed", "density"),
    *("dense_ms", "attention_ms", "attention_over_density_x_dense"),
)


def run(options: Options) -> list[Row]:
    """Measures, prints a table, and writes the files that `options` names.

    Returns:
        One row for each input and setting: milliseconds (median of the rounds) of each stage, of
        the one call and of dense attention, all on the same threads.

    Raises:
        BenchError, DemoError: if an option is wrong or a package is missing.
    """
    _check(options)
    from tqdm import tqdm

    file = RowFile(options.csv, "cpu")
    choices = (
        *(options.presets, options.tokens, options.dtypes, configs_of(options)),
        *(_thresholds(options), options.seeds),
    )
    cases = list(itertools.product(*choices))
    with torch.inference_mode(), tqdm(cases, desc="cpu", unit="row") as bar:
        for case in bar:
            file.add(_measure(options, *case))
    print(as_table(file.rows, TABLE))
    say_where([options.csv])
    return file.rows


def _check(options: Options) -> None:
    require_packages("tqdm")
    for preset in options.presets:
        check_preset(preset, "--presets")
    check_tokens(options.tokens, 2 * PBSConfig().segment_size)
    configs_of(options)
    check_thresholds("--thresholds", _thresholds(options), config_of(options.settings).mass)
    check_rounds(options.rounds)
    check_outputs([options.csv], [])


def _thresholds(options: Options) -> tuple[float, ...]:
    if options.thresholds is not None:
        return options.thresholds
    return SWEEPS[config_of(options.settings).mass]


def clustered_inputs(shape: Shape, num_tokens: int, seed: int) -> list[torch.Tensor]:
    """q (1, Hq, N, D), k and v (1, Hkv, N, D), float32."""
    generator = torch.Generator().manual_seed(seed)
    num_kv_heads, head_dim = shape.num_kv_heads, shape.head_dim

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    num_blocks = -(-num_tokens // BLOCK)
    topics = normal(1, num_kv_heads, num_blocks, head_dim)
    block_of_token = torch.arange(num_tokens) // BLOCK
    earlier = (torch.rand(num_blocks, generator=generator) * torch.arange(num_blocks)).long()
    k = 0.5 * normal(1, num_kv_heads, num_tokens, head_dim) + topics[:, :, block_of_token]
    group_size = shape.num_q_heads // num_kv_heads
    wanted = topics[:, :, earlier[block_of_token]].repeat_interleave(group_size, 1)
    q = 0.5 * normal(1, shape.num_q_heads, num_tokens, head_dim) + wanted
    return [q, k, normal(1, num_kv_heads, num_tokens, head_dim)]


def _measure(
    options: Options,
    preset: str,
    num_tokens: int,
    dtype: str,
    config: PBSConfig,
    threshold: float,
    seed: int,
) -> Row:
    shape = SHAPES[preset]
    inputs = clustered_inputs(shape, num_tokens, seed)
    q, k, v = (x.to(getattr(torch, dtype)) for x in inputs)
    pipeline = Pipeline(q, k, v, config)
    density = pipeline.set_threshold(threshold)
    calls: dict[str, Call] = {"dense": lambda: dense_attention(q, k, v)}
    calls |= {name: getattr(pipeline, name) for name in ("attention", *STAGES)}
    times = interleaved_medians(calls, options.rounds, wall_clock)
    ratio = times["attention"] / (density * times["dense"])
    return {
        "preset": preset,
        "tokens": str(num_tokens),
        "q_heads": str(shape.num_q_heads),
        "kv_heads": str(shape.num_kv_heads),
        "head_dim": str(shape.head_dim),
        "dtype": dtype,
        "selection": name_of(options.settings),
        "kv_block_size": str(config.key_block_size),
        "permute_per": config.permute_per,
        "threshold": str(threshold),
        "seed": str(seed),
        "density": f"{density:.4f}",
        **{f"{name}_ms": f"{ms:.2f}" for name, ms in times.items()},
        "attention_over_density_x_dense": f"{ratio:.3f}",
    }
