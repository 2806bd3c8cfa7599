"""Every public name as an application uses it, for `mypy --strict`: see tests/lint.sh."""

from typing import Any

import torch

import pbs_attn
from pbs_attn.transformers import LayerRoute, LayerRoutes, explain, register


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    config = pbs_attn.PBSConfig(threshold=0.01, select_per="kv_head", window=64, dense_tail=0)
    out: torch.Tensor = pbs_attn.attention(q, k, v, is_causal=True, scale=None, config=config)
    chosen: pbs_attn.Selection = pbs_attn.select(q, k, v, config=pbs_attn.PBSConfig.paper())
    share: torch.Tensor = pbs_attn.density(chosen.block_mask, 512, 512, config=config)
    return out * share.mean()


def attend_sequences(
    q: torch.Tensor, cache: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    config = pbs_attn.PBSConfig.fast()
    out: torch.Tensor = pbs_attn.attention_varlen(q, q, q, lengths, lengths, config=config)
    where = (lengths, lengths.diff(), table)
    pbs_attn.attention_paged_(q, cache, cache, out, *where, scale=None, config=config)
    paged: torch.Tensor = pbs_attn.attention_paged(q, cache, cache, *where, is_causal=True)
    return out + paged


def convert(mask: torch.Tensor, num_kv_blocks: int) -> torch.Tensor:
    selected: torch.Tensor = pbs_attn.mask_to_bool(mask, num_kv_blocks)
    counts, indices = pbs_attn.mask_to_lists(pbs_attn.bool_to_mask(selected), num_kv_blocks)
    return pbs_attn.lists_to_mask(counts, indices, num_kv_blocks)


def describe(device: torch.device) -> str:
    info: dict[str, Any] = pbs_attn.build_info()
    has_kernel: bool = pbs_attn.has_kernel("attend", device)
    return pbs_attn.__version__ + str(info["cuda"] and has_kernel)


def routes(model: torch.nn.Module) -> list[str]:
    register("pbs_fast", config=pbs_attn.PBSConfig.fast(), min_tokens=2048)
    found: LayerRoutes = explain(model, 8192)
    layers: list[LayerRoute] = list(pbs_attn.transformers.explain(model))
    return [str(found), *(layer.reason for layer in layers)]
