"""The mask function registered with transformers. It recognizes plain causal attention."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ._hf_file import needs_mask, supports_sdpa, uses_interface
from ._hf_route import NO_INTERFACE
from ._hf_rows import Row, RowMask, find_rows


def make_mask_function(masking_utils: ModuleType) -> Callable[..., torch.Tensor | None]:
    """Returns None for plain bottom-right causal attention, and a RowMask for padded or packed
    sequences of it. Otherwise it returns the explicit boolean mask of transformers. A model without
    SDPA always gets the additive mask of eager attention."""

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
        # When transformers skips a mask, it aligns top-left, which is wrong for an attention
        # function that reads a missing mask as bottom-right.
        make: Callable[[], torch.Tensor] = functools.partial(
            make_mask,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            **kwargs,
        )
        # Older transformers forbid the skip only if the pattern or the cache requires it, but later
        # callers may need the mask as a tensor.
        allow_skip = allow_is_causal_skip or "cache_position" in kwargs
        if (
            make_mask is not masking_utils.sdpa_mask
            or needs_mask(file_name)
            or _makes_layers_bidirectional(config)
        ):
            return make()
        pattern = _read_pattern(mask_function, kv_length, masking_utils, kwargs.get("local_size"))
        if pattern is None or not (allow_skip or pattern.sequence_ids is not None):
            return make()
        q_length, queries = _place_queries(**kwargs)
        is_plain, rows = _read_rows(
            pattern, q_length, queries, kv_length, kv_offset, attention_mask
        )
        if is_plain and allow_skip:
            return None
        told = pattern.sequence_ids if attention_mask is None else attention_mask
        # Training never takes PBS, and code that wraps a model for training expects a plain tensor.
        if rows is None or told is None or torch.is_grad_enabled():
            return make()
        return RowMask(rows, make, (told.shape[0], 1, q_length, kv_length), told.device)

    return pbs_mask


def _makes_layers_bidirectional(config: Any) -> bool:
    """Whether the layers say that they are not causal, so that they would read a missing mask as a
    mask that hides nothing. The mask may be causal nevertheless, as in PaliGemma."""
    return getattr(config, "use_bidirectional_attention", None) in (True, "all")


def _is_readable(tensor: torch.Tensor) -> bool:
    """Whether the values can be read here without breaking a trace."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore
    fake = isinstance(tensor, (torch.fx.Proxy, torch._subclasses.FakeTensor))
    return not (tracing or fake or tensor.is_meta)


class _Pattern(NamedTuple):
    """A causal mask function: the packed sequence of each token, or None, and the positions that
    define causality, or None for the indices. Both are (B, Nkv)."""

    sequence_ids: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None


def _place_queries(
    q_length: int = 0,
    q_offset: int | torch.Tensor = 0,
    cache_position: torch.Tensor | None = None,
    **_: Any,
) -> tuple[int, int | torch.Tensor]:
    """The number of queries, and the position of the first one. Older transformers give the
    positions of all."""
    if cache_position is None:
        return q_length, q_offset
    return cache_position.shape[0], cache_position


