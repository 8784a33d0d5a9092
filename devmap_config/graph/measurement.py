"""Measures a model: runs its own code on tensors without data, and records what each module allocates, computes and
caches.

The model is on a fake CPU: shapes and dtypes are real, but there are no values. Attention is counted as accelerators
compute it (flash, memory-efficient), without the matrix of scores, whatever the CPU's kernels would do. For experts,
transformers chooses the grouped matrix product.
"""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from devmap_config.graph.costs import (
    CROSSING_FIELDS,
    PARTLY,
    WORK,
    Crossing,
    Measurement,
    MediaUse,
    ModuleCost,
    Positions,
    WorkloadShape,
)
from devmap_config.graph.failures import (
    MeasurementFailure,
    MissingSizeError,
    NoMediaError,
    OtherInputsError,
    PromptTooShortError,
    UnfitCacheError,
    failure_of,
)
from devmap_config.graph.features import media_of
from devmap_config.graph.forwards import Forwards, cache_tensors
from devmap_config.graph.key_values import layer_filled, offloaded_tensors, require_fit
from devmap_config.graph.known_values import knowing_values
from devmap_config.graph.model import ancestors
from devmap_config.graph.positions import SHORT_LENGTH, PositionReads, end_of_positions, stated_lengths, trained_length
from devmap_config.graph.recording import Meter, OperationBudget, Traffic, replace_tensors, shown_bytes, total_bytes
from devmap_config.graph.repetition import NotAlikeError, Repetition, kinds_left, kinds_of, moved_to, spread
from devmap_config.libraries.torch import tensors_without_data
from devmap_config.stages import begin

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedModel

    from devmap_config.graph.model import ModelGraph
    from devmap_config.graph.repetition import Kind


LOGGER = logging.getLogger(__name__)


class UnmeasurableModelError(Exception):
    """The model could not be run without data.

    Attributes:
        failure: the reason, and whether the model's code, a library or this package caused it.
        positions: the length of context that the model takes, as far as it is known.
    """

    def __init__(self, failure: MeasurementFailure, positions: Positions) -> None:
        self.failure = failure
        self.positions = positions
        super().__init__(failure.reason)


def measure(model: PreTrainedModel, graph: ModelGraph, workload: WorkloadShape) -> Measurement:
    """Measure the costs of running a model that was built on the meta device.

    The model is unusable afterwards, because its tensors are fake. A context beyond the end of the model's positions is
    not measured; the result then contains only that end.

    Args:
        model: the model.
        graph: its module tree, whose blocks' crossings are recorded.
        workload: batch, prompt and context, in sequences and tokens.

    Returns:
        Bytes and operations for each module, in one prefill and in one step of decoding.

    Raises:
        UnmeasurableModelError: if the model's code needs values or other inputs than tokens, if a library has changed,
            or if this package makes a mistake.
    """
    begin("measure", f"measuring {type(model).__name__} at {workload.context_length:,} tokens")
    model.eval()
    positions = Positions()
    try:
        positions = Positions(trained=trained_length(model.config))
        require_fit(model, workload)
        with torch.no_grad(), tensors_without_data(), OperationBudget().within():
            names = {id(module): path for path, module in model.named_modules()}
            weights = replace_tensors(model)
            traffic = partial(Traffic, dict.fromkeys(graph.blocks), frozenset(graph.skip_keys))
            runner = partial(_Runner, names, weights, traffic)
            alike = kinds_of(model, graph.blocks)
            reads = partial(PositionReads, weights, stated_lengths(model.config))
            end = _end_of_positions(partial(runner, Forwards(model, SHORT)), alike, reads)
            positions = replace(positions, end=end)
            if end is not None and end < max(workload.context_length, workload.prompt_length):
                reason = f"its positions end at {end:,} tokens"
                return Measurement(workload, (), measured=False, reason=reason, positions=positions)
            within = workload.decoding_before(end)
            alike = () if Forwards(model, within).makes_cache else alike
            if workload.holds_text_alone:
                measurement = _measured(partial(runner, Forwards(model, within)), alike)
            else:
                measurement = _measured_with_media(model, within, runner, alike)
    except UnfitCacheError as error:
        reason = str(error)
        return Measurement(workload, (), measured=False, reason=reason, positions=positions, has_unfit_cache=True)
    except Exception as error:  # a model's own code may raise anything without data
        LOGGER.debug("%s could not be run without data", type(model).__name__, exc_info=True)
        raise UnmeasurableModelError(failure_of(error), positions) from error
    if measurement.workload != workload:
        measurement = replace(measurement.at(workload.context_length), workload=workload)
    return replace(measurement, positions=positions)


