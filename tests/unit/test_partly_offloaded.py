"""A plan can offload the cache of some layers to the CPU; the choice is optimal, and the lock keeps it."""

from __future__ import annotations

import json
from itertools import combinations_with_replacement, product
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import LLAMA
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from devmap_config.amounts import format_duration
from devmap_config.cli import devmap
from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.devices import CPU, Device
from devmap_config.graph.digest import digest
from devmap_config.libraries.torch import streams_without_a_card
from devmap_config.libraries.transformers import CACHE_NAMES
from devmap_config.locked import compile_locked
from devmap_config.placement import optimal
from devmap_config.plan.explanation import other_cache
from devmap_config.plan.lock import LockError, lock_at, locked_caches, read_lock
from devmap_config.plan.plan import NotADeviceMapError
from devmap_config.profile.schema import Cache
from devmap_config.runner.caches import cache_arguments, give_cache

PROFILE = """\
version: 1
model: {source: llama}
workload: {context_length: 512, prompt_length: 64, cache: CACHE}
hardware:
  devices: {cuda:0: {memory: MEMORY, bandwidth: 1TB/s, flops: 100TFLOP/s}, cpu: {memory: 1GiB}}
  links: {host: LINK}
placement: {strategy: fastest}
"""
LAYERS = 10


@pytest.fixture(autouse=True)
def in_workspace(workspace):
    """A folder with a model of enough layers that the cache in transit is only a part of it."""
    Path("llama/config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": LAYERS}))


def written(cache="partly_offloaded", *, memory="1300KiB", link="1GB/s"):
    Path("p.yaml").write_text(PROFILE.replace("CACHE", cache).replace("MEMORY", memory).replace("LINK", link))
    return Path("p.yaml")


def run(*arguments):
    return CliRunner().invoke(devmap, [*map(str, arguments)])


def compiled():
    done = run("compile", written())
    assert done.exit_code == 0, done.output
    return done.output


def choices_of(chain):
    """Yield every choice, regardless of which of equal blocks take which options."""
    alike = {}
    for position, block in enumerate(chain.blocks):
        alike.setdefault(block.options, []).append(position)
    every = (combinations_with_replacement(range(len(options)), len(alike[options])) for options in alike)
    for taken in product(*every):
        choice = dict(zip((place for places in alike.values() for place in places), sum(taken, ()), strict=True))
        yield tuple(choice[position] for position in range(len(chain.blocks)))


def decoded(cache, memory):
    """Return the nanoseconds of a token by the fastest plan, and that plan."""
    found = run_pipeline(Request(path=written(cache, memory=memory, link="100MB/s")))
    plan = found.plan.fastest or found.plan
    return plan.prediction.decode_nanoseconds_per_token, plan


@pytest.mark.parametrize(("memory", "count"), [("1000KiB", LAYERS), ("1400KiB", 5)])
def test_no_other_set_of_offloaded_caches_is_faster(memory, count, monkeypatch):
    chains, solve = [], optimal.solve
    taken = {cache: decoded(cache, memory)[0] for cache in ("dynamic", "offloaded")}

    def noting(chain, *arguments):
        chains.append(chain)
        return solve(chain, *arguments)

    monkeypatch.setattr(optimal, "solve", noting)
    nanoseconds, plan = decoded("partly_offloaded", memory)
    assert len(plan.offloaded_caches) == count
    least = [
        min(chain.nanoseconds(choice) for choice in choices_of(chain) if chain.is_feasible(choice)) for chain in chains
    ]
    assert [solve(chain).fastest.nanoseconds for chain in chains] == least
    assert nanoseconds == min(least)
    held = {use.id: use.capacity_bytes - use.free_bytes for use in plan.devices}
    assert held in [{CPU: 0, **chain.used_bytes(solve(chain).fastest.choice)} for chain in chains]
    assert nanoseconds <= min(taken.values())
    assert (nanoseconds < min(taken.values())) == (count < LAYERS)


def test_the_plan_lists_offloaded_caches_and_counts_their_bytes():
    said = compiled()
    found = run_pipeline(Request(path=Path("p.yaml")))
    plan, measurement = found.plan, found.graph.measurement
    offloaded = plan.offloaded_caches
    assert 0 < len(offloaded) < LAYERS
    assert "self_attn is on the CPU while they do not run" in " ".join(said.split())
    of_a_layer = measurement.cache_bytes // LAYERS
    held = {use.id: use.kv_cache_bytes for use in plan.devices}
    assert held[CPU] == of_a_layer * len(offloaded)
    assert sum(held.values()) == measurement.cache_bytes
    with pytest.raises(NotADeviceMapError, match=r"has the cache of some layers on the CPU.*self_attn"):
        _ = plan.device_map
    assert "on the CPU while they do not run" in " ".join(run("explain", "p.yaml").output.split())
    for layer in (offloaded[0].removesuffix(".self_attn"), "model.layers.0"):
        explained = " ".join(run("explain", "p.yaml", f"{layer}.mlp").output.split())
        other = other_cache(plan, found.graph, found.inventory, layer)
        if f"{layer}.self_attn" in offloaded:
            assert f"The cache of `{layer}` is on the CPU while it does not run." in explained
            assert other.slower_nanoseconds < 0
            assert f"{format_duration(-other.slower_nanoseconds)} less; " in explained
            assert other.full_device == Device("cuda", 0)  # else it were there
        else:
            assert f"The cache of `{layer}` is on the device on which it runs." in explained
            assert other.slower_nanoseconds > 0
            assert other.full_device is None
    explained = " ".join(run("explain", "p.yaml", "model").output.split())
    last = LAYERS - len(offloaded) - 1
    assert list(offloaded) == [f"model.layers.{index}.self_attn" for index in range(last + 1, LAYERS)]
    assert f"The cache of `model.layers.[{last + 1}-9].self_attn` is on the CPU while they do not run." in explained
    assert f"The cache of `model.layers.[0-{last}].self_attn` is on the device on which they run." in explained


