"""Decides which implementation serves a call of an attention layer. No other file does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ._hf_rows import Row
from ._hf_trace import constant_in_traces
from ._library import has_kernel
from .config import PBSConfig
from .ops import DTYPES, HEAD_DIMS

NO_INTERFACE = "the model's file does not support SDPA through transformers' attention interface"


@dataclass(frozen=True)
class Settings:
    """The settings of one registered name."""

    name: str
    config: PBSConfig
    min_tokens: int


# Every name given to register().
REGISTERED: dict[str, Settings] = {}


class Call(NamedTuple):
    """The facts about one attention call that its route depends on.

    `dtype` is the one that the operator would compute in; None if query, key and value differ.
    `is_causal` is None if the layer does not say. `rows` are the sequences of a padded or packed
    batch. `is_row` says that this call is for one of them.
    """

    num_queries: int
    num_keys: int
    head_dim: int
    value_head_dim: int
    dtype: torch.dtype | None
    device_type: str
    is_causal: bool | None
    has_mask: bool
    window: int | None
    uses_interface: bool = True
    supports_sdpa: bool = True
    has_softcap: bool = False
    has_sinks: bool = False
    has_head_mask: bool = False
    has_position_bias: bool = False
    selects_keys: bool = False
    is_training: bool = False
    has_dropout: bool = False
    has_paged_cache: bool = False
    needs_grad: bool = False
    rows: tuple[Row, ...] | None = None
    is_row: bool = False

    def of_row(self, row: Row) -> Call:
        """The call for one of its rows."""
        return self._replace(
            num_queries=row.num_queries, num_keys=row.end - row.begin, rows=None, is_row=True
        )


class Route(NamedTuple):
    """`kind` is "pbs", "sdpa", "eager" or "unsupported". `reason` is a str.format template over
    the fields of Call and Settings, so that torch.compile never has to print a symbolic size."""

    kind: str
    reason: str


def route(call: Call, settings: Settings) -> Route:
    """Which implementation serves `call`, and why."""
    if reason := _why_unsupported(call):
        return Route("unsupported", reason)
    if reason := _why_eager(call):
        return Route("eager", reason)
    if reason := _why_not_plain(call) or _why_not_worth_it(call, settings) or _why_no_kernel(call):
        return Route("sdpa", reason)
    if call.is_row:
        return Route("pbs", "causal prefill of one sequence of a padded or packed batch")
    return Route("pbs", "causal prefill")


def fill_in(reason: str, call: Call, settings: Settings) -> str:
    """The reason of a Route with the numbers filled in."""
    return reason.format(**call._asdict(), config=settings.config, min_tokens=settings.min_tokens)


def _why_unsupported(call: Call) -> str | None:
    if not call.uses_interface:
        return NO_INTERFACE
    if call.selects_keys:
        return "the layer selects its own keys (an indexer)"
    if call.has_paged_cache:
        return "continuous batching keeps its cache in pages, which PBS cannot read"
    return None


def _why_eager(call: Call) -> str | None:
    """The reason why SDPA cannot compute the call."""
    if call.has_softcap:
        return "the layer caps its attention logits (softcap)"
    if call.has_sinks:
        return "the layer has attention sinks"
    if call.has_position_bias:
        return "the layer adds a position bias"
    if call.has_head_mask:
        return "head_mask is given"
    if not call.supports_sdpa:
        return "the model does not support SDPA"
    return None


def _why_not_plain(call: Call) -> str | None:
    """The reason why a call is not bottom-right causal inference over all keys."""
    # Gradient checkpointing runs a layer twice, first without gradients and then with them. Both
    # passes must take the same route, and the first cannot know that there will be a second.
    if call.is_training:
        return "the layer is in training mode (use model.eval())"
    if call.needs_grad:
        return "gradients are needed, and PBS is inference only (use torch.no_grad())"
    if call.has_dropout:
        return "attention dropout is on"
    if call.num_queries == 1 and not call.is_row:
        return "a decode step has one query"
    if call.is_causal and call.window is not None and call.window < call.num_keys:
        return "the window of {window} tokens is shorter than the keys"
    if call.is_causal is None:
        return "the layer does not tell whether it is causal"
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
    if call.rows is not None and all(
        _why_not_worth_it(call.of_row(row), settings) for row in call.rows
    ):
        return (
            "no sequence of the padded or packed batch has min_tokens={min_tokens} keys and "
            "a block of {config.block_size} queries"
        )
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


@constant_in_traces
def _has_kernel(device_type: str) -> bool:
    return has_kernel("attention", device_type)
