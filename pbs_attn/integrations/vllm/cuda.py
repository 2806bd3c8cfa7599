"""The backend CUSTOM on CUDA: vLLM's FlashAttention, with PBS for the prefill of long prompts."""

from __future__ import annotations

from typing import ClassVar

import vllm

from .engine import NAME, describe_engine, settings_of
from .prompts import tell_prompts_of_runners
from .route import why_not_in_place
from .versions import check_version

check_version(vllm.__version__)  # before the import of names that another version may not have

from vllm.config import get_current_vllm_config  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport  # noqa: E402
from vllm.v1.attention.backends.flash_attn import (  # noqa: E402
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from .builder import PBSBuilder  # noqa: E402
from .impl import PBSImpl  # noqa: E402

tell_prompts_of_runners()


class PBSMetadataBuilder(PBSBuilder, FlashAttentionMetadataBuilder):
    """FlashAttention's metadata and a Plan."""

    # FlashAttention 3 says ALWAYS, but a graph of a mixed batch would hold one batch's decision.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH


class PBSAttentionImpl(PBSImpl, FlashAttentionImpl):
    """FlashAttention, and PBS for the rows of the Plan."""


class PBSBackend(FlashAttentionBackend):
    """The backend that --attention-backend CUSTOM names."""

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[PBSAttentionImpl]:
        return PBSAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[PBSMetadataBuilder]:
        return PBSMetadataBuilder

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Blocks of whole segments, so that pages can be ordered in place. --block-size overrides
        it."""
        vllm_config = get_current_vllm_config()
        config = settings_of(vllm_config).config
        preferred = super().get_preferred_block_size(default_block_size)
        if why_not_in_place(config.segment_size, config, describe_engine(vllm_config)) is None:
            return max(config.segment_size, preferred)
        return preferred

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @classmethod
    def is_sparse(cls) -> bool:
        """To vLLM, "sparse" means attention with an indexer, such as DeepSeek's."""
        return False
