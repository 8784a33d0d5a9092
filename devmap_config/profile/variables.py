"""Converts Python values for a profile's variables to the text that `--set` takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devmap_config.diagnostics.diagnostic import DevmapError, Diagnostic

if TYPE_CHECKING:
    from collections.abc import Mapping


class VariableNameError(DevmapError, TypeError):
    """The name of a variable is not text."""

    def __init__(self, name: object) -> None:
        message, help = f"the names of variables are text, and {name!r} is none", f'write it as text: "{name}"'
        finding = Diagnostic.error("unknown-variable", message, help=help)
        super().__init__(f"{message}: {help}", (finding,))


def texts_of(variables: Mapping[str, object] | None) -> dict[str, str]:
    """Return the values of variables as `--set` would give them.

    >>> texts_of({"context": 8192, "cards": "2"})
    {'context': '8192', 'cards': '2'}

    Raises:
        VariableNameError: if a name is not text.
    """
    for name in variables or {}:
        if not isinstance(name, str):
            raise VariableNameError(name)
    return {name: str(value) for name, value in (variables or {}).items()}
