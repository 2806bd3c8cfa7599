"""Time to the first token of a language model, with dense attention and with PBS.

A model given by `--model` reads a text, and PBS visits the blocks that the threshold of its
settings selects. Otherwise a named architecture has random weights, whose attention has no
structure. Its attention layers then work on synthetic queries, keys and values in place of the
model's own, with the same shape and memory layout. These have heavy-hitter keys, and every row
gives the density that PBS visits. Everything else, from the projections to the KV cache, is the
model's. A third contestant has attention that costs nothing: its time is the bound that the other
layers set. The column `selection` has the name of the preset.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch

from pbs_attn import PBSConfig, demo_model, plot
from pbs_attn._errors import BenchError
from pbs_attn._inputs import choose_device, read_text
from pbs_attn._rows import Row, check_outputs

from . import selections
from .contestants import SDPA_BACKENDS, Attention, sdpa_through
from .layers import register_attention, require_pbs_layers
from .options import PrefillOptions as Options
from .report import (
    RowFile,
    as_table,
    check_densities,
    check_thresholds,
    check_tokens,
    require_packages,
    say_where,
)
from .settings import config_of, densities_of, name_of
from .shapes import SHAPES, Shape, build, check_preset, shape_of
from .stages import Pipeline, heavy_hitters, reach
from .timing import cuda_events, interleaved_medians, wall_clock

NAME = "pbs_bench"  # registered with transformers
TABLE = ("model", "tokens", "density", "dense_backend", "dense_s", "pbs_s", "speedup", "bound")


class Substitute:
    """The attention function of a model. It works on `tensors` if they are given, else on the
    model's own."""

    def __init__(self) -> None:
        self.tensors: tuple[torch.Tensor, ...] | None = None
        self.attention: Attention | None = None

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        """query (B, Hq, N, D), key and value (B, Hkv, N, D) -> (B, N, Hq, D), None."""
        del module, attention_mask, kwargs
        tensors = (query, key, value)
        for own, other in zip(tensors, self.tensors or tensors, strict=True):
            if own.shape != other.shape:
                raise BenchError(f"tensors must be {tuple(own.shape)}, got {tuple(other.shape)}")
        out = self.attention(*(self.tensors or tensors), scale=scaling)
        return out.transpose(1, 2).contiguous(), None


def run(options: Options) -> list[Row]:
    """Measures, prints a table, and writes the files that `options` names.

    Returns:
        One row for each length: seconds (median of the rounds) of the whole prefill with the
        fastest dense backend of torch's SDPA, with PBS, and with attention that costs nothing.
        `bound` is the largest possible `speedup`.

    Raises:
        BenchError, DemoError: if an option is wrong or a package is missing.
    """
    _check(options)
    from tqdm import tqdm

    device = choose_device(options.device)
    substitute = _register()
    make_contest = (_preset if options.model is None else _given)(options, substitute, device)
    file = RowFile(options.csv, device)
    lengths = list(zip(options.tokens, _rounds(options), strict=True))
    steps = 3 * sum(_rounds(options))
    with torch.inference_mode(), tqdm(total=steps, desc="prefill", unit="run") as bar:
        for nth, (num_tokens, rounds) in enumerate(lengths):
            bar.set_postfix_str(f"{num_tokens} tokens")
            try:
                file.add(make_contest(nth).measure(rounds, bar.update))
            except torch.OutOfMemoryError as error:
                raise BenchError(f"--tokens must fit in memory, got {num_tokens}") from error
    print(as_table(file.rows, TABLE))
    if options.picture:
        title = f"{file.rows[0]['model']}, {file.about_run['device']}"
        plot.draw_speedup(file.rows, options.picture, title=title)
    say_where([options.csv, options.picture])
    return file.rows


