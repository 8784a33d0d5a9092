"""Weights planned on disk run from the checkpoint's own pages: same logits, and no more memory than planned."""

from __future__ import annotations

import copy
import ctypes
import fcntl
import gc
import mmap
import os
import re
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LLAMA
from safetensors.torch import load, save
from small_models import MODELS, TOKENS, config_of
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from devmap_config import compile_profile, load_model
from devmap_config.cli.compile import compile_command
from devmap_config.devices import CPU, DISK
from devmap_config.dispatch import weights_on_disk
from devmap_config.dispatch.mapped_weights import ReadAhead, mapped_place
from devmap_config.graph.checkpoint import CheckpointError
from devmap_config.libraries.accelerate import hooks_of
from devmap_config.probe.machine import SeenHost
from devmap_config.runner.inspection import running_place, tensor_home
from devmap_config.runner.loading import RunnerError

SCARCE = SeenHost(memory_bytes=2**10, available_bytes=2**10, threads=1)


def saved(model, path, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    made = model().to(dtype).eval()
    made.save_pretrained(path)
    return made


def compiled(text="", *, placement="strategy: single, device: disk", dtype="float32"):
    Path("p.yaml").write_text(
        f"""version: 1
model: {{source: random, dtype: {dtype}}}
hardware: {{devices: {{cpu: {{memory: 8MiB}}, disk: {{memory: 1GiB}}}}}}
placement: {{{placement}, offload: {{folder: offload}}}}
{text}"""
    )
    assert compile_command.main(["p.yaml", "-q"], standalone_mode=False) == 0
    return compile_profile("p.yaml")


def outputs(model):
    given = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=TOKENS, **given).logits


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("dense", torch.float32),
        ("dense", torch.bfloat16),  # which is cast
        ("tied head", torch.float32),
        ("fused experts", torch.bfloat16),
        ("encoder and decoder", torch.float32),
    ],
    ids=str,
)
def test_logits_from_disk_are_those_of_the_model_in_memory(workspace, name, dtype):
    saved(MODELS[name], workspace / "random", dtype)
    plan = compiled()
    assert plan.executor.name == "devmap"
    model = load_model("p.yaml", probe=False)
    on_disk = [name for name, location in plan.locations.items() if location.stored_on == DISK]
    auto = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    expected = outputs(auto.from_pretrained(workspace / "random", dtype=torch.float32))
    assert torch.equal(outputs(model), expected)
    assert torch.equal(outputs(model), expected)  # what was let go of comes again
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert on_disk
    for tensor in on_disk:
        if tensor in parameters:
            assert mapped_place(model, tensor) is not None
            assert tensor_home(model, tensor) == DISK
            assert running_place(model, tensor) == (CPU, True)
    assert not any(hooks_of(module) for module in model.modules())


def test_tokens_from_disk_are_those_of_the_model_in_memory(workspace):
    plain = saved(MODELS["dense"], workspace / "random")
    compiled()
    model = load_model("p.yaml", probe=False)
    wanted = plain.generate(TOKENS, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=6, do_sample=False), wanted)


def test_tied_names_share_one_mapping(workspace):
    saved(MODELS["tied head"], workspace / "random")
    compiled()
    model = load_model("p.yaml", probe=False)
    assert model.lm_head.weight is model.transformer.wte.weight


def resident_bytes(tensor):
    """Return the bytes of a tensor that are in the system's memory, over the pages that hold only this tensor."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE
    seen = (ctypes.c_ubyte * pages)()
    assert not ctypes.CDLL(None, use_errno=True).mincore(
        ctypes.c_void_p(start), ctypes.c_size_t(pages * mmap.PAGESIZE), seen
    )
    return sum(each & 1 for each in seen) * mmap.PAGESIZE


def own_bytes(path):
    """Return the bytes of a mapped file that are in this process's memory."""
    maps = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    return sum(
        1024 * int(size)
        for each in maps
        if each.partition("\n")[0].endswith(str(path))
        for size in re.findall(r"(?m)^Rss: +(\d+) kB", each)
    )


