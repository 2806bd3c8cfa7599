"""Architectures of models, which benchmarks build with random weights. Their names are choices on
the command line, so this module does not import torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pbs_attn._errors import BenchError

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes as in the config.json of the model."""

    model_type: str  # the name that transformers has for it
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
    "smollm2-135m": Shape("llama", 576, 1536, 30, 9, 3, 64, 49152),
    "qwen2.5-1.5b": Shape("qwen2", 1536, 8960, 28, 12, 2, 128, 151936),
    "mha-32x128": Shape("llama", 4096, 11008, 32, 32, 32, 128, 32000),
}


def shape_of(model: torch.nn.Module) -> Shape:
    """The sizes of a causal language model of transformers."""
    config = model.config.get_text_config()
    num_q_heads = config.num_attention_heads
    return Shape(
        config.model_type,
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        num_q_heads,
        getattr(config, "num_key_value_heads", None) or num_q_heads,
        getattr(config, "head_dim", None) or config.hidden_size // num_q_heads,
        config.vocab_size,
    )


def check_preset(name: str, option: str = "--preset") -> None:
    """Raises BenchError if there is no preset of this name."""
    if name not in SHAPES:
        raise BenchError(f"{option} must be of {', '.join(SHAPES)}, got {name}")


def check_activations(paths: Sequence[str], shapes: Sequence[Shape]) -> None:
    """Raises BenchError unless each path is a safetensors file with q, k and v. Its number of KV
    heads must divide that of every shape."""
    from safetensors import SafetensorError, safe_open

    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                num_kv_heads = [file.get_slice(name).get_shape()[1] for name in "qkv"][1]
        except (OSError, SafetensorError) as error:
            raise BenchError(f"--activations must have q, k and v, got {path}: {error}") from error
        for shape in shapes:
            if shape.num_kv_heads % num_kv_heads:
                wanted, given = shape.num_kv_heads, num_kv_heads
                raise BenchError(f"--activations must divide {wanted} KV heads, got {given}")


def load_activations(path: str, shape: Shape, device: torch.device | str) -> list[torch.Tensor]:
    """Loads q, k and v from a file that passed `check_activations`, and repeats them to the KV
    heads of the shape."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    repeats = shape.num_kv_heads // tensors["k"].shape[1]
    return [tensors[name].to(device).repeat(1, repeats, 1, 1) for name in "qkv"]


def build(
    shape: Shape, *, max_tokens: int, device: torch.device | str, attn_implementation: str
) -> torch.nn.Module:
    """Builds a causal language model of the shape in bfloat16, for prompts of up to max_tokens."""
    import torch
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
