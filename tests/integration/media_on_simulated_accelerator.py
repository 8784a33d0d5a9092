"""Models with images or sound compute with real numbers on several devices; collected in a process of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import simulated_accelerator
import torch
import yaml
from click.testing import CliRunner
from conftest import REPOSITORY
from small_media_models import GEMMA3, IMAGE_MODELS, PROCESSORS, QWEN2_5_VL, SOUND_MODELS, WHISPER, built

from devmap_config import load_model
from devmap_config.cli.compile import compile_command
from devmap_config.cli.run import run
from devmap_config.compiler import Request, run_pipeline
from devmap_config.graph.costs import WorkloadShape
from devmap_config.graph.features import media_of
from devmap_config.graph.forwards import Forwards

simulated_accelerator.install()

LENGTH = 60
SIDE = 112
TILES = 5
"""A square image is cut into four, and is given whole besides."""

IMAGE = WorkloadShape(
    batch_size=1, context_length=128, prompt_length=LENGTH, images=1, image_height=SIDE, image_width=SIDE
)
SOUND = WorkloadShape(batch_size=1, context_length=128, prompt_length=LENGTH, audio_seconds=1)
BOTH = replace(IMAGE, audio_seconds=1)
INPUTS = {
    IMAGE: f"{{images: 1, image_size: {SIDE}}}",
    SOUND: "{audio_seconds: 1}",
    BOTH: f"{{images: 1, image_size: {SIDE}, audio_seconds: 1}}",
}

PROFILE = """\
version: 1
model: {{source: random, dtype: float32, attention: eager}}
workload: {{context_length: 128, prompt_length: {length}, inputs: {inputs}}}
hardware: {{devices: {{npu:0: {{memory: 1GiB}}, npu:1: {{memory: 1GiB}}, cpu: {{memory: 1GiB}}}}}}
placement: {placement}
"""


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def saved(config):
    """The model with numbers at random, of which none closes a gate; it is in `random` as well."""
    model = built({**config, "attn_implementation": "eager"}, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.fill_(0.5)
    model.save_pretrained("random")
    if (settings := PROCESSORS.get(config["model_type"])) is not None:
        Path("random/preprocessor_config.json").write_text(json.dumps(settings))
    return model


def write_profile(workload, placement):
    text = PROFILE.format(length=LENGTH, inputs=INPUTS[workload], placement=json.dumps(placement))
    Path("profile.yaml").write_text(text)


def prompt(model, workload):
    """What the model is given: pixels and frequencies at random."""
    if model.config.model_type in PROCESSORS:
        workload = replace(workload, tiles=TILES)
    inputs = Forwards(model, workload, media_of(model, workload)).prefill_inputs(LENGTH)
    torch.manual_seed(1)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return {name: torch.rand_like(value) if value.is_floating_point() else value for name, value in tensors.items()}


PINS = {
    "llava": ["model.vision_tower", "model.language_model.layers.[2-3]"],
    "gemma3": ["model.vision_tower.encoder.layers.1", "model.language_model.layers.3"],
    "qwen2_5_vl": ["model.visual.blocks.1", "model.language_model.layers.[1-2]"],
    "qwen3_vl": ["model.visual.blocks.[0-1]", "model.language_model.layers.3"],
    "mllama": ["model.vision_model.global_transformer", "model.language_model.layers.[0-1]"],
    "internvl": ["model.vision_tower.encoder.layer.1", "lm_head"],
    "idefics3": ["model.text_model.layers.[0-1]"],
    "blip-2": ["vision_model.encoder.layers.1", "qformer.encoder.layer.0"],
    "whisper": ["model.encoder.layers.1", "model.decoder.layers.0"],
    "voxtral": ["model.audio_tower.layers.1", "model.language_model.layers.[1-2]"],
    "qwen2_audio": ["model.audio_tower.layers.1", "model.language_model.layers.3"],
    "qwen2_5_omni_thinker": ["**.visual.blocks.1", "**.audio_tower.layers.1", "**.layers.3"],
}
"""What is on the second card; the last layer is on the CPU, and is copied in."""


OF_EACH_KIND = ("gemma3", "qwen2_5_vl", "mllama", "idefics3", "whisper")
"""One of each way: images of one size, of any size, by cross-attention, by tiles, and an encoder of sound."""


def require_processor(name):
    if name in PROCESSORS:
        pytest.importorskip("PIL")  # by which transformers' own say into how many tiles an image is cut


def names(families):
    return [pytest.param(name, marks=() if name in OF_EACH_KIND else pytest.mark.zoo) for name in families]


@pytest.mark.parametrize("name", names(PINS))
@torch.no_grad()
def test_a_plan_for_images_or_sound_gives_the_logits_of_one_device(name):
    require_processor(name)
    plain = saved({**IMAGE_MODELS, **SOUND_MODELS}[name])
    workload = BOTH if name in IMAGE_MODELS and name in SOUND_MODELS else SOUND if name in SOUND_MODELS else IMAGE
    pins = [{"match": match, "device": "npu:1"} for match in PINS[name]]
    write_profile(workload, {"strategy": "sequential", "pins": pins})
    assert compile_command.main(["profile.yaml", "-q"], standalone_mode=False) == 0
    inputs = prompt(plain, workload)
    model = load_model("profile.yaml")
    assert {str(device) for device in model.hf_device_map.values()} >= {"0", "1"}
    logits = model(**{key: value.to("npu:0") for key, value in inputs.items()}).logits
    torch.testing.assert_close(logits.cpu(), plain(**inputs).logits, rtol=1e-5, atol=1e-6)


APART = {
    "internvl": "model.vision_tower.embeddings.patch_embeddings.projection",
    "gemma3": "model.vision_tower.encoder.layers.0.self_attn.k_proj",
    "qwen3_vl": "model.visual.patch_embed.proj",
    "mllama": "model.vision_model.transformer.layers.0.self_attn.v_proj",
    "idefics3": "model.vision_model.encoder.layers.1.self_attn.k_proj",
}


@pytest.mark.parametrize("name", names(APART))
@torch.no_grad()
def test_a_map_that_runs_with_text_but_not_with_an_image_is_refused(name):
    require_processor(name)
    plain = saved(IMAGE_MODELS[name])
    device_map = {"": 0, APART[name]: 1}
    write_profile(IMAGE, {"strategy": "manual", "device_map": device_map})
    findings = run_pipeline(Request(path=Path("profile.yaml"), simulates=True)).diagnostics
    assert [each.code for each in findings if each.severity == "error"] == ["device-mismatch"]
    model = type(plain).from_pretrained("random", device_map=device_map, attn_implementation="eager")
    on_card = [{key: value.to("npu:0") for key, value in prompt(plain, IMAGE).items()}]
    on_card.append({"input_ids": torch.ones((1, LENGTH), dtype=torch.long).to("npu:0")})
    assert model(**on_card[1]).logits.shape[1] == LENGTH
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        model(**on_card[0])


CARD = {"memory": "1GiB", "bandwidth": "900GB/s", "flops": "100TFLOP/s"}
LINKS = {"host": "25GB/s", "peer": "12GB/s"}

TWINS = {
    "gemma-3-27b-images": (GEMMA3, {"images": 2}, ["model.vision_tower", "model.language_model.layers.3"]),
    "qwen2.5-vl-7b-tower": (QWEN2_5_VL, {"images": 1, "image_size": SIDE}, []),
    "whisper-large-v3": (WHISPER, {"audio_seconds": 1}, []),
}
"""By profiles that ship: a tiny model of the same kind, what it is given, and what is besides on the last card."""


@pytest.mark.parametrize("name", TWINS)
def test_a_small_twin_of_a_shipped_profile_runs(name):
    config, inputs, on_the_last = TWINS[name]
    twin = yaml.safe_load((REPOSITORY / "profiles" / f"{name}.yaml").read_text())
    Path("tiny").mkdir()
    Path("tiny/config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    cards = 1 if name == "whisper-large-v3" else 2  # of which there are no more
    pins = [{**pin, "device": pin["device"].replace("cuda", "npu")} for pin in twin["placement"].get("pins", [])] + [
        {"match": match, "device": f"npu:{cards - 1}"} for match in on_the_last
    ]
    twin |= {
        "model": {"source": "tiny", "attention": "eager"},
        "workload": {"context_length": 128, "batch_size": 2, "inputs": inputs},
        "hardware": {"devices": {f"npu:{index}": CARD for index in range(cards)}, "links": LINKS},
        "placement": {**twin["placement"], "pins": pins},
    }
    Path("twin.yaml").write_text(yaml.safe_dump(twin))
    assert compile_command.main(["twin.yaml", "-q"], standalone_mode=False) == 0
    arguments = ["twin.yaml", "--random-weights", "--no-probe", "--max-new-tokens", "3", "--format", "json"]
    done = CliRunner().invoke(run, arguments, standalone_mode=False, catch_exceptions=False)
    found = json.loads(done.stdout)
    assert done.return_value == 0, found["diagnostics"]
    assert found["tokens"] == 2 * 3
