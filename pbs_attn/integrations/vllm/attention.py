"""What our builders and layers do in any backend of vLLM, as classes to derive from beside its own.

Builders make a Plan for each batch and hang it on the metadata; layers that take PBS follow it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger

from ... import attention_paged, attention_paged_
from .counter import count_tokens
from .engine import describe_engine, is_selected, settings_of
from .prompts import prompt_lengths
from .route import (
    Engine,
    Layer,
    Step,
    pbs_rows,
    why_layer_dense,
    why_not_in_place,
    why_step_dense,
)
from .rows import Plan, Run, make_plan, put_tokens, rest_arguments, take_rows, take_tokens

# Below the package vllm, so that vLLM's own settings of its log hold.
logger = init_logger("vllm.pbs_attn")


class PBSBuilder:
    """Beside a metadata builder of vLLM, and before it."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, *args: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, *args)  # type: ignore[call-arg]
        self.pbs_settings = settings_of(vllm_config)
        layers = vllm_config.compilation_config.static_forward_context
        reasons = {name: _reason(layers.get(name)) for name in layer_names}
        self.pbs_layers = [name for name, reason in reasons.items() if reason is None]
        taking = (name for name, layer in layers.items() if _reason(layer) is None)
        # One builder counts, that of the first layer.
        self.pbs_counts = _is_first_rank() and next(taking, None) in layer_names
        if _is_first_rank() and is_selected(vllm_config):
            _log_layers(reasons, self.pbs_settings, kv_cache_spec.block_size, vllm_config)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False):
        """vLLM's metadata of a batch, with a Plan as its attribute `pbs_plan`, or None."""
        build = super().build  # type: ignore[misc]
        metadata = build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.pbs_plan = None
        if self.pbs_layers:
            plan = self._make_plan(common_prefix_len, common_attn_metadata, fast_build, build)
            metadata.pbs_plan = plan
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """A graph must hold the engine's own attention only: the decision is not captured."""
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        metadata.pbs_plan = None
        return metadata

    def _make_plan(
        self, common_prefix_len: int, common: Any, is_draft: bool, build: Callable[..., Any]
    ) -> Plan | None:
        settings = self.pbs_settings
        if common.max_query_len == 1:
            return None
        upper_bound, prefilling = common.seq_lens_cpu_upper_bound, common.is_prefilling
        step = Step(
            is_causal=common.causal is True,
            is_cascade=common_prefix_len > 0,
            is_draft=is_draft,
            has_host_data=upper_bound is not None and prefilling is not None,
            has_prefix_mask=getattr(common, "mm_req_doc_ranges", None) is not None,
        )
        reason = why_step_dense(step)
        if reason is not None:
            logger.info_once("PBS: long prompts took the engine's own attention: %s", reason)
            return None
        starts, lengths = common.query_start_loc_cpu.tolist(), upper_bound.tolist()
        is_prefilling = prefilling.tolist()[: len(starts) - 1]
        rows = pbs_rows(starts, lengths, is_prefilling, settings)
        if self.pbs_counts:
            _count(starts, is_prefilling, rows)
        if not rows:
            return None
        plan = make_plan(starts, lengths, rows, prompt_lengths(max(rows) + 1))
        if not plan.rest:
            return plan
        rest = common.replace(**rest_arguments(common, plan.rest, lengths))
        # fast_build: FlashAttention 3's schedule would go into a buffer that the metadata of the
        # whole batch points to.
        return dataclasses.replace(plan, rest_metadata=build(0, rest, True))

    def update_block_table(self, metadata: Any, blk_table: Tensor, slot_mapping: Tensor) -> Any:
        """The same batch in another group of layers, whose pages have other numbers."""
        update = super().update_block_table  # type: ignore[misc]
        new = update(metadata, blk_table, slot_mapping)
        plan = metadata.pbs_plan
        if plan is not None and plan.rest:
            table, slots = take_rows(blk_table, plan.rest), take_tokens(slot_mapping, plan.rest)
            rest = update(plan.rest_metadata, table, slots)
            new.pbs_plan = dataclasses.replace(plan, rest_metadata=rest)
        return new


