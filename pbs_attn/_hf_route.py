"""The one place that decides which implementation serves a call of an attention layer."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ._library import has_kernel
from .config import HEAD_DIMS, PBSConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Settings:
    """What one registered name stands for."""

    config: PBSConfig
    min_tokens: int


# Every name given to register().
REGISTERED: dict[str, Settings] = {}


class Call(NamedTuple):
    """The facts about one attention call that its route depends on."""

    num_queries: int
    num_keys: int
    head_dim: int
    value_head_dim: int
    dtype: torch.dtype | None  # None: query, key and value differ
    device_type: str
    is_causal: bool
    has_mask: bool
    window: int | None
    has_softcap: bool = False
    has_sinks: bool = False
    has_head_mask: bool = False
    has_position_bias: bool = False
    selects_keys: bool = False
    has_dropout: bool = False
    has_paged_cache: bool = False
    needs_grad: bool = False


class Route(NamedTuple):
    """`kind` is "pbs", "sdpa", "eager" or "unsupported". `reason` is a str.format template over
    the fields of Call and Settings, so that torch.compile never has to print a symbolic size."""

    kind: str
    reason: str


def route(call: Call, settings: Settings) -> Route:
    """Which implementation serves `call`, and why."""
    if call.selects_keys:
        return Route("unsupported", "the layer selects its own keys (an indexer)")
    if reason := _why_eager(call):
        return Route("eager", reason)
    if reason := _why_not_plain(call) or _why_not_worth_it(call, settings) or _why_no_kernel(call):
        return Route("sdpa", reason)
    return Route("pbs", "causal prefill")


def _why_eager(call: Call) -> str | None:
    """What SDPA has no argument for."""
    if call.has_softcap:
        return "the layer caps its attention logits (softcap)"
    if call.has_sinks:
        return "the layer has attention sinks"
    if call.has_position_bias:
        return "the layer adds a position bias"
    if call.has_head_mask:
        return "head_mask is given"
    return None


def _why_not_plain(call: Call) -> str | None:
    """What is not bottom-right causal inference over all keys."""
    if call.needs_grad:
        return "gradients are needed, and PBS is inference only (use torch.no_grad())"
    if call.has_dropout:
        return "attention dropout is on (use model.eval())"
    if call.has_paged_cache:
        return "a paged cache is given"
    if call.num_queries == 1:
        return "a decode step has one query"
    if call.is_causal and call.window is not None and call.window < call.num_keys:
        return "the window of {window} tokens is shorter than the keys"
    if not call.is_causal:
        return "the layer is not causal"
    if call.has_mask:
        return "the mask is not plain causal (padding, packing, static cache, custom mask)"
    if call.num_queries > call.num_keys:
        return "there are more queries than keys"
    return None


def _why_not_worth_it(call: Call, settings: Settings) -> str | None:
    if call.num_keys < settings.min_tokens:
        return "fewer than min_tokens={min_tokens} keys"
    if call.num_queries < settings.config.block_size:
        return "fewer queries than one block of {config.block_size}"
    return None


def _why_no_kernel(call: Call) -> str | None:
    if call.head_dim not in HEAD_DIMS:
        return f"head_dim {{head_dim}} is not one of {HEAD_DIMS}"
    if call.value_head_dim != call.head_dim:
        return "the values' head_dim {value_head_dim} is not the keys' {head_dim}"
    if call.dtype is None:
        return "query, key and value differ in dtype"
    if call.dtype not in DTYPES:
        return "dtype {dtype} is not float32, bfloat16 or float16"
    if call.device_type == "cuda" and call.dtype == torch.float32:
        return "CUDA takes bfloat16 and float16, not float32"
    if not _has_kernel(call.device_type):
        return "pbs_attn has no kernel for device {device_type}"
    return None


@torch.compiler.assume_constant_result
def _has_kernel(device_type: str) -> bool:
    return has_kernel("attention", device_type)


NO_INTERFACE = "the model's file does not support SDPA through transformers' attention interface"


@torch.compiler.assume_constant_result
def uses_interface(file_name: str) -> bool:
    """Whether the model of a configuration_*.py or modeling_*.py works with a registered name.

    transformers builds its masks for every model and checks no name that somebody registered; a
    model that computes attention by itself would read a missing mask as one that hides nothing.
    """
    file_name = file_name.replace("configuration_", "modeling_")
    file = sys.modules.get(file_name)
    if file is None or "modeling_" not in file_name:
        return True
    classes = [cls for cls in vars(file).values() if isinstance(cls, type)]
    classes = [cls for cls in classes if cls.__module__ == file_name]
    if any(getattr(cls, "_supports_attention_backend", False) for cls in classes):
        return True
    supports_sdpa = any(getattr(cls, "_supports_sdpa", False) for cls in classes)
    return supports_sdpa and hasattr(file, "ALL_ATTENTION_FUNCTIONS")


def has(module: object, name: str) -> bool:
    """Whether `module` has an attribute that is not None."""
    return getattr(module, name, None) is not None
