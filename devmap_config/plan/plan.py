"""`Plan`: an ordered tuple of assignments and the executor that runs them; a device_map is a projection of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from devmap_config.amounts import format_bytes
from devmap_config.diagnostics.diagnostic import DevmapError, Diagnostic

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

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
    """What one device holds, in bytes. `overhead_bytes` is what the executor needs there while it runs.

    `loading_bytes` is the most that it holds while the model is loaded, the weights that are there by then included.
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
        """What is left of the capacity."""
        used = self.weights_bytes + self.kv_cache_bytes + self.activation_bytes + self.overhead_bytes
        return self.capacity_bytes - used


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What running the plan costs; a field is `None` where its inputs are missing.

    The two that begin with `fastest` are those of the fastest plan that was found, of what was to be fast; they are
    `None` where this plan takes no longer.
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
        """As it stands in a lock: what the fastest plan takes, only where that is less."""
        figures = asdict(self)
        return {name: figure for name, figure in figures.items() if figure is not None or name not in FASTEST.values()}


OWN: Mapping[Phase, str] = {"decode": "decode_nanoseconds_per_token", "prefill": "prefill_nanoseconds"}
"""The figure of a plan's own time, by phase."""

FASTEST: Mapping[Phase, str] = {
    "decode": "fastest_decode_nanoseconds_per_token",
    "prefill": "fastest_prefill_nanoseconds",
}
"""That of the fastest plan that was found."""


class NotADeviceMapError(DevmapError):
    """The plan says more than a device_map can: some modules compute on the CPU, or on another card than the first.

    Attributes:
        units: those modules.
    """

    def __init__(self, compute: Mapping[str, Device]) -> None:
        self.units = tuple(compute)
        devices = " and ".join(
            "the CPU" if device == CPU else str(device) for device in dict.fromkeys(compute.values())
        )
        message = f"this plan computes on {devices}, which a device_map cannot say: {', '.join(fold_paths(self.units))}"
        help = "load it with `devmap run` or `devmap_config.load_model`"
        found = Diagnostic.error("not-a-device-map", message, help=help)
        super().__init__(f"{message}; {help}", (found,))


class NotForTransformersError(DevmapError):
    """The plan is one for vLLM: stages of layers, each in a process of its own."""

    def __init__(self) -> None:
        message = "this plan is one for vLLM, and transformers loads a device_map in one process"
        help = "write its files with `devmap export PROFILE --to vllm -o FOLDER`, or leave `targets` out"
        found = Diagnostic.error("not-a-device-map", message, help=help)
        super().__init__(f"{message}; {help}", (found,))


