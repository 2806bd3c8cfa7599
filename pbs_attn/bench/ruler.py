"""RULER (arXiv 2404.06654) of lm-eval, dense beside PBS, for `pbs-attn bench quality`.

lm-eval makes the prompts, generates and scores; every contestant answers each prompt, so that their
scores are paired. Dense is transformers' SDPA. A contestant's PBS is an attention implementation of
`pbs_attn.transformers`: it takes the prefill, and decoding is dense for all.
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

# Below it, lm-eval looks without end for a prompt of some tasks that is short enough.
LEAST_LENGTH = 1024
MAX_SAMPLES = 500  # what lm-eval makes of each task and length
ROOM = 1024  # for answers, and for prompts of ruler_fwe, which are longer than asked for


@dataclasses.dataclass
class Contestant:
    """`name`: the attention implementation. `prompts`: how many it has answered. `densities`: of
    the layers of the last one's prefill, mean over heads."""

    name: str
    selection: str
    settings: str = ""
    threshold: str = ""
    prompts: int = 0
    densities: list[torch.Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """`request`: lm-eval's own, whose document tells the expected answers. `length`: what was asked
    for, tokens; the prompt is shorter by the room for its answer, or by more."""

    task: Any
    name: str
    length: int
    sample: int
    request: Any

    def score(self, answer: str) -> float:
        """The share of the expected answers that `answer` holds."""
        return self.task.process_results(self.request.doc, [answer])[str(self.length)]


def check(options: QualityOptions, lengths: Sequence[int], least: int) -> None:
    """Checks what concerns RULER alone; `least`: tokens that the settings need.

    Raises:
        BenchError, DemoError: a mistake in `options`, or a package that is missing.
    """
    least = max(least, LEAST_LENGTH)
    if not lengths or min(lengths) < least:
        rule = f"be {least} at least with --probes ruler"
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
    """Adds a row for each prompt and contestant: in `text` the task, in `tokens` the length asked
    for, in `right` the share of the expected answers given, in `agreement` whether the answer is
    dense's to the letter (0 or 1), in `density` that of the prefill, mean over layers and heads.

    Raises:
        BenchError: if lm-eval cannot make the prompts, or the model's prefill does not take PBS.
    """
    from tqdm import tqdm

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant to be so
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
    """Dense, and PBS with each of the settings, at its own threshold unless others are given. Their
    calls are not counted any more afterwards."""
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
    """Notes the density of each layer's prefill beside running it."""
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
    """The model as lm-eval generates with it, one prompt at a time, so that each prompt is one call
    of a layer in the counts."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=1,
        max_length=length + ROOM,  # it would cut longer prompts
    )


@contextlib.contextmanager
def _without_downloads(haystack: str) -> Iterator[None]:
    """lm-eval's tasks with this haystack in place of the essays that it would download, and without
    the data that nltk would download to find where sentences end.

    Raises:
        BenchError: if this lm-eval has not what is replaced.
    """
    import nltk

    essays = SimpleNamespace(load_dataset=lambda *args, **kwargs: {"text": [haystack]})
    with contextlib.ExitStack() as stack:
        try:
            # The module looks for nltk's data as it is imported, and downloads what is missing.
            with _replaced(nltk.data, "find", lambda name: name):
                from lm_eval.tasks.ruler import prepare_niah
            stack.enter_context(_replaced(prepare_niah, "datasets", essays))
            stack.enter_context(_replaced(prepare_niah, "sent_tokenize", split_sentences))
            prepare_niah.get_haystack.cache_clear()  # of another haystack
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
    """The text as often as it takes to have so many words, a token each at least: lm-eval makes no
    longer prompts than its haystack.

    Raises:
        BenchError: if there is no word in it.
    """
    count = len(text.split())
    if not count:
        raise BenchError("--texts must contain words for the haystacks of RULER, got none")
    return " ".join([text] * -(-words // count))


def split_sentences(text: str) -> list[str]:
    """Sentences end where white space follows a full stop, an exclamation or a question mark."""
    return re.split(r"(?<=[.!?])\s+", text)


def _make_prompts(
    options: QualityOptions, lengths: Sequence[int], tokenizer: str
) -> Iterator[Prompt]:
    """Of each length and task the first samples; `tokenizer`: the folder that it lies in."""
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
            # The same prompts, whatever else is run.
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
                task.dataset = None  # all MAX_SAMPLES, whose text would fill the memory
            for sample, request in enumerate(task.instances):
                yield Prompt(task, name, length, sample, request)


def _answer(
    lm: Any, model: torch.nn.Module, prompt: Prompt, contestants: Sequence[Contestant]
) -> Iterator[Row]:
    """Rows of one prompt, the first one of which is dense's."""
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
    """The mean over layers of the prefill that ran last, which is `contestant`'s.

    Raises:
        BenchError: if a layer of it did not take PBS.
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
