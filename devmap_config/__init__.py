"""devmap-config: a compiler for model placement. Importing it imports neither torch nor transformers.

`compile_profile` makes the plan of a profile, `load_model` loads the model by its lock. All errors that they raise are
a `DevmapError`, whose `diagnostics` say what is wrong, where, and what to do next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from devmap_config.compiler import compile_profile
    from devmap_config.diagnostics.diagnostic import DevmapError, DevmapWarning, Diagnostic, ProfileError, Related, Span
    from devmap_config.plan.lock import LockError
    from devmap_config.plan.plan import DeviceUse, NotADeviceMapError, Plan, Prediction
    from devmap_config.runner.arguments import ArgumentError
    from devmap_config.runner.loading import RunnerError, UnfitMachineError
    from devmap_config.runner.runner import load_model

_DIAGNOSTICS = "devmap_config.diagnostics.diagnostic"

_HOMES = {
    "ArgumentError": "devmap_config.runner.arguments",
    "DeviceUse": "devmap_config.plan.plan",
    "DevmapError": _DIAGNOSTICS,
    "DevmapWarning": _DIAGNOSTICS,
    "Diagnostic": _DIAGNOSTICS,
    "LockError": "devmap_config.plan.lock",
    "NotADeviceMapError": "devmap_config.plan.plan",
    "Plan": "devmap_config.plan.plan",
    "Prediction": "devmap_config.plan.plan",
    "ProfileError": _DIAGNOSTICS,
    "Related": _DIAGNOSTICS,
    "RunnerError": "devmap_config.runner.loading",
    "Span": _DIAGNOSTICS,
    "UnfitMachineError": "devmap_config.runner.loading",
    "compile_profile": "devmap_config.compiler",
    "load_model": "devmap_config.runner.runner",
}

__all__ = [
    "ArgumentError",
    "DeviceUse",
    "DevmapError",
    "DevmapWarning",
    "Diagnostic",
    "LockError",
    "NotADeviceMapError",
    "Plan",
    "Prediction",
    "ProfileError",
    "Related",
    "RunnerError",
    "Span",
    "UnfitMachineError",
    "compile_profile",
    "load_model",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
