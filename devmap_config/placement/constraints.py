"""Builds the placement problem from the rules and the machine: tensors that are pinned, kept together or forbidden."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from devmap_config.devices import CPU
from devmap_config.diagnostics.diagnostic import Related
from devmap_config.execution.units import fold, united
from devmap_config.placement.problem import Aim, Problem
from devmap_config.profile.device_names import device_meant, where_to_list
from devmap_config.profile.schema import OPTIMAL_STRATEGIES
from devmap_config.profile.writing import example_with_rates
from devmap_config.rules.folding import fold_paths

DEFAULT_NEW_TOKENS = 256
"""The tokens that a request generates if the profile does not say, for `optimize: request`."""

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Sink, Span
    from devmap_config.execution.segments import Phase
    from devmap_config.graph.model import ModelGraph, TensorName
    from devmap_config.hardware.inventory import Inventory, InventoryDevice
    from devmap_config.prepared import Prepared
    from devmap_config.profile.loading import LoadedProfile
    from devmap_config.rules.resolution import Decision, Resolution
    from devmap_config.rules.rule import Rule


@dataclass(frozen=True)
class Repairs:
    """Constraints beyond the rules that a plan needs in order to run, as a dry run showed.

    Attributes:
        together: groups of tensors that must share a device.
        reserved_bytes: bytes that must stay free on a device.
        kept: devices of tensors that must be on the device that reads them.
    """

    together: tuple[tuple[TensorName, ...], ...] = ()
    reserved_bytes: Mapping[Device, int] = field(default_factory=dict)
    kept: Mapping[TensorName, Device] = field(default_factory=dict)


NO_REPAIRS = Repairs()


def build_problem(prepared: Prepared, sink: Sink, repairs: Repairs = NO_REPAIRS) -> Problem | None:
    """Build the placement problem from the rules and the machine.

    Args:
        prepared: the profile with its model and rules.
        sink: takes the diagnostics.
        repairs: further constraints, from a dry run.

    Returns:
        The problem, or `None` if rules contradict each other or a needed figure is missing.
    """
    problem = _constrained(prepared, sink, repairs.together)
    reserved = repairs.reserved_bytes
    capacities = {device: size - reserved.get(device, 0) for device, size in problem.capacities.items()}
    problem = keeping(replace(problem, capacities=capacities), repairs.kept)
    if "strategy" not in prepared.loaded.profile.placement.doubtful:
        problem = replace(problem, single_device=_single_device(prepared.loaded, problem, sink))
        problem = replace(problem, aim=_aim(prepared, problem, sink))
    return None if sink.has_errors else problem


def _constrained(prepared: Prepared, sink: Sink, together: tuple[tuple[TensorName, ...], ...]) -> Problem:
    graph, resolution, quantization = prepared.graph, prepared.resolution, prepared.model.quantization
    pinned: dict[TensorName, Device] = {}
    adapted = [tuple(tensor.name for tensor in module.own_tensors) for module in graph.adapted_modules]
    groups = [*graph.tied_groups, *adapted, *(names for _, names in resolution.groups), *together]
    for group in _united(groups, graph):
        deciding = [resolution.decisions[name] for name in group if name in resolution.decisions]
        if not deciding:
            continue
        _check_agreement(group, deciding, graph, resolution, sink)
        pinned |= dict.fromkeys(group, deciding[0].device)
    _check_forbidden(pinned, resolution, sink)
    problem = Problem(
        graph=graph,
        capacities=prepared.capacities,
        pinned=pinned,
        computed={name: compute for name in pinned if (compute := resolution.compute_of(name)) is not None},
        groups=(*(names for _, names in resolution.groups), *together),
        forbidden={name: tuple(rules) for name, rules in resolution.forbidden.items()},
        quantizer_lowers_budgets=prepared.model.lowers_budgets,
        refused=() if quantization is None else quantization.refused_devices,
    )
    _check_possible(problem, resolution, sink)
    return problem


def keeping(problem: Problem, kept: Mapping[TensorName, Device]) -> Problem:
    """Return the problem with these tensors and their groups also pinned to these devices, unless a rule pins them."""
    pinned = dict(problem.pinned)
    for group in _united([*problem.graph.tied_groups, *problem.groups], problem.graph) if kept else ():
        needed = next((kept[name] for name in group if name in kept), None)
        if needed is not None:
            pinned |= {name: needed for name in group if name not in problem.pinned}
    return replace(problem, pinned=pinned)


def _single_device(loaded: LoadedProfile, problem: Problem, sink: Sink) -> Device | None:
    """Return the device of `strategy: single`, and check that the strategy and the keys beside it agree.

    With `manual`, every tensor must have a device.
    """
    placement = loaded.profile.placement
    strategy, device_map = placement.strategy.value, placement.device_map
    if device_map.value is not None and strategy != "manual":
        sink.error(
            "unused-key",
            f"`device_map` has no effect under `strategy: {strategy}`",
            device_map.key_span,
            help="write `strategy: manual`, or remove it; to decide for a part of the model, use `pins`",
        )
    deciding = [pin.span for pin in placement.pins] + ([device_map.span] if device_map.is_written else [])
    if strategy == "manual" and not any(_has_errors_within(place, sink) for place in deciding):
        _check_covered(loaded, problem, sink)
    if placement.device.value is None:
        return None
    if strategy != "single":
        sink.error(
            "unused-key",
            f"`device` has no effect under `strategy: {strategy}`",
            placement.device.key_span,
            help="write `strategy: single`, or remove it",
        )
        return None
    kind = next((device.kind for device in problem.accelerators), "cuda")
    device = device_meant(placement.device.value, kind)
    if device not in problem.capacities and loaded.profile.hardware.knows_devices:
        sink.error(
            "unknown-device",
            f"{device} is not a device of this profile",
            placement.device.span,
            help=where_to_list(device, problem.capacities),
        )
    return device


def _aim(prepared: Prepared, problem: Problem, sink: Sink) -> Aim | None:
    """Return the objective of the strategy, or `None` if it has none or a figure is missing.

    Report every figure that `fastest` needs and the profile does not give.
    """
    loaded, inventory, strategy = prepared.loaded, prepared.inventory, prepared.strategy
    if strategy not in OPTIMAL_STRATEGIES:
        return None
    workload = loaded.profile.workload
    phases: tuple[tuple[Phase, int], ...] = ((workload.optimize, 1),) if workload.optimize != "request" else ()
    if workload.optimize == "request":
        phases = (("prefill", 1), ("decode", workload.new_tokens or DEFAULT_NEW_TOKENS))
    if not problem.graph.decodes:
        phases = (("prefill", 1),)  # such a model has no other phase
    if strategy == "longest-context" and workload.context_length.value is None:
        if "context_length" not in workload.doubtful:
            sink.error(
                "missing-workload",
                "`longest-context` looks for the length that fits, and the profile names no workload",
                loaded.profile.placement.strategy.span,
                help="name the least that must fit: `workload: {context_length: 4096}`",
            )
        return None
    apart = frozenset(problem.computed.values())
    missing = [
        *_missing_rates(inventory, loaded, apart, prefills=("prefill", 1) in phases),
        *_missing_links(inventory, loaded, sink),
    ]
    if missing and strategy != "fastest":
        return Aim(phases=(), inventory=inventory)
    hardware = loaded.profile.hardware
    for device, figure, example in missing:
        source = (
            "name an `accelerator` of the catalogue" if device.is_accelerator else "what `devmap probe --measure` finds"
        )
        sink.error(
            "missing-figure",
            f"`{strategy}` compares times, and {figure} is not known",
            hardware.device_span(device),
            help=f"write {example}, or {source}",
        )
    return None if missing else Aim(phases=phases, inventory=inventory)


def _computing(inventory: Inventory, loaded: LoadedProfile) -> tuple[InventoryDevice, ...]:
    """Return the devices that compute; none if unreadable names might be accelerators."""
    hardware = loaded.profile.hardware
    if not hardware.knows_devices or any(device.is_accelerator for device in hardware.listed):
        return inventory.accelerators
    return tuple(device for device in inventory.devices if device.id == CPU)


def _missing_rates(
    inventory: Inventory, loaded: LoadedProfile, apart: frozenset[Device], *, prefills: bool
) -> Iterator[tuple[Device, str, str]]:
    """Yield device, figure and example for each unknown rate of a device that computes, unless its section has errors.

    Args:
        inventory: the devices.
        loaded: the profile.
        apart: further devices on which rules have modules compute, such as the CPU beside accelerators.
        prefills: whether the time of a prompt counts, which needs flops.
    """
    computing = _computing(inventory, loaded)
    for device in inventory.devices:
        if device not in computing and device.id not in apart:
            continue
        section = loaded.profile.hardware.listed[device.id]
        doubtful, missing = section.doubtful, dict[str, str]()
        if device.bandwidth_bytes_per_second is None and not doubtful & {"accelerator", "bandwidth"}:
            missing["bandwidth"] = f"the bandwidth of {device.id}"
        if prefills and device.flops_per_second is None and not doubtful & {"accelerator", "flops"}:
            missing["flops"] = f"the `flops` of {device.id}"
        for figure in missing.values():
            yield device.id, figure, f"`{example_with_rates(device.id, section, *missing)}`"


def _missing_links(inventory: Inventory, loaded: LoadedProfile, sink: Sink) -> Iterator[tuple[Device, str, str]]:
    """Yield device, figure and example for each unknown link to or between the devices that compute."""
    computing, hardware = _computing(inventory, loaded), loaded.profile.hardware
    wrong = [link for link in hardware.links.values() if _has_errors_within(link.key_span, sink)]
    if not computing or wrong or "links" in hardware.doubtful:
        return
    first = computing[0].id
    for device in inventory.devices:
        store = device.id
        if store.is_accelerator or store == first or (store, first) in inventory.links:
            continue
        is_host = store == CPU or ((CPU, first) not in inventory.links and first.is_accelerator)
        with_bandwidth = f"`{example_with_rates(store, hardware.listed[store], 'bandwidth')}`"
        figure, example = ("host", "`links: {host: 25GB/s}`") if is_host else ("disk", with_bandwidth)
        yield store, f"how fast {store} is reached ({figure})", example
    for device in inventory.accelerators[1:]:
        if (first, device.id) not in inventory.links:
            yield device.id, f"the link between {first} and {device.id}", "`links: {peer: 12GB/s}`"


def _has_errors_within(place: Span, sink: Sink) -> bool:
    """Return whether an error was reported within a place, which may be why a figure is missing."""
    begin, end = (place.line, place.column), (place.end_line, place.end_column)
    return any(
        finding.span.file == place.file and begin <= (finding.span.line, finding.span.column) <= end
        for finding in sink
        if finding.span is not None and finding.is_error
    )


def _check_covered(loaded: LoadedProfile, problem: Problem, sink: Sink) -> None:
    uncovered = tuple(name for name in problem.graph.tensors if name not in problem.pinned)
    if not uncovered:
        return
    covered = {name: name in problem.pinned for name in problem.graph.tensors}
    patterns = fold_paths(unit.name for unit, is_covered in fold(problem.graph, covered) if not is_covered)
    listed = ", ".join(f"`{pattern}`" for pattern in patterns[:4]) + (", …" if len(patterns) > 4 else "")
    sink.error(
        "uncovered-tensor",
        f"the map gives no device to {len(uncovered)} tensor{'s' if len(uncovered) > 1 else ''}: {listed}",
        loaded.profile.placement.device_map.key_span,
        help=f'add `"{patterns[0]}": 0`, or whatever device is right, for each of them',
    )


def _united(groups: list[tuple[TensorName, ...]], graph: ModelGraph) -> list[list[TensorName]]:
    """Return a partition of all tensors into groups, with overlapping groups joined, in order of definition."""
    return united([*((name,) for name in graph.tensors), *groups])


def _check_agreement(
    group: list[TensorName], deciding: list[Decision], graph: ModelGraph, resolution: Resolution, sink: Sink
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
    elif any(name in graph.adapter_tensors for name in group):
        sink.error(
            "conflicting-pins",
            f"an adapter's tensors are on the device of their module: {', '.join(f'`{name}`' for name in group)} cannot"
            f" be on {first.device} and {other.device}",
            other.rule.span,
            help="give both rules the same device, or name the module alone",
            related=related,
        )


def _check_possible(problem: Problem, resolution: Resolution, sink: Sink) -> None:
    """Report a tensor that is forbidden on every device."""
    for name, rules in resolution.forbidden.items():
        if set(problem.capacities) <= set(rules) and name not in problem.pinned:
            rule = max(rules.values(), key=lambda rule: rule.span)
            sink.error(
                "conflicting-pins",
                f"`{name}` is forbidden on every device",
                rule.span,
                help=f"leave it one of {', '.join(map(str, problem.capacities))}",
            )
            return


def _check_forbidden(pinned: dict[TensorName, Device], resolution: Resolution, sink: Sink) -> None:
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
