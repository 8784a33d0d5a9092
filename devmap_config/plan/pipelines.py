"""Makes plans for vLLM: from a prepared profile to a plan with stages, and from a lock's stages to its plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from devmap_config.amounts import counted, format_bytes
from devmap_config.diagnostics.diagnostic import Sink
from devmap_config.execution.assignment import Assignment, Location
from devmap_config.execution.executor import Executor
from devmap_config.pipeline.architectures import VLLM_VERSION, architectures
from devmap_config.pipeline.layers import UncutModelError, layers_of
from devmap_config.pipeline.planning import TooManyChoicesError, best_place, tries_all_orders, widest_place
from devmap_config.pipeline.problem import MOST_BYTES, PipelineProblem, pipeline_of
from devmap_config.pipeline.rules import in_order, wishes_of
from devmap_config.pipeline.slots import MOST_CHOICES, slots_of
from devmap_config.pipeline.times import SENT_TENSORS
from devmap_config.plan.lock import LockError
from devmap_config.plan.plan import DeviceUse, Plan, Prediction
from devmap_config.plan.values import folded_devices
from devmap_config.profile.writing import example_with_rates
from devmap_config.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.pipeline.planning import StagePlacement
    from devmap_config.pipeline.rules import Wishes
    from devmap_config.pipeline.slots import Slot
    from devmap_config.pipeline.stages import Pipeline
    from devmap_config.plan.lock import Lock
    from devmap_config.prepared import Prepared
    from devmap_config.profile.schema import Hardware

VLLM = Executor(name="vllm")
"""The executor of such a plan: each layer runs on the device that stores it."""

CACHE_FIRST = "longest-context"
FEW_DEVICES = "fewest-devices"

LONGEST = 2**24
"""The longest context that is stated if the model's positions have no end."""


@dataclass(frozen=True)
class StatedProblem:
    """The problem of cutting a profile's model into stages, with the constraints of its rules."""

    problem: PipelineProblem
    wishes: Wishes


def pipeline_problem(prepared: Prepared, sink: Sink) -> StatedProblem | None:
    """Return the problem of cutting the model; `None` if rules, groups or the model keep it from being cut."""
    loaded, model, inventory = prepared.loaded, prepared.model, prepared.inventory
    measurement = model.graph.measurement
    if measurement is None:
        return None  # reported already: the profile names no context
    try:
        layers = layers_of(model.graph, model.source.config)
        layers.check_caches(measurement)
    except UncutModelError as error:
        message = f"a plan of {model.class_name} for vLLM cannot be made: {error}"
        help = "leave `targets` out, for a plan for transformers"
        sink.error("beyond-vllm", message, loaded.profile.model.source.span, help=help)
        return None
    slots = slots_of(loaded, inventory, sink)
    if not slots and not sink.has_errors:
        place = loaded.profile.hardware.devices.key_span
        sink.error("beyond-vllm", "no device computes", place, help="list an accelerator, or `cpu`")
    if sink.has_errors or not slots:
        return None
    if len(slots[0]) > 1 and (reason := layers.obstacle_to(len(slots[0]))):
        group = loaded.profile.placement.groups[0]
        sink.error("bad-group", f"the model cannot be shared by such a group: {reason}", group.span, help=TRY_SMALLER)
        return None
    wishes = wishes_of(layers, prepared.resolution, slots, sink)
    if sink.has_errors:
        return None
    hosts = loaded.profile.hardware.hosts
    problem = PipelineProblem(
        layers=layers,
        inventory=inventory,
        measurement=measurement,
        dtype=model.dtype,
        concurrency=loaded.profile.workload.concurrency.value,
        slots=in_order(slots, wishes),
        needed=wishes.needed,
        distinct=wishes.devices,
        allowed=wishes.allowed,
        orders=wishes.orders,
        networks={name: (host.network.address.value, host.network.interface.value) for name, host in hosts.items()},
    )
    return StatedProblem(problem, wishes)


TRY_SMALLER = "a group of another size: 2, 4 and 8 suit most models"


def sent_bytes(prepared: Prepared) -> int:
    """Return the bytes that a stage sends to the next one for a token of a request.

    Raises:
        UncutModelError: if the model cannot be cut into stages.
    """
    layers = layers_of(prepared.model.graph, prepared.model.source.config)
    return SENT_TENSORS * layers.hidden_size * layers.element_bytes


