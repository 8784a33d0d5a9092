"""Options that several commands share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from devmap_config.wording import is_unicode, visible_lines

Function = Callable[..., Any]
Decorator = Callable[[Function], Function]


def _variables(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    variables: dict[str, str] = {}
    wrong: list[str] = []
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name.isidentifier():
            wrong.append(f"`{value}` is not of the form NAME=VALUE")
        elif not is_unicode(text):
            wrong.append(f"the value of `{name}` is not UTF-8")
        else:
            variables[name] = text
    if wrong:
        raise click.BadParameter("; ".join(wrong), context, parameter)
    return variables


FILE = click.Path(path_type=Path)

profile_argument: Decorator = click.argument("profile", type=FILE)
set_option: Decorator = click.option(
    "--set",
    "variables",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_variables,
    help="Set a variable of the profile's templates.",
)
quiet_option: Decorator = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")


def _log_everything(_context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    """Print debug logs on stderr: why something could not be run without data, with tracebacks."""
    if value:
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter("%(name)s: %(message)s"))
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        logging.getLogger("devmap_config").setLevel(logging.DEBUG)


class _Formatter(logging.Formatter):
    """Formats log records with escapes."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record."""
        return visible_lines(super().format(record))


verbose_option: Decorator = click.option(
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_log_everything,
    help="Log each stage as it begins, and the traceback if a model cannot be run without data.",
)
outside_option: Decorator = click.option(
    "--allow-outside", is_flag=True, help="Allow paths in the profile that lead out of its repository."
)
remote_code_option: Decorator = click.option(
    "--trust-remote-code", is_flag=True, help="Allow Python code that comes with the model to run."
)
unmeasured_option: Decorator = click.option(
    "--allow-unmeasured",
    is_flag=True,
    help="Estimate costs by formulas if a library has changed so that the model cannot be measured.",
)
class_option: Decorator = click.option(
    "--class", "class_name", help="The model's class. [default: the first that its config names]"
)
dtype_option: Decorator = click.option(
    "--dtype",
    type=click.Choice(("bfloat16", "float16", "float32", "float64")),
    help="The dtype to load in. [default: the checkpoint's]",
)
dry_run_option: Decorator = click.option("--dry-run", is_flag=True, help="Write nothing.")
output_option: Decorator = click.option(
    "-o", "--output", type=FILE, help="Write the profile to this file. [default: stdout]"
)
force_option: Decorator = click.option("--force", is_flag=True, help="Overwrite existing files.")


def format_option(*formats: str) -> Decorator:
    """Return the option `--format`; the first of its choices is the default."""
    return click.option(
        "--format",
        "output_format",
        type=click.Choice(formats),
        default=formats[0],
        show_default=True,
        help="The format of the output.",
    )
