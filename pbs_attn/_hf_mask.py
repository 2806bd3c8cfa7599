"""The mask function registered with transformers: tells plain causal attention from all else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from ._hf_file import needs_mask, supports_sdpa, uses_interface
from ._hf_route import NO_INTERFACE


def make_mask_function(masking_utils: ModuleType) -> Callable[..., torch.Tensor | None]:
    """None for plain bottom-right causal attention, else transformers' explicit boolean mask; for
    a model without SDPA always the additive mask of eager attention."""

    def pbs_mask(
        *,
        kv_length: int,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
        attention_mask: torch.Tensor | None = None,
        allow_is_causal_skip: bool = True,
        allow_is_bidirectional_skip: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        config = kwargs.get("config")
        file_name = type(config).__module__
        if not uses_interface(file_name):
            raise ValueError(f"attn_implementation must be transformers' own here: {NO_INTERFACE}")
        make_mask = masking_utils.sdpa_mask
        if not supports_sdpa(file_name):
            make_mask = masking_utils.eager_mask
        # Older transformers forbid the skip only where the pattern or the cache already tells;
        # later callers may need the mask as a tensor.
        allow_skip = allow_is_causal_skip or "cache_position" in kwargs
        if (
            make_mask is masking_utils.sdpa_mask
            and not needs_mask(file_name)
            and not _makes_layers_bidirectional(config)
            and allow_skip
            and _equals(kv_offset, 0)
            and _is_causal_only(mask_function, kv_length, masking_utils, kwargs.get("local_size"))
            and _ends_at_last_key(kv_length, **kwargs)
            and _hides_no_key(attention_mask, kv_length)
        ):
            return None
        # transformers' own skips align top-left, which is wrong for an attention function that
        # reads a missing mask as bottom-right.
        mask: torch.Tensor | None = make_mask(
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            **kwargs,
        )
        return mask

    return pbs_mask


def _makes_layers_bidirectional(config: Any) -> bool:
    """Whether the layers say that they are not causal, so that they would take a missing mask for
    one that hides nothing. The mask may be causal all the same: PaliGemma's is."""
    return getattr(config, "use_bidirectional_attention", None) in (True, "all")


def _is_readable(tensor: torch.Tensor) -> bool:
    """Whether the values can be looked at here without breaking a trace."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore
    fake = isinstance(tensor, (torch.fx.Proxy, torch._subclasses.FakeTensor))
    return not (tracing or fake or tensor.is_meta)


def _ends_at_last_key(
    kv_length: int,
    q_length: int = 0,
    q_offset: int | torch.Tensor = 0,
    cache_position: torch.Tensor | None = None,
    **_: Any,
) -> bool:
    """Whether the queries are the last ones of kv_length positions, in order."""
    if cache_position is not None:  # older transformers
        q_length = cache_position.shape[0]
        if q_length > kv_length or not _is_readable(cache_position):
            return False
        expected = torch.arange(kv_length - q_length, kv_length, device=cache_position.device)
        return torch.equal(cache_position, expected)
    return _equals(q_offset, kv_length - q_length)


def _equals(offset: int | torch.Tensor, expected: int) -> bool:
    """Static caches keep their offsets in tensors."""
    if isinstance(offset, torch.Tensor):
        return _is_readable(offset) and int(offset) == expected
    return offset == expected


def _hides_no_key(attention_mask: torch.Tensor | None, kv_length: int) -> bool:
    if attention_mask is None:
        return True
    if attention_mask.ndim != 2 or attention_mask.shape[-1] < kv_length:
        return False
    return _is_readable(attention_mask) and bool(attention_mask[:, :kv_length].all())


def _is_causal_only(
    mask_function: Callable[..., Any],
    kv_length: int,
    masking_utils: ModuleType,
    local_size: int | None = None,
) -> bool:
    """Whether `mask_function` is causal over kv_length keys and hides nothing else.

    transformers builds its patterns as nested functions. They are recognised by name, and what
    they close over tells what they hide. A function that is not known counts as one that hides.
    A trace cannot look into them. There `local_size` tells: transformers 5 gives it with a window
    or a chunk alone, and forbids the skip of the mask where it hides anything else.
    """
    causal = masking_utils.causal_mask_function
    if mask_function is causal:
        return True
    if torch.compiler.is_compiling():
        return local_size is not None and local_size >= kv_length
    parts = list(_and_parts(mask_function))
    return causal in parts and all(
        part is causal or (part.__module__ == causal.__module__ and _hides_nothing(part, kv_length))
        for part in parts
    )


def _and_parts(mask_function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    if getattr(mask_function, "__qualname__", None) == "and_masks.<locals>.and_mask":
        for part in inspect.getclosurevars(mask_function).nonlocals["mask_functions"]:
            yield from _and_parts(part)
    else:
        yield mask_function


def _hides_nothing(overlay: Callable[..., Any], kv_length: int) -> bool:
    """A window or chunk that covers all keys (without padding), or packing of one sequence, which
    transformers 4 builds for every forward without a cache."""
    hidden = inspect.getclosurevars(overlay).nonlocals
    maker = overlay.__qualname__.removesuffix(".<locals>.inner_mask")
    if maker == "sliding_window_overlay":
        return bool(hidden["sliding_window"] >= kv_length)
    if maker == "chunked_overlay":
        return bool(hidden["chunk_size"] >= kv_length)
    if maker == "packed_sequence_mask_function":
        sequence = hidden["packed_sequence_mask"]
        return _is_readable(sequence) and bool((sequence == sequence[:, :1]).all())
    return False
