"""Which versions of vLLM this plugin knows. No vLLM is imported here."""

from __future__ import annotations

import re

FIRST, AFTER_LAST = (0, 26), (0, 28)  # what is read here has been the same in these


def why_unsupported(version: str) -> str | None:
    """Why the plugin refuses a version of vLLM; None if it knows it."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and FIRST <= (int(found[1]), int(found[2])) < AFTER_LAST:
        return None
    first, after_last = (".".join(map(str, bound)) for bound in (FIRST, AFTER_LAST))
    return f"pbs_attn.integrations.vllm needs vLLM >= {first}, < {after_last}, got {version}"


def check_version(version: str) -> None:
    """Raises ImportError, by name, for a version of vLLM that the plugin does not know."""
    reason = why_unsupported(version)
    if reason is not None:
        raise ImportError(reason)
