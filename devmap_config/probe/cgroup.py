"""Reads the memory limits of a process's control group, of either version, and of every group around it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from devmap_config.files import kernel_text

if TYPE_CHECKING:
    from collections.abc import Iterator

UNLIMITED_BYTES = 2**60
"""Larger limits mean no limit, which version 1 states as a number near 2^63."""


@dataclass(frozen=True)
class GroupMemory:
    """The memory limit of a control group, and its use without cached files, which can be reclaimed at once."""

    limit_bytes: int
    used_bytes: int

    @property
    def available_bytes(self) -> int:
        """The unused part of the limit."""
        return max(self.limit_bytes - self.used_bytes, 0)


def limiting_groups(root: Path = Path("/")) -> tuple[GroupMemory, ...]:
    """Return every group with a limit, from this process's outwards; empty if the machine has no control groups."""
    groups = kernel_text(root / "proc/self/cgroup").splitlines()
    mounts = kernel_text(root / "proc/self/mountinfo").splitlines()
    limits = [_version_2(folder) for folder in _folders(root, groups, mounts, "")]
    limits += [_version_1(folder) for folder in _folders(root, groups, mounts, "memory")]
    return tuple(group for group in limits if group is not None)


def _folders(root: Path, groups: list[str], mounts: list[str], controller: str) -> Iterator[Path]:
    """Yield the folders of a controller's groups; those of version 2 have no controller's name."""
    within = next((path for names, path in map(_group, groups) if controller in names), None)
    mount = next((mount for line in mounts if (mount := _mount(line, controller))), None)
    if within is None or mount is None:
        return
    mounted_group, mount_point = mount
    top = root / mount_point.lstrip("/")
    group = PurePosixPath(within)
    # The group is outside of this namespace, or this is a container that sees its own group as the root, by another
    # name:
    if ".." in group.parts or not group.is_relative_to(mounted_group):
        relative = PurePosixPath()
    else:
        relative = group.relative_to(mounted_group)
    yield from (top / folder for folder in (relative, *relative.parents) if (top / folder).is_dir())


def _group(line: str) -> tuple[list[str], str]:
    """Return the controllers and the path of a line such as `4:memory:/a/b`."""
    _, _, rest = line.partition(":")
    names, _, path = rest.partition(":")
    return names.split(","), path


def _mount(line: str, controller: str) -> tuple[str, str] | None:
    """Return the group that is mounted and where, if the line of `mountinfo` is that of the controller."""
    fields, _, rest = line.partition(" - ")
    kind, _, options = rest.partition(" ")
    parts = fields.split(" ")
    is_wanted = (
        kind == "cgroup" and controller in options.split(" ")[-1].split(",") if controller else kind == "cgroup2"
    )
    return (parts[3], parts[4]) if is_wanted and len(parts) > 4 else None


def _version_2(folder: Path) -> GroupMemory | None:
    limits = [limit for name in ("memory.max", "memory.high") if (limit := _number(folder / name)) is not None]
    used = _number(folder / "memory.current") or 0
    cached = _statistics(folder, "inactive_file", "active_file")
    return GroupMemory(min(limits), max(used - cached, 0)) if limits else None


def _version_1(folder: Path) -> GroupMemory | None:
    limit = _number(folder / "memory.limit_in_bytes")
    if limit is None or limit >= UNLIMITED_BYTES:
        return None
    used = _number(folder / "memory.usage_in_bytes") or 0
    return GroupMemory(limit, max(used - _statistics(folder, "total_inactive_file", "total_active_file"), 0))


def _number(file: Path) -> int | None:
    """Return the number in a file, or `None` for `max`."""
    text = kernel_text(file).strip()
    return int(text) if text.isdigit() else None


def _statistics(folder: Path, *wanted: str) -> int:
    lines = kernel_text(folder / "memory.stat").splitlines()
    return sum(int(value) for name, _, value in (line.partition(" ") for line in lines) if name in wanted)
