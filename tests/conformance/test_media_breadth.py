"""Every model type of transformers that takes images or sound is measured with one, or is in `untried_media.yaml`.

The list gives the product's message for each type; a listed type that runs fails the test, as does an unlisted one that
does not.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
import zoo
from conftest import REPOSITORY

from devmap_config.graph.costs import WorkloadShape
from devmap_config.graph.introspection import graph_of
from devmap_config.graph.measurement import UnmeasurableModelError, measure
from devmap_config.graph.sounds import SOUND_NAMES

UNTRIED = yaml.safe_load((Path(__file__).parent / "untried_media.yaml").read_text())
"""By what is given and the model's type: a part of what is said."""

SHORT = WorkloadShape(batch_size=1, context_length=64, prompt_length=64)
GIVEN = {
    "images": replace(SHORT, images=1, image_height=448, image_width=448),
    "sound": replace(SHORT, audio_seconds=30),
}

SWEPT = [("images", name) for name in zoo.image_model_types()] + [("sound", name) for name in zoo.sound_model_types()]


def outcome(kind: str, model_type: str) -> str | None:
    """Return the message for a type that is given images or sound, or `None` if it runs."""
    try:
        model = zoo.build_media(model_type)
    except Exception as error:  # whatever comes of a default config, or of a package that is not there
        return f"not built: {type(error).__name__}: {' '.join(str(error).split())}"
    workload = GIVEN[kind]
    try:
        found = measure(model, graph_of(model, torch.bfloat16), workload)
        if found.media is not None and found.media.problem == "room":
            length = found.media.tokens + SHORT.prompt_length
            model = zoo.build_media(model_type)
            found = measure(
                model,
                graph_of(model, torch.bfloat16),
                replace(workload, context_length=length, prompt_length=length),
            )
    except UnmeasurableModelError as error:
        return str(error)
    assert found.media is not None, found.reason
    if found.media.problem is None:  # what looks at it ran, and not for every token
        assert any(cost.prefill_operations and not cost.decode_operations for cost in found.modules)
    return found.media.reason


@pytest.mark.zoo
@pytest.mark.parametrize(("kind", "model_type"), SWEPT)
def test_a_type_runs_with_images_or_sound_or_is_listed(kind, model_type):
    logging.disable(logging.WARNING)
    reason = outcome(kind, model_type)
    if model_type in UNTRIED[kind]:
        assert reason is not None, "it runs, and is listed"
        assert UNTRIED[kind][model_type] in reason
    else:
        assert reason is None


@pytest.mark.zoo
@pytest.mark.parametrize("model_type", zoo.image_model_types())
def test_image_types_that_also_take_sound_are_known(model_type):
    import inspect

    try:
        model = zoo.build_media(model_type)
    except Exception:
        pytest.skip("transformers does not build it")
    hears = bool({*inspect.signature(model.forward).parameters} & {*SOUND_NAMES})
    assert hears == (model_type in zoo.ALSO_OF_SOUND)


def test_the_list_names_only_types_that_are_tested():
    listed = {(kind, model_type) for kind, reasons in UNTRIED.items() for model_type in reasons}
    assert listed <= {*SWEPT}


def test_at_least_85_types_run_and_the_page_states_the_number():
    run, swept = types_that_run(), {model_type for _, model_type in SWEPT}
    assert len(run) >= 85
    page = (REPOSITORY / "docs" / "images-and-sound.md").read_text()
    assert f"works for {len(run)} of the {len(swept)} model types" in page


def types_that_run() -> set[str]:
    """Return the types that run with an image or with sound."""
    return {model_type for kind, model_type in SWEPT if model_type not in UNTRIED[kind]}
