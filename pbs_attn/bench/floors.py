"""Floors: lower bounds on the milliseconds of each stage on a given card.

A floor is the larger of two times at the rates measured on the card: that of the bytes that the
stage must move, and that of its operations. Every tensor counts once, however often a kernel reads
it, except where the algorithm itself needs a second pass.
"""

from __future__ import annotations

from typing import NamedTuple

from pbs_attn import PBSConfig
from pbs_attn.masks import candidate_blocks

FLOAT32 = INT32 = 4
FP8_SPEEDUP = 2  # the speed of matrix products, over bfloat16


class Rates(NamedTuple):
    """Measured rates of a card."""

    bytes: float  # per second in a copy of device memory, reads and writes together
    operations: float  # per second in bfloat16 matrix products, below the power limit


RATES = {"NVIDIA H200": Rates(4.3e12, 680e12)}


class Problem(NamedTuple):
    """One causal call with batch 1 and as many queries as keys."""

    num_tokens: int
    num_q_heads: int
    num_kv_heads: int
    num_perm_heads: int
    head_dim: int
    element_size: int  # bytes per element of q, k and v
    density: float  # visited share of the block pairs on and under the diagonal
    config: PBSConfig

    @property
    def num_q_blocks(self) -> int:
        return -(-self.num_tokens // self.config.block_size)

    @property
    def num_kv_blocks(self) -> int:
        return -(-self.num_tokens // self.config.key_block_size)

    def rows(self, num_heads: int) -> int:
        """Bytes of a tensor (num_heads, num_tokens, head_dim) like q, k or v."""
        return num_heads * self.num_tokens * self.head_dim * self.element_size

    @property
    def means(self) -> int:
        """Bytes of k_mean."""
        return self.num_perm_heads * self.num_kv_blocks * self.head_dim * FLOAT32


class Work(NamedTuple):
    bytes: int
    operations: float = 0

    def floor_ms(self, rates: Rates) -> float:
        return 1e3 * max(self.bytes / rates.bytes, self.operations / rates.operations)


def score_keys(problem: Problem) -> Work:
    """Two passes over the keys of the complete segments."""
    segment_size, block_size = problem.config.segment_size, problem.config.block_size
    num_scored = problem.num_tokens // segment_size * segment_size
    keys = problem.num_kv_heads * num_scored * problem.head_dim * problem.element_size
    product = 2 * block_size * num_scored * problem.head_dim * problem.num_q_heads
    return Work(2 * keys, 2 * product)


def sort_segments(problem: Problem) -> Work:
    importance = problem.num_perm_heads * problem.num_tokens * FLOAT32
    perm = problem.num_perm_heads * problem.num_tokens * INT32
    return Work(importance + perm)


def permute_kv(problem: Problem) -> Work:
    k_and_v = 2 * problem.rows(problem.num_kv_heads)
    k_perm_and_v_perm = 2 * problem.rows(problem.num_perm_heads)
    return Work(k_and_v + k_perm_and_v_perm + problem.means)


def select_blocks(problem: Problem) -> Work:
    """Mean scores multiply mean queries by mean keys. Sampled scores multiply each sampled query by
    every key before its own segment, in fp8. Query blocks of the dense tail have no samples."""
    words = -(-problem.num_kv_blocks // 32)
    mask_and_counts = problem.num_q_heads * problem.num_q_blocks * (words + 1) * INT32
    num_tokens, config = problem.num_tokens, problem.config
    candidates, _ = candidate_blocks(num_tokens, num_tokens, config=config)
    if config.score == "mean":
        logits = problem.num_q_heads * candidates.sum().item()
        read = problem.rows(problem.num_q_heads) + problem.means
        return Work(read + mask_and_counts, 2 * problem.head_dim * logits)
    is_shared = config.select_per == "kv_head"
    num_heads = problem.num_kv_heads if is_shared else problem.num_q_heads
    num_scored = max(0, num_tokens - config.dense_tail) // config.block_size
    num_keys = candidates[:num_scored].sum().item() * config.key_block_size
    logits = num_heads * config.num_samples * num_keys
    samples = problem.rows(num_heads) * config.num_samples // config.block_size
    read = samples + problem.rows(problem.num_perm_heads)
    return Work(read + mask_and_counts, 2 * problem.head_dim * logits / FP8_SPEEDUP)


def attend(problem: Problem) -> Work:
    """Two matrix products for each visited pair of blocks. Diagonal pairs count whole."""
    num_tokens, config = problem.num_tokens, problem.config
    candidates, own = candidate_blocks(num_tokens, num_tokens, config=config)
    visited = problem.density * problem.num_q_heads * (candidates + own).sum().item()
    pair = 4 * config.block_size * config.key_block_size * problem.head_dim
    q_and_out = 2 * problem.rows(problem.num_q_heads)
    k_and_v = 2 * problem.rows(problem.num_kv_heads)
    k_perm_and_v_perm = 2 * problem.rows(problem.num_perm_heads)
    return Work(q_and_out + k_and_v + k_perm_and_v_perm, pair * visited)


STAGES = (score_keys, sort_segments, permute_kv, select_blocks, attend)


def floors_ms(problem: Problem, card: str) -> dict[str, float]:
    """The floor of every stage, or an empty dict for a card that RATES does not have."""
    if card not in RATES:
        return {}
    return {stage.__name__: stage(problem).floor_ms(RATES[card]) for stage in STAGES}
