"""Decides which layers, steps, rows and pages take PBS in vLLM. No other file does. This file does
not import vLLM.

Four functions decide. Each returns a reason if the answer is no:

- `why_layer_dense`: whether a layer can take PBS at all. It is called once per layer.
- `why_step_dense`: whether a batch can. It is called once per step.
- `why_row_dense`: whether a row of the batch does. It is called once per row.
- `why_not_in_place`: whether completed segments are ordered inside their pages.

Pages are ordered in place. The order of keys does not change attention if every query sees all of
them or none. When all keys of a segment are written, every later query sees the whole segment. Its
keys may then change places, each with its value: decode steps, dense rows and other requests that
share the page compute the same result as before. RoPE has been applied to the keys by then. A slot
in an ordered segment therefore no longer belongs to the token at its position. In-place order is
sound as long as nothing writes a single slot of a complete segment again, and nothing reads a part
of such a segment:

- Chunks of a prompt follow each other. The next chunk begins at the end of the keys so far, which
  is not inside a complete segment.
- Prefix caching shares whole blocks, and a hit is cut to whole blocks before the last token. A
  request therefore begins at the first slot of a block of its own. That needs blocks of whole
  segments. Blocks shared by two requests of one step are whole too.
- Preemption frees the blocks and begins again, from a hit of the prefix cache, as above.
- Hybrid models may hit a part of a cached block and copy it (partial hits). Not sound.
- A KV connector may load a whole prompt. vLLM then computes the last token again and writes its
  slot, in a block that may be complete. Not sound.
- A layer that reads the pages of another layer would find the segments of its own queries already
  sorted, but the causal mask needs their positions. Not sound.
- Speculative decoding writes slots of rejected tokens again. They come after the prompt. This has
  not been tested, so pages keep their order.
- Windows, cascades, contexts in parallel and quantized caches are dense anyway: see below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..._library import has_kernel
from ...config import PBSConfig
from ...ops import DTYPES, HEAD_DIMS

NO_HOST_DATA = "vLLM does not tell lengths or prefill rows on the host"


@dataclass(frozen=True)
class Settings:
    """The settings of the user. Rows with fewer keys than `min_tokens` are dense."""

    config: PBSConfig
    min_tokens: int


class Engine(NamedTuple):
    """The facts about a server that its routes depend on."""

    context_parallel: int = 1
    splits_batches: bool = False
    has_rswa: bool = False
    has_prefix_mask: bool = False
    is_batch_invariant: bool = False
    is_hybrid: bool = False
    has_kv_connector: bool = False
    has_drafts: bool = False
    shares_caches: bool = False


class Layer(NamedTuple):
    """The facts about a layer. `cache_layout` names a layout that we cannot read, or is None."""

    attn_type: str
    head_dim: int
    dtype: torch.dtype
    device_type: str
    cache_dtype: str = "auto"
    cache_layout: str | None = None
    window: int | None = None
    has_softcap: bool = False
    has_sinks: bool = False
    has_alibi: bool = False


class Step(NamedTuple):
    """The facts about one batch."""

    is_causal: bool = True
    is_cascade: bool = False
    is_draft: bool = False
    has_prefix_mask: bool = False


def why_layer_dense(layer: Layer, engine: Engine) -> str | None:
    """The reason why a layer never takes PBS; None if it can."""
    return _why_engine_dense(engine) or _why_not_plain(layer) or _why_no_kernel(layer)


def _why_engine_dense(engine: Engine) -> str | None:
    if engine.context_parallel > 1:
        return "context parallelism spreads the keys of a sequence over ranks"
    if engine.splits_batches:
        return "dual batch overlap splits batches inside a sequence"
    if engine.has_rswa:
        return "the model keeps a reference window (R-SWA)"
    if engine.has_prefix_mask:
        return "the model masks prefixes in both directions"
    if engine.is_batch_invariant:
        return "VLLM_BATCH_INVARIANT asks for results that do not depend on chunks"
    return None


def _why_not_plain(layer: Layer) -> str | None:
    if layer.attn_type != "decoder":
        return "the layer is an encoder's or cross-attention"
    if layer.window is not None:
        return "the layer has a sliding window"
    if layer.has_softcap:
        return "the layer caps its attention logits (softcap)"
    if layer.has_sinks:
        return "the layer has attention sinks"
    if layer.has_alibi:
        return "the layer adds a position bias (ALiBi)"
    return None


def _why_no_kernel(layer: Layer) -> str | None:
    if layer.cache_dtype not in ("auto", str(layer.dtype).removeprefix("torch.")):
        return f"the KV cache holds {layer.cache_dtype}"
    if layer.cache_layout is not None:
        return f"the KV cache is packed for {layer.cache_layout}"
    if layer.head_dim not in HEAD_DIMS:
        return f"head_dim {layer.head_dim} is not one of {HEAD_DIMS}"
    if layer.dtype not in DTYPES:
        return f"dtype {layer.dtype} is not float32, bfloat16 or float16"
    if layer.device_type == "cuda" and layer.dtype == torch.float32:
        return "CUDA takes bfloat16 and float16, not float32"
    if not has_kernel("attention", layer.device_type):
        return f"pbs_attn has no kernel for device {layer.device_type}"
    return None


def why_step_dense(step: Step) -> str | None:
    """The reason why no row of a batch takes PBS; None if rows can."""
    if step.is_draft:
        return "the batch belongs to a draft model"
    if not step.is_causal:
        return "the batch is not causal"
    if step.is_cascade:
        return "cascade attention shares a prefix inside the batch"
    if step.has_prefix_mask:
        return "the batch masks prefixes in both directions"
    return None


def why_row_dense(
    num_queries: int, num_keys: int, is_prefilling: bool, settings: Settings
) -> str | None:
    """The reason why a row of a batch does not take PBS; None if it does."""
    if num_queries < settings.config.block_size:
        return "a decode step, or a chunk shorter than a block"
    if not is_prefilling:
        return "the row is not part of a prompt"
    if num_keys < settings.min_tokens:
        return "fewer than min_tokens keys"
    return None


def why_not_in_place(page_size: int, config: PBSConfig, engine: Engine) -> str | None:
    """The reason why pages keep the order in which vLLM wrote them; None if they are ordered."""
    if page_size % config.segment_size:
        return f"blocks of {page_size} tokens are not whole segments of {config.segment_size}"
    if page_size & (page_size - 1):
        return f"blocks of {page_size} tokens are not a power of two"
    if config.score != "sampled":
        return 'only scores of the kind "sampled" do without the means of earlier segments'
    if config.permute_per != "kv_head":
        return "a page has one order for each KV head, not for each query head"
    if engine.shares_caches:
        return "a layer reads the pages of another one"
    if engine.is_hybrid:
        return "a hybrid model may hit a part of a cached block"
    if engine.has_kv_connector:
        return "a KV connector may have the last token of a complete block computed again"
    if engine.has_drafts:
        return "speculative decoding writes slots again"
    return None


def is_last_chunk(num_keys: int, prompt_length: int | None) -> bool:
    """Whether a row ends its prompt. If so, or if that is unknown, its last queries stay dense."""
    return prompt_length is None or num_keys >= prompt_length


def pbs_rows(
    starts: Sequence[int],
    lengths: Sequence[int],
    prefilling: Sequence[bool],
    settings: Settings,
) -> list[int]:
    """The rows of a batch that take PBS. Row i has queries [starts[i], starts[i + 1]) and
    lengths[i] keys; rows behind the end of `prefilling` are padding."""
    return [
        row
        for row, is_prefilling in enumerate(prefilling[: len(starts) - 1])
        if why_row_dense(starts[row + 1] - starts[row], lengths[row], is_prefilling, settings)
        is None
    ]
