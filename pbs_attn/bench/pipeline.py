"""`attention` by stage and in one call, beside dense attention, and from which length it wins.

Inputs are random with heavy hitters: a twentieth of the keys, and all queries, lean towards one
direction a head. The threshold of each row is the one that gives the density asked for, found by
bisection. With `activations`, real queries, keys and values at the settings' own threshold. The
column `selection` has the name of the preset.

A stage has three columns: `<stage>_ms`, the op called alone; on a GPU `<stage>_kernel_ms`, its
kernels within the one call, and, where the card's rates are known, `<stage>_floor_ms`, what bytes
and operations take at these rates. `gaps_ms` is the time within the one call, between its kernels,
in which the GPU ran nothing. The columns `eager_*` belong to the paper's stages in eager PyTorch,
one permutation a query head in every row, at the row's threshold if its settings are the paper's,
else at the paper's own. `crossover` is the shortest prompt, in steps of 256 tokens, for which the
one call took less time than every dense kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from pbs_attn import PBSConfig, plot
from pbs_attn._errors import BenchError
from pbs_attn._inputs import choose_device
from pbs_attn._rows import BEFORE_ATTEND, STAGES, Row, check_outputs

from . import eager
from .contestants import dense_calls
from .floors import Problem, floors_ms
from .gpu_profile import extra_gib, profile_call
from .kernel import DENSE
from .options import PipelineOptions as Options
from .report import (
    RowFile,
    as_table,
    as_text,
    by_stage,
    check_densities,
    check_rounds,
    require_packages,
    say_where,
    stage_columns,
)
from .settings import config_of, configs_of, densities_of, density_at, name_of
from .shapes import SHAPES, Shape, check_activations, check_preset, load_activations
from .stages import Pipeline, reach, synthetic
from .timing import Call, clock_for, interleaved_medians

CROSSOVER_STEP, LONGEST_CROSSOVER = 256, 65536

COLUMNS = (
    *("preset", "input", "tokens", "q_heads", "kv_heads", "head_dim"),
    *("selection", "permute_per", "kv_block_size", "threshold", "density"),
    *stage_columns("ms"),
    *("attention_ms", "gaps_ms", "launches"),
    *stage_columns("kernel_ms"),
    *stage_columns("floor_ms"),
    "extra_gib",
    *stage_columns("ms", BEFORE_ATTEND, "eager_"),
    "eager_extra_gib",
    *(f"{call}_ms" for call in DENSE),
    *("speedup", "crossover"),
)
TABLE = (
    *("preset", "tokens", "permute_per", "kv_block_size", "density"),
    *("before_attend_ms", "attend_ms", "attention_ms", "speedup", "crossover"),
)


def run(options: Options) -> list[Row]:
    """Measures, prints a table, and writes the files that `options` names.

    Returns:
        One row for each input and setting. `speedup` is over the fastest dense kernel.

    Raises:
        BenchError, DemoError: if an option is wrong or a package is missing.
    """
    _check(options)
    from tqdm import tqdm

    device = choose_device(options.device)
    file = RowFile(options.csv, device)
    inputs = len(options.tokens) + len(options.activations) + options.crossover
    steps = len(configs_of(options)) * len(options.presets) * inputs
    with torch.inference_mode(), tqdm(total=steps, desc="pipeline", unit="row") as bar:
        for preset in options.presets:
            bar.set_postfix_str(preset)
            crossovers = _find_crossovers(options, SHAPES[preset], device, bar.update)
            for values in _measure_shape(options, SHAPES[preset], device):
                place = values["permute_per"], values["kv_block_size"]
                values["crossover"] = crossovers.get(place, "")
                file.add(as_row({"preset": preset} | values))
                bar.update()
    print(as_table(file.rows, TABLE))
    if options.picture:
        plot.draw_stages(file.rows, options.picture, title=file.about_run["device"])
    say_where([options.csv, options.picture])
    return file.rows


def _check(options: Options) -> None:
    require_packages("safetensors", "tqdm")
    configs_of(options)
    for preset in options.presets:
        check_preset(preset, "--presets")
    least = 2 * PBSConfig().segment_size
    if min(options.tokens, default=least) < least:
        raise BenchError(f"--tokens must be at least {least}, got {list(options.tokens)}")
    if not (options.tokens or options.activations):
        raise BenchError("--tokens must name a length where there are no --activations")
    check_densities(options.densities, options.tokens)
    check_rounds(options.rounds)
    check_activations(options.activations, [SHAPES[preset] for preset in options.presets])
    check_outputs([options.csv], [options.picture])


def _measure_shape(options: Options, shape: Shape, device: str) -> Iterator[dict[str, object]]:
    densities = densities_of(options.settings, options.tokens, options.densities)
    for num_tokens, density in zip(options.tokens, densities, strict=True):
        tensors = synthetic(shape, num_tokens, device)
        yield from _measure_input(options, "heavy hitters", tensors, density)
        del tensors  # before the next ones are made
    for path in options.activations:
        tensors = load_activations(path, shape, device)
        yield from _measure_input(options, Path(path).stem, tensors, None)


def _measure_input(
    options: Options, name: str, tensors, density: float | None
) -> Iterator[dict[str, object]]:
    """One row a config; the threshold is its own where no density is asked for."""
    dense = dense_calls(*tensors, options.dense)
    for config in configs_of(options):
        pipeline = Pipeline(*tensors, config)
        own = config.resolved_threshold
        reached = reach(pipeline, density) if density else pipeline.set_threshold(own)
        problem = problem_of(pipeline, reached)
        values = {
            "input": name,
            "tokens": problem.num_tokens,
            "q_heads": problem.num_q_heads,
            "kv_heads": problem.num_kv_heads,
            "head_dim": problem.head_dim,
            "selection": name_of(options.settings),
            "permute_per": config.permute_per,
            "kv_block_size": config.key_block_size,
            "threshold": pipeline.threshold,
            "density": reached,
        }
        values |= _times(options, pipeline, dense)
        if pipeline.q.device.type == "cuda":
            values |= _gpu_values(options, pipeline, problem)
        yield values


def _times(options: Options, pipeline: Pipeline, dense: dict[str, Call]) -> dict[str, float]:
    """Every contestant of a row, in turn."""
    calls = {stage: getattr(pipeline, stage) for stage in (*STAGES, "attention")}
    if options.eager:
        eager_calls = eager.stage_calls(*_eager_inputs(pipeline))
        calls |= {f"eager_{stage}": call for stage, call in eager_calls.items()}
    clock = clock_for(pipeline.q.device, options.budget_ms)
    times = interleaved_medians(calls | dense, options.rounds, clock)
    values = by_stage(times, "ms")
    if options.eager:
        eager_times = {stage: times[f"eager_{stage}"] for stage in BEFORE_ATTEND}
        values |= by_stage(eager_times, "ms", BEFORE_ATTEND, "eager_")
    values |= {f"{call}_ms": times[call] for call in (*dense, "attention")}
    if dense:
        values["speedup"] = min(times[call] for call in dense) / times["attention"]
    return values


def _eager_inputs(pipeline: Pipeline) -> tuple:
    """Thresholds of other settings mean nothing to the paper's rule."""
    paper = config_of("paper")
    is_papers = pipeline.config.mass == paper.mass
    threshold = pipeline.threshold if is_papers else paper.resolved_threshold
    return pipeline.q, pipeline.k, pipeline.v, threshold, pipeline.config


