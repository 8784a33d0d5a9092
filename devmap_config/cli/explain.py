"""`devmap explain`: explains a diagnostic's code, a plan, or why a module is on its device."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from devmap_config.amounts import counted, format_bytes, format_duration
from devmap_config.cli.command import ProfileOptions, profile_command
from devmap_config.cli.reporting import echo_lines
from devmap_config.files import exists
from devmap_config.wording import closest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from devmap_config.compiler import Compiled
    from devmap_config.execution.segments import Phase
    from devmap_config.graph.costs import Measurement
    from devmap_config.graph.model import ModelGraph
    from devmap_config.plan.explanation import Alternative
    from devmap_config.plan.plan import DeviceUse, Plan, Prediction
    from devmap_config.rules.resolution import Resolution
    from devmap_config.rules.rule import Rule


@profile_command("explain", "table", "json", argument=click.argument("subject", metavar="CODE | PROFILE"))
@click.argument("module", required=False)
@click.option(
    "--caches",
    "compares_caches",
    is_flag=True,
    help="Compare the cache on the device with an offloaded one, by length of context.",
)
def explain(subject: str, options: ProfileOptions, module: str | None, compares_caches: bool) -> None:
    """Explain a diagnostic CODE, the plan of PROFILE, or the place of MODULE in that plan."""
    from devmap_config.cli.locking import lock_warnings
    from devmap_config.diagnostics.codes import CODES, page
    from devmap_config.plan.lock import LOCK_SUFFIX, PROFILE_SUFFIXES, profile_of

    if subject.endswith((*PROFILE_SUFFIXES, LOCK_SUFFIX)) or (subject not in CODES and exists(Path(subject))):
        profile = profile_of(Path(subject))
        compiled = options.compile(profile, simulates=True)
        warnings = lock_warnings(profile, compiled, options)
        compiled = replace(compiled, diagnostics=(*compiled.diagnostics, *warnings))
        if options.shows_tables:
            options.report(warnings, {}, {})
        if compares_caches:
            compiled.plan.require_transformers()
            _compare_caches(compiled, profile, options)
        else:
            _explain_plan(compiled, module, options)
    elif subject not in CODES:
        message = f"there is no diagnostic `{subject}`, and no profile of that name"
        raise click.UsageError(message + _suggestion(subject, CODES))
    elif module is not None:
        raise click.UsageError("a module is explained in a profile: `devmap explain PROFILE MODULE`")
    elif options.output_format == "json":
        options.report((), {}, {"plan": None, "code": subject, "page": page(subject)})
    else:
        _print_page(subject)


def _compare_caches(compiled: Compiled, profile: Path, options: ProfileOptions) -> None:
    """Print the time of a token by context, with the cache on the model's devices and offloaded."""
    from devmap_config.cli.caches import cache_comparison_in_words, compared_caches, comparison_table
    from devmap_config.cli.reporting import print_lines

    comparisons = compared_caches(compiled, profile, options)
    data = {
        "caches": [comparison.to_json() for comparison in comparisons],
        "explanation": list(cache_comparison_in_words(comparisons)),
    }
    options.report(compiled.diagnostics, compiled.texts, {"plan": compiled.to_json(), **data})
    if options.shows_tables:
        print_lines(lambda _: comparison_table(comparisons))


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = closest(name, known)
    return f"; did you mean `{close}`?" if close else ""


def _print_page(code: str) -> None:
    import sys

    from devmap_config.diagnostics.codes import page

    if sys.stdout.isatty():
        from rich.markdown import Markdown

        from devmap_config.cli.console import EscapingConsole

        EscapingConsole().print(Markdown(page(code)))
    else:
        echo_lines(page(code))


def _explain_plan(compiled: Compiled, module: str | None, options: ProfileOptions) -> None:
    """Print the explanation of a plan, after a picture of its devices, or that of a module."""
    from pydantic_core import to_jsonable_python

    from devmap_config.cli.plan_table import bar_lines
    from devmap_config.cli.reporting import print_lines
    from devmap_config.plan.runs import runs_of

    graph = compiled.graph
    if module is not None and module not in graph.modules and module not in graph.tensors:
        raise click.UsageError(
            f"{graph.class_name} has no `{module}`{_suggestion(module, [*graph.modules, *graph.tensors])}"
        )
    lines = list(story(compiled) if module is None else _reasons(compiled, module))
    if options.output_format == "json":
        has_none = module is None or compiled.plan.pipeline is not None
        others = () if has_none else alternatives_of(compiled, str(module))
        data = {"module": module, "explanation": lines, "alternatives": to_jsonable_python(others, fallback=str)}
        data |= {"runs": [run.to_json() for run in runs_of(compiled.plan, graph)], "waits": waits(compiled)}
        options.report(compiled.diagnostics, compiled.texts, {"plan": compiled.to_json(), **data})
    elif not options.quiet:
        if module is None:
            print_lines(lambda width: (lines[0], *bar_lines(compiled.plan, width), *lines[1:]))
        else:
            print_lines(lambda _: lines)