def test_a_cache_of_attention_that_computes_on_the_cpu_has_no_other_place():
    pins = "pins: [{match: model.layers.9.self_attn, device: cpu, compute: cpu}]"
    text = written(memory="8MiB").read_text().replace("fastest", f"fastest, {pins}")
    Path("p.yaml").write_text(
        text.replace("cpu: {memory: 1GiB", "cpu: {memory: 1GiB, bandwidth: 1GB/s, flops: 1TFLOP/s")
    )
    found = run_pipeline(Request(path=Path("p.yaml")))
    assert isinstance(found, Compiled), found.diagnostics
    runs_on = {assignment.unit: assignment.location.runs_on for assignment in found.plan.assignments}
    assert (runs_on["model.layers.9.self_attn"], runs_on["model.layers.9.mlp"]) == (CPU, Device("cuda", 0))
    assert other_cache(found.plan, found.graph, found.inventory, "model.layers.8") is not None
    assert other_cache(found.plan, found.graph, found.inventory, "model.layers.9") is None


def test_the_lock_keeps_the_offloaded_caches():
    compiled()
    lock = lock_at(Path("p.lock.json"))
    assert 0 < len(lock.plan["offloaded_caches"]) < LAYERS
    locked, drift = compile_locked(Path("p.yaml"), lock)
    assert drift is None
    assert list(locked.plan.offloaded_caches) == lock.plan["offloaded_caches"]
    assert run("check", "p.yaml", "--prove").exit_code == 0
    text = Path("p.lock.json").read_text()
    assert run("compile", "p.yaml", "--keep").exit_code == 0
    assert Path("p.lock.json").read_text() == text


def changed(caches):
    """Return the lock with another list of caches, sealed again."""
    value = json.loads(Path("p.lock.json").read_text())
    value["plan"]["offloaded_caches"] = caches
    if caches is None:
        del value["plan"]["offloaded_caches"]
    value["digest"] = digest({key: part for key, part in value.items() if key not in ("digest", "made_with")})
    return read_lock(json.dumps(value))


def test_a_lock_with_other_offloaded_caches_is_refused():
    compiled()
    own = lock_at(Path("p.lock.json")).plan["offloaded_caches"]
    graph = run_pipeline(Request(path=Path("p.yaml"))).graph
    for caches in (None, ["lm_head"], own[::-1], [*own, own[-1]]):
        with pytest.raises(LockError):
            locked_caches(changed(caches), graph)
        assert compile_locked(Path("p.yaml"), changed(caches))[1].code == "broken-lock"
    fewer, drift = compile_locked(Path("p.yaml"), changed(own[:-1]))
    assert drift.code == "broken-lock"  # its figures are those of another choice
    assert isinstance(fewer, Compiled)


@pytest.mark.parametrize(("target", "code"), [("transformers", "not-a-device-map"), ("llama.cpp", "unfit-export")])
def test_outputs_that_cannot_express_offloaded_caches_are_refused(target, code):
    compiled()
    model = ["--model", "x.gguf"] if target == "llama.cpp" else []
    done = run("export", "p.yaml", "--to", target, "-o", "exported", "--format", "json", *model)
    found = [each for each in json.loads(done.stdout)["diagnostics"] if each["severity"] == "error"]
    assert (code, 3) in [(each["code"], each["line"]) for each in found]
    assert not Path("exported").exists()


def test_diff_names_changed_offloaded_caches():
    compiled()
    Path("before.lock.json").write_text(Path("p.lock.json").read_text())
    assert run("compile", written(memory="1400KiB")).exit_code == 0
    said = " ".join(run("diff", "before.lock.json", "p.lock.json").output.split())
    assert "caches on the CPU" in said


WINDOWS = {
    **LLAMA,
    "model_type": "gemma3_text",
    "head_dim": 16,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}


@torch.no_grad()
@pytest.mark.parametrize("values", [LLAMA, WINDOWS], ids=["all of the context", "windows"])
def test_generate_uses_our_cache_unless_given_another(values):
    config = AutoConfig.for_model(**{**values, "dtype": "float32"})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(1, 200, (1, 8))
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "use_cache": True}
    plain = model.generate(tokens, **options)
    name = next(name for name in CACHE_NAMES if name in plain)
    cache = Cache(implementation="partly_offloaded")
    assert cache_arguments(cache) == {}
    with streams_without_a_card():
        give_cache(model, cache, ("model.layers.1.self_attn", "model.layers.4.self_attn"))
        found = model.generate(tokens, **options)
        assert found[name].offloaded == (1, 4)
        assert torch.equal(found.sequences, plain.sequences)
        beams = model.generate(tokens, num_beams=2, **options)
        assert beams[name].offloaded == (1, 4)
        own = DynamicCache(config=config)
        assert model.generate(tokens, **{name: own}, **options)[name] is own
        assert torch.equal(model.generate(tokens, **{**options, "use_cache": False}).sequences, plain.sequences)
