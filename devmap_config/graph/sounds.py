"""Makes inputs for sound, with the shapes that a model's feature extractor would make, but without the extractor."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from devmap_config.graph.failures import NoMediaError
from devmap_config.graph.media import Media, config_within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PretrainedConfig, PreTrainedModel

    from devmap_config.graph.costs import WorkloadShape
    from devmap_config.graph.media import Tensors

AUDIO_CONFIGS = (
    "audio_config",
    "encoder_config",
    "speech_encoder",
    "audio_encoder_config",
    "encoder",
    "thinker_config",
)

BIN_NAMES = (
    *("num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim", "feat_in", "input_feat_size", "n_mels"),
    "input_size",
)

FRAMES_PER_SECOND = 100
"""Spectrograms have a frame for every ten milliseconds."""

FRAMES_AT_ONCE = 16
"""The most frames that are grouped."""

STACKED, STACKED_EVERY = 7, 6
"""The number of frames that are stacked into one, and the distance between the first of each, if they overlap
(FunASR).
"""

USUAL_BINS = (128, 80)

SAMPLES_PER_SECOND = 16_000


@dataclass(frozen=True)
class _Sound:
    """The config's description of the sound that a model takes, and its length."""

    model: PreTrainedModel
    workload: WorkloadShape
    accepted: frozenset[str]

    @property
    def audio(self) -> PretrainedConfig:
        return config_within(self.model.config, AUDIO_CONFIGS)

    @property
    def bins(self) -> tuple[int, ...]:
        """The possible numbers of frequencies of a spectrogram, by the config."""
        stated = (getattr(config, name, None) for name in BIN_NAMES for config in (self.audio, self.model.config))
        return tuple(filter(None, stated))[:1] or USUAL_BINS

    @property
    def frames(self) -> int:
        frames = self.workload.audio_seconds * FRAMES_PER_SECOND
        return frames + -frames % FRAMES_AT_ONCE

    @property
    def samples(self) -> int:
        rate = getattr(self.audio, "sampling_rate", None)
        return self.workload.audio_seconds * (rate if isinstance(rate, int) else SAMPLES_PER_SECOND)

    @property
    def window(self) -> int:
        """The frames of a window; encoders that take windows take whole ones."""
        return 2 * (getattr(self.audio, "max_source_positions", None) or 1500)

    @property
    def windows(self) -> int:
        """The number of windows; an encoder takes them one after the other."""
        one_by_one = self.model.config.is_encoder_decoder
        return 1 if one_by_one else math.ceil(self.workload.audio_seconds * FRAMES_PER_SECOND / self.window)

    def ones(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype or self.model.dtype)


def sound_candidates(model: PreTrainedModel, workload: WorkloadShape) -> Iterator[Media]:
    """Yield ways to give a model its sound, likely ones first."""
    sound = _Sound(model, workload, frozenset(inspect.signature(model.forward).parameters))
    heard = getattr(model.get_encoder(), "main_input_name", None) if model.config.is_encoder_decoder else None
    for name, make in SOUND_BY_PARAMETER.items():
        if name in sound.accepted and (heard == name or heard not in SOUND_BY_PARAMETER):
            yield from make(sound)


def _spectrograms(sound: _Sound) -> Iterator[Media]:
    """Yield spectrograms with either axis first, with single or stacked frames; or the waves of one token each."""
    batch, frames, window = sound.workload.batch_size, sound.frames, sound.window
    stacked = math.ceil(frames / STACKED_EVERY)
    shapes: list[tuple[tuple[int, int, int], int]] = []
    for bins in sound.bins:
        shapes += [((batch * sound.windows, bins, window), window), ((batch, frames, bins), frames)]
        shapes += [((batch, bins, frames), frames), ((batch, frames, 2 * bins), frames)]
    shapes.append(((batch, stacked, STACKED * USUAL_BINS[-1]), stacked))
    if width := getattr(sound.audio, "audio_embed_dim", None):
        tokens = math.ceil(sound.samples / width)
        shapes.append(((batch, tokens, width), tokens))
    for shape, length in shapes:
        pads = length == window and window * sound.windows * batch > sound.workload.audio_seconds * FRAMES_PER_SECOND
        for is_padded in (True, False) if pads else (False,):
            for dtype in (torch.bool, torch.long):
                masks = _masks(sound, shape[0], length, dtype, is_padded=is_padded)
                yield Media(tensors={"input_features": sound.ones(*shape), **masks})


