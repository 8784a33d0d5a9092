"""Signs of an accelerator that cost nothing to look at: its driver's files, and what torch was built for."""

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
"""By what torch has to be built for. `nvhost-gpu` and `nvgpu` are Jetson's."""

# Of a driver for which nothing is installed, only these are spoken of: others' files are on many laptops too.
MAKERS = {"cuda": "NVIDIA", "hip": "AMD", "npu": "Ascend"}

STATED_KIND = re.compile(r"^(cuda|hip|xpu)\b[^=\n]*= *['\"]", re.MULTILINE)
"""A line of torch's `version.py` that names a version; of a kind that torch is not built for it says `None`."""

WINDOWS_BELOW = "dev/dxg"
"""Under Windows' Linux, any card is behind this."""


def kinds_with_a_driver(root: Path = Path("/")) -> frozenset[str]:
    """Return the kinds of devices whose driver has left a file; only the others are certain, which are not there."""
    if sys.platform == "darwin":
        return frozenset({"mps"} if platform.machine() == "arm64" else ())
    if os.name == "nt" or (root / WINDOWS_BELOW).exists():
        return frozenset({"cuda", "hip", "xpu"})
    found = {kind for kind, files in DRIVER_FILES.items() if any((root / file).exists() for file in files)}
    if any((root / "dev/dri").glob("renderD*")):  # nearly every machine with a screen
        found.add("xpu")
    return frozenset(found)


def kinds_torch_is_built_for() -> frozenset[str]:
    """Return what `version.py` says, without importing torch; nothing where that is for the CPU or is not there."""
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
