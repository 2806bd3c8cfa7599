"""Permuted Block-Sparse Attention (arXiv 2510.21270) as a compiled PyTorch extension."""

from . import transformers
from ._library import build_info, compiled_info, has_kernel
from .attention import Selection, attention, select
from .config import PBSConfig
from .masks import bool_to_mask, density, lists_to_mask, mask_to_bool, mask_to_lists
from .sequences import attention_paged, attention_paged_, attention_varlen

__version__ = compiled_info()["version"]

__all__ = [
    "PBSConfig",
    "Selection",
    "__version__",
    "attention",
    "attention_paged",
    "attention_paged_",
    "attention_varlen",
    "bool_to_mask",
    "build_info",
    "density",
    "has_kernel",
    "lists_to_mask",
    "mask_to_bool",
    "mask_to_lists",
    "select",
    "transformers",
]
