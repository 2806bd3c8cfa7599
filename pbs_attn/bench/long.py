"""Long prompts through the whole operator: times, memory, and checks on sampled rows.

The input is that of `pipeline`, and the threshold is the one that gives the requested density.
Every call is timed once, after a warm-up on a short prompt. The columns `<check>_error` have the
worst error of each check (`checks.py`) as a share of its tolerance. If one is above 1, the bench
fails. The column `selection` has the name of the preset.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pbs_attn import PBSConfig
from pbs_attn._errors import BenchError
from pbs_attn._inputs import choose_device
from pbs_attn._rows import STAGES, Row, check_outputs

from .checks import CHECKS, check, worst
from .gpu_profile import extra_gib
from .options import LongOptions as Options
from .report import (
    RowFile,
    as_table,
    as_text,
    by_stage,
    check_shares,
    check_tokens,
    require_packages,
    say_where,
    stage_columns,
)
from .settings import configs_of, density_at, name_of
from .shapes import SHAPES, check_preset
from .stages import Pipeline, heavy_hitters, reach
from .timing import cuda_events, wall_clock

COLUMNS = (
    *("preset", "tokens", "q_heads", "kv_heads", "selection", "permute_per", "kv_block_size"),
    *("threshold", "density"),
    *stage_columns("ms"),
    *("attention_ms", "extra_gib", "sampled_rows"),
    *(f"{name}_error" for name in CHECKS),
)
TABLE = (
    *("tokens", "permute_per", "kv_block_size", "density", "before_attend_ms", "attend_ms"),
    *("attention_ms", "extra_gib", *(f"{name}_error" for name in CHECKS)),
)
LEAST_SAMPLES = 8  # the rows at the ends and at borders of segments
WARM_UP_TOKENS = 2048


def run(options: Options) -> list[Row]:
    """Measures, checks, prints a table, and writes the files that `options` names.

    Returns:
        One row for each input and setting.

    Raises:
        BenchError, DemoError: if an option is wrong, a package is missing, or an error is beyond
            its tolerance.
    """
    _check(options)
    from tqdm import tqdm

    device = choose_device(options.device)
    file = RowFile(options.csv, device)
    configs = configs_of(options)
    steps = len(options.tokens) * len(configs)
    with torch.inference_mode(), tqdm(total=steps, desc="long", unit="row") as bar:
        _warm_up(options, configs, device)
        for num_tokens in options.tokens:
            tensors = _synthetic(options, num_tokens, device)
            for config in configs:
                bar.set_postfix_str(f"{num_tokens} tokens")
                file.add(_measure(options, tensors, config))
                bar.update()
            del tensors  # before the next ones are made
    print(as_table(file.rows, TABLE))
    say_where([options.csv])
    return file.rows


def _check(options: Options) -> None:
    require_packages("tqdm")
    check_preset(options.preset)
    configs_of(options)
    check_tokens(options.tokens, 8 * PBSConfig().segment_size)
    if options.density is not None:
        check_shares("--density", [options.density])
    if options.samples < LEAST_SAMPLES:
        raise BenchError(f"--samples must be at least {LEAST_SAMPLES}, got {options.samples}")
    check_outputs([options.csv], [])


def _synthetic(options: Options, num_tokens: int, device: str) -> list[torch.Tensor]:
    shape = SHAPES[options.preset]
    return heavy_hitters(num_tokens, shape.num_q_heads, shape.num_kv_heads, device, shape.head_dim)


def _warm_up(options: Options, configs: list[PBSConfig], device: str) -> None:
    tensors = _synthetic(options, WARM_UP_TOKENS, device)
    for config in configs:
        pipeline = Pipeline(*tensors, config)
        pipeline.set_threshold(config.resolved_threshold)
        for name in (*STAGES, "attention"):
            getattr(pipeline, name)()


def _measure(options: Options, tensors: list[torch.Tensor], config: PBSConfig) -> Row:
    pipeline = Pipeline(*tensors, config)
    q, k, _ = tensors
    density = options.density or density_at(q.shape[2], options.settings)
    values = {
        "preset": options.preset,
        "tokens": q.shape[2],
        "q_heads": q.shape[1],
        "kv_heads": k.shape[1],
        "selection": name_of(options.settings),
        "permute_per": config.permute_per,
        "kv_block_size": config.key_block_size,
        "density": reach(pipeline, density),
        "threshold": pipeline.threshold,
        "sampled_rows": options.samples,
    }
    if q.is_cuda:
        values["extra_gib"] = extra_gib(pipeline.attention, q.numel() * q.element_size())
    times = {stage: _milliseconds(getattr(pipeline, stage), q.device) for stage in STAGES}
    values |= by_stage(times, "ms")
    values["attention_ms"] = _milliseconds(pipeline.attention, q.device)
    values |= _errors(options, pipeline)
    return {column: as_text(column, values.get(column, "")) for column in COLUMNS}


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    return cuda_events(call, 1) if device.type == "cuda" else wall_clock(call)


def _errors(options: Options, pipeline: Pipeline) -> dict[str, float]:
    """The worst error of each check, by column.

    Raises:
        BenchError: if an error is beyond its tolerance.
    """
    checked = check(pipeline, pipeline.attention(), options.samples)
    found = {name: worst(errors) for name, errors in checked.items()}
    failed = [
        f"{name} {error:.3f} times that at {place}"
        for name, (place, error) in found.items()
        if not error <= 1
    ]
    if failed:
        config = pipeline.config
        raise BenchError(
            f"errors of the operator must be within the tolerance, got {', '.join(failed)} "
            f"(permute_per={config.permute_per}, kv_block_size={config.kv_block_size})"
        )
    return {f"{name}_error": error for name, (_, error) in found.items()}
