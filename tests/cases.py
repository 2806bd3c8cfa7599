"""Test problems: sizes, settings, inputs, and calls of the ops on them."""

from typing import NamedTuple

import reference as ref
import torch

import pbs_attn
from pbs_attn.ops import OPERATORS

ops = torch.ops.pbs
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STRIDES = ["contiguous", "bnhd", "slice"]


def arguments_of(op, are_keywords):
    """The names of the keyword arguments of an operator, or of its other arguments, from its
    schema."""
    arguments = getattr(ops, op).default._schema.arguments
    return [argument.name for argument in arguments if argument.kwarg_only == are_keywords]


def operator_calls(q, k, v, config):
    """One call of every operator with the settings of a config: name -> (tensors by name, keyword
    arguments)."""
    pool = {"q": q, "k": k, "v": v, **pbs_attn.select(q, k, v, config=config)._asdict()}
    tensors = {op: {name: pool[name] for name in arguments_of(op, False)} for op in OPERATORS}
    return {op: (tensors[op], config.op_kwargs(op)) for op in OPERATORS}


class Case(NamedTuple):
    num_queries: int
    num_keys: int
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    batch: int = 2
    block_size: int = 32
    kv_block_size: int | None = None
    segment_size: int = 64
    is_causal: bool = True
    scale: float | None = None
    permute_per: str = "kv_head"
    num_heavy: int | None = None
    mass: str = "earlier"
    threshold: float = 0.9
    strides: str = "contiguous"
    score: str = "mean"
    num_samples: int = 8
    select_per: str = "query_head"
    window: int = 0
    dense_tail: int = 0

    @staticmethod
    def threshold_for(mass, share):
        """A threshold for `mass` from `share`, a share of a sum in (0, 1]. The threshold of a
        single block is at most half."""
        return share / 2 if mass == "block" and share < 1 else share

    def kwargs(self, op):
        """All keyword arguments of an operator, or of the reference's function of that name."""
        kwargs = {name: getattr(self, name) for name in arguments_of(op, True)}
        if op == "permute_kv":  # which has no block_size to replace None
            kwargs["kv_block_size"] = self.kv_block
        return kwargs

    @property
    def kv_block(self):
        return self.kv_block_size or self.block_size

    @property
    def layout(self):
        sizes = self.block_size, self.kv_block_size, self.segment_size
        return ref.Layout(self.num_queries, self.num_keys, *sizes, self.is_causal)

    def __str__(self):
        defaults = Case._field_defaults
        changed = [
            f"{name}={getattr(self, name)}"
            for name in self._fields[2:]
            if getattr(self, name) != defaults[name]
        ]
        return "-".join([f"{self.num_queries}of{self.num_keys}", *changed])


def clustered_qkv(case, dtype, seed):
    """Random q, k, v. All queries and some runs of 16 keys have a component in one direction, so
    that a few blocks hold most of the mass."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(case.head_dim, generator=generator)

    def draw(num_heads, length, bias, spread):
        noise = torch.randn(case.batch, num_heads, length, case.head_dim, generator=generator)
        lean = torch.randn(case.batch, num_heads, -(-length // 16), 1, generator=generator)
        lean = (bias + spread * lean).repeat_interleave(16, 2)[:, :, :length]
        return with_strides((noise + lean * direction).to(dtype), case.strides)

    q = draw(case.num_q_heads, case.num_queries, 0.6, 0.3)
    k = draw(case.num_kv_heads, case.num_keys, 0.0, 0.5)
    v = draw(case.num_kv_heads, case.num_keys, 0.0, 0.5)
    return q, k, v


def with_strides(x, strides):
    """The same values as a transposed (B, N, H, D) tensor, or as a slice of a larger tensor of
    NaN."""
    if strides == "bnhd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "slice":
        batch, heads, length, head_dim = x.shape
        larger = x.new_full((batch + 1, heads + 2, length + 3, head_dim + 8), torch.nan)
        view = larger[1:, 1:-1, 2:-1, :head_dim]
        return view.copy_(x)
    return x.contiguous()


class Outputs(NamedTuple):
    """The outputs of the ops, each of which gets the outputs of the earlier ones."""

    scores: torch.Tensor
    perm: torch.Tensor
    k_perm: torch.Tensor
    v_perm: torch.Tensor
    k_mean: torch.Tensor
    block_mask: torch.Tensor
    counts: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


def run_stages(case, q, k, v):
    scores = ops.score_keys(q, k, **case.kwargs("score_keys"))
    perm = ops.sort_segments(scores, **case.kwargs("sort_segments"))
    k_perm, v_perm, k_mean = ops.permute_kv(k, v, perm, **case.kwargs("permute_kv"))
    selecting = case.kwargs("select_blocks")
    block_mask, counts = ops.select_blocks(q, k, k_mean, perm, k_perm, **selecting)
    out, lse = ops.attend(q, k, v, k_perm, v_perm, block_mask, **case.kwargs("attend"))
    return Outputs(scores, perm, k_perm, v_perm, k_mean, block_mask, counts, out, lse)
