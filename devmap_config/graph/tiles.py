"""Counts the tiles that a model's processor cuts an image into, by the settings beside the model's config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from devmap_config.files import CONFIG, FileError, is_folder, read_json
from devmap_config.graph.source import ModelNotFoundError, hub_file
from devmap_config.wording import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from devmap_config.files import Boundary
    from devmap_config.graph.source import ModelSource

TILING: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "idefics3": ("Idefics3ImageProcessor", {}),
    "internvl": ("GotOcr2ImageProcessor", {"crop_to_patches": True}),
    "smolvlm": ("SmolVLMImageProcessor", {}),
}
"""By type of model: transformers' class that cuts its images, and the settings that the model's processor overrides."""

FILES = ("processor_config.json", "preprocessor_config.json")

LARGEST_SETTINGS = {"size": 2**16, "max_image_size": 2**16, "min_patches": 256, "max_patches": 256}
"""The numeric settings and their upper limits, as the time of cutting is quadratic in the number of tiles."""

SWITCHES = ("do_image_splitting", "crop_to_patches")


class UnknownTilesError(Exception):
    """The settings of the processor are not at hand, or are invalid."""


def is_cut(source: ModelSource) -> bool:
    """Return whether the model's processor may cut an image into tiles, each of which counts as an image for the
    model.
    """
    return source.config.get("model_type") in TILING


def tiles_of_image(source: ModelSource, height: int, width: int, boundary: Boundary) -> int:
    """Return the number of tiles that an image is cut into, including the one of the whole image.

    Args:
        source: the model; the settings of its processor are read from the folder of its config.
        height: the height of the image, in pixels.
        width: the width of the image, in pixels.
        boundary: the folder that links of the repository must not lead out of.

    Raises:
        UnknownTilesError: if the settings do not determine the number.
    """
    import transformers

    name, overrides = TILING[source.config["model_type"]]
    settings = _settings(source, boundary)
    processor = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    try:
        count = processor(**settings).get_number_of_image_patches(height, width, dict(overrides))
    except ImportError as error:
        raise UnknownTilesError(f"`{name}` needs a package (`pip install pillow`): {first_line(error)}") from error
    except Exception as error:  # invalid settings may raise anything
        raise UnknownTilesError(f"its processor's settings do not say: {first_line(error)}") from error
    tiles = count[0] if isinstance(count, tuple) else count
    return max(int(tiles), 1)


def _settings(source: ModelSource, boundary: Boundary) -> dict[str, Any]:
    """Return the settings that determine the number of tiles."""
    for name in FILES:
        values = _read(source, name, boundary)
        section = values.get("image_processor") if name == FILES[0] and values is not None else values
        if isinstance(section, dict):
            break
    else:
        raise UnknownTilesError(f"neither `{FILES[1]}` nor `{FILES[0]}` is beside its config")
    settings = {name: section[name] for name in (*LARGEST_SETTINGS, *SWITCHES) if section.get(name) is not None}
    for name, value in settings.items():
        most = LARGEST_SETTINGS.get(name, 1)
        for number in value.values() if isinstance(value, dict) else (value,):
            least = 0 if name in SWITCHES else 1
            if number is not None and (not isinstance(number, int) or not least <= number <= most):
                raise UnknownTilesError(f"`{name}` of its processor is none that an image can be cut by")
    return settings


def _read(source: ModelSource, name: str, boundary: Boundary) -> dict[str, Any] | None:
    try:
        if source.repository is not None:
            value = read_json(hub_file(source.repository[0], name, source.repository[1]), CONFIG)
        else:
            folder: Path = source.location if is_folder(source.location) else source.location.parent
            value = read_json(folder / name, CONFIG, boundary)
    except ModelNotFoundError:
        return None
    except FileError as error:
        if error.is_absent:
            return None
        raise UnknownTilesError(f"`{name}` {error}") from error
    return value if isinstance(value, dict) else None
