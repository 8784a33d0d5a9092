"""`devmap diff`: shows what moved between two plans, and the effect on memory and speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from devmap_config.amounts import format_bytes, format_change, format_duration
from devmap_config.cli.command import command
from devmap_config.cli.exit_codes import ExitCode
from devmap_config.cli.options import outside_option, quiet_option, remote_code_option
from devmap_config.wording import in_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.padding import Padding
    from rich.text import Text

    from devmap_config.plan.diff import Difference, Home

ARROW = "→"


@command("diff", "table", "json", "markdown")
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@quiet_option
@outside_option
@remote_code_option
def diff(
    before: str, after: str, output_format: str, quiet: bool, allow_outside: bool, trust_remote_code: bool
) -> ExitCode:
    """Show the differences between the plans of A and B.

    Each is a lock, a profile (its lock or, if that does not hold, the plan that the profile compiles to now), or a git
    revision: the other's lock in that revision.
    """
    from devmap_config.cli.progress import stages_shown
    from devmap_config.cli.reporting import echo, print_lines, report
    from devmap_config.cli.sides import difference_of, sides_of
    from devmap_config.profile.permissions import Permissions

    permissions = Permissions(allow_outside=allow_outside, trust_remote_code=trust_remote_code)
    with stages_shown(quiet=quiet):
        sides = sides_of(before, after, permissions)
    differences = difference_of(sides)
    notes = [note for side in sides for note in side.notes]
    if output_format == "json":
        report(notes, {}, "json", data={"diff": differences.to_json()})
    else:
        report([] if quiet else notes, {}, "table")
        names = (sides[0].name, sides[1].name)
        if output_format == "table" and not quiet:
            print_lines(lambda width: table_lines(differences, *names, width))
        for line in _markdown(differences, *names) if output_format == "markdown" and not quiet else ():
            echo(line)
    return ExitCode.DONE if differences.is_none else ExitCode.STALE


def table_lines(difference: Difference, before: str, after: str, width: int) -> Iterator[str | Text | Padding]:
    """Yield the difference for a terminal of this width."""
    if difference.is_none:
        yield f"{before} and {after} are the same plan"
        return
    from devmap_config.cli.tables import aligned
    from devmap_config.plan.diff import OTHER_MODELS, rates_in_words

    yield f"{before} {ARROW} {after}"
    if difference.models_differ:
        yield OTHER_MODELS
    for rows, headings in (
        (_setting_rows(difference), ()),
        (_move_rows(difference), ()),
        (_device_rows(difference), _DEVICE_HEADINGS),
        (_figure_rows(difference), ()),
    ):
        if rows:
            yield ""
            yield from aligned(rows, width, headings=headings)
    if sentence := rates_in_words(difference.to_json()):
        yield sentence


def _markdown(difference: Difference, before: str, after: str) -> Iterator[str]:
    """Yield the difference as Markdown, for a comment on a pull request."""
    from devmap_config.cli.markdown import cell, code
    from devmap_config.plan.diff import OTHER_MODELS, rates_in_words

    if difference.is_none:
        yield f"{code(before)} and {code(after)} are the same plan."
        return
    yield f"**Placement**: {code(before)} {ARROW} {code(after)}{'' if difference.moves else ': nothing moved'}"
    if difference.models_differ:
        yield ""
        yield f"{OTHER_MODELS[0].upper()}{OTHER_MODELS[1:]}."
    moved = [_split(row) for row in _move_rows(difference)]
    for headings, rows in (
        (("plan", "before", "after"), [_split(row) for row in _setting_rows(difference)]),
        (("modules", "before", "after"), moved),
        (_DEVICE_HEADINGS, _device_rows(difference)),
        (("predicted", "before", "after", ""), [(*_split(row[:2]), row[2]) for row in _figure_rows(difference)]),
    ):
        if rows:
            yield ""
            yield f"| {' | '.join(headings)} |"
            yield f"|{'---|' * len(headings)}"
            name = code if rows is moved else cell
            for row in rows:
                yield f"| {name(row[0])} | {' | '.join(map(cell, row[1:]))} |"
    if sentence := rates_in_words(difference.to_json()):
        yield ""
        yield f"{sentence[0].upper()}{sentence[1:]}."


def _split(row: tuple[str, ...]) -> tuple[str, str, str]:
    before, _, after = row[1].partition(f" {ARROW} ")
    return row[0], before, after or before


def _setting_rows(difference: Difference) -> list[tuple[str, ...]]:
    words = {"main_device": "main device", "offload_buffers": "buffers offloaded"}
    return [
        (words.get(name, name), _arrow(change.before, change.after, in_words))
        for name, change in difference.settings.items()
    ]


def _move_rows(difference: Difference) -> list[tuple[str, ...]]:
    return [
        (module or "everything", _arrow(move.before, move.after, _home))
        for move in difference.moves
        for module in move.modules
    ]


def _home(home: Home) -> str:
    if home.runs_on is not None:
        return f"{home.device}, computed on {home.runs_on}"
    return f"{home.device}, computed there" if home.computes_there else str(home.device)


_DEVICE_HEADINGS = ("device", "capacity", "weights", "cache", "running", "free")


def _device_rows(difference: Difference) -> list[tuple[str, ...]]:
    """Return a row for each device with other contents or another capacity."""

    def size(of: Callable[[dict[str, int]], int], before: Any, after: Any) -> str:
        return _arrow(None if before is None else of(before), None if after is None else of(after), format_bytes)

    parts: tuple[Callable[[dict[str, int]], int], ...] = (
        lambda use: use["capacity_bytes"],
        lambda use: use["weights_bytes"],
        lambda use: use["kv_cache_bytes"],
        lambda use: use["activation_bytes"] + use["overhead_bytes"],
        lambda use: use["free_bytes"],
    )
    return [
        (device, *(size(part, change.before, change.after) for part in parts))
        for device, change in difference.devices.items()
        if not change.is_none
    ]


def _figure_rows(difference: Difference) -> list[tuple[str, ...]]:
    """Return a row for each figure that is known for one of the plans, with its change."""
    shown: dict[str, tuple[str, Callable[[int], str]]] = {
        "decode_nanoseconds_per_token": ("a token", format_duration),
        "bound_decode_nanoseconds_per_token": ("lower bound of a token", format_duration),
        "prefill_nanoseconds": ("a prefill", format_duration),
        "streamed_bytes_per_token": ("copied at every forward", format_bytes),
        "hops": ("hops between devices", lambda count: f"{count:,}"),
        "longest_context": ("longest context", lambda count: f"{count:,} tokens"),
    }
    rows: list[tuple[str, ...]] = []
    for name, (words, show) in shown.items():
        change = difference.figures[name]
        if change.before is None and change.after is None:
            continue
        share = "" if name == "hops" else format_change(change.before, change.after)
        rows.append((words, _arrow(change.before, change.after, show), share))
    return rows


def _arrow(before: Any, after: Any, show: Callable[[Any], str]) -> str:
    """Return `before → after`, or the value if both are equal."""
    texts = ["–" if value is None else show(value) for value in (before, after)]
    return texts[0] if before == after else f"{texts[0]} {ARROW} {texts[1]}"
