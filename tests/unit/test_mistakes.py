"""Mistakes of new users are each reported once, at their place, with the line to write instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from devmap_config.compiler import Request, run_pipeline

PROFILE = """\
version: 1
model: {source: models/llama}
workload: {context_length: 64}
hardware:
  devices:
    cuda:0: rtx-4090
    cpu: {memory: 64GiB}
placement: {strategy: fastest}
"""

DEVICES = "  devices:\n    cuda:0: rtx-4090\n    cpu: {memory: 64GiB}"

FOUR_BIT = "quantization: {method: bitsandbytes, load_in_4bit: true}"

MODEL, WORKLOAD, CARD, CPU, PLACEMENT = (
    "{source: models/llama}",
    "{context_length: 64}",
    "cuda:0: rtx-4090",
    "cpu: {memory: 64GiB}",
    "{strategy: fastest}",
)

MISTAKES = [
    # What is replaced, by what; the text that is marked; the code; what the help says.
    (CPU, "cpu: {memory: 64}", "64", "few-bytes", "write `64GiB`"),
    (CPU, "cpu: {memory: 65536}", "65536", "few-bytes", "write `65536MiB`"),
    (PLACEMENT, "{strategy: auto, max_memory: {0: 20}}", "20", "few-bytes", "write `20GiB`"),
    (
        CARD + "\n    ",
        "",
        "cpu",
        "missing-figure",
        "write `cpu: {memory: 64GiB, bandwidth: 50GB/s}`, or what `devmap probe --measure`",
    ),
    (CPU, "cpu: {memory: 64GiB, bandwidth: 400Gbit/s}", "400Gbit/s", "bad-quantity", "write `50GB/s`"),
    (CPU, "cpu: {memory: 64GiB, bandwidth: 100Mbps}", "100Mbps", "bad-quantity", "write `12.5MB/s`"),
    (CPU, "cpu: {bandwidth: 50GB/s}", "cpu", "missing-memory", "write `cpu: {memory: 24GiB, bandwidth: 50GB/s}`"),
    (CARD, "gpu:0: rtx-4090", "gpu:0", "bad-device-name", "write `cuda:0`"),
    (CARD, "GPU1: rtx-4090", "GPU1", "bad-device-name", "write `cuda:1`"),
    (CARD, "CUDA:0: rtx-4090", "CUDA:0", "bad-device-name", "write `cuda:0`"),
    (CARD, "rocm:0: mi300x", "rocm:0", "bad-device-name", "write `cuda:0`"),
    (CARD, "cuda: 2xrtx-4090", "cuda", "bad-device-name", '`"cuda:[0-1]"` for two'),
    (CARD, '"cuda:0-1": rtx-4090', '"cuda:0-1"', "bad-device-name", 'write `"cuda:[0-1]"`'),
    (CPU, "ram: {memory: 64GiB}", "ram", "bad-device-name", "write `cpu`"),
    (CARD, "cuda:0: 24GiB", "24GiB", "unknown-accelerator", "write `cuda:0: {memory: 24GiB}`"),
    (CARD, "cuda:0: RTX 4090", "RTX 4090", "unknown-accelerator", "did you mean `rtx-4090`?"),
    (CARD, "cuda:0: titan-v", "titan-v", "unknown-accelerator", "describe it: `cuda:0: {memory: 12GiB,"),
    (
        CPU,
        "cpu: {accelerator: epyc, memory: 128GiB, bandwidth: 80GB/s}",
        "epyc",
        "unknown-accelerator",
        "write `cpu: {memory: 128GiB, bandwidth: 80GB/s}`",
    ),
    (CARD, "cuda:0: {gpu: rtx-4090}", "gpu", "unknown-key", "did you mean `accelerator`?"),
    (CARD, "cuda:0: {vram: 24GiB}", "vram", "unknown-key", "did you mean `memory`?"),
    (CPU, "cpu: 64GiB", "64GiB", "unknown-accelerator", "write `cpu: {memory: 64GiB}`"),
    (
        CARD,
        "cuda:0: {accelerator: rtx-4090, memory: 48GiB}",
        "48GiB",
        "memory-beyond-card",
        "`cuda:0: {memory: 48GiB, overhead: 1280MiB, slack: 2%, bandwidth: 1008GB/s, flops: 165200GFLOP/s,",
    ),
    (CARD, "cuda:0: {accelerator: rtx-4090, flops: 165TFLOPS}", "165TFLOPS", "bad-quantity", "write `165TFLOP/s`"),
    (CARD, "cuda:0: {accelerator: rtx-4090, reserve: 30GiB}", "30GiB", "no-capacity", "lower its `reserve`, or"),
    (CARD, f"{CARD}\n    0: rtx-3090", "0", "duplicate-key", "give it a number of its own"),
    (MODEL, "{source: models/llama, dtype: fp16}", "fp16", "wrong-type", "write `dtype: float16`"),
    (MODEL, "{source: models/llama, dtype: int4}", "int4", "wrong-type", f"write `{FOUR_BIT}`"),
    (MODEL, "{source: models/llama, load_in_4bit: true}", "load_in_4bit", "unknown-key", f"write `{FOUR_BIT}`"),
    (MODEL, "{source: models/llama, quantization: int4}", "int4", "wrong-type", f"write `{FOUR_BIT}`"),
    (MODEL, "{source: models/llama, quantization: awq}", "awq", "wrong-type", "write `quantization: {method: awq}`"),
    (MODEL, "{source: models/llama, quantization: {method: nf4}}", "nf4", "wrong-type", f"write `{FOUR_BIT}`"),
    (
        MODEL,
        "{source: models/llama, quantization: {method: bitsandbytes, load_in_4bits: true}}",
        "{method",
        "bad-quantization",
        "replace `load_in_4bits` by `load_in_4bit`",
    ),
    (MODEL, "{source: models/llama}\nextends: models", "models", "missing-file", "name a file"),
    (MODEL, "{source: models/llama, attention: flash}", "flash", "wrong-type", "write `attention: flash_attention_2`"),
    (MODEL, "{source: models/llama, device_map: auto}", "device_map", "unknown-key", "`placement: {strategy: auto}`"),
    (MODEL, "{source: models/llama, trust_remote_code: true}", "trust_remote_code", "unknown-key", "pass `--trust"),
    (MODEL, "{source: models/llama, max_model_len: 8}", "max_model_len", "unknown-key", "write `context_length` under"),
    (MODEL, "{path: models/llama}", "path", "unknown-key", "did you mean `source`?"),
    (MODEL, "models/llama", "models/llama", "wrong-type", "write `model: {source: models/llama}`"),
    (MODEL, "{source: models/lama}", "models/lama", "model-not-found", "did you mean `models/llama`?"),
    (
        MODEL,
        "{source: models/llama/confg.json}",
        "models/llama/confg.json",
        "model-not-found",
        "`models/llama/config.json`",
    ),
    (MODEL, "{source: ~/llama}", "~/llama", "model-not-found", "write the path out"),
    (
        MODEL,
        "{source: https://huggingface.co/Qwen/Qwen3-8B}",
        "https://huggingface.co/Qwen/Qwen3-8B",
        "model-not-found",
        "`source: Qwen/Qwen3-8B`",
    ),
    (MODEL, "{source: m.gguf}", "m.gguf", "model-not-found", "leave it to llama.cpp"),
    (MODEL, "{source: quantised}", "quantised", "model-not-found", "`llama-server -m"),
    (
        MODEL,
        "{source: a/Model-GGUF}",
        "a/Model-GGUF",
        "model-not-found",
        "repository of transformers that it was made from",
    ),
    (MODEL, "{source: lora}", "lora", "model-not-found", "`source: meta-llama/Llama-3.1-8B`"),
    (MODEL, "{source: pipeline}", "pipeline", "model-not-found", "`source: pipeline/text_encoder`"),
    (MODEL, "{source: models/w.safetensors}", "models/w.safetensors", "model-not-found", "`source: models`"),
    (MODEL, "{source: empty}", "empty", "model-not-found", "as `save_pretrained` writes it"),
    (
        MODEL,
        "{source: models/llama, class: LlamaForCasualLM}",
        "LlamaForCasualLM",
        "unsupported-model",
        "check `class`",
    ),
    (WORKLOAD, "{max_seq_len: 64}", "max_seq_len", "unknown-key", "did you mean `context_length`?"),
    (
        WORKLOAD,
        "{context_length: 64, train: true}",
        "train",
        "unknown-key",
        "not for training: it has no room",
    ),
    (WORKLOAD, "{context_length: 64, optimizer: adamw}", "optimizer", "unknown-key", "not for training"),
    (MODEL, "{source: models/llama, lora: lora}", "lora", "unknown-key", "did you mean `adapter`?"),
    (MODEL, "{source: models/llama, draft_model: models/llama}", "draft_model", "unknown-key", "mean `assistant`?"),
    (
        MODEL,
        "{source: models/llama, assistant: {model: models/llama}}",
        "model",
        "unknown-key",
        "did you mean `source`?",
    ),
    (WORKLOAD, "8192", "8192", "wrong-type", "write `workload: {context_length: 8192}`"),
    (PLACEMENT, "fastest", "fastest", "wrong-type", "write `placement: {strategy: fastest}`"),
    (PLACEMENT, "{device_map: auto}", "auto", "wrong-type", "write `strategy: auto`"),
    (PLACEMENT, "{policy: auto}", "policy", "unknown-key", "did you mean `strategy`?"),
    (PLACEMENT, "{n_gpu_layers: 4}", "n_gpu_layers", "unknown-key", "pin what is to be on the CPU"),
    (PLACEMENT, "{pins: [{layer: lm_head, device: 0}]}", "layer", "unknown-key", "did you mean `match`?"),
    (WORKLOAD, "{context_length: ${CTX}}", "${CTX}", "needs-quotes", 'write `"{{ CTX }}"`, and `--set CTX='),
    (WORKLOAD, '{context_length: "{{ env.CTX }}"}', '"{{', "undefined-variable", "the environment is not read"),
    (CARD, "cuda:0: {accelerator: rtx-4090, efficiency: 80}", "80", "bad-quantity", "write `80%`"),
    (PLACEMENT, "{pins: [lm_head: cuda:0]}", "lm_head", "missing-key", 'write `{match: "lm_head", device: cuda:0}`'),
    (
        PLACEMENT,
        "{pins: [{match: lm_head, device: cpu, compute: disk}]}",
        "disk",
        "bad-device-name",
        "write `compute: cpu`",
    ),
    (
        f"\n{DEVICES}",
        " [rtx-4090]",
        "[",
        "wrong-type",
        "`hardware: {devices",
    ),
    (DEVICES, "  devices: {}", "{}", "wrong-type", "for example"),
    (
        DEVICES,
        "  cuda:0: l4",
        "cuda:0",
        "unknown-key",
        "one level deeper",
    ),
    (PLACEMENT, "{pins: [{match: lm_head, device: gpu}]}", "gpu", "bad-device-name", "write `cuda:0`"),
    (
        WORKLOAD,
        "{context_length: 64, cache: {implementation: quantized, backend: hqq}}",
        "hqq",
        "wrong-type",
        "never measured here: write `quanto`",
    ),
    (PLACEMENT, "{strategy: tensor-parallel}", "tensor-parallel", "unknown-strategy", "write `strategy: fastest`"),
    (PLACEMENT, "{strategy: pipeline}", "pipeline", "unknown-strategy", "write `strategy: fastest`"),
    (CARD, "cuda:0: {memory: auto}", "auto", "bad-quantity", "write how much there is, such as `24GiB`"),
    (CARD, "cuda:0: *card", "*card", "needs-quotes", "write `&card` before that one"),
]


@pytest.fixture
def folder(workspace):
    """A repository with a model, and with files that are none."""
    Path(".git").mkdir()
    Path("models").mkdir()
    Path("llama").rename("models/llama")
    Path("models/w.safetensors").write_bytes(b"\0" * 8)
    Path("m.gguf").write_bytes(b"GGUF")
    for name in ("quantised", "lora", "pipeline/text_encoder", "empty"):
        Path(name).mkdir(parents=True)
    Path("quantised/q4.gguf").write_bytes(b"GGUF")
    Path("lora/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}))
    Path("pipeline/text_encoder/config.json").write_text("{}")
    parts = {"text_encoder": ["transformers", "CLIPTextModel"], "unet": ["diffusers", "UNet2DConditionModel"]}
    Path("pipeline/model_index.json").write_text(json.dumps({"_class_name": "Pipeline", **parts}))
    return Path()


@pytest.mark.parametrize(
    ("correct", "mistake", "marked", "code", "help"), MISTAKES, ids=[mistake[1][:40] for mistake in MISTAKES]
)
def test_a_mistake_is_reported_once_with_what_to_write(folder, correct, mistake, marked, code, help):
    assert correct in PROFILE
    Path("p.yaml").write_text(PROFILE.replace(correct, mistake))
    [finding] = run_pipeline(Request(path=Path("p.yaml"))).diagnostics
    assert finding.code == code
    assert help in finding.help
    line = Path("p.yaml").read_text().splitlines()[finding.span.line - 1]
    assert line[finding.span.column - 1 :].startswith(marked)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("LlamaForCasualLM", "LlamaForCausalLM"), ("AutoModelForVision2Seq", "AutoModelForImageTextToText")],
)
def test_a_misspelt_class_is_reported_with_the_right_one(folder, name, meant):
    Path("p.yaml").write_text(PROFILE.replace(MODEL, f"{{source: models/llama, class: {name}}}"))
    [finding] = run_pipeline(Request(path=Path("p.yaml"))).diagnostics
    assert f"did you mean `{meant}`?" in finding.message


def test_a_range_in_python_syntax_is_reported(folder):
    pin = '{strategy: fastest, pins: [{match: "model.layers[:4]", device: 0}]}'
    Path("p.yaml").write_text(PROFILE.replace(PLACEMENT, pin))
    [finding] = run_pipeline(Request(path=Path("p.yaml"))).diagnostics
    assert finding.label == "a range is a segment of its own: `model.layers.[:4]`"


def test_links_by_unknown_names_are_reported(folder):
    Path("p.yaml").write_text(PROFILE.replace("placement", "  links: {pcie: 25GB/s, nvlink: 600GB/s}\nplacement"))
    found = [(each.code, each.help) for each in run_pipeline(Request(path=Path("p.yaml"))).diagnostics]
    assert found == [("unknown-key", "did you mean `host`?"), ("unknown-key", "did you mean `peer`?")]


def test_the_help_for_a_modified_card_compiles(folder):
    card = "{memory: 48GiB, overhead: 1280MiB, slack: 2%, bandwidth: 1008GB/s, flops: 165200GFLOP/s, efficiency: 80%}"
    text = PROFILE.replace(CARD, f"cuda:0: {card}").replace("placement", "  links: {host: 25GB/s}\nplacement")
    Path("p.yaml").write_text(text)
    assert run_pipeline(Request(path=Path("p.yaml"))).diagnostics == ()
