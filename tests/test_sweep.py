"""Every decoder of the installed transformers, tiny and random: at threshold 1 the logits of PBS
are those of the model's own eager attention, and the op runs on the layers that explain() names.

The families of DEFAULT always run, the others with `pytest --slow`."""

import contextlib
import functools

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="4.56")

import sweep_models  # noqa: E402

import pbs_attn.transformers as integration  # noqa: E402
from pbs_attn import PBSConfig  # noqa: E402

EXACT = PBSConfig(block_size=64, segment_size=128, threshold=1.0)
SPARSE = PBSConfig(block_size=64, segment_size=128, threshold=0.5, window=0, dense_tail=0)
NUM_TOKENS = 301  # two segments and an incomplete one
CHUNKS = [170, 100, 30, 1]  # two chunks that take the op, one shorter than a block, and a decode
# step
PADDING = 77
ATOL = 3e-4  # in standard deviations of the float32 logits, for another order of summation

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
    """The tiny model of the family. If it does not exist or cannot be built, the test is skipped
    with the reason."""
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


def plain(model):
    return forward(model, tokens()).logits


def no_cache(model):
    return forward(model, tokens(), use_cache=False).logits


def padded_left(model):
    return padded(model, slice(0, PADDING))


def padded_right(model):
    return padded(model, slice(NUM_TOKENS - PADDING, None))


def padded(model, hidden):
    input_ids = tokens(batch=2)
    mask = torch.ones_like(input_ids)
    input_ids[1, hidden] = 0
    mask[1, hidden] = 0
    return forward(model, input_ids, attention_mask=mask).logits[:, -NUM_TOKENS:][mask.bool()]


def chunked(model):
    """The cache is the one that the model makes: a DynamicCache, or the own class of a hybrid
    model."""
    cache, logits = None, []
    for part in tokens().split(CHUNKS, dim=1):
        outputs = forward(model, part, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


def packed(model):
    lengths = [130, NUM_TOKENS - 130]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    return forward(model, tokens(), position_ids=position_ids, use_cache=False).logits


FORMS = [plain, no_cache, padded_left, padded_right, chunked, packed]


def forward(model, input_ids, **inputs):
    return model(input_ids, **inputs, **sweep_models.extra_inputs(model, len(input_ids)))


@torch.no_grad()
def logits(form, model, implementation):
    model.set_attn_implementation(implementation)
    torch.manual_seed(0)  # Reformer hashes at random
    return form(model)


def reference(form, model):
    """The logits of the model's own eager attention. Skips if the model itself refuses this form of
    input. Every built model takes the plain form."""
    try:
        expected = logits(form, model, "eager")
    except Exception as error:
        if form is plain and type(model).__name__ not in sweep_models.not_built():
            raise
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
        assert (sparse - actual).abs().max() > 13 * ATOL * scale, "attention must matter here"


def check_explanation(model, ran_op, ran, refusal):
    """Compares explain() with the modules that ran. A tower for images does not run on a text."""
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


def test_enough_default_families_are_built():
    """The number of skipped families cannot grow unnoticed."""
    assert len(build_all(name for name in DEFAULT if name in FAMILIES)) >= 20


@pytest.mark.slow
def test_families_are_built_or_named():
    built = build_all(FAMILIES)
    assert set(FAMILIES) - set(built) <= sweep_models.not_built()
    assert len(built) >= (220 if len(FAMILIES) > 250 else 140)


def build_all(names):
    built = []
    for name in names:
        with contextlib.suppress(Exception):
            sweep_models.build(name)
            built.append(name)
    return built


def test_last_logits_of_layers_that_share_keys():
    """Gemma 4 drops the queries of all other tokens before the layers that reuse earlier keys."""
    if "Gemma4ForCausalLM" not in FAMILIES:
        pytest.skip(f"transformers {transformers.__version__} has no Gemma4ForCausalLM")
    model = sweep_models.build("Gemma4ForCausalLM")
    for kept in (1, 30, 100):
        expected = logits(functools.partial(last_logits, kept), model, "eager")
        actual = logits(functools.partial(last_logits, kept), model, "pbs_exact")
        assert actual.shape[1] == kept
        torch.testing.assert_close(actual, expected, atol=ATOL, rtol=1e-4)


def last_logits(kept, model):
    return forward(model, tokens(), logits_to_keep=kept).logits
