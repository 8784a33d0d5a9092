"""Signs of an accelerator that cost nothing to look at: its driver's files, and what torch was built for."""

from __future__ import annotations

import ast
import os
import platform
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

WINDOWS_BELOW = "dev/dxg"
"""Under Windows' Linux, any card is behind this."""


def kinds_with_a_driver(root: Path = Path("/")) -> frozenset[str]:
    """What may be there: kinds whose driver has left a file. Nothing is certain but that others are not there."""
    if sys.platform == "darwin":
        return frozenset({"mps"} if platform.machine() == "arm64" else ())
    if os.name == "nt" or (root / WINDOWS_BELOW).exists():
        return frozenset({"cuda", "hip", "xpu"})
    found = {kind for kind, files in DRIVER_FILES.items() if any((root / file).exists() for file in files)}
    if any((root / "dev/dri").glob("renderD*")):  # nearly every machine with a screen
        found.add("xpu")
    return frozenset(found)


def kinds_torch_is_built_for() -> frozenset[str]:
    """Read from its `version.py`, without importing it; nothing where torch is built for the CPU or is not there."""
    specification = find_spec("torch")
    if specification is None or not specification.submodule_search_locations:
        return frozenset()
    file = Path(next(iter(specification.submodule_search_locations))) / "version.py"
    try:
        tree = ast.parse(read_text(file, PACKAGED, ANYWHERE))
    except (FileError, SyntaxError):
        return frozenset()
    stated: dict[str, object] = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            value = getattr(node, "value", None)
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
                stated[target.id] = value.value
    built = {kind for kind in ("cuda", "hip", "xpu") if stated.get(kind)}
    if sys.platform == "darwin":
        built.add("mps")
    plugins = {"npu": "torch_npu", "hpu": "habana_frameworks"}
    built |= {kind for kind, package in plugins.items() if find_spec(package) is not None}
    return frozenset(built)
