"""Plans with an accelerator are loaded and run; `test_compute_on_cpu.py` collects this in a process of its own.

The product's code runs unchanged, from profile to generated tokens; only the accelerator is simulated.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import simulated_accelerator
import torch
from accelerate.hooks import remove_hook_from_module, remove_hook_from_submodules
from accelerate.utils import align_module_device
from broken_maps import BROKEN_MAPS
from click.testing import CliRunner
from conftest import LLAMA, MIXTURE
from joining_models import JOINS, code_of, config_of
from late_copies import LateCopies
from small_models import MODELS
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from devmap_config import DevmapWarning, compile_profile, load_model
from devmap_config.cli.adopt import adopt
from devmap_config.cli.compile import compile_command
from devmap_config.cli.run import run as run_model
from devmap_config.compiler import Request, run_pipeline
from devmap_config.dispatch import streamed_weights
from devmap_config.dispatch.loads import ALIGNMENT_BYTES
from devmap_config.dispatch.streamed_weights import StreamingHook
from devmap_config.dispatch.weights_on_disk import Piece
from devmap_config.graph.costs import WorkloadShape
from devmap_config.graph.forwards import Forwards
from devmap_config.libraries.accelerate import hooks_of
from devmap_config.placement import executors
from devmap_config.plan.plan import NotADeviceMapError
from devmap_config.probe import torch_rates
from devmap_config.probe.block import block_text, hardware_block
from devmap_config.probe.measuring import measured, steps
from devmap_config.probe.probe import probe_machine
from devmap_config.probe.torch_rates import Devices
from devmap_config.profile.permissions import NO_PERMISSIONS, Permissions
from devmap_config.runner import benchmark_process, loading, receipts
from devmap_config.runner.benchmark import jobs_of
from devmap_config.runner.demonstration import planned_generation
from devmap_config.runner.inspection import tensor_home
from devmap_config.runner.loading import RunnerError
from devmap_config.runner.runner import prepare
from devmap_config.simulate.memory import simulation_of

simulated_accelerator.install()

TOKENS = torch.tensor([[1, 5, 9, 200, 31, 77]])
NEW_TOKENS = 4
CPU = torch.device("cpu")
CARD = torch.device("npu:0")
DISK = ", disk: {memory: 1GiB}"
FOLDER = "  offload: {folder: offload}\n"


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(config):
    """Random weights of a small model, in `random`."""
    values = {key: value for key, value in config.items() if key not in ("architectures", "dtype", "model_type")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values))
    model.to(torch.bfloat16).save_pretrained("random")


def load(*pins, workload="", model="", disk=""):
    """The model in `random`, by a profile whose pins place some of it off the first card."""
    lines = "".join(f"    - {{{pin}}}\n" for pin in pins)
    Path("profile.yaml").write_text(
        f"version: 1\nmodel: {{source: random{model}}}\n"
        f"hardware: {{devices: {{npu:0: {{memory: 1GiB}}, npu:1: {{memory: 1GiB}}, cpu: {{memory: 1GiB}}{disk}}}}}\n"
        f"{workload}placement:\n  strategy: sequential\n{FOLDER if disk else ''}  pins:\n{lines}"
    )
    assert compile_command.main(["profile.yaml", "-q"], standalone_mode=False) == 0
    return load_model("profile.yaml")


@torch.no_grad()
def assert_same_as_plain(model, **arguments):
    """Bit by bit the plain model's logits, and its tokens; the logits come back to the card."""
    plain = AutoModelForCausalLM.from_pretrained("random", **arguments)
    logits = model(TOKENS.to(CARD)).logits
    assert logits.device == CARD
    assert torch.equal(logits.cpu(), plain(TOKENS).logits)
    tokens = model.generate(TOKENS.to(CARD), max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(tokens.cpu(), plain.generate(TOKENS, max_new_tokens=NEW_TOKENS, do_sample=False))


def computed(match):
    return f'match: "{match}", device: cpu, compute: cpu'


@pytest.mark.parametrize(
    "pins",
    [
        pytest.param([computed("model.layers.[2-3].mlp")], id="a part of a block"),
        pytest.param([computed("model.layers.[2-3].self_attn")], id="attention with its cache"),
        pytest.param([computed("model.layers.[4-5]")], id="whole blocks"),
        pytest.param([computed("model.layers.2.mlp.up_proj"), computed("model.norm")], id="leaves"),
        pytest.param([computed("{model.embed_tokens,lm_head}")], id="embedding and head"),
        pytest.param([computed("model.rotary_emb")], id="buffers only"),
        pytest.param(
            [
                computed("model.layers.[2-3].mlp"),
                'match: "model.layers.[2-3].{self_attn,input_layernorm,post_attention_layernorm}", device: cpu',
            ],
            id="a part of blocks that are streamed",
        ),
        pytest.param(
            [computed("model.layers.1"), 'match: "model.layers.2", device: cpu', 'match: "model.layers.3", device: 1'],
            id="beside a streamed block and one on another card",
        ),
        pytest.param(['match: "model.layers.[0-4]", device: cpu'], id="only streamed"),
    ],
)
def test_a_llama_gives_the_logits_of_the_plain_model(pins):
    save(LLAMA)
    assert_same_as_plain(load(*pins))


@pytest.fixture
def copies(monkeypatch):
    """The simulated card is one for which weights are copied ahead, and is late with them."""
    streams = LateCopies()
    monkeypatch.setattr(executors, "PINNING_KIND", "npu")
    monkeypatch.setattr(streamed_weights, "CudaStreams", lambda _device: streams)
    monkeypatch.setattr(streamed_weights, "_pin", lambda *_: True)
    monkeypatch.setattr(streamed_weights, "_unpin", lambda _memories: None)
    return streams


@pytest.mark.parametrize(
    ("config", "pins"),
    [
        pytest.param(LLAMA, ['match: "model.layers.[0-4]", device: cpu'], id="blocks"),
        pytest.param(
            LLAMA,
            [
                computed("model.layers.1"),
                'match: "{model.layers.2,lm_head}", device: cpu',
                'match: "model.norm", device: 1',
            ],
            id="beside what computes on the CPU and on another card",
        ),
        pytest.param(MIXTURE, ['match: "model.layers.*.mlp.experts", device: cpu'], id="experts"),
        pytest.param(
            {**LLAMA, "tie_word_embeddings": True},
            ['match: "{model.embed_tokens,lm_head,model.layers.*}", device: cpu'],
            id="with a tied head",
        ),
    ],
)
def test_weights_copied_ahead_give_the_logits_of_the_plain_model(config, pins, copies):
    save(config)
    model = load(*pins, workload="workload: {context_length: 64}\n")
    plan = compile_profile("profile.yaml")
    assert plan.executor.name == "devmap"
    assert_same_as_plain(model, **({"experts_implementation": "eager"} if config is MIXTURE else {}))
    (card,) = (use for use in plan.devices if use.id == plan.main_device)
    slots = {copy.target.data_ptr(): copy.target.nbytes for copy in copies.copies}
    assert len(slots) == 2
    assert 2 * max(slots.values()) <= card.overhead_bytes


@pytest.mark.parametrize(
    ("name", "resident"),
    [
        ("dense", "model.norm"),
        ("tied head", "transformer.ln_f"),
        ("fused experts", "model.layers.1"),
        ("encoder and decoder", "decoder.final_layer_norm"),
        ("parameters around modules in every block", "backbone.norm_f"),
        ("a bias that is shared with a module within", "bert.encoder.layer.1"),
    ],
)
def test_weights_planned_to_be_copied_ahead_are(name, resident, copies):
    torch.manual_seed(0)
    MODELS[name]().save_pretrained("random")
    model = load(
        'match: "*", device: cpu', f"match: {resident}, device: 0", workload="workload: {context_length: 64}\n"
    )
    compiled = run_pipeline(Request(path=Path("profile.yaml")))
    plan, graph = compiled.plan, compiled.model.graph
    hooks = {
        (path, module): hook
        for path, module in model.named_modules()
        for hook in hooks_of(module)
        if isinstance(hook, StreamingHook)
    }
    assert {f"{path}.{name}" for (path, module), hook in hooks.items() for name in hook._load.places[module]} == {
        name
        for name, location in plan.locations.items()
        if plan.executor.is_copied_in(graph.tensors[name], location) and plan.executor.is_brought_ahead(location)
    }
    (card,) = (use for use in plan.devices if use.id == plan.main_device)
    rounding = ALIGNMENT_BYTES * len(graph.tensors)
    slots = {slot.memory.data_ptr(): slot.memory.nbytes for hook in hooks.values() for slot in hook._streamer._slots}
    assert card.overhead_bytes <= sum(slots.values()) < card.overhead_bytes + rounding


@pytest.mark.parametrize(
    ("config", "dtype"), [(LLAMA, "bfloat16"), (LLAMA, "float32"), (MIXTURE, "bfloat16")], ids=["", "cast", "experts"]
)
def test_weights_on_disk_are_read_ahead_for_a_card(config, dtype, copies):
    save(config)
    model = load(
        'match: "model.layers.[0-1]", device: disk',
        'match: "{model.layers.2,lm_head}", device: cpu',
        workload="workload: {context_length: 64}\n",
        model=f", dtype: {dtype}",
        disk=DISK,
    )
    plan = compile_profile("profile.yaml")
    assert plan.executor.name == "devmap"
    plain = {"experts_implementation": "eager"} if config is MIXTURE else {}
    assert_same_as_plain(model, dtype=getattr(torch, dtype), **plain)
    on_disk = {name for name, location in plan.locations.items() if str(location.stored_on) == "disk"}
    hooks = {module: hook for module in model.modules() for hook in hooks_of(module)}
    paths = {module: path for path, module in model.named_modules()}
    read = {
        f"{paths[module]}.{name}"
        for module, hook in hooks.items()
        if isinstance(hook, StreamingHook) and hook._load.piece is not None
        for name in hook._load.places[module]
    }
    assert read == on_disk
    (ram,) = (use for use in plan.devices if str(use.id) == "cpu")
    staging = [memory for memory, _ in hooks[model.model.layers[0].self_attn.q_proj]._streamer._reader._staging]
    pages = ALIGNMENT_BYTES + 2 * 4096 * len(on_disk)
    assert ram.overhead_bytes <= sum(memory.nbytes for memory in staging) + pages
    assert sum(memory.nbytes for memory in staging) <= ram.overhead_bytes + pages


def test_each_card_copies_in_its_own_modules(copies, monkeypatch):
    """Over its own link: a load for one card is in transit while the other computes."""
    of_cards = {}
    monkeypatch.setattr(streamed_weights, "CudaStreams", lambda device: of_cards.setdefault(str(device), LateCopies()))
    save(ROUTED)
    model = load(
        'match: "{model.layers.0,lm_head}", device: cpu',
        'match: "model.layers.[1,3]", device: cpu, compute: npu:1',
        'match: "model.layers.2", device: npu:1',
        computed("model.norm"),
        workload="workload: {context_length: 64}\n",
    )
    plan = compile_profile("profile.yaml")
    assert plan.executor.name == "devmap"
    assert {unit: str(device) for unit, device in plan.compute.items()} == {
        "model.layers.1": "npu:1",
        "model.layers.3": "npu:1",
        "model.norm": "cpu",
    }
    assert "are copied to npu:0 and npu:1 at every forward" in plan.streaming
    with pytest.raises(
        NotADeviceMapError, match=r"computes on npu:1 and the CPU, which a device_map cannot say: model"
    ):
        print(plan.device_map)
    assert_same_as_plain(model)
    assert sorted(of_cards) == ["npu:0", "npu:1"]
    for use in plan.devices[:2]:
        slots = {copy.target.data_ptr(): copy.target.nbytes for copy in of_cards[str(use.id)].copies}
        assert 0 < 2 * max(slots.values()) <= use.overhead_bytes + 2 * ALIGNMENT_BYTES * 20
    ran_on = calls_of(model)
    model(TOKENS.to(CARD), use_cache=True)
    simulation = simulation_of(plan, run_pipeline(Request(path=Path("profile.yaml"))).model)
    ran_on |= dict.fromkeys(plan.computed_on_cpu, "cpu")  # whose results come back before they are seen here
    assert {path: str(device) for phase, path, device in simulation.calls if phase == "prefill"} == ran_on


def test_cards_alternate_if_their_links_together_are_faster(copies, monkeypatch):
    """While a block computes on one card, the next one's weights are copied to the other."""
    of_cards = {}
    monkeypatch.setattr(streamed_weights, "CudaStreams", lambda device: of_cards.setdefault(str(device), LateCopies()))
    save({**LLAMA, "num_hidden_layers": 8})
    card = "{memory: 300KiB, bandwidth: 1TB/s, flops: 100TFLOP/s}"
    Path("profile.yaml").write_text(
        "version: 1\nmodel: {source: random}\nworkload: {context_length: 64}\n"
        f'hardware:\n  devices: {{"npu:[0-1]": {card}, cpu: {{memory: 1GiB}}}}\n'
        "  links: {host: 10MB/s, together: 20MB/s, peer: 10GB/s}\nplacement: {strategy: fastest}\n"
    )
    assert compile_command.main(["profile.yaml", "-q"], standalone_mode=False) == 0
    plan = compile_profile("profile.yaml")
    targets = [str(each.location.runs_on) for each in plan.assignments if plan.executor.streams(each.location)]
    assert len(targets) >= 4
    assert all(one != other for one, other in pairwise(targets))
    assert_same_as_plain(load_model("profile.yaml"))
    assert sorted(of_cards) == ["npu:0", "npu:1"]
    for use in plan.devices[:2]:
        slots = {copy.target.data_ptr(): copy.target.nbytes for copy in of_cards[str(use.id)].copies}
        assert 0 < 2 * max(slots.values()) <= use.overhead_bytes + 2 * ALIGNMENT_BYTES * 20


def test_a_read_that_fails_ends_devmap_run_in_one_line(copies, monkeypatch):
    save(LLAMA)
    load('match: "model.layers.[0-1]", device: disk', disk=DISK)
    monkeypatch.setattr(Piece, "read", lambda *_: (_ for _ in ()).throw(OSError("the disk is gone")))
    arguments = ["profile.yaml", "--max-new-tokens", "2", "-q"]
    done = CliRunner().invoke(run_model, arguments, standalone_mode=False, catch_exceptions=False)
    assert done.return_value == 4
    said = " ".join(done.stderr.split())
    assert (
        "error[forward-failed]: the model is loaded and verified, and does not run: OSError: the disk is gone" in said
    )
    assert "Traceback" not in said


def load_for_prompts(*pins):
    """A mixture whose experts compute on the CPU, where that takes so long that prompts are better copied for."""
    save(MIXTURE)
    lines = "".join(f"    - {{{pin}}}\n" for pin in (computed("model.layers.*.mlp.experts"), *pins))
    Path("profile.yaml").write_text(
        "version: 1\nmodel: {source: random}\nworkload: {context_length: 64}\n"
        "hardware:\n  devices:\n    npu:0: {memory: 1GiB, bandwidth: 1TB/s, flops: 1TFLOP/s}\n"
        "    cpu: {memory: 1GiB, bandwidth: 1TB/s, flops: 1GFLOP/s}\n  links: {host: 1GB/s}\n"
        f"placement:\n  strategy: sequential\n  pins:\n{lines}"
    )
    assert compile_command.main(["profile.yaml", "-q"], standalone_mode=False) == 0
    return load_model("profile.yaml")


@pytest.fixture
def runs(copies, monkeypatch):
    """The devices of what experts compute with, by module, as they are called."""
    runs, forward = {}, Qwen3MoeExperts.forward

    def run(experts, *given):
        runs.setdefault(experts, []).append({each.device for each in (*given, *experts.parameters())})
        return copies.compute(experts, forward.__get__(experts), *given)

    monkeypatch.setattr(Qwen3MoeExperts, "forward", run)
    return runs


@torch.no_grad()
@pytest.mark.parametrize(
    "pins", [(), ('match: "{model.layers.2.self_attn,lm_head}", device: cpu',)], ids=["alone", "beside what always is"]
)
def test_experts_on_the_cpu_are_copied_ahead_for_prompts(pins, copies, runs):
    model = load_for_prompts(*pins)
    experts = [layer.mlp.experts for layer in model.model.layers]
    plain, plan = AutoModelForCausalLM.from_pretrained("random"), compile_profile("profile.yaml")
    assert set(plan.prefilled.values()) == {5}
    for tokens, device in ((TOKENS, CARD), (TOKENS[:, :4], CPU), (TOKENS, CARD)):
        runs.clear()
        assert torch.equal(model(tokens.to(CARD)).logits.cpu(), plain(tokens).logits)
        assert [runs[module] for module in experts] == [[{device}]] * 4
    runs.clear()
    assert_same_as_plain(model)
    assert [runs[module] for module in experts] == [[{CARD}] * 2 + [{CPU}] * (NEW_TOKENS - 1)] * 4
    slots = {copy.target.data_ptr(): copy.target.nbytes for copy in copies.copies}
    (card,) = (use for use in plan.devices if use.id == plan.main_device)
    assert len(slots) == 2
    assert 2 * max(slots.values()) <= card.overhead_bytes
    assert len(copies.copies) >= 4 * 4, "each is copied by the one stream that is ahead, in each of four prefills"


@torch.no_grad()
def test_replaced_experts_are_not_copied_for_prompts(runs):
    model = load_for_prompts()
    plain = AutoModelForCausalLM.from_pretrained("random")
    for each in (model, plain):
        changed = each.model.layers[1].mlp.experts
        changed.down_proj.data = changed.down_proj * 2
        each.model.layers[2].mlp.experts.down_proj *= 2  # where it is, which is what is copied
    runs.clear()
    assert torch.equal(model(TOKENS.to(CARD)).logits.cpu(), plain(TOKENS).logits)
    assert [runs[layer.mlp.experts] for layer in model.model.layers] == [[{CARD}], [{CPU}], [{CARD}], [{CARD}]]


@torch.no_grad()
def test_experts_are_on_the_cpu_again_after_a_failure(runs, monkeypatch):
    model = load_for_prompts()
    with monkeypatch.context() as context:
        context.setattr(Qwen3MoeExperts, "_apply_gate", None)
        with pytest.raises(TypeError):
            model(TOKENS.to(CARD))
    assert runs[model.model.layers[0].mlp.experts] == [{CARD}]
    assert {parameter.device for parameter in model.model.layers[0].mlp.experts.parameters()} == {CPU}
    assert_same_as_plain(model)


def test_a_dry_run_copies_experts_only_for_its_prompt(copies):
    load_for_prompts()
    compilation = run_pipeline(Request(path=Path("profile.yaml")))
    simulation = simulation_of(compilation.plan, compilation.model)
    weights_bytes = {"prefill": 0, "decode": 0}
    for link in simulation.links:
        weights_bytes[link.phase] += link.weights_bytes
    units = compilation.plan.prefilled
    held = {str(each.id): each.weights_bytes for each in compilation.plan.devices}
    assert weights_bytes == {"prefill": held["cpu"], "decode": 0}
    ran_on = {(phase, path): str(device) for phase, path, device in simulation.calls if path in units}
    assert ran_on == {
        (phase, unit): device for unit in units for phase, device in (("prefill", "npu:0"), ("decode", "cpu"))
    }


def test_streamed_weights_can_be_read_on_the_cpu(copies):
    """As transformers does when it saves them."""
    save(LLAMA)
    layer = load('match: "model.layers.[0-4]", device: cpu').model.layers[2].mlp.up_proj
    plain = AutoModelForCausalLM.from_pretrained("random").model.layers[2].mlp.up_proj
    with align_module_device(layer, CPU):
        assert torch.equal(layer.weight, plain.weight)
    assert copies.copies == []
    assert layer.weight.is_meta


def test_memory_that_cannot_be_pinned_is_an_error(copies, monkeypatch):
    monkeypatch.setattr(streamed_weights, "_pin", lambda *_: False)
    save(LLAMA)
    with pytest.raises(RunnerError, match=r"KiB of memory cannot be pinned, from which weights are copied"):
        load('match: "model.layers.[0-4]", device: cpu')


def test_tied_embeddings_compute_on_the_cpu():
    save({**LLAMA, "tie_word_embeddings": True})
    assert_same_as_plain(load(computed("{model.embed_tokens,lm_head}")))


def test_experts_on_the_cpu_keep_their_implementation_while_the_others_decode():
    save(MIXTURE)
    model = load(computed("model.layers.[2-3].mlp.experts"), 'match: "model.layers.1", device: cpu')
    during = []
    model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda *_: during.append(implementations(model)))
    model.generate(TOKENS.to(CARD), max_new_tokens=2, do_sample=False)
    # `generate` changes the implementation of the shared config for decoding on accelerators.
    assert during == [["grouped_mm", "grouped_mm"], ["batched_mm", "grouped_mm"]]


