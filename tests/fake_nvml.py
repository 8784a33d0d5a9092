"""A fake of `pynvml`, NVIDIA's management library: the functions that the product calls, with cards that a test
defines.

Names, types and errors are those of nvidia-ml-py 13.615. Cards are given in NVML's order, which can differ from that of
the bus. `driver_bytes` is the memory that the driver keeps for itself; the first version of the memory call counts it
as used.
"""

from __future__ import annotations

import os
import types
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FakeCard:
    name: str
    uuid: str
    bus: int
    memory_bytes: int
    held_bytes: int = 0
    driver_bytes: int = 0
    slices: tuple = ()
    """MIG slices by their index; `None` where no slice was made."""
    is_partitioned: bool = False
    knows_partitions: bool = True
    has_own_memory: bool = True
    is_lost: bool = False
    own_process: bool = False


@dataclass
class FakeNvml:
    """NVML with the given cards; `module` returns it as a module.

    With `is_old`, the second version of the memory call is missing.
    """

    cards: tuple = ()
    is_old: bool = False
    has_driver: bool = True
    initialised: int = field(default=0)

    def module(self):
        made = types.ModuleType("pynvml")
        made.NVML_DEVICE_MIG_ENABLE = 1
        made.nvmlMemory_v2 = 0x02000028

        class NVMLError(Exception):
            pass

        made.NVMLError = NVMLError
        for name in ("NotSupported", "NotFound", "GpuIsLost", "LibraryNotFound", "FunctionNotFound", "Uninitialized"):
            setattr(made, f"NVMLError_{name}", type(f"NVMLError_{name}", (NVMLError,), {}))

        def asked(function):
            def ask(*arguments):
                if not self.initialised:
                    raise made.NVMLError_Uninitialized
                return function(*arguments)

            return ask

        def initialise():
            if not self.has_driver:
                raise made.NVMLError_LibraryNotFound
            self.initialised += 1

        def shut_down():
            self.initialised -= 1

        def memory(card, version=None):
            if not card.has_own_memory:
                raise made.NVMLError_NotSupported
            free = card.memory_bytes - card.held_bytes - card.driver_bytes
            if version is None:
                return types.SimpleNamespace(
                    total=card.memory_bytes, free=free, used=card.held_bytes + card.driver_bytes
                )
            if self.is_old:
                raise made.NVMLError_FunctionNotFound
            assert version == made.nvmlMemory_v2
            return types.SimpleNamespace(
                total=card.memory_bytes, reserved=card.driver_bytes, free=free, used=card.held_bytes
            )

        def name(card):
            if card.is_lost:
                raise made.NVMLError_GpuIsLost
            return card.name

        def partitions(card):
            if not card.knows_partitions:
                raise made.NVMLError_NotSupported
            return [int(card.is_partitioned), int(card.is_partitioned)]

        def part(card, index):
            if card.slices[index] is None:
                raise made.NVMLError_NotFound
            return card.slices[index]

        def processes(card):
            others = [types.SimpleNamespace(pid=1, usedGpuMemory=None)] if card.held_bytes else []
            return others + [types.SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)] * card.own_process

        made.nvmlInit, made.nvmlShutdown = initialise, shut_down
        made.nvmlDeviceGetCount = asked(lambda: len(self.cards))
        made.nvmlDeviceGetHandleByIndex = asked(lambda index: self.cards[index])
        made.nvmlDeviceGetPciInfo = asked(
            lambda card: types.SimpleNamespace(domain=0, bus=card.bus, device=0, busId=f"00000000:{card.bus:02X}:00.0")
        )
        made.nvmlDeviceGetName, made.nvmlDeviceGetUUID = asked(name), asked(lambda card: card.uuid)
        made.nvmlDeviceGetMemoryInfo, made.nvmlDeviceGetMigMode = asked(memory), asked(partitions)
        made.nvmlDeviceGetMaxMigDeviceCount = asked(lambda card: len(card.slices))
        made.nvmlDeviceGetMigDeviceHandleByIndex = asked(part)
        made.nvmlDeviceGetComputeRunningProcesses = asked(processes)
        return made
