"""Reports why there is no plan: the bytes that are missing on each device, and remedies."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from devmap_config.amounts import GIBIBYTE, format_bytes, format_exact_bytes
from devmap_config.devices import STORAGE_DEVICES
from devmap_config.diagnostics.diagnostic import Related
from devmap_config.execution.weighing import heaviest_weights
from devmap_config.placement.executors import can_be_offloaded
from devmap_config.placement.strategies import TRANSFORMERS_STRATEGIES, Infeasible, Shortage, least_bytes
from devmap_config.plan.remedies import MOST_GIBIBYTES, impasse_of
from devmap_config.plan.trials import ProfileChange

if TYPE_CHECKING:
    from collections.abc import Iterable

    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Sink, Span
    from devmap_config.placement.problem import Problem
    from devmap_config.plan.attempts import Obstacle
    from devmap_config.plan.trials import Trials
    from devmap_config.prepared import Prepared
    from devmap_config.profile.loading import LoadedProfile


ANY_FIT = "fewest-devices"
"""The strategy that finds a placement that fits even if no rates are known."""


def report_obstacle(obstacle: Obstacle, problem: Problem, prepared: Prepared, trials: Trials, sink: Sink) -> None:
    """Report why there is no plan, with the remedies that `trials` show to work."""
    if _report_left_buffers(obstacle, problem, prepared.loaded, trials, sink):
        return
    if isinstance(obstacle, Infeasible):
        _report_shortages(obstacle, problem, prepared, trials, sink)
    else:
        help = _what_counts_with_all(problem, prepared, trials)
        for finding in obstacle:
            sink.report(replace(finding, help=help) if help and finding.code == "over-capacity" else finding)


def _what_counts_with_all(problem: Problem, prepared: Prepared, trials: Trials) -> str | None:
    """Return advice to use one of our own strategies, if transformers' leaves no room for the workload."""
    if prepared.strategy not in TRANSFORMERS_STRATEGIES or problem.graph.measurement is None:
        return None
    for ours in ("fastest", ANY_FIT):
        if trials.compiles(ProfileChange(strategy=ours)):
            return f"`strategy: {ours}` counts with all of this, and gives a plan: it was tried"
    return (
        f"`strategy: {ANY_FIT}` finds none either; lower `context_length` or `batch_size`, prefill in parts"
        " (`prompt_length`), or list more memory"
    )


def _report_left_buffers(
    obstacle: Obstacle, problem: Problem, loaded: LoadedProfile, trials: Trials, sink: Sink
) -> bool:
    """Report that the profile forbids offloading buffers, if that is the only obstacle."""
    if loaded.profile.placement.offload.buffers.value is not False:
        return False
    if not can_be_offloaded(problem.graph, problem.capacities):
        return False
    strategy = None
    if not trials.compiles(ProfileChange(offload_buffers=True)):
        strategy = ANY_FIT
        if trials.compiles(ProfileChange(strategy=strategy)):
            return False  # then the buffers are not the obstacle
        if not trials.compiles(ProfileChange(strategy=strategy, offload_buffers=True)):
            return False
    shortages = obstacle.shortages if isinstance(obstacle, Infeasible) else ()
    shortage = next((shortage for shortage in shortages if shortage.device), None)
    sink.error(
        "over-capacity",
        "with `buffers: false` the buffers of what is streamed stay where it runs, and "
        + (_lack(shortage) if shortage else "it does not fit"),
        loaded.profile.placement.offload.buffers.span,
        help="write `buffers: true`, or leave it out"
        + (f", and `strategy: {strategy}`" if strategy else "")
        + ": it was tried, and fits",
    )
    return True


def _lack(shortage: Shortage) -> str:
    return (
        f"{shortage.device} would hold {format_bytes(shortage.needed_bytes)}"
        f" and has {format_bytes(shortage.capacity_bytes)}: {format_exact_bytes(shortage.missing_bytes)} are missing"
    )


def _report_shortages(infeasible: Infeasible, problem: Problem, prepared: Prepared, trials: Trials, sink: Sink) -> None:
    """Report why a placement is infeasible, with the remedies that `trials` show to work."""
    if problem.aim is not None and not any(shortage.device for shortage in infeasible.shortages):
        _report_impasse(infeasible, problem, prepared, trials, sink)
        return
    if not infeasible.shortages:
        _report_forbidden(infeasible, prepared, sink)
    for shortage in infeasible.shortages:
        if shortage.device is None:
            _report_unplaced(infeasible, shortage, problem, prepared, trials, sink)
        else:
            _report_device(shortage, shortage.device, problem, prepared, trials, sink)


def _report_impasse(infeasible: Infeasible, problem: Problem, prepared: Prepared, trials: Trials, sink: Sink) -> None:
    impasse, quantization = impasse_of(problem, prepared, trials), prepared.model.quantization
    pinned = set(problem.pinned.values())
    refused = [device for device in problem.refused if problem.accelerators and device not in pinned]
    listed = _listed(problem, prepared, [device for device in problem.capacities if device not in refused])
    if kept_off := [device for device in problem.capacities if device in refused]:
        method = quantization.method.name if quantization is not None else "quantization"
        listed += f" ({method} loads nothing onto {' or '.join(map(str, kept_off))})"
    what = _needs(problem)
    missing_bytes = sum(shortage.missing_bytes for shortage in infeasible.shortages)
    if impasse.pins:
        message = f"{what} would fit, but not with {'these pins' if len(impasse.pins) > 1 else 'this pin'}, on {listed}"
    elif missing_bytes > 0:
        message = f"{format_exact_bytes(missing_bytes)} of {what} find no place on {listed}"
    else:
        message = f"{what} find no place on {listed}, though there is room in total"
    message += _cause(problem)
    first, *others = [rule.span for rule in impasse.pins] or [_cause_span(prepared.loaded)]
    remedies = "; or ".join(impasse.remedies)
    help = f"each of these was tried, and fits: {remedies}" if remedies else "list more memory, or load a smaller dtype"
    sink.error(
        "over-capacity",
        message,
        first,
        help=help,
        related=tuple(Related(message="with this one", span=span) for span in others),
    )