SHORT = WorkloadShape(batch_size=1, context_length=SHORT_LENGTH, prompt_length=SHORT_LENGTH)


def _end_of_positions(
    runner: Callable[[tuple[Kind, ...]], _Runner], kinds: tuple[Kind, ...], reads: Callable[[], PositionReads]
) -> int | None:
    """Return the number of positions that the model has, found by running it; `None` if it cannot be run.

    The first attempt runs two blocks of each kind only, the second all blocks.
    """

    def run(length: int, reads: PositionReads, kinds: tuple[Kind, ...]) -> None:
        with reads:
            runner(kinds).prefill(length)

    for spared in dict.fromkeys((kinds, ())):
        with suppress(Exception):
            return end_of_positions(partial(run, kinds=spared), reads)
    return None


def _measured(runner: Callable[[tuple[Kind, ...]], _Runner], kinds: tuple[Kind, ...]) -> Measurement:
    """Measure a run in which alike blocks repeat each other; if that fails, a run of all blocks."""
    while kinds:
        try:
            return runner(kinds).measurement()
        except NotAlikeError as error:
            kinds = kinds_left(kinds, error)
        except Exception:  # a real failure recurs when all blocks run
            kinds = ()
    return runner(()).measurement()


def _measured_with_media(
    model: PreTrainedModel, workload: WorkloadShape, runner: Callable[..., _Runner], kinds: tuple[Kind, ...]
) -> Measurement:
    """Measure with images and sound; if that fails, with as many tokens of text."""
    try:
        with knowing_values():
            media = media_of(model, workload)
            measurement = _measured(partial(runner, Forwards(model, workload, media)), kinds)
            _require_looked_at(measurement)
            return replace(measurement, media=MediaUse(sum(medium.placeholders for medium in media)))
    except NoMediaError as error:
        media_use = MediaUse(problem="none", reason=str(error))
    except MissingSizeError as error:
        media_use = MediaUse(problem="size", reason=str(error))
    except PromptTooShortError as error:
        media_use = MediaUse(error.placeholders, "room", str(error))
    except Exception as error:  # a model's own code may raise anything without data
        if (failure := failure_of(error)).cause != "model":
            raise
        try:
            measurement = _measured(partial(runner, Forwards(model, workload.text_alone)), kinds)
            return replace(measurement, workload=workload, media=MediaUse(problem="untried", reason=failure.reason))
        except Exception as of_text:
            if failure_of(of_text).cause != "model":
                raise
        raise  # the error with media says more than the one with text alone
    return Measurement(workload, (), measured=False, reason=media_use.reason, media=media_use)


def _require_looked_at(measurement: Measurement) -> None:
    """Check that some modules ran only for images and sound: modules that do not run for each token."""
    if all(cost.decode_launches for cost in measurement.modules if cost.prefill_launches):
        raise OtherInputsError("its code does not look at what it is given")


