"""Views of the keys and values in a KV cache of vLLM. This file does not import vLLM."""

from __future__ import annotations

from torch import Tensor


def split_pages(kv_cache: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a cache (blocks, KV heads, block size, 2 * head_dim), the layout of vLLM
    0.26 and 0.27 on CUDA. The strides decide whether heads or tokens come first in memory.

    Returns:
        Two views (blocks, block size, KV heads, head_dim).

    Raises:
        ValueError: if the cache has another shape.
    """
    check_cache(kv_cache, head_dim)
    k_cache, v_cache = kv_cache.transpose(1, 2).split(head_dim, dim=-1)
    return k_cache, v_cache


def split_cpu_pages(kv_cache: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the cache of vLLM's CPU backend with vectors ("vec"). A block of a head
    has its keys first, transposed to (head_dim, block size), and then its values.

    Returns:
        Two views (blocks, block size, KV heads, head_dim). The keys' last dim is not contiguous.

    Raises:
        ValueError: if the cache has another shape.
    """
    check_cache(kv_cache, head_dim)
    num_blocks, num_heads, block_size, _ = kv_cache.shape
    keys, values = kv_cache.view(num_blocks, num_heads, 2, block_size * head_dim).unbind(2)
    k_cache = keys.view(num_blocks, num_heads, head_dim, block_size).permute(0, 3, 1, 2)
    v_cache = values.view(num_blocks, num_heads, block_size, head_dim).transpose(1, 2)
    return k_cache, v_cache


def check_cache(kv_cache: Tensor, head_dim: int) -> None:
    """Raises ValueError unless the cache has the shape that both layouts start from."""
    if kv_cache.ndim != 4 or kv_cache.shape[-1] != 2 * head_dim:
        raise ValueError(
            "kv_cache must be (blocks, KV heads, block size, 2 * head_dim), got "
            f"{tuple(kv_cache.shape)} with head_dim {head_dim}"
        )
