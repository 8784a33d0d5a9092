"""Cheap signs of an accelerator: its driver's files, and the kinds that torch was built for."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from devmap_config.files import ANYWHERE, PACKAGED, FileError, read_text

DRIVER_FILES = {
    "cuda": ("dev/nvidiactl", "proc/driver/nvidia/version", "dev/nvhost-gpu", "dev/nvgpu"),
    "hip": ("dev/kfd",),
    "npu": ("dev/davinci_manager", "dev/davinci0"),
    "hpu": ("dev/accel/accel0", "dev/hl0"),
}
"""The files of drivers, by the kind that torch must be built for. `nvhost-gpu` and `nvgpu` are Jetson's."""

# The kinds whose driver is reported if nothing is installed for it; the files of others exist on many laptops, too.
MAKERS = {"cuda": "NVIDIA", "hip": "AMD", "npu": "Ascend"}

STATED_KIND = re.compile(r"^(cuda|hip|xpu)\b[^=\n]*= *['\"]", re.MULTILINE)
"""Matches a line of torch's `version.py` with a version; for kinds that torch is not built for, it is `None`."""

WINDOWS_BELOW = "dev/dxg"
"""In Windows' subsystem for Linux, any card may be behind this file."""


def kinds_with_a_driver(root: Path = Path("/")) -> frozenset[str]:
    """Return the kinds of devices that have a driver's file; only the absence of the others is certain."""
    if sys.platform == "darwin":
        return frozenset({"mps"} if platform.machine() == "arm64" else ())
    if os.name == "nt" or (root / WINDOWS_BELOW).exists():
        return frozenset({"cuda", "hip", "xpu"})
    kinds = {kind for kind, files in DRIVER_FILES.items() if any((root / file).exists() for file in files)}
    if any((root / "dev/dri").glob("renderD*")):  # true of nearly every machine with a screen
        kinds.add("xpu")
    return frozenset(kinds)


def kinds_torch_is_built_for() -> frozenset[str]:
    """Return the kinds in torch's `version.py`, without importing it; empty for the CPU's build, or without torch."""
    specification = find_spec("torch")
    if specification is None or not specification.submodule_search_locations:
        return frozenset()
    file = Path(next(iter(specification.submodule_search_locations))) / "version.py"
    try:
        built = set(STATED_KIND.findall(read_text(file, PACKAGED, ANYWHERE)))
    except FileError:
        return frozenset()
    if sys.platform == "darwin":
        built.add("mps")
    plugins = {"npu": "torch_npu", "hpu": "habana_frameworks"}
    built |= {kind for kind, package in plugins.items() if find_spec(package) is not None}
    return frozenset(built)
