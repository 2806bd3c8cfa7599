"""One engine of `bench serve`, in a process of its own: the arguments of vllm.LLM, and the
measurements. `python -m pbs_attn.bench.serving_engine JSON` prints each row on a line, after
MARK."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from pbs_attn import _environment
from pbs_attn._errors import BenchError
from pbs_attn._rows import Row

from . import serving_worker as worker
from .options import PRESETS, ServeOptions
from .shapes import SHAPES, Shape

MARK = "row of bench serve: "
# Where a row was measured. `run` identifies the command that started all engines.
PLACE = ("device", "driver", "vllm", "torch", "pbs_attn", "commit", "run")
COLUMNS = (
    *("preset", "tp", "mode", "backend", "inductor", "threshold", "density", "part", "chunk"),
    *("block_size", "what", "tokens", "seconds", "rounds", *PLACE),
)
# The measured quantities.
FIRST_TOKEN, DECODE, THROUGHPUT = "first token", "decode step", "throughput"
DECODE_STEPS = 128
DECODE_ROUNDS = 5
# The thresholds at which a probe counts.
GRID = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008),
    *(0.012, 0.016, 0.024, 0.032, 0.05, 0.08, 0.12, 0.2),
)
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


# Settings of the engine


def targets_of(densities: Iterable[str]) -> dict[int, float]:
    """The density to reach, by length.

    Raises:
        BenchError: if a text is not TOKENS:DENSITY with a density in (0, 1].
    """
    targets = {}
    for text in densities:
        tokens, _, density = text.partition(":")
        try:
            targets[int(tokens)] = float(density)
        except ValueError:
            density = "nan"
        if not 0 < float(density) <= 1:
            raise BenchError(f"--densities must be TOKENS:DENSITY, such as 32768:0.05, got {text}")
    return targets


def longest(options: ServeOptions) -> int:
    """The number of tokens of the longest sequence."""
    answer = max(options.answer_tokens, DECODE_STEPS + 1)
    return max(*options.tokens, options.request_tokens) + answer


def model_config(shape: Shape, max_tokens: int) -> dict[str, object]:
    """The contents of config.json."""
    return {
        "architectures": [ARCHITECTURES[shape.model_type]],
        "model_type": shape.model_type,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_q_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": max_tokens,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def llm_options(options: ServeOptions, mode: str, part: str) -> dict[str, object]:
    """The arguments of vllm.LLM, except the model."""
    num_requests = max(16, options.requests)
    sizes = [2**n for n in range(num_requests.bit_length()) if 2**n <= num_requests]
    compilation: dict[str, object] = {"cudagraph_capture_sizes": sizes}
    if options.fast_start:
        compilation |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    found = {
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "generation_config": "vllm",
        "seed": 0,
        "max_model_len": longest(options),
        "max_num_batched_tokens": max(options.tokens) if part == "whole" else options.chunk,
        "max_num_seqs": num_requests,
        "gpu_memory_utilization": 0.88,  # room for the probe's copies of keys
        "enable_prefix_caching": False,
        "tensor_parallel_size": options.tensor_parallel_size,
        "disable_log_stats": False,  # decode steps are computed from the stats
        "compilation_config": compilation,
    }
    if mode == "dense":
        return found | {"attention_backend": "FLASH_ATTN"}
    pbs = {"attention_backend": "CUSTOM", "additional_config": {"pbs_attn": {"preset": mode}}}
    return found | pbs


# Thresholds


def on_logs(points: Sequence[tuple[float, float]], x: float) -> float:
    """Returns y at x. Between the points, log y is linear in log x. Outside of them, y is that of
    the nearest point."""
    points = sorted(points)
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= x <= right:
            share = math.log(x / left) / math.log(right / left) if right > left else 0.0
            return low * (high / low) ** share
    return points[0][1] if x < points[0][0] else points[-1][1]


def densities_of(counts: Sequence[worker.Counts]) -> list[tuple[float, float]]:
    """(threshold, density) pairs over all workers, each of which has some of the heads."""
    return [
        (
            threshold,
            sum(of_worker[threshold][0] for of_worker in counts)
            / sum(of_worker[threshold][1] for of_worker in counts),
        )
        for threshold in counts[0]
    ]


def threshold_for(found: Sequence[tuple[float, float]], density: float) -> float:
    """The threshold that gives a density, interpolated between (threshold, density) pairs."""
    return on_logs([(visited, threshold) for threshold, visited in found], density)


# Measurements


class Engine:
    """A vllm.LLM, and how its rows are measured."""

    def __init__(self, llm, options: ServeOptions, mode: str, part: str, about: Row):
        self.llm, self.options, self.mode, self.part, self.about = llm, options, mode, part, about
        self.targets = targets_of(options.densities)
        self.tuned: dict[int, tuple[float, float]] = {}  # threshold and density, by length
        self.random = random.Random(0)

    def rows(self) -> Iterator[Row]:
        """Yields the rows. Decode steps and throughput are measured in chunks only, as servers
        run."""
        for length in self.options.tokens:
            self.tune(length)
            self.generate([length], 1)
            rounds = [self.generate([length], 1)[0] for _ in range(self.options.rounds)]
            yield self.row(FIRST_TOKEN, length, length, rounds)
        if self.part == "whole":
            return
        length, num_requests = self.options.request_tokens, self.options.requests
        self.tune(length)
        rounds = [self.decode_step(length) for _ in range(DECODE_ROUNDS)]
        yield self.row(DECODE, length, length, rounds)
        if num_requests:
            answer = self.options.answer_tokens
            self.generate([length], 2)
            seconds, _ = self.generate([length] * num_requests, answer)
            yield self.row(THROUGHPUT, length, num_requests * (length + answer), [seconds])

    def generate(self, lengths: Sequence[int], num_tokens: int) -> tuple[float, list]:
        """Returns the seconds until all prompts, which are random and have these lengths, have
        their answers."""
        from vllm import SamplingParams

        vocabulary = range(2, SHAPES[self.options.preset].vocab_size)
        prompts = [{"prompt_token_ids": self.random.choices(vocabulary, k=n)} for n in lengths]
        sampling = SamplingParams(
            max_tokens=num_tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start, outputs

    def decode_step(self, length: int) -> float:
        """Seconds between two tokens of an answer."""
        _, (output,) = self.generate([length], DECODE_STEPS + 1)
        return (output.metrics.last_token_ts - output.metrics.first_token_ts) / DECODE_STEPS

    def tune(self, length: int) -> None:
        """Sets the threshold for prompts of a length, and measures the density that it gives."""
        if self.mode == "dense":
            return
        if length not in self.tuned:
            threshold = PRESETS[self.mode].resolved_threshold
            if length in self.targets:
                threshold = threshold_for(self.probe(length, GRID), self.targets[length])
            # Another threshold changes the activations of later layers, and so the density.
            self.set_threshold(threshold)
            found = self.probe(length, sorted({*GRID, threshold}))
            self.tuned[length] = threshold, on_logs(found, threshold)
        self.set_threshold(self.tuned[length][0])

    def set_threshold(self, threshold: float) -> None:
        self.llm.apply_model(functools.partial(worker.set_threshold, threshold=threshold))

    def probe(self, length: int, thresholds: Sequence[float]) -> list[tuple[float, float]]:
        """(threshold, density) pairs of one prompt."""
        self.llm.apply_model(functools.partial(worker.start_probe, thresholds=thresholds))
        self.generate([length], 1)
        return densities_of(self.llm.apply_model(worker.stop_probe))

    def row(self, what: str, length: int, tokens: int, rounds: Sequence[float]) -> Row:
        """One row. `length` is the length of the prompts."""
        threshold, density = self.tuned.get(length, ("", ""))
        values = self.about | {
            "threshold": f"{threshold:.5f}" if threshold else "",
            "density": f"{density:.4f}" if density else "",
            "what": what,
            "tokens": str(tokens),
            "seconds": f"{statistics.median(rounds):.6f}",
            "rounds": " ".join(f"{seconds:.6f}" for seconds in rounds),
        }
        return {column: values[column] for column in COLUMNS}


def about_engine(llm, options: ServeOptions, mode: str, part: str, run: str) -> Row:
    """The columns that all rows of an engine share."""
    import vllm

    arguments = llm_options(options, mode, part)
    place = _environment.describe("cuda" if torch.cuda.is_available() else "cpu")
    return place | {
        "preset": options.preset,
        "tp": str(options.tensor_parallel_size),
        "mode": mode,
        "backend": str(arguments["attention_backend"]),
        "inductor": "no" if options.fast_start else "yes",
        "part": part,
        "chunk": str(arguments["max_num_batched_tokens"]),
        "block_size": str(llm.llm_engine.vllm_config.cache_config.block_size),
        "vllm": vllm.__version__,
        "run": run,
    }


def as_json(options: ServeOptions, mode: str, part: str, run: str) -> str:
    """The argument of `main`."""
    values = {"options": dataclasses.asdict(options), "mode": mode, "part": part, "run": run}
    return json.dumps(values)


def from_json(text: str) -> dict[str, object]:
    """The arguments that `as_json` was called with."""
    values = json.loads(text)
    options = values["options"]
    options |= {name: tuple(x) for name, x in options.items() if isinstance(x, list)}
    return values | {"options": ServeOptions(**options)}


def main(text: str) -> None:
    """Measures one engine, with the settings that `as_json` wrote."""
    from vllm import LLM

    asked = from_json(text)
    options, mode, part = (asked[name] for name in ("options", "mode", "part"))
    with tempfile.TemporaryDirectory(prefix="pbs_serve_") as folder:
        config = model_config(SHAPES[options.preset], longest(options))
        (Path(folder) / "config.json").write_text(json.dumps(config))
        llm = LLM(model=folder, **llm_options(options, mode, part))
    llm.apply_model(worker.set_weights)
    for row in Engine(llm, options, mode, part, about_engine(llm, **asked)).rows():
        # The row starts a line, even if another process has left one unfinished.
        print(f"\n{MARK}{json.dumps(row)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