@pytest.mark.parametrize("has_memory", [True, False])
def test_pages_of_modules_that_ran_are_released_if_memory_is_scarce(workspace, monkeypatch, has_memory):
    if not has_memory:
        monkeypatch.setattr(weights_on_disk, "seen_host", lambda: SCARCE)
    large = config_of(LLAMA, hidden_size=512, intermediate_size=2048, num_hidden_layers=3)
    saved(lambda: LlamaForCausalLM(LlamaConfig(**large)), workspace / "random")
    os.sync()  # what is still to be written cannot be let go of
    compiled()
    model = load_model("p.yaml", probe=False)
    matrices = [each for each in model.parameters() if each.nbytes >= 2**20]
    assert (sum(map(resident_bytes, matrices)) > 0) == has_memory  # what was written is in the system's memory
    outputs(model)
    largest_bytes, all_bytes = max(each.nbytes for each in matrices), sum(each.nbytes for each in matrices)
    held_bytes = sum(map(resident_bytes, matrices))
    assert held_bytes == pytest.approx(all_bytes, rel=0.01) if has_memory else held_bytes <= 2 * largest_bytes
    assert own_bytes(workspace / "random" / "model.safetensors") <= 2 * largest_bytes < all_bytes / 4


def test_references_to_weights_keep_their_values_after_the_module_ran(workspace, monkeypatch):
    monkeypatch.setattr(weights_on_disk, "seen_host", lambda: SCARCE)
    plain = saved(MODELS["dense"], workspace / "random")
    compiled()
    model = load_model("p.yaml", probe=False)
    kept = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, _, name=name: kept.update({name: module.weight[1:]}))
    for _ in range(2):
        assert torch.equal(outputs(model), outputs(plain))
    assert kept
    for name, rows in kept.items():
        assert torch.equal(rows, plain.get_submodule(name).weight[1:]), name


def test_replaced_weights_are_used(workspace):
    plain = saved(MODELS["dense"], workspace / "random")
    compiled()
    model = load_model("p.yaml", probe=False)
    for each in (model, plain):
        each.model.layers[1].mlp.up_proj.weight.data = torch.ones(128, 64)
        each.model.layers[2].mlp.down_proj.weight = torch.nn.Parameter(torch.ones(64, 128))
        each.model.layers[3].to(torch.float64).float()
    assert torch.equal(outputs(model), outputs(plain))


def one_by_one(model):
    """Return the logits of each token by itself; only the rows of embeddings and experts that it touches are read."""
    with torch.no_grad():
        return torch.cat([model(input_ids=token[None, None], use_cache=False).logits for token in TOKENS[0]])


@pytest.mark.parametrize(
    ("name", "written"),
    [("dense", "loaded"), ("dense", "trained"), ("tied head", "in place"), ("fused experts", "through `data`")],
)
def test_changes_written_to_weights_are_used(workspace, name, written):
    saved(MODELS[name], workspace / "random")
    compiled()
    model = load_model("p.yaml", probe=False)
    plain = AutoModelForCausalLM.from_pretrained(workspace / "random", dtype=torch.float32)
    outputs(model)
    for each in (model, plain):
        if written == "loaded":
            each.load_state_dict({name: tensor * 1.5 for name, tensor in each.state_dict().items()})
        for parameter in each.parameters():
            if written == "in place":
                with torch.no_grad():
                    parameter.view(-1).mul_(1.5)
            elif written == "through `data`":
                parameter.data += 0.25
            elif written == "trained":
                parameter.requires_grad_()
        if written == "trained":
            each(input_ids=TOKENS, labels=TOKENS).loss.backward()
            torch.optim.SGD(each.parameters(), lr=0.1).step()
    for _ in range(2):
        assert torch.equal(outputs(model), outputs(plain))
        assert torch.equal(one_by_one(model), one_by_one(plain))


