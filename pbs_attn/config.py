"""The settings of permuted block-sparse attention."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

BLOCK_SIZES = (32, 64, 128)
THRESHOLDS = {"earlier": 0.9, "causal": 0.95, "block": 0.005}  # by mass


@dataclasses.dataclass(frozen=True)
class PBSConfig:
    """The settings: how keys are ordered, and which blocks of them are visited.

    The defaults are those of ``balanced``. ``paper`` has the choices of the paper (arXiv
    2510.21270, section 4.1).

    Attributes:
        block_size: rows of a query block: 32, 64 or 128.
        kv_block_size: rows of a key block: 32, 64 or 128; None takes ``block_size`` (the paper).
        segment_size: rows of a segment. Keys change places only inside their segment. A multiple
            of both block sizes.
        threshold: with ``mass="block"``, the share of attention that a visited block must have by
            itself, in (0, 0.5], or 1. With the other masses, the share of the estimated mass that
            all visited blocks of a query block must reach together, in (0, 1]. 1 visits everything.
            None takes 0.005 with ``mass="block"``, 0.95 with ``"causal"``, 0.9 with
            ``"earlier"``. Thresholds of different masses and scores do not mean the same.
        permute_per: ``"kv_head"`` gives each KV head one order, by the mean importance over its
            query heads. ``"query_head"`` gives each query head its own order (the paper).
        num_heavy: None sorts each segment by importance (the paper). A number h moves the h most
            important keys of each segment to its front, and keeps the original order of these and
            of all other keys.
        mass: the attention mass that ``threshold`` refers to. Sampled scores take ``"block"`` and
            no other: each block is compared by itself with the causal mass of a sampled query.
            Mean scores take ``"causal"``, all causal mass, where the own segment counts first, or
            ``"earlier"``, the mass of the segments before the query block's own (the paper).
        score: how blocks are scored. ``"sampled"`` takes the largest attention share any sampled
            query gives the block. ``"mean"`` takes the product of mean query and mean key (the
            paper).
        num_samples: number of evenly spaced queries of a block that ``"sampled"`` takes, at most
            ``block_size``, and at most 64 on CUDA.
        select_per: with ``"query_head"``, each query head samples its own queries and selects its
            own blocks. With ``"kv_head"``, the query heads of a KV head share one selection, from
            ``num_samples`` queries in all, taken from these heads in turn. The latter needs
            sampled scores and an order per KV head.
        window: number of keys before the first row of a query block whose segments the block
            visits, whatever their score. For causal attention; 0 adds none (the paper).
        dense_tail: number of last queries whose query blocks visit every key. For causal
            attention; 0 adds none (the paper).

    Raises:
        ValueError: if a value is outside its range.
    """

    block_size: int = 128
    kv_block_size: int | None = 32
    segment_size: int = 256
    threshold: float | None = None
    permute_per: Literal["kv_head", "query_head"] = "kv_head"
    num_heavy: int | None = 32
    mass: Literal["earlier", "causal", "block"] = "block"
    score: Literal["mean", "sampled"] = "sampled"
    num_samples: int = 16
    select_per: Literal["query_head", "kv_head"] = "query_head"
    window: int = 128
    dense_tail: int = 128

    def __post_init__(self) -> None:
        _check_choice("block_size", self.block_size, BLOCK_SIZES)
        if self.kv_block_size is not None:
            _check_choice("kv_block_size", self.kv_block_size, BLOCK_SIZES)
        for name, size in (("block_size", self.block_size), ("kv_block_size", self.key_block_size)):
            if self.segment_size <= 0 or self.segment_size % size:
                raise ValueError(
                    f"segment_size must be a positive multiple of {name} ({size}), "
                    f"got {self.segment_size}"
                )
        for name in ("num_heavy", "window", "dense_tail"):
            rows = getattr(self, name)
            if rows is not None and rows < 0:
                raise ValueError(f"{name} must not be negative, got {rows}")
        for name, choices in CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        self._check_selection()
        check_threshold("threshold", self.resolved_threshold, self.mass)
        if not 1 <= self.num_samples <= self.block_size:
            raise ValueError(
                f"num_samples must lie in [1, block_size ({self.block_size})], "
                f"got {self.num_samples}"
            )

    def _check_selection(self) -> None:
        """Checks that score, mass and heads can be combined."""
        if self.score == "mean" and self.mass == "block":
            raise ValueError('mass must be "earlier" or "causal" with score "mean", got "block"')
        if self.score == "sampled" and self.mass != "block":
            raise ValueError(f'mass must be "block" with score "sampled", got "{self.mass}"')
        if self.select_per == "query_head":
            return
        if self.score == "mean":
            raise ValueError('select_per must be "query_head" with score "mean", got "kv_head"')
        if self.permute_per == "query_head":
            raise ValueError(
                'select_per must be "query_head" with an order per query head, got "kv_head"'
            )

    @classmethod
    def paper(cls, threshold: float = 0.9) -> PBSConfig:
        """The paper's choices: one order per query head, a full sort, key blocks as long as query
        blocks, mean scores, and a threshold on the mass of earlier segments. Only the block of
        token 0 is always visited.

        SmolLM2-135M at 8192 tokens of three texts visits a density of 0.335 of the causal block
        pairs. Its loss is 0.081 nats per token above dense, and it recalls 0.83 of 6 pass keys
        (dense 1.00). Source: benchmarks/results/quality_tuning_smollm2_h100.csv.
        """
        return cls(
            kv_block_size=None,
            threshold=threshold,
            permute_per="query_head",
            num_heavy=None,
            mass="earlier",
            score="mean",
            window=0,
            dense_tail=0,
        )

    @classmethod
    def fast(cls) -> PBSConfig:
        """One selection for all query heads of a KV head, and a higher threshold. It takes less
        time on long prompts, and visits less of the attention mass.
        """
        return cls(select_per="kv_head", threshold=0.01)

    @classmethod
    def balanced(cls) -> PBSConfig:
        """The default, between ``fast`` and ``accurate``."""
        return cls()

    @classmethod
    def accurate(cls) -> PBSConfig:
        """More samples, and a lower threshold. It visits more blocks, and its output is closer to
        dense attention.
        """
        return cls(num_samples=32, threshold=0.0025)

    @property
    def key_block_size(self) -> int:
        """Rows of a key block, with None resolved."""
        return self.block_size if self.kv_block_size is None else self.kv_block_size

    @property
    def resolved_threshold(self) -> float:
        """The threshold, with None resolved."""
        return THRESHOLDS[self.mass] if self.threshold is None else self.threshold

    def op_kwargs(self, op: str = "attention") -> dict[str, Any]:
        """The settings as keyword arguments of operator ``op`` of ``torch.ops.pbs``: all of them
        except ``is_causal`` and ``scale``, which belong to a call.

        Raises:
            ValueError: if there is no such operator.
        """
        _check_choice("op", op, tuple(SETTINGS))
        # Not dataclasses.asdict: it deep-copies, which torch.compile under torch 2.10 cannot trace.
        return {name: getattr(self, attribute) for name, attribute in SETTINGS[op].items()}


# The values that a field may have.
CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(hint)
    for name, hint in get_type_hints(PBSConfig).items()
    if get_origin(hint) is Literal
}
# By operator: its arguments that are settings, and the attribute of PBSConfig for each.
# pbs_attn.ops reads them from the schemas. This file does not import torch, so that help on the
# command line appears fast.
SETTINGS: dict[str, dict[str, str]] = {}
# The value of a field that is None, for an operator that does not take None.
RESOLVED = {"kv_block_size": "key_block_size", "threshold": "resolved_threshold"}


def check_threshold(name: str, threshold: float, mass: str) -> None:
    """Raises ValueError, with the range of this mass, if the threshold is outside of it."""
    most = 0.5 if mass == "block" else 1
    if 0 < threshold <= most or threshold == 1:
        return
    if mass == "block":
        raise ValueError(f'{name} must lie in (0, 0.5] or be 1 with mass "block", got {threshold}')
    raise ValueError(f"{name} must lie in (0, 1], got {threshold}")


def check_config(config: object) -> None:
    """Raises TypeError unless it is a PBSConfig."""
    if not isinstance(config, PBSConfig):
        raise TypeError(f"config must be a PBSConfig, got {type(config).__name__}")


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
