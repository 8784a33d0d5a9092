"""Reviews a finished plan: reports violations, warnings for its user, and problems of loading."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devmap_config.amounts import format_bytes, format_exact_bytes
from devmap_config.compatibility import check_adapter_placement, check_quantizer
from devmap_config.devices import CPU, DISK
from devmap_config.diagnostics.diagnostic import Sink
from devmap_config.execution.weighing import heaviest
from devmap_config.plan.verify import Violation, verify
from devmap_config.profile.writing import example_with_rates
from devmap_config.rules.folding import fold_paths

if TYPE_CHECKING:
    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.graph.model import ModelGraph
    from devmap_config.placement.problem import Placement
    from devmap_config.plan.plan import DeviceUse, Plan
    from devmap_config.prepared import Prepared
    from devmap_config.profile.loading import LoadedProfile
    from devmap_config.rules.resolution import Decision, Resolution
    from devmap_config.rules.rule import Rule


REPORT = "the verifier found what the placer should not have made: please report it, with the profile"


def review(plan: Plan, prepared: Prepared) -> tuple[Diagnostic, ...]:
    """Verify a plan, and report violations and warnings at the rules that caused them.

    Args:
        plan: the plan.
        prepared: the profile that it was made for.

    Returns:
        The diagnostics.
    """
    if plan.pipeline is not None:
        from devmap_config.plan.pipelines import review_pipeline  # imports numpy

        return review_pipeline(plan, prepared)
    loaded, graph, resolution, sink = prepared.loaded, prepared.graph, prepared.resolution, Sink()
    check_quantizer({assignment.unit: assignment.location.stored_on for assignment in plan.assignments}, prepared, sink)
    streamed = {
        name
        for assignment in plan.assignments
        if plan.executor.streams(assignment.location)
        for name in assignment.tensors
    }
    check_adapter_placement(streamed, prepared, sink)
    split: dict[int, tuple[Rule, list[str]]] = {}
    stranded: dict[int, tuple[Decision, list[Violation]]] = {}
    overfull: list[str] = []
    for violation in verify(plan, graph, prepared.capacities, resolution.forbidden):
        if violation.kind == "split-block" and (cause := _cause_of_split(violation, graph, resolution)):
            if cause.compute is not None and _computes_apart(violation, plan):
                continue  # the rule takes out a part that computes on its own device, and whose output is copied back
            split.setdefault(id(cause.rule), (cause.rule, []))[1].append(violation.subjects[0])
        elif violation.kind == "split-block" and _computes_apart(violation, plan):
            continue  # the strategy took out a part whose output is copied back, or kept one on the device that uses it
        elif violation.kind == "over-capacity":
            overfull.append(violation.subjects[0])
        elif violation.kind == "stranded-tensor" and (cause := resolution.decisions.get(violation.subjects[0])):  # type: ignore[call-overload]
            stranded.setdefault(id(cause.rule), (cause, []))[1].append(violation)
        else:
            help = (
                "what is on the disk needs `cpu` to run on: list it" if violation.kind == "unlisted-device" else REPORT
            )
            sink.error(violation.kind, violation.message, loaded.profile.hardware.devices.key_span, help=help)
    if overfull:
        _report_overfull(overfull, plan, graph, loaded, sink)
    for decision, violations in stranded.values():
        _report_stranded(decision, violations, plan, graph, sink)
    for rule, blocks in split.values():
        class_name = graph.modules[blocks[0]].class_name  # type: ignore[index]
        sink.warning(
            "split-block",
            f"`{rule.text}` splits {'blocks' if len(blocks) > 1 else 'a block'} that transformers keeps whole:"
            f" {', '.join(f'`{pattern}`' for pattern in fold_paths(blocks))} ({class_name})",
            rule.span,
            help=_cost_of_split(plan, blocks[0]),
        )
    if missing := lacks_room_for_draft(plan):
        assistant = loaded.profile.model.assistant
        sink.error(
            "over-capacity",
            missing,
            None if assistant is None else assistant.span,
            help="write `assistant: {device: …}` with another device, or lower `context_length`",
        )
    _check_first_parameter(plan, prepared, sink)
    _check_compute(plan, resolution, sink)
    _check_cache(plan, prepared, sink)
    _check_offload_folder(plan, loaded, sink)
    _check_comparison(plan, prepared, sink)
    return sink.diagnostics


def _check_comparison(plan: Plan, prepared: Prepared, sink: Sink) -> None:
    """Report that weights are copied from a CPU that might compute them faster, but whose speed is unknown."""
    streamed = next((use.weights_bytes for use in plan.devices if use.id == CPU), 0)
    if streamed and prepared.passes_over_cpu:
        hardware = prepared.loaded.profile.hardware
        with_bandwidth = example_with_rates(CPU, hardware.listed[CPU], "bandwidth")
        sink.warning(
            "cpu-passed-over",
            f"the CPU only stores {format_bytes(streamed)} of weights: its bandwidth is not known, so computing with"
            " them there, which may be faster, was not considered",
            hardware.device_span(CPU),
            help=f"write `{with_bandwidth}`, or what `devmap probe --measure` finds",
        )


def warn_of_kept_tensors(kept: Placement, plan: Plan, loaded: LoadedProfile, sink: Sink) -> None:
    """Warn of tensors that are kept on the device that uses them, since nothing would copy them there."""
    patterns = ", ".join(f"`{pattern}`" for pattern in fold_paths(kept))
    sink.warning(
        "stranded-tensor",
        f"nothing would bring {patterns} to where it is used, so it is kept on {plan.main_device}",
        loaded.profile.placement.strategy.span,
        help="nothing needs to be done; a pin would say the same",
    )


def _report_stranded(
    decision: Decision, violations: list[Violation], plan: Plan, graph: ModelGraph, sink: Sink
) -> None:
    names = [violation.subjects[0] for violation in violations]
    units = {assignment.unit for assignment in plan.assignments}
    # A tensor that is placed by itself can be pinned elsewhere; a part that is taken out of a block strands others.
    to_pin = [name if name in units else _block_around(name, graph) for name in names]
    patterns = " and ".join(f"`{pattern}`" for pattern in fold_paths(dict.fromkeys(to_pin))[:3])
    others = f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""
    sink.error(
        "compute-on-cpu" if decision.compute == CPU else "stranded-tensor",
        violations[0].message + others,
        decision.rule.span,
        help="write `compute: cpu` of the module around it, or drop it"
        if decision.compute == CPU
        else f"pin {patterns} to {plan.main_device}, where it is used: accelerate brings in what a module holds when"
        " that module is called",
    )


def _block_around(name: str, graph: ModelGraph) -> str:
    return next(block for block in graph.blocks if name.startswith(f"{block}."))


def _check_first_parameter(plan: Plan, prepared: Prepared, sink: Sink) -> None:
    """Report a first parameter that is offloaded between two forwards: transformers sends proposed tokens to its
    device.
    """
    first = next((tensor.name for tensor in prepared.graph.tensors.values() if not tensor.is_held_in_buffer), None)
    if plan.draft is None or first is None or not plan.executor.streams(location := plan.locations[first]):
        return
    if plan.executor.works_ahead and not location.runs_on.is_accelerator:
        return  # mapped weights are always there
    assistant = prepared.loaded.profile.model.assistant
    module = first.rpartition(".")[0]
    sink.error(
        "unfit-assistant",
        f"`{module}` is copied to where it runs at every forward, and transformers sends the draft model's"
        " proposals to the device of the model's first parameter",
        None if assistant is None else assistant.span,
        help=f"pin it to where it runs: `{{match: {module}, device: {location.runs_on}}}`",
    )


def lacks_room_for_draft(plan: Plan) -> str | None:
    """Return a message if a draft model has too little room to compute under a plan; `None` if it has enough."""
    if plan.draft is None or not plan.draft_missing_bytes:
        return None
    return (
        f"the draft model computes with {format_bytes(plan.draft.activation_bytes)} on {plan.draft.device}:"
        f" {format_exact_bytes(plan.draft_missing_bytes)} are missing beside what is there all the time"
    )


def broken_promises(plan: Plan, prepared: Prepared) -> list[str]:
    """Return what is wrong with a plan from a lock: violations that the verifier finds, and pins that it breaks.

    A split block is not among these: if a rule asked for it, compiling has reported that.
    """
    if plan.pipeline is not None:
        from devmap_config.plan.pipelines import broken_stages  # imports numpy

        return broken_stages(plan, prepared)
    resolution = prepared.resolution
    violations = verify(plan, prepared.graph, prepared.capacities, resolution.forbidden)
    broken = [violation.message for violation in violations if violation.kind != "split-block"]
    broken += filter(None, [lacks_room_for_draft(plan)])
    for name, decision in resolution.decisions.items():
        location, text = plan.locations.get(name), decision.rule.text
        if location is not None and decision.device != location.stored_on:
            broken.append(f"`{name}` is on {location.stored_on}, and `{text}` puts it on {decision.device}")
        elif location is not None and decision.compute not in (None, location.runs_on):
            broken.append(f"`{name}` runs on {location.runs_on}, and `{text}` computes it on {decision.compute}")
    for rule, names in resolution.groups:
        devices = dict.fromkeys(plan.locations[name].stored_on for name in names if name in plan.locations)
        if len(devices) > 1:
            broken.append(f"`{rule.text}` keeps together what is on {' and '.join(map(str, devices))}")
    return broken


def _report_overfull(devices: list[str], plan: Plan, graph: ModelGraph, loaded: LoadedProfile, sink: Sink) -> None:
    """Report devices whose weights fit, but not what the workload or loading needs in addition."""
    uses = sorted((use for use in plan.devices if str(use.id) in devices), key=lambda use: use.free_bytes)
    if uses[0].free_bytes >= 0:
        _report_overfull_loading(uses, graph, loaded, sink)
        return
    uses = [use for use in uses if use.free_bytes < 0]
    fullest = uses[0]
    parts = {
        "weights": fullest.weights_bytes,
        "cache": fullest.kv_cache_bytes,
        "activations": fullest.activation_bytes,
        "streamed weights": fullest.overhead_bytes,
    }
    listed = ", ".join(f"{name} {format_bytes(size_bytes)}" for name, size_bytes in parts.items() if size_bytes)
    others = "".join(f"; and {format_exact_bytes(-use.free_bytes)} on {use.id}" for use in uses[1:])
    cause = heaviest(graph, plan.assignments, plan.executor, fullest.id, parts)
    others += f"; {cause}" if cause else ""
    sink.error(
        "over-capacity",
        f"{fullest.id} would hold {format_bytes(sum(parts.values()))} ({listed})"
        f" and has {format_bytes(fullest.capacity_bytes)}:"
        f" {format_exact_bytes(-fullest.free_bytes)} are missing{others}",
        loaded.profile.workload.context_length.span,
        help="lower `context_length` or `batch_size`, prefill in parts (`prompt_length`), or write `strategy: fastest`,"
        " which counts with all of this",
    )


def _report_overfull_loading(uses: list[DeviceUse], graph: ModelGraph, loaded: LoadedProfile, sink: Sink) -> None:
    """Report a plan that fits after loading, but not during loading."""
    fullest = max(uses, key=lambda use: use.loading_bytes - use.capacity_bytes)
    extra_bytes = fullest.loading_bytes - fullest.weights_bytes
    sink.error(
        "over-capacity",
        f"{fullest.id} would hold {format_bytes(fullest.loading_bytes)} at once while the model is loaded, and has"
        f" {format_bytes(fullest.capacity_bytes)}:"
        f" {format_exact_bytes(fullest.loading_bytes - fullest.capacity_bytes)} are missing;"
        f" besides {format_bytes(fullest.weights_bytes)} of weights, {format_bytes(extra_bytes)} are what"
        f" {_made_while_loading(graph)} takes",
        loaded.profile.hardware.device_span(fullest.id),
        help=f"give {fullest.id} that much more memory, or keep less of the model there",
    )


def _made_while_loading(graph: ModelGraph) -> str:
    facts = graph.loading
    if facts is not None and facts.quantises:
        return f"quantising it from {facts.dtype}"
    if facts is not None and facts.stored_dtype != facts.dtype:
        return f"casting it from {facts.stored_dtype}"
    return "merging the weights of its experts"


def _computes_apart(violation: Violation, plan: Plan) -> bool:
    """Return whether a part that is stored apart from its block computes there, on the CPU, or runs with the whole
    block.
    """
    parts = [assignment for assignment in plan.assignments if assignment.unit.startswith(f"{violation.subjects[0]}.")]
    streamed = {
        part.location.stored_on
        for part in parts
        if part.unit not in plan.computed_on_cpu and not part.location.is_one_device
    }
    stores = {part.location.stored_on for part in parts if part.unit not in plan.computed_on_cpu}
    return len(stores) <= 1 or (len(streamed) == 1 and len({part.location.runs_on for part in parts}) == 1)


def _cost_of_split(plan: Plan, block: str) -> str:
    parts = [assignment for assignment in plan.assignments if assignment.unit.startswith(f"{block}.")]
    running = sorted({part.location.runs_on for part in parts})
    if len(running) == 1:
        return f"all of it runs on {running[0]}: what is stored elsewhere is copied there at every forward"
    return (
        f"activations pass between {' and '.join(map(str, running))} inside the block; pin the whole block if you can"
    )


def _cause_of_split(violation: Violation, graph: ModelGraph, resolution: Resolution) -> Decision | None:
    """Return the rule that takes a part out of a block: the one that decides for the fewest of its tensors."""
    block = graph.modules[violation.subjects[0]]  # type: ignore[index]
    names = [tensor.name for tensor in block.tensors()]
    deciding = [resolution.decisions[name] for name in names if name in resolution.decisions]
    counts = {id(decision.rule): 0 for decision in deciding}
    for decision in deciding:
        counts[id(decision.rule)] += 1
    partial = [decision for decision in deciding if counts[id(decision.rule)] < len(names)]
    return min(partial, key=lambda decision: counts[id(decision.rule)], default=None)


def _check_compute(plan: Plan, resolution: Resolution, sink: Sink) -> None:
    """Check that modules run where they are stored, on the main device, or on the CPU that stores them."""
    reported: set[int] = set()
    for assignment in plan.assignments:
        stored_on = assignment.location.stored_on
        if plan.executor.can_run(assignment.location, plan.main_device):
            continue
        decision = next(
            (resolution.decisions[name] for name in assignment.tensors if name in resolution.decisions), None
        )
        if decision is None or id(decision.rule) in reported:
            continue
        reported.add(id(decision.rule))
        sink.error(
            "bad-compute",
            f"what is stored on {stored_on} cannot run on {assignment.location.runs_on}",
            decision.rule.span,
            help=f"it runs on {plan.executor.location(stored_on, plan.main_device).runs_on};"
            " only what is stored on `cpu` may say `compute: cpu`, or another card where weights are copied ahead",
        )


def _check_cache(plan: Plan, prepared: Prepared, sink: Sink) -> None:
    """Check that no layer of an offloaded cache runs on the CPU, where transformers fails."""
    graph, decisions = prepared.graph, prepared.resolution.decisions
    costs = () if graph.measurement is None else graph.measurement.modules
    for path in (cost.path for cost in costs if cost.offloaded_bytes and plan.executor.offloads_cache(cost.path)):
        names = [tensor.name for tensor in graph.modules[path].tensors()] if path in graph.modules else []  # type: ignore[index]
        if any(plan.locations[name].runs_on != CPU for name in names):
            continue
        decision = next((decisions[name] for name in names if name in decisions), None)
        sink.error(
            "unfit-cache",
            f"the cache is to be offloaded, and `{path}`, which fills a layer of it, runs on the CPU",
            prepared.loaded.profile.workload.cache.span if decision is None else decision.rule.span,
            help="leave `compute: cpu` to modules without a cache, such as experts; or write `cache: dynamic`",
        )
        return


def _check_offload_folder(plan: Plan, loaded: LoadedProfile, sink: Sink) -> None:
    if loaded.profile.placement.offload.folder.value is not None or DISK not in loaded.profile.hardware.listed:
        return
    used = any(assignment.location.stored_on == DISK for assignment in plan.assignments)
    report = sink.error if used else sink.warning
    report(
        "missing-offload-folder",
        "the plan keeps weights on disk, and no folder is given for them"
        if used
        else "the disk is listed, and no folder is given for what might go there",
        loaded.profile.hardware.device_span(DISK),
        help="add `placement: {offload: {folder: ./offload}}`",
    )
