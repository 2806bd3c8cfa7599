"""The settings of permuted block-sparse attention."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

BLOCK_SIZES = (32, 64, 128)
THRESHOLDS = {"earlier": 0.9, "causal": 0.95, "block": 0.01}  # by mass


@dataclasses.dataclass(frozen=True)
class PBSConfig:
    """How keys are ordered and which blocks of them are visited.

    The defaults are those of :meth:`balanced`; :meth:`paper` has the choices of the paper (arXiv
    2510.21270, section 4.1).

    Attributes:
        block_size: rows of a query block: 32, 64 or 128.
        kv_block_size: rows of a key block: 32, 64 or 128; None takes ``block_size`` (the paper).
        segment_size: keys are reordered only inside segments of this many rows; a multiple of
            both block sizes.
        threshold: share of the mass, estimated per query block, that the selected key blocks must
            reach, in (0, 1]. 1 visits everything. With ``mass="block"`` a much smaller number, at
            most 0.5, or 1: the least share of a single block. Shares of different masses and scores
            mean different things. None takes 0.01 with ``mass="block"``, 0.95 with ``"causal"``,
            0.9 with ``"earlier"``.
        permute_per: ``"kv_head"`` (one order per KV head, from the mean importance over its query
            heads) or ``"query_head"`` (the paper's).
        num_heavy: None sorts each segment by importance (the paper); h moves the h most important
            keys of each segment to its front and keeps the original order on both sides.
        mass: what ``threshold`` is a share of: with ``"block"``, for sampled scores, nothing is
            summed, and a block is visited if a sampled query gives it that share of its causal
            mass; ``"causal"``, all causal mass, the own segment's counted first; or ``"earlier"``,
            the mass of the segments before the query block's own (the paper).
        score: how blocks are scored: ``"sampled"``, by the largest share of its attention that any
            of a few queries of the block gives to the key block; or ``"mean"``, by the product of
            mean query and mean key (the paper).
        num_samples: queries of a block that ``"sampled"`` takes, evenly spaced; up to
            ``block_size``, and to 64 on CUDA.

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
        if self.num_heavy is not None and self.num_heavy < 0:
            raise ValueError(f"num_heavy must not be negative, got {self.num_heavy}")
        for name, choices in CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        if self.mass == "block" and self.score == "mean":
            raise ValueError('mass must be "earlier" or "causal" with score "mean", got "block"')
        check_threshold("threshold", self.resolved_threshold, self.mass)
        if not 1 <= self.num_samples <= self.block_size:
            raise ValueError(
                f"num_samples must lie in [1, block_size ({self.block_size})], "
                f"got {self.num_samples}"
            )

    @classmethod
    def paper(cls, threshold: float = 0.9) -> PBSConfig:
        """The paper's own choices: an order per query head, a full sort, key blocks as long as
        query blocks, mean scores, and a threshold on the mass of earlier segments.

        Measured as :meth:`balanced`: density 0.335, loss 0.081, keys 0.83.
        """
        return cls(
            kv_block_size=None,
            threshold=threshold,
            permute_per="query_head",
            num_heavy=None,
            mass="earlier",
            score="mean",
        )

    @classmethod
    def fast(cls) -> PBSConfig:
        """Fewer samples, and a lower threshold for it: less time on long prompts of models with a
        billion parameters and more.

        Measured as :meth:`balanced`: density 0.164, loss 0.034, keys 0.67. So a small model loses
        keys. Qwen2.5-Coder-1.5B at 16384 tokens does not from threshold 0.025 down, and at 32768
        tokens of five texts that nothing was chosen by it visits 0.062, loses 0.008, and takes
        0.82 ms a layer instead of 5.49 dense (benchmarks/results/quality_qwen_keys_h100.csv and
        quality_qwen_32768_h100.csv).
        """
        return cls(threshold=0.008, num_samples=8)

    @classmethod
    def balanced(cls) -> PBSConfig:
        """The default: density 0.172, loss 0.016, keys 1.00.

        Of SmolLM2-135M at 8192 tokens of three texts: the visited share of the causal block pairs,
        the loss above dense in nats a token, and the share of 6 pass keys read back (dense 1.00).
        A larger model loses less. Source: benchmarks/results/quality_tuning_smollm2_h100.csv, for
        :meth:`fast` quality_tuning_fast_smollm2_h100.csv.
        """
        return cls()

    @classmethod
    def accurate(cls) -> PBSConfig:
        """More samples.

        Measured as :meth:`balanced`: density 0.198, loss 0.005, keys 1.00.
        """
        return cls(num_samples=32)

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
