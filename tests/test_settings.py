"""The settings are written out in the schemas of the operators, in PBSConfig and in the reference.
The command line and the documents describe them to the user, and all other code derives them. These
tests compare each of these places with the schemas: if a new setting is missing in a place, a test
names it."""

import argparse
import dataclasses
import inspect
import itertools
import re
from pathlib import Path

import pytest
import reference as ref
import torch
from cases import Case, arguments_of, operator_calls
from hypothesis import given, settings
from test_properties import cases
from test_stages_gpu import random_case

import pbs_attn
from pbs_attn import PBSConfig
from pbs_attn._arguments import PRESETS, add_config
from pbs_attn._library import gpu_capabilities
from pbs_attn.config import CHOICES, RESOLVED, THRESHOLDS
from pbs_attn.ops import HEAD_DIMS, OPERATORS, STAGES

ROOT = Path(__file__).resolve().parent.parent
# Arguments of a call that are not settings, with their defaults.
CALL = {"is_causal": True, "scale": None}
SETTINGS = [name for name in arguments_of("attention", True) if name not in CALL]
FIELDS = {field.name: field for field in dataclasses.fields(PBSConfig)}


def qkv(num_tokens=300):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, num_tokens, 64, generator=generator)
    k, v = torch.randn(2, 1, 2, num_tokens, 64, generator=generator)
    return q, k, v


def test_the_config_has_the_settings_of_the_whole_operator():
    assert sorted(FIELDS) == sorted(SETTINGS)


@pytest.mark.parametrize("op", STAGES)
def test_stages_take_settings_of_the_whole_operator(op):
    assert set(arguments_of(op, True)) <= {*SETTINGS, *CALL}


def defaults_of(op):
    """The defaults of all keyword arguments. An argument without a default is left out."""
    arguments = getattr(torch.ops.pbs, op).default._schema.arguments
    return {a.name: a.default_value for a in arguments if a.kwarg_only and a.has_default_value()}


def call_of(op):
    return {name: value for name, value in CALL.items() if name in arguments_of(op, True)}


def test_defaults_of_the_whole_operator_are_those_of_the_config():
    assert defaults_of("attention") == PBSConfig().op_kwargs() | CALL


@pytest.mark.parametrize("op", STAGES)
def test_defaults_of_the_stages_are_the_papers(op):
    paper = dataclasses.replace(PBSConfig.paper(), permute_per="kv_head")
    assert defaults_of(op) == paper.op_kwargs(op) | call_of(op)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("op", OPERATORS)
def test_operators_take_what_the_config_gives_them(op, preset):
    """The config gives all arguments except those of a call, including None for fields that are
    None."""
    config = dataclasses.replace(PRESETS[preset], threshold=None, kv_block_size=None)
    tensors, kwargs = operator_calls(*qkv(), config)[op]
    assert set(kwargs) == set(arguments_of(op, True)) - CALL.keys()
    for name, value in kwargs.items():
        assert value in (getattr(config, name), getattr(config, RESOLVED.get(name, name)))
    getattr(torch.ops.pbs, op)(**tensors, **kwargs)


@pytest.mark.parametrize("preset", PRESETS)
def test_stages_with_their_settings_are_the_whole(preset):
    q, k, v = qkv(1100)
    config = PRESETS[preset]
    tensors, kwargs = operator_calls(q, k, v, config)["attend"]
    out, _ = torch.ops.pbs.attend(**tensors, **kwargs)
    assert torch.equal(out, pbs_attn.attention(q, k, v, config=config))


def test_of_an_operator_that_there_is_not():
    with pytest.raises(ValueError, match=r"op must be one of \('score_keys', .*got 'attention '"):
        PBSConfig().op_kwargs("attention ")


def refusal(**kwargs):
    """The error of the operator for these values; None if it accepts them."""
    q = torch.zeros(1, 2, 64, 64)  # two query heads per KV head, so that an order for each differs
    # from a shared one
    try:
        torch.ops.pbs.attention(q, q[:, :1], q[:, :1], **kwargs)
    except RuntimeError as error:
        return str(error).splitlines()[0]


@pytest.mark.parametrize("name", CHOICES)
def test_the_library_names_the_words_of_the_config(name):
    words = re.findall(r'"([^"]*)"', refusal(**{name: "?"}))
    assert sorted(words) == sorted([*CHOICES[name], "?"])


def test_the_library_takes_the_words_that_the_config_takes():
    words = [
        [variant for word in choices for variant in (word, word.upper(), word + " ", word[:-1])]
        for choices in CHOICES.values()
    ]
    num_taken = 0
    for combination in itertools.product(*(["", *variants] for variants in words)):
        kwargs = dict(zip(CHOICES, combination, strict=True))
        try:
            PBSConfig(**kwargs)
            is_taken = True
        except ValueError:
            is_taken = False
        assert (refusal(**kwargs) is None) == is_taken, kwargs
        num_taken += is_taken
    assert num_taken > len(THRESHOLDS)


