"""Has a model that is whole on a card decode by compiled code, which transformers makes for a static cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devmap_config.amounts import format_bytes
from devmap_config.devices import COMPILING_KIND
from devmap_config.libraries.transformers import compiles_generation
from devmap_config.runner.loading import RunnerError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from devmap_config.plan.plan import Plan
    from devmap_config.profile.schema import Workload


def require_compilable(plan: Plan, workload: Workload | None) -> None:
    """Check, before it is loaded, that a plan has a model where compiled code was seen to be as right and faster.

    Raises:
        RunnerError: if it does not.
    """
    holding = [use for use in plan.devices if use.weights_bytes]
    elsewhere = [use for use in holding if use.id.kind != COMPILING_KIND]
    if elsewhere:
        held = " and ".join(f"{format_bytes(use.weights_bytes)} on {use.id}" for use in elsewhere)
        has_card = any(use.id.kind == COMPILING_KIND for use in plan.devices)
        raise _refusal(f"the plan has {held}, {SEEN}", ON_ONE_CARD if has_card else NOT_COMPILED)
    if len(holding) > 1:
        cards = " and ".join(str(use.id) for use in holding)
        raise _refusal(f"the plan spreads it over {cards}, {SEEN}", ON_ONE_CARD)
    if workload is None or workload.cache.implementation != "static":
        raise _refusal(
            "the plan has no room for a static cache", "write `workload: {cache: static}`, and compile again"
        )


def compile_decoding(model: PreTrainedModel) -> None:
    """Have `generate` make a static cache, and compile what decodes when it is first called.

    Raises:
        RunnerError: if transformers would not compile this model.
    """
    if not (model.can_generate() and compiles_generation(model)):
        raise _refusal("transformers compiles no model of its kind", NOT_COMPILED)
    model.generation_config.cache_implementation = "static"


SEEN = "and compiled code was seen to be right, and faster, of models that are whole on one CUDA card"

NOT_COMPILED = "leave out `--compile`, or in Python `compile=True`"
ON_ONE_CARD = f"where one card has room for all of it, `strategy: single` has it there; else {NOT_COMPILED}"


def _refusal(reason: str, what_to_do: str) -> RunnerError:
    return RunnerError("not-compiled", f"the model is not compiled: {reason}", what_to_do)
