"""The catalogue of accelerators: `accelerators.csv`, read into frozen, exact figures.

The columns of the file have their units in their names; an empty figure is unknown. Bandwidths and flops come from data
sheets (`source`). `memory_bytes` is what the card reports (`memory_source`), or, if no report is known, a lower bound:
98 % of the nominal 10^9 bytes, or three quarters of them if the memory is shared with the host. `unverified` names the
columns that nobody measured. The memory that a device needs for its context and workspaces (`overhead_bytes`, `slack`)
and the efficiencies are chosen within published ranges (`overhead_source`, `efficiency_source`).
"""

from __future__ import annotations

import csv
import difflib
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from devmap_config.amounts import GIBIBYTE
from devmap_config.files import ANYWHERE, PACKAGED, read_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One entry of the catalogue; `kind` is torch's device type, which is `cuda` for AMD's cards, too."""

    name: str
    kind: str
    nominal_memory_gigabytes: int
    memory_bytes: int
    memory_source: str
    memory_bandwidth_bytes_per_second: int
    dense_bf16_flops_per_second: int
    host_link_bytes_per_second: int | None
    peer_link_bytes_per_second: int | None
    supports_bf16: bool
    supports_fp8: bool
    overhead_bytes: int
    slack: Fraction
    overhead_source: str
    memory_efficiency: Fraction
    compute_efficiency: Fraction
    link_efficiency: Fraction
    efficiency_source: str
    source: str
    unverified: tuple[str, ...]
    note: str

    @property
    def most_memory_bytes(self) -> int:
        """The most memory that such a card has: what it reports, or its nominal size in GiB if that is unverified."""
        if "memory_bytes" in self.unverified:
            return self.nominal_memory_gigabytes * GIBIBYTE
        return self.memory_bytes


@cache
def load_catalogue() -> Mapping[str, Accelerator]:
    """Return every accelerator of the package's catalogue by its name, in the order of the file."""
    return MappingProxyType({row["name"]: _accelerator(row) for row in catalogue_rows()})


def nearest(name: str, catalogue: Mapping[str, Accelerator] | None = None) -> str | None:
    """Return the name in the catalogue that `name` was most likely meant to be, or `None` if none is near.

    The beginning of several names (`h100`) counts as near to the first of them in the file (`h100-sxm`).

    >>> nearest("RTX4090"), nearest("h100")
    ('rtx-4090', 'h100-sxm')
    """
    names = list(load_catalogue() if catalogue is None else catalogue)
    spelling = _spelling(name)
    if not spelling:
        return None
    spellings = {_spelling(known): known for known in reversed(names)}
    if spelling in spellings:
        return spellings[spelling]
    beginning = [known for known in names if _spelling(known).startswith(spelling)]
    if beginning:
        return beginning[0]
    close = difflib.get_close_matches(spelling, spellings, n=1, cutoff=0.6)
    return spellings[close[0]] if close else None


def _spelling(name: str) -> str:
    """Return a name without the parts that people spell differently: case, separators, the maker."""
    letters = "".join(character for character in name.lower() if character.isalnum())
    return letters.removeprefix("nvidia").removeprefix("amd").removeprefix("geforce")


READERS: Mapping[str, Callable[[str], object]] = {
    "str": str,
    "int": int,
    "int | None": lambda figure: int(figure) if figure else None,
    "bool": lambda word: word == "yes",
    "Fraction": Fraction,
    "tuple[str, ...]": lambda words: tuple(words.split()),
}
"""The functions that read a column, by the type of its field."""


def _accelerator(row: Mapping[str, str]) -> Accelerator:
    figures: dict[str, Any] = {
        column.name: READERS[str(column.type)](row[column.name]) for column in fields(Accelerator)
    }
    return Accelerator(**figures)


def catalogue_rows(table: str = "accelerators.csv") -> tuple[dict[str, str], ...]:
    """Return the rows of the catalogue, or of another table beside it, in the order of the file."""
    text = read_text(Path(__file__).with_name(table), PACKAGED, ANYWHERE)
    return tuple(csv.DictReader(text.splitlines()))
