"""Runs only two of the blocks that are alike; the others repeat what the second did, without being run.

Blocks are alike that are made alike (classes, shapes, settings, what the config says of each), are given the same, and
of which the first two do the same. Where one does what cannot be repeated (keeps what it made, reads what it was not
given, runs twice), this is an error, and the caller runs every block.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from devmap_config.graph.model import ancestors
from devmap_config.graph.recording import Event, brought_along, storage_key
from devmap_config.libraries.torch import tree_flatten, tree_leaves, tree_unflatten
from devmap_config.libraries.transformers import is_own_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from transformers import PreTrainedConfig, PreTrainedModel

    from devmap_config.graph.recording import Meter

Figure = TypeVar("Figure")


class NotAlikeError(Exception):
    """Blocks that looked alike do not do the same, or not in a way that can be repeated."""


Kind = tuple[str, ...]
"""The paths of blocks that are made alike: more than the two that are run."""


def kinds_of(model: PreTrainedModel, blocks: Iterable[str]) -> tuple[Kind, ...]:
    """The blocks of a model that are made alike, where there are enough of them to spare any.

    Code that comes with a model is not trusted with this: a block of it may look at its position while it runs. That
    transformers' own do not is tested for every type, with its default config.
    """
    if not is_own_model(model):
        return ()
    lists: dict[str, list[str]] = {}
    for path in blocks:
        parent, _, position = path.rpartition(".")
        if position.isdigit():
            lists.setdefault(parent, []).append(path)
    first_names = {id(module): path for path, module in model.named_modules()}
    kinds: dict[object, list[str]] = {}
    for parent, paths in lists.items():
        for path in paths:
            block, place = model.get_submodule(path), _position(path)
            if all(_is_within(first_names[id(module)], path) for module in block.modules()):  # it shares none
                traits = (_module_traits(block, place), *_settings_at(model.config, place, len(paths)))
                kinds.setdefault((parent, *traits), []).append(path)
    return tuple(tuple(kind) for kind in kinds.values() if len(kind) > 2)


@dataclass(frozen=True)
class _Stretch:
    """What happened while a block ran."""

    path: str
    given: object
    gave: tuple[object, ...]
    """Of every leaf of its output which input it was, or the shape of a new tensor."""
    structure: Any
    events: tuple[Event, ...]
    left: frozenset[int | None]
    """The storages that it made and left behind, besides its output."""
    returned: frozenset[int | None]
    """The storages of its output that it made."""

    def moved_to(self, path: str) -> list[Event]:
        """What would have happened, had another block run."""
        return [
            Event(e.storage, e.size_bytes, tuple(_moved(r, self.path, path) for r in e.running)) for e in self.events
        ]

    def is_like(self, other: _Stretch) -> bool:
        """Whether two blocks did the same."""
        mine = [(event.size_bytes, event.running) for event in self.moved_to(other.path)]
        others = [(event.size_bytes, event.running) for event in other.events]
        same = (self.given, self.gave, self.structure) == (other.given, other.gave, other.structure)
        return same and mine == others


@dataclass
class Repetition:
    """What the first two blocks of each kind do under a recorder, and who repeated it."""

    recorder: Meter
    kinds: tuple[Kind, ...]
    _stretches: dict[str, _Stretch] = field(default_factory=dict)

    @contextmanager
    def within(self, model: PreTrainedModel) -> Iterator[None]:
        """Let the first two blocks of each kind run, and the others repeat what the second did."""
        with ExitStack() as stack:
            for first, second, *others in self.kinds:
                for path in (first, second):
                    self._observe(stack, model.get_submodule(path), path)
                for path in others:
                    block = model.get_submodule(path)
                    block.forward = self._repeating(path, second)
                    stack.callback(block.__dict__.pop, "forward")
            yield

    def complete(self, cache: Iterable[torch.Tensor]) -> None:
        """Count for the blocks that stood still what was counted for those whose doings they repeated.

        Args:
            cache: what the model returned as its cache; a block may leave that behind.

        Raises:
            NotAlikeError: where the first two of a kind did not do the same, or one left something else, or read what
                it was not given.
        """
        recorder, traffic = self.recorder, self.recorder.traffic
        cached = {recorder.serial_of(tensor) for tensor in cache}
        likes = dict.fromkeys(recorder.repeated.values())
        for first, second, *_others in self.kinds:
            if second in likes and not self._stretches[second].is_like(self._stretches[first]):
                raise NotAlikeError("blocks that are made alike do not do the same")
        if any(self._stretches[path].left - cached for path in likes):
            raise NotAlikeError("a block keeps what it made")
        if any(self._stretches[path].returned & cached for path in likes):
            raise NotAlikeError("a block gives what the cache holds")
        if any(path in likes for bond in traffic.bonds for path in bond):
            raise NotAlikeError("a block reads what it was not given")
        recorder.operations = spread(recorder.operations, recorder.repeated)
        recorder.touched_bytes = spread(recorder.touched_bytes, recorder.repeated)
        recorder.launches = spread(recorder.launches, recorder.repeated)
        traffic.input_bytes = spread(traffic.input_bytes, recorder.repeated)
        traffic.output_bytes = spread(traffic.output_bytes, recorder.repeated)
        recorder.order = _whole_order(recorder.order, recorder.repeated)

    def _observe(self, stack: ExitStack, block: torch.nn.Module, path: str) -> None:
        given: list[Any] = []
        position = _position(path)

        def entering(_block: Any, arguments: Any, options: Any) -> None:
            if path in self._stretches:
                raise NotAlikeError("a block runs twice")
            traits = _given_traits(arguments, options, position)
            brought = list(brought_along((arguments, options)))
            given[:] = [len(self.recorder.events), tree_leaves((arguments, options)), brought, traits]

        def left(_block: Any, arguments: Any, options: Any, output: Any) -> None:
            mark, inputs, brought, traits = given
            given.clear()
            if list(map(id, brought_along((arguments, options)))) != list(map(id, brought)):
                raise NotAlikeError("a block changes what it was given")
            leaves, structure = tree_flatten(output)
            events = tuple(self.recorder.events[mark:])
            made = {event.storage for event in events if event.size_bytes > 0}
            gone = {event.storage for event in events if event.size_bytes < 0}
            given_back = {id(leaf) for leaf in inputs}
            new = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and id(leaf) not in given_back]
            returned = {self.recorder.serial_of(leaf) for leaf in new}
            if returned - made:
                raise NotAlikeError("a block gives what it neither was given nor made")
            self._stretches[path] = _Stretch(
                path=path,
                given=traits,
                gave=_gifts(leaves, inputs),
                structure=structure,
                events=events,
                left=frozenset(made - gone - returned),
                returned=frozenset(returned),
            )

        stack.callback(block.register_forward_pre_hook(entering, with_kwargs=True).remove)
        stack.callback(block.register_forward_hook(left, with_kwargs=True).remove)

    def _repeating(self, path: str, like: str) -> Callable[..., Any]:
        position = _position(path)

        def forward(*arguments: Any, **options: Any) -> Any:
            stretch = self._stretches.get(like)
            if stretch is None or path in self.recorder.repeated:
                raise NotAlikeError("blocks do not run one after the other")
            inputs = tree_leaves((arguments, options))
            if _given_traits(arguments, options, position) != stretch.given:
                raise NotAlikeError("blocks that are made alike are not given the same")
            self.recorder.repeated[path] = like
            mark = len(self.recorder.events)
            output = tree_unflatten([_given(gift, inputs) for gift in stretch.gave], stretch.structure)
            self.recorder.events[mark:] = stretch.moved_to(path)  # which tell of the output as well
            return output

        return forward


def spread(figures: Mapping[str, Figure], repeated: Mapping[str, str]) -> dict[str, Figure]:
    """Figures by module; those of the blocks that stood still are those of the blocks that they repeated."""
    repeaters: dict[str, list[str]] = {}
    for path, like in repeated.items():
        repeaters.setdefault(like, []).append(path)
    result: dict[str, Figure] = {}
    for path, figure in figures.items():
        block = next((each for each in (path, *ancestors(path)) if each in repeaters or each in repeated), "")
        if block not in repeated:
            result[path] = figure
        for repeater in repeaters.get(block, ()):
            result[_moved(path, block, repeater)] = figure
    return result


def _whole_order(order: Mapping[str, None], repeated: Mapping[str, str]) -> dict[str, None]:
    ran: dict[str, list[str]] = {}
    for path in order:
        for block in (path, *ancestors(path)):
            ran.setdefault(block, []).append(path)
    return {
        _moved(each, repeated[path], path) if path in repeated else each: None
        for path in order
        for each in (ran[repeated[path]] if path in repeated else [path])
    }


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Input:
    place: int


def _gifts(leaves: list[Any], inputs: list[Any]) -> tuple[object, ...]:
    """What a block gave: one of its inputs, or a tensor that is all of its storage."""
    places = {id(leaf): place for place, leaf in enumerate(inputs)}
    old = {storage_key(leaf) for leaf in inputs if isinstance(leaf, torch.Tensor)}
    gifts: list[object] = []
    for leaf in leaves:
        if id(leaf) in places:
            gifts.append(_Input(places[id(leaf)]))
        elif leaf is None:
            gifts.append(None)
        elif not isinstance(leaf, torch.Tensor):
            raise NotAlikeError("a block gives what is no tensor")
        elif storage_key(leaf) in old or leaf.untyped_storage().nbytes() != leaf.numel() * leaf.element_size():
            raise NotAlikeError("a block gives a part of a tensor")
        else:
            old.add(storage_key(leaf))
            gifts.append(_Tensor(tuple(leaf.shape), leaf.stride(), leaf.dtype))
    return tuple(gifts)


def _given_traits(arguments: Any, options: Any, position: int) -> object:
    """What can be compared of what a block is given: also what mappings hold that accelerate moves with it."""
    leaves, structure = tree_flatten((arguments, options))
    moved = tuple(_trait(tensor, position) for tensor in brought_along((arguments, options)))
    return (structure, tuple(_trait(leaf, position) for leaf in leaves), moved)


def _given(gift: object, inputs: list[Any]) -> Any:
    if isinstance(gift, _Input):
        return inputs[gift.place]
    if isinstance(gift, _Tensor):
        return torch.empty_strided(gift.shape, gift.stride, dtype=gift.dtype)
    return None


TORCHS_OWN = frozenset(vars(torch.nn.Module()))
"""What torch keeps of every module."""


def _module_traits(module: torch.nn.Module, position: int) -> object:
    own = {name: value for name, value in vars(module).items() if name not in TORCHS_OWN}
    tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    return (
        type(module),
        module.training,
        _trait(own, position),
        _trait(tensors, position),
        tuple((name, _module_traits(child, position)) for name, child in module.named_children()),
    )


def _trait(value: Any, position: int) -> object:
    """What can be compared of a value: a number that is a block's own position is the same as another's."""
    if isinstance(value, torch.Tensor):
        return _Tensor(tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, (bool, float, str, torch.dtype)) or value is None:
        return (type(value), value)
    if isinstance(value, int):
        return (int, "position" if value == position else value)
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(_trait(each, position) for each in value))
    if isinstance(value, dict):
        return tuple((name, _trait(each, position)) for name, each in value.items())
    if isinstance(value, partial):
        return (id(value.func), _trait(value.args, position), _trait(value.keywords, position))
    return id(value)


def _settings_at(config: PreTrainedConfig, position: int, count: int) -> Iterator[object]:
    """What the config says of the block at a position, in lists that say something of every block."""
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) >= max(count, position + 1):
            yield (name, repr(value[position]))
    for name in config.sub_configs:
        if (sub_config := getattr(config, name, None)) is not None:
            yield from _settings_at(sub_config, position, count)


def _position(path: str) -> int:
    return int(path.rpartition(".")[2])


def _is_within(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def _moved(path: str, block: str, other: str) -> str:
    return other + path[len(block) :] if _is_within(path, block) else path