def test_every_mass_has_a_threshold():
    assert sorted(THRESHOLDS) == sorted(CHOICES["mass"])


@pytest.mark.parametrize("mass", CHOICES["mass"])
def test_thresholds_have_a_default_by_mass(mass):
    """The operator has the same defaults as the config, and they make a difference."""
    q = torch.randn(1, 1, 8000, 64, generator=torch.manual_seed(0)) / 2
    score = "sampled" if mass == "block" else "mean"
    config = PBSConfig(score=score, mass=mass)
    assert config.threshold is None
    assert config.resolved_threshold == THRESHOLDS[mass]

    def out(threshold):
        return torch.ops.pbs.attention(q, q, q, score=score, mass=mass, threshold=threshold)

    assert torch.equal(out(None), out(THRESHOLDS[mass]))
    for factor in (0.95, 1.05):
        assert not torch.equal(out(None), out(factor * THRESHOLDS[mass]))


# The tests


def test_cases_have_the_settings():
    assert set(arguments_of("attention", True)) <= set(Case._fields)


@pytest.mark.parametrize("op", OPERATORS)
def test_the_reference_takes_the_keyword_arguments(op):
    parameters = inspect.signature(getattr(ref, op)).parameters.values()
    keywords = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert sorted(keywords) == sorted(arguments_of(op, True))


def assert_all_vary(drawn):
    for name in SETTINGS:
        values = {getattr(case, name) for case in drawn}
        assert len(values) > 1, f"{name} is always {values}"
        assert values >= set(CHOICES.get(name, ())), f"{name} is never another than {values}"


def test_random_cases_vary_every_setting():
    assert_all_vary([random_case(seed) for seed in range(100)])


def test_drawn_cases_vary_every_setting():
    drawn = []

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(case=cases())
    def draw(case):
        drawn.append(case)

    draw()
    assert_all_vary(drawn)


# Documents for the user


@pytest.mark.parametrize("is_swept", [False, True])
def test_the_command_line_has_an_option_for_every_field(is_swept):
    parser = argparse.ArgumentParser()
    add_config(parser, is_swept=is_swept)
    options = {action.dest: action for action in parser._actions}
    swept = {"threshold"} if is_swept else set()
    assert options.keys() - {"help", "settings"} == FIELDS.keys() - swept
    for name, choices in CHOICES.items():
        assert tuple(options[name].choices) == choices


def test_the_table_of_arguments_has_all_of_them():
    text = (ROOT / "docs" / "ops.md").read_text()
    table = text[text.index("| argument | meaning |") :].split("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE))
    assert sorted(rows) == sorted({name for op in OPERATORS for name in arguments_of(op, True)})
    for name, choices in CHOICES.items():
        missing = [word for word in choices if f'"{word}"' not in rows[name]]
        assert not missing, f"the row of {name} lacks {missing}"
    for mass, threshold in THRESHOLDS.items():
        assert re.search(rf'{threshold} with `(mass=)?"{mass}"`', rows["threshold"]), mass


def test_the_docstring_has_all_fields():
    text = " ".join(PBSConfig.__doc__.split("Attributes:")[1].split())
    for name in FIELDS:
        assert f" {name}: " in f" {text}", name
    for word in itertools.chain(*CHOICES.values()):
        assert f'"{word}"``' in text, word
    for mass, threshold in THRESHOLDS.items():
        assert re.search(rf'{threshold} with ``(mass=)?"{mass}"``', text), mass


@pytest.mark.parametrize("op", OPERATORS)
def test_the_reference_has_every_signature(op):
    text = (ROOT / "docs" / "ops.md").read_text()
    (said,) = re.findall(rf"^{op}\((.*?)\) ->", text, re.MULTILINE | re.DOTALL)
    names = [part.split("=")[0].split()[-1] for part in said.split(",") if part.strip()]
    assert names == [*arguments_of(op, False), "*", *arguments_of(op, True)]


def test_documents_have_all_gpus():
    said = f"compute capability {gpu_capabilities()}"
    assert said in (ROOT / "README.md").read_text()
    assert f"the GPU is not of {said}" in (ROOT / "docs" / "troubleshooting.md").read_text()


def test_documents_have_all_head_dims():
    head_dims = f"{', '.join(map(str, HEAD_DIMS[:-1]))} or {HEAD_DIMS[-1]}"
    assert f"head_dim {head_dims}" in pbs_attn.attention.__doc__
    assert f"head_dim {head_dims}" in (ROOT / "README.md").read_text()
    page = " ".join((ROOT / "docs" / "ops.md").read_text().split())
    assert f"head dim ({head_dims})" in page
