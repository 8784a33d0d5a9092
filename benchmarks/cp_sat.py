"""Solves the placement programs with OR-Tools' CP-SAT, the alternative that `docs/placement.md` compares with HiGHS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ortools.sat.python import cp_model

from devmap_config.placement.milp import ABSOLUTE_GAP, INFINITY, MOST_NODES, RELATIVE_GAP, Solution
from devmap_config.placement.program import HOPS_UNIT

if TYPE_CHECKING:
    from devmap_config.placement.milp import Milp, Terms

DETERMINISTIC_SECONDS_PER_NODE = 0.01
"""CP-SAT's own measure of work, of which a node of HiGHS's tree is allowed so much: the same on every machine."""


def minimize(
    program: Milp, objective: Terms, *, relative_gap: float = RELATIVE_GAP, nodes: int = MOST_NODES
) -> Solution:
    """Return what CP-SAT finds of the least value; it takes and gives what `Milp.minimize` does.

    A variable that need not be whole is whole here: flows are without that, and the cost of hops is rounded up, which
    the bound is lowered by.
    """
    model = cp_model.CpModel()
    variables = [model.new_int_var(0, most, "") for most in program.upper]
    for row in program.constraints:
        expression = sum(value * variables[variable] for variable, value in row.terms.items())
        model.add(expression == row.most if row.is_equality else expression <= row.most)
    model.minimize(sum(value * variables[variable] for variable, value in objective.items()))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.relative_gap_limit = relative_gap
    solver.parameters.absolute_gap_limit = ABSOLUTE_GAP
    solver.parameters.max_deterministic_time = nodes * DETERMINISTIC_SECONDS_PER_NODE
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return Solution(None, INFINITY)
    bound = solver.best_objective_bound - HOPS_UNIT
    is_found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    return Solution(tuple(solver.value(variable) for variable in variables) if is_found else None, bound)
