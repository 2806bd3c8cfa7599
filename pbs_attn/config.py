"""The settings of permuted block-sparse attention."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

BLOCK_SIZES = (32, 64, 128)
THRESHOLDS = {"earlier": 0.9, "causal": 0.95, "block": 0.005}  # by mass


@dataclasses.dataclass(frozen=True)
class PBSConfig:
    """How keys are ordered and which blocks of them are visited.

    The defaults are those of ``balanced``; ``paper`` has the choices of the paper (arXiv
    2510.21270, section 4.1).

    Attributes:
        block_size: rows of a query block: 32, 64 or 128.
        kv_block_size: rows of a key block: 32, 64 or 128; None takes ``block_size`` (the paper).
        segment_size: keys are reordered only inside segments of this many rows; a multiple of
            both block sizes.
        threshold: share of the mass, estimated per query block, that the selected key blocks must
            reach, in (0, 1]. 1 visits everything. With ``mass="block"`` a much smaller number, at
            most 0.5, or 1: the least share of a single block. Shares of different masses and scores
            mean different things. None takes 0.005 with ``mass="block"``, 0.95 with ``"causal"``,
            0.9 with ``"earlier"``.
        permute_per: ``"kv_head"`` (one order per KV head, from the mean importance over its query
            heads) or ``"query_head"`` (the paper's).
        num_heavy: None sorts each segment by importance (the paper); h moves the h most important
            keys of each segment to its front and keeps the original order on both sides.
        mass: what ``threshold`` is a share of. ``"block"`` goes with sampled scores, and they with
            nothing else: nothing is summed, and a block is visited if a sampled query gives it that
            share of its causal mass. Mean scores take ``"causal"``, all causal mass, the own
            segment's counted first; or ``"earlier"``, the mass of the segments before the query
            block's own (the paper).
        score: how blocks are scored: ``"sampled"``, by the largest share of its attention that any
            of a few queries of the block gives to the key block; or ``"mean"``, by the product of
            mean query and mean key (the paper).
        num_samples: queries of a block that ``"sampled"`` takes, evenly spaced; up to
            ``block_size``, and to 64 on CUDA.
        select_per: ``"query_head"`` (each query head samples queries and selects blocks of its own)
            or ``"kv_head"``: the query heads of a KV head select together, from ``num_samples``
            queries in all, which are taken from them in turn. Needs sampled scores and an order
            per KV head.
        window: keys before a query block that it visits whatever their score: the whole segments
            that hold one of so many keys before its first row. Of causal attention only; 0 adds
            none (the paper).
        dense_tail: query blocks that hold one of so many last queries visit every key. Of causal
            attention only; 0 leaves them to their scores (the paper).

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
        """That score, mass and heads go together."""
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
        """The paper's own choices: an order per query head, a full sort, key blocks as long as
        query blocks, mean scores, a threshold on the mass of earlier segments, and no block but
        that of token 0 is visited whatever its score.

        Measured with SmolLM2-135M at 8192 tokens of three texts: density 0.335, loss 0.081, keys
        0.83. These are the visited share of the causal block pairs, the loss above dense in nats a
        token, and the share of 6 pass keys read back (dense 1.00). Source:
        benchmarks/results/quality_tuning_smollm2_h100.csv.
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
        """One selection for all query heads of a KV head, and a higher threshold: less time on long
        prompts, and less of the attention's mass.
        """
        return cls(select_per="kv_head", threshold=0.01)

    @classmethod
    def balanced(cls) -> PBSConfig:
        """The default, between ``fast`` and ``accurate``."""
        return cls()

    @classmethod
    def accurate(cls) -> PBSConfig:
        """More samples, and a lower threshold: more blocks are visited, and the output lies nearer
        to dense attention.
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
        """The settings as operator ``op`` of ``torch.ops.pbs`` takes them: all of its keyword
        arguments but ``is_causal`` and ``scale``, which belong to a call.

        Raises:
            ValueError: if there is no such operator.
        """
        _check_choice("op", op, tuple(SETTINGS))
        # Not dataclasses.asdict: it deep-copies, which torch.compile under torch 2.10 cannot trace.
        return {name: getattr(self, attribute) for name, attribute in SETTINGS[op].items()}


# The words that a field may be.
CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(hint)
    for name, hint in get_type_hints(PBSConfig).items()
    if get_origin(hint) is Literal
}
# By operator: its arguments that are settings, and the attribute of PBSConfig that each one is.
# pbs_attn.ops reads them from the schemas: here is no torch, which help on the command line does
# without.
SETTINGS: dict[str, dict[str, str]] = {}
# What a field is where it is None, for an operator that does not take None.
RESOLVED = {"kv_block_size": "key_block_size", "threshold": "resolved_threshold"}


def check_threshold(name: str, threshold: float, mass: str) -> None:
    """Raises ValueError, with the range of this mass, unless `mass` may be compared with it."""
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
