"""Mixtures whose experts compute on the CPU give the logits of the plain model; `test_logits.py` runs this in a
process.

Only the accelerator is simulated.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import simulated_accelerator
import tiny
import torch
import zoo

from devmap_config import load_model
from devmap_config.cli.compile import compile_command
from devmap_config.libraries.transformers import chooses_experts_implementation

simulated_accelerator.install()
logging.disable(logging.WARNING)

MIXTURES = """
    afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots1
    dots3_note_text ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo flint glm4_moe glm4_moe_lite glm4v_moe
    glm5_next glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3
    hy_v4 hy_v4_vl inkling2 inkling2_loop inkling_mm_model jamba kimi_linear kolibri1 laguna lara_mini lfm2_moe
    mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl mistral4 mistral_large4 mixtral nemotron_h olmoe
    openai_privacy_filter phimoe qwen2_moe qwen3_5_moe qwen3_moe qwen3_next qwen3_omni_moe_thinker qwen3_vl_moe
    solar_open zaya
""".split()
"""Every type with fused experts of which `tiny.py` makes a model that runs: all of them hold.

But for `unlimited_ocr`, which the simulated accelerator does not run by itself.
"""


def pins_of_experts(model):
    classes = dict.fromkeys(
        type(module).__name__ for module in model.modules() if chooses_experts_implementation(module)
    )
    assert classes
    return ", ".join(f'{{match: "class:{name}", device: cpu, compute: cpu}}' for name in classes)


@torch.no_grad()
@pytest.mark.zoo
@pytest.mark.parametrize("model_type", sorted(set(MIXTURES) & set(zoo.model_types())))
def test_experts_on_the_cpu(model_type, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_class = type(tiny.save(model_type, Path("random")))
    plain = model_class.from_pretrained("random", dtype="float32", experts_implementation="eager").eval()
    inputs = tiny.inputs_for(plain)
    Path("profile.yaml").write_text(
        "version: 1\nmodel: {source: random, dtype: float32}\n"
        "hardware: {devices: {npu:0: {memory: 8GiB}, cpu: {memory: 8GiB}}}\n"
        f"placement: {{strategy: sequential, pins: [{pins_of_experts(plain)}]}}\n"
    )
    assert compile_command.main(["profile.yaml", "-q"], standalone_mode=False) == 0
    model = load_model("profile.yaml")
    found = tiny.tensors_of(model(**{name: tensor.to("npu:0") for name, tensor in inputs.items()}))
    expected = tiny.tensors_of(plain(**inputs))
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.cpu(), other, rtol=1e-4, atol=1e-5)
