"""Resolves rules: the match nearest to a tensor wins, pins outrank `device_map`, later overrides outrank earlier
ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from devmap_config.diagnostics.diagnostic import Related
from devmap_config.rules.matching import MAX_STEPS, BeyondEnd, Match, match
from devmap_config.rules.pattern import IndexRange, PatternError
from devmap_config.rules.suggestion import nearest_to, tree_command

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.graph.model import ModelGraph, Module, TensorName
    from devmap_config.rules.rule import Rule


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision for a tensor: the device that stores it, the one that runs it, if stated, and the rule that won."""

    device: Device
    compute: Device | None
    rule: Rule


@dataclass(frozen=True)
class Resolution:
    """The rules applied to a model.

    `decisions` holds the decision for each tensor, `groups` the tensors that must share a device, each group with its
    rule, `forbidden` the devices that must not store a tensor, with the rules that forbid them, `new` the tensors that
    the checkpoint may lack, with the rules that allow it, and `matches` the matches of each rule.
    """

    decisions: Mapping[TensorName, Decision] = field(default_factory=dict)
    groups: tuple[tuple[Rule, tuple[TensorName, ...]], ...] = ()
    forbidden: Mapping[TensorName, Mapping[Device, Rule]] = field(default_factory=dict)
    new: Mapping[TensorName, Rule] = field(default_factory=dict)
    matches: tuple[tuple[Rule, Match], ...] = ()

    def compute_of(self, name: TensorName) -> Device | None:
        """Return the device that rules have the module of a tensor run on, or `None`."""
        decision = self.decisions.get(name)
        return decision.compute if decision else None


def resolve(rules: tuple[Rule, ...], graph: ModelGraph, source: str, sink: Sink) -> Resolution:
    """Apply rules to a model: match their patterns, and decide for each tensor which rule wins.

    Args:
        rules: the rules, in the order of the profile.
        graph: the module tree.
        source: the model as its user names it, for commands in messages.
        sink: takes the diagnostics of rules that match nothing, conflict or have no effect.

    Returns:
        The decision for each tensor, and the groups that stay together.
    """
    matches = _matched(rules, graph, sink)
    for rule, matched in matches:
        _check_match(rule, matched, graph, source, sink)
    decisions: dict[TensorName, Decision] = {}
    conflicting: set[int] = set()
    for origin in ("device_map", "pin"):  # pins are laid over the map
        of_origin = [(rule, matched) for rule, matched in matches if rule.origin == origin]
        decided, in_conflict = _decide(of_origin, graph, sink)
        decisions |= decided
        conflicting |= in_conflict
    tensors = {
        text: _tensors_of(matched, graph) for text, matched in {rule.text: matched for rule, matched in matches}.items()
    }
    _warn_shadowed([matched for matched in matches if id(matched[0]) not in conflicting], decisions, tensors, sink)
    new_by_text = {rule.text: rule for rule, _ in matches if rule.origin == "allow_new"}
    return Resolution(
        decisions=decisions,
        groups=tuple((rule, tensors[rule.text]) for rule, matched in matches if rule.keep_together and matched.names),
        forbidden=_forbidden(matches, tensors),
        new={name: rule for text, rule in new_by_text.items() for name in tensors[text]},
        matches=tuple(matches),
    )


def _matched(rules: tuple[Rule, ...], graph: ModelGraph, sink: Sink) -> list[tuple[Rule, Match]]:
    """Match each rule's pattern to the model, each pattern once."""
    by_text: dict[str, Match] = {}
    matches: list[tuple[Rule, Match]] = []
    steps = 0
    for rule in rules:
        try:
            if rule.text not in by_text:
                by_text[rule.text] = match(rule.pattern, graph)
                steps += by_text[rule.text].steps
            matches.append((rule, by_text[rule.text]))
        except PatternError as error:
            sink.error("bad-pattern", f"`{rule.text}` is not a pattern: {error.message}", rule.span, help=error.help)
        if steps > MAX_STEPS:
            message = f"it takes more than {MAX_STEPS:,} steps to hold the model to these rules"
            sink.error("too-large", message, rule.span, help="write fewer rules: one pattern stands for many modules")
            break
    return matches


def _check_match(rule: Rule, matched: Match, graph: ModelGraph, source: str, sink: Sink) -> None:
    if rule.optional:
        return
    if not matched.names and not matched.beyond:
        suggestion = nearest_to(rule.pattern, matched.failure, graph)
        sink.error(
            "unmatched-pattern",
            f"`{rule.text}` matches no module of {graph.class_name}",
            rule.span,
            label=suggestion.label,
            help=suggestion.help or tree_command(source, suggestion.pattern),
        )
    for start, end in matched.dead[:1]:
        sink.error(
            "unmatched-pattern",
            f"`{rule.text[start:end]}` of `{rule.text}` matches no module of {graph.class_name}",
            rule.source.span_within(start, end),
            help=f"correct it, or leave it out; {tree_command(source, '**')} shows all there is",
        )
    for beyond in matched.beyond[:1]:
        last = beyond.existing[-1]
        where = f"`{beyond.parent}`" if beyond.parent else graph.class_name
        sink.error(
            "range-beyond-end",
            f"`{rule.text}` asks for more than there is: the last index in {where} is {last}",
            rule.span,
            label=f"{len(beyond.existing)} there, {beyond.existing[0]} to {last}",
            help=f"lower the end, leave it open (`[{_first(beyond)}-]`), or write `optional: true`",
        )


