"""The versions of vLLM that this plugin knows. This file does not import vLLM."""

from __future__ import annotations

import re

FIRST, AFTER_LAST = (0, 26), (0, 28)  # the data that the plugin reads is the same in these versions


def check_version(version: str) -> None:
    """Raises RuntimeError for a version of vLLM that the plugin does not know, and names the
    version.

    It is not an ImportError, because vLLM catches those while it looks for a backend, and hides the
    text.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and FIRST <= (int(found[1]), int(found[2])) < AFTER_LAST:
        return
    first, after_last = (".".join(map(str, bound)) for bound in (FIRST, AFTER_LAST))
    raise RuntimeError(
        f"pbs_attn.integrations.vllm needs vLLM >= {first}, < {after_last}, got {version}"
    )
