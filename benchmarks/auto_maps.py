"""Dry-runs transformers' `auto` map of every causal language model on simulated accelerators, to find maps that do not
run.

Each type is built from its default config with few layers, planned by transformers' `device_map="auto"` for two cards,
of which neither holds it all, and run by that map, through accelerate's hooks. What does not run is told apart from
what cannot be told: code that looks at data.

    python benchmarks/auto_maps.py > benchmarks/auto_maps.md
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from transformers.integrations.accelerate import _get_device_map, expand_device_map

from devmap_config.devices import Device
from devmap_config.execution.assignment import Assignment
from devmap_config.execution.executor import Executor
from devmap_config.graph.introspection import graph_of
from devmap_config.plan.plan import Plan, device_uses
from devmap_config.simulate.dry_run import dry_run

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import zoo

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from devmap_config.graph.model import ModelGraph, TensorName
    from devmap_config.simulate.simulation import DeviceMismatch, Simulation

CARDS = 2

FLOAT32_ONLY = ("xlnet",)
"""Its attention mask is made in float32, whatever the model's dtype."""


@dataclass(frozen=True, slots=True)
class Trial:
    """The dry run of a type's map, or the reason why there is no map."""

    model_type: str
    class_name: str
    is_split: bool
    simulation: Simulation


def trial_of(model_type: str) -> Trial | None:
    """A type's map by `auto`, dry-run; `None` where transformers does not build it from a default config.

    Raises:
        Exception: whatever transformers' planner stumbles over.
    """
    dtype = "float32" if model_type in FLOAT32_ONLY else "bfloat16"
    try:
        model = zoo.build_shallow(model_type, dtype)
    except Exception:  # an optional package that is missing, or a default config that is not valid
        return None
    graph = graph_of(model, getattr(torch, dtype))
    card_bytes = max(int(0.75 * graph.size_bytes), int(1.2 * _largest_block_bytes(graph)))
    budget = dict.fromkeys(range(CARDS), card_bytes) | {"cpu": 4 * graph.size_bytes}
    device_map = _get_device_map(model, "auto", budget, None)
    plan = plan_by(device_map, graph, {_device(key): size for key, size in budget.items()})
    simulation = dry_run(zoo.build_shallow(model_type, dtype), graph, plan)
    return Trial(model_type, type(model).__name__, len(set(device_map.values())) > 1, simulation)


def plan_by(device_map: Mapping[str, int | str], graph: ModelGraph, capacities: Mapping[Device, int]) -> Plan:
    """Return a map as a plan, each key a unit, as accelerate attaches hooks.

    Tensors that no key covers are on the CPU.
    """
    homes = expand_device_map(dict(device_map), list(graph.tensors))
    held: dict[str, list[TensorName]] = {key: [] for key in device_map}
    bare: list[TensorName] = []
    for name in graph.tensors:
        key = max((key for key in device_map if name == key or name.startswith(f"{key}.") or not key), default=None)
        (bare if key is None else held[key]).append(name)
    placed = [(key, tuple(names), _device(device_map[key])) for key, names in held.items()]
    placed += [(name, (name,), _device(homes[name])) for name in bare]
    executor = Executor()
    main_device = executor.main_device(device for _, _, device in placed)
    assignments = tuple(
        Assignment(unit, names, executor.location(device, main_device)) for unit, names, device in placed
    )
    uses = device_uses(graph, assignments, capacities, executor)
    return Plan(strategy="auto", executor=executor, main_device=main_device, assignments=assignments, devices=uses)


def _largest_block_bytes(graph: ModelGraph) -> int:
    return max(
        graph.weights_bytes(tuple(tensor.name for tensor in graph.modules[path].tensors())) for path in graph.blocks
    )


def _device(key: int | str) -> Device:
    return Device("cuda", key) if isinstance(key, int) else Device(key)


# What is shown


def lines(trials: list[Trial], crashed: Mapping[str, str], unbuilt: int) -> Iterator[str]:
    """Return the findings as Markdown."""
    by_outcome = {
        outcome: [trial for trial in trials if trial.simulation.outcome == outcome]
        for outcome in ("runs", "mismatch", "unsimulated")
    }
    yield "# Maps by `auto` that do not run"
    yield ""
    made_by = f"transformers {version('transformers')}, accelerate {version('accelerate')}; `make benchmark-auto-maps`"
    counts = {outcome: len(found) for outcome, found in by_outcome.items()}
    split = sum(trial.is_split for trial in trials)
    yield f"{made_by}. On {CARDS} cards, of {len(trials) + len(crashed)} causal language models"
    yield f"({unbuilt} others do not build by default) the planner splits {split} and crashes on {len(crashed)};"
    yield f"{counts['runs']} maps run, {counts['mismatch']} do not, and of {counts['unsimulated']} it cannot be told."
    yield ""
    yield "| type | class | fails in | operation | tensors |"
    yield "|---|---|---|---|---|"
    for trial in by_outcome["mismatch"]:
        mismatch = trial.simulation.mismatch
        if mismatch is not None:
            cells = (trial.model_type, f"`{trial.class_name}`", f"`{mismatch.running}`", mismatch.operation)
            yield f"| {' | '.join(cells)} | {_parties(mismatch)} |"
    if not (by_outcome["unsimulated"] or crashed):
        return
    yield ""
    yield "It cannot be told where a model's code looks at data, of which a dry run has none:"
    yield ""
    for trial in by_outcome["unsimulated"]:
        yield f"- {trial.model_type}: {trial.simulation.reason}"
    for model_type, reason in crashed.items():
        yield f"- {model_type}: the planner raises {reason}"


def _parties(mismatch: DeviceMismatch) -> str:
    return ", ".join(
        f"`{party.tensor or party.made_by or 'the model'}` on {party.device}" for party in mismatch.parties
    )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Dry-run transformers' own `auto` maps.")
    parser.add_argument("types", nargs="*", help="model types; every causal language model by default")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    trials, crashed, unbuilt = [], {}, 0
    for model_type in arguments.types or zoo.causal_model_types():
        print(f"trying {model_type}", file=sys.stderr)
        try:
            trial = trial_of(model_type)
        except Exception as error:  # whatever the planner stumbles over
            crashed[model_type] = f"{type(error).__name__}: {error}"[:120]
            continue
        if trial is None:
            unbuilt += 1
        else:
            trials.append(trial)
    for line in lines(trials, crashed, unbuilt):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
