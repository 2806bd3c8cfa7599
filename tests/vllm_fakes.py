"""The parts of vLLM that the plugin's classes derive from, for tests on a machine without vLLM: a
base builder that passes metadata on, and a base layer that computes dense attention over pages."""

import dataclasses
import importlib
import sys
from enum import Enum
from types import ModuleType, SimpleNamespace

import torch

MODULES = (
    *("vllm", "vllm.config", "vllm.distributed", "vllm.distributed.parallel_state", "vllm.logger"),
    *("vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backend", "vllm.v1.attention.backends"),
    *("vllm.v1.attention.backends.flash_attn", "vllm.v1.attention.backends.cpu_attn"),
    *("vllm.v1.attention.backends.registry", "vllm.platforms", "vllm.v1.worker"),
    *("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu", "vllm.v1.worker.gpu.model_states"),
    "vllm.v1.worker.gpu.model_states.default",
)
OURS = tuple(f"pbs_attn.integrations.vllm.{name}" for name in ("builder", "impl", "cuda", "cpu"))


class Log:
    def __init__(self):
        self.lines = []

    def info(self, text, *arguments):
        self.lines.append(text % arguments)

    def info_once(self, text, *arguments):
        if text % arguments not in self.lines:
            self.info(text, *arguments)

    warning = info


@dataclasses.dataclass
class Common:
    """CommonAttentionMetadata, with the fields of vLLM 0.26 that the plugin reads."""

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool = True
    positions: torch.Tensor | None = None
    is_prefilling: torch.Tensor | None = None
    seq_lens_cpu_upper_bound: torch.Tensor | None = None
    mm_req_doc_ranges: dict | None = None
    _seq_lens_cpu: torch.Tensor | None = None
    _num_computed_tokens_cpu: torch.Tensor | None = None

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


def make_common(queries, keys, prefilling, table, **changes):
    """Metadata of rows with these numbers of queries and keys."""
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    total = int(starts[-1])
    fields = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts.clone(),
        "seq_lens": torch.tensor(keys).int(),
        "num_reqs": len(queries),
        "num_actual_tokens": total,
        "max_query_len": max(queries),
        "max_seq_len": max(keys),
        "block_table_tensor": table,
        "slot_mapping": torch.arange(total),
        "is_prefilling": torch.tensor(prefilling),
        "seq_lens_cpu_upper_bound": torch.tensor(keys).int(),
    }
    return Common(**(fields | changes))


