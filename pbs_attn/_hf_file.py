"""Reads facts about attention layers from the file of a transformers model."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import CodeType, ModuleType
from typing import Any, NamedTuple

from ._hf_trace import constant_in_traces


class Abilities(NamedTuple):
    """The abilities that the classes of a file declare."""

    uses_interface: bool
    supports_sdpa: bool
    computes_on_masks: bool


@constant_in_traces
def uses_interface(file_name: str) -> bool:
    """Whether the model of a configuration_*.py or modeling_*.py works with a registered name.

    transformers builds its masks for every model, and does not check registered names. A model that
    computes attention itself would read a missing mask as a mask that hides nothing.
    """
    return _abilities_of(file_name).uses_interface


@constant_in_traces
def supports_sdpa(file_name: str) -> bool:
    """Whether SDPA can compute the attention of the model of that file. If not, its layers may
    compute with the mask too, so they must get the mask of eager attention: additive, and never
    None."""
    return _abilities_of(file_name).supports_sdpa


@constant_in_traces
def needs_mask(file_name: str) -> bool:
    """Whether the attention layers of that file compute with their mask, so that a missing mask
    would hide nothing. Files of transformers 5 say so when they ask for the mask."""
    return _abilities_of(file_name).computes_on_masks


def _abilities_of(file_name: str) -> Abilities:
    file = sys.modules.get(file_name.replace("configuration_", "modeling_"))
    if file is None or "modeling_" not in file.__name__:
        return Abilities(True, True, False)  # not the file of a model
    return _read_abilities(file)


@functools.cache
def _read_abilities(file: ModuleType) -> Abilities:
    classes = [cls for cls in vars(file).values() if isinstance(cls, type)]
    classes = [cls for cls in classes if cls.__module__ == file.__name__]
    has_backend = any(getattr(cls, "_supports_attention_backend", False) for cls in classes)
    has_sdpa = any(getattr(cls, "_supports_sdpa", False) for cls in classes)
    has_table = hasattr(file, "ALL_ATTENTION_FUNCTIONS")
    computes_on_masks = any(calls_interface(cls) and _computes_on_masks(cls) for cls in classes)
    return Abilities(has_backend or (has_sdpa and has_table), has_sdpa, computes_on_masks)


def _computes_on_masks(layer_type: type) -> bool:
    """Whether a method of the layer itself makes a new mask from the one that it gets."""
    methods = [m for name, m in vars(layer_type).items() if "mask" in name and callable(m)]
    codes = [getattr(inspect.unwrap(method), "__code__", None) for method in methods]
    return any(code is not None and "attention_mask" in code.co_varnames for code in codes)


def eager_function(layer_type: type) -> Callable[..., Any] | None:
    """The eager attention function beside the class, or beside one that it inherits from."""
    for cls in layer_type.__mro__:
        file = sys.modules.get(cls.__module__)
        function: Callable[..., Any] | None = getattr(file, "eager_attention_forward", None)
        if function is not None:
            return function
    return None


def calls_interface(layer_type: type[Any]) -> bool:
    """Whether the layer looks its attention function up in transformers' table."""
    code = _forward_code(layer_type)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def keywords(layer_type: type) -> set[str]:
    """Names of the keyword arguments in the layer's forward, those of its attention function among
    them. An upper bound: any other string there counts as well."""
    code = _forward_code(layer_type)
    if code is None or not calls_interface(layer_type):
        return set()
    # Depending on its version, Python keeps the names of a call as one tuple or as strings.
    constants = [c if isinstance(c, tuple) else (c,) for c in code.co_consts]
    return {name for names in constants for name in names if isinstance(name, str)}


def _forward_code(layer_type: type) -> CodeType | None:
    forward = getattr(layer_type, "forward", None)
    return None if forward is None else getattr(inspect.unwrap(forward), "__code__", None)


def mask_makers(layer_type: type) -> list[str]:
    """Names of the functions of transformers.masking_utils that make the masks of the file. A few
    models of transformers 4 use none of them: they always build an explicit mask themselves."""
    names = vars(sys.modules.get(layer_type.__module__, object))
    return [name for name in names if name.startswith("create_") and "mask" in name]
