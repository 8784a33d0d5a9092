"""Simulated accelerators: tensors without data that report the device on which the plan puts them.

All tensors live on one fake CPU. A mode around torch's functions intercepts copies to devices. A mode around torch's
operations labels each result with a device, and refuses what a real machine refuses: an operation over tensors on two
devices. While they are active, a fake tensor that is asked for its device answers with the simulated one. Nothing is
registered with torch, no real accelerator is touched, and nothing remains afterwards.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import finalize

import torch
from torch.overrides import TorchFunctionMode

from devmap_config.devices import CPU, Device
from devmap_config.dispatch.cpu_compute import TORCH_CPU
from devmap_config.graph.model import ancestors
from devmap_config.graph.recording import (
    TORCH_ATTENTION,
    RecordedEvent,
    Recorder,
    fused_attention,
    shown_bytes,
    storage_key,
    tensors_in,
)
from devmap_config.libraries.torch import answering_for_devices, operation_name, tree_leaves, without_functions
from devmap_config.simulate.simulation import NOWHERE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from devmap_config.graph.recording import Traffic

ACCELERATOR = "privateuseone"
"""The type of torch device that a simulated accelerator has: no code of a model or library takes it for a real one."""

MAY_MIX = ("aten::copy_", "aten::_to_copy", "aten::set_", "aten::resize_")
"""Operations that take tensors of several devices."""

MAY_BE_ABSENT = ("aten::detach", "aten::alias")
"""Operations by which accelerate sets a weight that is not copied in; every other one would read it."""

INDEXES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
"""Operations whose indices may be on the CPU, wherever the tensor is that they index."""

GETTERS = {
    torch.Tensor.device.__get__: "device",
    torch.Tensor.is_cuda.__get__: "is_cuda",
    torch.Tensor.is_cpu.__get__: "is_cpu",
    torch.Tensor.get_device: "get_device",
}


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor of an operation.

    Attributes:
        device: its device.
        made_by: the module that made it, or that holds it.
        weight: its name, if it is a weight.
        blocks: the blocks that it derives from: the block that made it or, outside of blocks, those of all its sources.
    """

    device: Device
    made_by: str
    weight: str | None
    blocks: tuple[str, ...]


class DeviceMismatchError(Exception):
    """An operation over tensors on two devices.

    Attributes:
        operation: the name of the operation.
        operands: one tensor of each device. If the first is on `NOWHERE`, it is a weight that was not copied in,
            whatever the others are.
        running: the innermost module that was running.
    """

    def __init__(self, operation: str, operands: Sequence[Operand], running: str) -> None:
        self.operation = operation
        self.operands = tuple(operands)
        self.running = running
        super().__init__(
            f"{operation} in {running or 'the model'}: {', '.join(str(operand.device) for operand in self.operands)}"
        )


@dataclass(frozen=True, slots=True)
class Phase(RecordedEvent):
    """An event: a part of the dry run begins."""

    name: str


@dataclass(frozen=True, slots=True)
class DeviceCopy(RecordedEvent):
    """An event: bytes were copied from one device to another."""

    source: Device
    target: Device
    size_bytes: int
    is_weight: bool


@dataclass(frozen=True, slots=True)
class Call(RecordedEvent):
    """An event: a module has returned a tensor on this device."""

    device: Device