def _check(options: Options) -> None:
    require_packages("transformers", "tqdm")
    check_preset(options.preset)
    layers = SHAPES[options.preset].num_layers
    if options.layers is not None and not 1 <= options.layers <= layers:
        raise BenchError(f"--layers must be 1 to {layers}, got {options.layers}")
    if options.model is not None and (options.layers or options.densities):
        raise BenchError("--layers and --densities must be used with --preset, got --model")
    if options.model is None and options.text is not None:
        raise BenchError("--text must be used with --model: random weights read nothing")
    if options.model is None and options.threshold is not None:
        raise BenchError(
            "--threshold must be used with --model: --densities set that of random weights"
        )
    config = config_of(options.settings, options.permute_per)
    if options.threshold is not None:
        check_thresholds("--threshold", [options.threshold], config.mass)
    if min(options.rounds, default=0) < 1:
        raise BenchError(f"--rounds must be positive, got {list(options.rounds)}")
    check_tokens(options.tokens, 2 * PBSConfig().segment_size)
    check_densities(options.densities, options.tokens)
    lengths = len(options.tokens)
    if len(_rounds(options)) != lengths:
        given = len(options.rounds)
        raise BenchError(
            f"--rounds must have one value or as many as --tokens, got {given} for {lengths}"
        )
    check_outputs([options.csv], [options.picture])


def _rounds(options: Options) -> tuple[int, ...]:
    rounds = options.rounds
    return rounds * len(options.tokens) if len(rounds) == 1 else rounds


def _register() -> Substitute:
    substitute = Substitute()
    register_attention(NAME, substitute)
    return substitute


@dataclasses.dataclass
class _Contest:
    """One prompt, `ids` (1, N), and the attention functions of the layers. For `tensors`, see
    Substitute."""

    model: torch.nn.Module
    substitute: Substitute
    ids: torch.Tensor
    tensors: list[torch.Tensor] | None
    attentions: dict[str, Attention]  # dense, pbs
    about: Row

    def measure(self, rounds: int, advance: Callable[[], object]) -> Row:
        """Returns the row of this length. Calls advance() after each run of the model."""

        def clock(call: Callable[[], None]) -> float:
            milliseconds = wall_clock(call)
            advance()
            return milliseconds

        attentions = self.attentions | {"linear": lambda q, k, v, scale: q}
        calls = {name: functools.partial(self._run, call) for name, call in attentions.items()}
        with _first_layer_alone(self.model):
            for call in calls.values():
                call()
        times = interleaved_medians(calls, rounds, clock, warm_ups=0)
        return {
            **self.about,
            **{f"{name}_s": f"{milliseconds / 1e3:.4f}" for name, milliseconds in times.items()},
            "speedup": f"{times['dense'] / times['pbs']:.3f}",
            "bound": f"{times['dense'] / times['linear']:.3f}",
            "rounds": str(rounds),
        }

    def _run(self, attention: Attention) -> None:
        """Runs the whole prefill and waits until the device has finished."""
        self.substitute.tensors = None if self.tensors is None else tuple(self.tensors)
        self.substitute.attention = attention
        self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1)
        if self.ids.device.type == "cuda":
            torch.cuda.synchronize(self.ids.device)


def _pbs_attention(config: PBSConfig) -> Attention:
    return functools.partial(torch.ops.pbs.attention, **config.op_kwargs())


