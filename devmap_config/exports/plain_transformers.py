"""`--to transformers`: makes a map and a Python file that loads by it, with plain transformers and without this
package.
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

from devmap_config.devices import DISK
from devmap_config.diagnostics.diagnostic import Sink
from devmap_config.exports.export import (
    Export,
    as_json,
    check_model_alone,
    from_folder,
    is_local,
    require_no_errors,
    span_of,
    weights_for,
)
from devmap_config.graph.remote_code import class_reference
from devmap_config.plan.plan import NotADeviceMapError, NotForTransformersError
from devmap_config.quantization.registry import transformers_arguments
from devmap_config.runner.caches import LEFT_TO_CALLERS, cache_arguments

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from devmap_config.compiler import Compiled
    from devmap_config.plan.plan import Plan

LOADER = "load_model.py"
DEVICE_MAP = "device_map.json"

PROGRAM = '''\
"""Loads a model by `device_map.json`, in plain transformers. Made by `devmap export` from a lock: export it again."""

import json
from pathlib import Path

import transformers

HERE = Path(__file__).resolve().parent

SOURCE = {source}
ARGUMENTS = {arguments}
QUANTIZATION = {quantization}
GENERATION = {generation}
NEW = {new}  # tensors that are new on purpose, and that no checkpoint holds
MADE_WITH = {made_with}


def load_model(source=SOURCE, **arguments):
    """Return the model; `arguments` are further ones of `from_pretrained`.

    Raises:
        RuntimeError: where the checkpoint lacks tensors, which transformers would fill with random numbers.
    """
    given = {{"device_map": json.loads((HERE / "device_map.json").read_text(encoding="utf-8")), **ARGUMENTS}}
    if QUANTIZATION:
        from transformers.quantizers import AutoQuantizationConfig

        given["quantization_config"] = AutoQuantizationConfig.from_dict(dict(QUANTIZATION))
    model, found = getattr(transformers, {class_name}).from_pretrained(
        source, **{{**given, **arguments, "output_loading_info": True}}
    )
    lacking = set(found["missing_keys"]) | {{mismatch[0] for mismatch in found["mismatched_keys"]}}
    if lacking - set(NEW):
        raise RuntimeError(f"the checkpoint lacks {{sorted(lacking - set(NEW))}}")
    for name, value in GENERATION.items():
        setattr(model.generation_config, name, value)
    return model


if __name__ == "__main__":
    print(json.dumps(load_model().hf_device_map, default=str))
'''


def export_to_transformers(
    compiled: Compiled, folder: Path, *, made_with: Mapping[str, str | None], weights: str | None
) -> Export:
    """Return a plan's map, and the Python file that loads by it.

    Args:
        compiled: the profile with its plan.
        folder: the folder of the files, which paths are relative to.
        made_with: the versions of libraries that the lock was made with.
        weights: the place of the weights, if not the profile's.

    Raises:
        UnfitExportError: if a map cannot express the plan, or the plan needs this package's own executor.
    """
    sink = Sink()
    check_model_alone(compiled, "transformers", sink)
    _check_class(compiled, sink)
    _check_map(compiled, sink)
    source = weights or weights_for(compiled, "transformers", sink)
    require_no_errors(sink, compiled)
    plan, profile = compiled.plan, compiled.loaded.profile
    text = PROGRAM.format(
        source=_source(str(source), folder),
        arguments=_mapping(_arguments(compiled, folder, is_elsewhere=weights is not None)),
        quantization=_expression(_quantization(compiled)),
        generation=repr(
            {} if profile.workload.cache.implementation in LEFT_TO_CALLERS else cache_arguments(profile.workload.cache)
        ),
        new=repr(sorted(compiled.resolution.new)),
        made_with=repr({name: made_with[name] for name in sorted(made_with)}),
        class_name=repr(compiled.model.class_name),
    )
    devices = set(plan.placement.values())
    placement = {"": devices.pop()} if len(devices) == 1 else plan.placement
    return Export(files={LOADER: text, DEVICE_MAP: as_json(placement)}, notes=_notes(plan))


def _check_class(compiled: Compiled, sink: Sink) -> None:
    model = compiled.model
    if class_reference(model.source.config, model.class_name) is not None:
        sink.error(
            "unfit-export",
            f"{model.class_name} is code that comes with the model, which no exported file runs",
            compiled.loaded.profile.model.source.span,
            help="load the profile with `devmap run --trust-remote-code`",
        )


def _check_map(compiled: Compiled, sink: Sink) -> None:
    """Report what a map cannot express. accelerate's hooks need no more memory than our executor."""
    try:
        _ = compiled.plan.device_map
    except NotADeviceMapError as error:
        for finding in error.diagnostics:
            cache = compiled.loaded.profile.workload.cache
            span = span_of(compiled, error.units) if compiled.plan.compute else cache.span
            sink.error("not-a-device-map", finding.message, span, help=finding.help)
    except NotForTransformersError as error:
        for finding in error.diagnostics:
            sink.error("not-a-device-map", finding.message, compiled.loaded.profile.targets.span, help=finding.help)


def _source(weights: str, folder: Path) -> str:
    """Return the Python expression for the weights: a folder relative to the file, or a hub id."""
    if is_local(weights):
        return f"str(HERE / {from_folder(weights, folder)!r})"
    return repr(weights)


def _arguments(compiled: Compiled, folder: Path, *, is_elsewhere: bool) -> dict[str, str]:
    """Return the arguments of `from_pretrained` besides the map, each as a Python expression."""
    model, plan, profile = compiled.model, compiled.plan, compiled.loaded.profile
    arguments = {"dtype": repr(model.dtype), "use_safetensors": "True"}
    if model.attention is not None:
        arguments["attn_implementation"] = repr(model.attention)
    if model.source.commit is not None and not is_elsewhere:
        arguments["revision"] = repr(model.source.commit)
    if any(location.stored_on == DISK for location in plan.locations.values()):
        offload = profile.placement.offload.folder
        path = "offload" if offload.value is None else from_folder(offload.path, folder)
        arguments["offload_folder"] = f"str(HERE / {path!r})"
    if plan.streams_buffers:
        arguments["offload_buffers"] = "True"
    if compiled.resolution.new:
        arguments["ignore_mismatched_sizes"] = "True"
    return arguments


def _expression(value: object) -> str:
    """Return plain data as a Python expression: its `repr`, except for numbers like infinity, whose `repr` is a
    name.
    """
    if isinstance(value, float) and not isfinite(value):
        return f'float("{value}")'
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_expression(key)}: {_expression(item)}' for key, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_expression, value))}]"
    return repr(value)


def _mapping(expressions: Mapping[str, str]) -> str:
    lines = "".join(f"    {name!r}: {expression},\n" for name, expression in expressions.items())
    return f"{{\n{lines}}}"


def _quantization(compiled: Compiled) -> dict[str, Any]:
    own = compiled.loaded.profile.model.quantization.value
    return {} if own is None else transformers_arguments(dict(own))


def _notes(plan: Plan) -> tuple[str, ...]:
    if not (plan.executor.works_ahead and plan.prediction.streamed_bytes_per_token):
        return ()
    return ("plain transformers waits for weights that are copied in or read: it takes longer than predicted",)
