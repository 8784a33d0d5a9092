"""From rules and machine to a `Problem`: what is pinned where, what must stay together, what is forbidden."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devmap_config.diagnostics.diagnostic import Related
from devmap_config.placement.problem import Problem
from devmap_config.placement.units import fold
from devmap_config.profile.devices import expand_devices
from devmap_config.rules.folding import fold_paths

if TYPE_CHECKING:
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.graph.model import ModelGraph, TensorName
    from devmap_config.hardware.inventory import Inventory
    from devmap_config.profile.loading import LoadedProfile
    from devmap_config.rules.resolution import Decision, Resolution
    from devmap_config.rules.rule import Rule


def problem_of(graph: ModelGraph, inventory: Inventory, resolution: Resolution, sink: Sink) -> Problem:
    """The placement problem that rules and machine pose; what contradicts itself goes to the sink."""
    pinned: dict[TensorName, str] = {}
    for group in _united([*graph.tied_groups, *(names for _, names in resolution.groups)], graph):
        deciding = [resolution.decisions[name] for name in group if name in resolution.decisions]
        if not deciding:
            continue
        _check_agreement(group, deciding, graph, resolution, sink)
        pinned |= dict.fromkeys(group, deciding[0].device)
    _check_forbidden(pinned, resolution, sink)
    problem = Problem(
        graph=graph,
        capacities=inventory.capacities,
        pinned=pinned,
        groups=tuple(names for _, names in resolution.groups),
        forbidden={name: tuple(rules) for name, rules in resolution.forbidden.items()},
    )
    _check_possible(problem, resolution, sink)
    return problem


def settle_single_device(loaded: LoadedProfile, problem: Problem, sink: Sink) -> str | None:
    """The device that `single` is told to use; checks that strategy and the keys beside it agree.

    `manual` must say of every tensor where it goes.
    """
    placement = loaded.profile.placement
    if placement.device_map is not None and placement.strategy != "manual":
        sink.error(
            "unused-key",
            f"`device_map` has no effect under `strategy: {placement.strategy}`",
            loaded.key_span("placement", "device_map"),
            help="say `strategy: manual`, or remove it; to decide for a part of the model, use `pins`",
        )
    if placement.strategy == "manual" and not _has_errors_in_map(loaded, sink):
        _check_covered(loaded, problem, sink)
    if placement.device is None:
        return None
    if placement.strategy != "single":
        sink.error(
            "unused-key",
            f"`device` has no effect under `strategy: {placement.strategy}`",
            loaded.key_span("placement", "device"),
            help="say `strategy: single`, or remove it",
        )
        return None
    kind = next((device.partition(":")[0] for device in problem.accelerators), "cuda")
    device = expand_devices(placement.device, kind)[0]
    if device not in problem.capacities:
        sink.error(
            "unknown-device",
            f"{device} is not a device of this profile",
            loaded.span("placement", "device"),
            help=f"list it under `hardware.devices`; listed are {', '.join(problem.capacities)}",
        )
    return device


def _has_errors_in_map(loaded: LoadedProfile, sink: Sink) -> bool:
    """Whether something is wrong with the map itself: what it then leaves uncovered follows from that."""
    place = loaded.span("placement", "device_map")
    begin, end = (place.line, place.column), (place.end_line, place.end_column)
    return any(
        each.span.file == place.file and begin <= (each.span.line, each.span.column) <= end
        for each in sink
        if each.span is not None and each.severity == "error"
    )


def _check_covered(loaded: LoadedProfile, problem: Problem, sink: Sink) -> None:
    uncovered = tuple(name for name in problem.graph.tensors if name not in problem.pinned)
    if not uncovered:
        return
    covered = {name: name in problem.pinned for name in problem.graph.tensors}
    patterns = fold_paths(unit.name for unit, is_covered in fold(problem.graph, covered) if not is_covered)
    shown = ", ".join(f"`{pattern}`" for pattern in patterns[:4]) + (", …" if len(patterns) > 4 else "")
    sink.error(
        "uncovered-tensor",
        f"the map gives no device to {len(uncovered)} tensor{'s' if len(uncovered) > 1 else ''}: {shown}",
        loaded.key_span("placement", "device_map"),
        help=f'add `"{patterns[0]}": 0`, or whatever device is right, for each of them',
    )


def _united(groups: list[tuple[TensorName, ...]], graph: ModelGraph) -> list[tuple[TensorName, ...]]:
    """Every tensor in the one group it belongs to, overlapping groups joined; in order of definition."""
    leader: dict[TensorName, TensorName] = {name: name for name in graph.tensors}

    def find(name: TensorName) -> TensorName:
        while leader[name] != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    for group in groups:
        for name in group[1:]:
            leader[find(name)] = find(group[0])
    united: dict[TensorName, list[TensorName]] = {}
    for name in graph.tensors:
        united.setdefault(find(name), []).append(name)
    return [tuple(names) for names in united.values()]


def _check_agreement(
    group: tuple[TensorName, ...], deciding: list[Decision], graph: ModelGraph, resolution: Resolution, sink: Sink
) -> None:
    first = min(deciding, key=lambda decision: decision.rule.span)
    others = [decision for decision in deciding if decision.device != first.device]
    if not others:
        return
    other = min(others, key=lambda decision: decision.rule.span)
    related = (Related(message=f"{first.device} here", span=first.rule.span),)
    tie = next((tied for tied in graph.tied_groups if set(tied) <= set(group)), None)
    keeping = next((rule for rule, names in resolution.groups if set(names) <= set(group)), None)
    if keeping is not None:
        sink.error(
            "conflicting-pins",
            f"`{keeping.text}` is to be kept together, and rules put it on {first.device} and {other.device}",
            other.rule.span,
            help="give both rules the same device, or drop `keep_together`",
            related=(*related, Related(message="kept together here", span=keeping.span)),
        )
    elif tie is not None:
        sink.error(
            "split-tie",
            f"{', '.join(f'`{name}`' for name in tie)} are one tensor,"
            f" and cannot be on {first.device} and {other.device}",
            other.rule.span,
            help="give both rules the same device",
            related=related,
        )


def _check_possible(problem: Problem, resolution: Resolution, sink: Sink) -> None:
    """A part that is forbidden everywhere has no place."""
    for name, rules in resolution.forbidden.items():
        if set(problem.capacities) <= set(rules) and name not in problem.pinned:
            rule = max(rules.values(), key=lambda rule: rule.span)
            sink.error(
                "conflicting-pins",
                f"`{name}` is forbidden on every device",
                rule.span,
                help=f"leave it one of {', '.join(problem.capacities)}",
            )
            return


def _check_forbidden(pinned: dict[TensorName, str], resolution: Resolution, sink: Sink) -> None:
    reported: set[tuple[int, int]] = set()
    for name, device in pinned.items():
        forbidding: Rule | None = resolution.forbidden.get(name, {}).get(device)
        decision = resolution.decisions.get(name)
        if forbidding is None or decision is None or (id(forbidding), id(decision.rule)) in reported:
            continue
        reported.add((id(forbidding), id(decision.rule)))
        first, second = sorted((forbidding, decision.rule), key=lambda rule: rule.span)
        sink.error(
            "conflicting-pins",
            f"one rule puts `{name}` on {device}, and another forbids that",
            second.span,
            help="remove one of them",
            related=(Related(message="the other is here", span=first.span),),
        )
