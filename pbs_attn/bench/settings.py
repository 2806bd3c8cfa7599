"""The named settings that a bench measures, and the density that its inputs have to reach."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

from pbs_attn._errors import BenchError
from pbs_attn.config import PBSConfig

from .options import DEFAULT, DENSITIES, PAPER_DENSITIES, PRESETS, SETTINGS

LEAST_DENSITY = 0.05  # extrapolation goes no lower, unless the last density of the table is lower


class HasSettings(Protocol):
    """Options of a bench. None stands for the order or the key blocks of the settings."""

    settings: str
    permute_per: tuple[str, ...] | None
    kv_block_sizes: tuple[int, ...] | None


def name_of(settings: str, choices: Sequence[str] = SETTINGS) -> str:
    """The name of the preset in the rows.

    Raises:
        BenchError: if the name is none of the choices.
    """
    if settings not in choices:
        raise BenchError(f"--settings must be of {', '.join(choices)}, got {settings}")
    return "balanced" if settings == DEFAULT else settings


def config_of(
    settings: str, permute_per: str | None = None, kv_block_size: int | None = None
) -> PBSConfig:
    """The preset, with another order or another width of key blocks if they are given.

    Raises:
        BenchError: if there is no such preset, or it does not allow an order for each query head.
    """
    config = PRESETS[name_of(settings)]
    permute_per = permute_per or config.permute_per
    if config.select_per == "kv_head" and permute_per != "kv_head":
        raise BenchError(
            f"--permute-per must be kv_head with --settings {settings}, got {permute_per}"
        )
    return dataclasses.replace(
        config, permute_per=permute_per, kv_block_size=kv_block_size or config.kv_block_size
    )


def configs_of(options: HasSettings) -> list[PBSConfig]:
    """One config for every order and width of key blocks that the options name.

    Raises:
        BenchError: as `config_of`.
    """
    return [
        config_of(options.settings, permute_per, kv_block_size)
        for permute_per in options.permute_per or (None,)
        for kv_block_size in options.kv_block_sizes or (None,)
    ]


def density_at(num_tokens: int, settings: str) -> float:
    """The default density of the settings at a length. Between the lengths of the table it is
    interpolated linearly in the logarithm of the length, outside it is extrapolated from the two
    nearest lengths. It is at most 1, and at least LEAST_DENSITY or the last density of the
    table."""
    table = PAPER_DENSITIES if name_of(settings) == "paper" else DENSITIES
    known = sorted(table)
    right = min(max(bisect.bisect_left(known, num_tokens), 1), len(known) - 1)
    low, high = known[right - 1], known[right]
    share = math.log2(num_tokens / low) / math.log2(high / low)
    density = table[low] + share * (table[high] - table[low])
    return min(max(density, min(LEAST_DENSITY, table[known[-1]])), 1.0)


def densities_of(
    settings: str, tokens: Sequence[int], densities: Sequence[float] | None
) -> tuple[float, ...]:
    """One density for each length: those given, or the defaults of the settings."""
    return tuple(densities or (density_at(num_tokens, settings) for num_tokens in tokens))
