"""Pictures of the rows of `pbs-attn bench`: drawn from rows and from CSVs, refused when mixed."""

import importlib.util
from pathlib import Path

import pytest

from pbs_attn import _rows, cli, plot
from pbs_attn._errors import BenchError

image = pytest.importorskip("matplotlib.image")

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
DRAWN = {
    "speedup": "prefill_h100.csv",
    "quality": "quality_smollm2_h200.csv",
    "heads": "heads_qwen_32768_h200.csv",
    "stages": "pipeline_h200.csv",
    "rates": "kernel_h200.csv",
}


@pytest.mark.parametrize("kind", DRAWN)
def test_committed_results_are_drawn(kind, tmp_path):
    """From the file and from its rows the same picture, with something in it."""
    path, by_command = tmp_path / "rows.png", tmp_path / "file.png"
    rows = _rows.read_rows(RESULTS / DRAWN[kind])
    getattr(plot, f"draw_{kind}")(rows, path, title="title")
    source = str(RESULTS / DRAWN[kind])
    assert cli.main(["plot", kind, source, str(by_command), "--title", "title"]) == 0
    pixels = image.imread(path)
    assert (pixels == image.imread(by_command)).all()
    is_drawn = (pixels[..., :3] < 0.9).any(-1)
    assert is_drawn.mean() > 0.01
    for half in (is_drawn[: len(pixels) // 2], is_drawn[len(pixels) // 2 :]):
        assert half.any()


@pytest.mark.parametrize("kind", [*DRAWN, "attention"])
def test_without_matplotlib_the_extra_is_named(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    source = RESULTS / DRAWN[kind] if kind in DRAWN else None
    with pytest.raises(ImportError, match=r"needs matplotlib.*'pbs-attn\[plot\]'"):
        getattr(plot, f"draw_{kind}")(source, tmp_path / "x.png", title="")


@pytest.mark.parametrize("kind", cli.PICTURES)
def test_rows_of_two_processes_are_not_drawn(kind, tmp_path):
    rows = [{"run": "a"}, {"run": "b"}]
    with pytest.raises(BenchError, match="must come from one process, got 2"):
        getattr(plot, f"draw_{kind}")(rows, tmp_path / "x.png", title="")
    with pytest.raises(BenchError, match="rows to compare must not be empty, got none"):
        getattr(plot, f"draw_{kind}")([], tmp_path / "x.png", title="")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_told_in_one_line(tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text("run,lists\na,random\n")
    for arguments, words in (
        (["stages", str(other), "x.png"], f"CSV must be of bench pipeline, got {other}: "),
        (["rates", "/no/file.csv", "x.png"], "rows must be in a readable file, got /no"),
        (["rates", str(other), "/no/folder/x.png"], "the folder of /no/folder/x.png must exist"),
    ):
        assert cli.main(["plot", *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"pbs-attn plot: {words}")