def _read_rows(
    pattern: _Pattern,
    q_length: int,
    queries: int | torch.Tensor,
    kv_length: int,
    kv_offset: int | torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> tuple[bool, tuple[Row, ...] | None]:
    """Returns whether the mask is plain: the queries are the last of kv_length tokens, in order,
    and every row of the batch is one sequence without padding. If the mask has only padding or
    packing, also returns its sequences. A decode step does not take PBS and needs none."""
    neither = False, None
    by_token = {name: told for name, told in pattern._asdict().items() if told is not None}
    if attention_mask is not None:
        by_token["visible"] = attention_mask[..., :kv_length]
    facts = {"keys": kv_offset, "queries": queries, **by_token}
    tensors = {name: fact for name, fact in facts.items() if isinstance(fact, torch.Tensor)}
    expected = {"keys": 0, "queries": kv_length - q_length}
    if any(facts[name] != first for name, first in expected.items() if name not in tensors):
        return neither
    if not tensors:
        return True, None
    if not all(_is_readable(tensor) for tensor in tensors.values()):
        return neither
    batch_sizes = {len(told) for told in by_token.values()}
    if any(told.shape[1:] != (kv_length,) for told in by_token.values()) or len(batch_sizes) > 1:
        return neither
    if q_length == 1 and by_token.keys() == {"visible"}:
        tensors["visible"] = tensors["visible"].all().view(1, 1)
    values = look(tensors)
    for name, first in expected.items():
        if name in values:
            positions = values[name].flatten()
            if not torch.equal(positions, torch.arange(first, first + len(positions))):
                return neither
    return _tell_rows(q_length, values)


def look(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values of small tensors as integers on the CPU. One transfer copies them, and the CPU
    waits until the GPU has computed them."""
    device = next(iter(tensors.values())).device
    flat = torch.cat([t.reshape(-1).to(device, torch.long) for t in tensors.values()]).cpu()
    parts = flat.split([t.numel() for t in tensors.values()])
    return {
        name: part.view(tensor.shape)
        for part, (name, tensor) in zip(parts, tensors.items(), strict=True)
    }


def _tell_rows(
    q_length: int, values: dict[str, torch.Tensor]
) -> tuple[bool, tuple[Row, ...] | None]:
    """The result of _read_rows, from the values of each token."""
    sequence_ids, position_ids = values.get("sequence_ids"), values.get("position_ids")
    if "visible" in values:
        visible = values["visible"].bool()
    elif sequence_ids is not None:
        visible = torch.ones_like(sequence_ids, dtype=torch.bool)
    else:
        return position_ids is None, None
    rows = find_rows(q_length, visible, sequence_ids, position_ids)
    batch_size, kv_length = visible.shape
    is_plain = (
        rows is not None
        and len(rows) == batch_size
        and all((row.begin, row.end) == (0, kv_length) for row in rows)
    )
    return is_plain, rows if q_length > 1 else None


def _read_pattern(
    mask_function: Callable[..., Any],
    kv_length: int,
    masking_utils: ModuleType,
    local_size: int | None = None,
) -> _Pattern | None:
    """The pattern of `mask_function`. None if it is not causal over kv_length keys, or hides more
    than other sequences.

    transformers builds its patterns as nested functions. They are recognized by name, and the
    values that they close over tell what they hide. An unknown function counts as one that hides
    keys. A trace cannot look into these functions. There `local_size` decides: transformers 5
    passes it only with a window or a chunk, and forbids skipping the mask if it hides anything
    else.
    """
    causal = masking_utils.causal_mask_function
    if mask_function is causal:
        return _Pattern()
    if torch.compiler.is_compiling():
        return _Pattern() if local_size is not None and local_size >= kv_length else None
    parts = list(_and_parts(mask_function))
    overlays = [(part, positions) for part, positions in parts if part is not causal]
    packing = [part for part, _ in overlays if _maker(part) == "packed_sequence_mask_function"]
    if len(overlays) == len(parts) or len(packing) > 1:
        return None
    if not all(
        part in packing or _hides_nothing(part, kv_length, positions is not None)
        for part, positions in overlays
    ):
        return None
    remapped = [positions for _, positions in parts if positions is not None]
    if any(positions is not remapped[0] for positions in remapped):
        return None
    return _Pattern(
        _closure(packing[0])["packed_sequence_mask"] if packing else None,
        remapped[0] if remapped else None,
    )


def _and_parts(
    mask_function: Callable[..., Any], positions: torch.Tensor | None = None
) -> Iterator[tuple[Callable[..., Any], torch.Tensor | None]]:
    """The functions that must all agree, each with the positions that replace the indices in its
    arguments."""
    maker = _maker(mask_function)
    if maker == "and_masks":
        for part in _closure(mask_function)["mask_functions"]:
            yield from _and_parts(part, positions)
    elif maker == "remap_positions_for_packed_sequence" and positions is None:
        hidden = _closure(mask_function)
        yield from _and_parts(hidden["mask_function"], hidden["position_ids"])
    else:
        yield mask_function, positions


def _maker(mask_function: Callable[..., Any]) -> str:
    """The name of the function of transformers that made this one; empty for all other
    functions."""
    if getattr(mask_function, "__module__", None) != "transformers.masking_utils":
        return ""
    return mask_function.__qualname__.partition(".<locals>.")[0]


def _closure(mask_function: Callable[..., Any]) -> Any:
    return inspect.getclosurevars(mask_function).nonlocals


def _hides_nothing(overlay: Callable[..., Any], kv_length: int, is_remapped: bool) -> bool:
    """Whether this is a window or chunk that covers all keys (without padding)."""
    maker = _maker(overlay)
    if maker == "sliding_window_overlay":
        return bool(_closure(overlay)["sliding_window"] >= kv_length)
    # Positions of one sequence may be on both sides of a chunk border.
    if maker == "chunked_overlay" and not is_remapped:
        return bool(_closure(overlay)["chunk_size"] >= kv_length)
    return False
