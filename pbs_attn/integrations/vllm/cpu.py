"""PBS in vLLM's CPU backend, for tests and for machines without a GPU.

vLLM has one attention backend on a CPU, and the class below replaces it. Without
`--attention-backend CUSTOM`, it does the same as its base.
"""

from __future__ import annotations

import torch
import vllm
from torch import Tensor

from .pages import split_cpu_pages
from .prompts import tell_prompts_of_runners
from .rows import Run
from .versions import check_version

check_version(vllm.__version__)  # before the import of names that another version may not have

from vllm.v1.attention.backends.cpu_attn import (  # noqa: E402
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from .builder import PBSBuilder  # noqa: E402
from .impl import New, PBSImpl  # noqa: E402

tell_prompts_of_runners()

READABLE = "vec"  # the layout of float32 and float16, and of bfloat16 without AMX


class PBSCPUMetadataBuilder(PBSBuilder, CPUAttentionMetadataBuilder):
    """The CPU backend's metadata and a Plan."""


class PBSCPUImpl(PBSImpl, CPUAttentionBackendImpl):
    """The CPU backend, and PBS for the rows of the Plan, on a copy of their pages."""

    def pbs_cache_layout(self) -> str | None:
        isa: str = self.isa
        return None if isa == READABLE else isa

    def pbs_attend(
        self, run: Run, new: New, kv_cache: Tensor, table: Tensor, output: Tensor
    ) -> None:
        k_cache, v_cache = split_cpu_pages(kv_cache, self.head_size)
        (first, end), _ = run.span
        block_size = k_cache.shape[1]
        needed = [-(-length // block_size) for length in run.seq_lens.tolist()]
        used = torch.cat([table[row, :pages] for row, pages in enumerate(needed)]).long()
        # Rows may share blocks: each block is copied once.
        blocks, places = used.unique(return_inverse=True)
        k, v = k_cache[blocks].contiguous(), v_cache[blocks].contiguous()
        own = torch.zeros((end - first, max(needed)), dtype=torch.int32)
        for row, part in enumerate(places.split(needed)):
            own[row, : len(part)] = part
        if self.pbs_attend_pages(run, new, (k, v), own, output):
            k_cache[blocks], v_cache[blocks] = k, v


class PBSCPUBackend(CPUAttentionBackend):
    """Replaces CPU_ATTN."""

    @staticmethod
    def get_impl_cls() -> type[PBSCPUImpl]:
        return PBSCPUImpl

    @staticmethod
    def get_builder_cls() -> type[PBSCPUMetadataBuilder]:
        return PBSCPUMetadataBuilder
