"""Mistakes of the user's, which the command line tells in one line. Nothing here needs torch."""

import importlib.util


class DemoError(Exception):
    """Something the user can put right, told in one line."""


class BenchError(Exception):
    """A mistake of the user's, to be told in one line."""


class MissingPackageError(DemoError, ImportError):
    """A package of an extra is not installed; the message names the extra."""


def extra_command(extra: str) -> str:
    """Installs what an extra of pbs-attn holds."""
    return f"pip install 'pbs-attn[{extra}]'"


def require(module: str, extra: str = "demo") -> None:
    """Raises MissingPackageError if `module`, which an extra of pbs-attn holds, is missing."""
    if importlib.util.find_spec(module) is None:
        how = extra_command(extra)
        raise MissingPackageError(f"the {extra} needs {module}, which is not installed: {how}")
