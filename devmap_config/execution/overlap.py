"""The time of blocks that are copied ahead to several cards, whose links together are faster than one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from devmap_config.devices import Device

FORWARDS = 8
"""The most forwards that are simulated until one takes as long as the next."""


class Ahead(NamedTuple):
    """A block that is copied ahead from the CPU's memory to the card that runs it in a phase.

    It occupies its card for `card_nanoseconds`, the longer of running and of copying over the card's own link. It
    occupies all cards for `nanoseconds`, as they run one after another and share the rate of the CPU's memory.
    """

    phase: str
    card: Device
    card_nanoseconds: int
    nanoseconds: int

    def times(self, count: int) -> Ahead:
        """Return the block with the times of `count` forwards."""
        return Ahead(self.phase, self.card, count * self.card_nanoseconds, count * self.nanoseconds)


class Timed(Protocol):
    """A time in two parts: nanoseconds that add up, and copies ahead that overlap with those to other cards."""

    @property
    def nanoseconds(self) -> int:
        """The part that adds up."""

    @property
    def ahead(self) -> tuple[Ahead, ...]:
        """The copies ahead, which overlap."""


@dataclass(frozen=True)
class Clock:
    """The ends of the blocks that are copied ahead, by phase: of the last on each card, and of the last of all
    (`None`).
    """

    ends: Counter[tuple[str, Device | None]] = field(default_factory=Counter)

    def end_of(self, block: Ahead) -> int:
        """Return when a block would end if it ran next."""
        last, own = self.ends[block.phase, None], self.ends[block.phase, block.card]
        return max(last + block.nanoseconds, own + block.card_nanoseconds)

    def run(self, blocks: Iterable[Ahead]) -> None:
        """Run blocks one after another."""
        for block in blocks:
            self.ends[block.phase, block.card] = self.ends[block.phase, None] = self.end_of(block)


def total_nanoseconds(times: Iterable[Timed]) -> int:
    """Return the time of one of many forwards that does these things in this order."""
    listed = tuple(times)
    return sum(time.nanoseconds for time in listed) + ahead_nanoseconds(
        block for time in listed for block in time.ahead
    )


def ahead_nanoseconds(blocks: Iterable[Ahead]) -> int:
    """Return the time of these blocks in a forward, in the order in which they run, with one forward after another.

    It is the difference between the ends of one forward and the next, on the card where that is largest. Even after few
    simulated forwards, it is not below its limit in the long run, the sum of any card, or the sum of all.

    >>> turns = [Ahead("decode", card, 10, 5) for card in ("cuda:0", "cuda:1", "cuda:0", "cuda:1")]
    >>> ahead_nanoseconds(turns), ahead_nanoseconds(sorted(turns)), ahead_nanoseconds(turns[::2])
    (20, 30, 20)
    """
    forward, clock, before = tuple(blocks), Clock(), Counter[object]()
    for _ in range(FORWARDS if forward else 0):
        before = Counter(clock.ends)
        clock.run(forward)
    later: dict[str, int] = {}
    for (phase, card), end in clock.ends.items():
        later[phase] = max(later.get(phase, 0), end - before[phase, card])
    return sum(later.values())
