"""The picture of a plan: hosts, their devices to scale with their contents, and the bytes over the links."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, Literal

from devmap_config.amounts import format_bytes, largest_unit
from devmap_config.devices import Device
from devmap_config.plan.values import folded_devices
from devmap_config.wording import visible

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

Kind = Literal["weights", "cache", "activations", "overhead", "free"]

PARTS: Mapping[Kind, str] = {
    "cache": "kv_cache_bytes",
    "activations": "activation_bytes",
    "overhead": "overhead_bytes",
    "free": "free_bytes",
}
"""The parts of a device besides weights, in the order of drawing, with their keys in a plan's `devices`."""

LEGEND: Mapping[str, str] = {
    "resident": "weights that run where they are",
    "streamed": "weights that are copied elsewhere at every forward",
    "computed-on-cpu": "weights that the CPU computes with",
    "tensor-parallel": "weights of a tensor-parallel group, a share on each device",
    "cache": "key-value cache",
    "activations": "activations, at their peak",
    "overhead": "room for weights that are copied in",
    "free": "free",
}
"""The legend, by the style of parts."""

LEAST_SHARE = 0.15
"""The percentage of the picture's width below which a part is not drawn, as it would be narrower than a line."""

LEAST_CELL = 0.35
"""The least percentage of the picture's width for drawing a block of a run by itself."""

CUT_OFF = 1.25
"""If a CPU's memory or a disk is larger than all accelerators, this multiple of its contents is drawn."""


