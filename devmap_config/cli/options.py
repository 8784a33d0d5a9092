"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]

PROFILE = click.Path(path_type=Path)


def profile_argument(command: Command) -> Command:
    """PROFILE; its lock may be named instead."""
    return click.argument("profile", type=PROFILE, callback=_profile)(command)


def _profile(context: click.Context, parameter: click.Parameter, path: Path) -> Path:
    del context, parameter
    from devmap_config.plan.lock import profile_of

    return profile_of(path)


def format_option(*formats: str) -> Callable[[Command], Command]:
    """`--format`; the first is the default."""
    return click.option(
        "--format",
        "output_format",
        type=click.Choice(formats),
        default=formats[0],
        show_default=True,
        help="What to print.",
    )


def set_option(command: Command) -> Command:
    """`--set name=value`."""
    return click.option(
        "--set", "variables", multiple=True, metavar="NAME=VALUE", callback=_variables, help="Give a variable a value."
    )(command)


def quiet_option(command: Command) -> Command:
    """`-q`."""
    return click.option("-q", "--quiet", is_flag=True, help="Print errors only.")(command)


def dtype_option(command: Command) -> Command:
    """`--dtype`."""
    choices = click.Choice(("bfloat16", "float16", "float32", "float64"))
    return click.option("--dtype", type=choices, help="The dtype it is loaded in, if not the checkpoint's.")(command)


def outside_option(command: Command) -> Command:
    """`--allow-outside`."""
    return click.option("--allow-outside", is_flag=True, help="Let paths of the profile lead out of its repository.")(
        command
    )


def remote_code_option(command: Command) -> Command:
    """`--trust-remote-code`."""
    return click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")(command)


def unmeasured_option(command: Command) -> Command:
    """`--allow-unmeasured`."""
    return click.option(
        "--allow-unmeasured",
        is_flag=True,
        help="Let formulas stand in where a library that changed keeps the model from being measured.",
    )(command)


def _variables(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    variables: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"`{value}` is not of the form NAME=VALUE", context, parameter)
        variables[name] = text
    return variables
