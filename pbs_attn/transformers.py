"""PBS attention for the prefill of Hugging Face transformers models.

    pbs_attn.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="pbs_attn")
    print(pbs_attn.transformers.explain(model))

Every call of an attention layer is sent one of four ways by `route`, the only place that decides:
"pbs" (torch.ops.pbs.attention), "sdpa" (transformers' own SDPA), "eager" (the eager function of the
model's file, where SDPA cannot express the layer) or "unsupported" (an error).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import torch

from ._hf_explain import LayerRoute, LayerRoutes, explain
from ._hf_mask import make_mask_function
from ._hf_route import REGISTERED, Call, Settings, has, route
from .attention import attention
from .config import PBSConfig

__all__ = ["LayerRoute", "LayerRoutes", "explain", "register"]

MIN_TRANSFORMERS = (4, 56)

_DEFAULT = PBSConfig()

_AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def register(
    name: str = "pbs_attn", *, config: PBSConfig = _DEFAULT, min_tokens: int = 1024
) -> None:
    """Registers PBS attention with transformers (>= 4.56) as `attn_implementation=name`.

    Afterwards `from_pretrained(..., attn_implementation=name)` and
    `model.set_attn_implementation(name)` work for every model that uses transformers' attention
    interface. Several names, each with its own config, may stand side by side; the same name again
    replaces its config. PBS is inference only: run the model under torch.no_grad() or generate(),
    since a call that needs gradients takes SDPA.

    Args:
        name: letters, digits, "_", "-" and "."; none of transformers' own names.
        config: block sizes, threshold and so on of the op (arXiv 2510.21270).
        min_tokens: prompts with fewer keys than this take SDPA.

    Raises:
        ImportError: transformers is missing or older than 4.56.
        TypeError, ValueError: a bad argument.
    """
    _check_register_arguments(name, config, min_tokens)
    transformers = _import_transformers()
    settings = Settings(config, min_tokens)
    if name not in REGISTERED and name in transformers.AttentionInterface().valid_keys():
        raise ValueError(f"name must not be taken in transformers already, got {name!r}")
    mask_function = make_mask_function(transformers.masking_utils)
    sdpa = transformers.integrations.sdpa_attention.sdpa_attention_forward
    transformers.AttentionMaskInterface.register(name, mask_function)
    transformers.AttentionInterface.register(name, _make_attention_function(settings, sdpa))
    REGISTERED[name] = settings


def _check_register_arguments(name: object, config: object, min_tokens: object) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"name must be letters, digits, '_', '-' and '.', got {name!r}")
    # transformers looks for these words in a name and then takes the path of its own function.
    if name == "eager" or any(word in name for word in ("flash", "sdpa", "flex_attention")):
        raise ValueError(f"name must not resemble one of transformers' own, got {name!r}")
    if not isinstance(config, PBSConfig):
        raise TypeError(f"config must be a PBSConfig, got {type(config).__name__}")
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


def _make_attention_function(settings: Settings, sdpa: _AttentionFunction) -> _AttentionFunction:
    def pbs_attention_forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query (B, Hq, Nq, D), key and value (B, Hkv, Nkv, D) -> (B, Nq, Hq, D), None."""
        call = _describe_call(module, query, key, value, attention_mask, dropout, is_causal, kwargs)
        kind, reason = route(call, settings)
        if kind == "pbs":
            out = attention(query, key, value, scale=scaling, config=settings.config)
            return out.transpose(1, 2).contiguous(), None
        if kind == "unsupported":
            raise ValueError(f"attn_implementation must be transformers' own here: {reason}")
        mask = attention_mask
        if mask is None and _needs_mask(call, kind):
            mask = _causal_mask(call, query.device)
        if kind == "eager":
            eager = _eager_function(module)
            mask = _additive(mask, query.dtype)
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            out, _ = eager(
                module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
            )
            return out, None
        # The order matters to torch.compile: num_queries > 1 may be symbolic, the result may not.
        is_causal = call.num_queries > 1 and mask is None and call.is_causal
        return sdpa(
            module, query, key, value, mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
        )  # fmt: skip

    return pbs_attention_forward


def _describe_call(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> Call:
    same_dtype = query.dtype == key.dtype == value.dtype
    needs_grad = query.requires_grad or key.requires_grad or value.requires_grad
    return Call(
        num_queries=query.shape[2],
        num_keys=key.shape[2],
        head_dim=query.shape[3],
        value_head_dim=value.shape[3],
        dtype=query.dtype if same_dtype else None,
        device_type=query.device.type,
        is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        has_mask=attention_mask is not None,
        window=kwargs.get("sliding_window"),
        has_softcap=kwargs.get("softcap") is not None,
        has_sinks=_any_given(kwargs, "s_aux", "sinks") or has(module, "sinks"),
        has_head_mask=kwargs.get("head_mask") is not None,
        has_position_bias=kwargs.get("position_bias") is not None,
        selects_keys=_any_given(kwargs, "indices", "block_indices"),
        has_dropout=bool(dropout),
        has_paged_cache=kwargs.get("cache") is not None,
        needs_grad=torch.is_grad_enabled() and needs_grad,
    )


def _any_given(kwargs: dict[str, Any], *names: str) -> bool:
    return any(kwargs.get(name) is not None for name in names)


def _needs_mask(call: Call, kind: str) -> bool:
    """Whether a call without a mask needs one on its dense way."""
    if not call.is_causal or call.has_paged_cache:
        return False
    if call.window is not None and call.window < call.num_keys:
        return True
    if call.num_queries == 1:
        return False
    # SDPA's is_causal aligns top-left, which is the same only for as many queries as keys.
    return kind == "eager" or call.num_queries < call.num_keys


def _causal_mask(call: Call, device: torch.device) -> torch.Tensor:
    """(1, 1, Nq, Nkv) bool, bottom-right aligned, True where a query sees a key."""
    keys = torch.arange(call.num_keys, device=device)
    queries = torch.arange(call.num_queries, device=device) + call.num_keys - call.num_queries
    distance = queries[:, None] - keys
    visible = distance >= 0
    if call.window is not None:
        visible &= distance < call.window
    return visible[None, None]


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The mask as eager functions add it to the logits. The lowest finite value, not -inf: a row of
    padding sees nothing and would turn into NaN."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _eager_function(module: torch.nn.Module) -> Any:
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise ValueError(
        "attn_implementation must be 'eager' here: the layer needs it, and the file of "
        f"{type(module).__name__} has no eager_attention_forward"
    )
