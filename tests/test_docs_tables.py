"""The tables that measured_tables.py makes stand on their pages as it makes them."""

import statistics

import pytest
from doc_tables import assert_figures, read
from measured_tables import EXPERIMENTS, PROTOTYPES, TABLES, as_markdown, prototypes, write


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
    """By letter, the points above dense of each length and their mean."""
    found = {}
    for (letter, *_), rows in prototypes(run).items():
        groups = {}
        for row in rows:
            groups.setdefault(int(row["tokens"]), []).append(float(row["above_dense"]))
        points = [statistics.fmean(groups[tokens]) for tokens in sorted(groups)]
        found[letter] = [*points, statistics.fmean(points)]
    return found


def test_figures_of_prototypes():
    """Where they are below dense, the sentence says so and the figure has no sign."""
    three, five = points_of("a"), points_of("b")
    words = (
        "Without them (A), # points are lost; with them (B), # at the same threshold, still # of"
    )
    values = [-three["A"][-1], -three["B"][-1], -three["B"][2]]
    assert_figures(words, values, EXPERIMENTS)
    words = "the second run is # and # points above dense (K)"
    assert_figures(words, five["K"][:2], EXPERIMENTS)
    words = "0.005 (E) is # below dense at 32768 tokens, by two answers"
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
