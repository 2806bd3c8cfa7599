"""Arguments that several subcommands share."""

import dataclasses

from pbs_attn import PBSConfig, demo
from pbs_attn.config import THRESHOLDS


def options_of(options_type, args, **others):
    """Fields of the same names, lists as tuples."""
    names = {field.name for field in dataclasses.fields(options_type)} - others.keys()
    values = {name: getattr(args, name) for name in names}
    values = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    return options_type(**values, **others)


def add_config(group, has_threshold=True):
    default = PBSConfig()
    if has_threshold:
        add_threshold(group)
    add_value(group, "--block-size", "N", default.block_size, "queries a block")
    add_value(group, "--kv-block-size", "N", default.kv_block_size, "keys a block")
    add_value(
        group,
        "--segment-size",
        "N",
        default.segment_size,
        "keys are permuted inside segments of this length",
    )
    add_choice(
        group,
        "--permute-per",
        ("kv_head", "query_head"),
        default.permute_per,
        "which heads have an order of their own",
    )
    words = "keys that move to the front of their segment, or all to sort them"
    group.add_argument(
        "--num-heavy",
        metavar="N",
        type=number_or_all,
        default=default.num_heavy,
        help=f"{words} (default: {default.num_heavy})",
    )
    add_choice(
        group,
        "--mass",
        ("earlier", "causal", "block"),
        default.mass,
        "what the threshold is a share of; block: of all causal mass, by each block itself",
    )
    add_choice(group, "--score", ("mean", "sampled"), default.score, "how blocks are scored")
    words = "queries of a block that --score sampled takes"
    add_value(group, "--num-samples", "N", default.num_samples, words)


def add_threshold(group, words=""):
    words += (
        "share of the estimated attention mass that each visited block, or their sum, must reach"
    )
    by_mass = ", ".join(f"{value} with --mass {mass}" for mass, value in THRESHOLDS.items())
    group.add_argument("--threshold", metavar="T", type=float, help=f"{words} (default: {by_mass})")


def number_or_all(text):
    """As PBSConfig has `num_heavy`."""
    return None if text == "all" else int(text)


def add_value(parser, name, metavar, default, words, **options):
    words = f"{words} (default: {default})"
    parser.add_argument(
        name, metavar=metavar, type=type(default), default=default, help=words, **options
    )


def add_choice(parser, name, choices, default, words):
    parser.add_argument(
        name, choices=choices, default=default, help=f"{words} (default: {default})"
    )


def read_config(args):
    try:
        return PBSConfig(
            block_size=args.block_size,
            kv_block_size=args.kv_block_size,
            segment_size=args.segment_size,
            threshold=getattr(args, "threshold", None),
            permute_per=args.permute_per,
            num_heavy=args.num_heavy,
            mass=args.mass,
            score=args.score,
            num_samples=args.num_samples,
        )
    except ValueError as error:
        raise demo.DemoError(str(error)) from error


def add_list(parser, name, metavar, default, words, type=None, nargs="+", **options):
    """Of values of a type, that of `default` unless given; says the default where there is one."""
    if default:
        type = type or default[0].__class__
        words = f"{words} (default: {' '.join(map(str, default))})"
    parser.add_argument(
        name, metavar=metavar, type=type, nargs=nargs, default=default, help=words, **options
    )