@dataclass(frozen=True)
class Plan:
    """Where everything is and runs.

    `measured` tells whether more than weights was measured and budgeted. `diagnostics` are the warnings of the
    compilation that made it; two plans are the same whatever was said of them.
    `max_memory` are budgets that leave room for the workload, of which plain `from_pretrained` makes the same map by
    transformers' strategy; `None` where more than budgets decides, or another strategy.
    `loading_ram_bytes` is what loading takes of the CPU's memory at most, whether or not that is a device of the plan.
    `fastest` is the fastest plan that was found, where other wishes than time chose this one.
    `draft` is what a draft model takes besides, which is off the capacities.
    `pipeline` are the stages of a plan for vLLM; each part of the model is then on the first device of its stage.
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
        """Unit to device as transformers writes it: accelerators by index, `cpu`, `disk`."""
        return {each.unit: each.location.stored_on.in_device_map for each in self.assignments}

    @cached_property
    def locations(self) -> dict[TensorName, Location]:
        """Where each tensor is stored and its module runs."""
        return {name: each.location for each in self.assignments for name in each.tensors}

    @cached_property
    def compute(self) -> dict[str, Device]:
        """The units that run somewhere else than the executor would run them by where they are stored."""
        return {
            each.unit: each.location.runs_on
            for each in self.assignments
            if each.location != self.executor.location(each.location.stored_on, self.main_device)
        }

    @cached_property
    def computed_on_cpu(self) -> dict[str, Device]:
        """Those of them that run on the CPU, where they are stored."""
        return {unit: device for unit, device in self.compute.items() if device == CPU}

    @cached_property
    def prefilled(self) -> dict[str, int]:
        """Of the units that compute on the CPU, those that run on the main device for so many tokens, or more."""
        tokens = self.executor.prefilled_from
        return {unit: tokens[unit] for unit in self.computed_on_cpu if unit in tokens}

    @property
    def prefilling(self) -> tuple[str, ...]:
        """What is said of those: from how many tokens on which of them run where."""
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
            NotADeviceMapError: where the plan computes on the CPU, or copies to several cards.
            NotForTransformersError: where it is for vLLM.
        """
        self.require_transformers()
        if self.compute:
            raise NotADeviceMapError(self.compute)
        return dict(self.placement)

    def require_transformers(self) -> None:
        """Refuse a plan that transformers does not load.

        Raises:
            NotForTransformersError: where it is for vLLM.
        """
        if self.pipeline is not None:
            raise NotForTransformersError

    @property
    def streaming(self) -> str:
        """How weights come to where they run that are stored elsewhere: what is said of their size."""
        if self.executor.works_ahead and not self.main_device.is_accelerator:
            return "are on disk, and read from there as each forward needs them"
        streamed = (each.location for each in self.assignments if self.executor.streams(each.location))
        targets = sorted({location.runs_on for location in streamed}) or [self.main_device]
        copied = f"are copied to {' and '.join(map(str, targets))} at every forward"
        if self.executor.works_ahead:
            ways = ", over the link of each" if len(targets) > 1 else ""
            return f"{copied}{ways}, ahead of their use; plain transformers waits for each, and takes longer"
        return copied

    @property
    def draft_missing_bytes(self) -> int:
        """What a draft model lacks on its device to compute: it takes turns with the model, whose room it uses then."""
        if self.draft is None:
            return 0
        use = next(use for use in self.devices if use.id == self.draft.device)
        return max(self.draft.activation_bytes - use.activation_bytes - max(use.free_bytes, 0), 0)

    @property
    def offload_buffers(self) -> bool:
        """What `from_pretrained` is to be given as `offload_buffers`, together with the map."""
        return self.executor.offload_buffers

    @property
    def streams_buffers(self) -> bool:
        """Whether it loads as it is planned only with `offload_buffers`: there is something that is streamed."""
        return self.offload_buffers and any(self.executor.streams(each.location) for each in self.assignments)

    def __str__(self) -> str:
        """What each device holds, a line each."""
        lines = [f"plan by `{self.strategy}`:"]
        for use in self.devices:
            units = [each.unit or "everything" for each in self.assignments if each.location.stored_on == use.id]
            held = f": {', '.join(fold_paths(units))}" if units else ""
            used_bytes = use.capacity_bytes - use.free_bytes
            lines.append(f"  {use.id} {format_bytes(used_bytes)} of {format_bytes(use.capacity_bytes)}{held}")
        if self.computed_on_cpu:
            lines.append(f"  computed on the CPU: {', '.join(fold_paths(self.computed_on_cpu))}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The `plan` object of `--format json` and of the lock."""
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
    """The plan that stores each unit on its device and runs it where its rule or the executor says.

    Where the executor would bring weights ahead and there are none to be, it is accelerate's; for prompts alone, the
    one that does it always.
    """
    placed = tuple(units)
    main_device = executor.main_device(stored_on for _, (stored_on, _) in placed)
    assignments = tuple(
        Assignment(unit.name, unit.tensors, executor.location(stored_on, main_device, compute))
        for unit, (stored_on, compute) in placed
    )
    prefilled = [executor.prefill_location(each.unit, each.location, main_device) for each in assignments]
    if executor.works_ahead and not any(map(executor.is_brought_ahead, prefilled)):
        executor = LEFT
    elif prefilled == [each.location for each in assignments] and executor.prefilled_from:
        executor = AHEAD
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
    """What each device of the profile holds under these assignments, in the profile's order."""
    placed = tuple(assignments)
    main_device = executor.main_device(each.location.stored_on for each in placed)
    held: dict[Device, list[TensorName]] = {device: [] for device in capacities}
    offloaded: set[TensorName] = set()
    for each in placed:
        if executor.is_offloaded(each.location, main_device):
            offloaded.update(each.tensors)
        for name in each.tensors:
            home = executor.residence(graph.tensors[name], each.location)
            held.setdefault(home, []).append(name)
    running = running_of(graph, placed, executor)
    costs = {} if running is None else running.costs()
    none = RunningCost()
    loading = loading_extra_bytes(graph, placed)
    prefilled = [executor.prefill_location(each.unit, each.location, main_device) for each in placed]
    is_moved = any(location.stored_on == CPU and executor.streams(location) for location in prefilled)
    if executor.works_ahead and is_moved:  # what moves to pinned memory is there twice, load by load
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
        for device, names in held.items()
    )


def _streamed_bytes(
    graph: ModelGraph, assignments: Iterable[Assignment], executor: Executor, main_device: Device
) -> int:
    """Bytes of weights that are copied to where they run at every forward."""
    copied = [
        (name, executor.is_offloaded(each.location, main_device))
        for each in assignments
        for name in each.tensors
        if executor.is_copied_in(graph.tensors[name], each.location)
    ]
    return graph.weights_bytes([name for name, _ in copied], {name for name, is_offloaded in copied if is_offloaded})
