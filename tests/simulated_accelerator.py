"""A simulated accelerator with real numbers: `npu:0` and `npu:1`, separate from the CPU and from each other.

torch lets a backend be written in Python. Here a tensor of the accelerator wraps a tensor of the CPU, and the CPU's
kernels compute: results can be compared with the plain model bit by bit, while an operation over tensors of two devices
fails as on a card. Memory is unlimited, copies and kernels take the time that they take on the CPU, and there are no
streams: speed, capacity and asynchronous behaviour can only be tested on a real accelerator.

torch cannot unregister a backend, so install this only in a process of its own.
"""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

KIND = "npu"  # one that profiles may name, and that torch itself does not occupy
DEVICES = 2

COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
TAKES_INDICES_OF_THE_CPU = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)

_kept = []
"""Registrations last as long as their library."""


def install():
    """Register the accelerator with torch as an available one."""
    _setup_privateuseone_for_python_backend(KIND, backend_module=_Backend())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    library.impl("_local_scalar_dense", _number, "PrivateUse1")
    for overload in ("arange", "arange.start", "arange.start_step"):  # torch makes an empty one to be filled
        library.impl(overload, _arange, "PrivateUse1")
    library.impl("eye", _eye, "PrivateUse1")
    _kept.append(library)


class SimulatedTensor(torch.Tensor):
    """A tensor that reports an accelerator as its device; `held` is the CPU tensor with its numbers."""

    @staticmethod
    def __new__(cls, held, device=None, requires_grad=False):
        if device is None:  # accelerate makes a parameter anew from its type, which on a card is `Parameter`
            return torch.nn.Parameter(held, requires_grad)
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )

    def __init__(self, held, device=None, requires_grad=False):
        if device is not None:
            self.held = held

    def __repr__(self):
        return f"SimulatedTensor({self.held!r}, device={self.device})"

    def data_ptr(self):
        return self.held.data_ptr()

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        # torch chooses a kernel for attention by the kind of device, and knows none for this one.
        if function is torch.nn.functional.scaled_dot_product_attention:
            return _run(function, args, kwargs or {})
        if function is torch.Tensor.__deepcopy__:  # for which torch would copy a storage that there is not
            copied = SimulatedTensor(args[0].held.clone(), args[0].device)
            return torch.nn.Parameter(copied, args[0].requires_grad) if hasattr(args[0], "_is_param") else copied
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


def _run(operation, args, kwargs):
    """Run an operation on the CPU tensors; the results are on the arguments' device, or on the target of a copy."""
    wrappers = {}
    devices = {}

    def note(value):
        # As on a card, a number may come from the CPU.
        if isinstance(value, torch.Tensor) and (value.dim() or isinstance(value, SimulatedTensor)):
            devices.setdefault(value.device, None)

    def held(value):
        if isinstance(value, SimulatedTensor):
            wrappers[id(value.held)] = value
            return value.held
        is_device = isinstance(value, torch.device) and value.type != "meta"
        return torch.device("cpu") if is_device else value

    def wrap(value):
        if not isinstance(value, torch.Tensor) or target.type in ("cpu", "meta"):
            return value
        return wrappers[id(value)] if id(value) in wrappers else SimulatedTensor(value, target)

    tree_map(note, (args[:1] if operation in TAKES_INDICES_OF_THE_CPU else args, kwargs))
    if len(devices) > 1 and operation not in COPIES:
        found = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(f"{operation}: expected all tensors to be on the same device, but found {found}")
    target = torch.device(kwargs.get("device") or next(iter(devices)))
    if operation is torch.ops.aten.histc.default:  # integers are counted on accelerators, and not on the CPU
        args = (args[0].float(), *args[1:])
    return tree_map(wrap, operation(*tree_map(held, args), **tree_map(held, kwargs)))


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return SimulatedTensor(torch.empty(size, dtype=dtype), torch.device(device))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return SimulatedTensor(torch.empty_strided(size, stride, dtype=dtype), torch.device(device))


def _number(tensor):
    return tensor.held.item()


def _eye(size, *, dtype=None, layout=None, device=None, pin_memory=None):
    return SimulatedTensor(torch.eye(size, dtype=dtype), torch.device(device))


def _arange(*limits, dtype=None, layout=None, device=None, pin_memory=None):
    return SimulatedTensor(torch.arange(*limits, dtype=dtype), torch.device(device))


def _copy_from(source, target, non_blocking=False):
    getattr(target, "held", target).copy_(getattr(source, "held", source))
    return target


class _Backend:
    """The part of `torch.npu` that torch, transformers and accelerate call."""

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def device_count(self):
        return DEVICES

    def current_device(self):
        return 0

    def mem_get_info(self, device=None):
        return (2**40, 2**40)

    def empty_cache(self):
        pass

    def manual_seed_all(self, seed):
        pass

    def is_autocast_enabled(self):
        return False

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def _is_in_bad_fork(self):
        return False
