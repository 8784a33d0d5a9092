"""A mixed-integer linear program in whole numbers, and its solution by HiGHS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import highspy
import numpy as np

RELATIVE_GAP = 5e-4
"""HiGHS stops when the gap between its incumbent and its bound is at most this part."""

ABSOLUTE_GAP = 0.99
"""HiGHS also stops when the gap is less than one, as objectives are whole numbers."""

MOST_NODES = 1_500
"""The most nodes of HiGHS's search tree, a limit that is the same on every machine. After it, the remaining gap is
stated.
"""

TOLERANCE = 1e-7
"""The part by which HiGHS may violate a constraint, or a value differ from a whole number."""

INFINITY = highspy.kHighsInf

Terms = Mapping[int, int]
"""A linear expression: the coefficients by variable."""


@dataclass(frozen=True, slots=True)
class Solution:
    """The incumbent, if any, as a whole number for each variable, and a lower bound of the objective."""

    values: tuple[int, ...] | None
    bound: float


@dataclass(frozen=True, slots=True)
class Constraint:
    """A constraint that an expression is at most a number, or equal to it."""

    terms: Terms
    most: int
    is_equality: bool

    @property
    def scale(self) -> int:
        """The divisor of the coefficients, so that the solver's tolerance is relative to the largest."""
        return max(abs(self.most), *map(abs, self.terms.values()), 1)


@dataclass
class Milp:
    """A program: variables, each from 0 to an upper limit, and constraints."""

    upper: list[int] = field(default_factory=list)
    is_integer: list[bool] = field(default_factory=list)
    constraints: list[Constraint] = field(default_factory=list)

    def variable(self, most: int, *, is_integer: bool = True) -> int:
        """Add a variable and return its number."""
        self.upper.append(most)
        self.is_integer.append(is_integer)
        return len(self.upper) - 1

    def switch(self) -> int:
        """Add a binary variable."""
        return self.variable(1)

    def at_most(self, terms: Terms, most: int) -> None:
        """Add the constraint that an expression is at most this."""
        self.constraints.append(Constraint(terms, most, is_equality=False))

    def equal(self, terms: Terms, value: int) -> None:
        """Add the constraint that an expression is equal to this."""
        self.constraints.append(Constraint(terms, value, is_equality=True))

    def copy(self) -> Milp:
        """Return a copy that can be extended."""
        return Milp(list(self.upper), list(self.is_integer), list(self.constraints))

    def minimize(self, objective: Terms, *, relative_gap: float = RELATIVE_GAP, nodes: int = MOST_NODES) -> Solution:
        """Minimise with HiGHS, on one thread and with a fixed seed, so that the result is deterministic.

        Args:
            objective: the expression.
            relative_gap: the part by which the incumbent may exceed the bound.
            nodes: the most nodes of the tree that are searched.
        """
        scale = max([1, *map(abs, objective.values())])
        solver = _QuietHighs()
        options: dict[str, bool | float | str] = {
            "threads": 1, "random_seed": 0, "mip_rel_gap": relative_gap, "mip_abs_gap": ABSOLUTE_GAP / scale,
            "mip_max_nodes": nodes, "presolve": "off",  # presolving sometimes takes minutes
            "mip_feasibility_tolerance": TOLERANCE, "primal_feasibility_tolerance": TOLERANCE,
        }  # fmt: skip
        for name, value in options.items():
            solver.setOptionValue(name, value)
        solver.passModel(self._model(objective, scale))
        solver.run()
        info = solver.getInfo()
        if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
            return Solution(None, INFINITY)
        is_found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
        values = tuple(np.rint(solver.getSolution().col_value).astype(int).tolist()) if is_found else None
        return Solution(values, info.mip_dual_bound * scale)

    def _model(self, objective: Terms, scale: int) -> highspy.HighsLp:
        model, rows = highspy.HighsLp(), self.constraints
        scales = [row.scale for row in rows]
        model.num_col_, model.num_row_ = len(self.upper), len(rows)
        model.col_cost_ = np.array([objective.get(variable, 0) / scale for variable in range(len(self.upper))])
        model.col_lower_, model.col_upper_ = np.zeros(len(self.upper)), np.array(self.upper, float)
        model.row_upper_ = np.array([row.most / scale for row, scale in zip(rows, scales, strict=True)])
        is_equality = np.array([row.is_equality for row in rows])
        model.row_lower_ = np.where(is_equality, model.row_upper_, -INFINITY)
        kinds = {True: highspy.HighsVarType.kInteger, False: highspy.HighsVarType.kContinuous}
        model.integrality_ = [kinds[is_integer] for is_integer in self.is_integer]
        matrix = model.a_matrix_
        matrix.format_ = highspy.MatrixFormat.kRowwise
        matrix.start_ = np.cumsum([0, *(len(row.terms) for row in rows)], dtype=np.int32)
        matrix.index_ = np.array([variable for row in rows for variable in row.terms], np.int32)
        matrix.value_ = np.array(
            [value / scale for row, scale in zip(rows, scales, strict=True) for value in row.terms.values()]
        )
        return model


class _QuietHighs(highspy.Highs):
    """HiGHS without output: it prints a banner when callbacks are enabled, before its options can be set."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def enableCallbacks(self) -> None:  # noqa: N802
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()  # type: ignore[no-untyped-call]
