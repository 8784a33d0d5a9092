"""Renders plans as one self-contained page, and the picture of a plan as SVG."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from devmap_config.amounts import counted, format_bytes, format_change, format_duration, format_ratios
from devmap_config.devices import CPU
from devmap_config.plan.diff import OTHER_MODELS, rates_in_words
from devmap_config.plan.values import folded_devices
from devmap_config.report.charts import (
    MemoryChart,
    PhaseSpan,
    PhaseWaits,
    comparisons_of,
    device_changes,
    memory_charts,
    spans_of,
    waits_of,
)
from devmap_config.report.picture import PHASES, Geometry, Picture, picture_of, rows_of_runs
from devmap_config.wording import in_words, visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

MODES = {
    "resident": "runs where it is",
    "streamed": "copied to {runs_on} at every forward",
    "computed-on-cpu": "computed on the CPU, where it is",
    "tensor-parallel": "a share of each layer, beside the others of its group",
}
"""The descriptions of the modes of runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFigure:
    """A figure of a plan, with a note on it."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class View:
    """A plan in the form that its part of the page shows.

    Attributes:
        told: the data of its profile, in the form of `--format json`.
        number: its place on the page; names of its rows begin with it.
    """

    told: Mapping[str, Any]
    number: int

    @property
    def prefix(self) -> str:
        """The prefix of the names of its rows."""
        return f"plan-{self.number}-"

    @property
    def name(self) -> str:
        """The profile."""
        return visible(self.told["profile"])

    @property
    def plan(self) -> Mapping[str, Any]:
        """The plan, in the form of `--format json`."""
        plan: Mapping[str, Any] = self.told["plan"]
        return plan

    @cached_property
    def picture(self) -> Picture:
        """The devices, to scale."""
        return picture_of(self.told, self.prefix)

    @cached_property
    def figures(self) -> tuple[PlanFigure, ...]:
        """The predicted cost of running the plan."""
        return tuple(_figures(self.plan))

    @property
    def title(self) -> str:
        """The title of the picture alone: the profile's name, else its file's."""
        return visible(Path(self.told["profile"]).name.removesuffix(".yaml").removesuffix(".yml"))

    @property
    def subtitle(self) -> str:
        """The description of the picture alone."""
        return " ".join([next(iter(self.story)), *(f"{figure.value} {figure.name}." for figure in self.figures[:1])])

    @property
    def story(self) -> Iterator[str]:
        """The sentences of `devmap explain` about the plan."""
        return map(visible, self.told["explanation"])

    @property
    def unit(self) -> str:
        """The phase for which the times of a block's other places are given."""
        has_token = self.plan["prediction"]["decode_nanoseconds_per_token"] is not None
        return PHASES["decode" if has_token else "prefill"]

    @property
    def runs(self) -> Iterator[Mapping[str, Any]]:
        """The runs of each device, with their mode and the reasons; those of a tensor-parallel group as one."""
        rows = rows_of_runs(self.told["runs"])
        for number in dict.fromkeys(rows):
            run = self.told["runs"][number]
            devices = [run["device"] for run, row in zip(self.told["runs"], rows, strict=True) if row == number]
            yield {
                "anchor": f"{self.prefix}run-{number}",
                "device": visible(_and(folded_devices(devices))),
                "is_each": len(devices) > 1,
                "name": visible(", ".join(run["patterns"])),
                "blocks": run["blocks"],
                "moved": visible(run["block"] if run["block"] != run["first"] or run["blocks"] > 1 else ""),
                "size": format_bytes(run["weights_bytes"]),
                "mode": run["mode"],
                "how": MODES[run["mode"]].format(runs_on=visible(run["runs_on"])),
                "reasons": [visible(line) for line in run["why"]],
                "alternatives": tuple(_alternatives(run["alternatives"])),
            }

    @property
    def devices(self) -> Iterator[Mapping[str, str]]:
        """The memory of each device, in words; devices with equal memory are one row."""
        alike: dict[tuple[str, ...], list[str]] = {}
        for use in self.plan["devices"]:
            sizes = (format_bytes(use[f"{key}_bytes"]) if use[f"{key}_bytes"] else "–" for key in COLUMNS)
            alike.setdefault(tuple(sizes), []).append(use["id"])
        for words, devices in alike.items():
            each = ", each" if len(devices) > 1 else ""
            yield {**dict(zip(COLUMNS, words, strict=True)), "id": visible(f"{_and(folded_devices(devices))}{each}")}

    @property
    def workload(self) -> str:
        """The workload in a sentence; empty if the profile has none, or if the description of the stages includes
        it.
        """
        workload = self.told.get("workload")
        return "" if workload is None or self.stages else _workload(workload)

    @property
    def links(self) -> tuple[Mapping[str, Any], ...]:
        """The bytes over each link, phase by phase; links from one device with equal bytes are one row."""
        links: dict[tuple[str, str], dict[str, Any]] = {}
        for use in (self.told["simulation"] or {"links": ()})["links"]:
            pair = (use["source"], use["target"])
            copies = counted(use["transfers"], "copy").replace("copys", "copies")
            words = f"{format_bytes(use['size_bytes'])} in {copies}"
            if use["weights_bytes"]:
                words += f", {format_bytes(use['weights_bytes'])} of it weights"
            links.setdefault(pair, {"source": pair[0]})[use["phase"]] = words
        place = {use["id"]: number for number, use in enumerate(self.plan["devices"])}
        alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for source, target in sorted(links, key=lambda pair: [place.get(link, -1) for link in pair]):
            alike.setdefault(tuple(links[source, target].items()), []).append(target)
        return tuple(
            {**dict(link), "source": visible(dict(link)["source"]), "target": visible(_and(folded_devices(targets)))}
            for link, targets in alike.items()
        )

    @cached_property
    def memory(self) -> tuple[MemoryChart, ...]:
        """The memory of each device besides weights, block by block."""
        simulation = self.told["simulation"]
        return () if not simulation or not simulation["steps"] else memory_charts(simulation, self.plan)

    @property
    def spans(self) -> tuple[PhaseSpan, ...]:
        """The phases along the width of these charts."""
        return spans_of(self.told["simulation"])

    @property
    def rehearsal(self) -> str:
        """The result of the dry run, in a sentence."""
        simulation = self.told["simulation"]
        if self.stages:
            return "Plans for vLLM are not dry-run: the figures are those of its rules and of the machine's rates."
        if simulation is None:
            return "The plan was not dry-run: torch is not installed where this page was made."
        if simulation["outcome"] == "runs":
            return "The plan ran on simulated devices: the model's own code, without data."
        if simulation["mismatch"] is not None:
            return f"The plan does not run: it fails in {simulation['mismatch']['phase']}."
        return f"The plan could not be dry-run: {visible(str(simulation['reason']))}."

    @cached_property
    def waits(self) -> tuple[PhaseWaits, ...]:
        """The resources that each phase waits for."""
        return waits_of(self.told["waits"], self.plan)

    @property
    def stages(self) -> tuple[Mapping[str, Any], ...]:
        """The stages of a plan for vLLM."""
        pipeline = self.plan.get("pipeline")
        return () if pipeline is None else tuple(_stages(pipeline))

    @property
    def findings(self) -> Iterator[Mapping[str, str]]:
        """The warnings."""
        for finding in self.told["diagnostics"]:
            place = f"{finding['file']}:{finding['line']}" if finding["file"] else ""
            values = {
                "code": finding["code"],
                "severity": finding["severity"],
                "place": place,
                "help": finding["help"] or "",
            }
            yield {name: visible(value) for name, value in {**values, "message": finding["message"]}.items()}


