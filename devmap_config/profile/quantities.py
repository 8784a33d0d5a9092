"""Quantities with units: bytes, shares of a memory, rates; exact, without a guess."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from devmap_config.wording import closest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from typing_extensions import Self

BYTE_UNITS = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}

_DECIMAL_UNITS = ("B", "kB", "MB", "GB", "TB")

FLOP_UNITS = {"GFLOP/s": 10**9, "TFLOP/s": 10**12, "PFLOP/s": 10**15}

TIME_UNITS = {
    "ns": Fraction(1, 10**9),
    "us": Fraction(1, 10**6),
    "µs": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
}

Basis = Literal["stated", "measured", "calibrated"]
"""The origin of a rate: a data sheet, a default or a user; a measurement on this machine; runs of models on it."""

BASES: tuple[Basis, ...] = ("stated", "measured", "calibrated")
"""From the weakest to the strongest."""


class KnownRate(int):
    """A rate, or the time of one operation, with its basis: stated, measured or calibrated.

    >>> KnownRate(25_000_000_000, "measured").basis, basis_of(25_000_000_000)
    ('measured', 'stated')
    """

    basis: Basis

    def __new__(cls, amount: int, basis: Basis = "stated") -> Self:
        """Return an amount with its basis."""
        rate = super().__new__(cls, amount)
        rate.basis = basis
        return rate


def basis_of(rate: int) -> Basis:
    """Return the basis of a rate; a bare number counts as stated."""
    return rate.basis if isinstance(rate, KnownRate) else "stated"


def weakest(rates: Iterable[int | None]) -> Basis:
    """Return the weakest basis of the rates that are not `None`.

    >>> weakest((None, KnownRate(9, "calibrated"), KnownRate(5, "measured")))
    'measured'
    """
    return min((basis_of(rate) for rate in rates if rate is not None), key=BASES.index, default="stated")


_NUMBER_AND_UNIT = re.compile(r"(?P<number>[0-9]{1,18}(?:\.[0-9]{1,18})?) ?(?P<unit>[^0-9\s.,]\S*)?")


class QuantityError(ValueError):
    """A text is not a quantity of the required kind; `help` says what to write."""

    def __init__(self, message: str, help: str) -> None:
        super().__init__(message)
        self.message = message
        self.help = help


@dataclass(frozen=True, slots=True)
class Share:
    """A part of the device's memory."""

    fraction: Fraction


ASKED_OF_THE_MACHINE = ("auto", "max", "all", "free", "available")
"""Values by which other tools use whatever memory they find."""


def parse_bytes(text: str) -> int | Share:
    """Parse an amount of memory: `20GiB`, `512MB`, whole bytes, or a share such as `90%`.

    >>> parse_bytes("20GiB"), parse_bytes("512MB"), parse_bytes("4096")
    (21474836480, 512000000, 4096)

    Raises:
        QuantityError: if it is not one.
    """
    if text.lower() in ASKED_OF_THE_MACHINE:
        help = "write how much there is, such as `24GiB` (`devmap probe` tells), or name the card instead"
        raise QuantityError(f"`{text}` is not a quantity: a plan asks nothing of this machine", help)
    number, unit = _split(text, "write bytes as `20GiB`, `512MB`, a whole number, or a share such as `90%`")
    if unit == "%":
        return Share(_share(text, number))
    return _bytes(text, number, unit)


def parse_share(text: str) -> Fraction:
    """Parse a share: `5%` or `0.05`.

    >>> parse_share("5%")
    Fraction(1, 20)

    Raises:
        QuantityError: if it is not one, or is not between 0 and 1.
    """
    number, unit = _split(text, "write a share as `5%` or `0.05`")
    if unit == "%":
        return _share(text, number)
    if unit or number > 1:
        help = f"write `{text}%`" if not unit and number <= 100 else "write a share as `5%` or `0.05`"
        raise QuantityError(f"`{text}` is not a share", help)
    return number


def parse_efficiency(text: str) -> Fraction:
    """Parse a share that is greater than zero.

    >>> parse_efficiency("80%")
    Fraction(4, 5)

    Raises:
        QuantityError: if it is not one.
    """
    share = parse_share(text)
    if not share:
        raise QuantityError(
            f"`{text}` is not an efficiency: nothing would ever be done", "write what is reached, as `80%`"
        )
    return share


