"""The entry point. It tells vLLM the names of our classes, which vLLM imports when they are
used."""

from __future__ import annotations

from .versions import check_version

PACKAGE = __name__.rpartition(".")[0]


def register() -> None:
    """Registers the attention backend CUSTOM, in each process of vLLM.

    vLLM has only one backend on a CPU. There, our class replaces it, and leaves everything to it
    unless CUSTOM was asked for. Nothing changes in a vLLM of another version, except that a request
    for CUSTOM names the supported versions: in an error on CUDA, and in the log on a CPU.
    """
    import vllm
    from vllm.logger import init_logger
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from . import counter

    if not current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CUSTOM, f"{PACKAGE}.cuda.PBSBackend")
    else:
        try:
            check_version(vllm.__version__)
        except RuntimeError as error:
            init_logger("vllm.pbs_attn").warning("PBS is left out: %s", error)
        else:
            register_backend(AttentionBackendEnum.CPU_ATTN, f"{PACKAGE}.cpu.PBSCPUBackend")
    counter.export()
