"""Describes the predicted figures of a plan, and their basis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devmap_config.amounts import format_duration, format_ratios
from devmap_config.devices import CPU, DISK
from devmap_config.plan.plan import OWN
from devmap_config.plan.prediction import figures_in_words
from devmap_config.profile.writing import example_with_rates

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.compiler import Compiled
    from devmap_config.devices import Device
    from devmap_config.execution.segments import MissingFigureError, Phase
    from devmap_config.plan.plan import Plan, Prediction
    from devmap_config.plan.prediction import TimeBasis
    from devmap_config.profile.schema import Hardware


NO_PLAN = "no plan in the search space"


def no_plan(compiled: Compiled) -> str:
    """Return the subject of a sentence about the lower bound, which holds for the plans that were considered."""
    passes_over_cpu = any(each.code == "cpu-passed-over" for each in compiled.diagnostics)
    return f"{NO_PLAN}, without the CPU computing," if passes_over_cpu else NO_PLAN


def predicted(plan: Plan, no_plan: str = NO_PLAN) -> str:
    """Return the known predicted figures of a plan in words.

    Args:
        plan: the plan.
        no_plan: the subject of the sentence about the lower bound.
    """
    prediction = plan.prediction
    decode, bound = prediction.decode_nanoseconds_per_token, prediction.bound_decode_nanoseconds_per_token
    words = []
    if decode is not None:
        proof = f"{no_plan} is below {format_duration(bound)}" if bound is not None else ""
        fastest = _fastest(prediction.fastest_decode_nanoseconds_per_token, decode)
        words.append(f"{format_duration(decode)} a token{_in_parentheses(fastest, proof)}")
    if prediction.prefill_nanoseconds is not None:
        fastest = _fastest(prediction.fastest_prefill_nanoseconds, prediction.prefill_nanoseconds)
        words.append(f"{format_duration(prediction.prefill_nanoseconds)} a prefill{_in_parentheses(fastest)}")
    if prediction.longest_context is not None:
        words.append(f"a context of up to {prediction.longest_context:,} tokens")
    return f"predicted: {', '.join(words)}" if words else ""


UNITS: Mapping[Phase, str] = {"decode": "a token", "prefill": "a prefill"}
"""The unit of the predicted time, by phase."""


def how_to_give(missing: Mapping[Phase, tuple[MissingFigureError, ...]], hardware: Hardware) -> str:
    """Return what to write for the missing figures of the machine, with an example that keeps what the profile says."""
    figures: dict[Device | None, list[str]] = {}
    for error in missing.get("prefill") or missing["decode"]:
        figures.setdefault(error.device, []).append(error.figure)
    links = [figure.replace("…", "12GB/s") for figure in figures.pop(None, ())]
    examples: dict[str, str] = {}  # one of each kind of device
    for device, names in figures.items():
        if device is not None and device.kind not in examples:
            examples[device.kind] = example_with_rates(device, hardware.listed[device], *names)
    card = "name the `accelerator` if the catalogue has it, " if set(examples) - {CPU.kind, DISK.kind} else ""
    written = " and ".join(f"`{entry}`" for entry in [*examples.values(), *links])
    return f"{card}write (for example) {written}, or take what `devmap probe --measure` finds"


def missing_in_words(missing: Mapping[Phase, tuple[MissingFigureError, ...]]) -> str:
    """Return a sentence about the times that are not predicted, and the missing figures of the machine."""
    # A prefill needs all figures of a token, and more.
    figures = figures_in_words(missing.get("prefill") or missing["decode"])
    unit = "no time" if "decode" in missing else f"no time of {UNITS['prefill']}"
    named = " and ".join(filter(None, (", ".join(figures[:-1]), figures[-1])))
    return f"without {named}, {unit} is predicted"


def bases_in_words(bases: Mapping[Phase, TimeBasis], prediction: Prediction) -> str:
    """Return a sentence about the basis of the predicted times, and the range of measured runs."""
    rates = {UNITS[phase]: basis.rates for phase, basis in bases.items()}
    if len(set(rates.values())) == 1:
        sentence = f"these times rest on {next(iter(rates.values()))} rates"
    else:
        sentence = ", ".join(f"{unit} rests on {basis} rates" for unit, basis in rates.items())
    kinds = {basis.kind for basis in bases.values()}
    kind = kinds.pop() if len(kinds) == 1 else None
    ratios = []
    for phase, basis in bases.items():
        least, most, predicted = basis.least_nanoseconds, basis.most_nanoseconds, getattr(prediction, OWN[phase])
        if least is None or most is None:
            continue
        always = " (always slower)" if least > predicted else " (always faster)" if most < predicted else ""
        ratios.append(f"{format_ratios(least, most, predicted)} for {UNITS[phase]}{always}")
    if not ratios:
        return f"{sentence}; no run with {kind} was compared with such a prediction" if kind else sentence
    # Not as times: the prediction itself need not be between them, which would read as a contradiction.
    listed = ", ".join(ratios).replace(" times", " times the prediction", 1)
    runs = f"runs with {kind}" if kind else "runs"
    return f"{sentence}; measured {runs} took {listed}"


def _fastest(nanoseconds: int | None, own_nanoseconds: int) -> str:
    """Return a note on the fastest plan's time, if it differs in the digits that are printed."""
    duration = "" if nanoseconds is None else format_duration(nanoseconds)
    return f"the fastest plan takes {duration}" if duration not in ("", format_duration(own_nanoseconds)) else ""


def _in_parentheses(*phrases: str) -> str:
    notes = "; ".join(phrase for phrase in phrases if phrase)
    return f" ({notes})" if notes else ""
