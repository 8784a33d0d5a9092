"""This machine's devices: what torch sees, and the CPU's memory within the limits of its container."""

from __future__ import annotations

from pathlib import Path

from devmap_config.hardware.machines import Machine

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

MEBIBYTE = 2**20


def probe_machine() -> Machine:
    """The accelerators that torch sees here, with the memory each reports, and the CPU's."""
    devices: dict[str, str] = {}
    import torch

    for kind in ("cuda", "xpu"):
        backend = getattr(torch, kind)
        if backend.is_available():
            for index in range(backend.device_count()):
                devices[f"{kind}:{index}"] = _mebibytes(backend.get_device_properties(index).total_memory)
            break
    else:
        if torch.backends.mps.is_available():
            devices["mps"] = _mebibytes(torch.mps.recommended_max_memory())
    return Machine(devices | {"cpu": _mebibytes(host_memory_bytes())})


def host_memory_bytes() -> int:
    """The CPU's memory in bytes: the machine's, or what its container may use if that is less."""
    import psutil

    total: int = psutil.virtual_memory().total
    for path in map(Path, CGROUP_LIMITS):
        try:
            limit = path.read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def _mebibytes(size_bytes: int) -> str:
    return f"{size_bytes // MEBIBYTE}MiB"
