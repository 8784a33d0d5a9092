"""Fits factors of rates to times: by least squares of the logarithms of predicted over measured.

Thus a relative error counts the same for short and long times, and no rate becomes negative. Times may not determine
all rates: rates that they cannot separate share one factor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from devmap_config.hardware.scaling import rate_names, scaled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import numpy as np

    from devmap_config.hardware.inventory import Inventory
    from devmap_config.hardware.scaling import RateName

    LogTimes = Callable[[np.ndarray], np.ndarray]

LEAST_SENSITIVITY = 0.01
"""A rate is left unchanged if no time depends on it by more than this: if doubling it shortens no time by a
hundredth.
"""

LEAST_SINGULAR_VALUE = 0.1
"""Factors are fitted separately if an error of 1 % in a time changes none of them by more than 10 %."""

STEPS = 30
HALVINGS = 5
DIFFERENCE = 0.02
"""The change of a rate's logarithm for measuring its effect; it is not smaller because dispatches are whole
nanoseconds.
"""


def fitted(
    inventory: Inventory, times: Sequence[Callable[[Inventory], int]], measured_nanoseconds: Sequence[float]
) -> tuple[Inventory, dict[tuple[RateName, ...], float]]:
    """Return the machine with fitted rates, and the factors by which they differ from the known ones.

    The grouping is done twice, for the known rates and for the fitted ones, as a time may then depend on other rates.

    Args:
        inventory: the machine with the known rates.
        times: functions that return the nanoseconds of a run on a machine.
        measured_nanoseconds: the measured nanoseconds of each run.
    """
    import numpy as np

    names, measured = rate_names(inventory), np.array([math.log(time) for time in measured_nanoseconds])

    def machine(changes: np.ndarray, chosen: Iterable[int]) -> Inventory:
        return scaled(inventory, {names[place]: float(np.exp(changes[place])) for place in chosen})

    def log_times(changes: np.ndarray) -> np.ndarray:
        everywhere = machine(changes, range(len(names)))
        return np.array([math.log(max(time(everywhere), 1)) for time in times])

    changes = np.zeros(len(names))
    groups: list[list[int]] = []
    for _ in range(2):
        groups = _groups(_effects(log_times, changes, np.eye(len(names))), names)
        if not groups:
            return inventory, {}
        together = np.array([[place in group for group in groups] for place in range(len(names))], dtype=float)
        changes = together @ _solved(log_times, measured, together, changes @ together / together.sum(axis=0))
    factors = {tuple(names[place] for place in group): float(np.exp(changes[group[0]])) for group in groups}
    return machine(changes, [place for group in groups for place in group]), factors


def _effects(log_times: LogTimes, changes: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Return the change of each time along each direction, both as logarithms."""
    import numpy as np

    half = DIFFERENCE / 2
    slopes = [
        log_times(changes + half * direction) - log_times(changes - half * direction) for direction in directions.T
    ]
    return np.stack(slopes, axis=1) / DIFFERENCE


def _groups(effects: np.ndarray, names: Sequence[RateName]) -> list[list[int]]:
    """Return the groups of rates that share a factor: as many groups as these effects can separate."""
    import numpy as np

    used = [place for place in range(len(names)) if np.abs(effects[:, place]).max() >= LEAST_SENSITIVITY]
    groups = [used] if used else []
    for apart in _splits(names) if used else ():
        parts = (
            [place for place in group if (place in apart) == inside] for group in groups for inside in (True, False)
        )
        finer = [part for part in parts if part]
        columns = np.stack([effects[:, part].sum(axis=1) for part in finer], axis=1)
        if len(finer) <= len(effects) and np.linalg.svd(columns, compute_uv=False)[-1] >= LEAST_SINGULAR_VALUE:
            groups = finer
    return groups


def _splits(names: Sequence[RateName]) -> Iterator[set[int]]:
    """Yield candidates for a factor of their own, the most useful first: rates of computing, reading, dispatching;
    single rates.
    """
    kinds = ("flops_per_second", "attention_per_second"), ("bytes_per_second",), ("dispatch",)
    yield from ({place for place, name in enumerate(names) if name.name.endswith(kind)} for kind in kinds)
    yield from ({place} for place in range(len(names)))


def _solved(log_times: LogTimes, measured: np.ndarray, together: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Return the logarithms of the factors with the smallest errors, by Gauss-Newton steps from given ones."""
    import numpy as np

    def off(factors: np.ndarray) -> np.ndarray:
        return measured - log_times(together @ factors)

    best = off(factors)
    for _ in range(STEPS):
        effects = _effects(log_times, together @ factors, together)
        step = np.clip(np.linalg.lstsq(effects, best, rcond=LEAST_SENSITIVITY)[0], -1, 1)
        for _ in range(HALVINGS):
            if (after := off(factors + step)) @ after < best @ best:
                break
            step = step / 2
        else:
            break
        factors, best = factors + step, after
    return factors
