"""The dry run refuses or repairs plans that do not run, before loading, and predicts memory, devices and copies
correctly.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import dispatch_model, hooks
from broken_maps import BROKEN_MAPS
from click.testing import CliRunner
from conftest import LLAMA
from joining_models import JOINS, code_of, config_of
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile

from devmap_config import ProfileError, compile_profile
from devmap_config.cli.compile import compile_command
from devmap_config.cli.simulate import simulate
from devmap_config.compiler import Compiled, Rejected, Request, run_pipeline
from devmap_config.devices import CPU, Device
from devmap_config.graph.recording import Traffic
from devmap_config.libraries.torch import tensors_without_data
from devmap_config.profile.permissions import Permissions
from devmap_config.simulate import memory
from devmap_config.simulate.devices import SimulatedDevices
from devmap_config.simulate.memory import simulation_of
from devmap_config.simulate.simulation import Simulation, Verdict

CARDS = '"cuda:[0-1]": {memory: 64MiB, bandwidth: 1TB/s}'
LINKS = "links: {host: 25GB/s, peer: 10GB/s}"


def write(config=LLAMA, *, devices=CARDS, context=64, placement="strategy: sequential", workload=""):
    Path("model").mkdir(exist_ok=True)
    Path("model/config.json").write_text(json.dumps(config))
    Path("profile.yaml").write_text(
        "version: 1\nmodel: {source: model}\n"
        f"workload: {{context_length: {context}{workload}}}\n"
        f"hardware:\n  devices: {{{devices}}}\n  {LINKS}\nplacement:\n  " + placement.replace("\n", "\n  ") + "\n"
    )


def pipeline(**permissions):
    return run_pipeline(Request(path=Path("profile.yaml"), simulates=True, permissions=Permissions(**permissions)))


def simulated(**options):
    compilation = run_pipeline(Request(path=Path("profile.yaml")))
    assert isinstance(compilation, Compiled), [each.message for each in compilation.diagnostics]
    return compilation, simulation_of(compilation.plan, compilation.model, **options)


def error_of(compilation):
    [error] = (each for each in compilation.diagnostics if each.severity == "error")
    return error


# What does not run


@pytest.mark.parametrize("name", BROKEN_MAPS)
def test_a_map_that_does_not_run_is_refused_with_a_remedy(workspace, name):
    broken = BROKEN_MAPS[name]
    device_map = "".join(f'\n  "{pattern}": {device}' for pattern, device in broken.device_map.items())
    write(broken.config, placement=f"strategy: manual\ndevice_map:{device_map}")
    if broken.code is not None:
        Path("model/modeling_sharing.py").write_text(broken.code)
        text = Path("profile.yaml").read_text()
        Path("profile.yaml").write_text(text.replace("source: model}", "source: model, class: AutoModelForCausalLM}"))
    compilation = pipeline(trust_remote_code=broken.code is not None)
    error = error_of(compilation)
    assert (type(compilation), error.code) == (Rejected, "device-mismatch")
    assert f"in `{broken.running}`" in error.message
    assert "on cuda:0" in error.message
    assert "cuda:1" in error.message
    assert broken.mend in error.help
    line = Path("profile.yaml").read_text().splitlines()[error.span.line - 1]
    assert line.strip().startswith(tuple(f'"{pattern}"' for pattern in broken.device_map))


def test_logits_that_do_not_fit_are_refused(workspace):
    config = {**LLAMA, "vocab_size": 32_000}
    write(config, devices="cuda:0: {memory: 24MiB}", context=2048)
    assert isinstance(pipeline(), Compiled)
    write(config, devices="cuda:0: {memory: 24MiB}", context=2048, workload=", logits: all")
    error = error_of(pipeline())
    assert error.code == "over-capacity"
    assert "context_length" in error.help


def test_compile_profile_raises_and_the_command_writes_no_lock(workspace):
    write(
        placement='strategy: sequential\npins: [{match: "model.layers.[0-5]", device: 0}, '
        '{match: "model.layers.2.mlp", device: 1}]'
    )
    with pytest.raises(ProfileError, match="device-mismatch"):
        compile_profile("profile.yaml")
    done = CliRunner().invoke(compile_command, ["profile.yaml"], standalone_mode=False)
    assert done.return_value == 1
    assert not Path("profile.lock.json").exists()
    done = CliRunner().invoke(compile_command, ["profile.yaml", "--no-simulate"], standalone_mode=False)
    assert done.return_value == 0
    assert Path("profile.lock.json").exists()


# What is mended

BIOGPT = {
    "architectures": ["BioGptForCausalLM"],
    "model_type": "biogpt",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
"""A model whose blocks transformers does not declare as no-split."""


def test_blocks_that_a_strategy_split_are_kept_together(workspace):
    write(BIOGPT, devices='"cuda:[0-1]": {memory: 640KiB}', placement="strategy: auto")
    before = run_pipeline(Request(path=Path("profile.yaml"))).plan
    assert any(each.unit.startswith("biogpt.layers.") and each.unit.count(".") > 2 for each in before.assignments)
    compilation = pipeline()
    [warning] = compilation.diagnostics  # and nothing of the plan that was split
    assert warning.code == "kept-together"
    assert "`biogpt.layers.[0-5]`" in warning.message
    units = {each.unit: str(each.location.stored_on) for each in compilation.plan.assignments}
    assert {units[f"biogpt.layers.{index}"] for index in range(6)} == {"cuda:0", "cuda:1"}
    assert [verdict.outcome for verdict in compilation.verdicts.values()] == ["mismatch", "runs"]
    assert pipeline().plan == compilation.plan  # as it is remembered


def test_modules_that_pins_separate_are_not_repaired(workspace):
    write(
        BIOGPT,
        placement="strategy: auto\npins:\n  - {match: biogpt.layers.0, device: 0}\n"
        "  - {match: biogpt.layers.0.fc2, device: 1}",
    )
    error = error_of(pipeline())
    assert (error.code, error.span.line) == ("device-mismatch", 11)


def write_joining(join, *, layers=6, context=None, pins=""):
    """Write a model whose own forward combines outputs of blocks, for two cards that would each hold all of it."""
    Path("model").mkdir(exist_ok=True)
    Path("model/config.json").write_text(json.dumps(config_of(layers)))
    Path("model/modeling_joining.py").write_text(code_of(join))
    workload = "" if context is None else f"workload: {{context_length: {context}}}\n"
    Path("profile.yaml").write_text(
        f"version: 1\nmodel: {{source: model}}\n{workload}"
        f"hardware: {{devices: {{'cuda:[0-1]': {{memory: {60 * layers}KiB}}}}}}\n"
        f"placement: {{strategy: balanced, pins: [{pins}]}}\n"
    )


@pytest.mark.parametrize("context", [None, 16])
@pytest.mark.parametrize("join", JOINS)
def test_blocks_that_the_models_own_forward_combines_are_kept_together(workspace, join, context):
    write_joining(join, context=context)
    before = run_pipeline(Request(path=Path("profile.yaml"), permissions=Permissions(trust_remote_code=True))).plan
    compilation = pipeline(trust_remote_code=True)
    [warning] = compilation.diagnostics
    *tried, last = [verdict.outcome for verdict in compilation.verdicts.values()]
    assert (set(tried), last, warning.code) == ({"mismatch"}, "runs", "kept-together")
    assert "as `balanced` placed it" in warning.message
    assert "balanced" in Path("profile.yaml").read_text().splitlines()[warning.span.line - 1]
    moved = [path for path in before.placement if before.placement[path] != compilation.plan.placement.get(path)]
    assert moved
    assert "; moved: " in warning.message


def test_repair_gives_the_same_plan_as_a_keep_together_pin(workspace):
    write_joining("caches that are stacked as they come", context=16)
    mended = pipeline(trust_remote_code=True)
    assert "`transformer.layers.[0-5]` on one device; moved: `transformer.layers.[0-2]` from cuda:0 to cuda:1" in (
        mended.diagnostics[0].message
    )
    write_joining(
        "caches that are stacked as they come", context=16, pins='{match: "**.layers.*", keep_together: true}'
    )
    pinned = pipeline(trust_remote_code=True)
    assert pinned.diagnostics == ()
    assert mended.plan.assignments == pinned.plan.assignments


def test_many_layers_are_repaired_in_a_few_rounds(workspace):
    write_joining("a weight of the first block", layers=40)
    compilation = pipeline(trust_remote_code=True)
    assert isinstance(compilation, Compiled)
    assert len(compilation.verdicts) <= 4
    assert "`transformer.layers.[0-39]` on one device" in compilation.diagnostics[0].message


def test_only_the_combined_blocks_are_kept_on_one_device(workspace):
    write_joining("the first output beside the last")
    [warning] = pipeline(trust_remote_code=True).diagnostics
    assert "`transformer.layers.[0,5]` on one device" in warning.message


def test_pins_that_separate_combined_blocks_are_named(workspace):
    pins = "{match: transformer.layers.0, device: 0}, {match: transformer.layers.5, device: 1}"
    write_joining("caches that are stacked as they come", context=16, pins=pins)
    error = error_of(pipeline(trust_remote_code=True))
    assert error.code == "device-mismatch"
    assert "change the pins that hold them apart" in error.help
    assert "`transformer.layers.0` (line 5, cuda:0)" in error.help
    assert "`transformer.layers.5` (line 5, cuda:1)" in error.help


def test_a_pin_that_decides_for_the_kept_together_blocks_is_shown(workspace):
    write_joining("caches that are stacked as they come", pins="{match: transformer.layers.0, device: 0}")
    compilation = pipeline(trust_remote_code=True)
    [warning] = compilation.diagnostics
    [related] = warning.related
    assert (related.span.line, related.message) == (4, "what is kept together with this moves along to cuda:0")
    assert {compilation.plan.placement[f"transformer.layers.{index}"] for index in range(4)} == {0}


# What cannot be told


def test_a_model_whose_code_depends_on_data_gives_a_warning(workspace):
    config = {"architectures": ["JetMoeForCausalLM"], "model_type": "jetmoe", "dtype": "bfloat16", "hidden_size": 64}
    config |= {"num_hidden_layers": 2, "intermediate_size": 64, "kv_channels": 16, "vocab_size": 64}
    write({**config, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2})
    compilation = pipeline()
    assert isinstance(compilation, Compiled)
    assert {each.code for each in compilation.diagnostics} == {"unmeasured-model", "not-simulated"}
    assert [verdict.outcome for verdict in compilation.verdicts.values()] == ["unsimulated"]


# What is seen


def test_dry_run_gives_memory_by_device_and_copies_by_link(workspace):
    write(placement='strategy: sequential\npins: [{match: "{model.layers.[3-5],model.norm,lm_head}", device: 1}]')
    compilation, simulation = simulated()
    assert simulation.outcome == "runs"
    planned = {str(use.id): use for use in compilation.plan.devices}
    for device in simulation.devices:
        use = planned[str(device.id)]
        assert (device.weights_bytes, device.cache_bytes) == (use.weights_bytes, use.kv_cache_bytes)
        assert device.weights_bytes < device.peak_bytes <= use.capacity_bytes - use.free_bytes
    assert simulation.hops == 1
    hidden_bytes = 64 * 64 * 2
    links = {(link.phase, str(link.source), str(link.target)): link for link in simulation.links}
    assert links["prefill", "cuda:0", "cuda:1"].size_bytes >= hidden_bytes
    assert not any(link.weights_bytes for link in simulation.links)
    assert {str(step.device) for step in simulation.steps if step.block == "model.layers.3"} == {"cuda:1"}
    assert {phase for phase, _, _ in simulation.calls} == {"prefill", "decode"}


def test_dry_run_copies_streamed_weights_at_every_forward(workspace):
    write(
        devices="cuda:0: {memory: 64MiB}, cpu: {memory: 1GiB}, disk: {memory: 1GiB}",
        placement="strategy: sequential\noffload: {folder: offload}\n"
        'pins: [{match: "model.layers.1", device: cpu}, {match: "model.layers.2", device: disk}]',
    )
    compilation, simulation = simulated()
    layer_bytes = compilation.model.graph.weights_bytes(
        tuple(tensor.name for tensor in compilation.model.graph.modules["model.layers.1"].tensors())
    )
    weights = {(link.phase, str(link.source)): link.weights_bytes for link in simulation.links if link.weights_bytes}
    assert weights == {(phase, store): layer_bytes for phase in ("prefill", "decode") for store in ("cpu", "disk")}
    assert {str(device) for _, path, device in simulation.calls if path.startswith("model.layers.")} == {"cuda:0"}


def test_dry_run_runs_cpu_computed_modules_on_the_cpu(workspace):
    write(
        devices=f"{CARDS}, cpu: {{memory: 1GiB}}",
        placement='strategy: sequential\npins: [{match: "model.layers.1.mlp", device: cpu, compute: cpu}]',
    )
    _, simulation = simulated()
    assert simulation.outcome == "runs"
    ran_on = {path: str(device) for phase, path, device in simulation.calls if phase == "decode"}
    assert ran_on["model.layers.1.mlp.down_proj"] == "cpu"
    assert ran_on["model.layers.1.mlp"] == "cpu"
    assert ran_on["model.layers.1"] == ran_on["model.layers.1.self_attn"] == "cuda:0"
    assert ("decode", "cpu", "cuda:0") in {
        (link.phase, str(link.source), str(link.target)) for link in simulation.links
    }


def test_dry_run_decodes_with_a_full_cache_after_a_short_prompt(workspace):
    write(context=512, workload=", prompt_length: 16")
    compilation, simulation = simulated()
    planned = {str(use.id): use for use in compilation.plan.devices}
    for device in simulation.devices:
        use = planned[str(device.id)]
        assert device.cache_bytes == use.kv_cache_bytes
        assert device.peak_bytes <= use.capacity_bytes - use.free_bytes
    [first] = (device for device in simulation.devices if str(device.id) == "cuda:0")
    assert (first.peak_phase, first.cache_bytes > 0) == ("decode", True)
    assert {phase for phase, _, _ in simulation.calls} == {"prefill", "decode"}


def test_modules_that_a_text_prompt_does_not_call_are_reported(workspace):
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    vision |= {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    text = {key: value for key, value in LLAMA.items() if key not in ("architectures", "dtype")}
    text |= {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 32}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "dtype": "bfloat16"}
    write({**config, "text_config": text, "vision_config": vision, "mm_tokens_per_image": 4})
    _, simulation = simulated()
    assert simulation.outcome == "runs"
    assert any("vision_tower" in path for path in simulation.idle)
    assert not any("language_model.layers" in path for path in simulation.idle)
    assert "a prompt of text alone does not call" in run_command().stdout


def profiled_peak(model, tokens):
    with torch.no_grad():
        model(tokens, use_cache=True)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            output = model(tokens, use_cache=True, logits_to_keep=1)
    del output
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("streamed", ["model.layers.[2-5]", "model.layers.[1,3]", "{model.layers.0,lm_head}"])
def test_dry_run_memory_and_devices_are_those_of_a_real_run_over_cpu_and_disk(workspace, streamed):
    config = {**LLAMA, "hidden_size": 128, "intermediate_size": 512, "dtype": "float32"}
    arguments = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "dtype")}
    write(
        config,
        devices="cpu: {memory: 1GiB}, disk: {memory: 1GiB}",
        context=256,
        placement=f'strategy: sequential\noffload: {{folder: offload}}\npins: [{{match: "{streamed}", device: disk}}]',
    )
    compilation, simulation = simulated()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**arguments)).eval()
    # As transformers does, but that what is on the disk is read, and not mapped: the profiler takes maps for memory.
    dispatch_model(model, compilation.plan.device_map, main_device="cpu", offload_dir="offload")
    ran_on = []

    def called(path, output):
        values = [output] if isinstance(output, torch.Tensor) else getattr(output, "to_tuple", lambda: output)()
        ran_on.append((path, next(each for each in values if isinstance(each, torch.Tensor)).device.type))

    for path, module in model.named_modules():
        module.register_forward_hook(lambda _module, _arguments, output, path=path: called(path, output))
    peak = profiled_peak(model, torch.ones((1, 256), dtype=torch.long))
    prefill = [dict(step.live_bytes).get(CPU, 0) for step in simulation.steps if step.phase == "prefill"]
    assert max(prefill) == pytest.approx(peak, rel=0.1)
    expected = [(path, str(device)) for phase, path, device in simulation.calls if phase == "prefill"]
    assert ran_on[: len(expected)] == expected


# What it leaves behind


def test_dry_run_leaves_the_libraries_unchanged(workspace):
    def state():
        modes = torch.overrides._len_torch_function_stack(), torch.utils._python_dispatch._len_torch_dispatch_stack()
        return FakeTensor.device, hooks.set_module_tensor_to_device, gc.isenabled(), modes

    before = state()
    for pins in ('{match: "model.layers.[3-5]", device: 1}', "{match: model.layers.3.mlp, device: 1}"):
        write(placement=f"strategy: sequential\npins: [{pins}]")
        simulated()
        assert state() == before
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"
    tokens = torch.tensor([[1, 2, 3]])
    assert tokens.device.type == "cpu"
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(hidden_size=32, num_attention_heads=2, vocab_size=64, num_hidden_layers=1)
    )
    assert model(tokens).logits.device.type == "cpu"


# What is remembered


def test_a_plan_is_dry_run_once(workspace, monkeypatch):
    write()
    assert isinstance(pipeline(), Compiled)
    monkeypatch.setattr(memory, "simulation_of", lambda *_arguments, **_options: pytest.fail("it was tried again"))
    assert isinstance(pipeline(), Compiled)


def test_a_damaged_cache_of_dry_runs_is_replaced(workspace, monkeypatch):
    write({**LLAMA, "vocab_size": 255})
    monkeypatch.setenv("XDG_CACHE_HOME", str(workspace / "cache"))
    first = pipeline().verdicts
    [kept] = (workspace / "cache/devmap-config/dry-runs").iterdir()
    whole = kept.read_text()
    kept.write_text(whole[:40])
    assert pipeline().verdicts == first
    assert kept.read_text() == whole


def test_a_verdict_round_trips_through_json(workspace):
    write(BIOGPT, devices='"cuda:[0-1]": {memory: 640KiB}', placement="strategy: auto")
    verdicts = pipeline().verdicts.values()
    assert any(verdict.mismatch is not None for verdict in verdicts)
    for verdict in verdicts:
        assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict
    with pytest.raises(ValueError, match="not a verdict"):
        Verdict.from_json({"outcome": "runs"})


def test_a_vendored_graph_includes_its_dry_runs(workspace, monkeypatch):
    write(BIOGPT, devices='"cuda:[0-1]": {memory: 640KiB}', placement="strategy: auto")
    assert compile_command.main(["profile.yaml", "-q", "--vendor"], standalone_mode=False) == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(workspace / "empty"))
    monkeypatch.setattr(memory, "find_spec", lambda name: None)  # as where torch is not installed
    compilation = pipeline()
    assert [each.code for each in compilation.diagnostics] == ["kept-together"]
    write(BIOGPT, placement="strategy: auto\npins: [{match: biogpt.layers.5, device: 1}]")
    assert [each.code for each in pipeline().diagnostics] == ["not-simulated"]


# The command


def run_command(*arguments):
    return CliRunner().invoke(simulate, ["profile.yaml", *arguments], standalone_mode=False, catch_exceptions=False)


def test_simulate_shows_devices_blocks_and_links(workspace):
    write(placement='strategy: sequential\npins: [{match: "{model.layers.[3-5],model.norm,lm_head}", device: 1}]')
    done = run_command()
    assert done.return_value == 0
    assert "LlamaForCausalLM on simulated accelerators: it runs" in done.stdout
    assert "model.layers.[0-2]" in done.stdout
    assert "cuda:0 → cuda:1" in done.stdout


def test_simulate_uses_the_variables_of_the_lock(workspace):
    write(placement='strategy: sequential\npins: [{match: lm_head, device: "{{ head }}"}]')
    Path("profile.yaml").write_text(Path("profile.yaml").read_text() + "variables: {head: 0}\n")
    compiling = ["profile.yaml", "-q", "--set", "head=1"]
    assert CliRunner().invoke(compile_command, compiling, standalone_mode=False).return_value == 0
    value = json.loads(run_command("--format", "json").stdout)
    assert value["plan"]["device_map"]["lm_head"] == 1


def test_simulate_without_torch_says_so(workspace, monkeypatch):
    write()
    assert compile_command.main(["profile.yaml", "-q", "--vendor", "--no-simulate"], standalone_mode=False) == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(workspace / "empty"))
    monkeypatch.setattr(memory, "find_spec", lambda name: None)
    value = json.loads(run_command("--format", "json").stdout)
    assert (value["simulation"], [each["code"] for each in value["diagnostics"]]) == (None, ["not-simulated"])


def test_simulate_prints_json_and_fails_if_the_plan_does(workspace):
    write()
    done = run_command("--format", "json")
    value = json.loads(done.stdout)
    assert (done.return_value, value["simulation"]["outcome"], value["diagnostics"]) == (0, "runs", [])
    assert set(value["simulation"]) == set(Simulation(outcome="runs").to_json())
    pins = '{match: "model.layers.2", device: 0}, {match: "model.layers.2.mlp", device: 1}'
    write(placement=f"strategy: sequential\npins: [{pins}]")
    done = run_command("--format", "json")
    value = json.loads(done.stdout)
    assert (done.return_value, value["plan"], value["simulation"]["outcome"]) == (1, None, "mismatch")
    assert value["simulation"]["mismatch"]["running"] == "model.layers.2"
    assert [step["block"] for step in value["simulation"]["steps"]][-1] == "model.layers.1"


def test_a_new_tensor_at_a_freed_address_is_not_on_the_old_device():
    with tensors_without_data():
        devices = SimulatedDevices((Device("cuda", 0),), {}, (), {}, Traffic({}, frozenset()))
        for _ in range(100):
            devices.put(torch.ones(3), Device("cuda", 0))
            assert devices.of(torch.ones(3)) == CPU
