"""Attention functions that benchmarks use inside transformers models and alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pbs_attn import PBSConfig
from pbs_attn._errors import BenchError


def register_attention(name: str, function: Callable) -> None:
    """Registers a function that layers with attn_implementation=name call. They get no mask."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)


def require_pbs_layers(model: torch.nn.Module, num_tokens: int, config: PBSConfig) -> None:
    """Raises BenchError unless every attention layer of the model can take PBS."""
    from pbs_attn import transformers as pbs_transformers

    pbs_transformers.register("pbs_attn", config=config, min_tokens=1)
    model.set_attn_implementation("pbs_attn")
    routes = pbs_transformers.explain(model, num_tokens)
    others = [route for route in routes if route.route != "pbs"]
    if others or not routes:
        reason = others[0].reason if others else "it has no attention layer that transformers knows"
        raise BenchError(f"every layer of the model must be able to take PBS: {reason}")


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """torch's SDPA, causal: q (B, Hq, N, D), k and v (B, Hkv, N, D) -> (B, Hq, N, D)."""
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=True
    )
