"""Which versions of vLLM this plugin knows. No vLLM is imported here."""

from __future__ import annotations

import re

FIRST, AFTER_LAST = (0, 26), (0, 28)  # what the plugin reads has been the same in these


def check_version(version: str) -> None:
    """Raises RuntimeError, by name, for a version of vLLM that the plugin does not know.

    Not ImportError, which vLLM catches while it looks for a backend, and reports without its text.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and FIRST <= (int(found[1]), int(found[2])) < AFTER_LAST:
        return
    first, after_last = (".".join(map(str, bound)) for bound in (FIRST, AFTER_LAST))
    raise RuntimeError(
        f"pbs_attn.integrations.vllm needs vLLM >= {first}, < {after_last}, got {version}"
    )