MOST_ALIKE = 2
"""The number of neighbours with equal contents that are drawn one by one; more are one bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a device's bar.

    Attributes:
        kind: what it is.
        style: the style of drawing: the mode of weights, or else the kind.
        label: its name in a few letters.
        title: its name in full.
        size_bytes: how large it is.
        start: the start in the bar, in percent of its drawn part.
        share: the width, in percent of the same.
        cells: the number of blocks that are drawn separately.
        anchor: the row of the page's table with more about it; `""` if there is none.
    """

    kind: Kind
    style: str
    label: str
    title: str
    size_bytes: int
    start: float
    share: float
    cells: int = 1
    anchor: str = ""

    @property
    def size(self) -> str:
        """Its size in words."""
        return format_bytes(self.size_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A device with what it holds, or several neighbours that hold the same.

    `count` is how many devices these are: sizes are those of each. `name` is that on their own host. `width` is the
    drawn part of the capacity, in percent of the picture's width; `is_cut` says that a part is not drawn.
    """

    device: str
    name: str
    model: str
    capacity_bytes: int
    free_bytes: int
    parts: tuple[Part, ...]
    width: float
    is_cut: bool
    flows: tuple[str, ...]
    row: int = 0
    count: int = 1

    @property
    def used(self) -> str:
        """The used part of the capacity, in the capacity's unit."""
        unit_bytes, unit = largest_unit(self.capacity_bytes)
        used_bytes = self.capacity_bytes - self.free_bytes
        return f"{used_bytes / unit_bytes:,.1f} of {self.capacity_bytes / unit_bytes:,.1f} {unit}"

    @property
    def free(self) -> str:
        """The free part of the capacity."""
        return format_bytes(self.free_bytes)

    @property
    def on_each(self) -> str:
        """The words that sizes are those of each of several devices."""
        return " on each" if self.count > 1 else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureHost:
    """A machine; `name` is `None` if the profile has only one."""

    name: str | None
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arc:
    """The bytes that are copied from the device of one row to that of another while a token is decoded.

    Attributes:
        lane: the distance from the bars, such that no two arcs cross.
        weight: the thickness of the line.
    """

    source: int
    target: int
    lane: int
    weight: int
    is_weights: bool
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The whole picture. `scale_bytes` is the memory that the full width stands for, `unit` the unit of the arcs'
    bytes: a token.
    """

    hosts: tuple[PictureHost, ...]
    arcs: tuple[Arc, ...]
    legend: tuple[tuple[str, str], ...]
    scale_bytes: int
    summary: str
    unit: str

    @property
    def bars(self) -> tuple[Bar, ...]:
        """The devices of all hosts."""
        return tuple(bar for host in self.hosts for bar in host.bars)

    @property
    def lanes(self) -> int:
        """The number of lanes of the arcs."""
        return max((arc.lane for arc in self.arcs), default=-1) + 1


def picture_of(told: Mapping[str, Any], prefix: str = "") -> Picture:
    """Return the picture of a plan.

    Args:
        told: the data of a profile: its `plan`, `runs`, `hardware` and `simulation`, in the form of `--format json`.
        prefix: the prefix of the names of the page's rows.
    """
    devices = told["plan"]["devices"]
    scale_bytes = _scale_bytes(devices)
    links = [*_links(told.get("simulation"), {use["id"] for use in devices}), *_sent(told)]
    by_host: dict[str | None, list[Bar]] = {}
    rows: dict[str, int] = {}
    for alike in _alike([(use["id"], _bar(use, told, scale_bytes, links, prefix)) for use in devices]):
        row = max(rows.values(), default=-1) + 1
        rows |= dict.fromkeys((device for device, _ in alike), row)
        by_host.setdefault(Device.from_text(alike[0][0]).host, []).append(_joined([bar for _, bar in alike], row))
    bars = [bar for held in by_host.values() for bar in held]
    drawn = {part.style for bar in bars for part in bar.parts}
    return Picture(
        hosts=tuple(PictureHost(name=name, bars=tuple(held)) for name, held in by_host.items()),
        arcs=_arcs(links, rows),
        legend=tuple((style, words) for style, words in LEGEND.items() if style in drawn),
        scale_bytes=scale_bytes,
        summary="; ".join(f"{bar.device}: {bar.used}, {bar.free} free{bar.on_each}" for bar in bars),
        unit=PHASES[last_phase(told.get("simulation")) or "decode"],
    )


def _scale_bytes(devices: Sequence[Mapping[str, Any]]) -> int:
    """Return the memory that the picture's width stands for; free memory counts only for accelerators."""
    accelerators = [use["capacity_bytes"] for use in devices if Device.from_text(use["id"]).is_accelerator]
    others = [
        min(use["capacity_bytes"], int(CUT_OFF * (use["capacity_bytes"] - use["free_bytes"])))
        for use in devices
        if not Device.from_text(use["id"]).is_accelerator
    ]
    return int(max([*accelerators, *others, 1]))


def _bar(
    use: Mapping[str, Any],
    told: Mapping[str, Any],
    scale_bytes: int,
    links: Iterable[Mapping[str, Any]],
    prefix: str,
) -> Bar:
    device = use["id"]
    shown_bytes = min(use["capacity_bytes"], scale_bytes)
    is_cut = use["capacity_bytes"] > scale_bytes
    parts, start_bytes = [], 0
    for kind, style, title, size_bytes, cells, anchor in _contents(use, told["runs"], prefix):
        drawn_bytes = max(shown_bytes - start_bytes, 0) if kind == "free" else size_bytes
        share = 100 * drawn_bytes / max(shown_bytes, 1)
        width = share * shown_bytes / scale_bytes
        if width >= LEAST_SHARE:
            parts.append(
                Part(
                    kind=kind,
                    style=style,
                    label=short(title),
                    title=visible(", ".join(title)),
                    size_bytes=size_bytes,
                    start=round(100 * start_bytes / max(shown_bytes, 1), 3),
                    share=round(share, 3),
                    cells=cells if width / cells >= LEAST_CELL else 1,
                    anchor=anchor,
                )
            )
        start_bytes += size_bytes
    hardware = told["hardware"].get(device, {})
    return Bar(
        device=visible(device),
        name=visible(device.rpartition("/")[2]),
        model=visible(hardware.get("accelerator") or ""),
        capacity_bytes=use["capacity_bytes"],
        free_bytes=use["free_bytes"],
        parts=tuple(parts),
        width=round(100 * shown_bytes / scale_bytes, 3),
        is_cut=is_cut,
        flows=tuple(_flows(device, links)),
    )


def _alike(bars: Sequence[tuple[str, Bar]]) -> Iterator[list[tuple[str, Bar]]]:
    """Yield the bars of devices one by one, or together if many neighbours on a host hold the same."""

    def look(named: tuple[str, Bar]) -> tuple[object, ...]:
        device, bar = named
        return Device.from_text(device).host, replace(bar, device="", name="", flows=())

    for _, neighbours in groupby(bars, key=look):
        alike = list(neighbours)
        yield from [alike] if len(alike) > MOST_ALIKE else ([each] for each in alike)


def _joined(alike: Sequence[Bar], row: int) -> Bar:
    """Return the bar of a row, for one device or for several that hold the same."""
    first, count = alike[0], len(alike)
    if count == 1:
        return replace(first, row=row)
    name = ", ".join(folded_devices(bar.name for bar in alike))
    return replace(
        first,
        device=first.device.removesuffix(first.name) + name,
        name=name,
        row=row,
        model=f"{count} × {first.model}" if first.model else f"{count} devices",
        flows=tuple(dict.fromkeys(flow for bar in alike for flow in bar.flows)),
        count=count,
    )


def _contents(
    use: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], prefix: str
) -> Iterator[tuple[Kind, str, tuple[str, ...], int, int, str]]:
    """Yield the contents of a device: kind, style, names, bytes, blocks, and the row with more about it."""
    rows = rows_of_runs(runs)
    for number, run in enumerate(runs):
        if run["device"] == use["id"]:
            anchor = f"{prefix}run-{rows[number]}"
            yield "weights", run["mode"], tuple(run["patterns"]), run["weights_bytes"], run["blocks"], anchor
    for kind, key in PARTS.items():
        if use[key]:
            yield kind, kind, (kind,), use[key], 1, ""


