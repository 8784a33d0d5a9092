"""The uses of private parts of accelerate. Imports accelerate."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from devmap_config.devices import CPU, DISK
from devmap_config.libraries.private import Private

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

    from devmap_config.devices import Device

PLACE_TENSOR = Private(
    "accelerate.hooks.set_module_tensor_to_device",
    "the function by which accelerate's hooks place tensors; the dry run patches it, since tensors without data "
    "cannot be placed",
    takes=("module", "tensor_name", "device", "value"),
)
MODULE_HOOK = Private(
    "torch.nn.Module._hf_hook",
    "the hook that accelerate attached to a module; it names the device on which the module runs",
)
HOOK_WEIGHTS = Private(
    "accelerate.hooks.AlignDevicesHook.weights_map", "the source of each tensor that a hook copies in at every forward"
)
SEND_TO_DEVICE = Private(
    "accelerate.utils.send_to_device", "copies the inputs of a streamed module to the device on which it runs"
)
FIND_DEVICE = Private(
    "accelerate.utils.find_device", "the device of a model's inputs, to which its outputs are returned"
)
MODULE_TENSORS = Private(
    "accelerate.utils.named_module_tensors",
    "the tensors of a module that its hook copies in",
    takes=("include_buffers", "remove_non_persistent"),
)


@contextmanager
def placing_tensors_with(placing: Callable[..., None]) -> Iterator[None]:
    """Let accelerate's hooks call `placing` instead of putting a tensor of a module on a device."""
    PLACE_TENSOR.find()
    from accelerate import hooks

    with patch.object(hooks, PLACE_TENSOR.attribute, placing):
        yield


def hooks_of(module: torch.nn.Module) -> tuple[Any, ...]:
    """Return the hooks that accelerate attached to a module, in the order in which they run."""
    hook = getattr(module, MODULE_HOOK.attribute, None)
    if hook is None:
        return ()
    return tuple(getattr(hook, "hooks", (hook,)))


def before_hooks_are_removed(model: torch.nn.Module, tell: Callable[[], None]) -> None:
    """Call `tell` before the hook of the model itself is removed, if it has one."""
    for hook in hooks_of(model)[:1]:
        detach_hook = hook.detach_hook

        def detach(module: torch.nn.Module, detach_hook: Callable[..., Any] = detach_hook) -> Any:
            tell()
            return detach_hook(module)

        hook.detach_hook = detach


def sent(value: Any, device: Any, skip_keys: Any = None) -> Any:
    """Return a value with all tensors within it on a device, except those under skipped keys."""
    return SEND_TO_DEVICE.find()(value, device, skip_keys=skip_keys)


def found_device(value: Any) -> Any:
    """Return the device of the first tensor within a value; `None` if there is none."""
    return FIND_DEVICE.find()(value)


def names_copied_in(module: torch.nn.Module, hook: Any) -> list[str]:
    """Return the names of a module's own tensors that its hook copies in."""
    tensors = MODULE_TENSORS.find()(module, include_buffers=hook.offload_buffers, remove_non_persistent=True)
    return [name for name, _ in tensors]


def replace_hook(module: torch.nn.Module, old: Any, new: Any) -> None:
    """Replace one of a module's hooks."""
    hook = MODULE_HOOK.of(module)
    if hook is old:
        setattr(module, MODULE_HOOK.attribute, new)
    else:
        hook.hooks = tuple(new if attached is old else attached for attached in hook.hooks)


def replace_streamed(hook: Any, name: str, tensor: torch.Tensor) -> None:
    """Have a hook copy in another tensor instead of one of its module's that is in memory."""
    weights = HOOK_WEIGHTS.of(hook)
    getattr(weights, "dataset", weights).state_dict[getattr(weights, "prefix", "") + name] = tensor


def streamed_from(hook: Any, path: str, name: str) -> Device | None:
    """Return the device from which a hook copies a tensor in, the CPU or the disk; `None` if it does not.

    Args:
        hook: a hook of the module at `path`.
        path: the module's path.
        name: the tensor's name in the model.
    """
    weights = getattr(hook, HOOK_WEIGHTS.attribute, None)
    if weights is None or not getattr(hook, "offload", False):
        return None
    loader = getattr(weights, "dataset", weights)
    full_name = getattr(weights, "prefix", "") + name.removeprefix(f"{path}." if path else "")
    if full_name in (getattr(loader, "state_dict", None) or {}):
        return CPU
    return None if place_on_disk(hook, path, name) is None else DISK


def place_on_disk(hook: Any, path: str, name: str) -> Mapping[str, Any] | None:
    """Return the place of a tensor that a hook reads from disk: `safetensors_file` and `weight_name`, or `shape` and
    `dtype`.

    The latter applies if the tensor was written to a file of its own. The arguments are those of `streamed_from`.
    """
    weights = getattr(hook, HOOK_WEIGHTS.attribute, None)
    if weights is None or not getattr(hook, "offload", False):
        return None
    loader = getattr(weights, "dataset", weights)
    full_name = getattr(weights, "prefix", "") + name.removeprefix(f"{path}." if path else "")
    place: Mapping[str, Any] | None = (getattr(loader, "index", None) or {}).get(full_name)
    return place
