"""Architectures that stand for their models in benchmarks, with random weights."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes as the model's config.json has them."""

    model_type: str  # of transformers
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


SHAPES = {
    "llama-3.1-8b": Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256),
    "qwen3-8b": Shape("qwen3", 4096, 12288, 36, 32, 8, 128, 151936),
    "qwen2.5-1.5b": Shape("qwen2", 1536, 8960, 28, 12, 2, 128, 151936),
    "mha-32x128": Shape("llama", 4096, 11008, 32, 32, 32, 128, 32000),
}


def build(
    shape: Shape, *, max_tokens: int, device: torch.device | str, attn_implementation: str
) -> torch.nn.Module:
    """A causal language model of that shape in bfloat16, for prompts of up to max_tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        shape.model_type,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_q_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=max_tokens,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attn_implementation
        )
    return model.eval()
