"""`devmap check`: checks that locks still match their profiles; nothing is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from devmap_config.cli.command import ProfileOptions, profile_command
from devmap_config.cli.exit_codes import ExitCode
from devmap_config.cli.options import FILE
from devmap_config.cli.reporting import echo

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from devmap_config.cli.checking import Checked, State

EXIT_CODES: dict[State, ExitCode] = {
    "wrong": ExitCode.WRONG,
    "absent": ExitCode.USAGE,
    "stale": ExitCode.STALE,
    "missing": ExitCode.STALE,
    "damaged": ExitCode.STALE,
    "fresh": ExitCode.DONE,
}
"""The exit codes by state, the most serious first; the first state that occurs decides."""

WORDS = {
    "wrong": ("profile is wrong", "profiles are wrong"),
    "absent": ("profile is not there", "profiles are not there"),
    "stale": ("lock is stale", "locks are stale"),
    "missing": ("lock is missing", "locks are missing"),
    "damaged": ("lock cannot be read", "locks cannot be read"),
    "fresh": ("lock up to date", "locks up to date"),
}


PROFILES = click.argument("profiles", metavar="PROFILE…", type=FILE, nargs=-1, required=True)


@profile_command("check", "table", "json", "sarif", "github", argument=PROFILES)
@click.option(
    "--prove",
    "proves",
    is_flag=True,
    help="Place anew, to check that each plan is the one its strategy makes, and prove its bound.",
)
def check(profiles: tuple[Path, ...], options: ProfileOptions, proves: bool) -> ExitCode:
    """Check that each PROFILE has a lock that still matches it.

    A folder stands for all profiles in it and below it. Everything in a lock is derived again and compared, except the
    bound of `fastest`, which is proved again only with `--prove`.
    """
    from devmap_config.cli.checking import check_all
    from devmap_config.cli.profiles import profiles_named

    named = profiles_named(profiles)
    if not named:
        raise click.UsageError(f"there is no profile in {' or '.join(f'`{profile}`' for profile in profiles)}")
    results = check_all(named, options, proves=proves)
    texts = {name: text for checked in results for name, text in checked.texts.items()}
    # The warnings about installed libraries are the same for every profile.
    findings = dict.fromkeys(diagnostic for checked in results for diagnostic in checked.diagnostics)
    options.report(findings, texts, _data(results))
    if options.shows_tables:
        echo(_summary(results))
    states = {checked.state for checked in results}
    return next(code for state, code in EXIT_CODES.items() if state in states)


def _data(results: Sequence[Checked]) -> dict[str, object]:
    plans = {str(checked.profile): checked.plan for checked in results}
    states = {str(checked.profile): checked.state for checked in results}
    one = {"plan": next(iter(plans.values()))} if len(plans) == 1 else {"plan": None, "plans": plans}
    return {**one, "states": states}


def _summary(results: Sequence[Checked]) -> str:
    """Return the outcomes of all profiles in one line: `12 locks up to date, 1 lock is stale`."""
    states = [checked.state for checked in results]
    counted = ((states.count(state), WORDS[state]) for state in reversed(EXIT_CODES) if state in states)
    return ", ".join(f"{count} {words[0] if count == 1 else words[1]}" for count, words in counted)
