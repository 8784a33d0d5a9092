"""Tensors on disk that no hook of accelerate loads where they are used are refused, or kept on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    BartConfig,
    BartForConditionalGeneration,
    LongcatFlashConfig,
    LongcatFlashForCausalLM,
)

from devmap_config import load_model
from devmap_config.cli.compile import compile_command
from devmap_config.compiler import Compiled, Request, run_pipeline

HEAD = "model.vision_tower.head"


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save_bart():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=128,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=64,
    )
    model = BartForConditionalGeneration(config).eval()
    model.final_logits_bias.normal_()
    model.save_pretrained("random")
    return model


def write(placement, cpu="1GiB"):
    Path("profile.yaml").write_text(
        "version: 1\nmodel: {source: random, dtype: float32}\n"
        f"hardware: {{devices: {{cpu: {{memory: {cpu}}}, disk: {{memory: 1GiB}}}}}}\n"
        f"placement:\n  offload: {{folder: ./offload, buffers: true}}\n  {placement}\n"
    )


def compiled(*, simulates=True):
    return run_pipeline(Request(path=Path("profile.yaml"), simulates=simulates))


def error_of(compilation):
    (found,) = [each for each in compilation.diagnostics if each.severity == "error"]
    return found


@torch.no_grad()
def test_a_buffer_of_the_model_itself_is_kept_on_the_cpu():
    """accelerate moves tensors of the model itself, but does not load one from disk with `offload_buffers`."""
    plain = save_bart()
    write("strategy: sequential", cpu="100KiB")
    compilation = compiled()
    (warning,) = [each for each in compilation.diagnostics if each.code == "stranded-tensor"]
    assert "`final_logits_bias`" in warning.message
    assert compilation.plan.placement["final_logits_bias"] == "cpu"
    assert "disk" in compilation.plan.placement.values()
    compile_command.main(["profile.yaml", "-q"], standalone_mode=False)
    inputs = {"input_ids": torch.arange(4, 14)[None], "decoder_input_ids": torch.arange(4, 8)[None]}
    assert torch.equal(load_model("profile.yaml")(**inputs).logits, plain(**inputs).logits)


def test_such_a_buffer_pinned_to_disk_is_refused_at_the_pin():
    save_bart()
    write("pins: [{match: final_logits_bias, device: disk}]")
    error = error_of(compiled(simulates=False))
    assert (error.code, error.span.line, error.span.column) == ("stranded-tensor", 6, 18)
    assert "`final_logits_bias` to cpu" in error.help


@torch.no_grad()
def test_the_output_matrix_of_torchs_attention_is_kept_on_the_cpu():
    """`MultiheadAttention` never calls its last matrix as a module; text does not show it, the first image does."""
    tiny.save("gemma3", Path("random"))
    write("strategy: single\n  device: disk")
    assert compile_command.main(["profile.yaml", "-q"], standalone_mode=False) == 0
    placement = compiled().plan.placement
    assert placement[f"{HEAD}.attention"] == "cpu"
    assert placement["model.language_model.layers.0"] == "disk"
    plain = AutoModelForImageTextToText.from_pretrained("random", dtype="float32")
    size = plain.config.vision_config.image_size
    image = torch.ones((1, 3, size, size))
    found = load_model("profile.yaml").get_image_features(image)
    expected = plain.get_image_features(image)
    assert torch.equal(found.pooler_output, expected.pooler_output)


def test_the_output_matrix_of_torchs_attention_pinned_to_disk_is_refused_with_a_remedy():
    tiny.save("gemma3", Path("random"))
    pins = "{match: model.vision_tower, device: disk}"
    write(f"pins: [{pins}]")
    error = error_of(compiled(simulates=False))
    assert (error.code, error.span.line) == ("stranded-tensor", 6)
    assert f"`{HEAD}.attention.out_proj.weight` is used without its module being called" in error.message
    assert f"pin `{HEAD}` to cpu" in error.help
    write(f"pins: [{pins}, {{match: {HEAD}, device: cpu}}]")
    compilation = compiled()
    assert isinstance(compilation, Compiled)
    assert compilation.plan.placement["model.vision_tower.encoder.layers.0"] == "disk"


def test_a_weight_read_by_its_parent_is_found_by_running_the_tower():
    """SigLIP 2 resizes the weight of its position embedding, which it never calls."""
    tiny.save("lfm2_vl", Path("random"))
    write(f"pins: [{{match: model.vision_tower, device: disk}}, {{match: {HEAD}, device: cpu}}]")
    assert isinstance(compiled(simulates=False), Compiled)
    error = error_of(compiled())
    assert (error.code, error.span.line) == ("stranded-tensor", 6)
    assert "`model.vision_tower.embeddings.position_embedding.weight`, which nothing brings there" in error.message
    write("strategy: single\n  device: disk")
    mended = compiled()
    assert mended.plan.placement["model.vision_tower.embeddings.position_embedding"] == "cpu"
    assert any("position_embedding" in each.message for each in mended.diagnostics if each.code == "stranded-tensor")


def test_a_weight_read_by_its_parent_is_found_after_code_that_needs_data():
    """A router multiplies by its classifier's weight itself; on a CPU this would compute with missing data and raise no
    error.

    The first layer's experts depend on data, so a plain dry run does not reach the second layer.
    """
    config = LongcatFlashConfig(
        vocab_size=128,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        ffn_hidden_size=32,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        head_dim=8,
        moe_topk=2,
        n_routed_experts=4,
        zero_expert_num=2,
        expert_ffn_hidden_size=16,
    )
    LongcatFlashForCausalLM(config).save_pretrained("random")
    write("pins: [{match: model.layers.1, device: disk}]")
    error = error_of(compiled())
    assert (error.code, error.span.line) == ("stranded-tensor", 6)
    assert "`model.layers.1.mlp.router.classifier.weight`, which nothing brings there from disk" in error.message


@torch.no_grad()
def test_a_weight_read_without_a_call_is_found_in_a_model_without_a_dry_run():
    """A sound encoder adds its position table; a dry run with text alone does not reach it."""
    plain = tiny.save("qwen2_audio_encoder", Path("random"))
    write("strategy: single\n  device: disk")
    compilation = compiled()
    assert any(each.code == "not-simulated" for each in compilation.diagnostics)
    assert any("`embed_positions.weight`" in each.message for each in compilation.diagnostics)
    assert compilation.plan.placement["embed_positions"] == "cpu"
    assert compilation.plan.placement["layers.0"] == "disk"
    compile_command.main(["profile.yaml", "-q"], standalone_mode=False)
    inputs = tiny.inputs_for(plain)
    found = load_model("profile.yaml")(**inputs).last_hidden_state
    assert torch.equal(found, plain(**inputs).last_hidden_state)
    write("pins: [{match: embed_positions, device: disk}]")
    error = error_of(compiled())
    assert (error.code, error.span.line) == ("stranded-tensor", 6)
    assert "`embed_positions.weight`, which nothing brings there from disk" in error.message


POSITIONS = ("model.encoder.embed_positions", "model.decoder.embed_positions")


def compiled_with_its_checkpoint():
    return run_pipeline(Request(path=Path("profile.yaml"), checks_checkpoint=True))


@torch.no_grad()
def test_tensors_that_transformers_computes_are_kept_off_the_disk():
    plain = tiny.save("marian", Path("random"))
    write("strategy: single\n  device: disk")
    compilation = compiled_with_its_checkpoint()
    assert [compilation.plan.placement[positions] for positions in POSITIONS] == ["cpu", "cpu"]
    assert compilation.plan.placement["model.encoder.layers.0"] == "disk"
    assert compile_command.main(["profile.yaml", "-q"], standalone_mode=False) == 0
    inputs = tiny.inputs_for(plain)
    assert torch.equal(load_model("profile.yaml")(**inputs).logits, plain(**inputs).logits)


def test_tensors_that_transformers_computes_are_refused_if_pinned_to_disk():
    tiny.save("marian", Path("random"))
    write("pins: [{match: model.encoder, device: disk}]")
    error = error_of(compiled_with_its_checkpoint())
    assert (error.code, error.span.line) == ("stranded-tensor", 6)
    assert f"`{POSITIONS[0]}.weight` is in no file of the checkpoint" in error.message
    assert f"`{POSITIONS[0]}` to cpu" in error.help


def test_computed_tensors_that_the_checkpoint_holds_are_read_from_disk():
    plain = tiny.save("marian", Path("random"))
    tensors = load_file("random/model.safetensors")
    for positions in POSITIONS:
        tensors[f"{positions}.weight"] = plain.get_submodule(positions).weight.detach().clone()
    save_file(tensors, "random/model.safetensors", metadata={"format": "pt"})
    write("pins: [{match: model.encoder, device: disk}]")
    compilation = compiled_with_its_checkpoint()
    assert compilation.model.graph.computed == frozenset()
    assert isinstance(compilation, Compiled), compilation.diagnostics
    assert compilation.plan.placement[POSITIONS[0]] == "disk"