def rows_of_runs(runs: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Return, for each run, the number of the first one that differs from it only by its device, and shares its row.

    Such are the shares of the devices of a tensor-parallel group.
    """
    first: dict[tuple[Any, ...], int] = {}
    return tuple(
        first.setdefault((run["mode"], *run["patterns"], run["weights_bytes"], *run["why"], run["block"]), number)
        if run["mode"] == "tensor-parallel"
        else number
        for number, run in enumerate(runs)
    )


NUMBERS = re.compile(r"^(\d+|\[[\d,/-]+\])$")


def short(patterns: Sequence[str]) -> str:
    """Return a short label for the matches of patterns.

    >>> short(["model.layers.[0-9]"]), short(["layers.[0-31/2].mlp", "layers.[0-31/2].norm"]), short(["model.norm"])
    ('layers 0–9', 'layers 0–31/2, 2 parts', 'norm')
    """
    segments = patterns[0].split(".")
    numbered = [place for place, segment in enumerate(segments) if NUMBERS.match(segment)]
    if not numbered:
        label = segments[-1]
    else:
        place = numbered[-1]
        label = " ".join([*segments[max(place - 1, 0) : place], segments[place].strip("[]").replace("-", "–")])
        if len(patterns) == 1 and segments[place + 1 :]:
            label += f" {'.'.join(segments[place + 1 :])}"
    return visible(label + (f", {len(patterns)} parts" if len(patterns) > 1 else ""))


PHASES = {"decode": "a token", "prefill": "a prefill"}
"""The unit of work of a phase."""


def last_phase(simulation: Mapping[str, Any] | None) -> str | None:
    """Return the phase whose transfers a picture shows: decoding, if the model decodes."""
    return simulation["links"][-1]["phase"] if simulation and simulation["links"] else None


LEAST_OF_LINKS = 0.02
"""The least share of the busiest link's bytes for which another link is drawn, separately for weights and
activations.
"""


def _links(simulation: Mapping[str, Any] | None, devices: Collection[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the links of the last phase that are drawn."""
    if simulation is None:
        return
    phase = last_phase(simulation)
    links = [
        link
        for link in simulation["links"]
        if link["phase"] == phase and link["source"] in devices and link["target"] in devices
    ]
    for is_weights in (True, False):
        alike = [link for link in links if bool(_of_weights(link)) == is_weights]
        most_bytes = max((link["size_bytes"] for link in alike), default=0)
        yield from (link for link in alike if link["size_bytes"] >= LEAST_OF_LINKS * most_bytes)


def _flows(device: str, links: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the bytes that a device receives, in words."""
    for link in links:
        if link["target"] == device:
            source = link.get("sender", link["source"])
            yield f"{format_bytes(link['size_bytes'])}{_of_weights(link)} from {visible(source)}"


def _of_weights(link: Mapping[str, Any]) -> str:
    return " of weights" if link["weights_bytes"] * 2 > link["size_bytes"] else ""


THICKER_BYTES = (2**20, 2**30)
"""The numbers of bytes from which an arc is drawn thicker."""


def _arcs(links: Sequence[Mapping[str, Any]], rows: Mapping[str, int]) -> tuple[Arc, ...]:
    """Return the arcs, with short ones nearest to the bars."""
    taken: list[list[tuple[float, float]]] = []
    arcs = []
    crossing = (link for link in links if rows[link["source"]] != rows[link["target"]])
    for link in sorted(crossing, key=lambda link: abs(rows[link["source"]] - rows[link["target"]])):
        source, target = rows[link["source"]], rows[link["target"]]
        ends = (min(source, target) + 0.0, max(source, target) + 0.0)
        lane = next(
            (number for number, held in enumerate(taken) if all(_are_apart(ends, other) for other in held)), len(taken)
        )
        if lane == len(taken):
            taken.append([])
        taken[lane].append(ends)
        arcs.append(
            Arc(
                source=source,
                target=target,
                lane=lane,
                weight=sum(link["size_bytes"] >= least_bytes for least_bytes in THICKER_BYTES) + 1,
                is_weights=bool(_of_weights(link)),
                title=f"{visible(link.get('sender', link['source']))} to {visible(link['target'])}: "
                f"{format_bytes(link['size_bytes'])}{_of_weights(link)}",
            )
        )
    return tuple(arcs)


def _sent(told: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the bytes that each stage of a pipeline sends to the next for a token of a request, in the form of
    links.
    """
    pipeline = told["plan"].get("pipeline")
    stages = [] if pipeline is None else [stage["devices"] for stage in pipeline["stages"]]
    for before, after in pairwise(stages):
        sender = before[0] if len(before) == 1 else f"{before[0]} to {before[-1]}"
        yield {
            "source": before[-1],
            "target": after[0],
            "sender": sender,
            "size_bytes": told["sent_bytes"],
            "weights_bytes": 0,
        }


def _are_apart(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[1] <= other[0] or other[1] <= one[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The sizes of a drawing in pixels: the height of a row, the height of a host's name, the middle of a bar, the
    width of a lane.
    """

    row: int
    head: int
    middle: int
    lane: int = 10
    margin: int = 12

    def tops(self, picture: Picture) -> tuple[int, ...]:
        """Return the top of each row."""
        tops, top = [], 0
        for host in picture.hosts:
            top += 0 if host.name is None else self.head
            for _ in host.bars:
                tops.append(top)
                top += self.row
        return tuple(tops)

    def height(self, picture: Picture) -> int:
        """Return the height of all rows."""
        return self.row * len(picture.bars) + self.head * sum(host.name is not None for host in picture.hosts)

    def gutter(self, picture: Picture) -> int:
        """Return the width of the lanes."""
        return self.lane * picture.lanes + self.margin if picture.arcs else 0

    def paths(self, picture: Picture) -> Iterator[tuple[Arc, str, str]]:
        """Yield each arc with the paths of its line and of its head, which end at the right of the gutter."""
        middles = [top + self.middle for top in self.tops(picture)]
        right, step = self.gutter(picture), min(5, 20 // max(picture.lanes, 1))
        for arc in picture.arcs:
            down = 1 if arc.target > arc.source else -1
            beside = 3 + step * (picture.lanes - 1 - arc.lane)  # arcs nearer to the bars start further from the middle
            start, end = middles[arc.source] + down * beside, middles[arc.target] - down * beside
            left, bend = right - self.margin - self.lane * arc.lane, 4 * down
            line = f"M{right} {start}H{left + 4}q-4 0 -4 {bend}V{end - bend}q0 {bend} 4 {bend}H{right - 4}"
            yield arc, line, f"M{right - 6} {end - 3.5}L{right} {end}L{right - 6} {end + 3.5}Z"
