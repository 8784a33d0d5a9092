"""`Private`: a private part of a library, and the error if it has changed. Imports no library."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from operator import attrgetter
from typing import Any


class LibraryChangedError(Exception):
    """A library has changed since this package was tested with it: `what` names the part, and says how."""

    def __init__(self, library: str, what: str) -> None:
        self.library = library
        self.what = what
        super().__init__(what)


@dataclass(frozen=True)
class Private:
    """A private part of a library.

    Attributes:
        name: its full name, such as `torch.nn.Module._buffers`.
        use: what depends on it.
        takes: the names of the parameters that are passed by keyword.
    """

    name: str
    use: str
    takes: tuple[str, ...] = ()

    @cached_property
    def library(self) -> str:
        """The library's name."""
        return self.name.partition(".")[0]

    @property
    def attribute(self) -> str:
        """Its name as an attribute of its owner."""
        return self.name.rpartition(".")[2]

    def find(self) -> Any:
        """Return the object: a class, a function or a value of a module or of a class.

        Raises:
            LibraryChangedError: if it does not exist, or lacks a parameter.
            ModuleNotFoundError: if the library is not installed.
        """
        try:
            value = self._within(import_module(self.library))
        except (AttributeError, ImportError):  # an inner module that has not been imported yet
            value = self._imported()
        if self.takes:
            self._check_parameters(value)
        return value

    @cached_property
    def _within(self) -> attrgetter[Any]:
        return attrgetter(self.name.partition(".")[2])

    def _imported(self) -> Any:
        value = import_module(self.library)
        path = self.library
        for part in self.name.split(".")[1:]:
            path = f"{path}.{part}"
            try:
                value = getattr(value, part) if hasattr(value, part) else import_module(path)
            except ImportError as error:
                raise self.changed() from error
        return value

    def of(self, owner: Any) -> Any:
        """Return the value of this attribute for an instance.

        Raises:
            LibraryChangedError: if it has none.
        """
        try:
            return getattr(owner, self.attribute)
        except AttributeError as error:
            raise self.changed() from error

    def changed(self, how: str = "is not there") -> LibraryChangedError:
        """Return the error to raise if it has changed."""
        return LibraryChangedError(self.library, f"`{self.name}` {how}")

    def _check_parameters(self, value: Any) -> None:
        parameters = inspect.signature(value).parameters
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return
        if missing := [name for name in self.takes if name not in parameters]:
            raise self.changed(f"takes no {', '.join(f'`{name}`' for name in missing)}")
