"""`devmap check`: whether locks still are what their profiles ask for; writes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from devmap_config.cli.options import (
    PROFILE,
    format_option,
    outside_option,
    quiet_option,
    remote_code_option,
    set_option,
    unmeasured_option,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from devmap_config.cli.checking import Checked

EXIT_CODES = {"wrong": 1, "absent": 2, "stale": 3, "missing": 3, "damaged": 3, "fresh": 0}
"""By state, the graver first: the first that occurs is the command's."""

WORDS = {
    "wrong": ("profile is wrong", "profiles are wrong"),
    "absent": ("profile is not there", "profiles are not there"),
    "stale": ("lock is stale", "locks are stale"),
    "missing": ("lock is missing", "locks are missing"),
    "damaged": ("lock cannot be read", "locks cannot be read"),
    "fresh": ("lock up to date", "locks up to date"),
}


@click.command("check")
@click.argument("profiles", metavar="PROFILE…", type=PROFILE, nargs=-1, required=True)
@format_option("table", "json", "sarif", "github")
@click.option(
    "--prove", "proves", is_flag=True, help="Place anew: is each plan what its strategy makes, its bound proven?"
)
@set_option
@quiet_option
@outside_option
@remote_code_option
@unmeasured_option
def check(
    profiles: tuple[Path, ...],
    output_format: str,
    proves: bool,
    variables: dict[str, str],
    quiet: bool,
    allow_outside: bool,
    trust_remote_code: bool,
    allow_unmeasured: bool,
) -> int:
    """Check that each PROFILE has a lock, and that it still is what the profile asks for.

    A folder stands for all profiles in it and below. What a lock says is derived again and compared; only the bound
    of `fastest` is taken as it was compiled, unless `--prove` is given.
    """
    from devmap_config.cli.checking import CheckRequest, check_all
    from devmap_config.cli.profiles import profiles_named
    from devmap_config.cli.reporting import report

    named = profiles_named(profiles)
    if not named:
        raise click.UsageError(f"there is no profile in {' or '.join(f'`{profile}`' for profile in profiles)}")
    request = CheckRequest(
        variables=variables,
        allow_outside=allow_outside,
        trust_remote_code=trust_remote_code,
        allow_unmeasured=allow_unmeasured,
        proves=proves,
    )
    results = check_all(named, request)
    texts = {name: text for checked in results for name, text in checked.texts.items()}
    found = (diagnostic for checked in results for diagnostic in checked.diagnostics)
    report(
        dict.fromkeys(found),  # what is said of the installed libraries is the same for every profile
        texts,
        output_format,
        quiet=quiet,
        data=_data(results),
    )
    if output_format == "table" and not quiet:
        click.echo(_summary(results))
    states = {checked.state for checked in results}
    return next(code for state, code in EXIT_CODES.items() if state in states)


def _data(results: Sequence[Checked]) -> dict[str, object]:
    plans = {str(checked.profile): checked.plan for checked in results}
    states = {str(checked.profile): checked.state for checked in results}
    one = {"plan": next(iter(plans.values()))} if len(plans) == 1 else {"plan": None, "plans": plans}
    return {**one, "states": states}


def _summary(results: Sequence[Checked]) -> str:
    """What became of the profiles, in one line: `12 locks up to date, 1 lock is stale`."""
    states = [checked.state for checked in results]
    counted = ((states.count(state), WORDS[state]) for state in reversed(EXIT_CODES) if state in states)
    return ", ".join(f"{count} {words[0] if count == 1 else words[1]}" for count, words in counted)