def _stages(pipeline: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield each stage in words, with its time for a token in percent of the slowest one's."""
    stages = pipeline["stages"]
    slowest = max((stage["decode_nanoseconds"] or 0 for stage in stages), default=0)
    for number, stage in enumerate(stages):  # numbered as in vLLM
        times = {key: stage[f"{key}_nanoseconds"] for key in ("decode", "prefill")}
        yield {
            "number": number,
            "devices": visible(", ".join(folded_devices(stage["devices"]))),
            "layers": f"{stage['first_layer']}–{stage['last_layer']}",
            "blocks": f"{stage['blocks']:,}",
            "share": round(100 * (times["decode"] or 0) / (slowest or 1), 2),
            **{key: "–" if time is None else format_duration(time) for key, time in times.items()},
        }


def _workload(workload: Mapping[str, Any]) -> str:
    """Return a workload in a sentence.

    >>> _workload({"batch_size": 1, "context_length": 4096, "prompt_length": 1024, "images": 2})
    'For 1 sequence of 4,096 tokens and a prompt of 1,024, with 2 images.'
    """
    words = f"For {counted(workload['batch_size'], 'sequence')} of {counted(workload['context_length'], 'token')}"
    if workload["prompt_length"] != workload["context_length"]:
        words += f" and a prompt of {workload['prompt_length']:,}"
    held = []
    if images := workload.get("images"):
        size = (
            f" of {workload['image_width']:,} × {workload['image_height']:,} pixels"
            if "image_width" in workload
            else ""
        )
        held.append(counted(images, "image") + size)
    if seconds := workload.get("audio_seconds"):
        held.append(f"{seconds:,} s of sound")
    words += f", with {' and '.join(held)}" if held else ""
    return f"{words}."


def _alternatives(alternatives: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, str]]:
    """Yield the costs of other places of a block, with equal costs grouped."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for other in alternatives:
        stored_on, runs_on = other["location"]["stored_on"], other["location"]["runs_on"]
        where = "on {}" if stored_on == runs_on else f"on {{}}, copied to {runs_on} at every forward"
        if stored_on == runs_on == str(CPU):
            where = "computed on the {}"
        slower = other["slower_nanoseconds"]
        sign = "+" if slower is not None and slower >= 0 else "−"
        pace = "not known" if slower is None else f"{sign}{format_duration(abs(slower))}"
        blocked = f"{format_bytes(other['missing_bytes'])} missing on {other['full_device']}"
        alike.setdefault((where, pace, blocked if other["full_device"] else "fits"), []).append(stored_on)
    for (where, pace, room), devices in alike.items():
        yield {"where": visible(where.format(_and(folded_devices(devices)))), "pace": pace, "room": visible(room)}


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


COLUMNS = ("capacity", "weights", "kv_cache", "activation", "overhead", "free")
"""The columns of the table of devices, by the keys of a plan's `devices`."""