def plan_pipeline(prepared: Prepared, sink: Sink) -> Plan | None:
    """Return the best plan that vLLM can run; if there is none, report why and return `None`."""
    stated = pipeline_problem(prepared, sink)
    if stated is None:
        return None
    problem, strategy = stated.problem, prepared.strategy
    if strategy == "fastest" and not problem.knows_times:
        hardware = prepared.loaded.profile.hardware
        for device, message, help in _missing_rates(problem, hardware):
            sink.error("missing-figure", message, hardware.device_span(device), help=help)
        return None
    try:
        place = _best_place(problem, strategy)
    except TooManyChoicesError:
        message = f"there are more than {MOST_CHOICES} ways to choose the stages among these devices"
        help = "list those that are to have stages, or put layers on them by rules"
        sink.error("too-large", message, prepared.loaded.profile.hardware.devices.key_span, help=help)
        return None
    if place is None:
        _report_no_room(problem, prepared, sink)
        return None
    return _plan(prepared, problem, place.slots, place.bounds)


def other_stages(plan: Plan, prepared: Prepared) -> str | None:
    """Return a phrase about the stages that differ from those of a new placement; `None` if none do."""
    pipeline, stated = plan.pipeline, pipeline_problem(prepared, Sink())
    try:
        place = None if stated is None else _best_place(stated.problem, prepared.strategy)
    except TooManyChoicesError:
        place = None
    if pipeline is None or place is None:
        return "placing anew gives no stages"
    own = [_written(stage.devices, (stage.first_layer, stage.last_layer)) for stage in pipeline.stages]
    best = [_written(_ids(slot), bound) for slot, bound in zip(place.slots, place.bounds, strict=True)]
    if own == best:
        return None
    first = next((number for number, (one, other) in enumerate(zip(own, best, strict=False)) if one != other), 0)
    return f"it has layers {first_of(own[first:])}, and placing anew gives {first_of(best[first:])}"


def all_orders_tried(prepared: Prepared) -> bool:
    """Return whether stages are searched in every order of devices that the rules allow."""
    stated = pipeline_problem(prepared, Sink())
    return stated is None or tries_all_orders(stated.problem)


def _best_place(problem: PipelineProblem, strategy: str) -> StagePlacement | None:
    """Return the stages that a strategy chooses.

    Raises:
        TooManyChoicesError: if there are too many ways to choose devices.
    """
    return best_place(
        problem,
        prefers_cache=strategy == CACHE_FIRST or not problem.knows_times,
        prefers_few_devices=strategy == FEW_DEVICES,
    )


def _written(devices: Sequence[Device], bound: tuple[int, int]) -> str:
    """Return a stage as `0-3 on left/cuda:0`."""
    return f"{bound[0]}-{bound[1]} on {', '.join(folded_devices(map(str, devices)))}"


def derive_pipeline(lock: Lock, prepared: Prepared) -> Plan:
    """Return the plan that follows from the stages of a lock.

    Raises:
        LockError: if its stages are impossible.
    """
    sink = Sink()
    stated = pipeline_problem(prepared, sink)
    if stated is None or "pipeline" not in lock.plan:
        raise LockError("has no stages, and its profile is for vLLM" if stated else next(iter(sink)).message)
    problem = stated.problem
    by_devices = {tuple(str(device.id) for device in slot): slot for slot in problem.slots}
    slots, bounds = [], []
    for stage in lock.plan["pipeline"]["stages"]:
        slot = by_devices.get(tuple(stage["devices"]))
        if slot is None:
            raise LockError(f"it has a stage on {' and '.join(stage['devices'])}, which is none of the profile's")
        slots.append(slot)
        bounds.append((stage["first_layer"], stage["last_layer"]))
    expected = [-1, *(last for _, last in bounds)]
    count = len(problem.layers.paths)
    follows = all(first == before + 1 <= last for (first, last), before in zip(bounds, expected, strict=False))
    if not follows or expected[-1] != count - 1 or len(set(map(_ids, slots))) < len(slots):
        raise LockError(f"its stages are not {count} layers one after another")
    ranks: dict[str | None, int] = {}
    for slot in slots:
        ranks[slot[0].id.host] = ranks.get(slot[0].id.host, 0) + 1
    if len(set(ranks.values())) > 1:
        raise LockError("its hosts have different numbers of ranks")
    return _plan(prepared, problem, slots, bounds)


