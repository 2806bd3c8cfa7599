"""Prefill of one prompt in chunks with keys in pages, as serving engines do it, beside a single
call.

The input is that of `pipeline`. Three ways run in turn. `in_order` is attention_paged_, which
orders the pages while the prompt arrives. `paged` is attention_paged, which copies and sorts all
keys for each chunk. `whole` is one call of attention. Each way has the threshold that gives the
requested density: the pairs of query and key blocks that all chunks visit, divided by the causal
pairs. Times are sums over the chunks, without the time to write the keys of a chunk to their pages.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterable

import torch

import pbs_attn
from pbs_attn import PBSConfig
from pbs_attn._errors import BenchError
from pbs_attn._inputs import choose_device
from pbs_attn._rows import Row, check_outputs
from pbs_attn.masks import candidate_blocks

from .options import CHUNK_SETTINGS
from .options import ChunksOptions as Options
from .report import (
    RowFile,
    as_table,
    as_text,
    check_densities,
    check_rounds,
    check_tokens,
    require_packages,
    say_where,
)
from .settings import config_of, densities_of, name_of
from .shapes import SHAPES, check_preset
from .stages import Pipeline, reach, synthetic
from .timing import Call, interleaved_medians

ops = torch.ops.pbs
PAGE_SIZE = 256
WAYS = ("in_order", "paged", "whole")
COLUMNS = (
    *("preset", "tokens", "chunk", "q_heads", "kv_heads", "head_dim", "selection", "page_size"),
    *(f"{way}_{value}" for way in WAYS for value in ("threshold", "density", "ms")),
    "speedup",
)
TABLE = ("tokens", "chunk", "in_order_density", *(f"{way}_ms" for way in WAYS), "speedup")


def run(options: Options) -> list[Row]:
    """Measures, prints a table, and writes the files that `options` names.

    Returns:
        One row for each length and chunk size. `speedup` is the time of `paged` over that of
        `in_order`.

    Raises:
        BenchError, DemoError: if an option is wrong or a package is missing.
    """
    _check(options)
    from tqdm import tqdm

    device = choose_device(options.device)
    file = RowFile(options.csv, device)
    steps = len(options.tokens) * len(options.chunks)
    densities = densities_of(options.settings, options.tokens, options.densities)
    with torch.inference_mode(), tqdm(total=steps, desc="chunks", unit="row") as bar:
        for num_tokens, density in zip(options.tokens, densities, strict=True):
            tensors = synthetic(SHAPES[options.preset], num_tokens, device)
            for chunk in options.chunks:
                bar.set_postfix_str(f"{num_tokens} tokens by {chunk}")
                file.add(_measure(options, tensors, chunk, density))
                bar.update()
            del tensors  # before the next ones are made
    print(as_table(file.rows, TABLE))
    say_where([options.csv])
    return file.rows


def _check(options: Options) -> None:
    require_packages("tqdm")
    check_preset(options.preset)
    config = config_of(name_of(options.settings, CHUNK_SETTINGS))
    check_tokens(options.tokens, 2 * config.segment_size)
    # The query blocks are then the same as in one call.
    step = config.block_size
    if not options.chunks or any(chunk < step or chunk % step for chunk in options.chunks):
        raise BenchError(f"--chunks must be multiples of {step}, got {list(options.chunks)}")
    check_densities(options.densities, options.tokens)
    check_rounds(options.rounds)
    check_outputs([options.csv], [])


def _measure(options: Options, tensors, chunk: int, density: float) -> Row:
    q, k, _ = tensors
    ways = make_ways(Prompt(*tensors, chunk), config_of(options.settings))
    values = {
        "preset": options.preset,
        "tokens": q.shape[2],
        "chunk": chunk,
        "q_heads": q.shape[1],
        "kv_heads": k.shape[1],
        "head_dim": q.shape[3],
        "selection": name_of(options.settings),
        "page_size": PAGE_SIZE,
    }
    for name, way in ways.items():
        values[f"{name}_density"] = reach(way, density)
        values[f"{name}_threshold"] = way.threshold
    clocks = {
        name: functools.partial(milliseconds, way.steps(), q.device) for name, way in ways.items()
    }
    times = interleaved_medians(clocks, options.rounds, clock=lambda read: read())
    values |= {f"{name}_ms": times[name] for name in WAYS}
    values["speedup"] = times["paged"] / times["in_order"]
    return {column: as_text(column, values[column]) for column in COLUMNS}


Step = tuple[Call, Call]  # (prepare, call): only the call is timed


def milliseconds(steps: Iterable[Step], device: torch.device) -> float:
    """The total time of the calls."""
    if device.type == "cpu":
        total = 0.0
        for prepare, call in steps:
            prepare()
            start = time.perf_counter()
            call()
            total += time.perf_counter() - start
        return 1e3 * total
    events = []
    for prepare, call in steps:
        prepare()
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        call()
        pair[1].record()
        events.append(pair)
    torch.cuda.synchronize(device)
    return sum(start.elapsed_time(stop) for start, stop in events)


class Prompt:
    """q (1, Hq, N, D), k and v (1, Hkv, N, D), stored with the tokens before the heads, and pages
    for the keys, in random order."""

    def __init__(self, q, k, v, chunk: int):
        self.q, self.k, self.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        self.num_tokens = q.shape[2]
        borders = [*range(0, self.num_tokens, chunk), self.num_tokens]
        self.chunks = list(itertools.pairwise(borders))
        num_pages = -(-self.num_tokens // PAGE_SIZE)
        shape = (num_pages, PAGE_SIZE, k.shape[1], k.shape[3])
        self.k_cache, self.v_cache = k.new_zeros(shape), k.new_zeros(shape)
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randperm(num_pages, generator=generator).int()[None].to(k.device)
        self.out = self.tokens(torch.empty_like(self.q), 0, self.num_tokens)

    @staticmethod
    def tokens(x: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """(1, heads, tokens, D) -> (last - first, heads, D), a view."""
        return x[0, :, first:last].transpose(0, 1)

    def places(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The page and the row of each key in the caches."""
        key = torch.arange(first, last, device=self.table.device)
        return self.table[0, key // PAGE_SIZE].long(), key % PAGE_SIZE

    def write(self, first: int, last: int) -> None:
        """Writes keys and values to their pages, in their original order."""
        places = self.places(first, last)
        for cache, x in ((self.k_cache, self.k), (self.v_cache, self.v)):
            cache[places] = self.tokens(x, first, last)


class InChunks(abc.ABC):
    """A way to run the chunks of a prompt. `set_threshold` sets the threshold."""

    threshold: float

    def __init__(self, prompt: Prompt, config: PBSConfig):
        self.prompt, self.config = prompt, config

    def config_of(self, last: int) -> PBSConfig:
        """Only the last chunk has a dense tail, because the answer follows from its last
        queries."""
        is_last = last == self.prompt.num_tokens
        tail = self.config.dense_tail if is_last else 0
        return dataclasses.replace(self.config, threshold=self.threshold, dense_tail=tail)

    def set_threshold(self, threshold: float) -> float:
        """Returns the density that the threshold gives."""
        self.threshold = threshold
        visited = total = 0.0
        for first, last in self.prompt.chunks:
            sizes = (last - first, last)
            config = self.config_of(last)
            candidates, own = candidate_blocks(*sizes, config=config)
            pairs = (candidates + own).sum().item()
            mask = self.block_mask(first, last, config)
            visited += pairs * pbs_attn.density(mask, *sizes, config=config).mean().item()
            total += pairs
        return visited / total

    def steps(self) -> list[Step]:
        """The steps of a prefill. The arguments of a call exist before the clock starts."""
        found = []
        for first, last in self.prompt.chunks:
            write = functools.partial(self.prompt.write, first, last)
            found.append((write, self.call(first, last)))
        return found

    def where(self, first: int, last: int) -> tuple[torch.Tensor, ...]:
        """The arguments that say where the sequences and their pages are."""
        return torch.tensor([0, last - first]), torch.tensor([last]), self.prompt.table

    @abc.abstractmethod
    def call(self, first: int, last: int) -> Call:
        """The call that runs one chunk."""

    @abc.abstractmethod
    def block_mask(self, first: int, last: int, config: PBSConfig) -> torch.Tensor:
        """The block mask of a chunk: (1, Hq, query blocks, words)."""


class Paged(InChunks):
    """attention_paged, which sorts all keys again for each chunk."""

    def block_mask(self, first: int, last: int, config: PBSConfig) -> torch.Tensor:
        q, k, v = self.prompt.q, self.prompt.k, self.prompt.v
        return pbs_attn.select(
            q[:, :, first:last], k[:, :, :last], v[:, :, :last], config=config
        ).block_mask

    def call(self, first: int, last: int) -> Call:
        prompt = self.prompt
        tensors = prompt.tokens(prompt.q, first, last), prompt.k_cache, prompt.v_cache
        settings = self.config_of(last).op_kwargs("attention_paged")
        return functools.partial(
            ops.attention_paged, *tensors, *self.where(first, last), **settings
        )


class InOrder(InChunks):
    """attention_paged_, which sorts the keys of each chunk in their pages."""

    def __init__(self, prompt: Prompt, config: PBSConfig):
        super().__init__(prompt, config)
        # The order does not depend on the threshold, so one prefill gives the keys to select from.
        self.threshold = 1.0
        for prepare, call in self.steps():
            prepare()
            call()
        ordered = prompt.k_cache[prompt.places(0, prompt.num_tokens)]
        self.k_ordered = ordered.transpose(0, 1)[None]

    def block_mask(self, first: int, last: int, config: PBSConfig) -> torch.Tensor:
        q, k = self.prompt.q[:, :, first:last], self.prompt.k[:, :, :last]
        num_blocks = -(-last // config.key_block_size)
        k_mean = q.new_zeros((1, k.shape[1], num_blocks, k.shape[3]), dtype=torch.float32)
        settings = config.op_kwargs("select_blocks")
        return ops.select_blocks(q, k, k_mean, None, self.k_ordered[:, :, :last], **settings)[0]

    def call(self, first: int, last: int) -> Call:
        prompt = self.prompt
        tensors = prompt.tokens(prompt.q, first, last), prompt.k_cache, prompt.v_cache
        settings = self.config_of(last).op_kwargs("attention_paged_")
        rows = *tensors, prompt.out[first:last], *self.where(first, last)
        new = (prompt.tokens(x, first, last) for x in (prompt.k, prompt.v))
        return functools.partial(ops.attention_paged_, *rows, *new, **settings)


class Whole(Pipeline):
    """One call of attention."""

    def steps(self) -> list[Step]:
        return [(lambda: None, self.attention)]


def make_ways(prompt: Prompt, config: PBSConfig) -> dict[str, InChunks | Whole]:
    """The ways to run the prompt, by their names in WAYS."""
    whole = Whole(prompt.q, prompt.k, prompt.v, config)
    return dict(zip(WAYS, (InOrder(prompt, config), Paged(prompt, config), whole), strict=True))
