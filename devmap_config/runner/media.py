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


@dataclass(frozen=True)
class Sound:
    """Samples of one channel between -1 and 1, and how many there are in a second."""

    samples: NDArray[np.float32]
    rate: int

    def at(self, rate: int) -> NDArray[np.float32]:
        """Return the samples at another rate: the same waves, as far as that rate has them."""
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
    try:
        from PIL import UnidentifiedImageError
        from PIL.Image import open as image_of
        from PIL.ImageOps import exif_transpose
    except ModuleNotFoundError:
        help = "run `pip install 'devmap-config[media]'`"
        raise RunnerError("pillow-missing", "reading an image needs Pillow, which is not installed", help) from None
    data = read_bytes(path, IMAGE, ANYWHERE)
    try:
        return exif_transpose(image_of(io.BytesIO(data))).convert("RGB")
    except UnidentifiedImageError:
        raise FileError("is not an image that Pillow knows", "syntax", "convert it to PNG") from None
    except Exception as error:  # what is damaged raises many types, and so does more than Pillow unpacks
        raise FileError(f"cannot be read as an image: {error}", "syntax", "convert it to PNG") from None


def read_sound(path: Path) -> Sound:
    """Return the sound in a WAV file of whole numbers, its channels mixed.

    Raises:
        FileError: if there is none that can be read.
    """
    data = read_bytes(path, SOUND, ANYWHERE)
    try:
        with wave.Wave_read(io.BytesIO(data)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            frames = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
    except (wave.Error, EOFError) as error:
        reason = str(error) or "it ends too early"
        raise FileError(f"is no WAV file of whole numbers: {reason}", "syntax", CONVERT_SOUND) from None
    frames = frames[: len(frames) // (width * channels) * width * channels]
    if not len(frames) or not rate:
        raise FileError("holds no sound", "syntax", CONVERT_SOUND)
    if width == 1:
        samples = (frames.astype(np.float32) - 128) / 128
    else:  # each becomes the upper bytes of four
        whole = np.zeros((len(frames) // width, 4), np.uint8)
        whole[:, 4 - width :] = frames.reshape(-1, width)
        samples = (whole.view("<i4")[:, 0] / 2**31).astype(np.float32)
    return Sound(samples.reshape(-1, channels).mean(axis=1), rate)
