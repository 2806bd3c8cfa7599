"""vLLM with dense attention and with PBS: time to the first token, decode steps and throughput.

A contestant is an engine, `vllm.LLM`, in a process of its own, because a process of vLLM has one
attention backend. `dense` is FLASH_ATTN of vLLM, and the others are the plugin with a preset.
Engines run one after the other on the same GPUs, with the same random weights. This process does
not use the GPU, so that the engine has all of its memory.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pbs_attn import PBSConfig, _library
from pbs_attn._environment import RUN
from pbs_attn._errors import BenchError, DemoError, MissingPackageError, extra_command
from pbs_attn._rows import Row, check_outputs, one_run, read_rows, write_csv
from pbs_attn.integrations.vllm.settings import MIN_TOKENS

from .options import MODES
from .options import ServeOptions as Options
from .report import as_table, check_rounds, check_tokens, require_packages, say_where
from .serving_engine import COLUMNS, FIRST_TOKEN, MARK, as_json, targets_of
from .shapes import check_preset

BLOCK_SIZE = PBSConfig().block_size  # a shorter chunk stays dense in the plugin
# Variables that are already set keep their values.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it compiles at the start, and sampling is not measured
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",  # it needs NVLink multicast, which not every host allows
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions that take the model are sent to workers
}
SETTING = ("preset", "tp", "inductor", "part", "chunk", "what", "tokens")
Speedups = dict[tuple[str, ...], float]  # by the values of SETTING and the mode


def run(options: Options) -> list[Row]:
    """Measures, writes the CSV, and prints a table. With `options.table`, only prints the table of
    that CSV.

    Returns:
        One row for each engine and measured quantity.

    Raises:
        BenchError, DemoError: if an option is wrong, a package or a GPU is missing, or an engine
            failed.
    """
    if options.table:
        rows = read_table(options.table)
        print(format_table(rows))
        return rows
    _check(options)
    _check_machine(options)
    rows, failed = _measure(options)
    if rows:
        print(format_table(rows))
        say_where([options.csv])
    if failed:
        engines = "; ".join(failed)
        raise BenchError(f"every engine must exit without an error, got failures of {engines}")
    return rows


def _check(options: Options) -> None:
    check_preset(options.preset)
    check_tokens(options.tokens, MIN_TOKENS)
    targets_of(options.densities)
    check_rounds(options.rounds)
    for option, value, least in (
        ("--chunk", options.chunk, BLOCK_SIZE),
        ("--requests", options.requests, 0),
        ("--request-tokens", options.request_tokens, MIN_TOKENS),
        ("--answer-tokens", options.answer_tokens, 1),
        ("--tensor-parallel-size", options.tensor_parallel_size, 1),
    ):
        if value < least:
            raise BenchError(f"{option} must be at least {least}, got {value}")
    check_outputs([options.csv], [])


def _check_machine(options: Options) -> None:
    """Checks that engines can start, without a context on the GPU."""
    require_packages("tqdm")
    if importlib.util.find_spec("vllm") is None:
        how = extra_command("vllm")
        raise MissingPackageError(f"bench serve needs vllm, which is not installed: {how}")
    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        raise DemoError("bench serve needs a CUDA GPU, but torch finds none")
    lacking = _library.missing_gpu_support()
    if lacking is not None:
        raise DemoError(f"bench serve needs kernels for the GPU: {lacking}")
    if options.tensor_parallel_size > num_gpus:
        size = options.tensor_parallel_size
        raise BenchError(f"--tensor-parallel-size must be at most {num_gpus}, got {size}")
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    if "pbs_attn" not in plugins.names:
        raise DemoError("pbs_attn must be installed where vLLM finds its plugin, found none")


def _measure(options: Options) -> tuple[list[Row], list[str]]:
    """Returns the rows, and a description of each engine that failed."""
    from tqdm import tqdm

    start, rows, failed = time.monotonic(), [], []

    def add(row):
        rows.append(row)
        if options.csv:
            write_csv(options.csv, rows)

    logs = Path(options.csv or tempfile.mkdtemp(prefix="pbs_serve_")).resolve()
    logs = logs.parent if options.csv else logs
    engines = list(itertools.product(options.parts, options.modes))
    for part, mode in tqdm(engines, desc="serve", unit="engine"):
        if time.monotonic() - start > options.time_limit:
            left_out = f"{mode} {part} is left out: --time-limit is over"
            tqdm.write(left_out, file=sys.stderr)
            continue
        log = logs / f"serve_{mode}_{part}.log"
        command = engine_command(options, mode, part)
        if run_engine(command, log, add):
            failed.append(f"{mode} {part}, whose log is {log}")
    return rows, failed


def engine_command(options: Options, mode: str, part: str) -> list[str]:
    """The command line of one engine."""
    module = f"{__package__}.serving_engine"
    return [sys.executable, "-m", module, as_json(options, mode, part, RUN)]


def run_engine(command: Sequence[str], log: Path, add: Callable[[Row], None]) -> int:
    """Calls `add` with each row that an engine prints, as soon as it is printed. All other output
    goes to the log.

    Returns:
        The exit status.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    text = {"encoding": "utf-8", "errors": "replace"}
    environment = ENVIRONMENT | os.environ
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(command, env=environment, **pipes, **text) as process,
    ):
        for line in process.stdout:
            _, mark, row = line.partition(MARK)
            if mark:
                add(json.loads(row))
            else:
                file.write(line)
                file.flush()
    return process.returncode


