"""Reads the facts that routes depend on from a VllmConfig. This file does not import vLLM."""

from __future__ import annotations

import os
from typing import Any

from .route import Engine, Settings
from .settings import read_settings

NAME = "CUSTOM"  # of --attention-backend


def is_selected(vllm_config: Any) -> bool:
    """Whether the server was started with our attention backend."""
    return getattr(vllm_config.attention_config.backend, "name", None) == NAME


def settings_of(vllm_config: Any) -> Settings:
    """The user's settings, from the server's command line and the environment."""
    return read_settings(vllm_config.additional_config, os.environ)


def describe_engine(vllm_config: Any) -> Engine:
    """The facts about a server."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    layers = vllm_config.compilation_config.static_forward_context.values()
    return Engine(
        context_parallel=parallel.decode_context_parallel_size
        * parallel.prefill_context_parallel_size,
        splits_batches=parallel.use_ubatching,
        has_rswa=model.rswa_window is not None,
        has_prefix_mask=model.is_mm_prefix_lm,
        is_batch_invariant=os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"),
        is_hybrid=model.is_hybrid,
        has_kv_connector=vllm_config.kv_transfer_config is not None,
        has_drafts=vllm_config.speculative_config is not None,
        shares_caches=any(
            getattr(layer, "kv_sharing_target_layer_name", None) is not None for layer in layers
        ),
    )


def reason_of(layer: Any) -> str | None:
    """The reason why a layer of vLLM is dense; None if it takes PBS."""
    impl = getattr(layer, "impl", None)
    reason: str | None = getattr(impl, "pbs_reason", "another backend computes their attention")
    return reason


def first_pbs_layer(vllm_config: Any) -> str | None:
    """The name of the first layer that takes PBS."""
    layers = vllm_config.compilation_config.static_forward_context
    return next((name for name, layer in layers.items() if reason_of(layer) is None), None)
