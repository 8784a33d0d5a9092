"""Runs modules on the CPU whose weights are on disk: reads weights ahead of their use into memory that is reused.

accelerate reads a tensor from its file and copies it each time that its module runs, and computes nothing meanwhile.
Here, a thread reads the weights of the next module while the current one computes, into one of two slots, so that
memory never exceeds what the plan has room for. While its module does not run, a parameter is the file's own pages, so
that code that inspects the model sees all of it.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import remove_hook_from_submodules

from devmap_config.dispatch.weights_on_disk import Piece, TensorInFile, mapped_files, pages, place_in_file, place_of
from devmap_config.libraries.torch import own_parameters, version_of
from devmap_config.libraries.transformers import chooses_experts_implementation

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel


class Slots:
    """Memory for pieces: two slots, so that one is free for the next while a piece runs in the other.

    Memory that was taken is free again once no tensor uses it: no parameter, and nothing that a module returned or
    kept.
    """

    def __init__(self, slot_bytes: int) -> None:
        """Reserve slots of this size, each for one piece or several smaller ones."""
        self.slot_bytes = slot_bytes
        self._memory = pages(2 * slot_bytes)
        self._taken: list[tuple[int, int, weakref.ref[NDArray[np.uint8]]]] = []

    def take(self, size_bytes: int) -> NDArray[np.uint8] | None:
        """Return memory of this size within one slot; `None` if neither slot has it free."""
        self._taken = [taken for taken in self._taken if taken[2]() is not None]
        for start in sorted((0, self.slot_bytes, *(last for _, last, _ in self._taken))):
            end = start + size_bytes
            is_free = all(end <= first or last <= start for first, last, _ in self._taken)
            if is_free and end <= (self.slot_bytes if start < self.slot_bytes else 2 * self.slot_bytes):
                memory = self._memory[start:end]
                self._taken.append((start, end, weakref.ref(memory)))
                return memory
        return None


class ReadAhead:
    """A thread that keeps the running and the next pieces of a model in memory.

    The order of pieces is learnt as the model runs; initially it is that of `pieces`, in a circle. Pieces that are
    neither running nor expected are released.
    """

    def __init__(self, pieces: tuple[Piece, ...]) -> None:
        """Start the thread, with memory for two of the largest of these pieces."""
        self.slots = Slots(max(piece.size_bytes for piece in pieces))
        self._next = dict(zip(pieces, (*pieces[1:], *pieces[:1]), strict=True))
        self._last: Piece | None = None
        self._running: list[Piece] = []
        self._present: dict[Piece, Mapping[TensorInFile, torch.Tensor]] = {}
        self._failure: BaseException | None = None
        self._is_idle = self._is_closed = False
        self._changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="devmap-read-ahead", daemon=True)
        self.thread.start()

    def begin(self, piece: Piece) -> Mapping[TensorInFile, torch.Tensor]:
        """Begin a module: wait until its weights are in memory, and return their bytes.

        Raises:
            OSError: if they cannot be read.
        """
        with self._changed:
            if self._last is not None:
                self._next[self._last] = piece
            self._last = piece
            self._running.append(piece)
            self._changed.notify_all()
            while piece not in self._present and self._failure is None:
                self._changed.wait()
            if self._failure is not None:
                raise self._failure
            return self._present[piece]

    def end(self, piece: Piece) -> None:
        """End a module, even if its beginning was not reported."""
        with self._changed:
            if piece in self._running:
                self._running.remove(piece)
                self._changed.notify_all()

    def close(self) -> None:
        """Stop the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            while self._read_next():
                pass
        except BaseException as error:  # the error is passed on to waiting callers
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _read_next(self) -> bool:
        """Wait until there is a piece to read and room for it, and read it; return `False` at the end."""
        work = None
        with self._changed:
            while not self._is_closed and (work := self._next_work()) is None:
                self._is_idle = True
                self._changed.wait()
                self._is_idle = False
        if work is None:
            return False
        piece, memory = work
        data = piece.read(memory)
        with self._changed:
            self._present[piece] = data
            self._changed.notify_all()
        return True

    def _next_work(self) -> tuple[Piece, NDArray[np.uint8]] | None:
        """Release pieces that are neither running nor expected, and return the next piece to read, with memory for
        it.
        """
        expected = self._expected()
        self._present = {piece: self._present[piece] for piece in self._present if piece in (*self._running, *expected)}
        for piece in self._running:
            if piece not in self._present:
                return piece, self._room_for(piece)
        for piece in expected:
            if piece not in self._present:
                memory = self.slots.take(piece.size_bytes)
                return None if memory is None else (piece, memory)
        return None

    def _room_for(self, piece: Piece) -> NDArray[np.uint8]:
        """Return memory for a piece that a caller waits for: that of other pieces if needed, or new memory if all is
        in use.
        """
        memory = self.slots.take(piece.size_bytes)
        while memory is None and (spare := [piece for piece in self._present if piece not in self._running]):
            del self._present[spare[-1]]
            memory = self.slots.take(piece.size_bytes)
        return pages(piece.size_bytes) if memory is None else memory

    def _expected(self) -> list[Piece]:
        """Return the next pieces, as many as there is room for, without sparse ones, whose rows are read when they
        are touched.
        """
        expected: list[Piece] = []
        if self._last is None:
            return expected
        piece, room_bytes = self._last, 2 * self.slots.slot_bytes - sum(piece.size_bytes for piece in self._running)
        for _ in self._next:
            piece = self._next[piece]
            if piece.is_sparse or piece in expected:
                continue
            room_bytes -= piece.size_bytes
            if room_bytes < 0:
                break
            expected.append(piece)
        return expected


