"""The plan: an assignment for each unit, and the executor that runs them. A `device_map` is a projection of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from devmap_config.amounts import format_bytes
from devmap_config.diagnostics.diagnostic import DevmapError, Diagnostic

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from devmap_config.devices import Device
    from devmap_config.execution.assignment import Location
    from devmap_config.execution.executor import Executor
    from devmap_config.execution.segments import Phase
    from devmap_config.execution.units import Unit
    from devmap_config.graph.model import ModelGraph, TensorName
    from devmap_config.pipeline.stages import Pipeline
    from devmap_config.prepared import DraftModel
from devmap_config.devices import CPU
from devmap_config.execution.assignment import Assignment
from devmap_config.execution.executor import AHEAD, LEFT
from devmap_config.execution.loading import loading_extra_bytes
from devmap_config.execution.running import RunningCost, running_of
from devmap_config.rules.folding import fold_paths


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUse:
    """The bytes that a device holds under a plan.

    Attributes:
        id: the device.
        capacity_bytes: the part of its memory that may be used.
        weights_bytes: the weights that are stored there.
        kv_cache_bytes: the cache at the end of the workload's context.
        activation_bytes: the activation peak.
        overhead_bytes: buffers of the executor, such as staging buffers.
        loading_bytes: the most that is held at once while the model is loaded, weights included.
    """

    id: Device
    capacity_bytes: int
    weights_bytes: int
    kv_cache_bytes: int = 0
    activation_bytes: int = 0
    overhead_bytes: int = 0
    loading_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        """The part of the capacity that the plan does not use; negative if it uses more."""
        used = self.weights_bytes + self.kv_cache_bytes + self.activation_bytes + self.overhead_bytes
        return self.capacity_bytes - used


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The predicted cost of running a plan; a field is `None` if its inputs are not known.

    Attributes:
        decode_nanoseconds_per_token: the time of a token, averaged from the end of the prompt to the end of the
            context.
        bound_decode_nanoseconds_per_token: a lower bound of that time over all placements.
        prefill_nanoseconds: the time of a prompt.
        streamed_bytes_per_token: the weights that are copied to their devices in the forward of a token.
        hops: transfers of activations between devices while a token is decoded.
        longest_context: the most tokens of context that fit.
        fastest_decode_nanoseconds_per_token: the time of a token under the fastest plan that was found; `None` if that
            is this plan.
        fastest_prefill_nanoseconds: the same for a prompt.
    """

    decode_nanoseconds_per_token: int | None = None
    bound_decode_nanoseconds_per_token: int | None = None
    prefill_nanoseconds: int | None = None
    streamed_bytes_per_token: int | None = None
    hops: int | None = None
    longest_context: int | None = None
    fastest_decode_nanoseconds_per_token: int | None = None
    fastest_prefill_nanoseconds: int | None = None

    def to_json(self) -> dict[str, int | None]:
        """Return the figures as a lock stores them; those of the fastest plan only if that is another one."""
        figures = asdict(self)
        return {name: figure for name, figure in figures.items() if figure is not None or name not in FASTEST.values()}


OWN: Mapping[Phase, str] = {"decode": "decode_nanoseconds_per_token", "prefill": "prefill_nanoseconds"}
"""The figure of a plan's own time, by phase."""

FASTEST: Mapping[Phase, str] = {
    "decode": "fastest_decode_nanoseconds_per_token",
    "prefill": "fastest_prefill_nanoseconds",
}
"""The figure of the fastest plan that was found, by phase."""


class NotADeviceMapError(DevmapError):
    """The plan cannot be expressed as a `device_map`: modules compute on the CPU, or are copied to another card than
    the main device, or have their cache on the CPU.

    Attributes:
        units: those modules.
    """

    def __init__(self, compute: Mapping[str, Device], offloaded_caches: Sequence[str] = ()) -> None:
        self.units = tuple(compute) or tuple(offloaded_caches)
        devices = " and ".join(
            "the CPU" if device == CPU else str(device) for device in dict.fromkeys(compute.values())
        )
        what = f"computes on {devices}" if compute else "has the cache of some layers on the CPU"
        message = f"this plan {what}, which a device_map cannot say: {', '.join(fold_paths(self.units))}"
        help = "load it with `devmap run` or `devmap_config.load_model`"
        finding = Diagnostic.error("not-a-device-map", message, help=help)
        super().__init__(f"{message}; {help}", (finding,))


