"""The quality that a model loses with PBS, against density, beside other selections of the same
density.

`prompts.py` makes the prompts. Selections (`selections.py`) are swept over thresholds and compared
at equal density, because thresholds of different scores mean different things. The sliding window
has the density of PBS. The truncated prompt is dense attention on as many of the last tokens as
cost the same. RULER has no sweep, and is in a module of its own, `ruler.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterator

import torch

from pbs_attn import PBSConfig, demo_model, plot
from pbs_attn._arguments import PRESETS, number_or_all
from pbs_attn._errors import BenchError
from pbs_attn._inputs import choose_device
from pbs_attn._rows import GIVEN, RULER, Row, check_outputs

from . import ruler, selections
from .curves import format_goals, format_probe
from .layers import dense_attention, register_attention, require_pbs_layers
from .options import SWEEPS
from .options import QualityOptions as Options
from .prompts import Prompt, lengths_of, make_prompts, read_texts, swept_probes
from .report import (
    RowFile,
    check_thresholds,
    require_packages,
    say_where,
)
from .ruler_table import format_scores
from .timing import cuda_events

NAME = "pbs_bench_quality"  # registered with transformers
SWEPT = {
    "pbs": selections.permuted,
    "unpermuted": selections.unpermuted,
    "pooled": selections.pooled,
}
# In addition to the given settings: the presets, and mean scores with the default's order and
# blocks.
SETTINGS = {
    **PRESETS,
    "balanced": PBSConfig.balanced(),
    "narrow": dataclasses.replace(selections.with_means(PBSConfig()), window=0, dense_tail=0),
}


@dataclasses.dataclass(frozen=True)
class Score:
    """`choices` (tail,) are the most likely tokens at each position. `by_head` (layers, query
    heads) are densities. `recalled` is the share of dense attention's mass on the visited keys,
    averaged over layers, heads and queries. `op_ms` is the time of the whole operator, the median
    over layers. The last two are None if they were not measured."""

    loss: float
    choices: torch.Tensor
    by_head: torch.Tensor
    recalled: float | None
    op_ms: float | None

    @property
    def density(self) -> float:
        return self.by_head.mean().item()


class Chooser:
    """The attention function of a model whose layers all use one selection. It measures the
    recalled mass if `has_mass` is set, and the time of `timed` on a GPU."""

    def __init__(self) -> None:
        self.take(dense)

    def take(
        self, attention: selections.Attention, has_mass: bool = False, timed: Callable | None = None
    ) -> None:
        self.attention, self.has_mass, self.timed = attention, has_mass, timed
        self.densities: list[torch.Tensor] = []
        self.recalled: list[torch.Tensor] = []
        self.milliseconds: list[float] = []

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        """query (B, Hq, N, D), key and value (B, Hkv, N, D) -> (B, N, Hq, D), None."""
        del module, attention_mask, kwargs
        tensors = query, key, value
        out, density, lse = self.attention(*tensors, scale=scaling)
        self.densities.append(density)
        if self.has_mass and lse is not None:
            self.recalled.append(selections.recalled_mass(lse, *tensors, scale=scaling))
        if self.timed is not None and query.is_cuda:
            torch.cuda._sleep(500_000)  # the GPU is busy while the launches queue up
            self.milliseconds.append(cuda_events(lambda: self.timed(*tensors, scale=scaling), 1))
        return out.transpose(1, 2).contiguous(), None


def dense(q, k, v, scale=None):
    """Dense causal attention, as a selection of all blocks."""
    return dense_attention(q, k, v, scale), torch.ones(q.shape[1]), None


@torch.no_grad()
def run(options: Options) -> list[Row]:
    """Measures, prints tables, and writes the files that `options` names.

    Returns:
        A row for each prompt, selection, setting and threshold: the `density` visited, the `loss`
        of the scored tokens (nats), `loss_above_dense`, the `agreement` with dense attention's most
        likely next tokens, and `right` (0 or 1) for a pass key. Texts also have `recalled`, the
        share of dense attention's mass on the visited keys, and on a GPU `op_ms`, the milliseconds
        of the whole operator in one layer (median over layers). `ruler.run` describes the rows of
        RULER.

    Raises:
        BenchError, DemoError: if an option is wrong, a package is missing, or a layer of the model
            is not plain causal attention.
    """
    _check(options)
    device = choose_device(options.device)
    texts = list(read_texts(options))
    files = demo_model.find(options.model, "bench")
    prompts = list(make_prompts(options, texts, files.tokenizer, torch.device(device)))
    model, configs = files.load(device), _configs(options)
    chooser = _take_over(model, configs)
    file, by_head = RowFile(options.csv, device), RowFile(options.heads_csv, device)
    if prompts:
        _sweep_prompts(options, model, files.label, chooser, prompts, file, by_head)
    if RULER in options.probes:
        haystack = " ".join(text for _, text in texts)
        ruler.run(options, lengths_of(options), files, model, configs, haystack, file)
    _report(options, files.label, file.rows, by_head.rows)
    return file.rows


def _sweep_prompts(
    options: Options,
    model: torch.nn.Module,
    label: str,
    chooser: Chooser,
    prompts: list[Prompt],
    file: RowFile,
    by_head: RowFile,
) -> None:
    """Adds the rows of all prompts. For texts, also adds the rows by head."""
    from tqdm import tqdm

    with tqdm(total=len(prompts), desc="quality", unit="prompt") as bar:
        for prompt in prompts:
            bar.set_postfix_str(f"{prompt.probe} of {prompt.text}")
            about_prompt = {"model": label, "text": prompt.text, "probe": prompt.probe}
            measured = list(_measure(options, model, chooser, prompt))
            file.add(*(about_prompt | row for row, _ in measured))
            if prompt.probe == "text":
                places = _rows_by_head(options, measured)
                by_head.add(*(about_prompt | place for place in places))
            bar.update()


def _report(options: Options, label: str, rows: list[Row], by_head: list[Row]) -> None:
    """Prints tables and draws pictures. RULER has no picture."""
    swept = swept_probes(options)
    for probe in swept:
        print(f"\n{_title(probe)}\n{format_probe(rows, probe)}")
    if swept:
        print(f"\nleast density, and milliseconds of one layer's operator\n{format_goals(rows)}")
    if RULER in options.probes:
        print(f"\n{format_scores(rows)}")
    picture = options.picture if swept else None
    title = f"{label}, {options.tokens} tokens"
    if picture:
        plot.draw_quality(rows, picture, title=title)
    if options.heads_picture:
        plot.draw_heads(by_head, options.heads_picture, title=title)
    say_where([options.csv, picture, options.heads_csv, options.heads_picture])


def _check(options: Options) -> None:
    require_packages("transformers", "tqdm")
    if "pbs" not in options.selections:  # it sets the density of the others
        raise BenchError(f"--selections must include pbs, got {list(options.selections)}")
    least = _least_tokens(_configs(options))
    if options.tokens < least:
        raise BenchError(f"--tokens must be at least {least}, got {options.tokens}")
    lengths = lengths_of(options)
    is_within = lengths and least // 2 <= min(lengths) <= max(lengths) <= options.tokens
    if not is_within and swept_probes(options):
        rule = f"lie between {least // 2} and --tokens"
        raise BenchError(f"--lengths must {rule}, got {list(lengths)}")
    if RULER in options.probes:
        ruler.check(options, lengths, least // 2)
    if options.thresholds is not None:
        for config in _configs(options).values():
            check_thresholds("--thresholds", options.thresholds, config.mass)
    if options.depths < 1:
        raise BenchError(f"--depths must be positive, got {options.depths}")
    files = [options.csv, options.heads_csv], [options.picture, options.heads_picture]
    check_outputs(*files)
    if (options.heads_csv or options.heads_picture) and "text" not in options.probes:
        probes = " ".join(options.probes)
        raise BenchError(f"--heads-csv and --heads-picture need --probes text, got {probes}")


def _configs(options: Options) -> dict[str, PBSConfig]:
    known = {GIVEN: options.config} | SETTINGS
    return {
        name: known[name] if name in known else _change(options.config, name)
        for name in options.settings
    }


def _change(config: PBSConfig, changes: str) -> PBSConfig:
    """The config with changed fields, for text such as "kv_block_size=64,window=0"."""
    types = {field.name: type(getattr(config, field.name)) for field in dataclasses.fields(config)}
    types |= {"kv_block_size": int, "num_heavy": number_or_all, "threshold": float}
    pairs = [change.partition("=") for change in changes.split(",")]
    unknown = [name for name, _, _ in pairs if name not in types]
    try:
        if not unknown:
            return dataclasses.replace(
                config, **{name: types[name](text) for name, _, text in pairs}
            )
        reason = f"PBSConfig has no {unknown[0]}"
    except ValueError as error:
        reason = str(error)
    known = ", ".join((GIVEN, *SETTINGS))
    raise BenchError(f"--settings must be {known} or FIELD=VALUE,..., got {changes}: {reason}")


def _least_tokens(configs: dict[str, PBSConfig]) -> int:
    return 8 * max(config.segment_size for config in configs.values())


def _take_over(model: torch.nn.Module, configs: dict[str, PBSConfig]) -> Chooser:
    """Makes every attention layer of the model call the chooser."""
    for config in configs.values():
        require_pbs_layers(model, _least_tokens(configs), config)
    chooser = Chooser()
    register_attention(NAME, chooser)
    return chooser


# Scores


def _measure(
    options: Options, model: torch.nn.Module, chooser: Chooser, prompt: Prompt
) -> Iterator[tuple[Row, Score]]:
    """The rows of one prompt."""

    is_text = prompt.probe == "text"

    def score(attention: selections.Attention, ids: torch.Tensor = prompt.ids, timed=None) -> Score:
        chooser.take(attention, is_text, timed if is_text else None)
        done = demo_model.prefill(model, ids, NAME)
        perplexity, choices = demo_model.score_tail(model, ids, done, prompt.tail)
        recalled = torch.stack(chooser.recalled).mean().item() if chooser.recalled else None
        op_ms = statistics.median(chooser.milliseconds) if chooser.milliseconds else None
        densities = torch.stack(chooser.densities)
        return Score(math.log(perplexity), choices, densities, recalled, op_ms)

    reference = score(dense, timed=dense_attention)

    def row(
        selection: str,
        settings: str,
        threshold: float | None,
        found: Score,
        density: float | None = None,
    ) -> tuple[Row, Score]:
        is_right = torch.equal(found.choices, prompt.ids[0, -prompt.tail :].cpu())
        values = {
            "tokens": str(prompt.ids.shape[1]),
            "sample": "",
            "depth": "" if prompt.depth is None else f"{prompt.depth:.4f}",
            "tail": str(prompt.tail),
            "selection": selection,
            "settings": settings,
            "threshold": "" if threshold is None else f"{threshold:g}",
            "density": f"{found.density if density is None else density:.4f}",
            "loss": f"{found.loss:.4f}",
            "loss_above_dense": f"{found.loss - reference.loss:.4f}",
            "agreement": f"{(found.choices == reference.choices).float().mean():.4f}",
            "right": str(int(is_right)) if prompt.probe == "pass key" else "",
            "recalled": "" if found.recalled is None else f"{found.recalled:.4f}",
            "op_ms": "" if found.op_ms is None else f"{found.op_ms:.4f}",
        }
        return values, found

    yield row("dense", "", None, reference)
    num_tokens = prompt.ids.shape[1]
    for settings, given in _configs(options).items():
        for turn in _sweep(options, given):
            for name, config in turn.items():
                whole = functools.partial(torch.ops.pbs.attention, **config.op_kwargs())
                found = score(SWEPT[name](config), timed=whole if name == "pbs" else None)
                yield row(name, settings, config.threshold, found)
                if name == "pbs":
                    of_pbs = found.density
            if "pbs" not in turn or settings != options.settings[0]:
                continue  # the other selections depend on the density alone
            threshold = turn["pbs"].threshold
            if "window" in options.selections:
                found = score(selections.window(turn["pbs"], num_tokens, of_pbs))
                yield row("window", "", threshold, found)
            if "truncated" in options.selections:
                kept = max(prompt.tail + 1, round(num_tokens * math.sqrt(of_pbs)))
                found = score(dense, prompt.ids[:, -kept:])
                yield row("truncated", "", threshold, found, (kept / num_tokens) ** 2)


def _sweep(options: Options, config: PBSConfig) -> Iterator[dict[str, PBSConfig]]:
    """Yields the turns of a sweep with the settings `config`. A turn has each selection with its
    settings at the next threshold, as long as the selection has one."""
    sweeps = {}
    for name in filter(options.selections.__contains__, SWEPT):
        base = selections.with_means(config) if name == "pooled" else config
        is_given = base.mass == config.mass and options.thresholds is not None
        thresholds = options.thresholds if is_given else SWEEPS[base.mass]
        sweeps[name] = [dataclasses.replace(base, threshold=threshold) for threshold in thresholds]
    for turn in itertools.zip_longest(*sweeps.values()):
        yield {name: one for name, one in zip(sweeps, turn, strict=True) if one is not None}


def _rows_by_head(options: Options, measured: list[tuple[Row, Score]]) -> Iterator[Row]:
    """The density of every layer and head in the sweep with the first settings."""
    for row, found in measured:
        if row["selection"] not in SWEPT or row["settings"] != options.settings[0]:
            continue
        for layer, of_layer in enumerate(found.by_head.tolist()):
            for head, density in enumerate(of_layer):
                place = {"layer": str(layer), "head": str(head), "density": f"{density:.4f}"}
                yield {"selection": row["selection"], "threshold": row["threshold"]} | place


def _title(probe: str) -> str:
    return {
        "text": "loss of the last half of a text above dense, at equal density",
        "copy": "loss of a repeated passage above dense, at equal density",
        "pass key": "share of pass keys read back, at equal density",
    }[probe]
