"""Python-side registrations of torch.ops.pbs: fake kernels, autograd, autocast.

The stable ABI registers CPU and CUDA kernels only. A fake kernel computes output shapes for
torch.compile and torch.export; lengths may be symbolic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor

from . import _library
from ._autograd import carries_tangent, requires_backward
from ._vmap import ROWS, batching_rule
from .config import RESOLVED, SETTINGS, PBSConfig

_library.load()

STAGES = ("score_keys", "sort_segments", "permute_kv", "select_blocks", "attend")
OPERATORS = (*STAGES, "attention")
# Operators of sequences of different lengths. They have no batch dimension for torch.vmap.
SEQUENCE_OPERATORS = ("attention_varlen", "attention_paged", "attention_paged_")
# The arguments of these operators that the host reads.
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seq_lens")
HEAD_DIMS: tuple[int, ...] = _library.build_info()["head_dims"]

_registrations = torch.library.Library("pbs", "FRAGMENT")


def _ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def _arguments(op: str) -> list[Any]:
    arguments: list[Any] = getattr(torch.ops.pbs, op).default._schema.arguments
    return arguments


def _settings(op: str) -> dict[str, str]:
    fields = {field.name for field in dataclasses.fields(PBSConfig)}
    settings = {}
    for argument in _arguments(op):
        name = argument.name
        if argument.kwarg_only and name in fields:
            takes_none = argument.type.kind() == "OptionalType"
            settings[name] = name if takes_none else RESOLVED.get(name, name)
    return settings


SETTINGS.update({op: _settings(op) for op in (*OPERATORS, *SEQUENCE_OPERATORS)})


def _check_one_device(first: Tensor, *others: Tensor) -> None:
    # The dispatcher sends a mix of meta and real tensors here. The kernels check everything else.
    for other in others:
        if other.device != first.device:
            raise RuntimeError(
                f"all tensors must be on one device, got {first.device} and {other.device}"
            )


def _check_lengths(lengths: dict[str, Tensor], first: Tensor) -> None:
    # If the other tensors are on meta, no kernel runs that would check the lengths.
    for name, tensor in lengths.items():
        if tensor.device.type not in ("cpu", "meta" if first.is_meta else "cpu"):
            raise RuntimeError(f"{name} must be on the CPU, got {tensor.device}")


def _fake(op: str) -> Callable[[Callable[..., Any]], None]:
    """Registers a function as the fake kernel of an operator. It is called with all arguments by
    name, including defaults. Its parameters are those that the shapes of the outputs depend on."""
    arguments = _arguments(op)
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}

    def register(shapes: Callable[..., Any]) -> None:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            given = {a.name: arg for a, arg in zip(arguments, args, strict=False)} | kwargs
            tensors = {name: arg for name, arg in given.items() if isinstance(arg, Tensor)}
            lengths = {name: tensors.pop(name) for name in _LENGTHS if name in tensors}
            _check_one_device(*tensors.values())
            _check_lengths(lengths, next(iter(tensors.values())))
            return shapes(**{**defaults, **given})

        torch.library.register_fake(f"pbs::{op}", kernel)

    return register


@_fake("score_keys")
def _(q: Tensor, k: Tensor, permute_per: str, **others: Any) -> Tensor:
    num_heads = q.shape[1] if permute_per == "query_head" else k.shape[1]
    return q.new_empty((q.shape[0], num_heads, k.shape[2]), dtype=torch.float32)


@_fake("sort_segments")
def _(scores: Tensor, **others: Any) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.int32)


@_fake("permute_kv")
def _(
    k: Tensor, v: Tensor, perm: Tensor, kv_block_size: int, **others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_heads, num_kv = perm.shape
    head_dim = k.shape[3]
    permuted = (batch, num_heads, num_kv, head_dim)
    means = (batch, num_heads, _ceil_div(num_kv, kv_block_size), head_dim)
    return k.new_empty(permuted), k.new_empty(permuted), k.new_empty(means, dtype=torch.float32)


@_fake("select_blocks")
def _(
    q: Tensor, k: Tensor, block_size: int, kv_block_size: int | None, **others: Any
) -> tuple[Tensor, Tensor]:
    num_words = _ceil_div(_ceil_div(k.shape[2], kv_block_size or block_size), 32)
    rows = (q.shape[0], q.shape[1], _ceil_div(q.shape[2], block_size))
    return q.new_empty((*rows, num_words), dtype=torch.int32), q.new_empty(rows, dtype=torch.int32)


@_fake("attend")
def _(q: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_fake("attention")
def _(q: Tensor, **others: Any) -> Tensor:
    return torch.empty_like(q)


@_fake("attention_varlen")
def _(q: Tensor, **others: Any) -> Tensor:
    return torch.empty_like(q)


@_fake("attention_paged")
def _(q: Tensor, **others: Any) -> Tensor:
    return torch.empty_like(q)


@_fake("attention_paged_")
def _(**others: Any) -> None:
    return None


def _inference_only(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.pbs, name).default
    is_written = [argument.is_write for argument in _arguments(name)]

    # Under functional transforms, this runs once per level, on the tensors of that level.
    def forward(*args: Any, **kwargs: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if requires_backward(tensors):
            raise RuntimeError(
                f"pbs::{name} has no backward: inputs must not require grad in grad mode, "
                "got one that does; wrap the call in torch.no_grad()"
            )
        if carries_tangent(tensors):
            raise RuntimeError(
                f"pbs::{name} has no derivative: inputs must not carry a forward-mode tangent, "
                "got one that does"
            )
        with torch._C._AutoDispatchBelowAutograd():
            found = op(*args, **kwargs)
        # The backward of another function must not read a saved tensor that this call has written.
        for arg, is_changed in zip(args, is_written, strict=False):
            if is_changed and not arg.is_inference():
                torch.autograd.graph.increment_version(arg)
        return found

    return forward


def _kind(tensor: Tensor) -> str:
    """The kind of a tensor in one word: "strided" if it is dense."""
    if tensor.is_nested:
        return "nested"
    return "quantized" if tensor.is_quantized else str(tensor.layout).rpartition(".")[2].lstrip("_")


def _has_kernel(tensor: Tensor) -> bool:
    return _kind(tensor) == "strided" and tensor.device.type in ("cpu", "cuda", "meta")


# Arguments with rows. k_mean and the scores stay float32 under autocast.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _is_castable(arg: Any) -> bool:
    return isinstance(arg, Tensor) and _has_kernel(arg) and arg.dtype in DTYPES


def _in_autocast_dtype(
    name: str, device_type: str, key: torch._C.DispatchKey
) -> Callable[..., Any]:
    op = getattr(torch.ops.pbs, name).default
    is_cast = [argument.name in ROWS for argument in _arguments(name)]

    def forward(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        cast = [
            arg.to(dtype) if casts and _is_castable(arg) else arg
            for arg, casts in zip(args, is_cast, strict=False)
        ]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*cast, **kwargs)

    return forward


def _refuse_layout(name: str) -> Callable[..., Any]:
    names = [argument.name for argument in _arguments(name)]

    # Runs for every kind of tensor and device that has no kernel of its own.
    def forward(*args: Any, **kwargs: Any) -> Any:
        for argument, tensor in zip(names, args, strict=False):
            if isinstance(tensor, Tensor) and not _has_kernel(tensor):
                raise RuntimeError(
                    f"{argument} must be a dense tensor on the CPU or a CUDA GPU, "
                    f"got {_kind(tensor)} on {tensor.device}"
                )
        raise RuntimeError(f"{names[0]} must be a tensor, got None")

    return forward


def _of_subclass(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda subclass, func, types, args, kwargs: call(*args, **(kwargs or {}))


for _name in (*OPERATORS, *SEQUENCE_OPERATORS):
    _registrations.impl(_name, _inference_only(_name), "Autograd")
    _refuse = _refuse_layout(_name)
    for _kinds in ("CompositeExplicitAutograd", "NestedTensorCPU", "NestedTensorCUDA"):
        _registrations.impl(_name, _refuse, _kinds)
    # A jagged tensor is a Python subclass, which the keys of the dispatcher do not distinguish.
    torch.library.register_torch_dispatch(
        f"pbs::{_name}", NestedTensor, _of_subclass(_refuse), lib=_registrations
    )
    if _name in OPERATORS:
        torch.library.register_vmap(f"pbs::{_name}", batching_rule(_name), lib=_registrations)
    for _device_type, _key in (
        ("cpu", torch._C.DispatchKey.AutocastCPU),
        ("cuda", torch._C.DispatchKey.AutocastCUDA),
    ):
        _registrations.impl(_name, _in_autocast_dtype(_name, _device_type, _key), _key.name)
