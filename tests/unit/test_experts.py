"""Experts on the CPU: by whichever product they are computed, they say the same."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from devmap_config.dispatch.cpu_compute import CPU_EXPERTS, use_cpu_experts
from devmap_config.libraries.transformers import chooses_experts_implementation

TOKENS = torch.arange(3, 15)[None]
NEW_TOKENS = 3


def logits(model):
    """Those of all tokens of a prefill, and of each token that is decoded after it."""
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
def test_experts_on_the_cpu_say_what_eager_ones_say(model_type):
    model = tiny_model(model_type).eval()
    experts = [module for module in model.modules() if chooses_experts_implementation(module)]
    model.set_experts_implementation("eager")
    expected = logits(model)
    use_cpu_experts(model, lambda _: True)
    model.set_experts_implementation("batched_mm")  # as `generate` does while an accelerator decodes
    assert {module.config._experts_implementation for module in experts} == {CPU_EXPERTS}
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_experts_of_which_something_is_elsewhere_are_left_alone():
    model = tiny_model("mixtral")
    use_cpu_experts(model, lambda name: "layers.0." in name or name.endswith("down_proj"))
    found = [module.config is model.config for module in model.modules() if chooses_experts_implementation(module)]
    assert found == [False] + [True] * (len(found) - 1)
