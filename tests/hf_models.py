"""Tiny random models of a few transformers families, and helpers to compare their outputs."""

import inspect

import pytest
import torch
import transformers
from transformers import masking_utils

import pbs_attn.transformers as integration
from pbs_attn import PBSConfig

EXACT = PBSConfig(block_size=64, segment_size=128, threshold=1.0)
SPARSE = PBSConfig(block_size=64, segment_size=128, threshold=0.1, window=0, dense_tail=0)
MIN_TOKENS = 128
NUM_TOKENS = 401  # several segments and an incomplete one
WINDOW = 96
VOCABULARY = 97

# The name by which older transformers pass the positions of the queries to a mask function.
HAS_CACHE_POSITION = "cache_position" in inspect.signature(masking_utils.sdpa_mask).parameters

# The name of the argument that takes the cache.
FORWARD = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
CACHE = "cache" if "cache" in FORWARD else "past_key_values"

ATOL = 1e-4  # tolerance of float32 logits around 3, for another order of summation


@pytest.fixture(autouse=True)
def registered():
    """Registers both names for each test of a file that imports it, and resets their counts."""
    integration.register("pbs_exact", config=EXACT, min_tokens=MIN_TOKENS)
    integration.register("pbs_sparse", config=SPARSE, min_tokens=MIN_TOKENS)


def base_config(**changes):
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.1,
        "attention_dropout": 0.0,
        **changes,
    }


MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}

# name -> (class prefix, config, attention that serves as reference, routes of the two layers)
FAMILIES = {
    "llama": ("Llama", {}, "sdpa", ["pbs", "pbs"]),
    "qwen2": ("Qwen2", {"head_dim": None, "hidden_size": 256}, "sdpa", ["pbs", "pbs"]),
    "qwen2_sliding": (
        "Qwen2",
        {"head_dim": None, "hidden_size": 256, "use_sliding_window": True, **MIXED},
        "sdpa",
        ["sdpa", "pbs"],
    ),
    "qwen3": ("Qwen3", {}, "sdpa", ["pbs", "pbs"]),
    "mistral": ("Mistral", {"sliding_window": None}, "sdpa", ["pbs", "pbs"]),
    "mistral_wide": ("Mistral", {"sliding_window": NUM_TOKENS}, "sdpa", ["pbs", "pbs"]),
    "mistral_sliding": ("Mistral", {"sliding_window": WINDOW}, "sdpa", ["sdpa", "sdpa"]),
    "phi3": ("Phi3", {"hidden_size": 256, "head_dim": None}, "sdpa", ["pbs", "pbs"]),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}, "sdpa", ["pbs", "pbs"]),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 64, **MIXED}, "eager", ["eager", "eager"]),
    "gemma3": ("Gemma3", {"query_pre_attn_scalar": 64, **MIXED}, "sdpa", ["sdpa", "pbs"]),
    "gpt_oss": ("GptOss", {**EXPERTS, **MIXED}, "eager", ["eager", "eager"]),
    "llama4": ("Llama4", {**EXPERTS, "intermediate_size_mlp": 128}, "sdpa", ["pbs", "pbs"]),
    "head_dim_80": ("Llama", {"head_dim": 80}, "sdpa", ["sdpa", "sdpa"]),
}


def build(family, implementation="pbs_exact", **changes):
    prefix, config, _, _ = FAMILIES[family]
    suffix = "TextConfig" if prefix in ("Gemma3", "Llama4") else "Config"
    config = base_config(**config, **changes)
    config = {name: value for name, value in config.items() if value is not None or "sl" in name}
    config = getattr(transformers, prefix + suffix)(**config)
    torch.manual_seed(0)
    model = getattr(transformers, prefix + "ForCausalLM")(config).eval()
    model.set_attn_implementation(implementation)
    return model


def tokens(batch=1, length=NUM_TOKENS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


@torch.no_grad()
def logits(model, input_ids, implementation=None, **kwargs):
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model(input_ids, **kwargs).logits


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=1e-4)