def implementations(model):
    return [model.model.layers[index].mlp.experts.config._experts_implementation for index in (1, 2)]


def test_a_mixture_gives_the_logits_of_the_plain_model():
    save(MIXTURE)
    assert_same_as_plain(load(computed("model.layers.*.mlp.experts")))


ROUTED = {
    **MIXTURE,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
"""Its routers hold a buffer that a checkpoint has: a correction for each expert."""


@pytest.mark.parametrize(("offload", "home"), [("{buffers: true}", "cpu"), ("{}", "npu:0")])
def test_buffers_are_offloaded_where_the_plan_says(offload, home):
    save(ROUTED)
    Path("profile.yaml").write_text(
        "version: 1\nmodel: {source: random}\n"
        "hardware: {devices: {npu:0: {memory: 1GiB}, cpu: {memory: 1GiB}}}\n"
        'placement: {strategy: sequential, pins: [{match: "model.layers.[2-3]", device: cpu}], '
        f"offload: {offload}}}\n"
    )
    assert compile_command.main(["profile.yaml", "-q"], standalone_mode=False) == 0
    model = load_model("profile.yaml")
    assert str(tensor_home(model, "model.layers.2.mlp.gate.e_score_correction_bias")) == home
    assert_same_as_plain(model)


@pytest.mark.parametrize(
    ("config", "match", "module_class"),
    [(LLAMA, "model.layers.[2-3].mlp", LlamaMLP), (MIXTURE, "model.layers.[2-3].mlp.experts", Qwen3MoeExperts)],
)
def test_each_unit_runs_once_a_forward_on_the_cpu_and_returns_to_its_block(config, match, module_class, monkeypatch):
    save(config)
    inside, returned = [], []
    original = module_class.forward

    def forward(self, *args):
        inside.append((self, {each.device for each in (*args, *self.parameters())}))
        return original(self, *args)

    monkeypatch.setattr(module_class, "forward", forward)
    model = load(computed(match))
    inside.clear()  # of the dry run, where none is remembered
    units = [model.get_submodule(match.replace("[2-3]", str(index))) for index in (2, 3)]
    for unit in units:
        unit.register_forward_hook(lambda module, args, output: returned.append(output.device))
    model(TOKENS.to(CARD))
    assert [(id(module), devices) for module, devices in inside if module in units] == [(id(u), {CPU}) for u in units]
    assert [devices for module, devices in inside if module not in units] == [{CARD}] * (len(inside) - 2)
    assert returned == [CARD, CARD]


def test_cpu_computed_units_are_not_streamed_and_others_still_are():
    save(LLAMA)
    model = load(computed("model.layers.2"), 'match: "model.layers.3", device: cpu')
    computed_parts, streamed = (list(model.model.layers[index].modules()) for index in (2, 3))
    assert not any(hook.offload for part in computed_parts if (hook := getattr(part, "_hf_hook", None)))
    assert {parameter.device for parameter in model.model.layers[2].parameters()} == {CPU}
    assert any(hook.offload for part in streamed if (hook := getattr(part, "_hf_hook", None)))
    assert {parameter.device.type for parameter in model.model.layers[3].parameters()} == {"meta"}
    assert str(tensor_home(model, "model.layers.3.mlp.up_proj.weight")) == "cpu"


@torch.no_grad()
def test_the_cache_of_attention_on_the_cpu_is_on_the_cpu():
    save(LLAMA)
    model = load(computed("model.layers.[2-3].self_attn"))
    forwards = Forwards(
        model, WorkloadShape(batch_size=1, context_length=TOKENS.shape[1], prompt_length=TOKENS.shape[1])
    )
    cache = forwards.run({"input_ids": TOKENS.to(CARD)})
    cache = forwards.run(forwards.decode_inputs(cache) | {"input_ids": TOKENS[:, -1:].to(CARD)})
    assert [layer.keys.device.type for layer in cache.layers] == ["npu", "npu", "cpu", "cpu", "npu", "npu"]


@torch.no_grad()
def test_without_its_hook_a_cpu_computed_unit_fails():
    """A control: the simulation raises the error that a card would."""
    save(LLAMA)
    model = load(computed("model.layers.2.mlp"))
    model.model.layers[2].mlp._hf_hook.io_same_device = False
    with pytest.raises(RuntimeError, match=r"same device, but found cpu and npu:0"):
        model(TOKENS.to(CARD))


def test_a_unit_that_would_be_streamed_is_refused(monkeypatch):
    save(LLAMA)
    monkeypatch.setattr(loading, "_device_map", lambda plan: dict(plan.placement))
    monkeypatch.setattr(loading, "_compute_on_cpu", lambda _model, _plan: None)
    with pytest.raises(
        RunnerError, match=r"layers\.2\.mlp\.gate_proj runs on npu:0, streamed, planned on cpu"
    ) as error:
        load(computed("model.layers.2.mlp"))
    assert error.value.code == "misplaced-tensors"


# The dry run, which has no numbers, beside a run that has them


def write_broken(broken):
    """The model of a broken map with random weights, and a profile with the map."""
    Path("random").mkdir()
    if broken.code is not None:
        Path("random/modeling_sharing.py").write_text(broken.code)
    Path("random/config.json").write_text(json.dumps(broken.config))
    remote = broken.code is not None
    config = AutoConfig.from_pretrained("random", trust_remote_code=remote)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, trust_remote_code=remote).to(torch.bfloat16).save_pretrained("random")
    Path("random/config.json").write_text(json.dumps(broken.config))
    device_map = "".join(f'\n    "{pattern}": {device}' for pattern, device in broken.device_map.items())
    Path("profile.yaml").write_text(
        "version: 1\nmodel: {source: random, class: AutoModelForCausalLM}\n"
        "hardware: {devices: {npu:0: {memory: 1GiB}, npu:1: {memory: 1GiB}}}\n"
        f"placement:\n  strategy: manual\n  device_map:{device_map}\n"
    )