def _gpu_values(options: Options, pipeline: Pipeline, problem: Problem) -> dict[str, object]:
    """Values from the profiler, the allocator and the rates of the card."""
    q = pipeline.q
    profile = profile_call(pipeline.attention)
    values = by_stage(profile.stage_ms, "kernel_ms")
    values |= {"gaps_ms": profile.gaps_ms, "launches": profile.launches}
    values["extra_gib"] = extra_gib(pipeline.attention, q.numel() * q.element_size())
    if options.eager:
        call = functools.partial(eager.before_attend, *_eager_inputs(pipeline))
        values["eager_extra_gib"] = extra_gib(call)
    floors = floors_ms(problem, torch.cuda.get_device_name(q.device))
    return values | (by_stage(floors, "floor_ms") if floors else {})


def problem_of(pipeline: Pipeline, density: float) -> Problem:
    q, k = pipeline.q, pipeline.k
    return Problem(
        num_tokens=q.shape[2],
        num_q_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        num_perm_heads=pipeline.perm.shape[1],
        head_dim=q.shape[3],
        element_size=q.element_size(),
        density=density,
        config=pipeline.config,
    )


# Crossover


def _find_crossovers(
    options: Options, shape: Shape, device: str, advance: Callable[[], object]
) -> dict[tuple[str, int], str]:
    """The crossover by order and width of key blocks. It is empty if there is none up to
    LONGEST_CROSSOVER tokens."""
    found = {}
    for config in configs_of(options) if options.crossover else ():
        wins = functools.partial(_wins, options, shape, device, config)
        shortest = shortest_win(wins, CROSSOVER_STEP, LONGEST_CROSSOVER)
        place = config.permute_per, config.key_block_size
        found[place] = "" if shortest is None else str(shortest)
        advance()
    return found


def shortest_win(wins: Callable[[int], bool], step: int, longest: int) -> int | None:
    """The shortest multiple of `step`, from two steps on, from which `wins` is true. `wins` must be
    false before and true after it. Returns None if it is false at every doubling up to
    `longest`."""
    high = 2 * step
    while not wins(high):
        high *= 2
        if high > longest:
            return None
    low = high // 2  # lost, or shorter than any
    while high - low > step:
        middle = (low + high) // (2 * step) * step
        low, high = (low, middle) if wins(middle) else (middle, high)
    return high


def _wins(options: Options, shape: Shape, device: str, config: PBSConfig, length: int) -> bool:
    """Whether one call beats every dense kernel, at the density that goes with the settings."""
    tensors = synthetic(shape, length, device)
    pipeline = Pipeline(*tensors, config)
    reach(pipeline, density_at(length, options.settings))
    calls = dense_calls(*tensors, options.dense) | {"attention": pipeline.attention}
    times = interleaved_medians(
        calls, options.rounds, clock_for(pipeline.q.device, options.budget_ms)
    )
    own = times.pop("attention")
    return own < min(times.values())


# Rows


def as_row(values: dict[str, object]) -> Row:
    """All columns in order, rounded; empty where there is no value."""
    unknown = values.keys() - set(COLUMNS)
    if unknown:
        raise ValueError(f"every value must have a column, got {sorted(unknown)}")
    return {column: as_text(column, values.get(column, "")) for column in COLUMNS}
