"""RULER (arXiv 2404.06654) of lm-eval, dense beside PBS, for `pbs-attn bench quality`.

lm-eval makes the prompts, generates and scores. Every contestant answers each prompt, so the scores
are paired. Dense is transformers' SDPA. Each PBS contestant is an attention implementation of
`pbs_attn.transformers`, which runs the prefill. Decoding is dense for all contestants.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import random
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

import pbs_attn
from pbs_attn import PBSConfig, demo_model
from pbs_attn._errors import BenchError, extra_command, require
from pbs_attn._rows import RULER, Row

from .options import QualityOptions
from .report import RowFile

# With shorter lengths, lm-eval searches forever for a short enough prompt of some tasks.
LEAST_LENGTH = 1024
MAX_SAMPLES = 500  # prompts that lm-eval makes for each task and length
ROOM = 1024  # for answers, and for prompts of ruler_fwe, which exceed the requested length


@dataclasses.dataclass
class Contestant:
    """`name` is the attention implementation, and `prompts` counts the answered prompts.
    `densities` has the density of each layer in the last prefill, averaged over heads."""

    name: str
    selection: str
    settings: str = ""
    threshold: str = ""
    prompts: int = 0
    densities: list[torch.Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """`request` is the one of lm-eval, and its document has the expected answers. `length` is the
    requested number of tokens. The prompt is shorter, because it leaves at least the room for its
    answer."""

    task: Any
    name: str
    length: int
    sample: int
    request: Any

    def score(self, answer: str) -> float:
        """The share of the expected answers that `answer` contains."""
        return self.task.process_results(self.request.doc, [answer])[str(self.length)]


def check(options: QualityOptions, lengths: Sequence[int], least: int) -> None:
    """Checks the options that concern RULER alone. `least` is the number of tokens that the
    settings need.

    Raises:
        BenchError, DemoError: if an option is wrong or a package is missing.
    """
    least = max(least, LEAST_LENGTH)
    if not lengths or min(lengths) < least:
        rule = f"be at least {least} with --probes ruler"
        raise BenchError(f"--lengths must {rule}, got {list(lengths)}")
    if not 1 <= options.ruler_samples <= MAX_SAMPLES:
        samples = options.ruler_samples
        raise BenchError(f"--ruler-samples must lie between 1 and {MAX_SAMPLES}, got {samples}")
    for module in ("lm_eval", "nltk", "wonderwords", "scipy"):
        require(module, "ruler")


def run(
    options: QualityOptions,
    lengths: Sequence[int],
    files: demo_model.ModelFiles,
    model: torch.nn.Module,
    configs: dict[str, PBSConfig],
    haystack: str,
    file: RowFile,
) -> None:
    """Adds a row for each prompt and contestant. `text` is the task, `tokens` the requested length,
    and `right` the share of the expected answers that the contestant gave. `agreement` is 1 if the
    answer equals that of dense attention, else 0. `density` is that of the prefill, averaged over
    layers and heads.

    Raises:
        BenchError: if lm-eval cannot make the prompts, or the prefill of the model does not take
            PBS.
    """
    from tqdm import tqdm

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings concern intended settings
    with (
        _without_downloads(repeat(haystack, max(lengths))),
        tempfile.TemporaryDirectory() as folder,
    ):
        files.tokenizer.save_pretrained(folder)
        prompts = list(_make_prompts(options, lengths, folder))
    lm = _wrap(model, files.tokenizer, max(lengths))
    with (
        _registered(options, configs) as contestants,
        tqdm(total=len(prompts), desc=RULER, unit="prompt") as bar,
    ):
        for prompt in prompts:
            bar.set_postfix_str(f"{prompt.name}, {prompt.length}")
            about = {"model": files.label, "text": prompt.name, "probe": RULER}
            file.add(*(about | row for row in _answer(lm, model, prompt, contestants)))
            bar.update()


@contextlib.contextmanager
def _registered(
    options: QualityOptions, configs: dict[str, PBSConfig]
) -> Iterator[list[Contestant]]:
    """Registers dense attention, and PBS with each of the settings, at its own threshold unless the
    options give others. On exit, their calls are no longer counted."""
    from pbs_attn import transformers as pbs_transformers

    swept = [
        (settings, dataclasses.replace(given, threshold=threshold))
        for settings, given in configs.items()
        for threshold in options.thresholds or (given.resolved_threshold,)
    ]
    contestants = [Contestant("sdpa", "dense")]
    for nth, (settings, config) in enumerate(swept):
        contestant = Contestant(f"pbs_ruler_{nth}", "pbs", settings, f"{config.threshold:g}")
        pbs_transformers.register(contestant.name, config=config, min_tokens=1)
        _watch(contestant, config)
        contestants.append(contestant)
    try:
        yield contestants
    finally:
        for contestant in contestants:
            pbs_transformers.forget(contestant.name)


def _watch(contestant: Contestant, config: PBSConfig) -> None:
    """Wraps a function so that the density of each layer's prefill is recorded."""
    from transformers import AttentionInterface

    original = AttentionInterface().get(contestant.name)

    def watched(module, query, key, value, attention_mask, *args, **kwargs):
        """query (1, Hq, Nq, D), key and value (1, Hkv, Nkv, D) -> (1, Nq, Hq, D), None."""
        num_tokens = query.shape[2]
        if attention_mask is None and num_tokens == key.shape[2] > 1:
            scale = kwargs.get("scaling")
            chosen = pbs_attn.select(query, key, value, scale=scale, config=config)
            shares = pbs_attn.density(chosen.block_mask, num_tokens, num_tokens, config=config)
            contestant.densities.append(shares.mean())
        return original(module, query, key, value, attention_mask, *args, **kwargs)

    AttentionInterface.register(contestant.name, watched)


