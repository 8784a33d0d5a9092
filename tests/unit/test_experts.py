"""Experts on the CPU give the same outputs by whichever product they are computed."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from devmap_config.dispatch.cpu_compute import CPU_EXPERTS, use_cpu_experts
from devmap_config.libraries.transformers import chooses_experts_implementation

TOKENS = torch.arange(3, 15)[None]
NEW_TOKENS = 3


def logits(model):
    """Return the logits of all prefilled tokens, and of each token decoded after them."""
    generated = model.generate(
        TOKENS, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return torch.cat([model(TOKENS).logits[0], *generated.logits])


@torch.no_grad()
@pytest.mark.parametrize(
    "model_type",
    [
        "qwen3_moe",
        "mixtral",
        "gpt_oss",
        "deepseek_v3",
        "olmoe",
        pytest.param("granitemoehybrid", marks=pytest.mark.zoo),
    ],
)
def test_experts_on_the_cpu_give_the_outputs_of_eager_ones(model_type):
    model = tiny_model(model_type).eval()
    experts = [module for module in model.modules() if chooses_experts_implementation(module)]
    model.set_experts_implementation("eager")
    expected = logits(model)
    use_cpu_experts(model, lambda _: True)
    model.set_experts_implementation("batched_mm")  # as `generate` does while an accelerator decodes
    assert {module.config._experts_implementation for module in experts} == {CPU_EXPERTS}
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_experts_partly_on_another_device_keep_their_implementation():
    model = tiny_model("mixtral")
    use_cpu_experts(model, lambda name: "layers.0." in name or name.endswith("down_proj"))
    found = [module.config is model.config for module in model.modules() if chooses_experts_implementation(module)]
    assert found == [False] + [True] * (len(found) - 1)
