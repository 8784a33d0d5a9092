"""The arguments of `from_pretrained`: those that `load_model` passes on, and those that the profile decides."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from devmap_config.diagnostics.diagnostic import DevmapError, Diagnostic

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.diagnostics.codes import ErrorCode

HUB_ARGUMENTS = frozenset({"cache_dir", "force_download", "local_files_only", "proxies", "token"})
"""Arguments for downloading from the hub, which do not affect the contents of files; those are verified."""

PASSED_ON = HUB_ARGUMENTS | {"disable_mmap", "generation_config", "low_cpu_mem_usage", "tqdm_class", "weights_only"}
"""Arguments that change neither the device nor the values of a tensor."""

DECIDED: Mapping[str, str] = {
    "device_map": "placement` with its `strategy`, `pins` and `device_map",
    "max_memory": "placement.max_memory",
    "offload_folder": "placement.offload.folder",
    "offload_buffers": "placement.offload.buffers",
    "dtype": "model.dtype",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "quantization_config": "model.quantization",
    "load_in_8bit": "model.quantization",
    "load_in_4bit": "model.quantization",
    "revision": "model.revision",
    "code_revision": "model.revision",
    "ignore_mismatched_sizes": "model.allow_new",
    "pretrained_model_name_or_path": "model.source",
    "config": "model.source",
    "state_dict": "model.source",
    "subfolder": "model.source",
    "variant": "model.source",
    "gguf_file": "model.source",
    "key_mapping": "model.source",
    "adapter_kwargs": "model.source",
    "adapter_name": "model.source",
    "tp_plan": "hardware.devices",
    "tp_size": "hardware.devices",
    "device_mesh": "hardware.devices",
    "distributed_config": "hardware.devices",
}
"""Arguments that the plan was made for, with the key of the profile that decides each."""

RULED_OUT: Mapping[str, str] = {
    "experts_implementation": "the plan counts on the implementation that reads the chosen experts alone",
    "fusion_config": "it makes other modules than the plan places",
    "use_kernels": "it runs other code than was measured",
    "kernel_config": "it runs other code than was measured",
    "allow_all_kernels": "it runs other code than was measured",
    "use_safetensors": "weights are verified by the headers of safetensors, and a pickle may run any code",
    "output_loading_info": "`load_model` reads that report itself, and returns the model",
}
"""Arguments without a key in profiles that would make the verified plan untrue, with the reason."""


class ArgumentError(DevmapError, TypeError):
    """`load_model` cannot pass an argument on to `from_pretrained`; `code` is that of the diagnostic."""

    def __init__(self, code: ErrorCode, message: str, help: str) -> None:
        super().__init__(f"{message}: {help}", (Diagnostic.error(code, message, help=help),))
        self.code = code


def require_passable(arguments: Mapping[str, Any]) -> None:
    """Check that arguments may be passed on to `from_pretrained`.

    Raises:
        ArgumentError: if the profile decides an argument (`decided-argument`), or there is none of that name
            (`unknown-argument`).
    """
    for name, value in arguments.items():
        if name in PASSED_ON or (name == "use_safetensors" and value in (None, True)):
            continue
        if name in DECIDED:
            raise ArgumentError(
                "decided-argument",
                f"`{name}` is decided by the profile's `{DECIDED[name]}`",
                "write it there, and compile again",
            )
        if name in RULED_OUT:
            raise ArgumentError("decided-argument", f"`{name}` cannot be passed on", RULED_OUT[name])
        close = difflib.get_close_matches(name, sorted({*PASSED_ON, *DECIDED, *RULED_OUT}), n=1)
        raise ArgumentError(
            "unknown-argument",
            f"`load_model` has no argument `{name}`, and `from_pretrained` takes none that is passed on",
            f"did you mean `{close[0]}`?"
            if close
            else "what the config says is changed in the config of `model.source`",
        )