@torch.no_grad()
@pytest.mark.parametrize("name", BROKEN_MAPS)
def test_a_map_that_is_refused_fails_in_plain_transformers(name):
    broken = BROKEN_MAPS[name]
    write_broken(broken)
    remote = ["--trust-remote-code"] if broken.code is not None else []
    assert compile_command.main(["profile.yaml", "-q", "--no-simulate", *remote], standalone_mode=False) == 0
    device_map = json.loads(Path("profile.lock.json").read_text())["plan"]["device_map"]
    model = AutoModelForCausalLM.from_pretrained(
        "random", device_map=device_map, dtype="bfloat16", trust_remote_code=bool(remote)
    )
    with pytest.raises(RuntimeError, match="same device, but found npu:0 and npu:1"):
        model(TOKENS.to(CARD))
    assert compile_command.main(["profile.yaml", "-q", *remote], standalone_mode=False) == 1


def calls_of(model):
    """Where each module of a model runs, once it has."""
    ran_on = {}

    def note(path, output):
        values = [output] if isinstance(output, torch.Tensor) else getattr(output, "to_tuple", lambda: output)()
        ran_on[path] = str(next(each for each in values if isinstance(each, torch.Tensor)).device)

    for path, module in model.named_modules():
        module.register_forward_hook(lambda _module, _arguments, output, path=path: note(path, output))
    return ran_on


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "pins"),
    [
        pytest.param(LLAMA, ['match: "model.layers.[3-5]", device: 1'], id="two cards"),
        pytest.param(LLAMA, ['match: "model.layers.[1,3]", device: 1', "match: lm_head, device: 1"], id="to and fro"),
        pytest.param(
            LLAMA, ['match: "model.layers.[2-3]", device: cpu', 'match: "model.layers.4", device: 1'], id="streamed"
        ),
        pytest.param(LLAMA, [computed("model.layers.[2-3].mlp"), computed("model.norm")], id="computed on the CPU"),
        pytest.param(MIXTURE, [computed("model.layers.*.mlp.experts")], id="experts"),
        pytest.param(MIXTURE, ['match: "model.layers.[1,3]", device: 1'], id="a mixture on two cards"),
    ],
)
def test_every_module_runs_where_the_dry_run_says(config, pins):
    save(config)
    model = load(*pins)
    ran_on = calls_of(model)
    model(TOKENS.to(CARD), use_cache=True)
    compilation = run_pipeline(Request(path=Path("profile.yaml")))
    simulation = simulation_of(compilation.plan, compilation.model)
    ran_on |= dict.fromkeys(compilation.plan.compute, "cpu")  # whose results come back before they are seen here
    assert {path: str(device) for phase, path, device in simulation.calls if phase == "prefill"} == ran_on