def _preset(options: Options, substitute: Substitute, device: str) -> Callable[[int], _Contest]:
    """Contests of an architecture with random weights, by length."""
    shape = SHAPES[options.preset]
    shape = dataclasses.replace(shape, num_layers=options.layers or shape.num_layers)
    longest = max(options.tokens)
    densities = densities_of(options.settings, options.tokens, options.densities)
    config = config_of(options.settings, options.permute_per)
    model = build(shape, max_tokens=longest, device=device, attn_implementation=NAME)

    def make(nth: int) -> _Contest:
        num_tokens, density = options.tokens[nth], densities[nth]
        ids = torch.randint(shape.vocab_size, (1, num_tokens), device=device)
        tensors = _synthetic(shape, num_tokens, device)
        pipeline = Pipeline(*tensors, config)
        reached = reach(pipeline, density)
        backend, dense = _best_dense(tensors)
        about = {
            "model": options.preset,
            "layers": str(shape.num_layers),
            "weights": "random",
            "activations": "heavy hitters",
            "tokens": str(num_tokens),
            "selection": name_of(options.settings),
            "permute_per": config.permute_per,
            "threshold": f"{pipeline.threshold:.4f}",
            "density": f"{reached:.4f}",
            "dense_backend": backend,
        }
        pbs = _pbs_attention(dataclasses.replace(config, threshold=pipeline.threshold))
        return _Contest(model, substitute, ids, tensors, {"dense": dense, "pbs": pbs}, about)

    return make


def _given(options: Options, substitute: Substitute, device: str) -> Callable[[int], _Contest]:
    """Contests of the given model on its text."""
    text, text_name = read_text(options.text)
    files = demo_model.find(options.model, "bench")
    all_ids = files.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    longest = max(options.tokens)
    if all_ids.shape[1] < longest:
        raise BenchError(f"{text_name} must have {longest} tokens, got {all_ids.shape[1]}")
    model = files.load(device)
    config = config_of(options.settings, options.permute_per)
    if options.threshold is not None:
        config = dataclasses.replace(config, threshold=options.threshold)
    require_pbs_layers(model, min(options.tokens), config)
    model.set_attn_implementation(NAME)
    shape = shape_of(model)

    def make(nth: int) -> _Contest:
        ids = all_ids[:, : options.tokens[nth]].to(device)
        densities: list[torch.Tensor] = []

        def recorded(q, k, v, scale):
            out, density, _ = selections.permuted(config)(q, k, v, scale=scale)
            densities.append(density)
            return out

        backend, dense = _best_dense(_synthetic(shape, ids.shape[1], device))
        pbs = _pbs_attention(config)
        about = {
            "model": files.label,
            "layers": str(shape.num_layers),
            "weights": "given",
            "activations": text_name,
            "tokens": str(ids.shape[1]),
            "selection": name_of(options.settings),
            "permute_per": config.permute_per,
            "threshold": f"{config.resolved_threshold:.4f}",
            "density": "",
            "dense_backend": backend,
        }
        contest = _Contest(model, substitute, ids, None, {"dense": dense, "pbs": pbs}, about)
        contest._run(recorded)
        about["density"] = f"{torch.stack(densities).mean():.4f}"
        return contest

    return make


def _synthetic(shape: Shape, num_tokens: int, device: str) -> list[torch.Tensor]:
    """Heavy hitters in the memory layout that the layers get: a projection stores the heads of a
    token side by side, the cache does not."""
    q, k, v = heavy_hitters(
        num_tokens, shape.num_q_heads, shape.num_kv_heads, device, shape.head_dim
    )
    return [q.transpose(1, 2).contiguous().transpose(1, 2), k, v]


def _best_dense(tensors: list[torch.Tensor]) -> tuple[str, Attention]:
    """The fastest backend of SDPA for these tensors, and a call of it."""
    if tensors[0].device.type == "cpu":
        return "sdpa", sdpa_through("sdpa")
    times = {}
    for name in SDPA_BACKENDS:
        call = functools.partial(sdpa_through(name), *tensors)
        try:
            call()
        except RuntimeError:  # this backend does not take them
            continue
        times[name] = cuda_events(call, 2)
    if not times:
        raise BenchError("torch's SDPA must have a backend for these shapes, found none")
    best = min(times, key=times.get)
    return best, sdpa_through(best)


@contextlib.contextmanager
def _first_layer_alone(model: torch.nn.Module) -> Iterator[None]:
    """The model with one layer. It warms up at every length in a fraction of the time."""
    body = model.get_decoder()
    layers = body.layers
    body.layers = layers[:1]
    try:
        yield
    finally:
        body.layers = layers