@dataclass
class _Runner:
    """Runs prefill and one decode step of a model whose tensors are fake, and adds up the costs by module."""

    names: dict[int, str]
    weights: tuple[torch.Tensor, ...]
    traffic: Callable[[], Traffic]
    forwards: Forwards
    kinds: tuple[Kind, ...]
    costs: dict[str, dict[str, int]] = field(default_factory=dict)

    def measurement(self) -> Measurement:
        workload = self.forwards.workload
        order: dict[str, None] = {}
        decodes = []
        for length in dict.fromkeys((workload.prompt_length, workload.context_length)):
            recorder, cache = self.prefill(length)
            order |= recorder.order
            if length == workload.prompt_length:
                self.add_peaks(recorder, "prefill")
                self.add_work("prefill", recorder)
                prefilled = recorder.traffic
            if length == workload.context_length:
                self.add_cache(recorder, cache_tensors(cache))
                self.add_offloaded(recorder, offloaded_tensors(cache, workload))
                self.require_layers_told()
                decoded = self.traffic()
            if cache_bytes := total_bytes(cache_tensors(cache)):
                recorder, grown = self.run(self.forwards.decode_inputs(cache), cache)
                order |= recorder.order
                decodes.append(recorder)
                if length == workload.context_length:
                    self.add_peaks(recorder, "decode")
                    self.add_growth(recorder, cache_tensors(grown), cache_bytes)
                    decoded = recorder.traffic
        if decodes:  # the work of a token is the mean of the first after the prompt and the last of the context
            self.add_work("decode", *decodes)
        self.add_doubled()
        pairs = dict.fromkeys([*prefilled.crossings, *decoded.crossings])
        crossings = tuple(_crossing(pair, prefilled.crossings, decoded.crossings) for pair in pairs)
        bonds = tuple(dict.fromkeys([*prefilled.bonds, *decoded.bonds]))
        position = {path: place for place, path in enumerate(order)}
        modules = sorted(self.costs, key=lambda path: position.get(path, -1))
        costs = tuple(ModuleCost(path=path, **self.costs[path]) for path in modules)
        return Measurement(workload, costs, crossings, bonds)

    def prefill(self, length: int) -> tuple[Meter, Any]:
        recorder, cache = self.run(self.forwards.prefill_inputs(length), None)
        serials = (recorder.serial_of(tensor) for tensor in cache_tensors(cache))
        recorder.kept = frozenset(serial for serial in serials if serial is not None)
        return recorder, cache

    def run(self, inputs: dict[str, Any], cache: Any) -> tuple[Meter, Any]:
        model, recorder = self.forwards.model, Meter(self.names, self.weights, self.traffic())
        recorder.watch_for_release(cache_tensors(cache))
        repetition = Repetition(recorder, self.kinds)
        with recorder.watching(model), repetition.within(model):
            returned = self.forwards.run(inputs)
        repetition.complete(cache_tensors(returned))
        recorder.order = _whole_order(recorder.order, recorder.repeated)
        return recorder, returned

    def add_cache(self, recorder: Meter, tensors: list[torch.Tensor]) -> None:
        """Record the bytes of the cache by the module that made them, and the bytes that its storages retain beyond
        those.
        """
        storages: dict[int, tuple[str, int]] = {}
        elements_bytes: dict[str, int] = {}
        for tensor in tensors:
            serial = recorder.serial_of(tensor)
            module = recorder.maker.get(serial or -1, "")
            elements_bytes[module] = elements_bytes.get(module, 0) + shown_bytes(tensor)
            storages[serial or -1] = (module, tensor.untyped_storage().nbytes())
        held = {
            module: sum(held_bytes for made_by, held_bytes in storages.values() if made_by == module)
            for module in elements_bytes
        }
        for module, size_bytes in spread(elements_bytes, recorder.repeated).items():
            self.cost(module)["cache_bytes"] = size_bytes
        for module, size_bytes in spread(held, recorder.repeated).items():
            self.cost(module)["retained_bytes"] = max(size_bytes - self.cost(module)["cache_bytes"], 0)

    def add_offloaded(self, recorder: Meter, layers: list[list[torch.Tensor]]) -> None:
        """Record the offloaded bytes of the cache by the module that made them."""
        sizes: dict[str, list[int]] = {}
        for tensor in (tensor for tensors in layers for tensor in tensors):
            module = recorder.maker.get(recorder.serial_of(tensor) or -1, "")
            sizes.setdefault(module, []).append(shown_bytes(tensor))
        for figure, of in (("offloaded_bytes", sum), ("offloaded_largest_bytes", max)):
            by_module = {module: of(module_sizes) for module, module_sizes in sizes.items()}
            for module, size_bytes in spread(by_module, recorder.repeated).items():
                self.cost(module)[figure] = size_bytes

    def require_layers_told(self) -> None:
        """Check that the layer of the cache is known for every module whose part may be offloaded by itself.

        Raises:
            UnfitCacheError: if one is unknown, or two modules fill the same layer.
        """
        if self.forwards.workload.cache != PARTLY:
            return
        filling = [path for path, cost in self.costs.items() if cost.get("offloaded_bytes")]
        layers = [layer_filled(self.forwards.model, path) for path in filling]
        if len(set(layers)) < len(layers):
            raise UnfitCacheError("several of its modules fill one layer of it")

    def add_peaks(self, recorder: Meter, phase: str) -> None:
        """Replay allocations and releases except those of the cache, and record the peak of each module."""
        live = 0
        for event in recorder.allocations:
            if event.storage in recorder.kept:
                continue
            live += event.size_bytes
            for module in dict.fromkeys(event.running or ("",)):
                self.raise_to(module, f"{phase}_peak_bytes", live)
            self.raise_to(event.running[-1] if event.running else "", "own_peak_bytes", live)

    def raise_to(self, module: str, figure: str, size_bytes: int) -> None:
        cost = self.cost(module)
        cost[figure] = max(cost.get(figure, 0), size_bytes)

    def add_doubled(self) -> None:
        """Record the peaks and the cache of a prefill of twice the length, from which other lengths are
        extrapolated.
        """
        doubled = self.doubled()
        for path, cost in self.costs.items():
            seen = doubled.get(path, {})
            for phase, figure in (("prefill", "doubled_peak_bytes"), ("own", "doubled_own_peak_bytes")):
                # If it cannot be run, peaks are assumed to grow with the square of the length, like the matrix of
                # scores.
                once = cost.get(f"{phase}_peak_bytes", 0)
                cost[figure] = max(seen.get(f"{phase}_peak_bytes", 4 * once), once)
            once = cost.get("cache_bytes", 0)
            grown = cost.get("cache_bytes_per_token", 0) * self.forwards.workload.context_length
            prefilled_whole = self.forwards.workload.prompt_length == self.forwards.workload.context_length
            cost["doubled_cache_bytes"] = max(seen.get("cache_bytes", 0) if prefilled_whole else once + grown, once)

    def doubled(self) -> dict[str, dict[str, int]]:
        """Return the costs of a prefill of twice the length; empty if it cannot be run."""
        costs, self.costs = self.costs, {}
        try:
            recorder, cache = self.prefill(2 * self.forwards.workload.prompt_length)
            self.add_peaks(recorder, "prefill")
            self.add_cache(recorder, cache_tensors(cache))
        except NotAlikeError:
            raise
        except Exception:  # the model may not have enough positions
            self.costs = {}
        doubled, self.costs = self.costs, costs
        return doubled

    def add_work(self, phase: str, *recorders: Meter) -> None:
        """Record the mean work over the recorders; blocks that were not run get that of the block they repeat."""
        for figure in (*WORK, "input_bytes", "output_bytes"):
            total: Counter[str] = Counter()
            for recorder in recorders:
                counted = getattr(recorder.traffic if figure.startswith(("input", "output")) else recorder, figure)
                total.update(spread(counted, recorder.repeated))
            for module, count in total.items():
                self.cost(module)[f"{phase}_{figure}"] = count // len(recorders)

    def add_growth(self, recorder: Meter, tensors: list[torch.Tensor], bytes_before: int) -> None:
        """Record the bytes that a token adds to the cache, by the module that made them or in proportion to the
        cache.
        """
        growth = total_bytes(tensors) - bytes_before
        shown: dict[str, int] = {}
        for tensor in tensors:
            if (serial := recorder.serial_of(tensor)) is not None:
                module = recorder.maker[serial]
                shown[module] = shown.get(module, 0) + shown_bytes(tensor)
        added = {module: size_bytes - self.cost(module).get("cache_bytes", 0) for module, size_bytes in shown.items()}
        if sum(added.values()) != growth or any(size_bytes < 0 for size_bytes in added.values()):
            if recorder.repeated:
                raise NotAlikeError("the cache does not tell what a block adds to it")
            shares = {path: cost["cache_bytes"] for path, cost in self.costs.items() if cost.get("cache_bytes")}
            added = {path: growth * share // sum(shares.values()) for path, share in shares.items()}
        for module, size_bytes in spread(added, recorder.repeated).items():
            self.cost(module)["cache_bytes_per_token"] = size_bytes

    def cost(self, module: str) -> dict[str, int]:
        return self.costs.setdefault(module, {})


def _whole_order(order: Mapping[str, None], repeated: Mapping[str, str]) -> dict[str, None]:
    """Return the order in which all modules would have run, including those of blocks that were not run."""
    ran: dict[str, list[str]] = {}
    for path in order:
        for block in (path, *ancestors(path)):
            ran.setdefault(block, []).append(path)
    return {
        moved_to(member, repeated[path], path) if path in repeated else member: None
        for path in order
        for member in (ran[repeated[path]] if path in repeated else [path])
    }


def _crossing(
    pair: tuple[str, str],
    prefilled: Mapping[tuple[str, str], tuple[int, int]],
    decoded: Mapping[tuple[str, str], tuple[int, int]],
) -> Crossing:
    figures = (*prefilled.get(pair, (0, 0)), *decoded.get(pair, (0, 0)))
    return Crossing(**dict(zip(CROSSING_FIELDS, (*pair, *figures), strict=True)))  # type: ignore[arg-type]