def test_removing_the_hooks_leaves_a_plain_module():
    save(MIXTURE)
    model = load(computed("model.layers.2.mlp.experts"))
    experts = model.model.layers[2].mlp.experts
    assert hasattr(experts, "_hf_hook")
    remove_hook_from_module(model, recurse=True)
    assert experts.forward.__func__ is Qwen3MoeExperts.forward


def test_transformers_reads_the_map_as_it_reads_its_own():
    save(LLAMA)
    model = load(computed("model.layers.2.mlp"))
    assert model.hf_device_map == compile_profile("profile.yaml").placement
    assert {type(device) for device in model.hf_device_map.values()} == {int, str}


def test_streamed_weights_are_frozen_and_placing_them_anew_is_a_warning():
    save(LLAMA)
    model = load('match: "{model.embed_tokens,model.layers.1}", device: cpu')
    assert next(iter(model.hf_device_map.values())) == 0  # to which pipelines bring what the model is given
    assert {p.requires_grad for p in model.parameters() if p.is_meta} == {False}
    assert {p.requires_grad for p in model.parameters() if not p.is_meta} == {True}
    with pytest.warns(DevmapWarning, match="PEFT then places it anew"):
        remove_hook_from_submodules(model)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_devmap_run_generates_on_the_accelerator():
    save(MIXTURE)
    load(computed("model.layers.[2-3].mlp.experts"), computed("model.embed_tokens"))
    done = CliRunner().invoke(
        run_model, ["profile.yaml", "--max-new-tokens", "3"], standalone_mode=False, catch_exceptions=False
    )
    assert done.return_value == 0
    assert done.stdout.startswith("tokens [1, 2, 3, 4, 5, 6, 7, 8, ")
    assert done.stderr.splitlines()[0] == (
        "devmap-config has never been run on real npu devices: what is said of this one rests on simulation and on what"
        " the libraries document"
    )
    arguments = ["profile.yaml", "--no-generate", "--format", "json"]
    done = CliRunner().invoke(run_model, arguments, standalone_mode=False, catch_exceptions=False)
    assert [each["code"] for each in json.loads(done.stdout)["diagnostics"]] == ["never-on-cards"]
    assert done.stderr == ""