class NotForTransformersError(DevmapError):
    """The plan is for vLLM, which runs each stage in a process of its own."""

    def __init__(self) -> None:
        message = "this plan is one for vLLM, and transformers loads a device_map in one process"
        help = "write its files with `devmap export PROFILE --to vllm -o FOLDER`, or leave `targets` out"
        finding = Diagnostic.error("not-a-device-map", message, help=help)
        super().__init__(f"{message}; {help}", (finding,))


@dataclass(frozen=True)
class Plan:
    """A placement of a model, with the executor that runs it and the predicted costs.

    Attributes:
        strategy: the strategy that made it.
        executor: the executor that runs it: accelerate's hooks, or ours.
        main_device: the device that runs modules whose weights are stored on `cpu` or `disk`.
        assignments: every unit with its tensors and location, in the order of the model.
        devices: the bytes that each device of the profile holds.
        prediction: times, transfers and the longest context.
        measured: whether cache and activations were measured and counted, besides weights.
        loading_ram_bytes: the most of the CPU's memory that loading takes, even if the plan does not use that device.
        draft: the needs of a draft model, which are subtracted from the capacities.
        pipeline: the stages of a plan for vLLM; every unit is then on the first device of its stage.
        max_memory: budgets with which plain `from_pretrained` makes the same map, with room for the workload; `None` if
            budgets do not suffice, or the strategy is not one of transformers'.
        diagnostics: the warnings of the compilation; they do not make plans unequal.
        fastest: the fastest plan that was found, if this one was preferred by another wish than time.
    """

    strategy: str
    executor: Executor
    main_device: Device
    assignments: tuple[Assignment, ...]
    devices: tuple[DeviceUse, ...]
    prediction: Prediction = field(default_factory=Prediction)
    measured: bool = False
    loading_ram_bytes: int = 0
    draft: DraftModel | None = None
    pipeline: Pipeline | None = None
    max_memory: Mapping[int | str, int] | None = field(default=None, compare=False)
    diagnostics: tuple[Diagnostic, ...] = field(default=(), compare=False, repr=False)
    fastest: Plan | None = field(default=None, compare=False, repr=False)

    @cached_property
    def placement(self) -> dict[str, int | str]:
        """The device of each unit as transformers writes it: the index of an accelerator, `cpu` or `disk`."""
        return {assigned.unit: assigned.location.stored_on.in_device_map for assigned in self.assignments}

    @cached_property
    def locations(self) -> dict[TensorName, Location]:
        """The location of each tensor: the device that stores it, and the one that runs its module."""
        return {name: assigned.location for assigned in self.assignments for name in assigned.tensors}

    @cached_property
    def compute(self) -> dict[str, Device]:
        """The units that run on another device than the executor would choose for their stores, with that device."""
        return {
            assigned.unit: assigned.location.runs_on
            for assigned in self.assignments
            if assigned.location != self.executor.location(assigned.location.stored_on, self.main_device)
        }

    @cached_property
    def computed_on_cpu(self) -> dict[str, Device]:
        """The units of `compute` that run on the CPU."""
        return {unit: device for unit, device in self.compute.items() if device == CPU}

    @cached_property
    def prefilled(self) -> dict[str, int]:
        """The units of `computed_on_cpu` that run on the main device for long prompts, with the least number of
        tokens.
        """
        tokens = self.executor.prefilled_from
        return {unit: tokens[unit] for unit in self.computed_on_cpu if unit in tokens}

    @property
    def prefilling(self) -> tuple[str, ...]:
        """Sentences about `prefilled`: which units are copied to the main device, and from how many tokens on."""
        units: dict[int, list[str]] = {}
        for unit, tokens in self.prefilled.items():
            units.setdefault(tokens, []).append(unit)
        return tuple(
            f"{', '.join(fold_paths(alike))} run on {self.main_device} for {tokens:,} tokens or more at once, and are"
            " copied there ahead of their use"
            for tokens, alike in units.items()
        )

    @property
    def device_map(self) -> dict[str, int | str]:
        """The map for `from_pretrained`.

        Raises:
            NotADeviceMapError: if the plan computes on the CPU, copies to several cards, or offloads the cache of some
                layers.
            NotForTransformersError: if the plan is for vLLM.
        """
        self.require_transformers()
        if self.compute or self.offloaded_caches:
            raise NotADeviceMapError(self.compute, self.offloaded_caches or ())
        return dict(self.placement)

    def require_transformers(self) -> None:
        """Refuse a plan that transformers does not load.

        Raises:
            NotForTransformersError: if the plan is for vLLM.
        """
        if self.pipeline is not None:
            raise NotForTransformersError

    @property
    def streaming(self) -> str:
        """The predicate of a sentence about the streamed weights: "are copied to cuda:0 at every forward"."""
        if self.executor.works_ahead and not self.main_device.is_accelerator:
            return "are on disk, and read from there as each forward needs them"
        locations = (assigned.location for assigned in self.assignments)
        targets = sorted({location.runs_on for location in locations if self.executor.streams(location)}) or [
            self.main_device
        ]
        copied = f"are copied to {' and '.join(map(str, targets))} at every forward"
        if self.executor.works_ahead:
            links = ", over the link of each" if len(targets) > 1 else ""
            return f"{copied}{links}, ahead of their use; plain transformers waits for each, and takes longer"
        return copied

    @property
    def offloaded_caches(self) -> tuple[str, ...] | None:
        """The modules whose cache is on the CPU while they do not run; `None` if the workload decides for the whole
        cache.
        """
        return self.executor.offloaded_caches

    @property
    def draft_missing_bytes(self) -> int:
        """The bytes that are missing on the draft model's device for its activations.

        It takes turns with the model, so it may use the free memory and the room for the model's own activations.
        """
        if self.draft is None:
            return 0
        use = next(use for use in self.devices if use.id == self.draft.device)
        return max(self.draft.activation_bytes - use.activation_bytes - max(use.free_bytes, 0), 0)

    @property
    def offload_buffers(self) -> bool:
        """The argument `offload_buffers` of `from_pretrained` for this plan."""
        return self.executor.offload_buffers

    @property
    def streams_buffers(self) -> bool:
        """True if `from_pretrained` needs `offload_buffers` to load the plan, because buffers are streamed."""
        return self.offload_buffers and any(self.executor.streams(assigned.location) for assigned in self.assignments)

    def __str__(self) -> str:
        """Return a line for each device: the memory that is used, and the units that are stored there."""
        lines = [f"plan by `{self.strategy}`:"]
        for use in self.devices:
            stored = [assigned for assigned in self.assignments if assigned.location.stored_on == use.id]
            units = [assigned.unit or "everything" for assigned in stored]
            names = f": {', '.join(fold_paths(units))}" if units else ""
            used_bytes = use.capacity_bytes - use.free_bytes
            lines.append(f"  {use.id} {format_bytes(used_bytes)} of {format_bytes(use.capacity_bytes)}{names}")
        if self.computed_on_cpu:
            lines.append(f"  computed on the CPU: {', '.join(fold_paths(self.computed_on_cpu))}")
        if self.offloaded_caches:
            lines.append(f"  caches on the CPU: {', '.join(fold_paths(self.offloaded_caches))}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the `plan` object of `--format json` and of the lock."""
        return {
            "strategy": self.strategy,
            "executor": self.executor.name,
            "offload_buffers": self.offload_buffers,
            "main_device": str(self.main_device),
            "measured": self.measured,
            "device_map": self.placement,
            "compute": {unit: str(device) for unit, device in self.compute.items()},
            "devices": [{**asdict(use), "id": str(use.id), "free_bytes": use.free_bytes} for use in self.devices],
            "loading_ram_bytes": self.loading_ram_bytes,
            "prediction": self.prediction.to_json(),
            **({} if self.offloaded_caches is None else {"offloaded_caches": list(self.offloaded_caches)}),
            **({} if self.draft is None else {"assistant": self.draft.to_json()}),
            **({} if self.pipeline is None else {"pipeline": self.pipeline.to_json()}),
        }


def assemble(
    graph: ModelGraph,
    units: Iterable[tuple[Unit, tuple[Device, Device | None]]],
    capacities: Mapping[Device, int],
    *,
    strategy: str,
    executor: Executor,
    draft: DraftModel | None = None,
) -> Plan:
    """Build a plan from the devices of its units: complete their locations, and sum up memory and streamed bytes.

    Args:
        graph: the model.
        units: each unit with the device that stores it and, if a rule says so, the device that runs it.
        capacities: the bytes that may be used of each device.
        strategy: the name of the strategy, for the plan.
        executor: the executor that runs the plan. One that copies ahead is replaced by accelerate's hooks if there is
            nothing to copy, and one with prefills on the card by the one without if no unit has any.
        draft: the needs of a draft model.
    """
    placed = tuple(units)
    main_device = executor.main_device(stored_on for _, (stored_on, _) in placed)
    assignments = tuple(
        Assignment(unit.name, unit.tensors, executor.location(stored_on, main_device, compute))
        for unit, (stored_on, compute) in placed
    )
    prefilled = [
        executor.prefill_location(assignment.unit, assignment.location, main_device) for assignment in assignments
    ]
    if executor.works_ahead and not any(map(executor.is_brought_ahead, prefilled)):
        executor = replace(LEFT, offloaded_caches=executor.offloaded_caches)
    elif prefilled == [assignment.location for assignment in assignments] and executor.prefilled_from:
        executor = replace(AHEAD, offloaded_caches=executor.offloaded_caches)
    devices = device_uses(graph, assignments, capacities, executor)
    on_cpu = next((use.loading_bytes for use in devices if use.id == CPU), None)
    return Plan(
        strategy=strategy,
        executor=executor,
        main_device=main_device,
        assignments=assignments,
        devices=devices,
        prediction=Prediction(streamed_bytes_per_token=_streamed_bytes(graph, assignments, executor, main_device)),
        measured=graph.measurement is not None and graph.measurement.measured,
        loading_ram_bytes=loading_extra_bytes(graph, assignments).get(CPU, 0) if on_cpu is None else on_cpu,
        draft=draft,
    )


def device_uses(
    graph: ModelGraph, assignments: Iterable[Assignment], capacities: Mapping[Device, int], executor: Executor
) -> tuple[DeviceUse, ...]:
    """Return the bytes that each device of the profile holds under these assignments, in the profile's order.

    Args:
        graph: the model, with its measurement if there is one.
        assignments: the units and their locations.
        capacities: the bytes that may be used of each device.
        executor: the executor that runs the plan.
    """
    placed = tuple(assignments)
    main_device = executor.main_device(assignment.location.stored_on for assignment in placed)
    stored: dict[Device, list[TensorName]] = {device: [] for device in capacities}
    offloaded: set[TensorName] = set()
    for assignment in placed:
        if executor.is_offloaded(assignment.location, main_device):
            offloaded.update(assignment.tensors)
        for name in assignment.tensors:
            home = executor.residence(graph.tensors[name], assignment.location)
            stored.setdefault(home, []).append(name)
    running = running_of(graph, placed, executor)
    costs = {} if running is None else running.costs()
    none = RunningCost()
    loading = loading_extra_bytes(graph, placed)
    prefilled = [executor.prefill_location(assignment.unit, assignment.location, main_device) for assignment in placed]
    is_moved = any(location.stored_on == CPU and executor.streams(location) for location in prefilled)
    if executor.works_ahead and is_moved:  # while weights move to pinned memory, one piece at a time is there twice
        streamed = (cost.streaming_bytes for device, cost in costs.items() if device.is_accelerator)
        moved_bytes = max(streamed, default=0) // executor.pieces_at_once
        loading[CPU] = max(loading.get(CPU, 0), moved_bytes)
    return tuple(
        DeviceUse(
            id=device,
            capacity_bytes=capacities.get(device, 0),
            weights_bytes=(weights_bytes := graph.weights_bytes(names, offloaded)),
            kv_cache_bytes=costs.get(device, none).kv_cache_bytes,
            activation_bytes=costs.get(device, none).activation_bytes,
            overhead_bytes=costs.get(device, none).streaming_bytes,
            loading_bytes=weights_bytes + loading.get(device, 0),
        )
        for device, names in stored.items()
    )


def _streamed_bytes(
    graph: ModelGraph, assignments: Iterable[Assignment], executor: Executor, main_device: Device
) -> int:
    """Return the bytes of weights that are copied to their devices in the forward of a token.

    Modules that a token does not call are not copied: the tower of a model for images, an encoder. A model that does
    not decode has only one kind of forward.
    """
    measurement = graph.measurement
    decodes = measurement is not None and measurement.measured and measurement.decodes

    def runs(name: TensorName) -> bool:
        cost = measurement.by_path.get(name.rpartition(".")[0]) if measurement is not None else None
        return not decodes or (cost is not None and cost.decode_launches > 0)

    copied = [
        (name, executor.is_offloaded(assignment.location, main_device))
        for assignment in assignments
        for name in assignment.tensors
        if executor.is_copied_in(graph.tensors[name], assignment.location) and runs(name)
    ]
    return graph.weights_bytes([name for name, _ in copied], {name for name, is_offloaded in copied if is_offloaded})
