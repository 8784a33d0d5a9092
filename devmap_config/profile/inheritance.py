"""Reads a profile with every file that it extends."""

from __future__ import annotations

import itertools
import os.path
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from devmap_config.diagnostics.diagnostic import Sink, Span
from devmap_config.files import PROFILE, FileError, decoded, read_bytes, require_regular
from devmap_config.profile.document import MappingNode, ScalarNode, SequenceNode, is_null, parse_document, whole_file
from devmap_config.profile.field_types import unsupported_version

if TYPE_CHECKING:
    from devmap_config.diagnostics.codes import ErrorCode
    from devmap_config.files import Boundary

MAX_FILES = 100

RENAME = (
    "leave out `.j2`: templates stand in values and in names, and where a loop wrote devices, a range such as"
    ' `"cuda:[0-{{ count - 1 }}]"` names them'
)
"""Advice on a file that is a template as a whole."""


@dataclass
class ProfileReader:
    """Reads the files of one profile: each only once, none in a cycle, none outside of the repository.

    `is_incomplete` says that some files could not be read, so keys that seem to be missing may stand there.
    """

    boundary: Boundary
    sink: Sink
    files_named: int = 0
    is_incomplete: bool = False

    def read(self, shown: str, trail: tuple[Path, ...] = ()) -> list[MappingNode]:
        """Return the documents of a file and of those it extends, in the order in which they are merged."""
        path = Path(shown)
        text = self.text_of(path, shown)
        document = None if text is None else parse_document(text, shown, self.sink)
        if document is None:
            self.is_incomplete = True
            return []
        if trail:
            self.check_version(document)
        bases = [self.read_base(base, path, (*trail, path.resolve())) for base in base_files(document)]
        self.is_incomplete |= not all(bases)
        return [*itertools.chain.from_iterable(bases), document]

    def check_version(self, document: MappingNode) -> None:
        """Check that a base file has no version, or the one that is supported."""
        version = document.get("version")
        if isinstance(version, ScalarNode) and not is_null(version) and version.text != "1":
            message, help = unsupported_version(version.text)
            self.sink.error("unsupported-version", message, version.span, help=help)

    def read_base(self, base: ScalarNode, extending: Path, trail: tuple[Path, ...]) -> list[MappingNode]:
        """Return the documents of a file that another extends, or report why it must not be read."""
        self.files_named += 1
        path = Path(os.path.normpath(extending.parent / base.text))
        if problem := self.problem_of(base.text, path, trail):
            code, message, help = problem
            self.sink.error(code, message, base.span, help=help)
            return []
        self.sink.origins.setdefault(path.as_posix(), base.span)
        return self.read(path.as_posix(), trail)

    def problem_of(self, base: str, path: Path, trail: tuple[Path, ...]) -> tuple[ErrorCode, str, str] | None:
        """Return why a file must not be read, as code, message and help; `None` if it may be."""
        if self.files_named > MAX_FILES:
            return "too-large", f"the profile extends more than {MAX_FILES} files", "extend fewer files"
        if not self.boundary.holds(path):
            help = "keep what a profile extends within its repository, or pass `--allow-outside`"
            return "outside-repository", f"`{base}` lies outside of the repository", help
        try:
            require_regular(path)
        except FileError as error:
            moved_to = _moved_to(path) if error.is_absent else ""
            help = f"paths are relative to the file that writes them: `{path.as_posix()}` was looked for{moved_to}"
            return error.code, f"`{base}` {error}", help if error.is_absent else error.help
        if path.resolve() in trail:
            names = [*(step.name for step in trail[trail.index(path.resolve()) :]), path.name]
            message = f"the profile extends itself: {' → '.join(names)}"
            return "extends-cycle", message, "remove one of these `extends`"
        return None

    def text_of(self, path: Path, shown: str) -> str | None:
        """Return the text of a file, and remember it for diagnostics."""
        try:
            data = read_bytes(path, PROFILE, self.boundary)
            self.sink.texts[shown] = data.decode("utf-8", errors="replace")
            if path.suffix != ".j2":
                return decoded(data)
            message = f"`{shown}` is a template of a whole file, and those are not read"
            self.sink.error("template-error", message, whole_file(shown), help=RENAME)
        except FileError as error:
            is_there = error.code != "missing-file"
            place = Span.within_line(shown, error.line, error.column) if is_there else None
            self.sink.error(error.code, f"`{shown}` {error}", place, help=error.help)
        return None


def base_files(document: MappingNode) -> tuple[ScalarNode, ...]:
    """Return the files that `extends` names; the schema reports entries that are not text."""
    extends = document.get("extends")
    nodes = extends.items if isinstance(extends, SequenceNode) else (extends,)
    return tuple(node for node in nodes if isinstance(node, ScalarNode) and not is_null(node))


def _moved_to(path: Path) -> str:
    """Return a hint at a nearby file of the same name."""
    folder = path.parent if path.parent.is_dir() else path.parent.parent
    if not folder.is_dir():
        return ""
    matches = sorted(candidate for candidate in (*folder.glob(path.name), *folder.glob(f"*/{path.name}")))
    return f"; a file of that name is at `{matches[0]}`" if matches else ""