def test_devmap_run_omits_warnings_that_the_plan_explains():
    """transformers takes a streamed embedding for one on another device than the tokens."""
    save(LLAMA)
    load('match: "model.embed_tokens", device: cpu')
    arguments = ["profile.yaml", "--max-new-tokens", "2", "--format", "json"]
    done = CliRunner().invoke(run_model, arguments, standalone_mode=False, catch_exceptions=False)
    assert [each["code"] for each in json.loads(done.stdout)["diagnostics"]] == ["never-on-cards"]


def test_labels_of_a_model_over_two_cards_are_those_of_the_plain_one():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=4, num_labels=3)).save_pretrained("random")
    load('match: "bert.encoder.layer.[2-3]", device: npu:1', "match: classifier, device: npu:1")
    done = CliRunner().invoke(run_model, ["profile.yaml", "--format", "json"], standalone_mode=False)
    plain = BertForSequenceClassification.from_pretrained("random")
    with torch.no_grad():
        scores = plain(torch.arange(1, 9)[None]).logits[0].softmax(-1)
    found = {each["label"]: each["score"] for each in json.loads(done.stdout)["output"]}
    assert found == pytest.approx({f"LABEL_{index}": score for index, score in enumerate(scores.tolist())})


def test_random_weights_are_placed_and_run_over_two_cards():
    save(MIXTURE)
    load('match: "model.layers.[2-3]", device: npu:1', computed("model.layers.1.mlp.experts"))
    Path("random/model.safetensors").unlink()
    arguments = ["profile.yaml", "--random-weights", "--max-new-tokens", "3"]
    done = CliRunner().invoke(run_model, arguments, standalone_mode=False, catch_exceptions=False)
    assert done.return_value == 0, done.stderr
    assert "loaded random weights" in done.stderr
    assert "3 tokens after a prompt of 8" in done.stderr


