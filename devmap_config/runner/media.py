"""Reads images and sound from files, as processors take them."""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from devmap_config.files import ANYWHERE, IMAGE, SOUND, FileError, read_bytes
from devmap_config.runner.loading import RunnerError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

CONVERT_SOUND = "convert it: `ffmpeg -i FILE -c:a pcm_s16le sound.wav`"

MOST_SAMPLE_BYTES = 4
"""The bytes of the largest samples that are read; `wave` knows files of larger ones."""


@dataclass(frozen=True)
class Sound:
    """Samples of one channel between -1 and 1, and their number per second."""

    samples: NDArray[np.float32]
    rate: int

    @property
    def seconds(self) -> float:
        """The length of the sound."""
        return len(self.samples) / self.rate

    def at(self, rate: int) -> NDArray[np.float32]:
        """Return the samples at another rate: the same waves, as far as that rate can represent them."""
        if rate == self.rate:
            return self.samples
        count = max(round(len(self.samples) * rate / self.rate), 1)
        waves = np.fft.rfft(self.samples)[: count // 2 + 1]
        return (np.fft.irfft(waves, count) * (count / len(self.samples))).astype(np.float32)


def read_image(path: Path) -> Any:
    """Return the image in a file, in red, green and blue.

    Raises:
        FileError: if there is none that can be read.
        RunnerError: without Pillow.
    """
    require_pillow()
    return image_of(read_bytes(path, IMAGE, ANYWHERE))


def require_pillow() -> None:
    """Check that images can be read.

    Raises:
        RunnerError: without Pillow.
    """
    try:
        import PIL.Image  # noqa: F401
    except ModuleNotFoundError:
        help = "run `pip install 'devmap-config[media]'`"
        raise RunnerError("pillow-missing", "reading an image needs Pillow, which is not installed", help) from None


def image_of(data: bytes, *, formats: tuple[str, ...] | None = None, most_pixels: int | None = None) -> Any:
    """Return an image in red, green and blue, upright.

    Args:
        data: the bytes of a file.
        formats: the formats that may be read, by Pillow's names; `None` for all.
        most_pixels: larger images are not decoded; `None` for Pillow's own limit.

    Raises:
        FileError: if there is none that can be read.
    """
    from PIL import UnidentifiedImageError
    from PIL.Image import open as opened
    from PIL.ImageOps import exif_transpose

    try:
        opened_image = opened(io.BytesIO(data), formats=formats)
        pixels = opened_image.width * opened_image.height
        # In files with several pictures at once (MPO), the first one is the main one.
        count = 1 if opened_image.format == "MPO" else getattr(opened_image, "n_frames", 1)
        is_taken = count == 1 and (most_pixels is None or pixels <= most_pixels)
        image = exif_transpose(opened_image).convert("RGB") if is_taken else None
    except UnidentifiedImageError:
        raise FileError("is not an image that Pillow knows", "syntax", "convert it to PNG") from None
    except Exception as error:  # damaged or too large images raise errors of many types
        raise FileError(f"cannot be read as an image: {error}", "syntax", "convert it to PNG") from None
    if count > 1:
        raise FileError(f"holds {count:,} images", "syntax", "take one of them")
    if image is None:
        raise FileError(f"has {pixels:,} pixels, and {most_pixels:,} may be read", "too-large", "make it smaller")
    return image


def read_sound(path: Path) -> Sound:
    """Return the sound in a WAV file of whole numbers, with its channels mixed.

    Raises:
        FileError: if there is none that can be read.
    """
    return sound_of(read_bytes(path, SOUND, ANYWHERE))


def sound_of(data: bytes) -> Sound:
    """Return the sound in the bytes of a WAV file of whole numbers, with its channels mixed.

    Raises:
        FileError: if there is none that can be read.
    """
    try:
        with wave.Wave_read(io.BytesIO(data)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            frames = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
    except (wave.Error, EOFError, RuntimeError) as error:  # `RuntimeError`: a chunk is too long
        reason = str(error) or "it ends too early"
        raise FileError(f"is no WAV file of whole numbers: {reason}", "syntax", CONVERT_SOUND) from None
    if width > MOST_SAMPLE_BYTES:
        limit = f"at most {8 * MOST_SAMPLE_BYTES} can be read"
        raise FileError(f"has samples of {8 * width:,} bits, and {limit}", "syntax", CONVERT_SOUND)
    frames = frames[: len(frames) // (width * channels) * width * channels]
    if not len(frames) or not rate:
        raise FileError("holds no sound", "syntax", CONVERT_SOUND)
    if width == 1:
        samples = (frames.astype(np.float32) - 128) / 128
    else:  # each sample becomes the upper three of four bytes
        whole = np.zeros((len(frames) // width, 4), np.uint8)
        whole[:, 4 - width :] = frames.reshape(-1, width)
        samples = (whole.view("<i4")[:, 0] / 2**31).astype(np.float32)
    return Sound(samples.reshape(-1, channels).mean(axis=1), rate)
