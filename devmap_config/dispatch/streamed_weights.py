"""Runs modules on an accelerator whose weights are stored elsewhere: copies the next weights ahead of their use.

accelerate copies one tensor after another from pageable memory each time that its module runs, and computes nothing
meanwhile. Here, the weights of pieces that run one after another are together in pinned memory, as a load. The
accelerator has two slots for loads: while modules compute with one slot, the next load is copied to the other, in a
stream of its own. So a forward takes the longer of copying and computing, and the accelerator holds at most two of the
largest pieces, which the plan has room for (see `execution/pieces.py`). Weights on disk are read by a thread into one
of two slots of pinned memory, and copied from there.

`dispatch/loads.py` groups the weights, `dispatch/streamer.py` copies them, and this module hands them to modules.
"""

from __future__ import annotations

import threading
import weakref
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import AlignDevicesHook

from devmap_config.amounts import format_bytes
from devmap_config.dispatch.loads import load_of, loads_of, streamed_pieces
from devmap_config.dispatch.prefills import prefill_on
from devmap_config.dispatch.streamer import CudaStreams, ReaderThread, Slot, Streamer
from devmap_config.dispatch.weights_on_disk import pages
from devmap_config.libraries.accelerate import found_device, hooks_of, replace_hook, sent
from devmap_config.libraries.torch import own_buffers, own_parameters, version_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from devmap_config.dispatch.loads import Load, StreamedPiece


class UnpinnedError(Exception):
    """Memory cannot be pinned, so that copying would be slower than planned."""


def stream_weights(
    model: PreTrainedModel,
    pieces: Iterable[Sequence[str]],
    folder: Path | None,
    main_device: torch.device,
    prefilled: Mapping[str, int],
) -> None:
    """Copy weights to CUDA cards ahead of their use, which accelerate would copy when they are needed.

    Weights in the CPU's memory are moved to pinned memory load by load, so that only one load exists twice at a time.

    Args:
        model: the model, loaded by a map in which modules are on the CPU or the disk.
        pieces: the paths of modules whose weights are needed at once, in the order in which they run.
        folder: where weights on disk are written anew that their file has in another dtype.
        main_device: the device that runs the modules of `prefilled` for long prompts.
        prefilled: by path of modules that compute on the CPU, the number of tokens from which they run on the main
            device.

    Raises:
        UnpinnedError: if memory cannot be pinned.
        FileError: if a file cannot be read.
        OSError: if one cannot be written.
    """
    pinned: list[torch.Tensor] = []
    weakref.finalize(model, _unpin, pinned).atexit = False
    streamed = streamed_pieces(model, pieces, folder)
    apart = [load_of(model.get_submodule(unit)) for unit in prefilled]
    for device in dict.fromkeys([*(piece.device for piece in streamed), *([main_device] if apart else ())]):
        on_device = [piece for piece in streamed if piece.device == device]
        always = loads_of(on_device) if on_device else []
        loads = [*always, *(apart if device == main_device else ())]
        read_bytes = [load.piece.size_bytes for load in loads if load.piece is not None]
        staging = [pages(max(read_bytes)) for _ in range(2) if read_bytes]
        memories = [load.memory for load in loads if load.memory is not None]
        for memory in (*memories, *map(torch.from_numpy, staging)):
            if not _pin(memory, device):
                total = sum(buffer.nbytes for buffer in (*memories, *staging))
                raise UnpinnedError(f"{format_bytes(total)} of memory cannot be pinned")
            pinned.append(memory)
        streams, slot_bytes = CudaStreams(device), max(load.size_bytes for load in loads)
        first, second = (Slot(torch.empty(slot_bytes, dtype=torch.uint8, device=device)) for _ in range(2))
        streamer = Streamer(loads, streams, (first, second), ReaderThread(streams, staging))
        attach(on_device, always, streamer)
        if device == main_device:
            prefill_on(model, prefilled, device, Apart(apart, streamer))


def run_on(module: torch.nn.Module, device: torch.device) -> None:
    """Have a module that accelerate streams to the main device run on another one; its resident buffers are moved
    there.
    """
    for inner in module.modules():
        for hook in hooks_of(inner):
            hook.execution_device = device
        buffers = own_buffers(inner)
        for name, buffer in buffers.items():
            if buffer is not None and not buffer.is_meta:
                buffers[name] = buffer.to(device)


