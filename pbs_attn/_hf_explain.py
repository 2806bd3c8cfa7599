"""Predicts the route of each attention layer of a transformers model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._hf_call import foresee_call
from ._hf_file import calls_interface, mask_makers, uses_interface
from ._hf_route import REGISTERED, fill_in, route
from ._hf_table import format_table

# Longer than any window and any min_tokens: the length that explain() assumes by default.
_LONG_PROMPT = 1 << 40


@dataclass(frozen=True)
class LayerRoute:
    """The route of one attention layer in a prefill: `route` is "pbs", "sdpa", "eager",
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
        return format_table(rows)


def explain(model: torch.nn.Module, num_tokens: int | None = None) -> LayerRoutes:
    """Returns the route of every attention layer of a transformers model, in module order.

    The routes are those of a prefill of `num_tokens` tokens without padding or packing, in one
    forward under torch.no_grad(), with the model, the autocast mode and the training mode as they
    are now. A sequence of a padded or packed batch takes the route of a prompt of its length.
    Decode steps always take SDPA, or eager if a layer needs it. ``routes`` counts the routes that
    the calls took.

    Args:
        model: a transformers model, whatever its attn_implementation.
        num_tokens: length of the prompt. None means longer than every window and min_tokens.

    Raises:
        TypeError: if ``model`` is not a transformers model.
        ValueError: if ``num_tokens`` is not positive.
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
    """Whether `module` is an attention layer, as far as its attributes and its code tell."""
    hints = ("layer_idx", "scaling", "num_key_value_groups")
    looks_so = hasattr(module, "is_causal") and any(hasattr(module, hint) for hint in hints)
    # A model whose file does not use the interface is refused when it asks for its mask.
    is_refused = not uses_interface(type(module).__module__) and bool(mask_makers(type(module)))
    named_so = is_refused and type(module).__name__.endswith("Attention")
    return looks_so or named_so or calls_interface(type(module))


def _explain_layer(
    model: torch.nn.Module, name: str, module: torch.nn.Module, num_tokens: int
) -> LayerRoute:
    config = getattr(module, "config", model.config)
    layer_idx = getattr(module, "layer_idx", None)
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in REGISTERED:
        reason = f"attn_implementation is {implementation!r}, which was not given to register()"
        return LayerRoute(layer_idx, name, str(implementation), reason)
    settings = REGISTERED[implementation]
    call = foresee_call(module, model, config, num_tokens)
    kind, reason = route(call, settings)
    return LayerRoute(layer_idx, name, kind, fill_in(reason, call, settings))
