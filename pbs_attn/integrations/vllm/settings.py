"""The settings of the user, from --additional-config or an environment variable."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ...config import PBSConfig, check_config
from .route import Settings

KEY = "pbs_attn"  # of --additional-config
VARIABLE = "PBS_ATTN_VLLM"
PRESETS = ("balanced", "fast", "accurate", "paper")
MIN_TOKENS = 4096


def read_settings(additional: object, environment: Mapping[str, str]) -> Settings:
    """The settings of this server.

    Args:
        additional: vLLM's `additional_config`. Its entry "pbs_attn" overrides the environment.
        environment: its variable PBS_ATTN_VLLM holds a JSON object of the same form.

    Raises:
        TypeError, ValueError: if a name or a value is not valid.
    """
    given = _from_environment(environment.get(VARIABLE, ""))
    if isinstance(additional, Mapping):
        given |= _check_mapping("additional_config['pbs_attn']", additional.get(KEY, {}))
    min_tokens = given.pop("min_tokens", MIN_TOKENS)
    if not isinstance(min_tokens, int) or isinstance(min_tokens, bool) or min_tokens < 1:
        raise ValueError(f"min_tokens must be a positive int, got {min_tokens!r}")
    return Settings(_config(given), min_tokens)


def _from_environment(text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    return _check_mapping(VARIABLE, value)


def _check_mapping(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a JSON object of settings, got {value!r}")
    return dict(value)


def _config(given: dict[str, Any]) -> PBSConfig:
    preset = given.pop("preset", PRESETS[0])
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {PRESETS}, got {preset!r}")
    fields = [field.name for field in dataclasses.fields(PBSConfig)]
    for name in given:
        if name not in fields:
            allowed = ("preset", "min_tokens", *fields)
            raise ValueError(f"settings of pbs_attn must be among {allowed}, got {name!r}")
    config = dataclasses.replace(getattr(PBSConfig, preset)(), **given)
    check_config(config)
    return config
