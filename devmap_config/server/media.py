"""Reads images and sound in requests: only data within them, never a URL, and no more than the plan has room for."""

from __future__ import annotations

import base64
import binascii
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from devmap_config.files import FileError
from devmap_config.profile.schema import MOST_PIXELS
from devmap_config.runner.context import (
    PLAN_MEDIA,
    require_room_for_inputs,
    require_room_for_media,
    require_room_for_sound,
)
from devmap_config.runner.demonstration import numbers_planned, running
from devmap_config.runner.inputs import media_inputs, takes_images, takes_sound
from devmap_config.runner.loading import RunnerError
from devmap_config.runner.media import image_of, require_pillow, sound_of
from devmap_config.runner.processors import load_processor
from devmap_config.server.requests import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from devmap_config.graph.costs import Measurement, WorkloadShape
    from devmap_config.runner.inputs import ModelInputs
    from devmap_config.runner.loading import LoadRequest
    from devmap_config.runner.media import Sound
    from devmap_config.server.requests import GenerationRequest

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
"""The formats of images that are read, which are OpenAI's; Pillow's many others are not exposed to strangers."""

MARKS = ("image_token", "boi_token", "audio_token", "video_token")
"""The attributes of processors for the marks of images and sound in a text."""


@dataclass(frozen=True, kw_only=True)
class MediaReader:
    """Makes a model's inputs for requests with images or sound, or says why they are not supported.

    Attributes:
        planned: the workload that the plan was measured with; `None` if only with text.
        processor: the checkpoint's processor; `None` if there is none, or none is needed.
        reason: why images and sound are not supported; `None` if they are.
        most_numbers: the number of elements of the planned images and sound.
    """

    planned: WorkloadShape | None = None
    processor: Any = None
    reason: str | None = f"none are planned: {PLAN_MEDIA}"
    most_numbers: int = 0

    def of_model(self, model: PreTrainedModel, request: LoadRequest) -> MediaReader:
        """Return the reader for the loaded model.

        Raises:
            RunnerError: if the model does not run with the planned inputs.
        """
        if self.planned is None:
            return self
        return replace(self, most_numbers=numbers_planned(model, request, self.planned))

    def require_text(self, text: str) -> None:
        """Check that a text contains no mark of an image or a sound.

        Raises:
            RequestError: if it does.
        """
        for mark in filter(None, (getattr(self.processor, name, None) for name in MARKS)):
            if mark in text:
                raise RequestError(f"a text holds `{mark}`, which stands for an image or a sound: leave it out")

    def inputs(self, asked: GenerationRequest, model_class: Any, tokenizer: Any) -> ModelInputs:
        """Return a model's inputs for a chat with images or sound.

        Raises:
            RequestError: if they are of an unsupported kind, or more than the plan has room for.
            RunnerError: if the processor or the chat template does not take them.
        """
        name, planned = model_class.__name__, self.planned
        for what, urls, is_taken in (
            ("images", asked.images, takes_images(model_class)),
            ("sounds", asked.sounds, takes_sound(model_class)),
        ):
            if not urls:
                continue
            place = next(iter(urls))
            if not is_taken:
                raise _refusal(place, f"{name} takes no {what}")
            if planned is None or self.reason is not None:
                raise _refusal(place, f"no {what} are taken: {self.reason}")
            with _refusing_field(place):
                require_room_for_media(planned, **{what: len(urls)})
        images = tuple(_image(place, url, MOST_PIXELS // len(asked.images)) for place, url in asked.images.items())
        sounds = tuple(self._sound(place, data) for place, data in asked.sounds.items())
        given = replace(asked.given, images=images, sounds=sounds)
        inputs = media_inputs(model_class, self.processor, tokenizer, given)
        try:
            require_room_for_inputs(self.most_numbers, inputs)
        except RunnerError as error:
            raise RequestError(f"{error}: {error.help}", param=asked.given_by) from None
        return inputs

    def _sound(self, place: str, data: str) -> Sound:
        with _refusing_field(place):
            sound = sound_of(_decoded(data))
            if self.planned is not None:
                require_room_for_sound(self.planned, sound)
        return sound


def media_reader(measurement: Measurement | None, request: LoadRequest) -> MediaReader:
    """Return the reader of images and sound in requests, for a model that will be loaded."""
    media = None if measurement is None else measurement.media
    if measurement is None or media is None:
        return MediaReader()
    planned = measurement.workload
    try:
        if media.problem is not None:
            return MediaReader(reason=f"the plan was not tried with any ({media.reason})")
        if planned.images:
            require_pillow()
        with running(request):
            processor = load_processor(request, of_images=planned.images > 0, with_text=True)
    except RunnerError as error:
        return MediaReader(reason=str(error))
    return MediaReader(planned=planned, processor=processor, reason=None)


def _image(place: str, url: str, most_pixels: int) -> Any:
    head, comma, data = url.partition(",")
    if not head.lower().startswith("data:"):
        raise _refusal(place, "it is an address, and nothing is fetched: send the image itself, as a `data:` URL")
    if not comma or not head.lower().endswith(";base64"):
        raise _refusal(place, "it is no image: send one as `data:image/png;base64,` and its file in base64")
    with _refusing_field(place):
        return image_of(_decoded(data), formats=FORMATS, most_pixels=most_pixels)


def _decoded(data: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise FileError("is not in base64", "syntax", "encode the whole file so") from None


@contextmanager
def _refusing_field(place: str) -> Iterator[None]:
    """Turn errors of reading the content of a field, or of its size, into a refusal of that field."""
    try:
        yield
    except RunnerError as error:
        raise _refusal(place, str(error)) from None
    except FileError as error:
        raise RequestError(f"`{place}` {error}: {error.help}", param=place) from None


def _refusal(place: str, reason: str) -> RequestError:
    return RequestError(f"`{place}` is refused: {reason}", param=place)