def story(compiled: Compiled) -> Iterator[str]:
    """Yield an explanation of the plan in about ten lines."""
    from devmap_config.cli.companions import companion_lines
    from devmap_config.cli.plan_table import memory_in_words, weights_in_words
    from devmap_config.cli.predictions import bases_in_words, how_to_give, missing_in_words, no_plan

    plan, model, graph = compiled.plan, compiled.model, compiled.graph
    if plan.pipeline is not None:
        from devmap_config.cli.stages_view import pipeline_story

        yield from pipeline_story(compiled, plan.pipeline)
        return
    cache = f" and {format_bytes(graph.measurement.cache_bytes)} of cache" if graph.measurement else ""
    yield f"{model.class_name}, weights of {weights_in_words(model, plan)}{cache}, by `{plan.strategy}`."
    for use in plan.devices:
        yield _holdings(plan, use)
    decisions = compiled.resolution.decisions.values()
    if pinned := len({id(decision.rule) for decision in decisions}):
        decide = "decides" if pinned == 1 else "decide"
        yield f"{counted(pinned, 'rule')} {decide} for {counted(len(decisions), 'tensor')}."
    for group in graph.tied_groups[:2]:
        yield f"{' and '.join(group)} are one tensor, and move together."
    if (memory := compiled.process_memory) is not None:
        yield f"The {memory_in_words(memory)}."
    yield from _pace(plan)
    yield from _predictions(plan.prediction, graph, no_plan(compiled))
    if bases := compiled.time_bases:
        sentence = bases_in_words(bases, plan.prediction)
        yield f"{sentence[0].upper()}{sentence[1:]}."
    if missing := compiled.missing_figures:
        sentence = missing_in_words(missing)
        yield f"{sentence[0].upper()}{sentence[1:]}: {how_to_give(missing, compiled.loaded.profile.hardware)}."
    if plan.prediction.longest_context is not None and graph.measurement is not None:
        yield _room_for_context(plan.prediction.longest_context, graph.measurement)
    yield from (f"{sentence[0].upper()}{sentence[1:]}." for sentence in companion_lines(compiled))
    yield from _waits(compiled)
    yield from _preference(plan)


def _holdings(plan: Plan, use: DeviceUse) -> str:
    from devmap_config.rules.folding import fold_paths

    units = [
        assignment.unit or "everything" for assignment in plan.assignments if assignment.location.stored_on == use.id
    ]
    if not units:
        return f"{use.id} stays empty."
    used_bytes = use.capacity_bytes - use.free_bytes
    return (
        f"{use.id} holds {', '.join(fold_paths(units))}:"
        f" {format_bytes(used_bytes)} of {format_bytes(use.capacity_bytes)} used, {format_bytes(use.free_bytes)} free."
    )


def _predictions(prediction: Prediction, graph: ModelGraph, other: str) -> Iterator[str]:
    """Yield sentences about the plan's predicted times."""
    decode, bound = prediction.decode_nanoseconds_per_token, prediction.bound_decode_nanoseconds_per_token
    if decode is not None and bound is not None:
        gap = 100 * (decode - bound) / decode
        token, least = format_duration(decode), format_duration(bound)
        yield f"A token takes {token}; {other} can take less than {least}, {_percent(gap)} less."
    elif decode is not None:
        token = format_duration(decode)
        yield f"A token takes {token}; whether another plan is faster, `strategy: fastest` would tell."
    elif not graph.decodes and prediction.prefill_nanoseconds is not None:
        prefill = format_duration(prediction.prefill_nanoseconds)
        yield f"A prefill takes {prefill}; the model does not decode token by token."


def _waits(compiled: Compiled) -> Iterator[str]:
    """Yield a sentence for each phase: the time that it would take if its slowest resource were twice as fast."""
    for phase, savings in waits(compiled).items():
        times = [f"{saving['what']} ({format_duration(saving['nanoseconds'])})" for saving in savings]
        if times:
            what = "token" if phase == "decode" else phase
            yield f"A {what} waits for {' and '.join(times)}: in brackets, its time if that were twice as fast."


def waits(compiled: Compiled) -> dict[Phase, list[dict[str, Any]]]:
    """Return, for each phase with a predicted time, what would shorten it, as plain data.

    Args:
        compiled: the plan, with its model and machine.

    Returns:
        By phase, its time if one resource of the machine were twice as fast, with the largest saving first.
    """
    from devmap_config.plan.explanation import savings
    from devmap_config.plan.plan import OWN

    plan, graph, inventory = compiled.plan, compiled.graph, compiled.inventory
    if plan.pipeline is not None:  # its times are those of its stages
        return {}
    predicted: tuple[Phase, ...] = tuple(phase for phase in OWN if getattr(plan.prediction, OWN[phase]) is not None)
    return {phase: [asdict(saving) for saving in savings(plan, graph, inventory, phase)] for phase in predicted}