# The table


def read_table(path: str) -> list[Row]:
    """The rows of a CSV of this bench.

    Raises:
        BenchError: if the file is not such a CSV.
    """
    rows = read_rows(path)
    missing = [column for column in COLUMNS if rows and column not in rows[0]]
    if missing:
        bench, reason = "serve", f"there is no column {missing[0]}"
        raise BenchError(f"CSV must be of bench {bench}, got {path}: {reason}")
    return rows


def setting_of(row: Row) -> tuple[str, ...]:
    """The values that rows must share to be compared."""
    return tuple(row[column] for column in SETTING)


def speedups(rows: Sequence[Row]) -> Speedups:
    """For each row of PBS with a dense row of the same setting, the seconds of dense divided by its
    own."""
    seconds = {(*setting_of(row), row["mode"]): float(row["seconds"]) for row in rows}
    return {
        place: seconds[(*place[:-1], "dense")] / value
        for place, value in seconds.items()
        if place[-1] != "dense" and (*place[:-1], "dense") in seconds
    }


def gains_in_chunks(rows: Sequence[Row]) -> Speedups:
    """For first tokens, the speed-up in chunks as a share of the speed-up in one piece. The keys
    are those of `speedups` for the prompts in chunks."""
    found = speedups(rows)
    at, chunk, what = (SETTING.index(name) for name in ("part", "chunk", "what"))

    def others(place):
        return [x for nth, x in enumerate(place) if nth not in (at, chunk)]

    return {
        place: value / found[whole]
        for place, value in found.items()
        for whole in found
        if place[what] == FIRST_TOKEN
        and (place[at], whole[at]) == ("chunked", "whole")
        and others(place) == others(whole)
    }


def format_table(rows: Sequence[Row]) -> str:
    """A line for each setting, with the seconds of every mode, and the speed-up over dense. The
    lines below the table compare the speed-up in chunks with the one in one piece.

    Raises:
        BenchError: if rows come from several commands, or there are none.
    """
    one_run(rows)
    modes = [mode for mode in MODES if mode in {row["mode"] for row in rows}]
    columns, found = list(SETTING), speedups(rows)
    lines: dict[tuple[str, ...], Row] = {}
    for row in rows:
        line = lines.setdefault(setting_of(row), dict(zip(SETTING, setting_of(row), strict=True)))
        mode, speedup = row["mode"], found.get((*setting_of(row), row["mode"]))
        line[mode] = f"{float(row['seconds']):.4f}"
        line[f"{mode} density"] = row["density"]
        line[f"dense / {mode}"] = "" if speedup is None else f"{speedup:.3f}"
    for mode in modes:
        columns += [mode] if mode == "dense" else [mode, f"{mode} density", f"dense / {mode}"]
    cells = [{column: line.get(column, "") for column in columns} for line in lines.values()]
    said = [
        f"{place[-1]}, {place[-2]} tokens: the speed-up in chunks is {share:.3f} of the one in "
        "one piece"
        for place, share in gains_in_chunks(rows).items()
    ]
    return "\n".join([as_table(cells, columns), *said])