class SimulatedDevices(Recorder):
    """Labels every tensor with its device, and records copies between devices.

    Args:
        accelerators: the plan's accelerators, in the order of their simulated indices.
        modules: the paths of modules by their id.
        known: the tensors that exist beforehand.
        weights: the names of weights by their storage.
        traffic: records what passes between blocks.
    """

    def __init__(
        self,
        accelerators: Sequence[Device],
        modules: dict[int, str],
        known: tuple[torch.Tensor, ...],
        weights: Mapping[int, str],
        traffic: Traffic,
    ) -> None:
        super().__init__(modules, known, traffic)
        self.blocks = traffic.blocks
        self.given: frozenset[int] = frozenset()
        """The serial numbers of the inputs of the running block, which accelerate copies to its device."""
        self.accelerators = tuple(accelerators)
        self.weights = weights
        self.asked: torch.Tensor | None = None
        """The weight whose device was last read while it was not copied in: a tensor that is sent there loses its
        data.
        """
        self.origins: dict[int, dict[str, None]] = {}
        """The blocks that each noted storage derives from, by its serial number."""
        self.at: dict[int, Device] = {}
        """The device of each noted storage, by its serial number."""
        self._put: dict[int, Device] = {}
        self._torch_devices = {
            device: torch.device(ACCELERATOR, index) for index, device in enumerate(self.accelerators)
        } | {NOWHERE: torch.device(str(NOWHERE))}
        self._explicit: Device | None = None
        self._inherited = CPU
        self._depth = 0

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """Watch the modules of a model; within the context, tensors are on simulated devices."""

        def device(tensor: torch.Tensor, of_torch: Callable[[], torch.device]) -> torch.device:
            # torch's own code, within a function or an operation, must still see the CPU.
            if self._depth:
                return of_torch()
            at = self.of(tensor)
            if at == NOWHERE:
                self.asked = tensor
            return self.torch_device(at)

        with answering_for_devices(device), super().watching(model), _Functions(self):
            yield

    def enter(self, module: torch.nn.Module, arguments: Any, options: Any) -> None:
        """Record that a module begins to run."""
        with self.within_torch():
            super().enter(module, arguments, options)
            if self.innermost in self.blocks:
                serials = map(self.serial_of, tensors_in((arguments, options)))
                self.given = frozenset(serial for serial in serials if serial is not None)

    def leave(self, module: torch.nn.Module, arguments: Any, options: Any, output: Any) -> None:
        """Record that a module has returned `output`, or has failed."""
        with self.within_torch():
            first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)), None)
            if first is not None and (device := self.of(first)) is not None:
                self.events.append(Call(self.running, device))
            super().leave(module, arguments, options, output)

    @contextmanager
    def within_torch(self) -> Iterator[None]:
        """Let torch's own code run: within the context, tensors answer with their real device."""
        self._depth += 1
        try:
            with without_functions():
                yield
        finally:
            self._depth -= 1

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = operation_name(function)
        inputs = list(tensors_in((arguments, options)))
        if function.namespace != "prim" and name not in MAY_BE_ABSENT:
            self.require_present(name.removeprefix("aten::"), inputs)
        device: Device | None = None
        if name in MAY_MIX:
            device = self.of(inputs[0]) if inputs else None
        elif self._explicit is None:
            if name in INDEXES:
                indices = (index for index in tensors_in(arguments[1]) if self.of(index) != CPU)
                inputs = [arguments[0], *indices, *tensors_in(arguments[2:])]
            device = self.check(name.removeprefix("aten::"), inputs)
        with self.within_torch():
            if name == "aten::histc" and not inputs[0].is_floating_point():  # only accelerators count integers
                arguments = (inputs[0].float(), *arguments[1:])
            result = super().__torch_dispatch__(function, types, arguments, options)
        outputs = list(tensors_in(result))
        self.label(outputs, device or CPU)
        self.trace(inputs, outputs)
        return result

    def trace(self, inputs: Iterable[torch.Tensor], outputs: Iterable[torch.Tensor]) -> None:
        """Record the blocks that the results of an operation derive from."""
        block = self.running_block
        origins = {block: None} if block else {path: None for tensor in inputs for path in self.origins_of(tensor)}
        for tensor in outputs if origins else ():
            if (serial := self.serial_of(tensor)) is not None:
                self.origins.setdefault(serial, {}).update(origins)

    def origins_of(self, tensor: torch.Tensor) -> Iterable[str]:
        """Return the blocks that a tensor derives from."""
        if (weight := self.weights.get(storage_key(tensor))) is not None:
            return [path for path in ancestors(weight) if path in self.blocks]
        return self.origins.get(self.serial_of(tensor) or -1, ())

    @property
    def running_block(self) -> str | None:
        """The block that is running, if any."""
        return next((path for path in reversed(self.running) if path in self.blocks), None)

    def put(self, tensor: torch.Tensor, device: Device) -> None:
        """Label a tensor that exists already with its device."""
        key = storage_key(tensor)
        if key not in self._put:  # when it is freed, another tensor may get its address
            finalize(tensor.untyped_storage(), self._put.pop, key, None)
        self._put[key] = device

    def of(self, tensor: torch.Tensor) -> Device | None:
        """Return the device of a tensor, or `None` if it has none, such as a constant that a model keeps on meta."""
        serial = self.serial_of(tensor)
        if serial is not None:
            return self.at.get(serial, CPU)
        if (device := self._put.get(storage_key(tensor))) is not None:
            return device
        return None if tensor.is_meta else CPU

    def torch_device(self, device: Device | None) -> torch.device:
        """Return the `torch.device` with which a tensor on this device answers."""
        return TORCH_CPU if device is None else self._torch_devices.get(device, TORCH_CPU)

    def named(self, device: Any) -> Device:
        """Return the simulated device for torch's name of a device; without an index, the first accelerator."""
        if isinstance(device, int) and not isinstance(device, bool):
            return self.accelerators[device]
        name = torch.device(device)
        if name.type in ("cpu", "meta") or not self.accelerators:
            return Device(name.type)
        return self.accelerators[name.index or 0]

    def moved(
        self, tensor: torch.Tensor, target: Device, *, source: Device | None = None, size_bytes: int | None = None
    ) -> torch.Tensor:
        """Return a copy of a tensor on another device, and record the copy; return the tensor itself if it is there
        already.

        Args:
            tensor: the tensor.
            target: the device to copy to.
            source: the device to copy from, if not the tensor's own.
            size_bytes: the bytes that are copied, if not those of the tensor's elements.
        """
        here = source or self.of(tensor)
        if here == target or here is None:
            return tensor
        self.require_present("to", [tensor])
        with self.making_on(target), self.within_torch():
            copy = tensor.detach().clone()
        crossing_bytes = shown_bytes(tensor) if size_bytes is None else size_bytes
        is_weight = storage_key(tensor) in self.weights
        self.events.append(DeviceCopy(self.running, here, target, crossing_bytes, is_weight))
        return copy

    @contextmanager
    def making_on(self, device: Device | None, inherited: Device = CPU) -> Iterator[None]:
        """Put tensors that are made within the context on `device`.

        With `None`, a tensor is on the device of those that it is made from, or else on `inherited`.
        """
        before = (self._explicit, self._inherited)
        self._explicit, self._inherited = device or self._explicit, inherited
        try:
            yield
        finally:
            self._explicit, self._inherited = before

    @property
    def innermost(self) -> str:
        """The path of the innermost module that is running."""
        return self.running[-1] if self.running else ""

    def check(self, name: str, tensors: Iterable[torch.Tensor]) -> Device:
        """Return the device of an operation over these tensors. A scalar on the CPU goes with any device.

        Raises:
            DeviceMismatchError: if they are on two devices.
        """
        by_device: dict[Device, list[torch.Tensor]] = {}
        has_scalars = False
        for tensor in tensors:
            device = self.of(tensor)
            if device is None:
                continue
            if device == CPU and tensor.dim() == 0:
                has_scalars = True
                continue
            by_device.setdefault(device, []).append(tensor)
        if len(by_device) > 1:
            operands = [self._operand(device, of_device) for device, of_device in by_device.items()]
            raise DeviceMismatchError(name, operands, self.innermost)
        if by_device:
            return next(iter(by_device))
        return CPU if has_scalars else self._inherited

    def require_present(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        """Refuse an operation that reads a weight which was not copied in, and so has no data on a real machine.

        Raises:
            DeviceMismatchError: if there is one; it is the first operand.
        """
        absent = next((tensor for tensor in tensors if self.of(tensor) == NOWHERE), None)
        if absent is not None:
            present = next((tensor for tensor in tensors if self.of(tensor) not in (NOWHERE, None)), None)
            operands = [self._operand(NOWHERE, absent)]
            if present is not None:
                operands.append(self._operand(self.of(present) or CPU, present))
            raise DeviceMismatchError(name, operands, self.innermost)

    def label(self, tensors: Iterable[torch.Tensor], device: Device) -> None:
        """Label the results of an operation with their device; tensors that existed before keep theirs."""
        for tensor in tensors:
            if self._explicit is not None:
                self.note(tensor)  # a tensor made of Python numbers appears without an operation that makes it
            serial = self.serial_of(tensor)
            if serial is not None:
                self.at.setdefault(serial, self._explicit or device)

    def _operand(self, device: Device, tensors: Sequence[torch.Tensor]) -> Operand:
        """Describe the tensors of an operation that are on one device, by the first of them and the origins of all."""
        weight = self.weights.get(storage_key(tensors[0]))
        serial = self.serial_of(tensors[0])
        made_by = self.maker.get(serial, "") if serial is not None else (weight or "").rpartition(".")[0]
        block = self.running_block
        if serial in self.given and block is not None:
            made_by = block
        given = {block: None} if block is not None else {}
        origins: dict[str, None] = {}
        for tensor in tensors:
            origins |= given if self.serial_of(tensor) in self.given else dict.fromkeys(self.origins_of(tensor))
        return Operand(device, made_by, weight, tuple(origins))


class _Functions(TorchFunctionMode):  # type: ignore[misc]  # torch is not read by the type checker
    """Intercepts torch's functions: answers for the devices of tensors, and simulates copies to a device."""

    def __init__(self, devices: SimulatedDevices) -> None:
        super().__init__()
        self.devices = devices

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        del types
        options = dict(options or {})
        devices = self.devices
        if (getter := GETTERS.get(function)) is not None:
            return self._answer(getter, arguments[0])
        if function in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self._converted(function, arguments, options)
        explicit = None
        if (requested := options.get("device")) is not None:
            explicit = devices.named(requested)
            options["device"] = str(explicit if explicit == NOWHERE else CPU)
            if function in (torch.as_tensor, torch.asarray) and isinstance(arguments[0], torch.Tensor):
                return devices.moved(function(*arguments, **options), explicit)
        tensors = list(tensors_in((arguments, options)))
        inherited = next((at for tensor in tensors if tensor.dim() and (at := devices.of(tensor))), CPU)
        if function is TORCH_ATTENTION:
            devices.check("scaled_dot_product_attention", tensors)
            devices.traffic.operate(map(devices.serial_of, tensors), ())
        with devices.making_on(explicit, inherited), devices.within_torch():
            output = fused_attention(*arguments, **options) if function is TORCH_ATTENTION else None
            return function(*arguments, **options) if output is None else output

    def _answer(self, getter: str, tensor: torch.Tensor) -> Any:
        device = self.devices.torch_device(self.devices.of(tensor))
        if getter == "device":
            return device
        if getter == "get_device":
            return -1 if device.index is None else device.index
        return getter == "is_cpu" and device.type == "cpu"

    def _converted(self, function: Any, arguments: Any, options: dict[str, Any]) -> torch.Tensor:
        """Return the tensor on the device, and in the dtype, that `to`, `cpu` or `cuda` asks for."""
        tensor, *rest = arguments
        target: Device | None = None
        if function is torch.Tensor.cpu:
            target, rest = CPU, []
        elif function is torch.Tensor.cuda:
            requested = rest.pop(0) if rest else options.pop("device", None)
            target = self.devices.named(0 if requested is None else requested)
        elif (requested := options.pop("device", None)) is not None:
            target = self.devices.named(requested)
        elif rest and isinstance(rest[0], torch.Tensor):
            other = rest.pop(0)
            target, rest = self.devices.of(other), [other.dtype, *rest]
        elif rest and (rest[0] is None or isinstance(rest[0], (str, int, torch.device))):
            requested = rest.pop(0)
            target = None if requested is None else self.devices.named(requested)
        if target == NOWHERE and self.devices.asked is not None:
            self.devices.require_present("to", [self.devices.asked, tensor])
        moved = tensor if target in (None, NOWHERE) else self.devices.moved(tensor, target)
        options.pop("other", None)
        options.pop("non_blocking", None)
        dtypes = [argument for argument in rest if isinstance(argument, torch.dtype)]
        dtype = options.pop("dtype", None) or next(iter(dtypes), None) or moved.dtype
        with self.devices.within_torch():
            converted: torch.Tensor = moved.to(dtype, **options)
        return converted
