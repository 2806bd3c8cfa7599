"""Attention functions of benchmarks, inside transformers models and alone."""

from __future__ import annotations

from collections.abc import Callable

import torch


def register_attention(name: str, function: Callable) -> None:
    """Layers of models with attn_implementation=name call it; no mask is made for them."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """torch's SDPA, causal: q (B, Hq, N, D), k and v (B, Hkv, N, D) -> (B, Hq, N, D)."""
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=True
    )