class MappedParameter(torch.nn.Parameter):  # type: ignore[misc]
    """The file's pages as a parameter that knows whether it may have been modified, in which case it stays in memory.

    torch counts modifications of a tensor, except those through its `data`.
    """

    _is_taken = False

    @property
    def data(self) -> torch.Tensor:
        """The tensor without its history; modifications through it cannot be detected."""
        self._is_taken = True
        return torch.nn.Parameter.data.__get__(self)

    @data.setter
    def data(self, tensor: torch.Tensor) -> None:
        torch.nn.Parameter.data.__set__(self, tensor)

    @property
    def is_as_read(self) -> bool:
        """True if the tensor is unmodified and requires no gradient, which would modify it."""
        return not (self._is_taken or self.requires_grad or version_of(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.nn.Parameter:
        """Return a copy in memory, which is not mapped."""
        if id(self) not in memo:
            memo[id(self)] = torch.nn.Parameter(self.detach().clone(), self.requires_grad)
        copied: torch.nn.Parameter = memo[id(self)]
        return copied


@dataclass(frozen=True)
class MappedWeights:
    """The mapped tensors of a model: the place of each in its file, and its address in this process."""

    places: Mapping[str, TensorInFile]
    addresses: Mapping[TensorInFile, int]


_MAPPED: weakref.WeakKeyDictionary[torch.nn.Module, MappedWeights] = weakref.WeakKeyDictionary()


def mapped_place(model: torch.nn.Module, name: str) -> TensorInFile | None:
    """Return the place of a mapped tensor of a model; `None` for a tensor that is not mapped, or no longer."""
    mapped = _MAPPED.get(model)
    place = None if mapped is None else mapped.places.get(name)
    if mapped is None or place is None:
        return None
    held = own_parameters(model.get_submodule(name.rpartition(".")[0])).get(name.rpartition(".")[2])
    return place if held is not None and held.data_ptr() == mapped.addresses[place] else None


def map_weights(model: PreTrainedModel, names: Iterable[str], folder: Path) -> None:
    """Map the weights of a model that accelerate would copy from disk, and remove accelerate's hooks from it.

    Resident weights are copied from the checkpoint's pages, which the system would otherwise reclaim and read again.

    Args:
        model: the model, loaded by a map of `cpu` and `disk`.
        names: the tensors that are on disk.
        folder: the folder to which weights are written that their file has in another dtype.

    Raises:
        FileError: if a file cannot be read.
        OSError: if one cannot be written.
    """
    absent = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}
    stated = {name: stored for name in names if name in absent and (stored := place_in_file(model, name)) is not None}
    if not stated:
        return
    remove_hook_from_submodules(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.clone()
    places = {name: place_of(stored, model.get_parameter(name).dtype, folder) for name, stored in stated.items()}
    mapped = mapped_files(places.values())
    parameters: dict[TensorInFile, torch.nn.Parameter] = {}
    held: dict[torch.nn.Module, dict[str, TensorInFile]] = {}
    for name, place in places.items():
        path, _, own_name = name.rpartition(".")
        module, meta = model.get_submodule(path), model.get_parameter(name)
        if place not in parameters:  # tied names share it
            data = mapped[place.file].data(place).view(meta.dtype).view(meta.shape)
            parameters[place] = MappedParameter(data, requires_grad=False)
        own_parameters(module)[own_name] = parameters[place]
        held.setdefault(module, {})[own_name] = place
    addresses = {place: parameter.data_ptr() for place, parameter in parameters.items()}
    pieces = {
        module: Piece({place: mapped[place.file] for place in held[module].values()}, _is_sparse(module))
        for module in model.modules()
        if module in held
    }
    reader = ReadAhead(tuple(pieces.values()))
    _MAPPED[model] = weights = MappedWeights(places, addresses)
    for module, piece in pieces.items():
        _attach(module, piece, reader, held[module], weights)
    weakref.finalize(weights, reader.close)  # copies of the model refer to it, too


def _attach(
    module: torch.nn.Module,
    piece: Piece,
    reader: ReadAhead,
    places: Mapping[str, TensorInFile],
    weights: MappedWeights,
) -> None:
    """Have a module run with the weights that are read ahead; afterwards, its parameters are the file's pages again."""

    def is_as_read(parameter: torch.nn.Parameter | None, place: TensorInFile) -> bool:
        if not isinstance(parameter, MappedParameter) or not parameter.is_as_read:
            return False
        return bool(parameter.data_ptr() == weights.addresses[place])

    def before(module: torch.nn.Module, given: tuple[Any, ...]) -> None:
        if piece.is_sparse and not _are_many_tokens(module, given):
            return
        data, own = reader.begin(piece), own_parameters(module)
        for name, place in places.items():
            parameter = own.get(name)
            if parameter is not None and is_as_read(parameter, place):
                view = data[place].view(parameter.dtype).as_strided(parameter.shape, parameter.stride())
                read: Any = torch.nn.Parameter(view, requires_grad=False)
                read.mapped = parameter
                own[name] = read

    def after(module: torch.nn.Module) -> None:
        own = own_parameters(module)
        own.update({name: getattr(parameter, "mapped", parameter) for name, parameter in own.items()})
        reader.end(piece)
        if piece.is_sparse and all(is_as_read(own.get(name), place) for name, place in places.items()):
            piece.let_go()

    forward = module.forward
    of_any = getattr(forward, "__func__", lambda _module, *arguments, **options: forward(*arguments, **options))

    @wraps(forward)
    def run(module: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        try:
            before(module, (*arguments, *options.values()))
            return of_any(module, *arguments, **options)
        finally:
            after(module)

    # A method, so that copies of the module are independent; torch's own hooks are not called on Ctrl-C.
    module.forward = MethodType(run, module)


def _is_sparse(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Embedding) or chooses_experts_implementation(module)


def _are_many_tokens(module: torch.nn.Module, given: Iterable[Any]) -> bool:
    """Return whether experts get more than one token, which together choose most of them; embeddings always read few
    rows.
    """
    if isinstance(module, torch.nn.Embedding):
        return False
    states = next((value for value in given if isinstance(value, torch.Tensor)), None)
    return states is not None and states.shape[:-1].numel() > 1
