"""`devmap tree`: shows a model's module tree, and the matches of a pattern."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from devmap_config.cli.command import CommandError, command
from devmap_config.cli.exit_codes import ExitCode
from devmap_config.cli.options import class_option, dtype_option, remote_code_option, unmeasured_option
from devmap_config.cli.progress import stages_shown
from devmap_config.files import exists

if TYPE_CHECKING:
    from devmap_config.graph.model import ModelGraph
    from devmap_config.rules.matching import Match


DEFAULT_CONTEXT_LENGTH = 4096


@command("tree", "table", "json")
@click.argument("source")
@click.option("--match", "pattern", help="Show only what this pattern matches, marked, and the modules around it.")
@click.option(
    "--measure", "is_measured", is_flag=True, help="Show the weights, cache, activations and operations of every block."
)
@click.option(
    "--context",
    "context_length",
    type=click.IntRange(min=1),
    help=f"The context, in tokens, for `--measure`. [default: the profile's, else {DEFAULT_CONTEXT_LENGTH}]",
)
@click.option("--depth", type=click.IntRange(min=1), help="The number of levels to show.")
@class_option
@dtype_option
@click.option("--revision", help="A branch, tag or commit on the hub.")
@remote_code_option
@unmeasured_option
def tree(
    source: str,
    pattern: str | None,
    is_measured: bool,
    context_length: int | None,
    depth: int | None,
    class_name: str | None,
    dtype: str | None,
    revision: str | None,
    output_format: str,
    trust_remote_code: bool,
    allow_unmeasured: bool,
) -> ExitCode:
    """Show the module tree of SOURCE (a hub id, a directory, a config.json or a profile) with classes and bytes."""
    from devmap_config.cli.reporting import echo, print_json, print_lines
    from devmap_config.cli.tree_view import tree_lines, tree_to_json

    if context_length is not None and not is_measured:
        raise click.UsageError("`--context` says what `--measure` measures: give both")
    if is_measured and pattern is not None:
        raise click.UsageError("`--measure` shows every block: leave `--match` out")
    context = (context_length or -1) if is_measured else None
    with stages_shown():
        graph = graph_of_source(source, class_name, dtype, revision, trust_remote_code, context)
    if is_measured:
        _show_measured(graph, output_format, allow_unmeasured=allow_unmeasured)
        return ExitCode.DONE
    match = None if pattern is None else _matched(pattern, graph)
    names = None if match is None else match.names
    if output_format == "json":
        print_json({"class": graph.class_name, "size_bytes": graph.size_bytes, **tree_to_json(graph, names)})
    else:
        print_lines(lambda _: tree_lines(graph, names, depth), soft_wrap=True)
    if match is None or (match.names and not match.beyond):
        return ExitCode.DONE
    echo(_shortcoming(pattern or "", match, graph), err=True)
    return ExitCode.WRONG


def _matched(pattern: str, graph: ModelGraph) -> Match:
    from devmap_config.rules.matching import match
    from devmap_config.rules.pattern import PatternError, parse_pattern

    try:
        return match(parse_pattern(pattern), graph)
    except PatternError as error:
        marks = " " * error.start + "^" * max(error.end - error.start, 1)
        raise click.UsageError(f"no pattern: {error.message}\n  {pattern}\n  {marks} {error.help or ''}") from None


def _shortcoming(pattern: str, match: Match, graph: ModelGraph) -> str:
    """Return why a pattern is wrong for this model: it names too much, or nothing that exists."""
    from devmap_config.rules.pattern import parse_pattern
    from devmap_config.rules.suggestion import nearest_to

    if match.beyond:
        parent, last = match.beyond[0].parent, match.beyond[0].existing[-1]
        return f"`{pattern}` asks for more than there is: the last index in `{parent}` is {last}"
    label = nearest_to(parse_pattern(pattern), match.failure, graph).label
    return f"`{pattern}` matches nothing of {graph.class_name}" + (f"; {label}" if label else "")


def _show_measured(graph: ModelGraph, output_format: str, *, allow_unmeasured: bool) -> None:
    from devmap_config.cli.measure_view import measured_lines, measured_to_json
    from devmap_config.cli.reporting import print_json, print_lines
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.graph.findings import report_positions, report_unmeasured

    if graph.measurement is None:
        raise AssertionError("a graph that was to be measured")
    sink = Sink()
    report_positions(graph.measurement, None, sink)
    report_unmeasured(graph.measurement, None, sink, allowed=allow_unmeasured)
    if sink.has_errors:
        raise CommandError(sink, data={"modules": None})
    if output_format == "json":
        print_json({"class": graph.class_name, **measured_to_json(graph, graph.measurement)})
    else:
        print_lines(partial(measured_lines, graph, graph.measurement))


def graph_of_source(
    source: str,
    class_name: str | None,
    dtype: str | None,
    revision: str | None,
    trust_remote_code: bool,
    context_length: int | None = None,
) -> ModelGraph:
    """Return the graph of a source that a user names on the command line.

    With a `context_length`, it is measured; a value below 1 stands for the profile's, or the default.
    """
    from devmap_config.graph.checkpoint import CheckpointError
    from devmap_config.graph.costs import WorkloadShape
    from devmap_config.graph.introspection import UnbuildableModelError, UntrustedCodeError
    from devmap_config.graph.loading import GraphInputs, graph_from_source
    from devmap_config.graph.remote_code import READ_IT_FIRST
    from devmap_config.graph.source import ModelNotFoundError, hub_source, local_source
    from devmap_config.plan.lock import LOCK_SUFFIX, PROFILE_SUFFIXES, profile_of
    from devmap_config.quantization.arguments import QuantizationError
    from devmap_config.quantization.registry import effective_quantization

    path = Path(source)
    if path.name.endswith((*PROFILE_SUFFIXES, LOCK_SUFFIX)):
        return _graph_of_profile(profile_of(path), trust_remote_code, context_length)
    workload = None
    if context_length is not None:
        length = context_length if context_length > 0 else DEFAULT_CONTEXT_LENGTH
        workload = WorkloadShape(batch_size=1, context_length=length, prompt_length=length)
    try:
        model_source = local_source(path) if exists(path) else hub_source(source, revision)
        name = class_name or model_source.class_name
        if name is None:
            raise click.UsageError("the config does not name the model's class: give `--class AutoModel`")
        return graph_from_source(
            GraphInputs(
                source=model_source,
                class_name=name,
                dtype=model_source.dtype_for(dtype or "auto"),
                workload=workload,
                quantization=effective_quantization(None, model_source.config),
                trust_remote_code=trust_remote_code,
            )
        )
    except (ModelNotFoundError, CheckpointError) as error:
        raise click.UsageError(f"{error}; {error.help}" if error.help else str(error)) from None
    except UntrustedCodeError as error:
        raise click.ClickException(f"{error}; {READ_IT_FIRST}") from None
    except (UnbuildableModelError, QuantizationError) as error:
        raise click.ClickException(f"transformers cannot build this model: {error}") from None


def _graph_of_profile(path: Path, trust_remote_code: bool, context_length: int | None) -> ModelGraph:
    from dataclasses import replace

    from devmap_config.compiler import Request
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.graph.loading import load_model_graph
    from devmap_config.profile.loading import load_profile
    from devmap_config.profile.permissions import Permissions

    sink, request = Sink(), Request.for_profile(path, permissions=Permissions(trust_remote_code=trust_remote_code))
    loaded = load_profile(path, sink, remembered=request.remembered)
    if loaded is not None and context_length is not None:
        workload = loaded.profile.workload
        if context_length > 0 or workload.context_length.value is None:
            length = context_length if context_length > 0 else DEFAULT_CONTEXT_LENGTH
            workload = workload.changed(context_length=length, prompt_length=None)
            loaded = replace(loaded, profile=loaded.profile.changed(workload=workload))
    model = None
    if loaded is not None:
        model = load_model_graph(loaded, request.lookup, sink)
    if model is None:
        raise CommandError(sink, sink.texts, data={"modules": None})
    return model.graph