def _listed(problem: Problem, prepared: Prepared, devices: Iterable[Device]) -> str:
    """Return the devices with their capacities, of which loading or a dry run may have claimed a part."""

    def room(device: Device) -> str:
        size_bytes = problem.capacities[device]
        size, whole = format_bytes(size_bytes), format_bytes(prepared.capacities.get(device, size_bytes))
        return size if size == whole else f"{size} of {whole}: loading or running needs the rest"

    return ", ".join(f"{device} ({room(device)})" for device in devices)


def _report_forbidden(infeasible: Infeasible, prepared: Prepared, sink: Sink) -> None:
    name = infeasible.unplaced[0]
    rules = prepared.resolution.forbidden[name]
    rule = next(iter(rules.values()))
    sink.error(
        "conflicting-pins",
        f"`{prepared.strategy}` has no place for `{name}` but on {' or '.join(map(str, rules))},"
        " which this rule forbids",
        rule.span,
        help="pin it to the device where it is to be, or give the other devices more room",
    )


def _needs(problem: Problem) -> str:
    """Return the least memory that a problem needs, in words: `the model's 15.0 GiB, 4.0 GiB of cache and … of
    activations`.
    """
    weights, *others = ((name, format_bytes(size)) for name, size in least_bytes(problem).items() if size)
    words = [f"the model's {weights[1]}", *(f"{size} of {name}" for name, size in others)]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _cause_span(loaded: LoadedProfile) -> Span:
    """Return the place in the profile to report a shortage at: its strategy if it names one, else its machine."""
    if loaded.profile.placement.strategy.is_written:
        return loaded.profile.placement.strategy.span
    return loaded.profile.hardware.devices.key_span


def _cause(problem: Problem) -> str:
    """Return a clause about the one thing that makes up most of the model; empty if there is none."""
    cause = heaviest_weights(problem.graph, problem.graph.tensors, problem.graph.size_bytes)
    return f"; {cause}" if cause else ""


def _report_unplaced(
    infeasible: Infeasible, shortage: Shortage, problem: Problem, prepared: Prepared, trials: Trials, sink: Sink
) -> None:
    listed = _listed(problem, prepared, problem.capacities)
    missing_bytes = sum(least_bytes(problem).values()) - sum(problem.capacities.values())
    if missing_bytes <= 0:
        missing = format_exact_bytes(shortage.missing_bytes)
        what = f"{missing} of {_needs(problem)} find no place on {listed}, though there is room in total"
    else:
        missing = format_exact_bytes(missing_bytes)
        what = f"{_needs(problem)} find no place on {listed}: {missing} are missing"
        if len(problem.capacities) > 1 and shortage.missing_bytes > missing_bytes:
            what += f" in total, and blocks of {format_bytes(shortage.missing_bytes)} are left over"
    sink.error(
        "over-capacity",
        f"{what}{_cause(problem)}",
        _cause_span(prepared.loaded),
        label=f"`{infeasible.unplaced[0]}` is the first that does not fit" if infeasible.unplaced else None,
        help=_mend(problem, prepared.strategy, trials),
    )


def _mend(problem: Problem, strategy: str, trials: Trials) -> str:
    for other in (*TRANSFORMERS_STRATEGIES, "fewest-devices", "single"):
        if other != strategy and trials.compiles(ProfileChange(strategy=other)):
            return f"`strategy: {other}` places all of it"
    plenty = {"memory": MOST_GIBIBYTES * GIBIBYTE}
    missing = [
        device
        for device in STORAGE_DEVICES
        if device not in problem.capacities and trials.compiles(ProfileChange(devices={device: plenty}))
    ]
    if missing:
        named = " or ".join(f"`{device}`" for device in missing)
        return f"list {named} under `hardware.devices` for what is to be offloaded"
    if problem.graph.size_bytes <= sum(problem.capacities.values()):
        return "there is room in total, but not in one piece: raise the memory of a device"
    return "list more memory, or load a smaller dtype"


def _report_device(
    shortage: Shortage, device: Device, problem: Problem, prepared: Prepared, trials: Trials, sink: Sink
) -> None:
    pinned_bytes = problem.pinned_bytes.get(device, 0)
    decisions = prepared.resolution.decisions.values()
    rule = next((decision.rule for decision in decisions if decision.device == device), None)
    if rule is not None and pinned_bytes > shortage.capacity_bytes:
        what = "the pins put" if rule.origin == "pin" else "the map puts"
        sink.error(
            "over-capacity",
            f"{what} {format_bytes(pinned_bytes)} on {device}, which has {format_bytes(shortage.capacity_bytes)}:"
            f" {format_exact_bytes(shortage.missing_bytes)} are missing{_cause(problem)}",
            rule.span,
            help=f"move something off {device}, or give it more memory",
        )
        return
    sink.error(
        "over-capacity",
        f"{_lack(shortage)}{_cause(problem)}",
        prepared.loaded.profile.hardware.device_span(device),
        help=_mend(problem, prepared.strategy, trials),
    )
