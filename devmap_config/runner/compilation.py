"""Makes a model decode with compiled code, which transformers generates for a static cache, if that was tested."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from devmap_config.amounts import format_bytes
from devmap_config.devices import COMPILING_KIND, CPU
from devmap_config.libraries.torch import finds_cpp_compiler
from devmap_config.libraries.transformers import compiles_generation, compiling_on_a_cpu
from devmap_config.runner.loading import RunnerError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from devmap_config.graph.loading import LoadedModel
    from devmap_config.plan.plan import Plan
    from devmap_config.profile.schema import Workload

DTYPE_ON_A_CPU = "float32"
"""The dtype in which compiled code gives the tokens of the plain model on a CPU; in bfloat16 it rounds differently."""


def require_compilable(plan: Plan, model: LoadedModel, workload: Workload | None) -> None:
    """Check, before a model is loaded, that compiled code was tested to be correct and faster on the devices of its
    plan.

    Raises:
        RunnerError: if it was not, or the compiler for a CPU is not installed.
    """
    holding = [use for use in plan.devices if use.weights_bytes]
    is_on_cpu = plan.main_device == CPU and [use.id for use in holding] == [CPU]
    elsewhere = [use for use in holding if use.id.kind != COMPILING_KIND]
    if elsewhere and not is_on_cpu:
        held = " and ".join(f"{format_bytes(use.weights_bytes)} on {use.id}" for use in elsewhere)
        has_card = any(use.id.kind == COMPILING_KIND for use in plan.devices)
        raise _refusal(f"the plan has {held}, {SEEN}", ON_ONE_CARD if has_card else NOT_COMPILED)
    if len(holding) > 1:
        cards = " and ".join(str(use.id) for use in holding)
        raise _refusal(f"the plan spreads it over {cards}, {SEEN}", ON_ONE_CARD)
    if is_on_cpu and (model.dtype != DTYPE_ON_A_CPU or model.quantization is not None):
        how = "quantised" if model.quantization is not None else f"in {model.dtype}"
        raise _refusal(f"the plan has it {how} on the CPU, {SEEN}", NOT_COMPILED)
    if workload is None or workload.cache.implementation != "static":
        raise _refusal(
            "the plan has no room for a static cache", "write `workload: {cache: static}`, and compile again"
        )
    if is_on_cpu:
        _require_cpp_compiler()


def compile_decoding(model: PreTrainedModel) -> None:
    """Have `generate` use a static cache, and compile decoding at the first call.

    Raises:
        RunnerError: if transformers would not compile this model.
    """
    if model.can_generate() and model.device.type == CPU.kind:
        model.generation_config.compile_config = compiling_on_a_cpu()
    if not (model.can_generate() and compiles_generation(model)):
        raise _refusal("transformers compiles no model of its kind", NOT_COMPILED)
    model.generation_config.cache_implementation = "static"


SEEN = (
    "and compiled code was seen to be right, and faster, of models that are whole on one CUDA card, or in float32 on"
    " the CPU"
)

NOT_COMPILED = "leave out `--compile`, or in Python `compile=True`"
ON_ONE_CARD = f"where one card has room for all of it, `strategy: single` has it there; else {NOT_COMPILED}"


def _require_cpp_compiler() -> None:
    """Check that the compiler that torch needs for a CPU is there; torch would fail with a traceback at the first
    token.
    """
    if not finds_cpp_compiler():
        raise _refusal(
            "torch compiles for a CPU with a C++ compiler, and finds none",
            f"install one (`apt install g++`), or name it by the variable `CXX`; else {NOT_COMPILED}",
        )
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise _refusal(
            "torch compiles for a CPU with Python's header files, which are not installed",
            f"install them (`apt install python3-dev`); else {NOT_COMPILED}",
        )


def _refusal(reason: str, what_to_do: str) -> RunnerError:
    return RunnerError("not-compiled", f"the model is not compiled: {reason}", what_to_do)
