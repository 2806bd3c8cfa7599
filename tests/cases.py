"""Problems the tests pose: their sizes and options, inputs, and a run of the ops on them."""

from typing import NamedTuple

import reference as ref
import torch

ops = torch.ops.pbs
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STRIDES = ["contiguous", "bnhd", "slice"]


class Case(NamedTuple):
    num_queries: int
    num_keys: int
    num_heads: int = 4
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

    @staticmethod
    def threshold_for(mass, share):
        """`share` of a sum, in (0, 1], as `mass` may be compared with it: a single block has half
        of all to reach at most."""
        return share / 2 if mass == "block" and share < 1 else share

    def options(self, *names):
        return {name: getattr(self, name) for name in names}

    @property
    def sizes(self):
        return self.options("block_size", "kv_block_size", "segment_size", "is_causal", "scale")

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
    """Random q, k, v with one direction that all queries and some runs of 16 keys lean towards, so
    that a few blocks hold most of the mass."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(case.head_dim, generator=generator)

    def draw(num_heads, length, bias, spread):
        noise = torch.randn(case.batch, num_heads, length, case.head_dim, generator=generator)
        lean = torch.randn(case.batch, num_heads, -(-length // 16), 1, generator=generator)
        lean = (bias + spread * lean).repeat_interleave(16, 2)[:, :, :length]
        return with_strides((noise + lean * direction).to(dtype), case.strides)

    q = draw(case.num_heads, case.num_queries, 0.6, 0.3)
    k = draw(case.num_kv_heads, case.num_keys, 0.0, 0.5)
    v = draw(case.num_kv_heads, case.num_keys, 0.0, 0.5)
    return q, k, v


def with_strides(x, strides):
    """The same values as a (B, N, H, D) tensor transposed, or amid NaN in a larger tensor."""
    if strides == "bnhd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "slice":
        batch, heads, length, head_dim = x.shape
        larger = x.new_full((batch + 1, heads + 2, length + 3, head_dim + 8), torch.nan)
        view = larger[1:, 1:-1, 2:-1, :head_dim]
        return view.copy_(x)
    return x.contiguous()


class Outputs(NamedTuple):
    """What the ops give, each fed the outputs of those before."""

    scores: torch.Tensor
    perm: torch.Tensor
    k_perm: torch.Tensor
    v_perm: torch.Tensor
    k_mean: torch.Tensor
    words: torch.Tensor
    counts: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


def run_stages(case, q, k, v):
    scoring = case.options("block_size", "segment_size", "scale", "permute_per")
    scores = ops.score_keys(q, k, **scoring)
    perm = ops.sort_segments(scores, **case.options("segment_size", "num_heavy"))
    k_perm, v_perm, k_mean = ops.permute_kv(k, v, perm, kv_block_size=case.kv_block)
    selection = {**case.options("threshold", "mass", "score", "num_samples"), **case.sizes}
    words, counts = ops.select_blocks(q, k, k_mean, perm, k_perm, **selection)
    out, lse = ops.attend(q, k, v, k_perm, v_perm, words, **case.sizes)
    return Outputs(scores, perm, k_perm, v_perm, k_mean, words, counts, out, lse)
