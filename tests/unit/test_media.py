"""Sound is read as it is, within bounds, and what cannot be read is said."""

from __future__ import annotations

import os
import wave

import numpy as np
import pytest

from devmap_config.files import FileError
from devmap_config.runner.media import Sound, read_sound


def write(path, frames, *, rate=8_000, width=2, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(frames)
    return path


@pytest.mark.parametrize(
    ("width", "frames"),
    [
        (1, bytes([0, 128, 192])),
        (2, np.array([-(2**15), 0, 2**14], "<i2").tobytes()),
        (3, b"\0\0\x80" + b"\0\0\0" + b"\0\0\x40"),
        (4, np.array([-(2**31), 0, 2**30], "<i4").tobytes()),
    ],
)
def test_samples_of_each_width_are_between_minus_one_and_one(tmp_path, width, frames):
    sound = read_sound(write(tmp_path / "sound.wav", frames, width=width))
    assert (sound.samples.tolist(), sound.rate) == ([-1.0, 0.0, 0.5], 8_000)


def test_channels_are_mixed(tmp_path):
    frames = np.array([[2**14, 0], [-(2**14), 2**14]], "<i2").tobytes()
    assert read_sound(write(tmp_path / "sound.wav", frames, channels=2)).samples.tolist() == [0.25, 0.0]


@pytest.mark.parametrize("rate", [4_000, 8_000, 16_000, 11_025])
def test_a_wave_is_the_same_at_another_rate(rate):
    def wave_at(rate):
        return np.sin(np.arange(rate) * 2 * np.pi * 440 / rate).astype(np.float32)

    assert Sound(wave_at(8_000), 8_000).at(rate) == pytest.approx(wave_at(rate), abs=1e-4)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"\xff" * 400, b"ID3 not a wave"])
def test_what_is_no_sound_is_said(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(FileError) as caught:
        read_sound(tmp_path / "file")
    assert caught.value.code == "syntax"
    assert "ffmpeg" in caught.value.help


def test_sound_of_no_samples(tmp_path):
    with pytest.raises(FileError, match="holds no sound"):
        read_sound(write(tmp_path / "sound.wav", b""))


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="is no regular file"):
        read_sound(tmp_path / "pipe")
    with pytest.raises(FileError, match="does not exist"):
        read_sound(tmp_path / "nothing")
