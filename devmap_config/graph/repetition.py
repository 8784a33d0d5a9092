"""Runs only two of the blocks that are alike; the others repeat what the second did, without being run.

Blocks are alike if they are built alike (classes, shapes, settings, the config's entries for each), have alike inputs,
and if the first two of them do the same. A block with other inputs is run. If a block does something that cannot be
repeated (it keeps tensors, reads tensors that it was not given, or runs twice), `NotAlikeError` is raised, and the
caller runs every block of that kind.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from devmap_config.graph.model import ancestors, is_within
from devmap_config.graph.recording import Allocation, brought_along, storage_key
from devmap_config.libraries.torch import tree_flatten, tree_leaves, tree_unflatten
from devmap_config.libraries.transformers import is_own_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from transformers import PreTrainedConfig, PreTrainedModel

    from devmap_config.graph.recording import RecordedEvent, Recorder

Figure = TypeVar("Figure")


class NotAlikeError(Exception):
    """Blocks that looked alike do not do the same, or not in a way that can be repeated.

    Attributes:
        block: one of them, if their kind is known.
    """

    def __init__(self, message: str, block: str | None = None) -> None:
        super().__init__(message)
        self.block = block


Kind = tuple[str, ...]
"""The paths of blocks that are alike: more than two, of which the first two are run."""


def kinds_left(kinds: tuple[Kind, ...], error: NotAlikeError) -> tuple[Kind, ...]:
    """Return the kinds that may still be repeated, without the one whose blocks were found not to be alike."""
    left = tuple(kind for kind in kinds if error.block not in kind)
    return left if left != kinds else ()


def kinds_of(
    model: PreTrainedModel, blocks: Iterable[str], placed: Callable[[str], object] = lambda _path: None
) -> tuple[Kind, ...]:
    """Group the blocks of a model that are made alike, and `placed` alike.

    Code that comes with a model is excluded, as its blocks may depend on their positions. Tests show that transformers'
    own blocks do not, for every architecture with its default config.

    Args:
        model: the model, with tensors or without.
        blocks: the paths of its blocks.
        placed: returns the placement of a block in a form that can be compared.

    Returns:
        The groups of more than two blocks; in smaller ones, no block could be skipped.
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
            if all(
                is_within(first_names[id(module)], path) for module in block.modules()
            ):  # a module that blocks share would run twice
                settings = _settings_at(model.config, place, len(paths))
                traits = (_module_traits(block, place), placed(path), *settings)
                kinds.setdefault((parent, *traits), []).append(path)
    return tuple(tuple(kind) for kind in kinds.values() if len(kind) > 2)


@dataclass(frozen=True)
class _Stretch:
    """The recorded events between the entry of a block and its exit.

    Attributes:
        path: the block.
        given: comparable traits of its inputs.
        gave: for each leaf of its output, the index of an input, or the shape of a new tensor.
        structure: the nesting of its output.
        events: the events, in order.
        left: the storages that it made and left behind, besides its output.
        returned: the storages that it made and returned.
    """

    path: str
    given: object
    gave: tuple[object, ...]
    structure: Any
    events: tuple[RecordedEvent, ...]
    left: frozenset[int]
    returned: frozenset[int | None]

    def moved_to(self, path: str) -> list[RecordedEvent]:
        """Return the events that would have been recorded if another block had run in its place."""
        moved = {
            running: tuple(moved_to(module, self.path, path) for module in running)
            for running in dict.fromkeys(event.running for event in self.events)
        }
        return [replace(event, running=moved[event.running]) for event in self.events]

    def is_like(self, other: _Stretch) -> bool:
        """Return whether two blocks did the same."""
        same = (self.given, self.gave, self.structure) == (other.given, other.gave, other.structure)
        return same and self.moved_to(other.path) == list(other.events)


