"""The options of each bench, with their defaults and choices. Nothing here imports torch, so that
the command line shows its help at once."""

from __future__ import annotations

import dataclasses

from pbs_attn import _arguments
from pbs_attn._rows import GIVEN, PROBES
from pbs_attn.config import CHOICES, PBSConfig

# Presets by their names in rows; on the command line, "default" is another name of "balanced".
DEFAULT = "default"
PRESETS = {
    "balanced" if name == DEFAULT else name: config for name, config in _arguments.PRESETS.items()
}
SETTINGS = (DEFAULT, *PRESETS)

# Default densities of synthetic inputs, by tokens.
# With the paper's settings: Table 5 of arXiv 2510.21270; the last one is our continuation of it.
PAPER_DENSITIES = {
    **{8192: 0.58, 16384: 0.49, 32768: 0.41, 65536: 0.29, 131072: 0.22},
    262144: 0.17,
}
# With all other settings: densities of pipeline_balanced_h100.csv, continued to 262144 tokens.
# Below 8192 tokens, density * tokens is constant, so that a query visits as many keys: the own
# segment, the window and the block of token 0 do not shrink with the prompt.
DENSITIES = {
    **{512: 1.0, 1024: 0.96, 2048: 0.48, 4096: 0.24},
    **{8192: 0.12, 16384: 0.07, 32768: 0.05, 65536: 0.035, 131072: 0.025},
    **{262144: 0.018, 1048576: 0.01},
}
LENGTHS = (8192, 16384, 32768, 65536, 131072)

PERMUTE_PER = CHOICES["permute_per"]

# Dense kernels on a GPU: torch's SDPA through cuDNN and flash, FlashAttention-4, FlexAttention.
DENSE_KERNELS = ("cudnn", "flash", "fa4", "flex")

# kernel
DTYPES = ("bfloat16", "float16", "float32")
UNEVEN_TOKENS = 32768

# chunks: pages can be put in order for sampled scores only
CHUNK_SETTINGS = (
    DEFAULT,
    *(name for name, config in PRESETS.items() if config.score == "sampled"),
)

# serve: vLLM's own attention, and presets whose pages are put in order; how a prompt comes
MODES = ("dense", "balanced", "fast")
PARTS = ("whole", "chunked")

# quality
COMPARED = ("pbs", "unpermuted", "pooled", "window", "truncated")
# Thresholds by mass; `cpu` uses them too.
SWEEPS = {
    "block": (0.02, 0.01, 0.005, 0.0025, 0.001),
    "causal": (0.7, 0.8, 0.9, 0.95, 0.99),
    "earlier": (0.7, 0.8, 0.9, 0.95, 0.99),
}
# RULER's tasks as lm-eval names them, without the two that download their questions.
RULER_TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
)


@dataclasses.dataclass(frozen=True)
class KernelOptions:
    """`head_dims` and `dtypes`: None for the preset's, and for bfloat16 on a GPU, float32 on a
    CPU. `activations`: safetensors with q, k and v; they come after `tokens`, which may be ()."""

    preset: str = "llama-3.1-8b"
    tokens: tuple[int, ...] = (8192, 32768, 131072)
    densities: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 1.0)
    kv_block_sizes: tuple[int, ...] = (128,)
    head_dims: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    uneven: bool = False
    activations: tuple[str, ...] = ()
    rounds: int = 5
    budget_ms: float = 20.0
    device: str = "auto"
    csv: str | None = None
    picture: str | None = None


@dataclasses.dataclass(frozen=True)
class PipelineOptions:
    """`settings`: one of SETTINGS; `permute_per` and `kv_block_sizes`: None for theirs.
    `densities`: one a length, or None for those that go with the settings. `activations`:
    safetensors with q, k and v; they come after `tokens`, which may be (). `dense`: of
    DENSE_KERNELS, those that take turns with the one call on a GPU; () for no dense kernel."""

    presets: tuple[str, ...] = ("llama-3.1-8b",)
    settings: str = DEFAULT
    tokens: tuple[int, ...] = LENGTHS
    densities: tuple[float, ...] | None = None
    permute_per: tuple[str, ...] | None = None
    kv_block_sizes: tuple[int, ...] | None = None
    activations: tuple[str, ...] = ()
    eager: bool = False
    crossover: bool = True
    dense: tuple[str, ...] = DENSE_KERNELS
    rounds: int = 5
    budget_ms: float = 20.0
    device: str = "auto"
    csv: str | None = None
    picture: str | None = None


