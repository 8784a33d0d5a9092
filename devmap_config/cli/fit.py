"""`devmap fit`: shows on which machines a profile's model runs, how fast, and with what context."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from devmap_config.amounts import format_bytes, format_duration
from devmap_config.cli.command import CommandError, Mistakes, ProfileOptions, profile_command
from devmap_config.cli.exit_codes import ExitCode
from devmap_config.cli.machines import MACHINE_HELP, is_of_machine, machine_of
from devmap_config.cli.predictions import how_to_give, missing_in_words
from devmap_config.cli.progress import progress
from devmap_config.devices import CPU
from devmap_config.hardware.constants import PROCESS_ANONYMOUS_BYTES
from devmap_config.profile.writing import example_with_rates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.table import Table

    from devmap_config.compiler import Compiled, Request
    from devmap_config.exports.engines import OtherEngine
    from devmap_config.profile.schema import Hardware

WITHOUT_FIGURES = "fewest-devices"
"""The strategy for a machine of unknown speed, as fitting does not depend on speed."""


@dataclass(frozen=True)
class Row:
    """The result for one machine: the fastest plan and the one with the longest context, or why nothing fits.

    `other` is an engine that suits the machine better than the profile's.
    """

    machine: str
    fastest: Compiled | None = None
    longest: Compiled | None = None
    reason: str | None = None
    other: OtherEngine | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        nothing = dict.fromkeys(("strategy", "prediction", "basis", "devices", "process_memory"))
        return {
            "machine": self.machine,
            "fits": self.fastest is not None,
            "reason": self.reason,
            **(_plan_to_json(self.fastest) or nothing),
            "longest_context": _plan_to_json(self.longest),
            "other_engine": None if self.other is None else self.other.to_json(),
        }

    @property
    def plans(self) -> dict[str, Compiled]:
        """Return the plans by what they are best at; only one if neither is better."""
        plans = {"speed": self.fastest, "context": self.longest}
        known = {aim: compiled for aim, compiled in plans.items() if compiled is not None}
        speed, context = known.get("speed"), known.get("context")
        if speed is not None and context is not None and _context(speed) >= _context(context):
            return {"both": speed}
        return known


def _plan_to_json(compiled: Compiled | None) -> dict[str, Any] | None:
    if compiled is None:
        return None
    plan, memory = compiled.to_json(), compiled.process_memory
    told: dict[str, Any] = {
        key: plan[key] for key in ("strategy", "prediction", "basis", "devices", "pipeline") if key in plan
    }
    return told | {"process_memory": None if memory is None else asdict(memory)}


@profile_command("fit", "table", "json")
@click.option("--on", "machines", required=True, multiple=True, metavar="MACHINE,…", help=f"Machines: {MACHINE_HELP}.")
def fit(profile: Path, options: ProfileOptions, machines: tuple[str, ...]) -> ExitCode:
    """Show for each MACHINE whether PROFILE's model and workload fit, how fast they run, and the longest context.

    Two plans are made for each machine: the fastest (with the longest context that it has room for), and the one with
    the longest context (with its times). Times are those of the profile's workload. The profile's pins apply; its
    hardware, strategy and `max_memory` do not. If a machine's rates are unknown, so are the times, and the plan on the
    fewest devices is shown instead of the fastest. If another engine suits a machine better than the profile's, the
    output says so, with the reason.
    """
    from devmap_config.cli.reporting import print_lines

    listed = [name.strip() for text in machines for name in text.split(",") if name.strip()]
    named: dict[str, Hardware] = {}
    mistakes = Mistakes()
    for name in dict.fromkeys(listed):
        with mistakes.collected():
            named[name] = machine_of(name, allows_hosts=True)
    mistakes.raise_any()
    rows: list[Row] = []
    with progress(len(named), quiet=options.quiet) as begin:
        for name, hardware in named.items():
            begin(f"{name} ({len(rows) + 1} of {len(named)})")
            rows.append(_row(name, partial(options.request, profile, hardware=hardware, advises=False)))
    options.report([], {}, {"machines": [row.to_json() for row in rows]})
    if options.shows_tables:
        print_lines(lambda _: _table(rows))
    return ExitCode.DONE if any(row.fastest is not None for row in rows) else ExitCode.WRONG


def _row(machine: str, request: Callable[..., Request]) -> Row:
    """Return the result for a machine.

    Raises:
        CommandError: if the profile is wrong on any machine.
    """
    from devmap_config.compiler import Compiled, Rejected, run_pipeline
    from devmap_config.exports.engines import other_engine

    fit_request = request(strategy="fastest")
    fastest = run_pipeline(fit_request)
    if any(finding.code == "missing-figure" for finding in fastest.diagnostics):
        fit_request = request(strategy=WITHOUT_FIGURES)
        fastest = run_pipeline(fit_request)
    if isinstance(fastest, Rejected):
        if not is_of_machine(fastest.diagnostics):
            raise CommandError(fastest.diagnostics, fastest.texts, data={"machines": None})
        reason = "; ".join(finding.message for finding in fastest.diagnostics if finding.is_error)
        return Row(machine, reason=reason, other=other_engine(fit_request, fastest))
    longest = run_pipeline(request(strategy="longest-context"))
    return Row(
        machine, fastest, longest if isinstance(longest, Compiled) else None, other=other_engine(fit_request, fastest)
    )


def _table(rows: list[Row]) -> Iterator[Table | str]:
    from rich.table import Column

    from devmap_config.cli.tables import new_table

    machine = Column("machine", overflow="fold", min_width=14)
    table = new_table(machine, "best at", figures=("a token", "a prefill", "context"))
    for row in rows:
        if row.fastest is None:
            table.add_row(row.machine, *"––––", style="dim")
        for number, (aim, compiled) in enumerate(row.plans.items()):
            table.add_row("" if number else row.machine, aim, *_figures(compiled))
    yield table
    if any(row.fastest and row.fastest.graph.measurement is None for row in rows):
        yield "the profile names no workload: only the model's weights are counted"
    rates = {basis: None for row in rows for compiled in row.plans.values() for basis in _rates(compiled)}
    if len(rates) == 1:
        is_slower = any(_is_always_slower(compiled) for row in rows for compiled in row.plans.values())
        yield f"these times rest on {next(iter(rates))} rates{f'; {SLOWER}' if is_slower else ''}"
    if any(map(_holds_uncounted, (compiled for row in rows for compiled in row.plans.values()))):
        base = format_bytes(PROCESS_ANONYMOUS_BYTES)
        yield f"of the CPU's memory, tensors are counted: Python and the libraries hold {base} or more besides"
    for row in rows:
        if row.fastest is not None and (missing := row.fastest.missing_figures):
            how = how_to_give(missing, row.fastest.loaded.profile.hardware)
            yield f"{row.machine}: {missing_in_words(missing)}; in a YAML file with a `hardware:` block, {how}"
        yield from _passed_over(row)
        if row.reason is not None:
            yield f"{row.machine} does not fit: {row.reason}"
        for aim, compiled in row.plans.items():
            bases = [f"its times rest on {' and '.join(_rates(compiled))} rates"] if len(rates) > 1 else []
            bases += [SLOWER] if bases and _is_always_slower(compiled) else []
            if remarks := [*_remarks(compiled), *bases]:
                yield f"{row.machine}{'' if aim == 'both' else f', {aim}'}: {', '.join(remarks)}"
        if row.other is not None:
            yield f"{row.machine} suits {row.other.name} better{_by(row.other)}: {row.other.reason}"
    if any(row.other is not None and row.other.name == "vLLM" for row in rows):
        yield "no predicted time of vLLM was compared with a card"


SLOWER = "measured prefills were slower"
"""Says that every measured prefill with which predictions of this kind were compared took longer than predicted."""


def _passed_over(row: Row) -> Iterator[str]:
    """Yield the warning that the CPU might compute faster, but that its speed is unknown, with what to do."""
    fastest = row.fastest
    if fastest is not None and any(each.code == "cpu-passed-over" for each in fastest.diagnostics):
        described = example_with_rates(CPU, fastest.loaded.profile.hardware.listed[CPU], "bandwidth")
        yield (
            f"{row.machine}: that the CPU computes with the weights that it stores, which may be faster, was not"
            f" considered, as its bandwidth is not known; in a YAML file with a `hardware:` block, write (for example)"
            f" `{described}`"
        )


def _by(other: OtherEngine) -> str:
    """Return a phrase with the keys that select an engine in a profile; empty if the engine runs the profile's own
    plan.
    """
    if not other.settings:
        return ""
    placement, workload = other.settings.get("placement", {}), other.settings.get("workload", {})
    words = [f"`targets: [{other.settings['targets'][0]}]`"]
    words += [f'`groups: ["{group}"]`' for group in placement.get("groups", ())]
    words += [f"`batch_size: {size}`" for size in workload.values() if size > 1]
    return f", by {' and '.join(words)}"


def _holds_uncounted(compiled: Compiled) -> bool:
    """Return whether a plan uses the CPU's memory, but the memory of its process is unknown."""
    plan = compiled.plan
    held = any(use.id == CPU and use.free_bytes < use.capacity_bytes for use in plan.devices)
    return held and plan.pipeline is None and compiled.process_memory is None