# lm-eval


def _wrap(model: torch.nn.Module, tokenizer: Any, length: int) -> Any:
    """Wraps the model for lm-eval. It generates one prompt at a time, so that each prompt counts as
    one call of a layer."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=1,
        max_length=length + ROOM,  # lm-eval cuts longer prompts
    )


@contextlib.contextmanager
def _without_downloads(haystack: str) -> Iterator[None]:
    """Runs lm-eval's tasks without downloads: with this haystack in place of the essays, and
    without the data of nltk that finds the ends of sentences.

    Raises:
        BenchError: if this version of lm-eval lacks the functions to replace.
    """
    import nltk

    essays = SimpleNamespace(load_dataset=lambda *args, **kwargs: {"text": [haystack]})
    with contextlib.ExitStack() as stack:
        try:
            # At import, the module looks for the data of nltk and downloads it if it is missing.
            with _replaced(nltk.data, "find", lambda name: name):
                from lm_eval.tasks.ruler import prepare_niah
            stack.enter_context(_replaced(prepare_niah, "datasets", essays))
            stack.enter_context(_replaced(prepare_niah, "sent_tokenize", split_sentences))
            prepare_niah.get_haystack.cache_clear()  # it holds another haystack
        except (AttributeError, ImportError) as error:
            version = importlib.metadata.version("lm-eval")
            how = extra_command(RULER)
            raise BenchError(
                f"lm-eval must have the functions that the bench replaces, got version {version}: "
                f"{error} ({how})"
            ) from error
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Raises AttributeError if there is nothing to replace."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def repeat(text: str, words: int) -> str:
    """Repeats the text until it has `num_words` words, of at least one token each: lm-eval makes no
    prompt that is longer than its haystack.

    Raises:
        BenchError: if the text has no words.
    """
    count = len(text.split())
    if not count:
        raise BenchError("--texts must contain words for the haystacks of RULER, got none")
    return " ".join([text] * -(-words // count))


def split_sentences(text: str) -> list[str]:
    """A sentence ends at white space after a full stop, an exclamation mark or a question mark."""
    return re.split(r"(?<=[.!?])\s+", text)


def _make_prompts(
    options: QualityOptions, lengths: Sequence[int], tokenizer: str
) -> Iterator[Prompt]:
    """Makes the first samples of each length and task. `tokenizer` is the folder of the
    tokenizer."""
    import numpy as np
    from lm_eval import tasks
    from lm_eval.tasks import ruler

    for length in lengths:
        manager = tasks.TaskManager(
            include_path=[*ruler.__path__],
            include_defaults=False,
            metadata={"max_seq_lengths": [length], "tokenizer": tokenizer},
        )
        for name in options.ruler_tasks:
            # Prompts must not depend on the other options.
            random.seed(0)
            np.random.seed(0)
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                try:
                    (task,) = manager.load([name])["tasks"].values()
                except ValueError as error:
                    raise BenchError(
                        f"--lengths must leave room for the prompts of {name}, got {length}: "
                        f"{error}"
                    ) from error
                task.build_all_requests(limit=options.ruler_samples)
                task.dataset = None  # the text of all MAX_SAMPLES would fill the memory
            for sample, request in enumerate(task.instances):
                yield Prompt(task, name, length, sample, request)


def _answer(
    lm: Any, model: torch.nn.Module, prompt: Prompt, contestants: Sequence[Contestant]
) -> Iterator[Row]:
    """The rows of one prompt. The first one is that of dense attention."""
    answers: list[str] = []
    for contestant in contestants:
        model.set_attn_implementation(contestant.name)
        (answer,) = lm.generate_until([prompt.request], disable_tqdm=True)
        answers.append(answer)
        density = 1.0 if contestant.selection == "dense" else _density(model, contestant)
        yield {
            "tokens": str(prompt.length),
            "sample": str(prompt.sample),
            "depth": "",
            "tail": "",
            "selection": contestant.selection,
            "settings": contestant.settings,
            "threshold": contestant.threshold,
            "density": f"{density:.4f}",
            "loss": "",
            "loss_above_dense": "",
            "agreement": f"{float(answer == answers[0]):.4f}",
            "right": f"{prompt.score(answer):.4f}",
            "recalled": "",
            "op_ms": "",
        }


def _density(model: torch.nn.Module, contestant: Contestant) -> float:
    """The density of the last prefill, averaged over layers. The prefill must have been that of
    `contestant`.

    Raises:
        BenchError: if a layer did not take PBS.
    """
    from pbs_attn import transformers as pbs_transformers

    shares, contestant.densities = contestant.densities, []
    contestant.prompts += 1
    expected = contestant.prompts * len(pbs_transformers.explain(model))
    counts = pbs_transformers.routes(contestant.name)
    calls = sum(count.calls for count in counts if count.route == "pbs")
    if calls != expected:
        reasons = "; ".join(count.reason for count in counts if count.route != "pbs")
        raise BenchError(
            "every layer of the model must take PBS in the prefill of every prompt, got "
            f"{calls} of {expected} calls: {reasons}"
        )
    return torch.stack(shares).mean().item()