@dataclasses.dataclass(frozen=True)
class ChunksOptions:
    """`chunks` are tokens per chunk. Each length runs with each chunk size. `settings` is one of
    CHUNK_SETTINGS. `densities` has one value for each length, or is None for those of the
    settings."""

    preset: str = "llama-3.1-8b"
    settings: str = DEFAULT
    tokens: tuple[int, ...] = (32768, 131072)
    chunks: tuple[int, ...] = (2048, 8192)
    densities: tuple[float, ...] | None = None
    rounds: int = 5
    device: str = "auto"
    csv: str | None = None


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """`parts` and `modes` are from PARTS and MODES, and each pair is an engine. `chunk` is the
    number of tokens per step in `chunked`. `densities` has TOKENS:DENSITY, the density of PBS for
    prompts of that length. Other lengths use the threshold of the preset. The throughput is that of
    `requests` prompts of `request_tokens` with answers of `answer_tokens`. `fast_start` disables
    Inductor. After `time_limit` seconds, no further engine starts. `table` is a CSV to print
    instead."""

    preset: str = "llama-3.1-8b"
    tokens: tuple[int, ...] = LENGTHS
    densities: tuple[str, ...] = tuple(f"{tokens}:{DENSITIES[tokens]}" for tokens in LENGTHS)
    parts: tuple[str, ...] = PARTS
    modes: tuple[str, ...] = MODES
    chunk: int = 8192
    requests: int = 16
    request_tokens: int = 32768
    answer_tokens: int = 128
    tensor_parallel_size: int = 1
    rounds: int = 3
    fast_start: bool = False
    time_limit: float = 3600.0
    csv: str | None = None
    table: str | None = None


@dataclasses.dataclass(frozen=True)
class PrefillOptions:
    """`model` and `text` as for the demo; None for `preset`, with random weights. `settings`: one
    of SETTINGS; `permute_per`: None for theirs. `densities` (one a length, or None for those that
    go with the settings) and `layers` (None for all) are the preset's. `threshold` (None for that
    of the settings) is the model's. `rounds`: one for all lengths, or one a length."""

    preset: str = "llama-3.1-8b"
    model: str | None = None
    text: str | None = None
    settings: str = DEFAULT
    threshold: float | None = None
    tokens: tuple[int, ...] = (*LENGTHS, 262144)
    densities: tuple[float, ...] | None = None
    layers: int | None = None
    permute_per: str | None = None
    rounds: tuple[int, ...] = (2,)
    device: str = "auto"
    csv: str | None = None
    picture: str | None = None


@dataclasses.dataclass(frozen=True)
class QualityOptions:
    """`model` and each of `texts` are as for the demo. Without texts, the demo's novel is read.
    `probes` are from PROBES and RULER. `depths` is the number of pass keys for each text and
    length. `lengths` are those of prompts with pass keys and of RULER's prompts (None: half of
    `tokens`, and `tokens`). `ruler_tasks` are from RULER_TASKS, with `ruler_samples` prompts for
    each task and length. `thresholds` are for all settings. With None, each rule of mass has those
    of SWEEPS, and RULER has the threshold of the settings. `settings` are names of presets, GIVEN
    for `config`, or changes to it such as "kv_block_size=64,window=0". `selections` are from
    COMPARED and run beside dense. RULER runs PBS alone."""

    model: str | None = None
    texts: tuple[str, ...] = ()
    tokens: int = 8192
    thresholds: tuple[float, ...] | None = None
    probes: tuple[str, ...] = PROBES
    depths: int = 4
    lengths: tuple[int, ...] | None = None
    ruler_tasks: tuple[str, ...] = RULER_TASKS
    ruler_samples: int = 25
    settings: tuple[str, ...] = (GIVEN,)
    selections: tuple[str, ...] = COMPARED
    config: PBSConfig = dataclasses.field(default_factory=PBSConfig)
    device: str = "auto"
    csv: str | None = None
    picture: str | None = None
    heads_csv: str | None = None
    heads_picture: str | None = None


@dataclasses.dataclass(frozen=True)
class ScoresOptions:
    """Each of `presets` runs at each length of `tokens`."""

    presets: tuple[str, ...] = ("llama-3.1-8b", "smollm2-135m", "qwen2.5-1.5b")
    tokens: tuple[int, ...] = (8192, 32768, 131072)
    rounds: int = 5
    budget_ms: float = 20.0
    device: str = "auto"
    csv: str | None = None


@dataclasses.dataclass(frozen=True)
class LongOptions:
    """`settings` is one of SETTINGS. `permute_per` and `kv_block_sizes` are None for those of the
    settings. `density` is the share of the causal block pairs to visit, or None for that of the
    settings. `samples` is the number of rows to check."""

    preset: str = "llama-3.1-8b"
    settings: str = DEFAULT
    tokens: tuple[int, ...] = (1048576,)
    density: float | None = None
    permute_per: tuple[str, ...] | None = None
    kv_block_sizes: tuple[int, ...] | None = None
    samples: int = 24
    device: str = "auto"
    csv: str | None = None


@dataclasses.dataclass(frozen=True)
class CpuOptions:
    """Every combination runs. `settings` is one of SETTINGS. `permute_per` and `kv_block_sizes` are
    None for those of the settings. `thresholds` is None for those of SWEEPS. Each of `seeds` gives
    a random input."""

    presets: tuple[str, ...] = ("smollm2-135m",)
    settings: str = DEFAULT
    tokens: tuple[int, ...] = (8192,)
    dtypes: tuple[str, ...] = ("float32",)
    permute_per: tuple[str, ...] | None = None
    kv_block_sizes: tuple[int, ...] | None = None
    thresholds: tuple[float, ...] | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    rounds: int = 5
    csv: str | None = None