@dataclass
class Repetition:
    """Records the first two blocks of each kind, and lets the others repeat the second.

    Attributes:
        recorder: records what runs.
        kinds: the groups of blocks that are made alike.
    """

    recorder: Recorder
    kinds: tuple[Kind, ...]
    _stretches: dict[str, _Stretch] = field(default_factory=dict)
    _repeated: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def within(self, model: PreTrainedModel) -> Iterator[None]:
        """Run the first two blocks of each kind, and let the others repeat what the second did, while the context
        lasts.
        """
        with ExitStack() as stack:
            for first, second, *others in self.kinds:
                for path in (first, second):
                    self._observe(stack, model.get_submodule(path), path)
                for path in others:
                    block = model.get_submodule(path)
                    stack.callback(_restore_forward, block, vars(block).get("forward"))
                    block.forward = self._repeating(path, second, block.forward)
            yield

    def complete(self, cache: Iterable[torch.Tensor]) -> None:
        """Check that the blocks that were not run would have done what they repeated.

        Args:
            cache: the tensors that the model returned as its cache; they are all that a block may leave behind.

        Raises:
            NotAlikeError: if the first two blocks of a kind did not do the same, or if one left something else behind,
                or read what it was not given.
        """
        cached = {self.recorder.serial_of(tensor) for tensor in cache}
        likes = Counter(self._repeated.values())
        for first, second, *_others in self.kinds:
            if second in likes and not self._stretches[second].is_like(self._stretches[first]):
                raise NotAlikeError("blocks that are made alike do not do the same", second)
        for path in likes:
            if not self._stretches[path].left <= cached:
                raise NotAlikeError("a block keeps what it made", path)
            if self._stretches[path].returned & cached:
                raise NotAlikeError("a block gives what the cache holds", path)
            if any(path in bond for bond in self.recorder.traffic.bonds):
                raise NotAlikeError("a block reads what it was not given", path)
        self.recorder.stands_for |= {
            storage: (path, count) for path, count in likes.items() for storage in self._stretches[path].left
        }

    def _observe(self, stack: ExitStack, block: torch.nn.Module, path: str) -> None:
        given: list[Any] = []
        position = _position(path)

        def entering(_block: Any, arguments: Any, options: Any) -> None:
            if path in self._stretches:
                raise NotAlikeError("a block runs twice", path)
            traits = _given_traits(arguments, options, position)
            brought = list(brought_along((arguments, options)))
            given[:] = [len(self.recorder.events), tree_leaves((arguments, options)), brought, traits]

        def left(_block: Any, arguments: Any, options: Any, output: Any) -> None:
            mark, inputs, brought, traits = given
            given.clear()
            if list(map(id, brought_along((arguments, options)))) != list(map(id, brought)):
                raise NotAlikeError("a block changes what it was given", path)
            leaves, structure = tree_flatten(output)
            events = tuple(self.recorder.events[mark:])
            allocations = [event for event in events if isinstance(event, Allocation)]
            made = {event.storage for event in allocations if event.size_bytes > 0}
            gone = {event.storage for event in allocations if event.size_bytes < 0}
            given_back = {id(leaf) for leaf in inputs}
            new = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and id(leaf) not in given_back]
            returned = {self.recorder.serial_of(leaf) for leaf in new}
            if returned - made:
                raise NotAlikeError("a block gives what it neither was given nor made", path)
            self._stretches[path] = _Stretch(
                path=path,
                given=traits,
                gave=_outputs(path, leaves, inputs),
                structure=structure,
                events=events,
                left=frozenset(made - gone - returned),
                returned=frozenset(returned),
            )

        stack.callback(block.register_forward_pre_hook(entering, with_kwargs=True).remove)
        # Before the recorder's own hook, which records the exit: it runs for repeating blocks as well.
        stack.callback(block.register_forward_hook(left, with_kwargs=True, prepend=True).remove)

    def _repeating(self, path: str, like: str, own: Callable[..., Any]) -> Callable[..., Any]:
        """Return a substitute for a block's forward, which runs `own` if the block is given something else."""
        position = _position(path)

        def forward(*arguments: Any, **options: Any) -> Any:
            stretch = self._stretches.get(like)
            if stretch is None or path in self._repeated:
                raise NotAlikeError("blocks do not run one after the other", path)
            inputs = tree_leaves((arguments, options))
            if _given_traits(arguments, options, position) != stretch.given:
                return own(*arguments, **options)
            self._repeated[path] = self.recorder.repeated[path] = like
            mark = len(self.recorder.events)
            output = tree_unflatten([_remade(part, inputs) for part in stretch.gave], stretch.structure)
            self.recorder.events[mark:] = stretch.moved_to(path)  # these include the allocation of the output
            return output

        return forward