def attach(streamed: Iterable[StreamedPiece], loads: Iterable[Load], streamer: Streamer) -> None:
    """Have modules run with the weights that a streamer copies, instead of those that accelerate's hooks would copy."""
    replaced = {module: hook for piece in streamed for module, hook in piece.hooks.items()}
    for load in loads:
        for module in load.places:
            hook = StreamingHook(module, replaced[module], streamer, load)
            replace_hook(module, replaced[module], hook)
            module.forward = hook.around(module)  # torch's own hooks are not called on Ctrl-C


class StreamingHook(AlignDevicesHook):  # type: ignore[misc]
    """Replaces accelerate's hook of a streamed module: its weights are on the device only while it runs.

    For other uses of its weights, such as saving the model, it does what accelerate's hook does.
    """

    def __init__(self, module: torch.nn.Module, replaced: AlignDevicesHook, streamer: Streamer, load: Load) -> None:
        self.__dict__.update(replaced.__dict__)
        self._streamer = streamer
        self._load = load
        self._device = replaced.execution_device
        self._weights = replaced.weights_map
        self._running_in: int | None = None
        self._absent: dict[str, torch.Tensor] = {}
        self._versions = {name: version_of(getattr(module, name)) for name in load.places[module]}

    def around(self, module: torch.nn.Module) -> Callable[..., Any]:
        """Return a forward during which other threads wait, and after which the weights are released, even on
        errors.
        """
        forward = module.forward

        @wraps(forward)
        def run(*arguments: Any, **options: Any) -> Any:
            with self._streamer.lock:
                try:
                    self._running_in = threading.get_ident()
                    return forward(*arguments, **options)
                finally:
                    self._streamer.end(module)
                    _set(module, self._absent)
                    self._absent, self._running_in = {}, None

        return run

    def pre_forward(self, module: torch.nn.Module, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        """Provide the weights; accelerate calls this before the module runs, and PEFT before it changes the weights."""
        if not self._is_ahead:
            given: tuple[Any, Any] = super().pre_forward(module, *arguments, **options)
            return given
        if self.io_same_device:
            self.input_device = found_device([arguments, options])
        self._absent = {name: getattr(module, name) for name in self._load.places[module]}
        self._require_unchanged(module)
        _set(module, self._streamer.begin(module, self._load))
        skipped = self.skip_keys
        return sent(arguments, self._device), sent(options, self._device, skipped)

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        """Release the weights; accelerate calls this after the module has run."""
        if not self._is_ahead:
            return super().post_forward(module, output)
        returns = self.io_same_device and self.input_device is not None
        return sent(output, self.input_device, self.skip_keys) if returns else output

    def _require_unchanged(self, module: torch.nn.Module) -> None:
        """Refuse to run if the placeholders of offloaded weights have been changed."""
        for name, place in self._load.places[module].items():
            tensor = self._absent[name]
            if not tensor.is_meta or tensor.dtype != place.dtype or version_of(tensor) != self._versions[name]:
                raise RuntimeError(
                    f"`{name}` of a {type(module).__name__} was changed, which is copied to the accelerator as it was"
                    " loaded: change the checkpoint, and load that"
                )

    @property
    def _is_ahead(self) -> bool:
        """True if the module runs on its planned device, with the weights of its load."""
        is_running = self._running_in == threading.get_ident()
        return is_running and self.execution_device == self._device and self.weights_map is self._weights


class Apart:
    """The loads of modules that store their weights on the CPU and run on an accelerator for long prompts."""

    def __init__(self, loads: Iterable[Load], streamer: Streamer) -> None:
        self._loads = {module: load for load in loads for module in load.places}
        self._streamer = streamer
        self.lock = streamer.lock

    def begin(self, module: torch.nn.Module) -> dict[str, torch.Tensor] | None:
        """Return the weights of a module that begins; `None` if other weights have replaced those of its load."""
        load, own = self._loads[module], own_parameters(module)
        for name, place in load.places[module].items():
            parameter = own[name]
            if parameter is None or load.memory is None:
                return None
            if parameter.data_ptr() != place.within(load.memory).data_ptr():
                return None
        return self._streamer.begin(module, load)

    def end(self, module: torch.nn.Module) -> None:
        """Say that a module has run, or failed."""
        self._streamer.end(module)


def _pin(memory: torch.Tensor, device: torch.device) -> bool:
    """Pin memory, so that the card can read it directly, and return whether that worked."""
    with torch.cuda.device(device):
        return int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0


def _unpin(memories: Iterable[torch.Tensor]) -> None:
    torch.cuda.synchronize()
    for memory in memories:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def _set(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    parameters, buffers = own_parameters(module), own_buffers(module)
    for name, tensor in tensors.items():
        if name not in parameters:
            buffers[name] = tensor
        elif isinstance(tensor, torch.nn.Parameter):
            parameters[name] = tensor
        else:
            parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
