"""Checks a plan against the model and the machine, independently of the placer, so that it catches its mistakes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from devmap_config.devices import CPU, DISK
from devmap_config.execution.assignment import ON_CPU
from devmap_config.rules.pattern import compile_keys
from devmap_config.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from devmap_config.devices import Device
    from devmap_config.graph.model import ModelGraph, TensorName
    from devmap_config.plan.plan import Plan

ViolationKind = Literal[
    "uncovered-tensor",
    "overlapping-units",
    "unknown-unit",
    "unlisted-device",
    "misread-map",
    "split-block",
    "split-tie",
    "stranded-tensor",
    "over-capacity",
    "forbidden-device",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A violation of what a plan must satisfy. `subjects` are the tensors, modules or devices that it concerns."""

    kind: ViolationKind
    message: str
    subjects: tuple[str, ...]


def verify(
    plan: Plan,
    graph: ModelGraph,
    capacities: Mapping[Device, int],
    forbidden: Mapping[TensorName, Collection[Device]] | None = None,
) -> tuple[Violation, ...]:
    """Verify a plan, without trusting the placer: every tensor is counted anew.

    Args:
        plan: the plan.
        graph: the model.
        capacities: the bytes that may be used of each device.
        forbidden: by tensor, the devices on which it must not be stored.

    Returns:
        A violation for each mistake; none for a plan that loads, fits and keeps together what belongs together.
    """
    violations = [violation for check in CHECKS for violation in check(plan, graph)]
    return (*violations, *_capacity(plan, graph, capacities), *_prohibitions(plan, forbidden or {}))


def _stored_on(plan: Plan) -> dict[str, Device]:
    return {str(name): location.stored_on for name, location in plan.locations.items()}


def coverage(plan: Plan, graph: ModelGraph) -> Iterator[Violation]:
    """Yield a violation for each tensor that does not have exactly one place."""
    times = dict.fromkeys(map(str, graph.tensors), 0)
    for assignment in plan.assignments:
        for name in assignment.tensors:
            times[name] = times.get(name, 0) + 1
    if missing := tuple(name for name, count in times.items() if count == 0):
        message = f"the plan gives no device to {first_of([f'`{name}`' for name in missing])}"
        yield Violation(kind="uncovered-tensor", message=message, subjects=missing)
    if repeated := tuple(name for name, count in times.items() if count > 1):
        message = f"the plan places {first_of([f'`{name}`' for name in repeated])} more than once"
        yield Violation(kind="overlapping-units", message=message, subjects=repeated)


def _known_units(plan: Plan, graph: ModelGraph) -> Iterator[Violation]:
    for assignment in plan.assignments:
        if assignment.unit in graph.modules:
            holds = {str(tensor.name) for tensor in graph.modules[assignment.unit].tensors()}  # type: ignore[index]
        else:
            holds = {assignment.unit} & set(map(str, graph.tensors))
        if not holds or holds != set(map(str, assignment.tensors)):
            yield Violation(
                kind="unknown-unit",
                message=f"`{assignment.unit}` does not hold the tensors that the plan says it does",
                subjects=(assignment.unit,),
            )


def _flatness(plan: Plan, graph: ModelGraph) -> Iterator[Violation]:
    """Yield a violation for each unit within another, or beside the root, as the libraries read such maps
    differently.
    """
    del graph
    units = {assignment.unit for assignment in plan.assignments}
    for unit in sorted(units):
        around = [unit[:index] for index, character in enumerate(unit) if character == "."]
        if unit:
            around.insert(0, "")
        for ancestor in around:
            if ancestor in units:
                yield Violation(
                    kind="overlapping-units",
                    message=f"`{unit}` lies within `{ancestor or 'the whole model'}`, which is placed as well",
                    subjects=(unit, ancestor),
                )


def _readability(plan: Plan, graph: ModelGraph) -> Iterator[Violation]:
    """Yield violations of the map as transformers' `expand_device_map` reads it: with all keys in one unescaped
    expression.
    """
    devices = {assignment.unit: assignment.location.stored_on for assignment in plan.assignments}
    if not devices:
        return
    expression = compile_keys(devices)
    expected = _stored_on(plan)
    for name in graph.tensors:
        match = expression.match(name)
        read = devices.get(match.group()) if match else devices.get("", CPU)
        if name in expected and read != expected[name]:
            yield Violation(
                kind="misread-map",
                message=f"transformers would put `{name}` on {read}, not on {expected[name]}",
                subjects=(name,),
            )


def _quantizer_reading(plan: Plan, graph: ModelGraph) -> Iterator[Violation]:
    """Yield violations of the map as quantizers read it that leave offloaded weights unquantised."""
    homes = {name: assignment for assignment in plan.assignments for name in assignment.tensors}
    offloaded = [
        assignment.unit
        for assignment in plan.assignments
        if plan.executor.is_offloaded(assignment.location, plan.main_device)
    ]
    for tensor in graph.tensors.values():
        if tensor.offloaded_bytes is None or tensor.name not in homes:
            continue
        module = tensor.name.rpartition(".")[0]
        keys = [key for key in offloaded if module.endswith(key) or module.startswith(f"{key}.")]
        if bool(keys) != (homes[tensor.name].unit in offloaded):
            where, done = homes[tensor.name].location.stored_on, "left as it is" if keys else "quantised"
            yield Violation(
                kind="misread-map",
                message=f"transformers reads the map so that `{tensor.name}` on {where} is {done}",
                subjects=(tensor.name,),
            )


