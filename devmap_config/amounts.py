"""Amounts as text: bytes, times, rates and operations, for people and as profiles write them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

GIBIBYTE = 2**30
MEBIBYTE = 2**20
KIBIBYTE = 2**10

Units = tuple[tuple[int, str], ...]
"""Sizes of units with their names, the largest first."""

BYTE_UNITS: Units = ((GIBIBYTE, "GiB"), (MEBIBYTE, "MiB"), (KIBIBYTE, "KiB"))
TIME_UNITS: Units = ((10**9, "s"), (10**6, "ms"), (10**3, "µs"), (1, "ns"))
OPERATION_UNITS: Units = (
    (10**15, "Pflop"),
    (10**12, "Tflop"),
    (10**9, "Gflop"),
    (10**6, "Mflop"),
    (10**3, "kflop"),
    (1, "flop"),
)
BANDWIDTH_UNITS: Units = ((10**9, "GB/s"), (10**6, "MB/s"))
FLOPS_UNITS: Units = ((10**12, "TFLOP/s"), (10**9, "GFLOP/s"))


def largest_unit(amount: int, units: Units = BYTE_UNITS) -> tuple[int, str]:
    """Return the size and name of the largest unit that is not larger than an amount, or else of the smallest.

    >>> largest_unit(3_000_000)
    (1048576, 'MiB')
    """
    return next((unit for unit in units if abs(amount) >= unit[0]), units[-1])


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, in the plural if needed.

    >>> counted(1, "tensor"), counted(1_200, "tensor")
    ('1 tensor', '1,200 tensors')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_bytes(size_bytes: int) -> str:
    """Return bytes in the largest unit that is not larger than they are.

    >>> format_bytes(1_503_238_553), format_bytes(-2_048), format_bytes(100)
    ('1.4 GiB', '-2.0 KiB', '100 B')
    """
    if abs(size_bytes) < KIBIBYTE:
        return f"{size_bytes} B"
    unit_bytes, unit = largest_unit(size_bytes)
    return f"{size_bytes / unit_bytes:.1f} {unit}"


def format_exact_bytes(size_bytes: int) -> str:
    """Return bytes both rounded and exact.

    >>> format_exact_bytes(1_503_238_553), format_exact_bytes(100)
    ('1.4 GiB (1,503,238,553 bytes)', '100 bytes')
    """
    exact = f"{size_bytes:,} bytes"
    return f"{format_bytes(size_bytes)} ({exact})" if size_bytes >= KIBIBYTE else exact


def format_duration(nanoseconds: int) -> str:
    """Return a time with three significant digits, zeros included; from 100 units up, in whole ones.

    >>> format_duration(28_614_000), format_duration(4_000_000), format_duration(7_000_000_000_000)
    ('28.6 ms', '4.00 ms', '7,000 s')
    """
    return _with_three_digits(nanoseconds, TIME_UNITS)


def format_durations(least_nanoseconds: int, most_nanoseconds: int) -> str:
    """Return the shortest and the longest of several times, in the unit of the latter.

    >>> format_durations(980_000, 1_204_000), format_durations(2_000_000_000_000, 2_010_000_000_000)
    ('0.980–1.20 ms', '2,000–2,010 s')
    """
    size, unit = largest_unit(most_nanoseconds, TIME_UNITS)
    return f"{_three_digits(least_nanoseconds, size)}–{_three_digits(most_nanoseconds, size)} {unit}"


def format_ratios(least: int, most: int, of: int) -> str:
    """Return the least and the most of several amounts as multiples of another.

    >>> format_ratios(980, 1_204, 1_000)
    '0.98 to 1.20 times'
    """
    return f"{least / of:.2f} to {most / of:.2f} times"


def format_operations(count: int) -> str:
    """Return a number of floating-point operations with three significant digits.

    >>> format_operations(1_254_000_000_000), format_operations(12)
    ('1.25 Tflop', '12 flop')
    """
    return _with_three_digits(count, OPERATION_UNITS)


def _with_three_digits(amount: int, units: Units) -> str:
    size, unit = largest_unit(amount, units)
    return f"{_three_digits(amount, size)} {unit}"


def _three_digits(amount: int, size: int) -> str:
    """Return an amount in units of a size; what is counted in ones has no more digits than it has."""
    if size == 1 or amount >= 999.5 * size:
        return f"{amount / size:,.0f}"
    return f"{amount / size:#.3g}".removesuffix(".")


def format_bandwidth(bytes_per_second: int) -> str:
    """Return a bandwidth in whole gigabytes a second.

    >>> format_bandwidth(3_352_000_000_000)
    '3,352 GB/s'
    """
    return f"{bytes_per_second / 10**9:,.0f} GB/s"


def format_flops(flops_per_second: int) -> str:
    """Return a rate of computing in whole teraflops a second.

    >>> format_flops(989_400_000_000_000)
    '989 TFLOP/s'
    """
    return f"{flops_per_second / 10**12:,.0f} TFLOP/s"


def format_change(before: int | None, after: int | None) -> str:
    """Return the relative change of an amount; an empty text if it does not change or an amount is unknown or zero.

    >>> format_change(200, 205), format_change(0, 5), format_change(None, 5)
    ('+2.5%', '', '')
    """
    if not before or after is None or before == after:
        return ""
    return f"{(after - before) / before:+.1%}"


def profile_bytes(size_bytes: int) -> str:
    """Return bytes as a profile writes them, rounded down to mebibytes.

    >>> profile_bytes(25_769_803_776)
    '24576MiB'
    """
    return f"{size_bytes // MEBIBYTE}MiB"


def profile_bytes_at_least(size_bytes: int) -> str:
    """Return bytes as a profile writes them, rounded up, in the largest unit that gives at least four.

    >>> profile_bytes_at_least(20_000_000_000), profile_bytes_at_least(0)
    ('19GiB', '1KiB')
    """
    unit_bytes, unit = largest_unit(size_bytes // 4)
    return f"{-(-max(size_bytes, 1) // unit_bytes)}{unit}"


def profile_rate(per_second: int, units: Units = BANDWIDTH_UNITS) -> str:
    """Return a rate as a profile writes it, with only the digits that a repeated measurement would confirm.

    >>> profile_rate(25_312_000_000), profile_rate(165_200_000_000_000, FLOPS_UNITS)
    ('25.3GB/s', '165TFLOP/s')
    """
    size, unit = largest_unit(per_second, units)
    whole_digits = len(str(per_second // size))
    return f"{per_second / size:.{max(3 - whole_digits, 0)}f}{unit}"


def profile_duration(nanoseconds: int) -> str:
    """Return a time as a profile writes it, with up to three digits.

    >>> profile_duration(2_853), profile_duration(12_000)
    ('2.85us', '12us')
    """
    size, unit = largest_unit(nanoseconds, TIME_UNITS)
    amount = nanoseconds / size
    return f"{amount:.3g}{unit}".replace("µ", "u") if amount < 999.5 else f"{amount:.0f}{unit}".replace("µ", "u")


def exact_amount(amount: int, units: Mapping[str, int]) -> str:
    """Return an amount in the largest unit that divides it; one of the units must be 1.

    >>> exact_amount(68_719_476_736, {"GiB": 2**30, "B": 1}), exact_amount(1001, {"KiB": 2**10, "B": 1})
    ('64GiB', '1001B')
    """
    largest_first = sorted(units, key=units.__getitem__, reverse=True)
    unit = next(unit for unit in largest_first if amount % units[unit] == 0 and (amount or units[unit] == 1))
    return f"{amount // units[unit]}{unit}"
