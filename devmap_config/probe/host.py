"""Probes the CPU's memory, within the limits of its container, and the disk."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from devmap_config.files import is_folder, kernel_text, real_path
from devmap_config.probe.cgroup import limiting_groups
from devmap_config.probe.machine import SeenDisk, SeenHost


def seen_host() -> SeenHost:
    """Return the CPU's memory: the machine's, or the container's limit if that is less."""
    import psutil

    memory = psutil.virtual_memory()
    groups = limiting_groups()
    memory_bytes = min([memory.total, *(group.limit_bytes for group in groups)])
    return SeenHost(
        memory_bytes=memory_bytes,
        available_bytes=min([memory.available, memory_bytes, *(group.available_bytes for group in groups)]),
        threads=usable_threads(),
        name=_processor_name(),
        is_limited=memory_bytes < memory.total,
    )


def usable_threads() -> int:
    """Return the hardware threads that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor_name() -> str | None:
    lines = kernel_text(Path("/proc/cpuinfo")).splitlines()
    if not lines:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def seen_disk(folder: Path) -> SeenDisk:
    """Return the file system of a folder, even if it does not exist yet."""
    usage = shutil.disk_usage(existing_folder(folder))
    return SeenDisk(memory_bytes=usage.total, free_bytes=usage.free)


def existing_folder(path: Path) -> Path:
    """Return the nearest existing folder of a path."""
    resolved = real_path(path)
    return next(folder for folder in (resolved, *resolved.parents) if is_folder(folder))


def own_addresses() -> frozenset[str]:
    """Return the addresses of this machine's network interfaces."""
    import psutil

    return frozenset(address.address for addresses in psutil.net_if_addrs().values() for address in addresses)