def _blocks(plan: Plan, graph: ModelGraph) -> Iterator[Violation]:
    stored_on = _stored_on(plan)
    for module in graph.modules.values():
        if not graph.is_no_split(module):
            continue
        devices = sorted({stored_on[tensor.name] for tensor in module.tensors() if tensor.name in stored_on})
        if len(devices) > 1:
            yield Violation(
                kind="split-block",
                message=f"`{module.path}` ({module.class_name}) is split over {', '.join(map(str, devices))}",
                subjects=(module.path,),
            )


def _ties(plan: Plan, graph: ModelGraph) -> Iterator[Violation]:
    stored_on = _stored_on(plan)
    for group in graph.tied_groups:
        devices = [str(device) for device in sorted({stored_on[name] for name in group if name in stored_on})]
        if len(devices) > 1:
            yield Violation(
                kind="split-tie",
                message=f"{', '.join(f'`{name}`' for name in group)} are one tensor, but on {', '.join(devices)}",
                subjects=tuple(map(str, group)),
            )


USED_BY_THEIR_PARENT = (
    "NonDynamicallyQuantizableLinear",  # the last matrix of torch's `MultiheadAttention`, which multiplies by it
    "JetMoeMoA",  # whose `map` and `reduce` are called
)
"""Classes of modules whose tensors are used without calling the module, which a dry run may not reach."""


def stranded_tensors(plan: Plan, graph: ModelGraph) -> dict[str, str]:
    """Return the streamed tensors that nothing would copy to the device that uses them, each with the reason.

    accelerate's hooks copy the tensors of a module in when the module is called. They are attached to the modules that
    a map names, and to those below them. A tensor that a map names by itself stays on the device that it is loaded to,
    and one on disk is not even loaded. Tensors of the model itself are moved to its device once, if they are loaded.
    """
    reasons = {}
    for assignment in plan.assignments:
        if assignment.unit in plan.computed_on_cpu:
            if assignment.unit in assignment.tensors:
                reasons[assignment.unit] = "is a tensor, and only a module computes on the CPU"
            continue
        runs_on = assignment.location.runs_on
        if assignment.location.stored_on.is_accelerator or assignment.location == ON_CPU:
            continue
        for name in assignment.tensors:
            home = plan.executor.residence(graph.tensors[name], assignment.location)
            if home == DISK and name in graph.computed:
                reasons[str(name)] = "is in no file of the checkpoint, since transformers computes it"
            elif assignment.unit == name:
                if home != runs_on or (home != CPU and "." in name):
                    reasons[str(name)] = "is placed apart from its module"
            elif home != runs_on and _class_around(name, graph) in USED_BY_THEIR_PARENT:
                reasons[str(name)] = "is used without its module being called"
    return reasons


def _class_around(name: TensorName, graph: ModelGraph) -> str:
    return graph.modules[name.rpartition(".")[0]].class_name  # type: ignore[index]


def _strandings(plan: Plan, graph: ModelGraph) -> Iterator[Violation]:
    homes = {name: assignment for assignment in plan.assignments for name in assignment.tensors}
    for name, reason in stranded_tensors(plan, graph).items():
        home = homes[name]  # type: ignore[index]
        consequence = f": nothing brings it from {home.location.stored_on} to {home.location.runs_on}"
        yield Violation(
            kind="stranded-tensor",
            message=f"`{name}` {reason}{'' if home.unit in plan.computed_on_cpu else consequence}",
            subjects=(name,),
        )


def _capacity(plan: Plan, graph: ModelGraph, capacities: Mapping[Device, int]) -> Iterator[Violation]:
    """Yield a violation for each device that holds more than its capacity, recomputed from the tensors."""
    held: dict[Device, dict[TensorName, int]] = {}
    for assignment in plan.assignments:
        for name in assignment.tensors:
            home = plan.executor.residence(graph.tensors[name], assignment.location)
            tensor = graph.tensors[graph.storage_of[name]]
            size_bytes = plan.executor.held_bytes(tensor, assignment.location, plan.main_device)
            held.setdefault(home, {})[tensor.name] = max(size_bytes, held.get(home, {}).get(tensor.name, 0))
    rows = {use.id: use for use in plan.devices}
    for device in sorted(held):
        weights_bytes = sum(held[device].values())
        if device not in capacities:
            # Tensors that accelerate keeps on the CPU because everything runs there do not count against a capacity.
            if device == plan.main_device and weights_bytes == 0:
                continue
            yield Violation(
                kind="unlisted-device", message=f"{device} is not a device of the profile", subjects=(str(device),)
            )
            continue
        row = rows[device]
        used = weights_bytes + row.kv_cache_bytes + row.activation_bytes + row.overhead_bytes
        if used > capacities[device]:
            yield Violation(
                kind="over-capacity",
                message=f"{device} would hold {used:,} bytes, {used - capacities[device]:,} more than it has",
                subjects=(str(device),),
            )
        elif row.loading_bytes > capacities[device]:
            yield Violation(
                kind="over-capacity",
                message=f"{device} would hold {row.loading_bytes:,} bytes while the model is loaded,"
                f" {row.loading_bytes - capacities[device]:,} more than it has",
                subjects=(str(device),),
            )


def _prohibitions(plan: Plan, forbidden: Mapping[TensorName, Collection[Device]]) -> Iterator[Violation]:
    for assignment in plan.assignments:
        for name in assignment.tensors:
            if assignment.location.stored_on in forbidden.get(name, ()):
                yield Violation(
                    kind="forbidden-device",
                    message=f"`{name}` is stored on {assignment.location.stored_on}, which a rule forbids",
                    subjects=(name,),
                )


CHECKS = (coverage, _known_units, _flatness, _readability, _quantizer_reading, _blocks, _ties, _strandings)
"""The checks that a plan must pass on every machine."""
