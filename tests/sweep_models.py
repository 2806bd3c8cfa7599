"""A tiny random model of every decoder of the installed transformers, built from the defaults of
its configuration class alone."""

import inspect
import re

import torch

VOCABULARY = 97
WINDOW = 96
HEAD_DIM = 64
MAX_PARAMETERS = 70_000_000

# Value in a tiny model -> the attributes of configurations that get it. Attributes that a
# configuration does not have are left out.
SIZES = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (
        4 * HEAD_DIM,
        "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim embedding_size",
    ),
    (
        128,
        "intermediate_size intermediate_size_mlp ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner "
        "dim_feedforward dense_intermediate_size ffn_hidden_size",
    ),
    (
        32,
        "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
        "shared_intermediate_size moe_shared_expert_intermediate_size expert_hidden_size "
        "moe_latent_size hidden_size_per_layer_input per_layer_input_dim",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
        "encoder_attention_heads swa_num_attention_heads",
    ),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads"),
    (HEAD_DIM, "head_dim attention_head_dim global_head_dim kv_channels swa_head_dim rel_extent"),
    (HEAD_DIM, "v_head_dim qk_head_dim index_head_dim query_pre_attn_scalar"),
    (32, "q_lora_rank kv_lora_rank o_lora_rank qk_nope_head_dim qk_rope_head_dim"),
    (32, "index_n_heads index_topk linear_key_head_dim linear_value_head_dim"),
    (
        1024,
        "max_position_embeddings n_positions n_ctx max_target_positions max_source_positions "
        "max_sequence_length max_seq_len",
    ),
    (WINDOW, "sliding_window sliding_window_size attention_chunk_size"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk top_k_experts moe_k"),
    (1, "n_group topk_group num_expert_group n_shared_experts num_shared_experts"),
    (1, "n_groups mamba_n_groups mamba_ngroups"),
    (4, "mamba_n_heads mamba_num_heads linear_num_value_heads"),
    (2, "linear_num_key_heads n_mamba_heads"),
    (128, "mamba_d_head mamba_head_dim"),
    (16, "mamba_d_state ssm_state_size state_size"),
    (512, "mamba_d_ssm"),
    (0.1, "initializer_range"),
    (
        0.0,
        "attention_dropout hidden_dropout dropout attn_pdrop resid_pdrop embd_pdrop "
        "attention_probs_dropout_prob hidden_dropout_prob activation_dropout layerdrop "
        "decoder_layerdrop",
    ),
    (0, "pad_token_id"),
    (1, "bos_token_id"),
    (2, "eos_token_id"),
    (True, "is_decoder add_cross_attention"),
    (False, "use_mamba_kernels"),
)
TINY = {name: value for value, names in SIZES for name in names.split()}

# Attributes that get their value from TINY even where the default is None.
MAY_BE_NONE = {
    "head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts",
    "n_shared_experts", "n_group", "topk_group",
}  # fmt: skip