def test_a_plan_and_auto_are_measured_on_a_card(monkeypatch):
    """In this process, since only here the accelerator is simulated."""
    save(LLAMA)
    load('match: "model.layers.[3-5]", device: cpu, compute: cpu')
    monkeypatch.setattr(benchmark_process, "discard_output", lambda stream: None)
    deployment = prepare(Path("profile.yaml"), variables={})
    generation = planned_generation(deployment.compiled.loaded.profile.workload, NEW_TOKENS)
    options = {"variables": {}, "permissions": NO_PERMISSIONS, "generation": generation}
    jobs = jobs_of(deployment, Path("profile.yaml"), **options)
    assert [(job.loader, sorted(map(str, job.max_memory))) for job in jobs] == [
        ("plan", ["0", "1", "cpu"]),
        ("auto", ["0", "1", "cpu"]),
    ]
    for job in jobs:
        sample = benchmark_process.measure(replace(job, least_seconds=0))
        assert isinstance(sample, benchmark_process.Sample), sample
        assert len(sample.generation.decode_seconds) == 1
        assert min(sample.load_seconds, *sample.generation.prefill_seconds, *sample.generation.decode_seconds) > 0
        # `auto` spreads a model that one card would hold.
        held = {"npu:0", "cpu" if job.loader == "plan" else "npu:1"}
        assert set(map(str, sample.generation.kv_cache_bytes)) == held


