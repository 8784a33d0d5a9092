"""devmap-config: a compiler for model placement. Importing it imports neither torch nor transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from devmap_config.compiler import compile_profile
    from devmap_config.diagnostics.diagnostic import Diagnostic, ProfileError
    from devmap_config.plan.plan import NotADeviceMapError, Plan
    from devmap_config.runner.runner import load_model

_HOMES = {
    "Diagnostic": "devmap_config.diagnostics.diagnostic",
    "NotADeviceMapError": "devmap_config.plan.plan",
    "Plan": "devmap_config.plan.plan",
    "ProfileError": "devmap_config.diagnostics.diagnostic",
    "compile_profile": "devmap_config.compiler",
    "load_model": "devmap_config.runner.runner",
}

__all__ = ["Diagnostic", "NotADeviceMapError", "Plan", "ProfileError", "compile_profile", "load_model"]


def __getattr__(name: str) -> Any:
    """The public names, each imported when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
