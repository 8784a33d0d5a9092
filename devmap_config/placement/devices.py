"""What devices are called, and which of them compute."""

from __future__ import annotations

DeviceId = str
"""A canonical device name: `cuda:0`, `mps`, `cpu`, `disk`."""

STORAGE_DEVICES = ("cpu", "disk")
"""What is not an accelerator."""


def is_accelerator(device: DeviceId) -> bool:
    """Whether modules on this device run there without being streamed."""
    return device not in STORAGE_DEVICES