def test_receipts_of_such_cards_remove_the_never_on_cards_warning(monkeypatch, tmp_path):
    save(LLAMA)
    load('match: "model.layers.4", device: npu:1')
    plan = compile_profile("profile.yaml")
    monkeypatch.setattr(receipts, "FOLDER", tmp_path / "receipts")
    (tmp_path / "receipts").mkdir()

    def said_with(name, devices):
        (tmp_path / "receipts" / name).write_text(json.dumps({"devices": devices}))
        return receipts.never_seen(plan)

    rests_on = "rests on simulation and on what the libraries document"
    never_at_all = f"devmap-config has never been run on real cards: what is said of this one {rests_on}"
    assert receipts.never_seen(plan) == never_at_all
    assert said_with("laptop.json", {"cpu": "cpu"}) == never_at_all
    others = f"devmap-config has never been run on real npu devices: what is said of this one {rests_on}"
    assert said_with("card.json", {"cuda:0": "NVIDIA H100"}) == others
    fewer = "devmap-config was run on 1 real npu card at once (an NPU), never on 2: what is said of several "
    assert said_with("one.json", {"npu:3": "an NPU", "cpu": "cpu"}) == fewer + rests_on
    assert said_with("two.json", {"npu:0": "an NPU", "npu:1": "an NPU"}) is None


def test_the_probe_sees_and_measures_the_cards(monkeypatch):
    monkeypatch.setattr(torch_rates, "COPY_BYTES", 2**20)
    monkeypatch.setattr(torch_rates, "LARGEST_MATRIX", 256)
    monkeypatch.setattr(torch_rates, "LIMIT_SECONDS", 0.01)
    monkeypatch.setattr(torch_rates, "QUIET", 0)
    seen = probe_machine({}, None, kind="npu")
    assert [(str(each.id), each.memory_bytes) for each in seen.accelerators] == [("npu:0", 2**40), ("npu:1", 2**40)]
    planned = [step for step in steps(seen, Path(), Devices()) if step.routes[0][:2] != ("devices", "cpu")]
    begun = []
    measured_rates, failures = measured(tuple(planned), begun.append)
    assert (failures, begun) == ({}, planned)
    block = hardware_block(seen, measured_rates)
    assert set(block["devices"]["npu:1"]) == {"memory", "bandwidth", "flops", "dtypes"}
    assert set(block["links"]) == {"host", "unpinned", "peer"}
    save(LLAMA)
    Path("profile.yaml").write_text(
        "version: 1\nmodel: {source: random}\nworkload: {context_length: 8}\n"
        f"placement: {{strategy: fastest}}\n{block_text(seen, block)}"
    )
    prediction = compile_profile("profile.yaml").prediction
    assert prediction.prefill_nanoseconds > 0


def test_devmap_run_first_checks_the_memory_of_the_cards(monkeypatch):
    save(LLAMA)
    load('match: "model.layers.4", device: npu:1')
    backend = type(torch.npu)
    monkeypatch.setattr(backend, "mem_get_info", lambda self, device=None: (10_000, 2**40))
    done = CliRunner().invoke(run_model, ["profile.yaml"], standalone_mode=False, catch_exceptions=False)
    assert done.return_value == 4
    assert "error[memory-held]: npu:0 has 9.8 KiB of its 1024.0 GiB free now" in done.stderr
    assert done.stderr.count("error[memory-held]") == 2