def _restore_forward(block: torch.nn.Module, own: Any) -> None:
    """Restore a block's forward: the one that accelerate set on it or, with `None`, that of its class."""
    if own is None:
        del block.forward
    else:
        block.forward = own


def spread(figures: Mapping[str, Figure], repeated: Mapping[str, str]) -> dict[str, Figure]:
    """Return figures by module, those of repeated blocks copied to the blocks that repeated them."""
    repeaters: dict[str, list[str]] = {}
    for path, like in repeated.items():
        repeaters.setdefault(like, []).append(path)
    result: dict[str, Figure] = {}
    for path, figure in figures.items():
        block = next((around for around in (path, *ancestors(path)) if around in repeaters or around in repeated), "")
        if block not in repeated:
            result[path] = figure
        for repeater in repeaters.get(block, ()):
            result[moved_to(path, block, repeater)] = figure
    return result


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def like(cls, tensor: torch.Tensor) -> _Tensor:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


@dataclass(frozen=True)
class _Input:
    place: int


def _outputs(path: str, leaves: list[Any], inputs: list[Any]) -> tuple[object, ...]:
    """Return a template for each leaf of a block's output: an index of its inputs, or the shape of a new tensor."""
    places = {id(leaf): place for place, leaf in enumerate(inputs)}
    old = {storage_key(leaf) for leaf in inputs if isinstance(leaf, torch.Tensor)}
    outputs: list[object] = []
    for leaf in leaves:
        if id(leaf) in places:
            outputs.append(_Input(places[id(leaf)]))
        elif leaf is None:
            outputs.append(None)
        elif not isinstance(leaf, torch.Tensor):
            raise NotAlikeError("a block gives what is no tensor", path)
        elif storage_key(leaf) in old or leaf.untyped_storage().nbytes() != leaf.numel() * leaf.element_size():
            raise NotAlikeError("a block gives a part of a tensor", path)
        else:
            old.add(storage_key(leaf))
            outputs.append(_Tensor.like(leaf))
    return tuple(outputs)


def _given_traits(arguments: Any, options: Any, position: int) -> object:
    """Return comparable traits of a block's inputs, and of the tensors in mappings that accelerate moves along."""
    leaves, structure = tree_flatten((arguments, options))
    moved = tuple(_trait(tensor, position) for tensor in brought_along((arguments, options)))
    return (structure, tuple(_trait(leaf, position) for leaf in leaves), moved)


def _remade(output: object, inputs: list[Any]) -> Any:
    if isinstance(output, _Input):
        return inputs[output.place]
    if isinstance(output, _Tensor):
        return torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device=output.device)
    return None


TORCHS_OWN = frozenset(vars(torch.nn.Module()))
"""The attributes that torch gives every module."""


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
    """Return comparable traits of a value; a number that is the block's own position equals that of another block."""
    if isinstance(value, torch.Tensor):
        return _Tensor.like(value)
    if isinstance(value, (bool, float, str, torch.dtype)) or value is None:
        return (type(value), value)
    if isinstance(value, int):
        return (int, "position" if value == position else value)
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(_trait(item, position) for item in value))
    if isinstance(value, dict):
        return tuple((name, _trait(item, position)) for name, item in value.items())
    if isinstance(value, partial):
        return (id(value.func), _trait(value.args, position), _trait(value.keywords, position))
    return id(value)


def _settings_at(config: PreTrainedConfig, position: int, count: int) -> Iterator[object]:
    """Yield the config's entries for the block at a position, from lists that have an entry for every block."""
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) >= max(count, position + 1):
            yield (name, repr(value[position]))
    for name in config.sub_configs:
        if (sub_config := getattr(config, name, None)) is not None:
            yield from _settings_at(sub_config, position, count)


def _position(path: str) -> int:
    return int(path.rpartition(".")[2])


def moved_to(path: str, block: str, other: str) -> str:
    """Return a path within `block` as a path within `other`; other paths unchanged."""
    return other + path[len(block) :] if is_within(path, block) else path