class BaseBuilder:
    """A builder whose metadata has the fields that FlashAttention and the CPU backend share."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.builds = []

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        self.builds.append((common_attn_metadata, fast_build))
        common = common_attn_metadata
        return SimpleNamespace(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
        )

    def build_for_cudagraph_capture(self, common_attn_metadata):
        return self.build(0, common_attn_metadata)

    def update_block_table(self, metadata, blk_table, slot_mapping):
        new = SimpleNamespace(**vars(metadata))
        new.block_table, new.slot_mapping = blk_table, slot_mapping
        return new


class BaseImpl:
    isa = "vec"

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window,
        kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name, sinks=None,
    ):  # fmt: skip
        self.head_size, self.scale, self.num_kv_heads = head_size, scale, num_kv_heads
        self.calls = []

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None,
        output_block_scale=None,
    ):  # fmt: skip
        if attn_metadata is None:
            return output.fill_(0)
        self.calls.append(attn_metadata)
        pages = self.pages(kv_cache)
        dense(query, *pages, attn_metadata, output, self.scale)
        return output

    def pages(self, kv_cache):
        return kv_cache.transpose(1, 2).split(self.head_size, -1)


class BaseBackend:
    @classmethod
    def get_preferred_block_size(cls, default_block_size):
        return default_block_size

    @classmethod
    def supports_batch_invariance(cls):
        return True


class FirstRunner:
    """A runner with the prompt lengths in `input_batch.num_prompt_tokens`, with stale entries at
    the end."""

    def __init__(self, builder, prompts):
        self.builder = builder
        self.input_batch = SimpleNamespace(num_prompt_tokens=[*prompts, 7, 7])

    def _build_attention_metadata(self, common):
        return self.builder.build(common_prefix_len=0, common_attn_metadata=common)


class SecondRunnersState:
    """The state to which the runner passes an input batch with `prefill_len_np`."""

    def __init__(self, builder):
        self.builder = builder

    def prepare_attn(self, input_batch, common):
        return self.builder.build(common_prefix_len=0, common_attn_metadata=common)


class AttentionCGSupport(Enum):
    ALWAYS = 3
    UNIFORM_BATCH = 2


class AttentionBackendEnum(Enum):
    CPU_ATTN = "vllm.CPU"
    CUSTOM = None


def dense(query, k_cache, v_cache, metadata, output, scale):
    """Causal attention of every row over its pages, bottom-right aligned, in float64."""
    starts = metadata.query_start_loc.tolist()
    for row, length in enumerate(metadata.seq_lens.tolist()):
        begin, end = starts[row : row + 2]
        pages = metadata.block_table[row, : -(-length // k_cache.shape[1])].long()
        k, v = (c[pages].flatten(0, 1)[:length].double() for c in (k_cache, v_cache))
        group = query.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query[begin:end].double(), k) * scale
        position = torch.arange(length - (end - begin), length)[:, None]
        scores.masked_fill_(torch.arange(length) > position, float("-inf"))
        output[begin:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(output.dtype)


def install(monkeypatch, config, log, version="0.26.0"):
    """Installs these modules as vLLM, and makes Python import those of the plugin again."""
    modules = {name: ModuleType(name) for name in MODULES}
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    backends = "vllm.v1.attention.backends"
    modules["vllm"].__version__ = version
    modules["vllm.config"].get_current_vllm_config = lambda: config
    parallel = modules["vllm.distributed.parallel_state"]
    parallel.get_tensor_model_parallel_rank = lambda: 0
    parallel.get_pp_group = lambda: SimpleNamespace(is_first_rank=True)
    modules["vllm.logger"].init_logger = lambda name: log
    modules["vllm.v1.attention.backend"].AttentionCGSupport = AttentionCGSupport
    flash, cpu = modules[f"{backends}.flash_attn"], modules[f"{backends}.cpu_attn"]
    flash.FlashAttentionBackend = cpu.CPUAttentionBackend = BaseBackend
    flash.FlashAttentionImpl = cpu.CPUAttentionBackendImpl = BaseImpl
    flash.FlashAttentionMetadataBuilder = cpu.CPUAttentionMetadataBuilder = BaseBuilder
    # New classes, because the plugin wraps their methods.
    runners = (("gpu_model_runner", "GPUModelRunner", FirstRunner),)
    runners += (("gpu.model_states.default", "DefaultModelState", SecondRunnersState),)
    for module, name, base in runners:
        setattr(modules[f"vllm.v1.worker.{module}"], name, type(name, (), dict(vars(base))))
    registry = modules[f"{backends}.registry"]
    registry.AttentionBackendEnum = AttentionBackendEnum
    registry.registered = {}
    registry.register_backend = lambda member, path: registry.registered.update({member: path})
    modules["vllm.platforms"].current_platform = SimpleNamespace(is_cpu=lambda: True)
    return modules


# A server of one layer

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
NAME = "model.layers.0.attn"


def make_config(**settings):
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False
        ),
        model_config=SimpleNamespace(
            rswa_window=None, is_mm_prefix_lm=False, is_hybrid=False, dtype=torch.float32,
            max_model_len=2048,
        ),
        device_config=SimpleNamespace(device_type="cpu"),
        kv_transfer_config=None,
        speculative_config=None,
        cache_config=SimpleNamespace(block_size=256),
        compilation_config=SimpleNamespace(static_forward_context={}),
        attention_config=SimpleNamespace(backend=SimpleNamespace(name="CUSTOM")),
        additional_config={"pbs_attn": {"threshold": 1.0, "min_tokens": 512, **settings}},
    )  # fmt: skip


class Server:
    """One layer and its builder."""

    def __init__(self, monkeypatch, kind="cuda", version="0.26.0", **settings):
        self.config, self.log = make_config(**settings), Log()
        self.modules = install(monkeypatch, self.config, self.log, version)
        self.module = importlib.import_module(f"pbs_attn.integrations.vllm.{kind}")
        self.impl_module = importlib.import_module("pbs_attn.integrations.vllm.impl")
        names = ("PBSBackend", "PBSCPUBackend")
        self.backend = next(vars(self.module)[n] for n in names if n in vars(self.module))
        self.impl = self.add_layer(NAME)
        self.builder = self.make_builder()

    def add_layer(self, name, window=None):
        impl = self.backend.get_impl_cls()(
            HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, None, window, "auto"
        )
        layer = SimpleNamespace(impl=impl, layer_name=name, kv_sharing_target_layer_name=None)
        self.config.compilation_config.static_forward_context[name] = layer
        return impl

    def make_builder(self):
        names = list(self.config.compilation_config.static_forward_context)
        spec = SimpleNamespace(block_size=256)
        return self.backend.get_builder_cls()(spec, names, self.config, "cpu")

    def forward(self, query, cache, metadata, impl=None):
        output = torch.full_like(query, torch.nan)
        layer = SimpleNamespace(layer_name=NAME)
        (impl or self.impl).forward(layer, query, None, None, cache, metadata, output)
        return output


def make_cache(page_size, layout="NHD", num_pages=None):
    """(pages, KV heads, page size, 2 * head_dim), in either order in memory."""
    num_pages = num_pages or 8192 // page_size
    torch.manual_seed(0)
    if layout == "HND":
        return torch.randn(num_pages, KV_HEADS, page_size, 2 * HEAD_DIM)
    return torch.randn(num_pages, page_size, KV_HEADS, 2 * HEAD_DIM).transpose(1, 2)


def make_table(page_size, keys):
    """Pages in no order, none used twice."""
    width = max(keys) // page_size + 1
    order = torch.randperm(8192 // page_size, generator=torch.Generator().manual_seed(1))
    return order[: len(keys) * width].view(len(keys), width).int()