def _room_for_context(longest: int, measurement: Measurement) -> str:
    """Return a sentence about the longest context, and what limits it."""
    positions, before = measurement.positions, measurement.workload.context_length
    if longest < before:
        return f"The model was trained for {counted(longest, 'token')}, fewer than requested."
    if longest == positions.end:
        end = "the model's positions end"
    else:
        end = "the model was not trained for more" if longest == positions.trained else "a device is full"
    if longest == before:
        return f"The context cannot grow beyond {counted(before, 'token')}: {end}."
    return f"The context may grow from {before:,} to {counted(longest, 'token')} before {end}."


def _percent(share: float) -> str:
    return f"{share:.1f} %" if round(share, 1) else "under 0.1 %"


def _preference(plan: Plan) -> Iterator[str]:
    """Yield sentences about the fastest plan, and the wish for which this one was preferred to it."""
    from devmap_config.plan.comparison import deciding_wish
    from devmap_config.plan.plan import FASTEST, OWN

    for phase, name in FASTEST.items():
        own, fastest = getattr(plan.prediction, OWN[phase]), getattr(plan.prediction, name)
        if fastest is not None:
            share = f"{_percent(100 * abs(own - fastest) / own)} {'less' if fastest <= own else 'more'}"
            what = "token" if phase == "decode" else phase
            yield f"The fastest plan that was found takes {format_duration(fastest)} a {what}, {share}."
    if (wish := deciding_wish(plan)) is not None:
        yield f"This one was preferred because {wish}."


def _pace(plan: Plan) -> Iterator[str]:
    """Yield sentences about transfers, streamed weights, modules that compute elsewhere, and caches on the CPU."""
    from devmap_config.cli.plan_table import caches_in_words
    from devmap_config.rules.folding import fold_paths

    if plan.prediction.hops:
        yield f"Activations change devices {counted(plan.prediction.hops, 'time')} in a forward."
    if plan.prediction.streamed_bytes_per_token:
        streamed = format_bytes(plan.prediction.streamed_bytes_per_token)
        yield f"{streamed} of weights {plan.streaming}."
    if plan.streams_buffers:
        yield "Buffers are offloaded too: plain `from_pretrained` needs `offload_buffers=True`."
    if plan.computed_on_cpu:
        yield f"{', '.join(fold_paths(plan.computed_on_cpu))} compute on the CPU, where they are stored."
    yield from (f"{sentence}." for sentence in plan.prefilling)
    if plan.offloaded_caches is not None:
        yield f"{caches_in_words(plan)}."


def _reasons(compiled: Compiled, name: str) -> Iterator[str]:
    """Yield the reasons why a module or tensor is on its device, and the costs of other places."""
    plan, graph = compiled.plan, compiled.graph
    if plan.pipeline is not None:
        yield from why(compiled, name)
        return
    below = [
        assignment
        for assignment in plan.assignments
        if assignment.unit == name or assignment.unit.startswith(f"{name}.")
    ]
    around = [
        assignment for assignment in plan.assignments if not assignment.unit or name.startswith(f"{assignment.unit}.")
    ]
    for assignment in below or around:
        runs = "" if assignment.location.is_one_device else f", and runs on {assignment.location.runs_on}"
        yield f"`{assignment.unit or 'the whole model'}` is on {assignment.location.stored_on}{runs}."
    yield from _place_of_cache(compiled, name)
    *before, last = why(compiled, name)
    yield from before
    if _rules_about(compiled.resolution, name, graph):
        yield last
        return
    yield f"{last} Elsewhere, with all else unchanged:"
    others = alternatives_of(compiled, name)
    for other in others:
        yield f"- {_alternative(other, 'a token' if graph.decodes else 'a prefill')}"
    if rates := dict.fromkeys(other.rates for other in others if other.rates is not None):
        yield f"These times rest on {' and '.join(rates)} rates."


