"""Images or sound as a model is given them, and what its config says of the parts that take them."""

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
    """Images or sound as a model is given them.

    `tensors` are named as its forward's parameters, `placeholders` is how many tokens of each sequence stand for them,
    and `token` the one that does. `beside` makes what depends on the prompt, from its tokens and where these stand.
    """

    tensors: Tensors
    placeholders: int = 0
    token: int | None = None
    beside: Callable[[torch.Tensor, torch.Tensor], Tensors] = field(default=lambda *_: {})


def stated(config: PretrainedConfig, *names: str) -> Any:
    """Return the first of these that a config says something of, or one within it."""
    for each in (
        config,
        *(getattr(config, name, None) for name in ("thinker_config", "vision_config", "audio_config")),
    ):
        for name in names:
            if (value := getattr(each, name, None)) is not None:
                return value
    return None


def config_within(config: PretrainedConfig, names: tuple[str, ...]) -> PretrainedConfig:
    """Return the config of a tower, within those around it; some make one of their own kind within anew."""
    inner = next((found for name in names if hasattr(found := getattr(config, name, None), "to_dict")), None)
    return config if inner is None or type(inner) is type(config) else config_within(inner, names)
