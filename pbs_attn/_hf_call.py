"""The facts about an attention call that a layer makes or is going to make."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ._autograd import is_differentiated
from ._hf_file import keywords, mask_makers, needs_mask, supports_sdpa, uses_interface
from ._hf_route import Call
from ._hf_rows import rows_of
from ._hf_trace import constant_in_traces
from .ops import DTYPES

# Keywords by which an attention layer passes its attention sinks.
_SINKS = {"s_aux", "sinks"}

# Types of layers with a window or chunk, and the field of the config that has its size.
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}

# Parameters by which an attention layer gets the states of another sequence.
_CROSS_ATTENTION = ("cross_attention_states", "encoder_hidden_states", "key_value_states")


def describe_call(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> Call:
    """The call of its attention function that `module` makes."""
    device_type = query.device.type
    file_name = type(module).__module__
    rows = rows_of(attention_mask, query, key)
    return Call(
        num_queries=query.shape[2],
        num_keys=key.shape[2],
        head_dim=query.shape[3],
        value_head_dim=value.shape[3],
        dtype=_operand_dtype(device_type, query.dtype, key.dtype, value.dtype),
        device_type=device_type,
        is_causal=_is_causal(module) if is_causal is None else is_causal,
        has_mask=attention_mask is not None and rows is None,
        window=kwargs.get("sliding_window"),
        uses_interface=uses_interface(file_name),
        supports_sdpa=supports_sdpa(file_name),
        has_softcap=kwargs.get("softcap") is not None,
        has_sinks=_any_given(kwargs, *_SINKS) or _has(module, "sinks"),
        has_head_mask=kwargs.get("head_mask") is not None,
        has_position_bias=kwargs.get("position_bias") is not None,
        selects_keys=_any_given(kwargs, "indices", "block_indices"),
        is_training=module.training,
        has_dropout=bool(dropout),
        # Some layers pass their ordinary cache under the same name.
        has_paged_cache=type(kwargs.get("cache")).__name__ == "PagedAttentionCache",
        needs_grad=is_differentiated(query, key, value),
        rows=rows,
    )


def foresee_call(module: torch.nn.Module, model: Any, config: Any, num_tokens: int) -> Call:
    """The call that `module` will make for a prompt of `num_tokens`, from its attributes, its
    config and the file of its class."""
    head_dim = _first_given(
        (module, "qk_head_dim"),
        (module, "head_dim"),
        (module, "attention_head_size"),
        (config, "head_dim"),
    )
    if head_dim is None:
        num_heads = _first_given((config, "num_attention_heads")) or 1
        head_dim = (_first_given((config, "hidden_size")) or 0) // num_heads
    softcap = _first_given((module, "attn_logit_softcapping"), (config, "attn_logit_softcapping"))
    device_type = _device_type(module, model)
    names = keywords(type(module))
    file_name = type(module).__module__
    return Call(
        num_queries=num_tokens,
        num_keys=num_tokens,
        head_dim=head_dim,
        value_head_dim=_first_given((module, "v_head_dim")) or head_dim,
        dtype=_operand_dtype(device_type, model.dtype),
        device_type=device_type,
        is_causal=_is_causal(module),
        has_mask=(
            always_masked(module)
            or _is_masked_from_outside(module, model)
            or _has_pattern_of_its_own(module, config)
        ),
        window=_window(module, config),
        uses_interface=uses_interface(file_name),
        supports_sdpa=supports_sdpa(file_name),
        has_softcap=softcap is not None,
        has_sinks=_has(module, "sinks") if hasattr(module, "sinks") else bool(names & _SINKS),
        has_position_bias="position_bias" in names,
        selects_keys=_hands_over_its_keys(module),
        is_training=module.training,
    )


def always_masked(module: torch.nn.Module) -> bool:
    """Whether the layer gets a mask for a plain prompt too: its model builds masks itself, or the
    layer makes a mask from the one that it got, or from the keys that its indexer has selected."""
    selects_by_mask = _has(module, "indexer") and not _hands_over_its_keys(module)
    file_name = type(module).__module__
    return selects_by_mask or needs_mask(file_name) or not mask_makers(type(module))


def _is_masked_from_outside(module: torch.nn.Module, model: torch.nn.Module) -> bool:
    """Whether a model that contains the model of the layer builds the mask, as in transformers
    4."""
    return any(
        hasattr(around, "_update_causal_mask") and module in set(around.modules())
        for around in model.modules()
    )


def _hands_over_its_keys(module: torch.nn.Module) -> bool:
    """Whether the layer passes the keys that it has selected to its attention function."""
    names = keywords(type(module))
    return "indices" in names or ("block_indices" in names and _has(module, "indexer"))


def _has_pattern_of_its_own(module: torch.nn.Module, config: Any) -> bool:
    """Whether the config names a window for the layer that transformers itself does not know."""
    kind = _layer_type(module, config)
    return kind is not None and "sliding" in kind and kind not in _WINDOWS


def _is_causal(module: torch.nn.Module) -> bool | None:
    """None if neither the layer nor its config says so."""
    # A config can make a decoder bidirectional although its layers do not show it.
    if getattr(getattr(module, "config", None), "is_causal", True) is False:
        return False
    if getattr(module, "is_cross_attention", False):
        return False
    told = getattr(module, "is_causal", None)
    if told is None and _takes_states_from_elsewhere(type(module)):
        return False
    return told


@constant_in_traces
def _takes_states_from_elsewhere(layer_type: type[torch.nn.Module]) -> bool:
    parameters = inspect.signature(layer_type.forward).parameters
    return any(name in parameters for name in _CROSS_ATTENTION)


def _operand_dtype(device_type: str, *dtypes: torch.dtype) -> torch.dtype | None:
    """The dtype that the operator computes in. Under autocast it is that of autocast, whatever the
    dtype of the operands."""
    has_autocast = torch.amp.is_autocast_available(device_type)
    if has_autocast and torch.is_autocast_enabled(device_type) and set(dtypes) <= set(DTYPES):
        return torch.get_autocast_dtype(device_type)
    return dtypes[0] if all(dtype == dtypes[0] for dtype in dtypes) else None


def _device_type(module: torch.nn.Module, model: Any) -> str:
    """The device that the layer computes on. Offloaded weights are on the meta device between
    calls; the hook that accelerate puts on a module knows their device during a call."""
    weight = next(module.parameters(), None)
    device: torch.device = model.device if weight is None else weight.device
    if device.type != "meta":
        return device.type
    for part in module.modules():
        place = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if place is not None:
            return "cuda" if isinstance(place, int) else torch.device(place).type
    return device.type


def _window(module: Any, config: Any) -> Any:
    """The number of keys in the window (or chunk) of the layer; None without one."""
    if getattr(module, "is_sliding", True) is False:
        return None
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    if "sliding_window" in keywords(type(module)):
        return getattr(config, "sliding_window", None)
    makers = mask_makers(type(module))
    if makers and not any("sliding" in name or "chunk" in name for name in makers):
        return None  # the config has a window, but the model makes no mask of it
    kind = _layer_type(module, config)
    if kind is not None:
        return getattr(config, _WINDOWS[kind], None) if kind in _WINDOWS else None
    return _first_given((config, "sliding_window"), (config, "attention_chunk_size"))


def _layer_type(module: Any, config: Any) -> str | None:
    """The type of the layer in the config, if the config lists types."""
    layer_types: list[str] | None = getattr(config, "layer_types", None)
    layer_idx: int | None = getattr(module, "layer_idx", None)
    return layer_types[layer_idx] if layer_types and layer_idx is not None else None


def _first_given(*places: tuple[Any, str]) -> Any:
    values = (getattr(owner, name, None) for owner, name in places)
    return next((value for value in values if value is not None), None)


def _any_given(kwargs: dict[str, Any], *names: str) -> bool:
    return any(kwargs.get(name) is not None for name in names)


def _has(module: torch.nn.Module, name: str) -> bool:
    """Whether `module` has an attribute that is not None."""
    return getattr(module, name, None) is not None
