"""The pages have the tables that measured_tables.py generates."""

import statistics

import pytest
from doc_tables import BENCHMARKS, README, ROOT, assert_figures, find, read
from measured_tables import (
    CHOOSING,
    EXPERIMENTS,
    PROTOTYPES,
    SERVED,
    SERVING,
    TABLES,
    as_markdown,
    prototypes,
    write,
)
from preset_tables import (
    PIPELINE,
    QUALITY,
    TUNING,
    by_threshold,
    of_preset,
    ruler_scores,
    tuning_points,
)

from pbs_attn.bench.options import ServeOptions
from pbs_attn.bench.ruler_table import average
from pbs_attn.bench.serving import SETTING, gains_in_chunks, speedups
from pbs_attn.bench.serving_engine import FIRST_TOKEN, THROUGHPUT, targets_of

CHANGELOG = ROOT / "CHANGELOG.md"


@pytest.mark.parametrize(
    "path, table",
    [pytest.param(*entry, id=f"{entry[1].__name__}-{entry[0].name}") for entry in TABLES],
)
def test_page_has_the_table(path, table):
    names, lines = table()
    assert lines
    assert as_markdown(names, lines) in path.read_text()


def test_a_table_is_written_in_place_of_the_old_one(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n\n" + as_markdown(["a", "b"], [["0", "0"]]) + "\nbehind\n")
    write(page, ["a", "b"], [["1", "2"], ["3", "4"]])
    assert page.read_text() == "before\n\n| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n\nbehind\n"
    with pytest.raises(AssertionError, match="no table"):
        write(page, ["a", "c"], [])


def points_of(run):
    """The points above dense at each length and their mean, by letter."""
    found = {}
    for (letter, *_), rows in prototypes(run).items():
        groups = {}
        for row in rows:
            groups.setdefault(int(row["tokens"]), []).append(float(row["above_dense"]))
        points = [statistics.fmean(groups[tokens]) for tokens in sorted(groups)]
        found[letter] = [*points, statistics.fmean(points)]
    return found


def test_figures_of_prototypes():
    """If points are below dense, the sentence says so and the figure has no sign."""
    three, five = points_of("a"), points_of("b")
    words = "Without them (A), the score is # points below dense. With them (B), it is # points "
    words += "below at the same threshold, and # below at 32768 tokens"
    values = [-three["A"][-1], -three["B"][-1], -three["B"][2]]
    assert_figures(words, values, EXPERIMENTS)
    words = "the second run is # and # points above dense (K)"
    assert_figures(words, five["K"][:2], EXPERIMENTS)
    words = "At 0.005 (E), the same run is # points below dense at 32768 tokens"
    assert_figures(words, [-five["E"][1]], EXPERIMENTS)
    assert min(three["C"] + three["E"]) > 0


def test_dense_scores_of_prototypes():
    for run, words in (("a", "Dense scores #, # and #:"), ("b", "Dense scores # and #:")):
        groups = {}
        for row in read(PROTOTYPES):
            if (row["run"], row["selection"]) == (run, "dense"):
                groups.setdefault(int(row["tokens"]), []).append(float(row["score"]))
        values = [statistics.fmean(groups[tokens]) for tokens in sorted(groups)]
        assert_figures(words, values, EXPERIMENTS)


def scores_of(preset, **place):
    """Scores of the held-out prompts of some lengths, tasks, or both."""
    rows = [
        row
        for row in read("ruler_qwen_h200.csv")
        if all(row[name] in values for name, values in place.items())
    ]
    return ruler_scores(rows, preset).values()


def test_figures_of_ruler():
    length = average(list(scores_of("fast", tokens=["32768"])))
    for page in (CHOOSING, README):
        assert_figures("loses # points at 32768 tokens", [-length.above], page)
    assert length.above < -2 * length.error
    several = [
        average(list(scores_of("fast", text=[f"niah_multi{x}"]))) for x in ("value", "query")
    ]
    assert_figures(
        "values of one key, it loses at every length, # points on average",
        [-several[0].above],
        CHOOSING,
    )
    assert all(score.above < 0 for score in scores_of("fast", text=["niah_multivalue"]))
    values = [-score.above for score in several] + [-s.above / s.error for s in several]
    words = "`fast` loses # points on niah_multivalue and # on niah_multiquery, which are # and # "
    words += "standard errors"
    assert_figures(words, values, EXPERIMENTS)
    short = average(list(scores_of("balanced", tokens=["16384"])))
    assert_figures("`balanced` is # points above dense at 16384 tokens", [short.above], CHOOSING)
    for tokens in ("8192", "16384", "32768"):
        score = average(list(scores_of("balanced", tokens=[tokens])))
        assert score.above > -score.error
    papers = ruler_scores(read("ruler_paper_qwen_h100.csv"), "paper")
    papers = [
        -average([score for place, score in papers.items() if place[0] == tokens]).above
        for tokens in ("16384", "32768")
    ]
    assert_figures("loses # points at 16384 tokens and # at 32768", papers, CHOOSING)
    for preset in ("balanced", "fast"):
        scores = [average(list(scores_of(preset, tokens=[t]))) for t in ("8192", "16384", "32768")]
        cells = " | ".join(f"{score.above:+.1f} ± {score.error:.1f}" for score in scores)
        assert cells in CHANGELOG.read_text()
    tasks = {row["text"] for row in read("ruler_qwen_h200.csv")}
    scores = [average(list(scores_of("balanced", text=[task]))) for task in tasks]
    assert len(scores) == 7
    assert all(abs(score.above) <= 1.2 * score.error for score in scores)


def test_figures_of_texts():
    def value(model, preset, probe, column):
        rows = of_preset(read(QUALITY[model]), preset)
        return statistics.fmean(float(row[column]) for row in rows if row["probe"] == probe)

    loss = "loss_above_dense"
    small, *_ = [model for model in QUALITY if "SmolLM2" in model]
    large = [model for model in QUALITY if model != small]
    most = max(value(model, "balanced", "text", loss) for model in QUALITY)
    assert_figures("`balanced` loses at most # nats per token of text", [most], CHOOSING)
    fast, balanced = (value(small, preset, "text", "op_ms") for preset in ("fast", "balanced"))
    repeat = value(small, "fast", "copy", loss)
    words = "`fast` loses # nats per token on repeats and # on text, for # % less time"
    saved = 100 * (1 - fast / balanced)
    assert_figures(words, [repeat, value(small, "fast", "text", loss), saved], CHOOSING)
    values = [max(value(model, "fast", "text", loss) for model in large)]
    values.append(value("Qwen2.5-Coder-1.5B, 16384", "fast", "copy", loss))
    assert_figures("On Qwen, `fast` loses at most # on text, and # on repeats", values, CHOOSING)
    for preset in ("dense", "balanced"):
        assert value(small, preset, "pass key", "right") == 0.8


def test_figures_of_time():
    times = {
        (preset, row["tokens"]): float(row["attention_ms"])
        for preset, file in PIPELINE.items()
        for row in read(file)
    }
    words = "less time than `balanced` at 8192 tokens, # % at 32768 and # % at 1048576"
    saved = [
        100 * (1 - times["fast", tokens] / times["balanced", tokens])
        for tokens in ("8192", "32768", "1048576")
    ]
    assert_figures(f"`fast` takes # % {words}", saved, CHOOSING)
    words = "It takes # % less time than `balanced` at 32768 tokens"
    assert_figures(words, saved[1:2], EXPERIMENTS)
    row = find(read("pipeline_models_h100.csv"), preset="smollm2-135m")
    words = "one call takes # ms on an H100 at density #, FlashAttention-4 #"
    values = [float(row[name]) for name in ("attention_ms", "density", "fa4_dense_ms")]
    assert_figures(words, values, BENCHMARKS)
    rows = of_preset(read(QUALITY["SmolLM2-135M, 8192"]), "balanced")
    visited = [float(row["density"]) for row in rows if row["probe"] == "text"]
    assert_figures(
        "SmolLM2 has less than the # of its texts", [statistics.fmean(visited)], CHOOSING
    )
    words = "is faster than every dense kernel from # tokens on with the heads of Llama-3.1-8B, "
    words += "from # with those of Qwen2.5-1.5B, and from # with those of SmolLM2-135M"
    crossovers = [float(row["crossover"]) for row in read("pipeline_crossover_h100.csv")]
    assert_figures(words, crossovers, BENCHMARKS)


def test_figures_of_serving():
    """Figures in sentences, which are all for one GPU."""
    rows = read(SERVED[0])
    assert {(row["tp"], row["vllm"], row["inductor"]) for row in rows} == {("1", "0.26.0", "no")}
    assert all("H100" in row["device"] for row in rows)
    gains = {
        tuple(
            dict(zip(SETTING, place, strict=False))[name] for name in ("part", "what", "tokens")
        ): x
        for place, x in speedups(rows).items()
    }
    targets = targets_of(ServeOptions().densities)
    values = [gains["whole", FIRST_TOKEN, str(tokens)] for tokens in targets]
    assert values == sorted(values)
    words = "# times as early at 8192 tokens, # times at 16384, # times at 32768, # times at 65536 "
    words += "and # times at 131072"
    assert_figures(f"the first token comes {words}", values, SERVING)
    assert_figures("visits about #, #, #, # and # of the causal", targets.values(), SERVING)
    for row in rows:
        if row["what"] == FIRST_TOKEN and row["mode"] != "dense":
            # The highest threshold that is tried visits more than the density asked for.
            is_capped = float(row["threshold"]) == 0.2
            asked = targets[int(row["tokens"])]
            above = float(row["density"]) - asked
            assert abs(above) < 0.05 * asked or (is_capped and above > 0)
    shares = [100 * share for share in gains_in_chunks(rows).values()]
    assert len(shares) == 5
    words = "the gain in chunks of 8192 is # to # % of that in one piece"
    assert_figures(words, [min(shares), max(shares)], SERVING)
    tokens = 16 * (32768 + 128)
    gain = 100 * (gains["chunked", THROUGHPUT, str(tokens)] - 1)
    assert_figures("prompts are long compared with answers: here by # %", [gain], SERVING)
    visited = [
        float(row["density"])
        for row in of_preset(read("ruler_qwen_h200.csv"), "balanced")
        if row["tokens"] == "32768" and row["density"]
    ]
    words = "`balanced` visits # of the block pairs"
    assert_figures(words, [statistics.fmean(visited)], SERVING)


def test_figures_of_tuning():
    """Standard errors in parentheses come from prompts that no CSV has, except for the held-out
    ones."""
    rows = read("ruler_tuning_qwen_h200.csv")
    dense = [float(row["score"]) for row in rows if row["selection"] == "dense"]
    scores = [statistics.fmean(dense[first : first + 3]) for first in (0, 3, 6)]
    assert_figures("dense scores #, # and #. 32 samples", scores, EXPERIMENTS)
    groups = by_threshold(rows)

    def points(samples, length):
        group = [row for row in groups[samples, "0.01"] if row["tokens"] == length]
        return -tuning_points(rows, group)

    own, shared = "16 per query head", "16 per KV head"
    words = "lose # (± 7.8) points at 16384 tokens and # (± 9.6) at 32768"
    assert_figures(words, [points(own, "16384"), points(own, "32768")], EXPERIMENTS)
    words = "16 samples per KV head lose # (± 8.6) points at 32768 tokens"
    assert_figures(words, [points(shared, "32768")], EXPERIMENTS)
    tasks = {row["text"] for row in rows}
    held_out = average(list(scores_of("fast", tokens=["32768"], text=tasks)))
    words = "The same three tasks lose # (± #) in the"
    assert_figures(words, [-held_out.above, held_out.error], EXPERIMENTS)

    def repeat(model, *place):
        group = by_threshold(read(TUNING[model]))[place]
        return statistics.fmean(
            float(row["loss_above_dense"]) for row in group if row["probe"] == "copy"
        )

    large, small = TUNING
    for words, model, *places in (
        ("from 16 samples loses # nats on repeats", small, (shared, "0.01")),
        ("16 samples per query head lose #, at a lower density", small, (own, "0.01")),
        ("the shared selection still loses #.", small, (shared, "0.005")),
        ("32 samples per KV head** lose # at 0.01", small, ("32 per KV head", "0.01")),
        (
            "loses # on repeats with 16 samples, and # with 32",
            large,
            (shared, "0.01"),
            ("32 per KV head", "0.01"),
        ),
    ):
        assert_figures(words, [repeat(model, *place) for place in places], EXPERIMENTS)