def _place_of_cache(compiled: Compiled, name: str) -> Iterator[str]:
    """Yield the place of the cache of a module's block, and the cost of its other place, if the plan decides it."""
    from devmap_config.plan.explanation import block_of, modules_with_either_cache, other_cache

    plan, graph, block = compiled.plan, compiled.graph, block_of(compiled.graph, name)
    modules = modules_with_either_cache(plan, graph, block)
    offloaded = [module for module in modules if module in (plan.offloaded_caches or ())]
    if offloaded and len(offloaded) < len(modules):
        resident = [module for module in modules if module not in offloaded]
        yield f"The cache of {_folded(offloaded)} is on the CPU while {_it_or_they(offloaded, 'does', 'do')} not run."
        yield f"The cache of {_folded(resident)} is on the device on which {_it_or_they(resident, 'runs', 'run')}."
        return
    other = other_cache(plan, graph, compiled.inventory, block)
    if other is None:
        return
    on_cpu, on_device = "on the CPU while it does not run", "on the device on which it runs"
    where, elsewhere = (on_cpu, on_device) if offloaded else (on_device, on_cpu)
    costs = _costs(other, "a token" if graph.decodes else "a prefill")
    yield f"The cache of `{block}` is {where}. If it were {elsewhere}, with all else unchanged: {costs}."


def _it_or_they(modules: list[str], singular: str, plural: str) -> str:
    return f"it {singular}" if len(modules) == 1 else f"they {plural}"


def _folded(modules: list[str]) -> str:
    from devmap_config.rules.folding import fold_paths

    return ", ".join(f"`{pattern}`" for pattern in fold_paths(modules))


def why(compiled: Compiled, name: str) -> Iterator[str]:
    """Yield what decided the device of a module or tensor: rules, or the strategy."""
    from devmap_config.plan.explanation import block_of, placed_with

    plan, rules = compiled.plan, _rules_about(compiled.resolution, name, compiled.graph)
    if plan.pipeline is not None:
        from devmap_config.cli.stages_view import module_in_words

        yield from module_in_words(compiled, plan.pipeline, name)
        yield from rules or [f"No rule matches it: `{plan.strategy}` cut the layers this way."]
        return
    yield from rules
    if rules:
        return
    block, placed = block_of(compiled.graph, name), placed_with(plan, compiled.graph, name)
    if block != name and placed == block:
        yield f"It is a part of the block `{block}`, which is placed as a whole."
    elif block != name:
        yield f"It is a part of the block `{block}`, whose parts are on different devices in this plan."
    yield f"No rule matches it: `{compiled.plan.strategy}` put it there."


def alternatives_of(compiled: Compiled, name: str) -> tuple[Alternative, ...]:
    """Return the cost of every other place for the block of a module or tensor, or for its part of a split block."""
    from devmap_config.plan.explanation import alternatives, placed_with

    placed = placed_with(compiled.plan, compiled.graph, name)
    return alternatives(compiled.plan, compiled.graph, compiled.inventory, placed)


def _rules_about(resolution: Resolution, name: str, graph: ModelGraph) -> list[str]:
    """Return the rules that match, with the winning one first."""
    from devmap_config.graph.model import ModulePath, TensorName

    module = graph.modules.get(ModulePath(name))
    tensors = [TensorName(name)] if module is None else [tensor.name for tensor in module.tensors()]
    winning = list(
        dict.fromkeys(resolution.decisions[tensor].rule for tensor in tensors if tensor in resolution.decisions)
    )
    lines = [f"{_at(rule)} decides: it puts it on {rule.device}." for rule in winning if rule.device]
    for rule, match in resolution.matches:
        matched = [
            path for path in match.names if name == path or name.startswith(f"{path}.") or path.startswith(f"{name}.")
        ]
        if matched and rule not in winning and rule.origin != "allow_new":
            if rule.not_on:
                lines.append(f"{_at(rule)} keeps it off {' and '.join(map(str, rule.not_on))}.")
            elif rule.keep_together:
                lines.append(f"{_at(rule)} keeps its matches together.")
            else:
                lines.append(f"{_at(rule)} matches as well, but a deeper match or a pin outranks it.")
    return lines


def _at(rule: Rule) -> str:
    return f"`{rule.text}` ({rule.span.file}:{rule.span.line})"


def _alternative(other: Alternative, what: str) -> str:
    from devmap_config.execution.assignment import ON_CPU

    if other.location == ON_CPU:
        where = "stored and computed on the CPU"
    elif not other.location.is_one_device:
        where = f"on {other.location.stored_on}, copied to {other.location.runs_on} at every forward"
    else:
        where = f"on {other.location.stored_on}"
    return f"{where}: {_costs(other, what)}"


def _costs(other: Alternative, what: str) -> str:
    """Return how much slower an alternative is, and the memory that it lacks."""
    slower = other.slower_nanoseconds
    missing = f", without {' and '.join(other.missing)}" if other.missing else ""
    pace = f"how long {what} would take is not known{missing}"
    if slower is not None:
        pace = f"{what} would take {format_duration(abs(slower))} {'more' if slower >= 0 else 'less'}"
    blocked = (
        f"; {format_bytes(other.missing_bytes)} are missing on {other.full_device}"
        if other.full_device
        else "; it would fit"
    )
    return f"{pace}{blocked}"
