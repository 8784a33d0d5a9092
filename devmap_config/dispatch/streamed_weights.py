"""Runs on an accelerator what is stored elsewhere: what is to run next is copied there ahead of its use.

accelerate copies one tensor after another, from memory that the system may move, each time that its module runs, and
computes meanwhile nothing. Here the weights of pieces that run one after another lie together in memory that is pinned,
as a load. The accelerator has two slots for loads: while modules compute with what is in one of them, the next load is
copied to the other, in a stream of its own. So a forward takes the longer of copying and computing, and no more than
two of the largest pieces are there at once, which the plan has room for (`execution/pieces.py` says what a piece is).
What is on disk is read by a thread into pinned memory, of which there are two slots as well, and copied from there.

`dispatch/loads.py` lays the weights together, `dispatch/streamer.py` brings them; here modules are given them.
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
    """Memory cannot be pinned, and copying from it would be slower than was planned."""


def stream_weights(
    model: PreTrainedModel,
    pieces: Iterable[Sequence[str]],
    folder: Path | None,
    main_device: torch.device,
    prefilled: Mapping[str, int],
) -> None:
    """Bring ahead, to CUDA cards, the weights that accelerate would bring as they are needed.

    What is in the CPU's memory is moved to pinned memory, load by load: so only one of these is there twice meanwhile.

    Args:
        model: the model, loaded by a map in which modules are on the CPU or the disk.
        pieces: the paths of modules whose weights are to be there at once, in the order in which they run.
        folder: where weights on disk are written anew that their file has in another dtype.
        main_device: where those run that are given in `prefilled`.
        prefilled: the paths of modules that compute on the CPU unless they are given so many tokens, or more.

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
                total = sum(each.nbytes for each in (*memories, *staging))
                raise UnpinnedError(f"{format_bytes(total)} of memory cannot be pinned")
            pinned.append(memory)
        streams, slot_bytes = CudaStreams(device), max(load.size_bytes for load in loads)
        first, second = (Slot(torch.empty(slot_bytes, dtype=torch.uint8, device=device)) for _ in range(2))
        streamer = Streamer(loads, streams, (first, second), ReaderThread(streams, staging))
        attach(on_device, always, streamer)
        if device == main_device:
            prefill_on(model, prefilled, device, Apart(apart, streamer))


def run_on(module: torch.nn.Module, device: torch.device) -> None:
    """Have what accelerate streams of a module, to the main device, run on another; buffers that stay go there."""
    for each in module.modules():
        for hook in hooks_of(each):
            hook.execution_device = device
        buffers = own_buffers(each)
        for name, buffer in buffers.items():
            if buffer is not None and not buffer.is_meta:
                buffers[name] = buffer.to(device)


def attach(streamed: Iterable[StreamedPiece], loads: Iterable[Load], streamer: Streamer) -> None:
    """Have modules run with what a streamer brings, in place of what accelerate's hooks would copy."""
    replaced = {module: hook for piece in streamed for module, hook in piece.hooks.items()}
    for load in loads:
        for module in load.places:
            hook = StreamingHook(module, replaced[module], streamer, load)
            replace_hook(module, replaced[module], hook)
            module.forward = hook.around(module)  # torch's own hooks are not called at a Ctrl-C


class StreamingHook(AlignDevicesHook):  # type: ignore[misc]
    """Stands in for accelerate's hook of a module that is streamed: its weights are there while it runs, and only then.

    Where its weights are asked for otherwise, as they are when the model is saved, it does what accelerate's does.
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
        """Return its forward, during which other threads wait; its weights are away after it, whatever ends it."""
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
        """Called by accelerate before the module runs, and by PEFT where its weights are to be changed."""
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
        """Called by accelerate after the module has run."""
        if not self._is_ahead:
            return super().post_forward(module, output)
        returns = self.io_same_device and self.input_device is not None
        return sent(output, self.input_device, self.skip_keys) if returns else output

    def _require_unchanged(self, module: torch.nn.Module) -> None:
        """Refuse to run with weights that stand in for others while these are away, and that have been changed."""
        for name, place in self._load.places[module].items():
            tensor = self._absent[name]
            if not tensor.is_meta or tensor.dtype != place.dtype or version_of(tensor) != self._versions[name]:
                raise RuntimeError(
                    f"`{name}` of a {type(module).__name__} was changed, which is copied to the accelerator as it was"
                    " loaded: change the checkpoint, and load that"
                )

    @property
    def _is_ahead(self) -> bool:
        """True if the module runs where it was planned to, with the weights of its load."""
        is_running = self._running_in == threading.get_ident()
        return is_running and self.execution_device == self._device and self.weights_map is self._weights


class Apart:
    """The loads of modules that have their weights on the CPU and run on an accelerator for long prompts."""

    def __init__(self, loads: Iterable[Load], streamer: Streamer) -> None:
        self._loads = {module: load for load in loads for module in load.places}
        self._streamer = streamer
        self.lock = streamer.lock

    def begin(self, module: torch.nn.Module) -> dict[str, torch.Tensor] | None:
        """Return the weights of a module that begins; `None` if others were put in the place of its load's."""
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
    """Have memory stay where it is, so that the card reads it by itself; return whether it does."""
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