def test_changes_beside_an_embedding_survive_the_release_of_its_pages(workspace):
    """Whole pages are released, and a page can hold a part of the neighbouring tensor."""
    saved(MODELS["dense"], workspace / "random")
    compiled()
    model = load_model("p.yaml", probe=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" not in name:
                parameter.zero_()
    one_by_one(model)
    assert not any(parameter.any() for name, parameter in model.named_parameters() if "embed_tokens" not in name)


def test_a_deep_copy_is_independent_of_its_model(workspace):
    plain = saved(MODELS["dense"], workspace / "random")
    compiled()
    model = load_model("p.yaml", probe=False)
    copied = copy.deepcopy(model)
    torch.nn.init.zeros_(copied.lm_head.weight)
    assert torch.equal(outputs(model), outputs(plain))
    del model
    gc.collect()
    assert not outputs(copied).any()


def test_the_model_has_a_device_map_so_that_libraries_do_not_move_it(workspace):
    """Pipelines move a model without a map to a card, and PEFT places one with `cpu` in its map anew."""
    saved(MODELS["dense"], workspace / "random")
    compiled()
    assert load_model("p.yaml", probe=False).hf_device_map == {"": torch.device("cpu")}


def test_weights_on_disk_can_have_gradients(workspace):
    saved(MODELS["dense"], workspace / "random")
    compiled()
    model = load_model("p.yaml", probe=False)
    model.lm_head.weight.requires_grad_()
    model(input_ids=TOKENS).logits.sum().backward()
    assert model.lm_head.weight.grad.any()


def test_unaligned_memory_is_read_through_the_systems_cache(workspace, monkeypatch):
    monkeypatch.setattr(weights_on_disk, "pages", lambda size_bytes: np.empty(size_bytes + 1, np.uint8)[1:])
    monkeypatch.setattr(weights_on_disk, "seen_host", lambda: SCARCE)
    plain = saved(MODELS["dense"], workspace / "random")
    compiled()
    assert torch.equal(outputs(load_model("p.yaml", probe=False)), outputs(plain))


def test_pages_of_touched_embedding_rows_are_released(workspace):
    saved(lambda: LlamaForCausalLM(LlamaConfig(**config_of(LLAMA, vocab_size=8192))), workspace / "random")
    compiled()
    model = load_model("p.yaml", probe=False)
    embedding = model.get_input_embeddings()
    embedding(torch.arange(embedding.num_embeddings))
    assert own_bytes(workspace / "random" / "model.safetensors") < embedding.weight.nbytes / 2


def test_a_file_system_without_direct_reads_is_read_through_the_cache(workspace, monkeypatch):
    def refuse(file, command, *flags):
        if flags and flags[0] & os.O_DIRECT:
            raise OSError("not of this file system")
        return control(file, command, *flags)

    control = fcntl.fcntl
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(weights_on_disk, "seen_host", lambda: SCARCE)
    plain = saved(MODELS["dense"], workspace / "random")
    compiled()
    assert torch.equal(outputs(load_model("p.yaml", probe=False)), outputs(plain))


def test_weights_in_memory_do_not_depend_on_the_file(workspace):
    plain = saved(MODELS["dense"], workspace / "random")
    compiled(placement='strategy: sequential, pins: [{match: "model.layers.5", device: disk}]')
    model = load_model("p.yaml", probe=False)
    path = workspace / "random" / "model.safetensors"
    with path.open("r+b") as file:  # the same file, in which pages of a mapping would change
        file.write(b"\0" * path.stat().st_size)
    for name, parameter in model.named_parameters():
        is_mapped = mapped_place(model, name) is not None
        assert is_mapped == name.startswith("model.layers.5."), name
        if not is_mapped:
            assert torch.equal(parameter, plain.get_parameter(name)), name


def test_a_token_reads_only_its_rows_of_experts_and_embeddings(workspace, monkeypatch):
    saved(MODELS["fused experts"], workspace / "random")
    compiled()
    model = load_model("p.yaml", probe=False)
    begun = []
    begin = ReadAhead.begin
    monkeypatch.setattr(ReadAhead, "begin", lambda reader, piece: begun.append(piece) or begin(reader, piece))
    for tokens, wholly_read in ((TOKENS, model.config.num_hidden_layers), (TOKENS[:, :1], 0)):
        begun.clear()
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
        assert sum(piece.is_sparse for piece in begun) == wholly_read
        assert not all(piece.is_sparse for piece in begun)


def test_cast_weights_are_written_once_per_checkpoint(workspace):
    saved(MODELS["dense"], workspace / "random", torch.bfloat16)
    compiled()
    load_model("p.yaml", probe=False)
    written = {path: path.stat().st_mtime_ns for path in (workspace / "offload").iterdir()}
    assert written
    load_model("p.yaml", probe=False)
    assert {path: path.stat().st_mtime_ns for path in (workspace / "offload").iterdir()} == written
    before = outputs(load_model("p.yaml", probe=False))
    saved(MODELS["dense"], workspace / "random", torch.bfloat16, seed=7)
    other = AutoModelForCausalLM.from_pretrained(workspace / "random", dtype=torch.float32)
    assert torch.equal(outputs(load_model("p.yaml", probe=False)), outputs(other))
    assert not torch.equal(outputs(other), before)


@pytest.mark.parametrize("damage", ["cut off", "another byte", "another dtype", "no digest", "another tensor"])
def test_damaged_cast_weights_are_written_again(workspace, damage):
    saved(MODELS["dense"], workspace / "random", torch.bfloat16)
    compiled()
    expected = outputs(load_model("p.yaml", probe=False))
    written = {path: path.read_bytes() for path in (workspace / "offload").iterdir()}
    for path, data in written.items():
        stored = load(data)
        digest = stored.pop("sha256")
        [(name, tensor)] = stored.items()
        path.write_bytes(
            {
                "cut off": data[:-4],
                "another byte": save({name: tensor + 1, "sha256": digest}),
                "another dtype": save({name: tensor.view(torch.int32), "sha256": digest}),
                "no digest": save({name: tensor}),
                "another tensor": save({"x": tensor, "sha256": digest}),
            }[damage]
        )
    assert torch.equal(outputs(load_model("p.yaml", probe=False)), expected)
    assert {path: path.read_bytes() for path in (workspace / "offload").iterdir()} == written


def test_a_checkpoint_that_cannot_be_mapped_is_an_error(workspace, monkeypatch):
    saved(MODELS["dense"], workspace / "random")
    compiled()

    def cut_off(_path):
        raise CheckpointError("unreadable-checkpoint", "`x.safetensors` is cut off", "get the file anew")

    monkeypatch.setattr(weights_on_disk, "read_header", cut_off)
    with pytest.raises(RunnerError, match="weights on disk cannot be mapped: `x"):
        load_model("p.yaml", probe=False)


def test_a_checkpoint_that_shrinks_while_the_model_runs_is_an_error(workspace):
    saved(MODELS["dense"], workspace / "random")
    compiled()
    model = load_model("p.yaml", probe=False)
    path = workspace / "random" / "model.safetensors"
    os.truncate(path, 4096)
    with pytest.raises(OSError, match="before its tensors do"):
        model.model.layers[3](torch.zeros(1, 1, 64), position_embeddings=(torch.zeros(1, 1, 16),) * 2)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_reading_ahead_ends_for_a_module_that_fails(workspace, monkeypatch, error):
    saved(MODELS["dense"], workspace / "random")
    compiled()
    model = load_model("p.yaml", probe=False)
    ended = []
    monkeypatch.setattr(ReadAhead, "end", lambda _, piece: ended.append(piece))

    def fail(*_):
        raise error

    monkeypatch.setattr(torch.nn.functional, "linear", fail)
    with pytest.raises(error):
        model.lm_head(torch.zeros(1, 64))
    assert len(ended) == 1
    assert mapped_place(model, "lm_head.weight") is not None


def test_a_model_on_disk_can_be_saved(workspace):
    plain = saved(MODELS["dense"], workspace / "random")
    compiled()
    load_model("p.yaml", probe=False).save_pretrained(workspace / "again")
    again = AutoModelForCausalLM.from_pretrained(workspace / "again", dtype=torch.float32)
    assert torch.equal(outputs(again), outputs(plain))


def test_a_dropped_model_leaves_no_thread(workspace):
    saved(MODELS["dense"], workspace / "random")
    compiled()
    model = load_model("p.yaml", probe=False)
    outputs(model)
    gone, readers = weakref.ref(model), [each for each in threading.enumerate() if each.name == "devmap-read-ahead"]
    del model
    gc.collect()
    assert gone() is None
    for reader in readers:
        reader.join(10)
        assert not reader.is_alive()


@pytest.mark.parametrize(
    ("devices", "model"),
    [
        ("xpu:0: {memory: 8MiB}, cpu: {memory: 8MiB}, disk: {memory: 1GiB}", ""),
        ("cuda:0: {memory: 900KiB}, disk: {memory: 1GiB}", ""),
        (
            "cpu: {memory: 8MiB}, disk: {memory: 1GiB}",
            ", quantization: {method: bitsandbytes, load_in_8bit: true}",
        ),
    ],
    ids=["beside an accelerator", "without memory of the CPU", "quantised"],
)
def test_accelerate_streams_in_plans_that_cannot_map_weights(workspace, devices, model):
    saved(MODELS["dense"], workspace / "random")
    Path("p.yaml").write_text(
        f"""version: 1
model: {{source: random{model}}}
hardware: {{devices: {{{devices}}}}}
placement: {{strategy: sequential, offload: {{folder: offload}}}}
"""
    )
    assert compile_profile("p.yaml").executor.name == "accelerate"


def test_experts_on_disk_decode_by_the_product_that_is_fast_on_the_cpu(workspace):
    saved(MODELS["fused experts"], workspace / "random")
    Path("p.yaml").write_text(
        """version: 1
model: {source: random}
hardware: {devices: {cpu: {memory: 8MiB}, disk: {memory: 1GiB}}}
placement:
  strategy: sequential
  pins: [{match: model.embed_tokens, device: disk}]
  offload: {folder: offload, buffers: false}
"""
    )
    assert compile_command.main(["p.yaml", "-q"], standalone_mode=False) == 0
    model = load_model("p.yaml", probe=False)
    assert model.device.type == "meta", "of its first weight `generate` tells whether it is on the CPU"
    taken = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(
            lambda module, _: taken.append(module.config._experts_implementation)
        )
    model.generate(TOKENS, max_new_tokens=3, do_sample=False)
    assert taken == ["grouped_mm"] * 3 * model.config.num_hidden_layers