def parse_bandwidth(text: str) -> int:
    """Parse a bandwidth in bytes a second: `25GB/s`, or a plain number.

    >>> parse_bandwidth("25GB/s")
    25000000000

    Raises:
        QuantityError: if it is not one.
    """
    example = "write a bandwidth as `25GB/s`, or in bytes a second"
    number, unit = _rate(text, example)
    if unit is None:
        return _whole(text, number, example)
    if unit == "/s":
        raise QuantityError(f"`{text}` names no unit of bytes", f"units are {_names(BYTE_UNITS)}")
    if not unit.endswith("/s") or unit.removesuffix("/s") not in BYTE_UNITS:
        raise _not_a_bandwidth(text, number, unit)
    return _bytes(text, number, unit.removesuffix("/s"))


def parse_flops(text: str) -> int:
    """Parse a rate in floating-point operations a second: `165TFLOP/s`, or a plain number.

    >>> parse_flops("165TFLOP/s")
    165000000000000

    Raises:
        QuantityError: if it is not one.
    """
    example = "write compute as `165TFLOP/s`, or in operations a second"
    number, unit = _rate(text, example)
    if unit is None:
        return _whole(text, number, example)
    if unit not in FLOP_UNITS:
        close = next((known for known in FLOP_UNITS if known[:5] == unit.upper()[:5]), None)
        help = f"write `{text.removesuffix(unit).strip()}{close}`" if close else f"units are {_names(FLOP_UNITS)}"
        raise QuantityError(f"`{unit}` is not a unit of compute", help)
    return _whole(text, number * FLOP_UNITS[unit], example)


def parse_nanoseconds(text: str) -> int:
    """Parse a latency into nanoseconds: `10us`.

    >>> parse_nanoseconds("10us")
    10000

    Raises:
        QuantityError: if it is not one.
    """
    example = "write a latency as `10us`"
    number, unit = _split(text, example)
    if unit not in TIME_UNITS:
        raise QuantityError(f"`{text}` has no unit of time", f"{example}; units are {_names(TIME_UNITS)}")
    return _whole(text, number * TIME_UNITS[unit] * 10**9, example)


def parse_per_second(text: str) -> int:
    """Parse a number of events a second: `6000/s`, or a plain number.

    >>> parse_per_second("6000/s")
    6000

    Raises:
        QuantityError: if it is not one.
    """
    example = "write how many in a second, as `6000/s`"
    number, unit = _rate(text, example)
    if unit not in (None, "/s"):
        raise QuantityError(f"`{unit}` is not a unit of what is counted", example)
    return _whole(text, number, example)


def known_rate(parse: Callable[[str], int]) -> Callable[[str], KnownRate]:
    """Return a parser for a rate that may be followed by its basis: `25GB/s measured`.

    >>> known_rate(parse_bandwidth)("25GB/s measured").basis
    'measured'
    """

    def read(text: str) -> KnownRate:
        amount, _, word = text.rpartition(" ")
        close = closest(word, BASES[1:]) if amount else None
        if close is None:
            return KnownRate(parse(text))
        if word != close:
            raise QuantityError(f"`{word}` does not say how a rate is known", f"write `{amount} {close}`")
        return KnownRate(parse(amount), BASES[BASES.index(word)])

    return read


@dataclass(frozen=True, slots=True)
class Spread:
    """The least and the most time that runs took, in percent of the predicted time."""

    least_percent: int
    most_percent: int

    def __str__(self) -> str:
        """Return the range as a profile writes it."""
        return f"{self.least_percent}-{self.most_percent}%"


def parse_spread(text: str) -> Spread:
    """Parse the least and the most, in percent of the predicted time, that runs took: `94-108%`.

    >>> parse_spread("94-108%")
    Spread(least_percent=94, most_percent=108)

    Raises:
        QuantityError: if it is not one.
    """
    match = re.fullmatch(r"([0-9]{1,6})-([0-9]{1,6})%", text)
    if match is None or not 0 < int(match[1]) <= int(match[2]):
        raise QuantityError(f"`{text}` is not a spread", "write the least and the most, as `94-108%`")
    return Spread(int(match[1]), int(match[2]))


def _split(text: str, example: str) -> tuple[Fraction, str | None]:
    if text.startswith("-"):
        raise QuantityError(f"`{text}` is negative", example)
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is None:
        raise QuantityError(f"`{text}` is not a quantity", example)
    return Fraction(match["number"]), match["unit"]


def _rate(text: str, example: str) -> tuple[Fraction, str | None]:
    number, unit = _split(text, example)
    if not number:
        raise QuantityError(f"`{text}` is not a rate: nothing would ever be done", f"{example}, or leave it out")
    return number, unit


_WRITTEN_OTHERWISE = re.compile(
    r"(?P<prefix>[kmgt]i?)?(?P<counted>bits?|b)?(?P<time>/s|/sec|/second|ps)?", re.IGNORECASE | re.ASCII
)
"""A unit of bytes or bits, in any spelling, and a unit of time: `Gb/s`, `gbit/s`, `GBps`, `G`."""


