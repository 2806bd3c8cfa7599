"""Time to the first token of a language model, dense and with PBS attention.

The model has random weights, which attend to nothing in particular. So its attention layers work on
synthetic queries, keys and values in place of the model's own, of the same shape and memory layout:
heavy-hitter keys, of which PBS visits a share that is asked for and stated in every row. All the
rest, from the projections to the KV cache, is the model's. A third contestant, whose attention
costs nothing, gives the bound that the other layers set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pbs_attn import PBSConfig, plot
from pbs_attn.demo import choose_device

from .layers import dense_attention, register_attention
from .report import (
    BenchError,
    as_table,
    check_folders,
    describe_run,
    require_packages,
    write_rows,
)
from .shapes import SHAPES, Shape, build
from .stages import PAPER, Pipeline, heavy_hitters, reach
from .timing import cuda_events, interleaved_medians, wall_clock

NAME = "pbs_bench"  # with transformers
# What the paper gives, and for 262144 tokens what its last two densities suggest.
DENSITIES = PAPER | {262144: 0.17}
OTHER_DENSITY = 0.3
SDPA_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TABLE = ("tokens", "density", "dense_backend", "dense_s", "pbs_s", "speedup", "bound")

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Options:
    """`densities`: one a length, or None for DENSITIES. `layers`: None for all of the preset.
    `rounds`: one for all lengths, or one a length."""

    preset: str = "llama-3.1-8b"
    tokens: tuple[int, ...] = tuple(DENSITIES)
    densities: tuple[float, ...] | None = None
    layers: int | None = None
    permute_per: str = "kv_head"
    rounds: tuple[int, ...] = (2,)
    device: str = "auto"
    csv: str | None = None
    picture: str | None = None


class Substitute:
    """The attention function of a model that is given other tensors than its own."""

    def __init__(self) -> None:
        self.tensors: tuple[torch.Tensor, ...] = ()
        self.attention: Attention | None = None

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        """query (B, Hq, N, D), key and value (B, Hkv, N, D) -> (B, N, Hq, D), None."""
        del module, attention_mask, kwargs
        for own, other in zip((query, key, value), self.tensors, strict=True):
            if own.shape != other.shape:
                raise BenchError(f"tensors must be {tuple(own.shape)}, got {tuple(other.shape)}")
        return self.attention(*self.tensors).transpose(1, 2).contiguous(), None


def run(options: Options) -> list[dict[str, str]]:
    """Measures, prints a table, and writes what `options` asks for.

    Returns:
        One row a length: seconds (median of the rounds) of the whole prefill with the best dense
        backend of torch's SDPA, with PBS, and with attention that costs nothing; `speedup`, and
        `bound`, which is what it could be at most.

    Raises:
        BenchError, DemoError: a mistake in `options`, or a package that is missing.
    """
    shape, device = _check(options)
    substitute = _register()
    from tqdm import tqdm

    model = build(
        shape,
        max_tokens=max(options.tokens),
        device=device,
        attn_implementation=NAME,
    )
    about_run = describe_run(device)
    rows = []
    lengths = list(zip(options.tokens, _densities(options), _rounds(options), strict=True))
    steps = 3 * sum(_rounds(options))
    with torch.inference_mode(), tqdm(total=steps, desc="prefill", unit="run") as bar:
        for num_tokens, density, rounds in lengths:
            bar.set_postfix_str(f"{num_tokens} tokens")
            try:
                contest = _Contest(options, shape, model, substitute, num_tokens, density)
                rows.append(contest.measure(rounds, bar.update) | about_run)
            except torch.OutOfMemoryError as error:
                raise BenchError(f"--tokens must fit in memory, got {num_tokens}") from error
            if options.csv:  # what is there if a longer prompt fails
                write_rows(options.csv, rows)
    print(as_table(rows, TABLE))
    if options.picture:
        title = f"{options.preset}, {about_run['device']}"
        plot.draw_speedup(rows, options.picture, title=title)
    return rows


def _check(options: Options) -> tuple[Shape, torch.device]:
    require_packages()
    if options.preset not in SHAPES:
        raise BenchError(f"--preset must be one of {', '.join(SHAPES)}, got {options.preset}")
    shape = SHAPES[options.preset]
    layers = shape.num_layers if options.layers is None else options.layers
    if not 1 <= layers <= shape.num_layers:
        raise BenchError(f"--layers must be 1 to {shape.num_layers}, got {layers}")
    if min(options.rounds, default=0) < 1:
        raise BenchError(f"--rounds must be positive, got {list(options.rounds)}")
    least = 2 * PBSConfig().segment_size
    if not options.tokens or min(options.tokens) < least:
        raise BenchError(f"--tokens must be {least} at least, got {list(options.tokens)}")
    lengths = len(options.tokens)
    if len(_densities(options)) != lengths:
        given = len(options.densities)
        raise BenchError(f"--densities must be as many as --tokens, got {given} for {lengths}")
    if len(_rounds(options)) != lengths:
        given = len(options.rounds)
        raise BenchError(f"--rounds must be one or as many as --tokens, got {given} for {lengths}")
    if not all(0 < density <= 1 for density in _densities(options)):
        raise BenchError(f"--densities must lie in (0, 1], got {list(options.densities)}")
    check_folders(options.csv, options.picture)
    device = torch.device(choose_device(options.device))
    return dataclasses.replace(shape, num_layers=layers), device


def _densities(options: Options) -> tuple[float, ...]:
    if options.densities is not None:
        return options.densities
    return tuple(DENSITIES.get(num_tokens, OTHER_DENSITY) for num_tokens in options.tokens)


def _rounds(options: Options) -> tuple[int, ...]:
    rounds = options.rounds
    return rounds * len(options.tokens) if len(rounds) == 1 else rounds


def _register() -> Substitute:
    substitute = Substitute()
    register_attention(NAME, substitute)
    return substitute


class _Contest:
    """The contestants at one length."""

    def __init__(
        self,
        options: Options,
        shape: Shape,
        model: torch.nn.Module,
        substitute: Substitute,
        num_tokens: int,
        density: float,
    ):
        self.options, self.shape, self.model, self.substitute = options, shape, model, substitute
        self.ids = torch.randint(shape.vocab_size, (1, num_tokens), device=model.device)
        q, k, v = heavy_hitters(
            num_tokens, shape.num_q_heads, shape.num_kv_heads, model.device, shape.head_dim
        )
        # As the layers get them: the projection leaves a token's heads beside each other, the cache
        # does not.
        self.tensors = [q.transpose(1, 2).contiguous().transpose(1, 2), k, v]
        del q
        pipeline = Pipeline(*self.tensors, PBSConfig(), options.permute_per)
        self.density = reach(pipeline, density)
        self.threshold = pipeline.threshold
        self.backend, self.dense = _best_dense(self.tensors)

    def measure(self, rounds: int, advance: Callable[[], object]) -> dict[str, str]:
        """The row of this length; calls advance() after each run of the model."""

        def clock(call: Callable[[], None]) -> float:
            milliseconds = wall_clock(call)
            advance()
            return milliseconds

        attentions = {"dense": self.dense, "pbs": self._pbs, "linear": lambda q, k, v: q}
        calls = {name: functools.partial(self._run, call) for name, call in attentions.items()}
        with _first_layer_alone(self.model):
            for call in calls.values():
                call()
        times = interleaved_medians(calls, rounds, clock, warm_ups=0)
        return {
            "preset": self.options.preset,
            "layers": str(self.shape.num_layers),
            "weights": "random",
            "activations": "heavy hitters",
            "tokens": str(self.ids.shape[1]),
            "permute_per": self.options.permute_per,
            "threshold": f"{self.threshold:.4f}",
            "density": f"{self.density:.4f}",
            "dense_backend": self.backend,
            **{f"{name}_s": f"{milliseconds / 1e3:.4f}" for name, milliseconds in times.items()},
            "speedup": f"{times['dense'] / times['pbs']:.3f}",
            "bound": f"{times['dense'] / times['linear']:.3f}",
            "rounds": str(rounds),
        }

    def _pbs(self, q, k, v):
        return torch.ops.pbs.attention(
            q, k, v, threshold=self.threshold, permute_per=self.options.permute_per
        )

    def _run(self, attention: Attention) -> None:
        """The whole prefill, to its end on the device."""
        self.substitute.tensors, self.substitute.attention = tuple(self.tensors), attention
        self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1)
        if self.ids.device.type == "cuda":
            torch.cuda.synchronize(self.ids.device)


def _best_dense(tensors: list[torch.Tensor]) -> tuple[str, Attention]:
    """The backend of SDPA that takes these tensors in the shortest time, and a call of it."""
    if tensors[0].device.type == "cpu":
        return "sdpa", dense_attention

    def through(backend: SDPBackend) -> Attention:
        def call(q, k, v):
            with sdpa_kernel(backend):
                return dense_attention(q, k, v)

        return call

    times = {}
    for name, backend in SDPA_BACKENDS.items():
        call = through(backend)
        try:
            call(*tensors)
        except RuntimeError:  # it does not take them
            continue
        times[name] = cuda_events(lambda call=call: call(*tensors), 2)
    if not times:
        raise BenchError("torch's SDPA must have a backend for these shapes, found none")
    best = min(times, key=times.get)
    return best, through(SDPA_BACKENDS[best])


@contextlib.contextmanager
def _first_layer_alone(model: torch.nn.Module) -> Iterator[None]:
    """To warm up at every length for a part of what the whole model would take."""
    body = model.get_decoder()
    layers = body.layers
    body.layers = layers[:1]
    try:
        yield
    finally:
        body.layers = layers
