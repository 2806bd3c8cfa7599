"""Arguments that several subcommands share."""

import argparse
import dataclasses

from ._errors import DemoError
from .config import CHOICES, THRESHOLDS, PBSConfig

PRESETS = {
    "default": PBSConfig(),
    "fast": PBSConfig.fast(),
    "accurate": PBSConfig.accurate(),
    "paper": PBSConfig.paper(),
}
FIELDS = tuple(field.name for field in dataclasses.fields(PBSConfig))


def options_of(options_type, args, **others):
    """Makes `options_type` from the arguments of the same names. Lists become tuples."""
    names = {field.name for field in dataclasses.fields(options_type)} - others.keys()
    values = {name: getattr(args, name) for name in names}
    values = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    return options_type(**values, **others)


def add_config(group, is_swept=False):
    """Adds an option for each field of PBSConfig, for `read_config`. In a sweep over settings, the
    sweep has options for presets and thresholds, and these options set the other fields."""
    if not is_swept:
        words = "the preset; the options below change single settings of it"
        add_choice(group, "--settings", tuple(PRESETS), "default", words)
        _add_threshold(group)

    def add(name, words, **options):
        values = _values(name, ("default",) if is_swept else tuple(PRESETS))
        option = "--" + name.replace("_", "-")
        words = f"{words} (default: {values})"
        group.add_argument(option, default=argparse.SUPPRESS, help=words, **options)

    add("block_size", "queries per block", metavar="N", type=int)
    add("kv_block_size", "keys per block", metavar="N", type=int)
    words = "keys are permuted inside segments of this length"
    add("segment_size", words, metavar="N", type=int)
    words = "which heads have their own order of keys"
    add("permute_per", words, choices=CHOICES["permute_per"])
    words = "number of keys that move to the front of their segment, or all to sort the segment"
    add("num_heavy", words, metavar="N", type=number_or_all)
    words = (
        "the attention mass that the threshold refers to; --score sampled takes only block, which "
        "compares each block by itself with the causal mass"
    )
    add("mass", words, choices=CHOICES["mass"])
    add("score", "how blocks are scored", choices=CHOICES["score"])
    words = "number of queries of a block that --score sampled takes"
    add("num_samples", words, metavar="N", type=int)
    words = "which heads select their own blocks; with kv_head, its query heads share the samples"
    add("select_per", words, choices=CHOICES["select_per"])
    words = "number of keys before a query block whose segments it always visits"
    add("window", words, metavar="N", type=int)
    words = "number of last queries whose blocks visit every key"
    add("dense_tail", words, metavar="N", type=int)


def _add_threshold(group):
    values = [f"{value} with --mass {mass}" for mass, value in THRESHOLDS.items()]
    values += [
        f"{config.threshold} with --settings {preset}"
        for preset, config in PRESETS.items()
        if config.threshold not in (None, THRESHOLDS[config.mass])
    ]
    words = (
        "share of the estimated attention mass: with --mass block, each visited block has it by "
        "itself, and a higher one visits less; with the others, all visited blocks have it "
        "together, and a higher one visits more; 1 visits everything"
    )
    group.add_argument(
        "--threshold",
        metavar="T",
        type=float,
        default=argparse.SUPPRESS,
        help=f"{words} (default: {', '.join(values)})",
    )


def _values(name, presets):
    """The default of a field, and the values of the presets that differ from it."""
    words = {"kv_block_size": "that of --block-size", "num_heavy": "all"}
    values = {preset: getattr(PRESETS[preset], name) for preset in presets}
    values = {preset: words[name] if x is None else x for preset, x in values.items()}
    default = values.pop("default")
    others = [f"{x} with --settings {preset}" for preset, x in values.items() if x != default]
    return ", ".join([str(default), *others])


def number_or_all(text):
    """A value of `num_heavy` in PBSConfig."""
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


def read_config(args, preset="default"):
    """A preset, changed by the options of `add_config` that were given.

    Raises:
        DemoError: if the options do not go together.
    """
    config = PRESETS[preset]
    given = {name: value for name, value in vars(args).items() if name in FIELDS}
    if given.get("mass", config.mass) != config.mass:
        # Thresholds of different masses do not mean the same: the new mass has its own default.
        given = {"threshold": None} | given
    try:
        return dataclasses.replace(config, **given)
    except ValueError as error:
        raise DemoError(str(error)) from error


def add_list(parser, name, metavar, default, words, type=None, nargs="+", **options):
    """Adds an option that takes a list. The type of its values is that of `default` unless given.
    The help names the default if there is one."""
    if default:
        type = type or default[0].__class__
        words = f"{words} (default: {' '.join(map(str, default))})"
    parser.add_argument(
        name, metavar=metavar, type=type, nargs=nargs, default=default, help=words, **options
    )