def broken_stages(plan: Plan, prepared: Prepared) -> list[str]:
    """Return what is wrong with the stages of a plan: rules that they break, and requests that do not fit."""
    pipeline, stated = plan.pipeline, pipeline_problem(prepared, Sink())
    if pipeline is None or stated is None:
        return ["its profile cannot be cut into stages"]
    problem = stated.problem
    by_devices = {_ids(slot): slot for slot in problem.slots}
    slots = [by_devices[stage.devices] for stage in pipeline.stages]
    broken = []
    hosts = list(dict.fromkeys(slot[0].id.host for slot in problem.slots))
    order = [hosts.index(slot[0].id.host) for slot in slots]
    if order != sorted(order):
        broken.append("its stages are not in the order of their hosts")
    for stage, mask in zip(pipeline.stages, stated.wishes.allowed(slots), strict=True):
        if not mask[stage.first_layer, stage.last_layer]:
            broken.append(f"a rule keeps layers {stage.first_layer} to {stage.last_layer} off {stage.devices[0]}")
        if stage.blocks < problem.needed_blocks(len(slots)):
            broken.append(f"the requests do not fit on {stage.devices[0]}")
    return broken


def _ids(slot: Slot) -> tuple[Device, ...]:
    return tuple(device.id for device in slot)


def _plan(
    prepared: Prepared, problem: PipelineProblem, slots: Sequence[Slot], bounds: Sequence[tuple[int, int]]
) -> Plan:
    pipeline = pipeline_of(problem, slots, bounds)
    return Plan(
        strategy=prepared.strategy,
        executor=VLLM,
        main_device=pipeline.stages[0].devices[0],
        assignments=tuple(_assignments(problem, pipeline)),
        devices=tuple(_uses(prepared, pipeline)),
        prediction=_prediction(problem, pipeline, slots),
        measured=problem.measurement.measured,
        pipeline=pipeline,
    )


def _assignments(problem: PipelineProblem, pipeline: Pipeline) -> Iterator[Assignment]:
    """Yield each part of the model on the first device of its stage."""
    graph, layers = problem.layers.graph, problem.layers
    stage_of = {
        layers.paths[number]: stage
        for stage in pipeline.stages
        for number in range(stage.first_layer, stage.last_layer + 1)
    }
    for path in graph.blocks:
        names = tuple(tensor.name for tensor in graph.modules[path].tensors())
        stage = stage_of.get(path, pipeline.stages[-1 if path in layers.behind else 0])
        if names:
            yield Assignment(path, names, Location(stage.devices[0], stage.devices[0]))
    placed = {name for path in graph.blocks for name in (tensor.name for tensor in graph.modules[path].tensors())}
    for name in graph.tensors:
        if name not in placed:
            yield Assignment(name, (name,), Location(pipeline.stages[0].devices[0], pipeline.stages[0].devices[0]))


def _uses(prepared: Prepared, pipeline: Pipeline) -> Iterator[DeviceUse]:
    stages = {device: stage for stage in pipeline.stages for device in stage.devices}
    for device, capacity_bytes in prepared.capacities.items():
        stage = stages.get(device)
        yield DeviceUse(
            id=device,
            capacity_bytes=capacity_bytes,
            weights_bytes=0 if stage is None else stage.weights_bytes,
            kv_cache_bytes=0 if stage is None else stage.page_bytes * pipeline.blocks,
            activation_bytes=0 if stage is None else stage.activation_bytes,
            overhead_bytes=0 if stage is None else stage.overhead_bytes,
            loading_bytes=0 if stage is None else stage.weights_bytes,
        )