# Plans that the dry run mended


@torch.no_grad()
@pytest.mark.parametrize("join", JOINS)
def test_a_repaired_plan_gives_the_logits_of_the_plain_model(join):
    Path("random").mkdir()
    Path("random/modeling_joining.py").write_text(code_of(join))
    Path("random/config.json").write_text(json.dumps(config_of(6)))
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained("random", trust_remote_code=True), trust_remote_code=True
    )
    plain.save_pretrained("weights")
    Path("weights/model.safetensors").rename("random/model.safetensors")
    Path("profile.yaml").write_text(
        "version: 1\nmodel: {source: random}\n"
        "hardware: {devices: {npu:0: {memory: 360KiB}, npu:1: {memory: 360KiB}}}\nplacement: {strategy: balanced}\n"
    )
    compilation = run_pipeline(Request(path=Path("profile.yaml"), permissions=Permissions(trust_remote_code=True)))
    model = AutoModelForCausalLM.from_pretrained(
        "random", device_map=compilation.plan.device_map, trust_remote_code=True
    )
    with pytest.raises(RuntimeError, match="same device, but found npu:"):
        model(TOKENS.to(CARD))
    arguments = ["profile.yaml", "-q", "--trust-remote-code"]
    assert compile_command.main(arguments, standalone_mode=False) == 0
    logits = load_model("profile.yaml", trust_remote_code=True)(TOKENS.to(CARD)).logits
    assert torch.equal(logits.cpu(), plain.eval()(TOKENS).logits)


WHOLE_MAP = {
    "model.embed_tokens": "npu:0",
    **{f"model.layers.{index}": "npu:0" if index < 6 else "npu:1" for index in range(12)},
    "model.norm": "npu:1",
    "model.rotary_emb": "npu:0",
    "lm_head": "npu:1",
}
ALL_ON_ONE = dict.fromkeys(WHOLE_MAP, "npu:0")


def without(device_map, key):
    return {name: device for name, device in device_map.items() if name != key}


RUNS, REFUSED, FAILS = "runs", "is not loaded", "fails at the forward"

WHAT_BECOMES_OF_MAPS = {
    "whole": (WHOLE_MAP, False, RUNS, set()),
    "a key that names nothing": ({**WHOLE_MAP, "model.layers.12": "npu:1"}, False, RUNS, {"ignored-key"}),
    "a layer left out": (without(WHOLE_MAP, "model.layers.11"), False, REFUSED, {"uncovered-tensor"}),
    "the head left out": (without(WHOLE_MAP, "lm_head"), False, REFUSED, {"uncovered-tensor"}),
    "the tied head left out": (without(WHOLE_MAP, "lm_head"), True, REFUSED, {"uncovered-tensor"}),
    "a buffer left out": (without(WHOLE_MAP, "model.rotary_emb"), False, RUNS, {"uncovered-tensor"}),  # it is copied
    "one device, a layer left out": (without(ALL_ON_ONE, "model.layers.11"), False, RUNS, {"uncovered-tensor"}),
    "one device, the head left out": (without(ALL_ON_ONE, "lm_head"), False, FAILS, {"uncovered-tensor"}),
    "one device, the tied head left out": (without(ALL_ON_ONE, "lm_head"), True, RUNS, set()),
    "tied tensors on two cards": (WHOLE_MAP, True, FAILS, {"split-tie"}),
    "a tied head on the CPU": ({**WHOLE_MAP, "lm_head": "cpu"}, True, RUNS, {"split-tie"}),
    "a pattern": ({**WHOLE_MAP, "model.layers.[1-3].mlp": "npu:1"}, False, REFUSED, {"misread-map"}),
}


@torch.no_grad()
def what_becomes_of(device_map):
    """Return the outcome of a map in plain transformers, for the model in `random`."""
    try:
        model = AutoModelForCausalLM.from_pretrained("random", device_map=device_map)
    except (ValueError, KeyError):
        return REFUSED
    try:
        model(TOKENS.to(CARD))
    except RuntimeError as error:
        assert "same device" in str(error)
        return FAILS
    return RUNS


@pytest.mark.parametrize("name", WHAT_BECOMES_OF_MAPS)
def test_adopts_findings_match_what_plain_transformers_does_with_a_map(name):
    device_map, is_tied, outcome, codes = WHAT_BECOMES_OF_MAPS[name]
    save({**LLAMA, "num_hidden_layers": 12, "tie_word_embeddings": is_tied})
    assert what_becomes_of(device_map) == outcome
    Path("map.json").write_text(json.dumps(device_map))
    arguments = ["map.json", "--model", "random", "--format", "json", "-o", "adopted.yaml"]
    done = CliRunner().invoke(adopt, arguments, standalone_mode=False)
    found = json.loads(done.stdout)["diagnostics"]
    assert {each["code"] for each in found} == codes
    assert (done.return_value != 0) == (outcome == REFUSED)
    said = " ".join(each["message"] for each in found)
    assert ("refuses" in said or "fails at the key" in said) == (outcome == REFUSED)
    assert ("fails at the forward" in said.replace("fails at the forward unless", "")) == (outcome == FAILS)
    if outcome != REFUSED:
        assert what_becomes_of(compile_profile("adopted.yaml").device_map) == RUNS
