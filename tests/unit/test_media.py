"""Images and sound in a prompt: the inputs that models get, the tokens that they take, and the messages about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import LLAMA
from small_media_models import BLIP2, IMAGE_MODELS, LLAVA, QWEN2_5_VL, SOUND_MODELS, WHISPER, built
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention

from devmap_config.cli.compile import compile_command
from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.graph.costs import WorkloadShape
from devmap_config.graph.features import media_of
from devmap_config.graph.forwards import Forwards, cache_tensors
from devmap_config.graph.introspection import graph_of
from devmap_config.graph.known_values import knowing_values
from devmap_config.graph.measurement import measure
from devmap_config.libraries.torch import tensors_without_data

TOKENS = {
    "llava": 16,
    "gemma3": 4,
    "mllama": 0,
    "qwen2_5_vl": 16,
    "qwen3_vl": 16,
    "internvl": 4,
    "idefics3": 4,
    "blip-2": 4,
    "qwen2_5_omni_thinker": 16,
}
"""Of an image of 112 by 112 pixels where the model takes any size, else of its own."""


def workload(**given):
    return WorkloadShape(batch_size=1, context_length=128, prompt_length=120, **given)


ONE_IMAGE = workload(images=1, image_height=112, image_width=112)


def measured(config, asked):
    model = built(config, torch.bfloat16, on_meta=True)
    return measure(model, graph_of(model, torch.bfloat16), asked)


T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "vocab_size": 128}


@pytest.mark.parametrize("text", [BLIP2["text_config"], T5], ids=["opt", "t5"])
def test_the_cache_of_an_inner_language_model_is_that_of_a_real_run(text):
    config = {**BLIP2, "text_config": text, "use_decoder_only_language_model": text is not T5}
    found = measured(config, ONE_IMAGE)
    assert found.decodes
    assert any(cost.decode_operations for path, cost in found.by_path.items() if path.startswith("language_model."))
    model = built(config, torch.bfloat16)
    inputs = Forwards(model, ONE_IMAGE, media_of(model, ONE_IMAGE)).prefill_inputs(ONE_IMAGE.context_length)
    with torch.no_grad():
        cache = model(**inputs).language_model_outputs.past_key_values
    assert found.cache_bytes == sum(tensor.nbytes for tensor in cache_tensors(cache)) > 0


@pytest.mark.parametrize("name", ["llava", "mllama", "qwen3_vl"])
def test_the_vision_tower_is_measured_and_its_tokens_are_counted(name):
    found = measured(IMAGE_MODELS[name], ONE_IMAGE)
    assert found.measured
    assert (found.media.tokens, found.media.problem) == (TOKENS[name], None)
    tower = next(path for path, cost in found.by_path.items() if "vis" in path and path.count(".") == 1)
    assert found.by_path[tower].prefill_peak_bytes
    assert not found.by_path[tower].decode_launches


@pytest.mark.parametrize("kind", IMAGE_MODELS)
@torch.no_grad()
def test_a_real_model_takes_the_measured_image_inputs(kind):
    model = built(IMAGE_MODELS[kind], torch.float32)
    for name, parameter in model.named_parameters():
        if "gate" in name or "projection_weight" in name:  # closed, until training opens it
            parameter.fill_(0.5)
    media = media_of(model, ONE_IMAGE)
    assert sum(each.placeholders for each in media) == TOKENS[kind]
    inputs = Forwards(model, ONE_IMAGE, media).prefill_inputs(60)
    logits = model(**inputs).logits
    torch.manual_seed(1)
    pixels = {"pixel_values": torch.randn_like(inputs["pixel_values"])}
    assert not torch.equal(model(**{**inputs, **pixels}).logits, logits)  # the image is looked at


HEARD = {"whisper": 0, "qwen2_audio": 32, "voxtral": 16, "qwen2_5_omni_thinker": 25}
"""How many tokens stand for a second of sound; of what hears windows of 64 frames, for two of them."""


@pytest.mark.parametrize("kind", SOUND_MODELS)
@torch.no_grad()
def test_a_real_model_takes_the_measured_sound_inputs(kind):
    model = built(SOUND_MODELS[kind], torch.float32)
    asked = workload(audio_seconds=1)
    media = media_of(model, asked)
    assert sum(each.placeholders for each in media) == HEARD[kind]
    inputs = Forwards(model, asked, media).prefill_inputs(60)
    logits = model(**inputs).logits
    torch.manual_seed(1)
    sound = {"input_features": torch.randn_like(inputs["input_features"])}
    assert not torch.equal(model(**{**inputs, **sound}).logits, logits)
    found = measured(SOUND_MODELS[kind], asked)
    assert (found.media.tokens, found.media.problem) == (HEARD[kind], None)


def test_more_images_take_more_tokens_and_each_sequence_has_its_own():
    two = measured(LLAVA, workload(images=2))
    assert two.media.tokens == 32
    of_three = measured(LLAVA, WorkloadShape(batch_size=3, context_length=128, prompt_length=120, images=2))
    assert of_three.media.tokens == 32
    tower = "model.vision_tower.encoder.layers.0.mlp.fc1"
    assert of_three.by_path[tower].prefill_operations == 3 * two.by_path[tower].prefill_operations > 0


def test_the_size_of_an_image_decides_its_tokens():
    small, large = (measured(QWEN2_5_VL, workload(images=1, image_height=side, image_width=56)) for side in (56, 224))
    assert (small.media.tokens, large.media.tokens) == (4, 16)


def test_only_equal_blocks_of_a_tower_with_equal_inputs_are_skipped(monkeypatch):
    tower = {**QWEN2_5_VL["vision_config"], "depth": 8, "fullatt_block_indexes": [3, 7]}
    asked = workload(images=1, image_height=224, image_width=224)
    runs = []
    attend = Qwen2_5_VLVisionAttention.forward
    monkeypatch.setattr(
        Qwen2_5_VLVisionAttention,
        "forward",
        lambda self, *arguments, **options: runs.append(self) or attend(self, *arguments, **options),
    )
    sparing = measured({**QWEN2_5_VL, "vision_config": tower}, asked)
    run_of_spared = len(runs)
    monkeypatch.setattr("devmap_config.graph.measurement.kinds_of", lambda *_: ())
    runs.clear()
    assert measured({**QWEN2_5_VL, "vision_config": tower}, asked) == sparing
    assert run_of_spared < len(runs)


def test_sound_is_measured_through_the_encoder():
    found = measured(WHISPER, workload(audio_seconds=1))
    assert (found.media.tokens, found.media.problem) == (0, None)
    assert found.by_path["model.encoder.layers.0"].prefill_launches


PROFILE = """\
version: 1
model: {{source: small}}
workload: {{context_length: 128{workload}}}
hardware: {{devices: {{cuda:0: {{memory: 1GiB}}, cuda:1: {{memory: 1GiB}}}}}}
placement: {{strategy: sequential}}
"""


def compiled(config, inputs):
    Path("small").mkdir(exist_ok=True)
    Path("small/config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    Path("profile.yaml").write_text(PROFILE.format(workload=f", inputs: {inputs}" if inputs else ""))
    return run_pipeline(Request(path=Path("profile.yaml"), simulates=True))


@pytest.mark.parametrize(
    ("config", "inputs", "code", "says"),
    [
        (QWEN2_5_VL, "{images: 1}", "missing-key", "`image_size` is missing"),
        (
            QWEN2_5_VL,
            "{images: 1, image_size: 448}",
            "prompt-too-short",
            "take 256 tokens of the prompt, which has 128",
        ),
        (LLAVA, "{images: 8}", "prompt-too-short", "take 128 tokens"),
        (LLAMA, "{images: 1}", "unfit-input", "it takes no images"),
        (LLAVA, "{audio_seconds: 1}", "unfit-input", "it takes no sound"),
        (WHISPER, "{audio_seconds: 2}", "unfit-input", "it hears 1 s at once"),
        (LLAVA, "{images: 1, image_size: []}", "wrong-type", "a height and a width"),
        (LLAVA, "{image_size: [8, 8]}", "wrong-type", "`images` says not how many"),
        (LLAVA, "{images: 1, image_size: [8, 8, 8]}", "wrong-type", "a height and a width"),
        (LLAVA, "{images: 1, image_size: [8x8]}", "wrong-type", "image_size[0]` must be a whole number, not `8x8`"),
        (QWEN2_5_VL, "{images: 1, image_size: [8x8]}", "wrong-type", "image_size[0]` must be"),
        (LLAVA, "{images: 0}", "wrong-type", ""),
        (LLAVA, "{images: 1001}", "wrong-type", "at most 1,000"),
        (LLAVA, "{images: 1, image_size: [20000, 8]}", "wrong-type", "at most 4,096"),
        (LLAVA, "{images: 3, image_size: 4096}", "wrong-type", "holds 50,331,648 pixels"),
        (LLAVA, "{audio_seconds: 90000}", "wrong-type", "at most 86,400"),
        (LLAVA, "{image: 1}", "unknown-key", ""),
    ],
)
def test_impossible_inputs_are_an_error_at_their_line(workspace, config, inputs, code, says):
    (finding,) = (each for each in compiled(config, inputs).diagnostics if each.severity == "error")
    assert finding.code == code
    assert says in finding.message
    assert finding.span.line == 3


@pytest.mark.parametrize(("pin", "is_copied"), [("model.vision_tower", False), ("lm_head", True)])
def test_decoding_copies_no_weights_of_a_streamed_tower(workspace, pin, is_copied):
    compiled(LLAVA, "{images: 1}")
    pins = f"placement: {{strategy: sequential, pins: [{{match: {pin}, device: cpu}}]}}\n"
    lines = Path("profile.yaml").read_text().replace("cuda:1", "cpu").splitlines(keepends=True)
    Path("profile.yaml").write_text("".join(line for line in lines if "strategy" not in line) + pins)
    compilation = run_pipeline(Request(path=Path("profile.yaml")))
    assert isinstance(compilation, Compiled), compilation.diagnostics
    (cpu,) = (use for use in compilation.plan.devices if str(use.id) == "cpu")
    assert cpu.weights_bytes > 0
    assert compilation.plan.prediction.streamed_bytes_per_token == (cpu.weights_bytes if is_copied else 0)


def test_images_without_a_context_length_are_an_error(workspace):
    compiled(LLAVA, "{images: 1}")
    text = Path("profile.yaml").read_text()
    for context, codes in (("", ["unused-key"]), ("context_length: many, ", ["wrong-type"])):
        Path("profile.yaml").write_text(text.replace("context_length: 128, ", context))
        findings = run_pipeline(Request(path=Path("profile.yaml"))).diagnostics
        assert [each.code for each in findings if each.severity == "error"] == codes


def test_inputs_that_the_model_rejects_are_reported_and_text_is_measured(workspace):
    narrow = {**QWEN2_5_VL, "vision_config": {**QWEN2_5_VL["vision_config"], "out_hidden_size": 16}}
    compilation = compiled(narrow, "{images: 1, image_size: 56}")
    assert isinstance(compilation, Compiled)
    assert "untried-inputs" in [each.code for each in compilation.diagnostics]
    assert compilation.plan.measured


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ("{images: 2}", "2 images = 32 tokens of each prompt"),
        ("", "text alone was tried, which does not call"),
    ],
)
def test_compile_reports_the_tokens_of_images_or_that_none_were_tried(workspace, inputs, says):
    compiled(LLAVA, inputs)
    done = CliRunner().invoke(compile_command, ["profile.yaml"])
    assert done.exit_code == 0, done.output
    assert says in " ".join(done.output.split())


def test_images_and_sound_are_inputs_of_a_lock(workspace):
    plain, with_image = (compiled(LLAVA, inputs).inputs for inputs in ("", "{images: 1}"))
    assert plain.profile != with_image.profile
    assert plain.measurement != with_image.measurement


# Values that are known


def known(action):
    """Return the result of an action among tensors without data, as a list."""
    with torch.no_grad(), tensors_without_data(), knowing_values():
        return action()


@pytest.mark.parametrize(
    "action",
    [
        lambda: (torch.arange(6) % 2 == 0).nonzero().squeeze(1).tolist(),
        lambda: torch.tensor([3, 1, 2]).repeat_interleave(torch.tensor([1, 0, 2])).tolist(),
        lambda: list(torch.tensor([[1, 2], [3, 4]])[torch.tensor([True, False])].flatten().tolist()),
        lambda: [torch.tensor(5).item(), int(torch.tensor([2, 3]).prod())],
        lambda: torch.tensor([torch.tensor(4), 7]).tolist(),
        lambda: torch.zeros(4, dtype=torch.long).index_fill_(0, torch.tensor([1, 3]), 9).tolist(),
        lambda: torch.unique(torch.tensor([2, 2, 5])).tolist(),
        lambda: torch.cumsum(torch.tensor([1, 2, 3]), 0)[1:].add_(1).tolist(),
    ],
)
def test_values_computed_from_literals_are_known(action):
    assert known(action) == action()


def test_masked_unknown_values_have_a_known_shape():
    def shapes():
        unknown = torch.empty(3, 5)
        mask = torch.tensor([True, False, True])
        wide = mask.unsqueeze(1).expand(3, 5)
        return [
            list(unknown[mask].shape),
            list(unknown[wide].shape),
            list(unknown.masked_select(wide).shape),
            list(unknown.repeat_interleave(torch.tensor([1, 0, 4]), dim=0).shape),
        ]

    assert known(shapes) == [[2, 5], [10], [10], [5, 5]]


def test_values_overwritten_by_unknown_ones_are_unknown():
    def asked():
        counts = torch.zeros(3)
        counts[1:] += torch.empty(2)
        return counts.tolist()

    with pytest.raises(Exception, match="_local_scalar_dense"):
        known(asked)


def test_random_numbers_are_unknown():
    with pytest.raises(Exception, match="_local_scalar_dense"):
        known(lambda: torch.randint(0, 9, (3,)).tolist())