def _first(beyond: BeyondEnd) -> int:
    """Return the start of the range that names indices which do not exist."""
    starts = (item.first for item in beyond.indices.items if isinstance(item, IndexRange))
    return next((first for first in starts if first <= beyond.existing[-1]), beyond.existing[0])


def _decide(
    matches: list[tuple[Rule, Match]], graph: ModelGraph, sink: Sink
) -> tuple[dict[TensorName, Decision], set[int]]:
    """Return the decisions of rules of one origin, and the ids of rules that conflict."""
    at: dict[str, list[Decision]] = {}
    for rule, matched in matches:
        if (device := rule.device or rule.compute) is not None:
            decision = Decision(device, rule.compute, rule)
            for name in matched.names:
                at.setdefault(name, []).append(decision)
    reported: set[tuple[int, int]] = set()
    decisions: dict[TensorName, Decision] = {}

    def settled(name: str, inherited: Decision | None) -> Decision | None:
        decision: Decision | None = None
        for own in at.get(name, ()):
            if decision is None or own.rule.override:
                decision = own
            elif (merged := _merged(decision, own)) is not None:
                decision = merged
            elif (pair := (id(decision.rule), id(own.rule))) not in reported:
                reported.add(pair)
                _report_conflict(name, decision, own, sink)
        return decision or inherited

    def visit(module: Module, inherited: Decision | None) -> None:
        here = settled(module.path, inherited)
        for tensor in module.own_tensors:
            if (decision := settled(tensor.name, here)) is not None:
                decisions[tensor.name] = decision
        for child in module.children:
            visit(child, here)

    visit(graph.root, None)
    return decisions, {rule for pair in reported for rule in pair}


def _merged(first: Decision, second: Decision) -> Decision | None:
    """Return both decisions combined, or `None` if they contradict each other."""
    both_compute = None not in (first.compute, second.compute)
    if first.device != second.device or (both_compute and first.compute != second.compute):
        return None
    return Decision(first.device, first.compute or second.compute, first.rule if first.compute else second.rule)


def _report_conflict(name: str, first: Decision, second: Decision, sink: Sink) -> None:
    what = f"`{name}`" if name else "the whole model"
    sink.error(
        "conflicting-pins",
        f"two rules give {what} different devices: {_decision_in_words(first)} and {_decision_in_words(second)}",
        second.rule.span,
        label=f"{_decision_in_words(second)} here",
        help="remove one, or write `override: true` in the later one",
        related=(Related(message=f"{_decision_in_words(first)} here", span=first.rule.span),),
    )


def _decision_in_words(decision: Decision) -> str:
    if decision.compute is None or decision.compute == decision.device:
        return str(decision.device)
    return f"{decision.device} computed on {decision.compute}"


def _warn_shadowed(
    matches: list[tuple[Rule, Match]],
    decisions: Mapping[TensorName, Decision],
    tensors: Mapping[str, tuple[TensorName, ...]],
    sink: Sink,
) -> None:
    winners = {id(decision.rule) for decision in decisions.values()}
    for rule, matched in matches:
        says_more = rule.not_on or rule.keep_together or (rule.device is None and rule.compute is None)
        if id(rule) in winners or says_more or not matched.names:
            continue
        if not tensors[rule.text]:
            sink.warning(
                "shadowed-pin",
                f"`{rule.text}` matches only modules that hold no weights",
                rule.span,
                help="remove the rule",
            )
            continue
        over = decisions[tensors[rule.text][0]].rule
        if over.device == rule.device and over.compute == rule.compute and not over.override:
            message = f"`{rule.text}` says only what `{over.text}` says already"
        else:
            message = f"`{rule.text}` never wins: `{over.text}` decides for all that it matches"
        sink.warning(
            "shadowed-pin",
            message,
            rule.span,
            help="remove the rule, or name something deeper",
            related=(Related(message="this one wins", span=over.span),),
        )


def _tensors_of(matched: Match, graph: ModelGraph) -> tuple[TensorName, ...]:
    names: dict[TensorName, None] = {}
    for name in matched.names:
        if name in graph.modules:
            names |= dict.fromkeys(tensor.name for tensor in graph.modules[name].tensors())  # type: ignore[index]
        else:
            names[name] = None  # type: ignore[index]
    return tuple(names)


def _forbidden(
    matches: list[tuple[Rule, Match]], tensors: Mapping[str, tuple[TensorName, ...]]
) -> dict[TensorName, dict[Device, Rule]]:
    forbidden: dict[TensorName, dict[Device, Rule]] = {}
    for rule, _ in matches:
        if rule.not_on:
            for name in tensors[rule.text]:
                for device in rule.not_on:
                    forbidden.setdefault(name, {})[device] = rule
    return forbidden
