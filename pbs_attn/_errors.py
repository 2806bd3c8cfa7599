"""Mistakes of the user, which the command line reports in one line. Nothing here needs torch."""

import importlib.util


class DemoError(Exception):
    """A mistake that the user can correct, reported in one line."""


class BenchError(Exception):
    """A mistake in the use of a bench, reported in one line."""


class MissingPackageError(DemoError, ImportError):
    """A package of an extra is not installed. The message names the extra."""


def extra_command(extra: str) -> str:
    """The command that installs an extra of pbs-attn."""
    return f"pip install 'pbs-attn[{extra}]'"


def require(module: str, extra: str = "demo") -> None:
    """Raises MissingPackageError if `module`, which an extra of pbs-attn contains, is missing."""
    if importlib.util.find_spec(module) is None:
        how = extra_command(extra)
        raise MissingPackageError(f"the {extra} needs {module}, which is not installed: {how}")