def require_one_window(model: PreTrainedModel, workload: WorkloadShape, media: Media) -> None:
    """Check that an encoder of one window at a time gets no more sound than that (Whisper)."""
    window = _Sound(model, workload, frozenset()).window
    shape = tuple(media.tensors["input_features"].shape) if "input_features" in media.tensors else ()
    if (
        model.config.is_encoder_decoder
        and shape[-1:] == (window,)
        and workload.audio_seconds * FRAMES_PER_SECOND > window
    ):
        seconds = f"{window / FRAMES_PER_SECOND:g}"
        raise NoMediaError(
            f"it hears {seconds} s at once (`audio_seconds: {seconds}`), and longer sound in pieces of that"
        )


def _masks(sound: _Sound, count: int, frames: int, dtype: torch.dtype, *, is_padded: bool) -> Tensors:
    """Return the masks that separate sound from padding: over all frames, or over those of the sound's seconds."""
    config = sound.model.config
    window, rate = (getattr(config, name, None) for name in ("window_size", "downsample_rate"))
    masked = math.ceil(frames / window) * (window // rate) if window and rate else frames  # Granite masks tokens
    heard = torch.ones((count, masked), dtype=torch.long)
    if is_padded:
        heard = torch.arange(sound.windows * masked) < sound.workload.audio_seconds * FRAMES_PER_SECOND
        heard = heard.long().reshape(sound.windows, masked).repeat(sound.workload.batch_size, 1)
    masks = {
        "feature_attention_mask": heard,
        "input_features_mask": heard.to(dtype),
        "chunk_sample_lengths": heard.sum(-1) * (SAMPLES_PER_SECOND // FRAMES_PER_SECOND),
        "padding_mask": sound.ones(sound.workload.batch_size, sound.samples, dtype=dtype),
    }
    return {name: mask for name, mask in masks.items() if name in sound.accepted}


def _spectrograms_of_sizes(sound: _Sound) -> Iterator[Media]:
    """Yield spectrograms with the number of tokens of each (Phi-4-multimodal)."""
    batch, frames = sound.workload.batch_size, sound.frames
    tokens = math.ceil(frames / 8)
    for bins in sound.bins:
        yield Media(
            tensors={
                "audio_input_features": sound.ones(batch, frames, bins),
                "audio_embed_sizes": torch.tensor([tokens] * batch),
                "audio_attention_mask": sound.ones(batch, frames, dtype=torch.bool),
            },
            placeholders=tokens,
        )


def _samples(sound: _Sound) -> Iterator[Media]:
    """Yield sound as plain samples."""
    batch, count = sound.workload.batch_size, sound.samples
    masks = {name: sound.ones(batch, count, dtype=torch.bool) for name in ("padding_mask", "input_values_mask")}
    masks = {name: mask for name, mask in masks.items() if name in sound.accepted}
    for shape in ((batch, count), (batch, 1, count)):
        yield Media(tensors={"input_values": sound.ones(*shape), **masks})


SOUND_BY_PARAMETER: dict[str, Callable[[_Sound], Iterator[Media]]] = {
    "input_features": _spectrograms,
    "audio_input_features": _spectrograms_of_sizes,
    "input_values": _samples,
}
"""The ways to give a model sound, by a parameter of its forward."""

SOUND_NAMES = tuple(SOUND_BY_PARAMETER)
