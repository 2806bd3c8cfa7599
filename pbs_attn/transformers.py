"""PBS attention for the prefill of Hugging Face transformers models.

    pbs_attn.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="pbs_attn")
    print(pbs_attn.transformers.explain(model))  # what a prompt would take
    print(pbs_attn.transformers.routes())  # what the calls did take

`route` alone decides which of four routes a call of an attention layer takes: "pbs"
(torch.ops.pbs.attention), "sdpa" (transformers' own SDPA), "eager" (the eager function of the
model's file, if SDPA cannot express the layer) or "unsupported" (an error). A padded or packed
batch is split into its sequences, and each of them is such a call.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._hf_call import always_masked, describe_call
from ._hf_counts import RouteCount, RouteCounts, count, forget, routes, warn_once
from ._hf_explain import LayerRoute, LayerRoutes, explain
from ._hf_file import eager_function
from ._hf_mask import make_mask_function
from ._hf_route import REGISTERED, Call, Route, Settings, route
from ._hf_rows import Row, RowMask, attend_rows
from ._hf_trace import mark
from .attention import attention
from .config import PBSConfig, check_config

__all__ = [
    "LayerRoute",
    "LayerRoutes",
    "RouteCount",
    "RouteCounts",
    "explain",
    "register",
    "routes",
]

MIN_TRANSFORMERS = (4, 56)

_DEFAULT = PBSConfig()

_AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def register(
    name: str = "pbs_attn", *, config: PBSConfig = _DEFAULT, min_tokens: int = 1024
) -> None:
    """Registers PBS attention with transformers (>= 4.56) as `attn_implementation=name`.

    Afterwards `from_pretrained(..., attn_implementation=name)` and
    `model.set_attn_implementation(name)` work for every model that uses transformers' attention
    interface. You may register several names, each with its own config. To replace the config of a
    name, register it again. PBS is for inference only. Run the model in eval mode, under
    torch.no_grad() or generate(): a layer in training mode takes SDPA, and so does a call that
    needs gradients.

    Args:
        name: letters, digits, "_", "-" and "."; none of transformers' own names.
        config: the settings of the operator (arXiv 2510.21270).
        min_tokens: prompts with fewer keys than this take SDPA, and so do sequences of a padded or
            packed batch.

    Raises:
        ImportError: if transformers is missing or older than 4.56.
        TypeError: if ``config`` is not a PBSConfig.
        ValueError: if ``name`` or ``min_tokens`` breaks a rule above.
    """
    _check_register_arguments(name, config, min_tokens)
    transformers = _import_transformers()
    settings = Settings(name, config, min_tokens)
    if name not in REGISTERED and name in transformers.AttentionInterface().valid_keys():
        raise ValueError(f"name must not be taken in transformers already, got {name!r}")
    mask_function = make_mask_function(transformers.masking_utils)
    sdpa = transformers.integrations.sdpa_attention.sdpa_attention_forward
    transformers.AttentionMaskInterface.register(name, mask_function)
    transformers.AttentionInterface.register(name, _make_attention_function(settings, sdpa))
    _refuse_continuous_batching()
    mark()
    REGISTERED[name] = settings
    forget(name)


def _check_register_arguments(name: object, config: object, min_tokens: object) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"name must be letters, digits, '_', '-' and '.', got {name!r}")
    # transformers looks for these words in a name, and then uses the code of its own function.
    if name == "eager" or any(word in name for word in ("flash", "sdpa", "flex_attention")):
        raise ValueError(f"name must not resemble one of transformers' own, got {name!r}")
    check_config(config)
    if not isinstance(min_tokens, int) or isinstance(min_tokens, bool) or min_tokens < 1:
        raise ValueError(f"min_tokens must be a positive int, got {min_tokens!r}")


def _import_transformers() -> Any:
    needed = ".".join(map(str, MIN_TRANSFORMERS))
    try:
        import transformers
    except ImportError as error:
        message = f"pbs_attn.transformers needs transformers >= {needed}, which is not installed"
        raise ImportError(message) from error
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < MIN_TRANSFORMERS:
        raise ImportError(
            f"pbs_attn.transformers needs transformers >= {needed}, got {transformers.__version__}"
        )
    import transformers.integrations.sdpa_attention
    import transformers.masking_utils

    return transformers


def _refuse_continuous_batching() -> None:
    """Makes transformers' continuous batching refuse our names before it starts. It has no
    registry, and its behaviour with an unknown name differs between versions."""
    from transformers.generation.continuous_batching import ContinuousBatchingManager

    manager: Any = ContinuousBatchingManager
    original = manager.__init__
    if hasattr(original, "refuses_pbs"):
        return

    @functools.wraps(original)
    def checked(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        name = model.config._attn_implementation
        if name in REGISTERED:
            raise ValueError(
                "attn_implementation must be transformers' own for continuous batching, whose "
                f"cache in pages PBS cannot read, got {name!r}"
            )
        original(self, model, *args, **kwargs)

    manager.__init__ = checked
    manager.__init__.refuses_pbs = True


def _make_attention_function(settings: Settings, sdpa: _AttentionFunction) -> _AttentionFunction:
    def pbs_attention_forward(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """query (B, Hq, Nq, D), key and value (B, Hkv, Nkv, D) -> (B, Nq, Hq, D), None."""
        call = describe_call(module, query, key, value, attention_mask, dropout, is_causal, kwargs)
        options = {"dropout": dropout, "scaling": scaling, **kwargs}
        return attend(call, module, query, key, value, attention_mask, options), None

    def attend(
        call: Call,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        decided = route(call, settings)
        if decided.kind == "pbs" and call.rows is not None:

            def attend_row(row: Row, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                return attend(call.of_row(row), module, query, key, value, None, options)

            return attend_rows(call.rows, attend_row, query, key, value, call.dtype)
        count(decided, call, settings)
        if decided.kind == "pbs":
            out = attention(query, key, value, scale=options["scaling"], config=settings.config)
            return out.transpose(1, 2).contiguous()
        if decided.kind == "unsupported":
            raise ValueError(
                f"attn_implementation must be transformers' own here: {decided.reason}"
            )
        _speak_up(module, call, decided, settings)
        if isinstance(mask, RowMask):
            mask = mask.explicit()
        if mask is None and _needs_mask(call, decided.kind):
            mask = _causal_mask(call, query.device)
        if decided.kind == "eager":
            if options["scaling"] is None:
                options = {**options, "scaling": query.shape[-1] ** -0.5}
            mask = _additive(mask, query.dtype)
            out, _ = _eager(module)(module, query, key, value, mask, **options)
            return out
        # The order matters to torch.compile: num_queries > 1 may be symbolic, the result may not.
        is_causal = call.num_queries > 1 and mask is None and call.is_causal is not False
        out, _ = sdpa(module, query, key, value, mask, is_causal=is_causal, **options)
        return out

    return pbs_attention_forward


def _speak_up(module: torch.nn.Module, call: Call, decided: Route, settings: Settings) -> None:
    """Warns if a call goes dense for a reason that explain() cannot foresee: its mask, or
    gradients.

    Raises:
        RuntimeError: in the second pass of a reentrant checkpoint, whose first pass took PBS.
    """
    if not (call.has_mask or call.needs_grad):
        return
    foreseen = call._replace(has_mask=always_masked(module), needs_grad=False)
    if route(foreseen, settings).kind != "pbs":
        return
    if call.needs_grad and not call.has_mask and _recomputes_a_checkpoint():
        raise RuntimeError(
            "a layer under gradient checkpointing with use_reentrant=True must be in training "
            "mode, got one in eval mode, whose first pass took PBS; call model.train() or pass "
            "use_reentrant=False"
        )
    warn_once(decided, settings)


def _recomputes_a_checkpoint() -> bool:
    """Whether this is the backward of torch.utils.checkpoint(use_reentrant=True) or a similar
    function, which runs the forward a second time."""
    if torch.compiler.is_compiling():
        return False
    node = torch._C._current_autograd_node()
    return type(node).__name__ == "CheckpointFunctionBackward"


def _needs_mask(call: Call, kind: str) -> bool:
    """Whether a call without a mask needs one on its dense route."""
    if call.is_causal is False:
        return False
    if call.window is not None and call.window < call.num_keys:
        return True
    if call.num_queries == 1:
        return False
    # SDPA's is_causal aligns top-left, which is the same only if there are as many queries as keys.
    return kind == "eager" or call.num_queries < call.num_keys


def _causal_mask(call: Call, device: torch.device) -> Tensor:
    """(1, 1, Nq, Nkv) bool, bottom-right aligned, True where a query sees a key."""
    keys = torch.arange(call.num_keys, device=device)
    queries = torch.arange(call.num_queries, device=device) + call.num_keys - call.num_queries
    distance = queries[:, None] - keys
    visible = distance >= 0
    if call.window is not None:
        visible &= distance < call.window
    return visible[None, None]


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask that eager functions add to the logits. It has the lowest finite value instead of
    -inf, because a row of padding sees nothing and would become NaN."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _eager(module: torch.nn.Module) -> _AttentionFunction:
    function = eager_function(type(module))
    if function is None:
        raise ValueError(
            "attn_implementation must be 'eager' here: the layer needs it, and the file of "
            f"{type(module).__name__} has no eager_attention_forward"
        )
    return function
