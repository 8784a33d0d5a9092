"""`Diagnostic`: the type with which every stage reports what is wrong, where, and what to do next."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict

from devmap_config.wording import shortened, visible, visible_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from typing_extensions import Unpack

    from devmap_config.diagnostics.codes import Code, ErrorCode, Severity, WarningCode


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Span:
    """A stretch of a source file. Lines and columns count from 1, in characters; the end is exclusive.

    >>> Span.within_line("x.yaml", 8, 18, length=4).end_column
    22
    """

    file: str
    line: int
    column: int
    end_line: int
    end_column: int

    @classmethod
    def within_line(cls, file: str, line: int, column: int, length: int = 1) -> Span:
        """Return the span of `length` characters of a line."""
        return cls(file=file, line=line, column=column, end_line=line, end_column=column + length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Related:
    """A second place in a file that belongs to a diagnostic."""

    message: str
    span: Span

    def __post_init__(self) -> None:
        _make_visible(self, "message")


class Details(TypedDict, total=False):
    """The optional parts of a diagnostic: the label beside the marked text, the advice, and further places."""

    label: str | None
    help: str | None
    related: tuple[Related, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostic:
    """One finding: an error or a warning. Invisible characters in its texts are escaped.

    Attributes:
        code: a stable code, which has a page under `docs/codes/`.
        severity: an error stops a command.
        message: one terse lower-case sentence.
        span: the place.
        label: the text beside the marked place.
        help: what to do next.
        related: further places.
    """

    code: Code
    severity: Severity
    message: str
    span: Span | None = None
    label: str | None = None
    help: str | None = None
    related: tuple[Related, ...] = ()

    def __post_init__(self) -> None:
        _make_visible(self, "message", "label", "help")

    @classmethod
    def error(cls, code: ErrorCode, message: str, span: Span | None = None, **details: Unpack[Details]) -> Diagnostic:
        """Return a finding that stops a command."""
        return cls(code=code, severity="error", message=message, span=span, **details)

    @classmethod
    def warning(
        cls, code: WarningCode, message: str, span: Span | None = None, **details: Unpack[Details]
    ) -> Diagnostic:
        """Return a finding that does not stop a command."""
        return cls(code=code, severity="warning", message=message, span=span, **details)

    @property
    def is_error(self) -> bool:
        """True if the finding stops a command."""
        return self.severity == "error"


MAX_ERRORS = 1000
"""The number of errors after which checking stops."""


def _make_visible(finding: Diagnostic | Related, *names: str) -> None:
    """Shorten and escape untrusted names and texts in the texts of a finding."""
    for name in names:
        if (text := getattr(finding, name)) is not None:
            object.__setattr__(finding, name, visible(shortened(text)))


class Sink:
    """Collects the diagnostics of one run, so that all of them are shown at once, up to `MAX_ERRORS`.

    Attributes:
        origins: for a file that another extends, the place that names it, to which findings in that file also point.
        texts: the files that were read, by the names under which they are shown.
    """

    def __init__(self) -> None:
        self._diagnostics: dict[Diagnostic, None] = {}
        self._error_count = 0
        self.origins: dict[str, Span] = {}
        self.texts: dict[str, str] = {}

    def error(self, code: ErrorCode, message: str, span: Span | None = None, **details: Unpack[Details]) -> None:
        """Record a finding that stops the compilation."""
        self.report(Diagnostic.error(code, message, span, **details))

    def warning(self, code: WarningCode, message: str, span: Span | None = None, **details: Unpack[Details]) -> None:
        """Record a finding that does not stop the compilation."""
        self.report(Diagnostic.warning(code, message, span, **details))

    def report(self, diagnostic: Diagnostic) -> None:
        """Record a finding, unless an equal one is recorded. A place that is in no file is dropped.

        Raises:
            TooManyErrorsError: after `MAX_ERRORS` errors.
        """
        if diagnostic.span is not None and not diagnostic.span.file:
            diagnostic = replace(diagnostic, span=None)
        if diagnostic.span is not None and (origin := self.origins.get(diagnostic.span.file)):
            came_in = Related(message="extended from here", span=origin)
            if came_in not in diagnostic.related:
                diagnostic = replace(diagnostic, related=(*diagnostic.related, came_in))
        if diagnostic not in self._diagnostics:
            self._error_count += diagnostic.is_error
            if self._error_count > MAX_ERRORS:
                raise TooManyErrorsError(self)
            self._diagnostics[diagnostic] = None

    def report_all(self, diagnostics: Iterable[Diagnostic]) -> None:
        """Record several findings."""
        for diagnostic in diagnostics:
            self.report(diagnostic)

    @property
    def has_errors(self) -> bool:
        """True if any error was recorded."""
        return self._error_count > 0

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """All findings, sorted by file and place; those without a place come last."""
        return tuple(sorted(self._diagnostics, key=_place))

    def __iter__(self) -> Iterator[Diagnostic]:
        return iter(self.diagnostics)


def _place(diagnostic: Diagnostic) -> tuple[object, ...]:
    span = diagnostic.span
    if span is None:
        return (1, "", 0, 0, diagnostic.code)
    return (0, span.file, span.line, span.column, diagnostic.code)


class DevmapError(Exception):
    """The base of all errors that users see.

    Attributes:
        diagnostics: the findings that explain it, if there are any.
        texts: the files that they point into, by the names under which they are shown.
    """

    def __init__(
        self, message: str, diagnostics: tuple[Diagnostic, ...] = (), texts: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(visible_lines(message))
        self.diagnostics = diagnostics
        self.texts = dict(texts or {})


class DevmapWarning(UserWarning):
    """A warning about a model that is loaded; its text ends with the diagnostic's code."""


class ProfileError(DevmapError):
    """A profile is wrong or cannot be satisfied.

    Attributes:
        diagnostics: what is wrong, where, and what to do next.
        texts: the files that they point into, by the names under which they are shown.
    """

    def __init__(self, diagnostics: tuple[Diagnostic, ...], texts: Mapping[str, str] | None = None) -> None:
        errors = [diagnostic for diagnostic in diagnostics if diagnostic.is_error]
        super().__init__("\n".join(map(_one_line, errors)), diagnostics, texts)


class TooManyErrorsError(ProfileError):
    """There are more than `MAX_ERRORS` errors; `diagnostics` holds these, and one that says so."""

    def __init__(self, sink: Sink) -> None:
        more = Diagnostic.error(
            "too-large",
            f"there are more than {MAX_ERRORS:,} errors",
            help="correct these first; then the others are reported",
        )
        super().__init__((*sink.diagnostics, more), sink.texts)


def _one_line(diagnostic: Diagnostic) -> str:
    span = diagnostic.span
    place = f"{visible(span.file)}:{span.line}:{span.column}: " if span else ""
    advice = f" ({diagnostic.help})" if diagnostic.help else ""
    return f"{place}{diagnostic.severity}[{diagnostic.code}]: {diagnostic.message}{advice}"
