"""Finds inputs for the images and the sound of a workload that the model's own code accepts.

The number of tokens that stand for an image is the number of features that the model computes for it.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from devmap_config.graph.failures import NoMediaError, OtherInputsError
from devmap_config.graph.images import BY_PARAMETER, image_candidates
from devmap_config.graph.media import Media, stated
from devmap_config.graph.sounds import SOUND_NAMES, require_one_window, sound_candidates
from devmap_config.libraries.torch import tree_leaves
from devmap_config.wording import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

    from devmap_config.graph.costs import WorkloadShape
    from devmap_config.graph.media import Tensors

IMAGE_TOKENS = (
    *("image_token_id", "image_token_index", "media_placeholder_token_id", "image_soft_token_id"),
    *("boi_token_id", "img_context_token_id", "video_token_index"),
)
FEATURES = {"images": ("image", "video"), "sound": ("audio",)}
"""The words in the names of the methods that compute features; a model for videos is given images as short videos."""

AUDIO_TOKENS = ("audio_token_id", "audio_token_index", "audio_soft_token_id")


def media_of(model: PreTrainedModel, workload: WorkloadShape) -> tuple[Media, ...]:
    """Return the inputs of a model for the images and the sound of a workload.

    To be called within a context of tensors without data whose values are tracked.

    Raises:
        NoMediaError: if the model takes none, or less sound at once.
        MissingSizeError: if the inputs depend on the size of images, and the workload does not state it.
        OtherInputsError: if the model takes them in an unknown way.
    """
    media = []
    accepted = set(inspect.signature(model.forward).parameters)
    if workload.images and not accepted & {"pixel_values", *BY_PARAMETER}:
        raise NoMediaError("it takes no images")
    if workload.audio_seconds and not accepted & {*SOUND_NAMES}:
        raise NoMediaError("it takes no sound")
    if workload.images:
        media.append(_first_accepted(model, workload, image_candidates(model, workload), IMAGE_TOKENS, "images"))
    if workload.audio_seconds:
        sound = _first_accepted(model, workload, sound_candidates(model, workload), AUDIO_TOKENS, "sound")
        require_one_window(model, workload, sound)
        media.append(sound)
    return tuple(media)


def _first_accepted(
    model: PreTrainedModel,
    workload: WorkloadShape,
    candidates: Iterator[Media],
    token_names: tuple[str, ...],
    features: str,
) -> Media:
    """Return the first candidate from which the model's own code computes features, with their number."""
    error: Exception = OtherInputsError("it takes none that is known")
    for media in candidates:
        try:
            rows = media.placeholders * workload.batch_size or _feature_rows(model, media.tensors, features)
        except OtherInputsError:
            raise
        except Exception as raised:  # a model's code may raise anything on inputs that it does not take
            error = raised
            continue
        return Media(
            tensors=media.tensors,
            placeholders=rows // workload.batch_size,
            token=stated(model.config, *token_names),
            beside=media.beside,
        )
    raise OtherInputsError(f"the model computes no features from these inputs: {first_line(error)}") from error


def _feature_rows(model: PreTrainedModel, tensors: Tensors, kind: str) -> int:
    """Return the number of features that a model computes for the media, which is the number of tokens in the prompt.

    It is 0 for the features of an encoder that a decoder attends to.
    """
    owners = (model, getattr(model, "model", None), getattr(model, "thinker", None))
    methods = (getattr(owner, f"get_{name}_features", None) for name in FEATURES[kind] for owner in owners)
    if (method := next(filter(None, methods), None)) is not None:
        return _rows(_called(method, tensors))
    if model.config.is_encoder_decoder:
        encoder = model.get_encoder()
        if getattr(encoder, "main_input_name", None) in tensors:
            _called(encoder, tensors)
        return 0
    return _projected_rows(model, tensors) if kind == "sound" else 0


def _called(method: Callable[..., Any], tensors: Tensors) -> Any:
    parameters = inspect.signature(getattr(method, "forward", method)).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    given = {key: value for key, value in tensors.items() if takes_any or key in parameters}
    return method(**given, **({"return_dict": True} if takes_any or "return_dict" in parameters else {}))


def _rows(output: Any) -> int:
    features = getattr(output, "pooler_output", None)
    if features is None:
        features = getattr(output, "last_hidden_state", output)
    return sum(leaf.numel() // leaf.shape[-1] for leaf in tree_leaves(features) if isinstance(leaf, torch.Tensor))


def _projected_rows(model: PreTrainedModel, tensors: Tensors) -> int:
    """Return the number of rows of a projector's output, for models without a method for features (Qwen2-Audio)."""
    if any(not bool(tensor.all()) for name, tensor in tensors.items() if name.endswith("_mask")):
        raise ValueError("what a mask leaves out of what a projector gives is not known")
    projector = next((module for name, module in model.named_modules() if name.endswith("projector")), None)
    token = stated(model.config, *AUDIO_TOKENS)
    if projector is None or token is None:
        return 0
    rows: list[int] = []
    watched = projector.register_forward_hook(lambda _module, _inputs, output: rows.append(_rows(output)))
    prompt = torch.full((len(next(iter(tensors.values()))), 2), token)
    try:
        model(input_ids=prompt, attention_mask=torch.ones_like(prompt), **tensors)
    except Exception:  # fails because two tokens are too few, after the features have been counted
        if not rows:
            raise
    finally:
        watched.remove()
    return sum(rows)