def _prediction(problem: PipelineProblem, pipeline: Pipeline, slots: Sequence[Slot]) -> Prediction:
    """Return the times of a token and of a prompt for one request, and the longest context of all requests."""
    decode = [stage.decode_nanoseconds for stage in pipeline.stages]
    prefill = [stage.prefill_nanoseconds for stage in pipeline.stages]
    workload = problem.measurement.workload
    chunks = (
        -(-workload.context_length // workload.prompt_length) if workload.prompt_length < workload.context_length else 1
    )
    known_decode = [time for time in decode if time is not None]
    known_prefill = [time for time in prefill if time is not None]
    token = prompt = None
    if len(known_decode) == len(slots) and problem.measurement.decodes and problem.measurement.measured:
        token = max(sum(known_decode), problem.batches(len(slots)) * max(known_decode)) or None
    if len(known_prefill) == len(slots) and problem.measurement.measured:
        # The stages work on the parts of a prompt one after another.
        prompt = sum(known_prefill) + (chunks - 1) * max(known_prefill) or None
    return Prediction(
        decode_nanoseconds_per_token=token,
        prefill_nanoseconds=prompt,
        streamed_bytes_per_token=0,
        hops=len(slots) - 1,
        longest_context=_longest_context(problem, pipeline),
    )


def _longest_context(problem: PipelineProblem, pipeline: Pipeline) -> int:
    room, stages = pipeline.blocks, len(pipeline.stages)

    def fits(length: int) -> bool:
        workload = replace(problem.measurement.workload, context_length=length)
        longer = replace(problem, measurement=replace(problem.measurement, workload=workload))
        return longer.needed_blocks(stages) <= room

    low, high = 0, problem.measurement.positions.most or LONGEST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _missing_rates(problem: PipelineProblem, hardware: Hardware) -> Iterator[tuple[Device, str, str]]:
    for slot in problem.slots:
        if slot[0].bandwidth_bytes_per_second is None:
            with_bandwidth = example_with_rates(slot[0].id, hardware.listed[slot[0].id], "bandwidth")
            example = f"write `{with_bandwidth}`{', or name an `accelerator`' if slot[0].id.is_accelerator else ''}"
            yield slot[0].id, f"`fastest` compares times, and the bandwidth of {slot[0].id} is not known", example
    first_of_each = {after[0].id: (before, after) for before, after in reversed(problem.unlinked)}
    for before, after in reversed(first_of_each.values()):
        is_between = before[0].id.host != after[0].id.host
        key = "`network: 12.5GB/s` under each host" if is_between else "`links: {peer: 12GB/s}`"
        yield (
            after[0].id,
            f"`fastest` compares times, and how fast {after[0].id} is reached from {before[0].id} is not known",
            f"write {key}",
        )
    for slot in problem.slots:
        if len(slot) > 1 and (slot[0].id, slot[1].id) not in problem.inventory.links:
            message = f"`fastest` compares times, and how fast {slot[1].id} is reached from {slot[0].id} is not known"
            yield slot[1].id, message, "write `links: {peer: 12GB/s}`"


def _report_no_room(problem: PipelineProblem, prepared: Prepared, sink: Sink) -> None:
    """Report that not all requests fit: how many tokens do, and which stage limits them; or that the weights do not."""
    workload = prepared.loaded.profile.workload
    widest = widest_place(problem)
    requests = f"{counted(problem.sequences, 'request')} of {problem.context_length:,} tokens"
    if widest is None:
        _report_no_stages(problem, prepared, sink)
        return
    pipeline = pipeline_of(problem, widest.slots, widest.bounds)
    stage = pipeline.stages[pipeline.deciding_stage]
    needed = problem.needed_blocks(len(widest.slots)) * problem.context_length // pipeline.blocks_per_request
    most = _most_requests(problem, widest)
    sink.error(
        "over-capacity",
        f"{requests} take a cache of {needed:,} tokens, and there is room for {pipeline.cache_tokens:,}: stage"
        f" {pipeline.deciding_stage} decides, layers {stage.first_layer} to {stage.last_layer} on"
        f" {stage.devices[0]}{_of_processes(problem)}",
        workload.context_length.span,
        help=f"write `concurrency: {most}` or less, or a shorter `context_length`"
        if most
        else "lower `context_length`, or list more memory",
    )


def _report_no_stages(problem: PipelineProblem, prepared: Prepared, sink: Sink) -> None:
    """Report that the weights and a forward of all requests fit on no stages, or that only fewer requests do."""
    profile = prepared.loaded.profile
    forward_bytes = max(int(problem.activations(place, 2).max()) for place in (0, 1))
    fewer = widest_place(replace(problem, concurrency=1)) if problem.concurrency > 1 else None
    if fewer is not None and (most := _most_requests(problem, fewer)):
        takes = (
            "more than any device has" if forward_bytes > MOST_BYTES else f"up to {format_bytes(forward_bytes)} each"
        )
        message = f"a forward of {counted(problem.sequences, 'request')} takes {takes}, beside the weights"
        concurrency = profile.workload.concurrency
        sink.error("over-capacity", message, concurrency.span, help=f"write `concurrency: {most}` or less")
        return
    held_bytes = sum(slot[0].capacity_bytes * len(slot) for slot in problem.slots)
    rotations_bytes = problem.layers.rotations_bytes
    rotations = f" and a table of rotations {format_bytes(rotations_bytes)}" if rotations_bytes else ""
    message = (
        f"no stages of whole layers fit: the weights are {format_bytes(problem.layers.graph.size_bytes)}, and the"
        f" devices have {format_bytes(held_bytes)} together, of which a forward takes up to"
        f" {format_bytes(forward_bytes)}{rotations} on each{_of_processes(problem)}"
    )
    if problem.distinct:
        message += "; rules say which device has which layers"
    help = "list more devices or memory" + (", or lower `concurrency`" if problem.sequences > 1 else "")
    sink.error("over-capacity", message, profile.hardware.devices.key_span, help=help)


def _most_requests(problem: PipelineProblem, place: StagePlacement) -> int:
    """Return the number of requests that fit on these stages at once; other stages may have room for more."""

    def fit(concurrency: int) -> bool:
        fewer = replace(problem, concurrency=concurrency)
        rooms = zip(fewer.rooms(place.slots), place.bounds, strict=True)
        return min(int(room[bound]) for room, bound in rooms) >= fewer.needed_blocks(len(place.slots))

    low, high = 0, problem.concurrency
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fit(middle) else (low, middle - 1)
    return low


def _of_processes(problem: PipelineProblem) -> str:
    """Return a phrase about vLLM's own processes, which take a part of a CPU's memory; empty for accelerators."""
    own_bytes = problem.process_bytes(problem.slots, 0)
    if not own_bytes:
        return ""
    others = ", and less of the others" if len(problem.slots) > 1 else ""
    return f"; vLLM's own processes take {format_bytes(own_bytes)} of {problem.slots[0][0].id}{others}"


def review_pipeline(plan: Plan, prepared: Prepared) -> tuple[Diagnostic, ...]:
    """Return the violations of a plan for vLLM, and warnings for its user."""
    sink = Sink()
    profile = prepared.loaded.profile
    for broken in broken_stages(plan, prepared):
        sink.error("over-capacity", f"of the stages, {broken}", profile.hardware.devices.key_span, help=REPORT)
    name = prepared.graph.class_name
    if name not in architectures():
        sink.warning(
            "foreign-to-vllm",
            f"vLLM {VLLM_VERSION} has no `{name}` of its own, and may run transformers' code in its stead",
            profile.model.source.span,
            help="try it before you rely on the stages: `vllm serve MODEL --model-impl transformers`",
        )
    if prepared.model.quantization is not None:
        sink.warning(
            "quantization-not-measured",
            "the stages count quantised weights as transformers holds them, and vLLM may hold them otherwise",
            profile.model.source.span,
            help="leave some room: `reserve: 1GiB` on each device",
        )
    return sink.diagnostics


REPORT = "the verifier found what should not have been made: please report it, with the profile"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMove:
    """A move of one layer to the stage before or after its own: the time of a token then, and the tokens that the cache
    holds.

    `obstacle` is the reason why the move is impossible, if it is.
    """

    layer: int
    source: int
    target: int
    decode_nanoseconds: int | None = None
    cache_tokens: int = 0
    obstacle: str | None = None


def moves_of_a_layer(plan: Plan, prepared: Prepared) -> Iterator[LayerMove]:
    """Yield the moves of one layer to the next stage, or to the one before, at each cut."""
    pipeline, stated = plan.pipeline, pipeline_problem(prepared, Sink())
    if pipeline is None or stated is None:
        return
    problem = stated.problem
    by_devices = {_ids(slot): slot for slot in problem.slots}
    slots = [by_devices[stage.devices] for stage in pipeline.stages]
    bounds = [(stage.first_layer, stage.last_layer) for stage in pipeline.stages]
    for place in range(len(slots) - 1):
        for layer, source, target, cut in (
            (bounds[place][1], place, place + 1, bounds[place][1]),
            (bounds[place + 1][0], place + 1, place, bounds[place + 1][0] + 1),
        ):
            moved = list(bounds)
            moved[place], moved[place + 1] = (bounds[place][0], cut - 1), (cut, bounds[place + 1][1])
            if any(first > last for first, last in moved):
                obstacle: str | None = "its stage would have none left"
                yield LayerMove(layer=layer, source=source, target=target, obstacle=obstacle)
                continue
            other = _plan(prepared, problem, slots, moved)
            obstacle = next(iter(broken_stages(other, prepared)), None)
            if obstacle is not None or other.pipeline is None:
                yield LayerMove(layer=layer, source=source, target=target, obstacle=obstacle)
                continue
            yield LayerMove(
                layer=layer,
                source=source,
                target=target,
                decode_nanoseconds=other.prediction.decode_nanoseconds_per_token,
                cache_tokens=other.pipeline.cache_tokens,
            )
