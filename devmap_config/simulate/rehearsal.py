"""The dry run as a stage of compiling: a plan that does not run is repaired if a strategy made it, else refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from devmap_config.amounts import format_bytes, format_exact_bytes
from devmap_config.diagnostics.diagnostic import Related
from devmap_config.graph.failures import MeasurementFailure
from devmap_config.graph.findings import report_failure
from devmap_config.graph.model import TensorName
from devmap_config.placement.constraints import NO_REPAIRS
from devmap_config.plan.review import warn_of_kept_tensors
from devmap_config.rules.folding import fold_paths
from devmap_config.simulate.memory import plan_digest, verdict_on
from devmap_config.simulate.repairs import block_of, involved_in, overfull, repaired, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.graph.model import ModelGraph
    from devmap_config.placement.constraints import Repairs
    from devmap_config.plan.plan import Plan
    from devmap_config.prepared import Prepared
    from devmap_config.profile.loading import LoadedProfile
    from devmap_config.profile.permissions import Permissions
    from devmap_config.rules.resolution import Decision
    from devmap_config.rules.rule import Rule
    from devmap_config.simulate.repairs import Together
    from devmap_config.simulate.simulation import DeviceMismatch, MismatchedTensor, SimulatedDevice, Verdict

MOST_REPAIRS = 8
"""The most times that a plan is made anew with more blocks kept together."""


@dataclass(frozen=True)
class Rehearsal:
    """The result of dry-running plans until one runs.

    Attributes:
        plan: the plan that runs; `None` if there is none.
        verdicts: the results by the digest of each plan that was run.
        refused: a plan that does not run.
    """

    plan: Plan | None
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    refused: Plan | None = None


def rehearse(
    plan: Plan, prepared: Prepared, replan: Callable[[Repairs], Plan | None], permissions: Permissions, sink: Sink
) -> Rehearsal:
    """Dry-run a plan; if a tensor is on the wrong device, add repairs, and place anew.

    Args:
        plan: a plan that was verified.
        prepared: its profile.
        replan: makes a plan that keeps to repairs, or reports why there is none.
        permissions: whether code of the model may run, and a plan be accepted that could not be dry-run.
        sink: takes the diagnostics.

    Returns:
        The plan that runs, if there is one, with the results of all dry runs.
    """
    model, loaded = prepared.model, prepared.loaded
    verdicts: dict[str, Verdict] = {}
    repairs = NO_REPAIRS
    current: Plan | None = plan
    while current is not None:
        verdict = verdict_on(current, model, trust_remote_code=permissions.trust_remote_code)
        if verdict is None:
            _warn_without_torch(loaded, sink)
            break
        verdicts[plan_digest(current)] = verdict
        if verdict.outcome == "unsimulated":
            _report_unsimulated(verdict, loaded, sink, allow_unmeasured=permissions.allow_unmeasured)
        more = repaired(repairs, verdict, current, prepared)
        if more == repairs or len(verdicts) > MOST_REPAIRS:
            if verdict.mismatch is not None:
                _refuse(verdict.mismatch, current, prepared, sink)
            for device, missing_bytes in overfull(verdict, current, model):
                _report_overfull(device, missing_bytes, loaded, sink)
            break
        repairs = more
        current = replan(repairs)
    if repairs.together and (current is None or not sink.has_errors):
        _report_kept_together(repairs.together, prepared, (plan, current), sink)
    if repairs.kept and current is not None and not sink.has_errors:
        warn_of_kept_tensors(repairs.kept, current, loaded, sink)
    return Rehearsal(current, verdicts) if not sink.has_errors else Rehearsal(None, verdicts, refused=current)


def _refuse(mismatch: DeviceMismatch, plan: Plan, prepared: Prepared, sink: Sink) -> None:
    if mismatch.absent is not None:
        _refuse_absent(mismatch.absent, mismatch, plan, prepared, sink)
        return
    first, second = mismatch.tensors[:2]
    decisions = [(operand, _decision(operand, plan, prepared)) for operand in (first, second)]
    decided = [(operand, decision) for operand, decision in decisions if decision is not None]
    where = f"`{mismatch.running}`" if mismatch.running else "the model"
    related: tuple[Related, ...] = ()
    if decided:
        decided.sort(key=lambda pair: pair[1].rule.span)
        span = decided[-1][1].rule.span
        related = tuple(
            Related(message=f"{operand.device} comes from here", span=decision.rule.span)
            for operand, decision in decided[:-1]
            if decision.rule is not decided[-1][1].rule
        )
    else:
        span = prepared.loaded.profile.placement.strategy.span
    sink.error(
        "device-mismatch",
        f"the plan does not run: in {where}, `{mismatch.operation}` takes {_described(first)} and {_described(second)}",
        span,
        help=_mend(mismatch, plan, prepared),
        related=related,
    )


def _refuse_absent(
    absent: MismatchedTensor, mismatch: DeviceMismatch, plan: Plan, prepared: Prepared, sink: Sink
) -> None:
    name = absent.tensor or ""
    decision = prepared.resolution.decisions.get(TensorName(name))
    location = plan.locations.get(TensorName(name))
    home = "elsewhere" if location is None else str(location.stored_on)
    module = name.rpartition(".")[0]
    sink.error(
        "stranded-tensor",
        f"the plan does not run: `{mismatch.operation}` in `{mismatch.running or 'the model'}` takes `{name}`, which"
        f" nothing brings there from {home}",
        decision.rule.span if decision is not None else prepared.loaded.profile.placement.strategy.span,
        help=f"pin `{module or name}` to {plan.main_device}, where it is used: accelerate brings in what a module holds"
        " when that module is called",
    )


def _described(operand: MismatchedTensor) -> str:
    if operand.tensor is not None:
        return f"`{operand.tensor}` on {operand.device}"
    return f"what `{operand.made_by}` made on {operand.device}" if operand.made_by else f"a tensor on {operand.device}"


def _decision(operand: MismatchedTensor, plan: Plan, prepared: Prepared) -> Decision | None:
    """Return the rule that put an operand on its device: that of its module, or of the nearest module around it."""
    path = operand.tensor or operand.made_by
    while path:
        names = [name for name in prepared.graph.tensors if name == path or name.startswith(f"{path}.")]
        for name in names:
            decision = prepared.resolution.decisions.get(name)
            if decision is not None and operand.device in (decision.device, plan.main_device):
                return decision
        path = path.rpartition(".")[0]
    return None


def _mend(mismatch: DeviceMismatch, plan: Plan, prepared: Prepared) -> str:
    """Return advice on what must share a device, and which rules keep it apart."""
    involved = involved_in(mismatch, plan, prepared.graph)
    if not involved:
        return "give what it reads and what it is one device"
    if len(involved) == 1:
        return f"give all of `{involved[0]}` one device"
    patterns = _folded(involved)
    rules = dict.fromkeys(
        decision.rule
        for place in involved
        for name in tensors_of(prepared.graph, place)
        if (decision := prepared.resolution.decisions.get(name)) is not None
    )
    if len({rule.device for rule in rules}) > 1 and all(rule.origin == "pin" for rule in rules):
        pins = ", ".join(f"`{rule.text}` (line {rule.span.line}, {rule.device})" for rule in rules)
        return f"give {patterns} one device: change the pins that hold them apart, {pins}"
    return f"give {patterns} one device, or pin them by one rule with `keep_together: true`"


def _report_overfull(device: SimulatedDevice, missing_bytes: int, loaded: LoadedProfile, sink: Sink) -> None:
    sink.error(
        "over-capacity",
        f"{device.id} holds {format_bytes(device.peak_bytes)} at once in {device.peak_phase}, in"
        f" `{device.peak_module or 'the model'}`, and has {format_bytes(device.peak_bytes - missing_bytes)}:"
        f" {format_exact_bytes(missing_bytes)} are missing",
        loaded.profile.workload.context_length.span,
        help="lower `context_length` or `batch_size`, or prefill in parts (`prompt_length`)",
    )


def _report_kept_together(together: Together, prepared: Prepared, plans: tuple[Plan, Plan | None], sink: Sink) -> None:
    graph, decisions = prepared.graph, prepared.resolution.decisions
    whole, joined = _kept(together, graph)
    needs = [f"{_folded(whole)} whole"] if whole else []
    needs += [f"{_folded(blocks)} on one device" for blocks in joined]
    strategy = plans[0].strategy
    rules = dict.fromkeys(decision.rule for names in together for name in names if (decision := decisions.get(name)))
    sink.warning(
        "kept-together",
        f"the model does not run as `{strategy}` placed it{_beside(rules)}: it needs {' and '.join(needs)}"
        + _moves(*plans, graph),
        prepared.loaded.profile.placement.strategy.span,
        help="nothing needs to be done; a pin with `keep_together: true` would say the same",
        related=tuple(
            Related(message=f"what is kept together with this moves along to {rule.device}", span=rule.span)
            for rule in rules
        ),
    )


def _beside(rules: Iterable[Rule]) -> str:
    """Return a phrase about the rules that decide for a part of what is kept together."""
    named = [f"`{rule.text}` (line {rule.span.line})" for rule in rules]
    return f" beside {' and '.join(named)}" if named else ""


def _kept(together: Together, graph: ModelGraph) -> tuple[list[str], list[list[str]]]:
    """Return the blocks that are kept whole, and those that are kept on one device with others, each in the model's
    order.
    """
    whole: dict[str, None] = {}
    joined: list[dict[str, None]] = []
    for names in together:
        blocks = dict.fromkeys(block_of(graph, name) or name for name in names)
        if len(blocks) == 1:
            whole |= blocks
            continue
        touched = [group for group in joined if group.keys() & blocks.keys()]
        joined = [group for group in joined if group not in touched]
        joined.append({path: None for group in (*touched, blocks) for path in group})
    position = {path: place for place, path in enumerate((*graph.blocks, *graph.tensors))}
    in_order = [sorted(blocks, key=lambda path: position[path]) for blocks in joined]
    alone = whole.keys() - {path for blocks in joined for path in blocks}
    return [path for path in whole if path in alone], in_order


def _folded(paths: list[str]) -> str:
    return ", ".join(f"`{pattern}`" for pattern in fold_paths(paths))


def _moves(before: Plan, after: Plan | None, graph: ModelGraph) -> str:
    """Return a phrase about what has moved; empty without a plan."""
    if after is None:
        return ""
    moves: dict[tuple[str, str], list[str]] = {}
    homes = [_homes(plan, graph) for plan in (before, after)]
    for path in graph.blocks:
        old, new = (" and ".join(map(str, paths.get(path, ()))) for paths in homes)
        if old != new:
            moves.setdefault((old, new), []).append(path)
    moves_in_words = [f"{_folded(paths)} from {old} to {new}" for (old, new), paths in moves.items()]
    return f"; moved: {'; '.join(moves_in_words)}" if moves_in_words else ""


def _homes(plan: Plan, graph: ModelGraph) -> dict[str, dict[Device, None]]:
    """Return the devices that each block is stored on."""
    places = plan.locations
    return {
        path: dict.fromkeys(
            places[tensor.name].stored_on for tensor in graph.modules[path].tensors() if tensor.name in places
        )
        for path in graph.blocks
    }


def _report_unsimulated(verdict: Verdict, loaded: LoadedProfile, sink: Sink, *, allow_unmeasured: bool) -> None:
    if verdict.cause != "model":
        failure = MeasurementFailure(verdict.cause, verdict.reason or "")
        consequence = "the plan could not be dry-run"
        report_failure(failure, consequence, loaded.profile.model.source.span, sink, allowed=allow_unmeasured)
        return
    sink.warning(
        "not-simulated",
        f"the plan could not be dry-run: the model's code cannot be run without data ({verdict.reason})",
        loaded.profile.model.source.span,
        help="try it where it is to run: `devmap run`",
    )


def _warn_without_torch(loaded: LoadedProfile, sink: Sink) -> None:
    sink.warning(
        "not-simulated",
        "the plan was not dry-run: torch is not installed",
        loaded.profile.model.source.span,
        help="compile with `--vendor` where torch is installed, or pass `--no-simulate`",
    )
