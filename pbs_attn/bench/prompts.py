"""The prompts of `pbs-attn bench quality`.

In a text, the last half is scored. In a copy probe, the last quarter repeats an earlier passage of
the prompt at another alignment to the blocks. A pass key is seven digits at a certain depth of a
text, which the model has to read back.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from pbs_attn._errors import BenchError
from pbs_attn._inputs import read_text
from pbs_attn._rows import PROBES, RULER

from .options import QualityOptions as Options

PASS_KEY_DIGITS = 7


@dataclasses.dataclass(frozen=True)
class Prompt:
    """`ids` (1, N). The last `tail` tokens are scored. `depth` is the position of a pass key, as a
    share of the text."""

    text: str
    probe: str
    ids: torch.Tensor
    tail: int
    depth: float | None = None


def swept_probes(options: Options) -> list[str]:
    """The probes that are swept over thresholds: all but RULER."""
    return [probe for probe in options.probes if probe != RULER]


def lengths_of(options: Options) -> tuple[int, ...]:
    """The lengths of the prompts with pass keys, and of RULER's."""
    return (options.tokens // 2, options.tokens) if options.lengths is None else options.lengths


def make_prompts(
    options: Options, texts: list[tuple[str, str]], tokenizer: Any, device: torch.device
) -> Iterator[Prompt]:
    """Makes the prompts of every text and swept probe.

    Raises:
        BenchError: if a text is too short.
    """
    probes = swept_probes(options)
    for name, text in texts if probes else ():
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        if len(ids) < options.tokens:
            raise BenchError(f"{name} must have {options.tokens} tokens, got {len(ids)}")
        for probe in probes:
            for prompt, *rest in _PROMPT_MAKERS[probe](options, tokenizer, ids):
                yield Prompt(name, probe, prompt[None].to(device), *rest)


def read_texts(options: Options) -> Iterator[tuple[str, str]]:
    """The name and the text of each file."""
    for path in options.texts or (None,):
        text, name = read_text(path)
        yield name, text


def _text_prompt(options: Options, tokenizer: Any, ids: torch.Tensor):
    del tokenizer
    yield ids[: options.tokens], options.tokens // 2


def _copy_prompt(options: Options, tokenizer: Any, ids: torch.Tensor):
    """The last quarter repeats tokens from the beginning. The original passage starts a third of a
    block off the grid of blocks, the repeat starts on the grid."""
    del tokenizer
    tail = options.tokens // 4
    start = options.config.block_size // 3
    before = ids[: options.tokens - tail]
    yield torch.cat([before, before[start : start + tail]]), tail


def _pass_key_prompts(options: Options, tokenizer: Any, ids: torch.Tensor):
    """Prompts of each length with a key at evenly spaced depths. The tokens of the key are the
    tail."""

    def encode(text: str) -> torch.Tensor:
        return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]

    generator = torch.Generator().manual_seed(0)
    for length, nth in itertools.product(lengths_of(options), range(options.depths)):
        digits = torch.randint(10, (PASS_KEY_DIGITS,), generator=generator).tolist()
        key = "".join(map(str, digits))
        hint = encode(f"\nThe pass key is {key}. Remember it: {key} is the pass key.\n")
        question = encode("\nWhat is the pass key? The pass key is ")
        answer = encode(key)
        filler = ids[: length - len(hint) - len(question) - len(answer)]
        depth = (nth + 0.5) / options.depths
        place = round(len(filler) * depth)
        parts = [filler[:place], hint, filler[place:], question, answer]
        yield torch.cat(parts), len(answer), depth


_PROMPT_MAKERS = dict(zip(PROBES, (_text_prompt, _copy_prompt, _pass_key_prompts), strict=True))
