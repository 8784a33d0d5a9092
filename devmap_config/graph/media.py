"""`Media`: the inputs of a model for images or sound, and readers of the configs of its towers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig

Tensors = dict[str, torch.Tensor]
"""Tensors by the names of a forward's parameters."""


@dataclass(frozen=True, kw_only=True)
class Media:
    """The inputs of a model for images or sound.

    `tensors` are named like the forward's parameters. `placeholders` is the number of tokens of each sequence that
    stand for them, and `token` is the id of these. `beside` makes the inputs that depend on the prompt, from its tokens
    and the positions of these.
    """

    tensors: Tensors
    placeholders: int = 0
    token: int | None = None
    beside: Callable[[torch.Tensor, torch.Tensor], Tensors] = field(default=lambda *_: {})


def stated(config: PretrainedConfig, *names: str) -> Any:
    """Return the first of these values that a config, or one within it, has."""
    for section in (
        config,
        *(getattr(config, name, None) for name in ("thinker_config", "vision_config", "audio_config")),
    ):
        for name in names:
            if (value := getattr(section, name, None)) is not None:
                return value
    return None


def config_within(config: PretrainedConfig, names: tuple[str, ...]) -> PretrainedConfig:
    """Return the inner config of a tower, by the names of the configs around it; some configs nest one of their own
    kind.
    """
    inner = next((inner for name in names if hasattr(inner := getattr(config, name, None), "to_dict")), None)
    return config if inner is None or type(inner) is type(config) else config_within(inner, names)