# Changes to the defaults of a configuration, by family.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SECTIONS = ROPE | {"mrope_section": [8, 12, 12]}
HALF_SECTIONS = SECTIONS | {"mrope_section": [4, 6, 6], "partial_rotary_factor": 0.5}
SHARED_KV = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
COMPASS = {"rope_parameters": {"full_attention": SECTIONS}}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
CHANGES = {
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "CohereCompassForCausalLM": COMPASS,
    "CohereCompassForConditionalGeneration": {"text_config": COMPASS},
    "DoryForCausalLM": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
    },
    "GPTNeoForCausalLM": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "GPTBigCodeForCausalLM": {"add_cross_attention": False},
    "Gemma3nForCausalLM": SHARED_KV
    | {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "intermediate_size": 128},
    "Gemma4ForCausalLM": SHARED_KV,
    "Glm4vMoeForConditionalGeneration": {"text_config": {"rope_parameters": HALF_SECTIONS}},
    "Glm5NextForConditionalGeneration": {"text_config": {"qk_rope_head_dim": 0}},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"]},
    "HYV4VLForConditionalGeneration": {
        "text_config": {"rope_parameters": SECTIONS | {"mrope_section": [4, 6, 6]}}
    },
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "MegatronBertForCausalLM": {"add_cross_attention": False},
    "Mistral4ForCausalLM": {"head_dim": HEAD_DIM},
    "MiniMaxForCausalLM": {"sliding_window": WINDOW},
    "Mamba2ForCausalLM": {"head_dim": 128},
    "MllamaForCausalLM": {"text_config": {"cross_attention_layers": [1], "rope_parameters": ROPE}},
    "MllamaForConditionalGeneration": {"text_config": {"rope_parameters": ROPE}},
    "MusicgenForCausalLM": {"decoder": {"num_codebooks": 1}},
    "MusicgenMelodyForCausalLM": {"decoder": {"num_codebooks": 1}},
    "PaddleOCRVLForConditionalGeneration": {"text_config": {"rope_parameters": SECTIONS}},
    "Qwen2VLForConditionalGeneration": {"text_config": {"rope_parameters": SECTIONS}},
    "Qwen2_5OmniThinkerForConditionalGeneration": {"text_config": {"rope_parameters": SECTIONS}},
    "Qwen2_5_VLForConditionalGeneration": {"text_config": {"rope_parameters": SECTIONS}},
    "Qwen3VLForConditionalGeneration": {"text_config": {"rope_parameters": SECTIONS}},
    "Qwen3VLMoeForConditionalGeneration": {"text_config": {"rope_parameters": SECTIONS}},
    "Glm4vForConditionalGeneration": {"text_config": {"rope_parameters": HALF_SECTIONS}},
    "Qwen4ExpForCausalLM": {"text_config": INDEXER},
    "Qwen4ExpForConditionalGeneration": {"text_config": INDEXER},
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
    "UnlimitedOcrForConditionalGeneration": {"text_config": {"num_key_value_heads": 4}},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZambaForCausalLM": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
    },
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}

# Why a family is not built. Most need more than a text, or have parts whose sizes depend on each
# other in ways that the defaults do not show.
NOT_BUILT = {
    "its forward needs an image, a layout or another input": """
        Blip2ForConditionalGeneration BlipForConditionalGeneration
        ChameleonForConditionalGeneration Emu3ForConditionalGeneration
        Gemma4UnifiedAssistantForCausalLM Granite4VisionForConditionalGeneration
        HunYuanVLForConditionalGeneration IdeficsForVisionText2Text
        InstructBlipForConditionalGeneration InstructBlipVideoForConditionalGeneration
        Kosmos2ForConditionalGeneration Llama4ForConditionalGeneration
        PI0ForConditionalGeneration PPFormulaNetForConditionalGeneration
        Pix2StructForConditionalGeneration T5Gemma2ForConditionalGeneration
        UdopForConditionalGeneration
    """,
    "its parts must fit each other": """
        Apertus1p5ForConditionalGeneration DbrxForCausalLM
        DeepseekOcr2ForConditionalGeneration DiffusionGemmaForBlockDiffusion
        Dots3NoteForCausalLM Dots3NoteForConditionalGeneration
        Ernie4_5_VLMoeForConditionalGeneration EvollaForProteinText2Text
        Gemma4AssistantForCausalLM Glm4vForConditionalGeneration
        GraniteDoclingForConditionalGeneration Inkling2ForConditionalGeneration
        Inkling2LoopForConditionalGeneration Molmo2ForConditionalGeneration
        MuseSparkForConditionalGeneration MusicgenForCausalLM MusicgenMelodyForCausalLM
        NemotronH_Omni_Reasoning_V3 Phi4MultimodalForCausalLM
        Step3p7ForConditionalGeneration TransfoXLLMHeadModel VisionEncoderDecoderModel
    """,
    "it stays too large": """
        BltForCausalLM Florence2ForConditionalGeneration JanusForConditionalGeneration
        XLMWithLMHeadModel
    """,
    "another package is missing": """
        FastVlmForConditionalGeneration Gemma3nForConditionalGeneration
        InklingForConditionalGeneration PerceptionLMForConditionalGeneration
        QDQBertLMHeadModel
    """,
    "transformers 4 cannot build or run it": """
        ApertusForCausalLM MegaForCausalLM Speech2Text2ForCausalLM xLSTMForCausalLM
    """,
}


def not_built():
    """Names of all in NOT_BUILT."""
    return {name for names in NOT_BUILT.values() for name in names.split()}