def _not_a_bandwidth(text: str, number: Fraction, unit: str) -> QuantityError:
    """Return the error for a unit that is not one of bandwidth, with a bandwidth to write instead.

    A lower-case `b` is a bit, as in `Gb/s` and `gbps`; in `gb/s` it may be either.
    """
    match = _WRITTEN_OTHERWISE.fullmatch(unit)
    if match is None:
        units = ", ".join(f"`{known}/s`" for known in BYTE_UNITS)
        return QuantityError(f"`{unit}` is not a unit of bandwidth", f"units are {units}")
    prefix, counted, time = match["prefix"] or "", match["counted"] or "", match["time"] or ""
    amount, known = text.removesuffix(unit).strip(), _byte_unit(prefix)
    in_bytes = f"`{amount}{known}/s`"
    if not counted:
        binary, decimal = _byte_unit(f"{prefix[:1]}i"), _byte_unit(prefix[:1])
        choice = in_bytes if prefix.endswith(("i", "I")) else f"`{amount}{binary}/s` or `{amount}{decimal}/s`"
        return QuantityError(f"`{unit}` is not a unit of bandwidth", f"write {choice}")
    if counted == "B":
        missing = f"`{text}` is not a bandwidth: `/s` is missing"
        return QuantityError(f"`{unit}` is not a unit of bandwidth" if time else missing, f"write {in_bytes}")
    from_bits = int(number * BYTE_UNITS[known] / 8)
    if not from_bits:
        return QuantityError(f"`{text}` is in bits, and less than a byte", "write a bandwidth as `25GB/s`")
    if counted == "b" and prefix[:1] in ("m", "g", "t") and time != "ps":
        message, help = (
            "may be in bits or in bytes",
            f"write {in_bytes} or, if it is in bits, `{_written(from_bits)}/s`",
        )
        return QuantityError(f"`{text}` {message}", help)
    return QuantityError(f"`{text}` is in bits", f"bandwidths are in bytes: write `{_written(from_bits)}/s`")


def _byte_unit(prefix: str) -> str:
    """Return the unit of bytes with a prefix in any spelling: `GB` for `g`, `KiB` for `KI`."""
    letter = prefix[:1].upper()
    return f"{letter}iB" if len(prefix) > 1 else f"{'k' if letter == 'K' else letter}B"


def _written(size_bytes: int) -> str:
    """Return bytes exactly, in the largest decimal unit of which there is a whole one."""
    unit = max((each for each in _DECIMAL_UNITS if BYTE_UNITS[each] <= size_bytes), key=BYTE_UNITS.__getitem__)
    whole, rest = divmod(size_bytes, BYTE_UNITS[unit])
    digits = str(BYTE_UNITS[unit] + rest)[1:].rstrip("0")
    return f"{whole}{'.' if digits else ''}{digits}{unit}"


def _bytes(text: str, number: Fraction, unit: str | None) -> int:
    if unit is None:
        return _whole(text, number, "write whole bytes, or a unit as in `20GiB`")
    if unit not in BYTE_UNITS:
        raise QuantityError(f"`{unit}` is not a unit of bytes", _unit_advice(text, unit))
    return _whole(text, number * BYTE_UNITS[unit], "a byte is the smallest there is")


def _unit_advice(text: str, unit: str) -> str:
    """Return advice for `20G`, which could mean gigabytes or gibibytes."""
    letter = unit[0].upper()
    if letter in "KMGT":
        number = text.removesuffix(unit).strip()
        binary, decimal = _byte_unit(f"{letter}i"), _byte_unit(letter)
        sizes = f"{BYTE_UNITS[binary]:,} or {BYTE_UNITS[decimal]:,} bytes each"
        return f"write `{number}{binary}` or `{number}{decimal}`: {sizes}"
    return f"units are {_names(BYTE_UNITS)}"


def _whole(text: str, number: Fraction, help: str) -> int:
    if number.denominator != 1:
        # `1.5GiB` is a whole number of bytes; `0.1GiB` is rounded down to one; `1.5` without a unit is an error.
        if number < 1024:
            raise QuantityError(f"`{text}` is not a whole number", help)
        return int(number)
    return int(number)


def _share(text: str, number: Fraction) -> Fraction:
    if number > 100:
        raise QuantityError(f"`{text}` is more than all of it", "write at most `100%`")
    return number / 100


def _names(units: dict[str, int] | dict[str, Fraction]) -> str:
    return ", ".join(f"`{unit}`" for unit in units)
