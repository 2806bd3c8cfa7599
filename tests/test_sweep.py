"""Every decoder of the installed transformers, tiny and random: at threshold 1 the logits of PBS are
those of the model's own eager attention, and the op runs on the layers that explain() names.

The families of DEFAULT run always, the others with --slow."""

import functools

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="4.56")

import sweep_models  # noqa: E402
from transformers import DynamicCache, EncoderDecoderCache  # noqa: E402

import pbs_attn.transformers as integration  # noqa: E402
from pbs_attn import PBSConfig  # noqa: E402

EXACT = PBSConfig(block_size=64, segment_size=128, threshold=1.0)
SPARSE = PBSConfig(block_size=64, segment_size=128, threshold=0.5)
NUM_TOKENS = 301  # two segments and an incomplete one
CHUNKS = [170, 100, 30, 1]  # two that take the op, one shorter than a block, a decode step
PADDING = 77
ATOL = 2e-4  # in standard deviations of the logits, float32: another order of summation

DEFAULT = [
    *(
        f"{name}ForCausalLM"
        for name in (
            "Llama", "Qwen3", "Mistral", "Gemma2", "Gemma3", "Gemma4", "GptOss", "Llama4", "Mllama",
            "Phi3", "Cohere2", "Olmo2", "Glm4", "Granite", "Falcon", "Bart", "Doge", "MiniMax",
            "Moshi", "Qwen3Next", "DeepseekV3", "DeepseekV4", "Inkling", "GlmMoeDsa",
        )
    ),
    "PaliGemmaForConditionalGeneration",
]  # fmt: skip
FAMILIES = sweep_models.families()
SLOW = [name for name in FAMILIES if name not in DEFAULT]


@pytest.fixture(autouse=True)
def registered():
    integration.register("pbs_exact", config=EXACT, min_tokens=128)
    integration.register("pbs_sparse", config=SPARSE, min_tokens=128)


@pytest.fixture
def model(family):
    """The family's tiny model; absent and unbuildable ones skip with the reason."""
    if family not in FAMILIES:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    built = model_or_reason(family)
    if isinstance(built, str):
        pytest.skip(f"{family} is not built: {built}")
    return built


@functools.lru_cache(maxsize=1)
def model_or_reason(family):
    try:
        return sweep_models.build(family)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def tokens(batch=1):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, sweep_models.VOCABULARY, (batch, NUM_TOKENS), generator=generator)


def plain(run):
    return run(tokens())


def no_cache(run):
    return run(tokens(), use_cache=False)


def padded_left(run):
    return padded(run, slice(0, PADDING))


def padded_right(run):
    return padded(run, slice(NUM_TOKENS - PADDING, None))


def padded(run, hidden):
    input_ids = tokens(batch=2)
    mask = torch.ones_like(input_ids)
    input_ids[1, hidden] = 0
    mask[1, hidden] = 0
    return run(input_ids, attention_mask=mask)[mask.bool()]


def chunked(run):
    model = run.keywords["model"]
    cache = DynamicCache(config=model.config)
    if "encoder_hidden_states" in sweep_models.extra_inputs(model, 1):
        cache = EncoderDecoderCache(cache, DynamicCache())
    parts = tokens().split(CHUNKS, dim=1)
    return torch.cat([run(part, past_key_values=cache, use_cache=True) for part in parts], dim=1)


def packed(run):
    lengths = [130, NUM_TOKENS - 130]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    return run(tokens(), position_ids=position_ids, use_cache=False)


FORMS = [plain, no_cache, padded_left, padded_right, chunked, packed]


@torch.no_grad()
def logits(form, model, implementation):
    model.set_attn_implementation(implementation)
    torch.manual_seed(0)  # Reformer hashes at random
    return form(functools.partial(forward, model=model))


def forward(input_ids, *, model, **inputs):
    inputs |= sweep_models.extra_inputs(model, len(input_ids))
    return model(input_ids, **inputs).logits


def reference(form, model):
    """The logits of the model's own eager attention, or a skip where the model itself refuses."""
    try:
        expected = logits(form, model, "eager")
    except Exception as error:
        pytest.skip(f"eager refuses: {type(error).__name__}: {str(error)[:150]}")
    if not expected.isfinite().all():
        pytest.skip("eager gives logits that are not finite")
    return expected


def check(form, model, op_modules, record_property):
    expected = reference(form, model)
    ran_op, ran = op_modules(model)
    refusal = None
    try:
        actual = logits(form, model, "pbs_exact")
    except ValueError as error:
        if not str(error).startswith("attn_implementation must be "):
            raise
        refusal = str(error)
    record_property("pbs", refusal or f"{len(set(ran_op))} modules run the op")
    if form in (plain, no_cache):
        check_explanation(model, set(ran_op), set(ran), refusal)
    if refusal:
        return
    scale = expected.std()
    torch.testing.assert_close(actual / scale, expected / scale, atol=ATOL, rtol=0)
    if form is plain and ran_op:
        sparse = logits(form, model, "pbs_sparse")
        assert (sparse - actual).abs().max() > 20 * ATOL * scale, "attention must matter here"


def check_explanation(model, ran_op, ran, refusal):
    """What explain() says of the modules that ran; a tower for images does not on a text."""
    layers = [layer for layer in integration.explain(model, NUM_TOKENS) if layer.name in ran]
    if refusal:
        unsupported = [
            layer for layer in integration.explain(model) if layer.route == "unsupported"
        ]
        assert unsupported, f"explain() does not tell that the model refuses: {refusal}"
        return
    assert not [layer for layer in layers if layer.route == "unsupported"], "but the model ran"
    assert {layer.name for layer in layers if layer.route == "pbs"} == ran_op


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("family", DEFAULT)
def test_default_families(family, form, model, op_modules, record_property):
    check(form, model, op_modules, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("family", SLOW)
def test_all_other_families(family, form, model, op_modules, record_property):
    check(form, model, op_modules, record_property)