def _figures(plan: Mapping[str, Any]) -> Iterator[PlanFigure]:
    prediction, bases = plan["prediction"], plan.get("basis", {})
    for phase, key in (("decode", "decode_nanoseconds_per_token"), ("prefill", "prefill_nanoseconds")):
        if (nanoseconds := prediction[key]) is None:
            continue
        basis = bases.get(phase, {})
        notes = [f"{basis['rates']} rates"] if basis else []
        if basis.get("least_nanoseconds") is not None:
            ratios = format_ratios(basis["least_nanoseconds"], basis["most_nanoseconds"], nanoseconds)
            runs = f"runs with {basis['kind']}" if basis["kind"] else "runs"
            always = " (always slower)" if basis["least_nanoseconds"] > nanoseconds else ""
            notes.insert(0, f"measured {runs} took {ratios} that{always}")
        elif basis.get("kind"):
            notes.insert(0, f"no run with {basis['kind']} was compared with such a prediction")
        bound = prediction["bound_decode_nanoseconds_per_token"] if phase == "decode" else None
        if bound is not None:
            notes.append(f"no plan in the search space is below {format_duration(bound)}")
        yield PlanFigure(name=PHASES[phase], value=format_duration(nanoseconds), note="; ".join(notes))
    if (longest := prediction["longest_context"]) is not None:
        yield PlanFigure(name="longest context", value=f"{longest:,}", note="tokens")
    if streamed := prediction["streamed_bytes_per_token"]:
        yield PlanFigure(name="copied at every forward", value=format_bytes(streamed), note="of weights")
    if (hops := prediction["hops"]) is not None:
        yield PlanFigure(name="hops", value=f"{hops:,}", note="changes of device in a forward")


