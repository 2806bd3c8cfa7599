"""Where the command `pbs-attn` starts.

It stands beside the package, not in it: to import anything of pbs_attn runs its __init__, which
imports torch and registers the operators. Help, the version and a mistyped option need none of
that, and a command may be interrupted while it lasts.
"""

import importlib.util
import signal
import sys

MISTAKE, INTERRUPTED = 2, 128 + signal.SIGINT  # exit statuses


def main() -> int:
    """Runs the command line. Returns 0; 2 after a mistake of the user's, 130 after Ctrl-C, either
    told in one line."""
    status, message = 0, None
    interrupt = _Interrupt()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored
        signal.signal(signal.SIGINT, interrupt)
    try:
        message = _run()
        status = 0 if message is None else MISTAKE
    except BaseException:
        if not interrupt.has_come:
            raise
    if interrupt.has_come:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # another one would interrupt the exit
        status, message = INTERRUPTED, "interrupted"
    if message is not None:
        command = [word for word in sys.argv[1:2] if not word.startswith("-")]
        print(f"{' '.join(['pbs-attn', *command])}: {message}", file=sys.stderr)
    return status


class _Interrupt:
    """What happens on Ctrl-C. It is remembered, since imports turn the exception into others."""

    has_come = False

    def __call__(self, signum, frame):
        self.has_come = True
        raise KeyboardInterrupt


def _run():
    """The message of a mistake, None where there is none."""
    package = _postpone()
    from pbs_attn import cli

    args = cli.parse()
    if package is not None:
        try:
            package.__spec__.loader.exec_module(package)
        except ImportError as error:
            return str(error)
    return cli.run(args)


def _postpone():
    """pbs_attn as a package whose modules can be imported before its __init__ has run; None if that
    has run already (python -m pbs_attn)."""
    if "pbs_attn" in sys.modules:
        return None
    spec = importlib.util.find_spec("pbs_attn")
    package = importlib.util.module_from_spec(spec)
    sys.modules["pbs_attn"] = package
    return package
