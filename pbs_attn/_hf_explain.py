"""Which way each attention layer of a transformers model goes, told before it runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from ._hf_route import NO_INTERFACE, REGISTERED, Call, has, route, uses_interface

# Longer than any window and any min_tokens: what explain() assumes when it is given no length.
_LONG_PROMPT = 1 << 40


@dataclass(frozen=True)
class LayerRoute:
    """Where one attention layer's prefill goes: `route` is "pbs", "sdpa", "eager",
    "unsupported", or the name of another implementation that the layer is set to."""

    layer_idx: int | None
    name: str
    route: str
    reason: str


class LayerRoutes(list[LayerRoute]):
    """A list of LayerRoute that prints as a table."""

    def __str__(self) -> str:
        rows = [("layer", "route", "name", "reason")]
        rows += [
            ("-" if r.layer_idx is None else str(r.layer_idx), r.route, r.name, r.reason)
            for r in self
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]
            )
            for row in rows
        )


def explain(model: torch.nn.Module, num_tokens: int | None = None) -> LayerRoutes:
    """The route of every attention layer of a transformers model, in the order of its modules.

    It answers for the prefill of `num_tokens` tokens without padding, in one forward under
    torch.no_grad(). Decode steps and padded batches always take SDPA (or eager, where a layer
    needs it).

    Args:
        model: a transformers model, whatever its attn_implementation.
        num_tokens: length of the prompt; None for one longer than every window and min_tokens.

    Raises:
        TypeError, ValueError: a bad argument.
    """
    if not hasattr(model, "config") or not hasattr(model, "dtype"):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    if num_tokens is not None and num_tokens < 1:
        raise ValueError(f"num_tokens must be positive, got {num_tokens}")
    num_tokens = _LONG_PROMPT if num_tokens is None else num_tokens
    return LayerRoutes(
        _explain_layer(model, name, module, num_tokens)
        for name, module in model.named_modules()
        if is_attention(module)
    )


def is_attention(module: torch.nn.Module) -> bool:
    """Whether `module` is an attention layer, as far as its attributes tell."""
    hints = ("layer_idx", "scaling", "num_key_value_groups")
    return hasattr(module, "is_causal") and any(hasattr(module, hint) for hint in hints)


def _explain_layer(model: Any, name: str, module: torch.nn.Module, num_tokens: int) -> LayerRoute:
    config = getattr(module, "config", model.config)
    layer_idx = getattr(module, "layer_idx", None)
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in REGISTERED:
        reason = f"attn_implementation is {implementation!r}, which was not given to register()"
        return LayerRoute(layer_idx, name, str(implementation), reason)
    if not uses_interface(type(module).__module__):
        return LayerRoute(layer_idx, name, "unsupported", NO_INTERFACE)
    settings = REGISTERED[implementation]
    call = _foresee_call(model, module, config, num_tokens)
    kind, reason = route(call, settings)
    words = reason.format(**call._asdict(), config=settings.config, min_tokens=settings.min_tokens)
    return LayerRoute(layer_idx, name, kind, words)


def _foresee_call(model: Any, module: Any, config: Any, num_tokens: int) -> Call:
    """The Call that `module` will make, from its attributes and its config."""
    head_dim = _first_given(
        (module, "qk_head_dim"),
        (module, "head_dim"),
        (module, "attention_head_size"),
        (config, "head_dim"),
    )
    if head_dim is None:
        num_heads = _first_given((config, "num_attention_heads")) or 1
        head_dim = (_first_given((config, "hidden_size")) or 0) // num_heads
    weight = next(module.parameters(), None)
    softcap = _first_given((module, "attn_logit_softcapping"), (config, "attn_logit_softcapping"))
    dropout = _first_given((module, "attention_dropout"), (config, "attention_dropout"))
    return Call(
        num_queries=num_tokens,
        num_keys=num_tokens,
        head_dim=head_dim,
        value_head_dim=_first_given((module, "v_head_dim")) or head_dim,
        dtype=model.dtype,
        device_type=(model if weight is None else weight).device.type,
        is_causal=module.is_causal,
        has_mask=not _asks_for_mask(type(module)),
        window=_window(module, config),
        has_softcap=softcap is not None,
        has_sinks=has(module, "sinks"),
        has_position_bias=hasattr(module, "has_relative_attention_bias"),
        selects_keys=has(module, "indexer"),
        has_dropout=module.training and bool(dropout),
    )


def _asks_for_mask(layer_type: type) -> bool:
    """Whether the model has its mask made by the registered function; a few in transformers 4
    build one by themselves, always explicit."""
    names = vars(sys.modules.get(layer_type.__module__, object))
    return any(name.startswith("create_") and "mask" in name for name in names)


def _first_given(*places: tuple[Any, str]) -> Any:
    values = (getattr(owner, name, None) for owner, name in places)
    return next((value for value in values if value is not None), None)


def _window(module: Any, config: Any) -> Any:
    """How many keys the layer's window (or chunk) holds; None without one."""
    if getattr(module, "is_sliding", True) is False:
        return None
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    layer_types = getattr(config, "layer_types", None)
    layer_idx = getattr(module, "layer_idx", None)
    if layer_types and layer_idx is not None:
        attribute = {
            "sliding_attention": "sliding_window",
            "chunked_attention": "attention_chunk_size",
        }.get(layer_types[layer_idx])
        return getattr(config, attribute, None) if attribute else None
    return _first_given((config, "sliding_window"), (config, "attention_chunk_size"))