def page_of(
    reports: Sequence[Mapping[str, Any]],
    *,
    diff: Mapping[str, Any] | None = None,
    sides: tuple[str, str] = ("", ""),
    cases: Sequence[Mapping[str, Any]] = (),
    version: str,
) -> str:
    """Return the page of some plans.

    Args:
        reports: the data of each profile.
        diff: the difference between two plans, in the form of `devmap diff --format json`.
        sides: the names of these two.
        cases: the cases of receipts, in the form of `devmap receipts --format json`.
        version: that of devmap-config.
    """
    templates = _templates()
    script, style = _source(templates, "page.js"), _source(templates, "page.css")
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return templates.get_template("page.html.j2").render(
        views=[View(told, number) for number, told in enumerate(reports, 1)],
        diff=diff,
        changes=() if diff is None else device_changes(diff),
        moves=() if diff is None else _moves(diff),
        figure_changes=() if diff is None else _figure_changes(diff),
        other_models=OTHER_MODELS if diff is not None and diff["models_differ"] else "",
        rates="" if diff is None else visible(rates_in_words(diff)),
        sides=tuple(map(visible, sides)),
        comparisons=comparisons_of(cases),
        failed=[case for case in cases if case["failed"]],
        script=script,
        script_hash=script_hash,
        style=style,
        geometry=GEOMETRY,
        version=version,
    )


def svg_of(told: Mapping[str, Any]) -> str:
    """Return the picture of a plan alone, as SVG."""
    templates = _templates()
    view = View(told, 1)
    return templates.get_template("picture.svg.j2").render(view=view, picture=view.picture, geometry=SVG_GEOMETRY)


GEOMETRY = Geometry(row=86, head=44, middle=37)
"""The sizes on the page, whose stylesheet has the same heights."""

SVG_GEOMETRY = Geometry(row=84, head=36, middle=34)


def _templates() -> Environment:
    """Return the templates, which escape everything that is put into them."""
    templates = Environment(
        loader=PackageLoader("devmap_config.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["bytes"] = format_bytes
    templates.filters["prose"] = _prose
    return templates


def _prose(text: str) -> Markup:
    """Return a text with code elements for the parts in backticks."""
    parts = enumerate(text.split("`"))
    return Markup("").join(Markup("<code>{}</code>").format(part) if number % 2 else part for number, part in parts)


def _source(templates: Environment, name: str) -> str:
    """Return the text of a file that is not a template."""
    if templates.loader is None:
        raise LookupError(name)
    return templates.loader.get_source(templates, name)[0]


def _moves(diff: Mapping[str, Any]) -> Iterable[Mapping[str, str]]:
    for move in diff["moved"]:
        yield {
            "modules": visible(", ".join(module or "everything" for module in move["modules"])),
            "before": _home(move["before"]),
            "after": _home(move["after"]),
        }


def _home(home: Mapping[str, Any] | None) -> str:
    if home is None:
        return "–"
    computes = ", computed there" if home["computes_there"] else ""
    return visible(f"{home['device']}{computes}" + (f", computed on {home['runs_on']}" if home["runs_on"] else ""))


FIGURES = {
    "decode_nanoseconds_per_token": ("a token", format_duration),
    "bound_decode_nanoseconds_per_token": ("lower bound of a token", format_duration),
    "prefill_nanoseconds": ("a prefill", format_duration),
    "streamed_bytes_per_token": ("copied at every forward", format_bytes),
    "hops": ("hops between devices", "{:,}".format),
    "longest_context": ("longest context", "{:,} tokens".format),
}


def _figure_changes(diff: Mapping[str, Any]) -> Iterator[Mapping[str, str]]:
    """Yield the differences between the plans as a whole, and between their predictions."""
    for name, change in diff["settings"].items():
        values = {
            side: "–" if change[side] is None else visible(in_words(change[side])) for side in ("before", "after")
        }
        yield {"name": visible(name.replace("_", " ")), **values, "share": ""}
    for name, (words, show) in FIGURES.items():
        change = diff["prediction"][name]
        before, after = change["before"], change["after"]
        if before is not None or after is not None:
            texts = {side: "–" if change[side] is None else show(change[side]) for side in ("before", "after")}
            yield {"name": words, **texts, "share": "" if name == "hops" else format_change(before, after)}
