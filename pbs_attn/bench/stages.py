"""Inputs that can reach a given density, and the stages of the operator on them."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

import pbs_attn
from pbs_attn import PBSConfig

from .shapes import Shape

ops = torch.ops.pbs


def paper_with(kv_block_size: int | None, permute_per: str = "kv_head") -> PBSConfig:
    """The paper's selection with another width of key blocks, and one order for each KV or query
    head."""
    return dataclasses.replace(
        PBSConfig.paper(), kv_block_size=kv_block_size, permute_per=permute_per
    )


def heavy_hitters(
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    device: torch.device | str = "cuda",
    head_dim: int = 128,
) -> list[torch.Tensor]:
    """Returns q (1, Hq, num_tokens, head_dim), k and v (1, Hkv, num_tokens, head_dim), bfloat16.

    In each KV head, a twentieth of the keys and all queries have a common direction added. Heads
    are made one at a time, to keep float32 copies small.
    """
    generator = torch.Generator(device).manual_seed(num_tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    q, k, v = (
        torch.empty(1, heads, num_tokens, head_dim, device=device, dtype=torch.bfloat16)
        for heads in (num_q_heads, num_kv_heads, num_kv_heads)
    )
    for head, group in enumerate(q[0].tensor_split(num_kv_heads)):
        direction = normal(head_dim)
        heavy = torch.rand(num_tokens, 1, generator=generator, device=device) < 0.05
        k[0, head] = normal(num_tokens, head_dim) + heavy * direction
        group.copy_(normal(*group.shape) + direction)
        v[0, head] = normal(num_tokens, head_dim)
    return [q, k, v]


def synthetic(shape: Shape, num_tokens: int, device: str) -> list[torch.Tensor]:
    """`heavy_hitters` of a shape. On a CPU they are float32, the type that its kernels compute
    in."""
    tensors = heavy_hitters(
        num_tokens, shape.num_q_heads, shape.num_kv_heads, device, shape.head_dim
    )
    return [tensor.float() for tensor in tensors] if device == "cpu" else tensors


class Pipeline:
    """One input and one configuration. Each stage runs on the outputs of the stages before it."""

    def __init__(self, q, k, v, config: PBSConfig):
        self.q, self.k, self.v = q, k, v
        self.config = config
        self.scores = self.score_keys()
        self.perm = self.sort_segments()
        self.k_perm, self.v_perm, self.k_mean = self.permute_kv()

    def set_threshold(self, threshold: float) -> float:
        """Returns the density that the threshold gives."""
        self.threshold = threshold
        self.words, _ = self.select_blocks()
        num_tokens = self.q.shape[2]
        densities = [
            pbs_attn.density(words, num_tokens, num_tokens, config=self.config)
            for words in self.words.split(4, 1)  # all heads unpacked would fill a GPU at 1M tokens
        ]
        return torch.cat(densities, 1).mean().item()

    def score_keys(self):
        return ops.score_keys(self.q, self.k, **self.config.op_kwargs("score_keys"))

    def sort_segments(self):
        return ops.sort_segments(self.scores, **self.config.op_kwargs("sort_segments"))

    def permute_kv(self):
        return ops.permute_kv(self.k, self.v, self.perm, **self.config.op_kwargs("permute_kv"))

    def select_blocks(self):
        settings = self.config.op_kwargs("select_blocks") | {"threshold": self.threshold}
        return ops.select_blocks(self.q, self.k, self.k_mean, self.perm, self.k_perm, **settings)

    def attend(self):
        tensors = (self.q, self.k, self.v, self.k_perm, self.v_perm, self.words)
        return ops.attend(*tensors, **self.config.op_kwargs("attend"))

    def attention(self):
        config = dataclasses.replace(self.config, threshold=self.threshold)
        return ops.attention(self.q, self.k, self.v, **config.op_kwargs())


class Adjustable(Protocol):
    """An object whose density depends on a threshold, compared by the mass of its config."""

    config: PBSConfig

    def set_threshold(self, threshold: float) -> float:
        """Returns the density that the threshold gives."""


def reach(pipeline: Adjustable, density: float) -> float:
    """Sets the threshold by bisection to come close to a density. Returns the density that it
    gives."""

    def threshold(place: float) -> float:
        # With mass="block", lower thresholds visit more: from 1/2 at place 0 to 2^-20 at place 1.
        return 2 ** (-1 - 19 * place) if pipeline.config.mass == "block" else place

    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        if pipeline.set_threshold(threshold(middle)) < density:
            low = middle
        else:
            high = middle
    return pipeline.set_threshold(threshold(high))
