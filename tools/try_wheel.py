"""Uses the installed pbs_attn as its user would: import, operators, an error, and the demo. Prints
a line with the versions; raises where something is wrong."""

import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import pbs_attn

DEMO = ["demo", "--tokens", "1024", "--continue", "0", "--device", "cpu"]


def try_operator():
    """With every block visited, PBS is dense attention."""
    torch.manual_seed(0)
    q = torch.randn(1, 4, 700, 64)
    k, v = torch.randn(2, 1, 2, 700, 64)
    got = pbs_attn.attention(q, k, v, config=pbs_attn.PBSConfig.paper(threshold=1.0))
    dense = torch.nn.functional.scaled_dot_product_attention
    want = dense(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-6)


def try_error():
    """An exception of the library arrives through torch's C functions, with its words."""
    q = torch.randn(1, 1, 300, 65)
    try:
        pbs_attn.attention(q, q, q)
    except RuntimeError as error:
        said = str(error)
    else:
        raise AssertionError("head_dim 65 must be refused")
    assert "q must have a head_dim of 64, 96" in said and said.rstrip().endswith("got 65"), said


def try_demo():
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "attention.png"
        command = [sys.executable, "-m", "pbs_attn", *DEMO, "--output", picture]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "perplexity, last 512 tokens" in result.stdout, result.stdout
        assert picture.stat().st_size > 0


def main():
    info = pbs_attn.build_info()
    try_operator()
    try_error()
    try_demo()
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, pbs_attn "
        f"{info['version']} ({info['cuda_status']}): import, operator, error and demo pass"
    )


if __name__ == "__main__":
    main()
