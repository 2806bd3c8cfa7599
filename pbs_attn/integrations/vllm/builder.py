"""The part of our metadata builders that is the same for every backend of vLLM: a mixin class."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from torch import Tensor
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger

from .counter import count_tokens
from .engine import describe_engine, first_pbs_layer, is_selected, reason_of, settings_of
from .prompts import prompt_lengths
from .route import NO_HOST_DATA, Step, pbs_rows, why_not_in_place, why_step_dense
from .rows import Plan, make_plan, rest_arguments, take_rows, take_tokens

# The name is below the package vllm, so that vLLM's settings of its log apply.
logger = init_logger("vllm.pbs_attn")


class PBSBuilder:
    """A mixin for a metadata builder of vLLM. It comes before vLLM's class in the list of bases."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, *args: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, *args)
        self.pbs_settings = settings_of(vllm_config)
        layers = vllm_config.compilation_config.static_forward_context
        reasons = {name: reason_of(layers.get(name)) for name in layer_names}
        self.pbs_layers = [name for name, reason in reasons.items() if reason is None]
        # Only the builder of the first layer counts.
        self.pbs_counts = _is_first_rank() and first_pbs_layer(vllm_config) in layer_names
        if _is_first_rank() and is_selected(vllm_config):
            _log_layers(reasons, self.pbs_settings, kv_cache_spec.block_size, vllm_config)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False):
        """vLLM's metadata of a batch, with a Plan as its attribute `pbs_plan`, or None."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        plan = None
        if self.pbs_layers and common_attn_metadata.max_query_len > 1:
            plan = self._make_plan(common_prefix_len, common_attn_metadata, fast_build)
        if plan is not None and plan.rest:
            # fast_build: otherwise, FlashAttention 3 writes its schedule into a buffer that the
            # metadata of the whole batch points to.
            rest = common_attn_metadata.replace(**rest_arguments(common_attn_metadata, plan.rest))
            plan = dataclasses.replace(plan, rest_metadata=super().build(0, rest, True))
        metadata.pbs_plan = plan
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """A graph must hold only the engine's own attention, because it cannot capture the
        decision."""
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)
        metadata.pbs_plan = None
        return metadata

    def _make_plan(self, common_prefix_len: int, common: Any, is_draft: bool) -> Plan | None:
        """The rows of a batch that take PBS, from host data alone; None if there are none."""
        upper_bound, prefilling = common.seq_lens_cpu_upper_bound, common.is_prefilling
        if upper_bound is None or prefilling is None:
            logger.info_once("PBS: a batch took the engine's own attention: %s.", NO_HOST_DATA)
            return None
        starts, lengths = common.query_start_loc_cpu.tolist(), upper_bound.tolist()
        is_prefilling = prefilling.tolist()[: len(starts) - 1]
        rows = pbs_rows(starts, lengths, is_prefilling, self.pbs_settings)
        if rows:
            step = Step(
                is_causal=common.causal is True,
                is_cascade=common_prefix_len > 0,
                is_draft=is_draft,
                has_prefix_mask=getattr(common, "mm_req_doc_ranges", None) is not None,
            )
            reason = why_step_dense(step)
            if reason is not None:
                logger.info_once("PBS: long prompts took the engine's own attention: %s.", reason)
                rows = []
        if self.pbs_counts and not is_draft:
            _count(starts, is_prefilling, rows)
        if not rows:
            return None
        return make_plan(starts, lengths, rows, prompt_lengths(max(rows) + 1))

    def update_block_table(self, metadata: Any, blk_table: Tensor, slot_mapping: Tensor) -> Any:
        """Metadata of the same batch for another group of layers, whose pages have other
        numbers."""
        update = super().update_block_table
        new = update(metadata, blk_table, slot_mapping)
        plan = metadata.pbs_plan
        if plan is not None and plan.rest:
            table, slots = take_rows(blk_table, plan.rest), take_tokens(slot_mapping, plan.rest)
            rest = update(plan.rest_metadata, table, slots)
            new.pbs_plan = dataclasses.replace(plan, rest_metadata=rest)
        return new


def _is_first_rank() -> bool:
    return get_tensor_model_parallel_rank() == 0 and get_pp_group().is_first_rank


def _count(starts: list[int], is_prefilling: list[bool], rows: list[int]) -> None:
    """Counts the prompt tokens of one step."""
    sizes = [end - start for start, end in itertools.pairwise(starts)]
    total = sum(size for size, is_prompt in zip(sizes, is_prefilling, strict=False) if is_prompt)
    taken = sum(sizes[row] for row in rows)
    count_tokens(taken, total - taken)


def _log_layers(
    reasons: dict[str, str | None], settings: Any, page_size: int, vllm_config: Any
) -> None:
    """Logs at the start which layers take PBS, and why the others do not."""
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
