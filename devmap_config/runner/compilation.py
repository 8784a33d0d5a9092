"""Has a model that is whole on a card decode by compiled code, which transformers makes for a static cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    stores = dict.fromkeys(each.location for each in plan.assignments)
    if {(location.stored_on.kind, location.is_one_device) for location in stores} != {(COMPILING_KIND, True)}:
        raise _refusal("the plan does not have all of the model on CUDA cards", NOT_COMPILED)
    if len(stores) > 1:
        raise _refusal("the plan spreads it over several cards", "`strategy: single` has it on one")
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


NOT_COMPILED = "leave out `--compile`, or in Python `compile=True`"


def _refusal(reason: str, what_to_do: str) -> RunnerError:
    return RunnerError("not-compiled", f"the model is not compiled: {reason}", what_to_do)
