"""Plans of a model over several devices, made without a profile: some run, some do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devmap_config.devices import CPU, DISK, Device
from devmap_config.execution.assignment import Assignment, Location
from devmap_config.execution.executor import Executor
from devmap_config.plan.plan import Plan, device_uses

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from devmap_config.graph.model import ModelGraph, Module

CARDS = tuple(Device("cuda", index) for index in range(3))
CAPACITY_BYTES = 1 << 40


def plan_of(graph: ModelGraph, homes: Mapping[str, Location], *, offload_buffers: bool = False) -> Plan:
    """Return the plan with these units on these devices; a unit within another one is removed from it."""
    tensors: dict[str, list[str]] = {}
    for name in graph.tensors:
        around = (unit for unit in homes if name == unit or name.startswith(f"{unit}."))
        tensors.setdefault(max(around, key=len), []).append(name)
    assignments = tuple(Assignment(unit, tuple(tensors.get(unit, ())), home) for unit, home in homes.items())
    executor = Executor(offload_buffers=offload_buffers)
    capacities = dict.fromkeys((*CARDS, CPU, DISK), CAPACITY_BYTES)
    return Plan(
        strategy="manual",
        executor=executor,
        main_device=executor.main_device(each.location.stored_on for each in assignments),
        assignments=assignments,
        devices=device_uses(graph, assignments, capacities, executor),
    )


def plans_that_run(graph: ModelGraph) -> Iterator[tuple[str, Plan]]:
    """Yield plans that run, each with its description; they split blocks only for parts that compute on the CPU."""
    card, other, third = (Location(card, card) for card in CARDS)
    streamed, read, computed = Location(CPU, CARDS[0]), Location(DISK, CARDS[0]), Location(CPU, CPU)
    yield "one card", plan_of(graph, _in_runs(graph, [card]))
    yield "three cards", plan_of(graph, _in_runs(graph, [card, other, third]))
    yield "there and back", plan_of(graph, _in_runs(graph, [other, card, other]))
    yield "streamed from two stores", plan_of(graph, _in_runs(graph, [card, streamed, read]))
    yield "buffers streamed", plan_of(graph, _in_runs(graph, [card, streamed]), offload_buffers=True)
    yield "streamed in turn", plan_of(graph, _in_turn(graph, [card, streamed]))
    yield "cards in turn", plan_of(graph, _in_turn(graph, [card, other]))
    yield "CPU and disk", plan_of(graph, _in_runs(graph, [computed, Location(DISK, CPU)]))
    yield "computed on the CPU", plan_of(graph, _in_runs(graph, [card, computed, other]))
    homes = _in_runs(graph, [card, other])
    for part in filter(None, [_largest_part(graph, block) for block in _layers(graph)]):
        homes = _with_part(graph, homes, part, computed)
    yield "parts computed on the CPU", plan_of(graph, homes)


def plans_that_do_not(graph: ModelGraph) -> Iterator[tuple[str, Plan]]:
    """Yield plans that do not run: they split the first, the last or a middle block of a card."""
    homes = _in_runs(graph, [Location(card, card) for card in CARDS[:2]])
    layers = [path for path in _layers(graph) if homes[path].runs_on == CARDS[1]]
    for place in dict.fromkeys((0, len(layers) // 2, len(layers) - 1)):
        for name, stored in (("elsewhere", CARDS[0]), ("on a third card", CARDS[2])):
            for part in (_largest_part(graph, layers[place]), _smallest_part(graph, layers[place])):
                if part is not None:
                    yield f"{part} is {name}", plan_of(graph, _with_part(graph, homes, part, Location(stored, stored)))
    yield "a head that is elsewhere", plan_of(graph, homes | {graph.blocks[-1]: Location(CARDS[2], CARDS[2])})


def _in_runs(graph: ModelGraph, homes: list[Location]) -> dict[str, Location]:
    """Divide the layers, in order, into one run per home; modules between and after them join the run before."""
    layers = _layers(graph)
    placed, seen = {}, 0
    for path in graph.blocks:
        seen += path in layers
        placed[path] = homes[max(seen - 1, 0) * len(homes) // len(layers)]
    return _whole(graph, placed, homes[0])


def _with_part(graph: ModelGraph, homes: dict[str, Location], part: str, home: Location) -> dict[str, Location]:
    """Return the plan with a part of a block on another device; no unit is within another."""
    block = part.rpartition(".")[0]
    module = graph.modules[block]  # type: ignore[index]
    parts = [*(tensor.name for tensor in module.own_tensors), *(child.path for child in module.children)]
    return (
        {unit: old for unit, old in homes.items() if unit != block} | dict.fromkeys(parts, homes[block]) | {part: home}
    )


def _in_turn(graph: ModelGraph, homes: list[Location]) -> dict[str, Location]:
    return _whole(graph, {path: homes[place % len(homes)] for place, path in enumerate(graph.blocks)}, homes[0])


def _whole(graph: ModelGraph, placed: dict[str, Location], first: Location) -> dict[str, Location]:
    bare = [name for name in graph.tensors if not any(name.startswith(f"{path}.") for path in graph.blocks)]
    homes = placed | dict.fromkeys(bare, first)
    for group in graph.tied_groups:  # one tensor is in one place
        blocks = [path for path in graph.blocks if any(name.startswith(f"{path}.") for name in group)]
        homes |= dict.fromkeys(blocks, homes[blocks[0]])
    return homes


def _layers(graph: ModelGraph) -> list[str]:
    """Return the blocks that are items of a list, or all blocks if the layers can be split into smaller ones."""
    numbered = [path for path in graph.blocks if path.rpartition(".")[2].isdigit() and graph.modules[path].children]
    return numbered or list(graph.blocks)


def _parts(graph: ModelGraph, block: str) -> list[Module]:
    return sorted(
        (part for part in graph.modules[block].children if any(part.tensors())),  # type: ignore[index]
        key=lambda part: sum(tensor.size_bytes for tensor in part.tensors()),
    )


def _largest_part(graph: ModelGraph, block: str) -> str | None:
    parts = _parts(graph, block)
    return parts[-1].path if parts else None


def _smallest_part(graph: ModelGraph, block: str) -> str | None:
    parts = _parts(graph, block)
    return parts[0].path if parts else None
