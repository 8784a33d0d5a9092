"""`devmap serve` answers requests with images and sound as transformers does, within the plan, or refuses them by
place.
"""

from __future__ import annotations

import base64
import io
import json
import wave

import openai
import pytest
import torch
from PIL import Image
from small_media_models import QWEN2_AUDIO, built
from test_demonstration import CHAT, llava, saved, tokenizer
from test_serve import served, write_profile
from transformers import LlamaForCausalLM, Qwen2AudioProcessor, WhisperFeatureExtractor

from devmap_config.graph.costs import WorkloadShape
from devmap_config.runner.loading import LoadRequest
from devmap_config.server.media import MediaReader
from devmap_config.server.requests import ChatCompletion, RequestError, asked


def sent(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


REQUEST = LoadRequest(weights="", class_name="", dtype="float32", attention=None)

GRADIENT, PLAIN = Image.linear_gradient("L").convert("RGB"), Image.new("RGB", (40, 30), "red")


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text):
    return {"type": "text", "text": text}


def user(*parts):
    return {"role": "user", "content": list(parts)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of images and text, whose template ignores unknown parts, and its process."""
    folder = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        found, processor = llava()
        processor.chat_template = CHAT.replace("{{ message.content }}", "")
        saved(found, processor, seed=3)
    (folder / "random").rename(folder / "model")
    write_profile(folder, "workload: {context_length: 100, inputs: {images: 2}}\n")
    with served(folder) as (_, printed):
        found.client = openai.OpenAI(base_url=printed["url"], api_key="none", max_retries=0, timeout=30)
        found.processor = processor
        yield found


def answered(model, text, **options):
    inputs = model.processor(text=text, **options, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return model.processor.decode(tokens, skip_special_tokens=True), inputs["input_ids"].shape[1]


def test_images_are_given_to_the_model_in_their_order_among_the_words(model):
    two = user(text_part("who"), image_part(sent(GRADIENT)), text_part("wrote"), image_part(sent(PLAIN, "JPEG")))
    asked = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    found = model.client.chat.completions.create(**asked, messages=[two])
    with Image.open(io.BytesIO(base64.b64decode(sent(PLAIN, "JPEG").partition(",")[2]))) as jpeg:
        images = [GRADIENT, jpeg.convert("RGB")]
    expected, length = answered(model, "user: who <image> wrote <image>  model: ", images=images)
    assert (found.choices[0].message.content, found.usage.prompt_tokens) == (expected, length)
    parts = model.client.chat.completions.create(**asked, messages=[two], stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected
    text_alone = [
        {"role": "user", "content": "who"},
        {"role": "assistant", "content": "alice"},
        user(text_part("then")),
    ]
    found = model.client.chat.completions.create(**asked, messages=text_alone)
    expected, _ = answered(model, "user: who  model: alice  user: then  model: ", add_special_tokens=False)
    assert found.choices[0].message.content == expected


@pytest.mark.parametrize(
    ("message", "param", "says"),
    [
        (user(image_part("https://example.org/a.png")), "messages.0.content.0", "nothing is fetched"),
        (user(image_part("file:///etc/passwd")), "messages.0.content.0", "nothing is fetched"),
        (user(image_part("data:image/png,abc")), "messages.0.content.0", "in base64"),
        (user(image_part("data:image/png;base64,@@")), "messages.0.content.0", "is not in base64"),
        (user(image_part("data:image/png;base64,aaaa")), "messages.0.content.0", "is not an image"),
        (user(image_part(sent(PLAIN, "TIFF"))), "messages.0.content.0", "is not an image"),
        (user(image_part(sent(Image.new("1", (6000, 6000))))), "messages.0.content.0", "33,554,432 may be read"),
        (
            user(image_part(sent(PLAIN, "GIF", save_all=True, append_images=[GRADIENT]))),
            "messages.0.content.0",
            "holds 2 images",
        ),
        (
            user(*[image_part(sent(PLAIN))] * 3),
            "messages.0.content.0",
            "there are 3 images, and the plan has room for 2",
        ),
        (
            user(text_part("a"), {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}),
            "messages.0.content.1",
            "LlavaForConditionalGeneration takes no sounds",
        ),
        (
            user({"type": "input_audio", "input_audio": {"data": "", "format": "mp3"}}),
            "messages.0.content.0.input_audio.format",
            "'wav'",
        ),
        (
            user({"type": "image_url", "image_url": {"url": sent(PLAIN), "detail": "high"}}),
            "messages.0.content.0.image_url.detail",
            "'auto'",
        ),
        (user({"type": "video_url", "video_url": {}}), "messages.0.content.0.type", "'input_audio'"),
        ({**user(image_part(sent(PLAIN))), "role": "assistant"}, "messages.0", "for messages of the user"),
        (user(text_part("a <image>")), None, "a text holds `<image>`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_media_are_refused_with_their_place(model, message, param, says):
    with pytest.raises(openai.BadRequestError) as refusal:
        model.client.chat.completions.create(model="tiny", max_tokens=1, messages=[message])
    assert (refusal.value.param, says in refusal.value.message) == (param, True), refusal.value.message


def chat(*parts):
    return asked(ChatCompletion, json.dumps({"model": "tiny", "messages": [user(*parts)]}).encode())


def test_images_are_refused_if_the_plan_has_none():
    with pytest.raises(RequestError, match="no images are taken: none are planned"):
        MediaReader().inputs(chat(image_part(sent(PLAIN))), type(llava()[0]), None)
    with pytest.raises(RequestError, match="LlamaForCausalLM takes no images"):
        MediaReader().inputs(chat(image_part(sent(PLAIN))), LlamaForCausalLM, None)


def test_images_larger_than_planned_after_processing_are_refused():
    model, processor = llava()
    processor.chat_template = CHAT
    workload = WorkloadShape(batch_size=4, context_length=100, prompt_length=100, images=1)
    reader = MediaReader(planned=workload, processor=processor, reason=None).of_model(model, REQUEST)
    assert reader.most_numbers == 3 * 32 * 32
    assert "pixel_values" in reader.inputs(chat(image_part(sent(PLAIN))), type(model), None).tensors
    processor.image_processor.size = {"height": 48, "width": 48}
    with pytest.raises(RequestError, match=r"2\.25 times as large as planned") as refusal:
        reader.inputs(chat(image_part(sent(PLAIN))), type(model), None)
    assert refusal.value.param == "messages"


BITS_AT = 34
"""The place of the bits of a sample in a WAV file."""


def sound_part(seconds, rate=16_000, bits=16):
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setparams((1, 2, rate, 0, "NONE", ""))
        written.writeframes(b"\1\0" * round(seconds * rate))
    frames = bytearray(file.getvalue())
    frames[BITS_AT] = bits
    data = base64.b64encode(frames).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def test_sound_is_accepted_up_to_the_planned_length():
    config = {**QWEN2_AUDIO, "audio_config": {**QWEN2_AUDIO["audio_config"], "max_source_positions": 50}}
    model = built(config, torch.float32)
    words = tokenizer(extra_special_tokens={"audio_token": "<image>"})
    processor = Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=16, chunk_length=1), words, CHAT)
    workload = WorkloadShape(batch_size=1, context_length=100, prompt_length=100, audio_seconds=1)
    reader = MediaReader(planned=workload, processor=processor, reason=None).of_model(model, REQUEST)
    for part in (sound_part(1), sound_part(0.5, rate=8_000)):
        inputs = reader.inputs(chat(text_part("who"), part), type(model), None)
        assert inputs.tensors["input_features"].shape == (1, 16, 100)
        assert inputs.prompt_tokens > 5
    for parts, says in (
        ([sound_part(1.5)], "the sound takes 1.5 s, and the plan has room for 1"),
        ([sound_part(1, rate=1)] * 2, "there are 2 sounds, and the plan has room for 1"),
        ([sound_part(0)], "holds no sound"),
        ([sound_part(1, bits=64)], "samples of 64 bits, and at most 32 can be read"),
        ([image_part(sent(PLAIN))], "takes no images"),
    ):
        with pytest.raises(RequestError, match=says):
            reader.inputs(chat(*parts), type(model), None)
