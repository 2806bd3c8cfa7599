"""Finds where the prompts of a batch end, which the metadata of vLLM does not contain.

A chunk that does not end its prompt needs no dense tail, which would take half of the time of a
short chunk of a long prompt. Both model runners know the lengths of their prompts on the host. This
file therefore wraps the methods that build metadata, and builders read the lengths that the wrapper
found. If there is no such method, every chunk has a dense tail, which is slower but correct.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

_lengths: ContextVar[Sequence[int] | None] = ContextVar("prompt lengths", default=None)


def prompt_lengths(num_rows: int) -> list[int] | None:
    """The prompt lengths of the first rows of the batch whose metadata is being built, or None if
    they are not known."""
    lengths = _lengths.get()
    if lengths is None or len(lengths) < num_rows:
        return None
    return [int(length) for length in lengths[:num_rows]]


def tell_prompts(owner: type, method: str, read: Callable[..., Sequence[int]]) -> None:
    """Makes `prompt_lengths` return `read(self, *arguments)` inside a method of a class.

    A class without the method does not change, and neither does one that was wrapped before.
    """
    original = vars(owner).get(method)
    if original is None or hasattr(original, "tells_prompts"):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            lengths: Sequence[int] | None = read(self, *args, **kwargs)
        except AttributeError:
            lengths = None
        token = _lengths.set(lengths)
        try:
            return original(self, *args, **kwargs)
        finally:
            _lengths.reset(token)

    wrapped.tells_prompts = True
    setattr(owner, method, wrapped)


def tell_prompts_of_runners() -> None:
    """Wraps those of vLLM's two model runners that can be imported."""
    try:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    except ImportError:
        pass
    else:
        tell_prompts(GPUModelRunner, "_build_attention_metadata", _of_first_runner)
    try:
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    except ImportError:
        return
    tell_prompts(DefaultModelState, "prepare_attn", _of_second_runner)


def _of_first_runner(runner: Any, *args: Any, **kwargs: Any) -> Sequence[int]:
    lengths: Sequence[int] = runner.input_batch.num_prompt_tokens
    return lengths


def _of_second_runner(state: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Sequence[int]:
    lengths: Sequence[int] = input_batch.prefill_len_np
    return lengths