class PBSImpl:
    """Beside an attention implementation of vLLM, and before it. A subclass tells where keys and
    values lie, in `pbs_attend`."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **more: Any,
    ) -> None:
        super().__init__(  # type: ignore[call-arg]
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window,
            kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name, **more,
        )  # fmt: skip
        vllm_config = get_current_vllm_config()
        self.pbs_vllm_config = vllm_config
        self.pbs_settings = settings_of(vllm_config)
        layer = Layer(
            attn_type=str(getattr(attn_type, "value", attn_type)),
            head_dim=head_size,
            dtype=vllm_config.model_config.dtype,
            device_type=vllm_config.device_config.device_type,
            cache_dtype=kv_cache_dtype,
            cache_layout=self.pbs_cache_layout(),
            window=sliding_window,
            has_softcap=bool(logits_soft_cap),
            has_sinks=more.get("sinks") is not None,
            has_alibi=alibi_slopes is not None,
        )
        self.pbs_reason = "the backend CUSTOM was not asked for"
        if is_selected(vllm_config):
            self.pbs_reason = why_layer_dense(layer, describe_engine(vllm_config))

    @functools.cached_property
    def pbs_engine(self) -> Engine:
        """Asked for in a forward only: the constructor knows no later layer."""
        return describe_engine(self.pbs_vllm_config)

    def pbs_cache_layout(self) -> str | None:
        """The name of the cache's layout if we cannot read it."""
        return None

    def pbs_attend(self, run: Run, query: Tensor, kv_cache: Tensor, table: Tensor, output: Tensor):
        """Attention of one run: query and output (queries, heads, head_dim), table (rows, pages)."""
        raise NotImplementedError(type(self).__name__)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """The attention of one layer: the rows of the plan by PBS, all others as vLLM does."""
        attend = super().forward  # type: ignore[misc]
        if attn_metadata is None and self.pbs_reason is None:
            reserve(self, query)
        plan = getattr(attn_metadata, "pbs_plan", None)
        if plan is None or self.pbs_reason is not None:
            return attend(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        for run in plan.runs:
            (first, end), (begin, stop) = run.span
            table = attn_metadata.block_table[first:end]
            self.pbs_attend(run, query[begin:stop], kv_cache, table, output[begin:stop])
        if plan.rest:
            # Keys and values are in the cache by now; nothing here reads them from elsewhere.
            rest = plan.rest_metadata
            is_view = len(plan.rest) == 1
            out = take_tokens(output, plan.rest) if is_view else _empty(output, rest)
            attend(
                layer, take_tokens(query, plan.rest), None, None, kv_cache, rest, out,
                output_scale, output_block_scale,
            )  # fmt: skip
            if not is_view:
                put_tokens(output, plan.rest, out)
        return output

    def pbs_attend_pages(
        self, run: Run, query: Tensor, pages: tuple[Tensor, Tensor], table: Tensor, output: Tensor
    ) -> bool:
        """Attention of one run over pages (number, page size, KV heads, head_dim).

        Returns:
            Whether segments may have been ordered inside the pages.
        """
        k_cache, v_cache = pages
        config = self.pbs_settings.config
        if not run.is_last:
            # The last queries of a chunk are not the last ones of the prompt.
            config = dataclasses.replace(config, dense_tail=0)
        host = (run.cu_seqlens_q, run.seq_lens)
        settings = {"scale": self.scale, "config": config}  # type: ignore[attr-defined]
        if why_not_in_place(k_cache.shape[1], config, self.pbs_engine) is None:
            attention_paged_(query, k_cache, v_cache, output, *host, table, **settings)
            return True
        output.copy_(attention_paged(query, k_cache, v_cache, *host, table, **settings))
        return False


_reserved: set[torch.device] = set()


def _empty(output: Tensor, metadata: Any) -> Tensor:
    return output.new_empty(metadata.num_actual_tokens, *output.shape[1:])


def reserve(impl: Any, query: Tensor) -> None:
    """Runs PBS once in the profiling run, which has no cache yet, so that vLLM leaves room for
    the memory of the longest call. All pages are one page of zeros."""
    page_size = impl.pbs_settings.config.segment_size
    num_keys = impl.pbs_vllm_config.model_config.max_model_len
    num_queries = min(query.shape[0], num_keys)
    is_short = num_queries < impl.pbs_settings.config.block_size
    if is_short or num_keys < impl.pbs_settings.min_tokens or query.device in _reserved:
        return
    _reserved.add(query.device)
    shape = (1, page_size, impl.num_kv_heads, impl.head_size)
    pages = (query.new_zeros(shape), query.new_zeros(shape))
    table = query.new_zeros((1, -(-num_keys // page_size)), dtype=torch.int32)
    lengths = (torch.tensor([0, num_queries]).int(), torch.tensor([num_keys]).int())
    queries = query.new_zeros(query[:num_queries].shape)
    settings = {"scale": impl.scale, "config": impl.pbs_settings.config}
    if why_not_in_place(page_size, impl.pbs_settings.config, impl.pbs_engine) is None:
        out = torch.empty_like(queries)
        attention_paged_(queries, *pages, out, *lengths, table, **settings)
    else:
        attention_paged(queries, *pages, *lengths, table, **settings)


def _reason(layer: Any) -> str | None:
    """Why a layer of vLLM is dense; None if it takes PBS."""
    impl = getattr(layer, "impl", None)
    reason: str | None = getattr(impl, "pbs_reason", "its attention is another backend's")
    return reason


def _is_first_rank() -> bool:
    return get_tensor_model_parallel_rank() == 0 and get_pp_group().is_first_rank


def _count(starts: list[int], is_prefilling: list[bool], rows: list[int]) -> None:
    """Counts the prompt tokens of one step."""
    sizes = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    total = sum(size for size, is_prompt in zip(sizes, is_prefilling, strict=False) if is_prompt)
    taken = sum(sizes[row] for row in rows)
    count_tokens(taken, total - taken)


def _log_layers(
    reasons: dict[str, str | None], settings: Any, page_size: int, vllm_config: Any
) -> None:
    """Says at the start which layers take PBS, and why the others do not."""
    taken = [name for name, reason in reasons.items() if reason is None]
    if taken:
        engine = describe_engine(vllm_config)
        why_not = why_not_in_place(page_size, settings.config, engine)
        order = "ordered in place" if why_not is None else f"left in order, since {why_not}"
        logger.info(
            "PBS: %d of %d attention layers (%s) take prompts of %d tokens or more, with %s. "
            "Pages of %d tokens are %s.",
            len(taken), len(reasons), _between(taken), settings.min_tokens, settings.config,
            page_size, order,
        )  # fmt: skip
    for why in sorted({reason for reason in reasons.values() if reason is not None}):
        dense = [name for name, reason in reasons.items() if reason == why]
        logger.info(
            "PBS: %d attention layers (%s) stay dense: %s.", len(dense), _between(dense), why
        )


def _between(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