def families():
    """Name of each class with a language-model head -> the model type that it is built from."""
    from transformers.models.auto import modeling_auto

    pairs = [
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items(),
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items(),
    ]
    # Several model types may name one class. The type with the name of the class represents it.
    pairs.sort(key=lambda pair: not pair[1].lower().startswith(re.sub("[-_]", "", pair[0])))
    types = {}
    for model_type, class_name in pairs:
        types.setdefault(class_name, model_type)
    return dict(sorted(types.items()))


def build(family):
    """The tiny model, in eval mode and float32, with weights that make attention uneven. Raises any
    error of the configuration, of the model, or of a forward on a short text."""
    import transformers

    config_class = transformers.CONFIG_MAPPING[families()[family]]
    config = tiny_config(config_class, CHANGES.get(family, {}))
    model_class = getattr(transformers, family)
    if not isinstance(config, model_class.config_class):  # the text part of a larger model
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"the model has {size} parameters")
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        spread(parameter, generator)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(torch.ones(1, 8, dtype=torch.long), **extra_inputs(model, 1)).logits.std()
    return model


@torch.no_grad()
def spread(parameter, generator):
    """Random values in place of the constants or very small numbers of an initialization."""
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim >= 2:
        parameter.copy_(noise * min(0.2, 1.5 * parameter.shape[-1] ** -0.5))
    else:
        parameter.add_(0.1 * noise)


LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_decoder_layers", "num_encoder_layers", "depth", "num_blocks",
)  # fmt: skip
LAYER_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types")


def tiny_layers(known):
    """The numbers of layers, and the per-layer lists of a configuration, reduced to one layer of
    every kind, and at least two layers."""
    counts = [known[name] for name in LAYER_COUNTS if isinstance(known.get(name), int)]
    num_layers = counts[0] if counts else 0
    per_layer = {
        name: values
        for name, values in known.items()
        if isinstance(values, list) and len(values) == num_layers > 2
    }
    kept = set()
    for name in LAYER_KINDS:
        values = per_layer.get(name, [])
        kept |= {values.index(value) for value in values}
    rest = [index for index in range(num_layers) if index not in kept]
    kept = sorted([*kept, *rest[: max(0, 2 - len(kept))]])
    cut = {name: [values[index] for index in kept] for name, values in per_layer.items()}
    return cut | {name: len(kept) for name in LAYER_COUNTS if isinstance(known.get(name), int)}


def tiny_config(config_class, changes):
    """`config_class` with the sizes of TINY, the changes, and the fewest layers that show every
    kind."""
    default = config_class()
    known = default.to_dict()
    values = {
        name: int(value) if type(known[name]) is int else value
        for name, value in TINY.items()
        if isinstance(known.get(name), (int, float))
    }
    values |= {name: TINY[name] for name in MAY_BE_NONE if name in known}
    values |= tiny_layers(known)
    if "qk_rope_head_dim" in known:  # multi-head latent attention
        values |= {"head_dim": TINY["qk_rope_head_dim"]} if "head_dim" in known else {}
        values["num_key_value_heads"] = TINY["num_attention_heads"]
    if isinstance(known.get("rope_parameters"), dict):
        values["rope_parameters"] = tiny_rope(known["rope_parameters"])
    values |= changes
    if "rope_scaling" in known and "rope_parameters" in changes:  # the name in transformers 4
        values["rope_scaling"] = values.pop("rope_parameters")
    for name in getattr(config_class, "sub_configs", {}):
        sub = getattr(default, name, None)
        if hasattr(sub, "to_dict"):
            values[name] = tiny_config(type(sub), changes.get(name, {})).to_dict()
    return config_class(**values)


def tiny_rope(parameters):
    """The sections of a rotary embedding for HEAD_DIM. Everything else is unchanged."""
    if "mrope_section" not in parameters:
        return parameters
    pairs = int(HEAD_DIM * parameters.get("partial_rotary_factor", 1.0)) // 2
    side = pairs * 3 // 8
    return parameters | {"mrope_section": [pairs - 2 * side, side, side]}


def extra_inputs(model, batch):
    """States to cross-attend to, for the decoders that take them."""
    parameters = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(batch, 150, 4 * HEAD_DIM, generator=generator)
    if not getattr(model.config, "add_cross_attention", True):
        return {}
    names = ("cross_attention_states", "encoder_hidden_states")
    return {name: states for name in names if name in parameters}
