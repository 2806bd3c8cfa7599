"""The part of our attention layers that is the same for every backend of vLLM: a mixin class."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config

from ... import attention_paged, attention_paged_
from .engine import describe_engine, first_pbs_layer, is_selected, settings_of
from .pages import split_pages
from .route import Engine, Layer, why_layer_dense, why_not_in_place, why_row_dense
from .rows import Run, Span, put_tokens, take_tokens


class New(NamedTuple):
    """The tokens of a run, (tokens, heads, head_dim) each. Their keys and values are also in the
    cache; here they are None if the layer did not pass them."""

    query: Tensor
    key: Tensor | None = None
    value: Tensor | None = None


class PBSImpl:
    """A mixin for an attention implementation of vLLM. It comes before vLLM's class in the list of
    bases."""

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
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window,
            kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name, **more,
        )  # fmt: skip
        vllm_config = get_current_vllm_config()
        self.pbs_vllm_config = vllm_config
        self.pbs_settings = settings_of(vllm_config)
        # The last queries of a chunk are those of the prompt only if the prompt ends there.
        self.pbs_chunk_config = dataclasses.replace(self.pbs_settings.config, dense_tail=0)
        self.pbs_is_profiled = False
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
        """Read only in a forward: the constructor does not know the later layers."""
        return describe_engine(self.pbs_vllm_config)

    def pbs_cache_layout(self) -> str | None:
        """The name of the cache's layout if we cannot read it."""
        return None

    def pbs_attend(
        self, run: Run, new: New, kv_cache: Tensor, table: Tensor, output: Tensor
    ) -> None:
        """Writes the attention of one run into `output`, (queries, heads, head_dim).
        The table is (rows, pages). Caches of other backends than CUDA override this method."""
        self.pbs_attend_pages(run, new, split_pages(kv_cache, self.head_size), table, output)

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
        """The attention of one layer: PBS for the rows of the plan, vLLM's attention for all
        others."""
        attend = super().forward
        if attn_metadata is None and not self.pbs_is_profiled:
            self.pbs_is_profiled = True
            if layer.layer_name == first_pbs_layer(self.pbs_vllm_config):
                self.pbs_reserve(query)
        plan = getattr(attn_metadata, "pbs_plan", None)
        has_scales = output_scale is not None or output_block_scale is not None
        if plan is None or self.pbs_reason is not None or has_scales:
            return attend(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        for run in plan.runs:
            (first, end), (begin, stop) = run.span
            table = attn_metadata.block_table[first:end]
            new = New(query[begin:stop])
            if key is not None:
                new = New(query[begin:stop], key[begin:stop], value[begin:stop])
            self.pbs_attend(run, new, kv_cache, table, output[begin:stop])
        if plan.rest:
            # Keys and values are in the cache by now, and this code reads them only there.
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
        self, run: Run, new: New, pages: tuple[Tensor, Tensor], table: Tensor, output: Tensor
    ) -> bool:
        """Attention of one run over pages (number, page size, KV heads, head_dim).

        Returns:
            Whether segments may have been ordered inside the pages.
        """
        k_cache, v_cache = pages
        config = self.pbs_settings.config if run.is_last else self.pbs_chunk_config
        host = (run.cu_seqlens_q, run.seq_lens)
        settings = {"scale": self.scale, "config": config}
        if why_not_in_place(k_cache.shape[1], config, self.pbs_engine) is None:
            new_keys = new.key, new.value
            attention_paged_(
                new.query, k_cache, v_cache, output, *host, table, *new_keys, **settings
            )
            return True
        output.copy_(attention_paged(new.query, k_cache, v_cache, *host, table, **settings))
        return False

    def pbs_reserve(self, query: Tensor) -> None:
        """Runs PBS once in the profiling run, so that vLLM reserves memory for the longest call.
        There is no cache yet, so one page of zeros stands for all pages."""
        page_size = self.pbs_vllm_config.cache_config.block_size
        num_keys = self.pbs_vllm_config.model_config.max_model_len
        num_queries = min(query.shape[0], num_keys)
        if why_row_dense(num_queries, num_keys, True, self.pbs_settings) is not None:
            return
        shape = (1, page_size, self.num_kv_heads, self.head_size)
        pages = (query.new_zeros(shape), query.new_zeros(shape))
        table = query.new_zeros((1, -(-num_keys // page_size)), dtype=torch.int32)
        queries = query.new_zeros((num_queries, *query.shape[1:]))
        host = torch.tensor([0, num_queries]).int(), torch.tensor([num_keys]).int()
        run = Run(Span((0, 1), (0, num_queries)), True, *host)
        self.pbs_attend_pages(run, New(queries), pages, table, torch.empty_like(queries))


def _empty(output: Tensor, metadata: Any) -> Tensor:
    return output.new_empty(metadata.num_actual_tokens, *output.shape[1:])