def _rates(compiled: Compiled) -> list[str]:
    """Return the bases of the rates on which the times of a plan rest; empty if it predicts no time."""
    return list(dict.fromkeys(basis.rates for basis in compiled.time_bases.values()))


def _is_always_slower(compiled: Compiled) -> bool:
    """Return whether each measured prefill that a plan is compared with took longer than predicted."""
    basis, predicted = compiled.time_bases.get("prefill"), compiled.plan.prediction.prefill_nanoseconds
    least = None if basis is None else basis.least_nanoseconds
    return least is not None and predicted is not None and least > predicted


def _context(compiled: Compiled) -> int:
    return compiled.plan.prediction.longest_context or 0


def _figures(compiled: Compiled) -> tuple[str, str, str]:
    prediction = compiled.plan.prediction
    token, prefill = prediction.decode_nanoseconds_per_token, prediction.prefill_nanoseconds
    context = prediction.longest_context
    return (
        format_duration(token) if token is not None else "?" if compiled.graph.decodes else "–",
        format_duration(prefill) if prefill is not None else "?",
        f"{context:,}" if context is not None else "?",
    )


def _remarks(compiled: Compiled) -> Iterator[str]:
    plan, memory = compiled.plan, compiled.process_memory
    if plan.pipeline is not None:
        from devmap_config.cli.stages_view import cache_in_words

        layers = " + ".join(map(str, plan.pipeline.partition))
        yield f"{layers} layers; {cache_in_words(plan.pipeline)}"
    if memory is not None and memory.missing_bytes:
        yield f"with Python and the libraries its process is {format_bytes(memory.missing_bytes)} too large for the CPU"
    used = sum(use.weights_bytes > 0 for use in plan.devices)
    if used < len(plan.devices):
        yield f"{used} of {len(plan.devices)} devices are used"
    if plan.prediction.streamed_bytes_per_token:
        yield f"{format_bytes(plan.prediction.streamed_bytes_per_token)} {plan.streaming}"
    if plan.computed_on_cpu:
        yield "a part is computed on the CPU"
