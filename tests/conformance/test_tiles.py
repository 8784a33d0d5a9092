"""The tiles of an image are counted as the model's own processor cuts it, and so are the tokens of each tile."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from small_media_models import IDEFICS3, INTERNVL, PROCESSORS, built

from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.files import ANYWHERE
from devmap_config.graph.source import local_source
from devmap_config.graph.tiles import UnknownTilesError, tiles_of_image

MODELS = {config["model_type"]: (config, PROCESSORS[config["model_type"]]) for config in (INTERNVL, IDEFICS3)}
SIZES = [(32, 32), (64, 96), (40, 200), (300, 301)]
TOKENS_OF_A_TILE = 4

PROFILE = """\
version: 1
model: {source: tiled}
workload: {context_length: 256, inputs: {images: 2, image_size: [64, 96]}}
hardware: {devices: {cpu: {memory: 1GiB}}}
"""


@pytest.fixture(params=MODELS)
def tiled(request, tmp_path, monkeypatch):
    """A directory in a repository, with a config and its processor's settings."""
    monkeypatch.chdir(tmp_path)
    Path("tiled").mkdir()
    config, settings = MODELS[request.param]
    Path("tiled/config.json").write_text(json.dumps(config))
    Path("tiled/preprocessor_config.json").write_text(json.dumps(settings))
    Path("p.yaml").write_text(PROFILE)
    return request.param


def processed(name, height, width):
    """Return the pixels that the real processor makes of an image."""
    _, settings = MODELS[name]
    values = {key: value for key, value in settings.items() if key != "image_processor_type"}
    processor = getattr(transformers, f"{settings['image_processor_type']}Pil")(**values)
    told = {"crop_to_patches": True} if name == "internvl" else {}
    image = Image.new("RGB", (width, height))
    pixels = processor(images=[image], return_tensors="pt", **told)["pixel_values"]
    return pixels.flatten(0, -4)


def errors_of(found):
    return [each for each in found.diagnostics if each.severity == "error"]


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_counted_as_the_processor_cuts_an_image(tiled, size):
    assert tiles_of_image(local_source(Path("tiled"), ANYWHERE), *size, ANYWHERE) == len(processed(tiled, *size))


def test_tokens_of_a_tile_are_those_that_the_model_makes(tiled):
    found = run_pipeline(Request(path=Path("p.yaml"), simulates=True))
    assert isinstance(found, Compiled), errors_of(found)
    config, _ = MODELS[tiled]
    pixels = processed(tiled, 64, 96)
    model = built(config, torch.float32)
    shape = (1, *pixels.shape) if tiled == "idefics3" else pixels.shape
    with torch.no_grad():
        features = model.get_image_features(pixel_values=pixels.reshape(shape)).pooler_output
    tokens = sum(part.shape[:-1].numel() for part in (features if isinstance(features, (list, tuple)) else [features]))
    assert tokens == len(pixels) * TOKENS_OF_A_TILE
    measurement = found.graph.measurement
    assert measurement.workload.tiles == len(pixels) > 1
    assert (measurement.media.problem, measurement.media.tokens) == (None, 2 * tokens)


def test_without_a_size_an_image_is_one_tile(tiled):
    Path("p.yaml").write_text(PROFILE.replace(", image_size: [64, 96]", ""))
    found = run_pipeline(Request(path=Path("p.yaml")))
    assert found.graph.measurement.media.tokens == 2 * TOKENS_OF_A_TILE


@pytest.mark.parametrize(
    "text", [None, "{", "[]", '{"max_patches": 1000000000, "size": {"longest_edge": 1000000000}}', '{"size": "x"}']
)
def test_processor_settings_without_tiles_are_an_error_with_a_remedy(tiled, text):
    file = Path("tiled/preprocessor_config.json")
    file.unlink() if text is None else file.write_text(text)
    began = time.process_time()
    (finding,) = errors_of(run_pipeline(Request(path=Path("p.yaml"))))
    assert time.process_time() - began < 5
    assert finding.code == "unfit-input"
    assert "cuts an image into tiles, and into how many is not known" in finding.message
    assert "say as many `images` as there are tiles" in finding.help
    assert finding.span.line == 3


def test_processor_config_takes_precedence_over_image_processor_config(tiled):
    _, settings = MODELS[tiled]
    Path("tiled/processor_config.json").write_text(json.dumps({"image_processor": settings}))
    Path("tiled/preprocessor_config.json").write_text("{}")
    source = local_source(Path("tiled"), ANYWHERE)
    assert tiles_of_image(source, 64, 96, ANYWHERE) == len(processed(tiled, 64, 96))
    Path("tiled/processor_config.json").write_text("[")
    with pytest.raises(UnknownTilesError, match="processor_config"):
        tiles_of_image(source, 64, 96, ANYWHERE)
