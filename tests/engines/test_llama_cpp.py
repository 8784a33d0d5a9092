"""Exports for llama.cpp work in llama.cpp: names, overrides and tokens; splitting over cards is not tested."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MIXTURE
from small_models import config_of

from devmap_config.exports.llama_cpp import names_of

pytestmark = pytest.mark.engine

PROGRAM = Path(__file__).with_name("on_llama_cpp.py")
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "phi3": "phi3", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe", "gemma2": "gemma2", "gpt2": "gpt2",
}  # fmt: skip

MERGED = "mlp.experts.gate_up_proj"
"""transformers' own, of two tensors of the checkpoint that gguf has names for."""

PROFILE = """\
version: 1
model: {source: model}
hardware: {devices: {cuda:0: {memory: 1GiB}, cpu: {memory: 1GiB}}}
placement: {pins: [{match: "model.layers.[1-2].mlp.experts", device: cpu, compute: cpu}]}
"""

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]


def asked_of(request, asked):
    """Return the program's answer and its log."""
    python = Path(request.config.getoption("--engines")).absolute()
    done = subprocess.run([python, PROGRAM], input=json.dumps(asked), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.rstrip().rpartition("\n")[2]), done.stderr


def test_gguf_names_are_those_of_gguf_and_llama_cpp(request):
    modules: dict[str, list[str]] = {}
    for model_type, architecture in ARCHITECTURES.items():
        modules.setdefault(architecture, []).extend(name.replace(".N.", ".0.") for name in names_of(model_type))
    answers, _ = asked_of(request, {"names": modules})
    for model_type, architecture in ARCHITECTURES.items():
        own, known = answers[architecture]["own"], answers[architecture]["known"]
        for module, tensors in names_of(model_type).items():
            named = [tensor.replace(".N.", ".0.") for tensor in tensors]
            assert set(named) <= set(known), (model_type, module)
            if (model_type, module) == ("gemma2", "lm_head"):  # always tied
                assert own[module] is None
            elif module.endswith(MERGED):
                assert named == ["blk.0.ffn_gate_exps", "blk.0.ffn_up_exps"]
            else:
                assert [own[module.replace(".N.", ".0.")]] == named, (model_type, module)


def test_overrides_move_the_planned_tensors_and_tokens_are_those_of_transformers(request, tmp_path):
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(**config_of(MIXTURE), head_dim=16, norm_topk_prob=True)
    model = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "p.yaml").write_text(PROFILE)
    devmap = Path(sys.executable).with_name("devmap")
    for arguments in (
        ["compile", "-q", "--no-simulate", "p.yaml"],
        ["export", "p.yaml", "--to", "llama.cpp", "-o", "exported", "--model", "model.gguf"],
    ):
        subprocess.run([devmap, *arguments], cwd=tmp_path, check=True, capture_output=True)
    overrides = re.findall(r"-ot '([^']*)'", (tmp_path / "exported" / "serve.sh").read_text())
    files = {"folder": str(tmp_path / "model"), "path": str(tmp_path / "model.gguf")}
    tokens, log = asked_of(request, {**files, "prompts": PROMPTS, "overrides": overrides})
    overridden = set(re.findall(r"tensor (\S+) \(.*buffer type overridden to CPU", log))
    assert overridden == {f"blk.{layer}.ffn_{kind}_exps.weight" for layer in (1, 2) for kind in ("gate", "up", "down")}
    expected = []
    for prompt in PROMPTS:
        made = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        expected.append(made[0, len(prompt) :].tolist())
    assert tokens == expected
