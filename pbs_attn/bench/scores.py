"""`select_blocks` by score, beside `attend` on all blocks.

Inputs are those of `pipeline`. Sampled scores run with several numbers of samples and the default's
other settings, and once with one selection for all query heads of a KV head. Mean scores run with
the blocks and the order of the default.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch

from pbs_attn import PBSConfig
from pbs_attn._inputs import choose_device
from pbs_attn._rows import Row, check_outputs

from .options import ScoresOptions as Options
from .report import RowFile, as_table, check_rounds, check_tokens, require_packages, say_where
from .shapes import SHAPES, Shape, check_preset
from .stages import Pipeline, synthetic
from .timing import clock_for, interleaved_medians

SAMPLES = (8, 16, 32)
DENSE = "dense"
CONFIGS = {
    DENSE: PBSConfig(threshold=1.0),
    **{f"sampled_{num}": dataclasses.replace(PBSConfig(), num_samples=num) for num in SAMPLES},
    "shared_16": PBSConfig(select_per="kv_head", num_samples=16),
    "mean": PBSConfig(score="mean", mass="causal"),
}
TABLE = ("preset", "tokens", *(f"{name}_ms" for name in CONFIGS))


def run(options: Options) -> list[Row]:
    """Measures, prints a table, and writes the files that `options` names.

    Returns:
        One row for each preset and length: milliseconds (median of the rounds) of `select_blocks`
        with each score, and of `attend` on all blocks.

    Raises:
        BenchError, DemoError: if an option is wrong or a package is missing.
    """
    _check(options)
    from tqdm import tqdm

    device = choose_device(options.device)
    file = RowFile(options.csv, device)
    cases = list(itertools.product(options.presets, options.tokens))
    with torch.inference_mode(), tqdm(cases, desc="scores", unit="row") as bar:
        for preset, num_tokens in bar:
            values = _measure(options, SHAPES[preset], num_tokens, device)
            file.add({"preset": preset} | values)
    print(as_table(file.rows, TABLE))
    say_where([options.csv])
    return file.rows


def _check(options: Options) -> None:
    require_packages("tqdm")
    for preset in options.presets:
        check_preset(preset, "--presets")
    check_tokens(options.tokens, 2 * PBSConfig().segment_size)
    check_rounds(options.rounds)
    check_outputs([options.csv], [])


def _measure(options: Options, shape: Shape, num_tokens: int, device: str) -> Row:
    tensors = synthetic(shape, num_tokens, device)
    calls = {}
    for name, config in CONFIGS.items():
        pipeline = Pipeline(*tensors, config)
        pipeline.set_threshold(config.resolved_threshold)
        calls[name] = pipeline.attend if name == DENSE else pipeline.select_blocks
    clock = clock_for(tensors[0].device, options.budget_ms)
    times = interleaved_medians(calls, options.rounds, clock)
    return {
        "tokens": str(num_tokens),
        "q_heads": str(shape.num_q_heads),
        "kv_heads": str(shape.num_kv_heads),
        "head_dim": str(shape.head_dim),
        "kv_block_size": str(CONFIGS[DENSE].key_block_size),
        **{f"{name}_ms": f"{ms:.3f}" for name, ms in times.items()},
    }
