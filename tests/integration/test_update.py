"""A hub model's revision is resolved once and changed by `devmap update` only; of weights only headers are read."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
from bad_files import NESTED
from command_process import run_command
from conftest import LLAMA
from hub_server import Hub, serving

FIRST, SECOND, OTHER = "1" * 40, "2" * 40, "3" * 40

PROFILE = """\
version: 1
model: {source: people/llama, revision: main}
hardware: {devices: {cuda:0: {memory: 1GiB}, cpu: {memory: 1GiB}}}
"""


def shapes(layers):
    """The tensors of `LLAMA`, with so many layers."""
    block = {"input_layernorm": [64], "post_attention_layernorm": [64], "self_attn.q_proj": [64, 64]}
    block |= {"self_attn.k_proj": [32, 64], "self_attn.v_proj": [32, 64], "self_attn.o_proj": [64, 64]}
    block |= {"mlp.gate_proj": [128, 64], "mlp.up_proj": [128, 64], "mlp.down_proj": [64, 128]}
    found = {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in block.items()}
    found |= {"model.embed_tokens": [256, 64], "model.norm": [64], "lm_head": [256, 64]}
    return {f"{name}.weight": shape for name, shape in found.items()}


def safetensors(dtype, tensors=None):
    """A file of weights of two bytes an element."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in (tensors or shapes(6)).items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def header_end(content):
    return 8 + int.from_bytes(content[:8], "little")


def config(**changed):
    return json.dumps({**LLAMA, **changed}).encode()


@pytest.fixture
def hub(workspace):
    hub = Hub(
        files={
            FIRST: {"config.json": config(), "model.safetensors": safetensors("BF16")},
            SECOND: {
                "config.json": config(num_hidden_layers=7),
                "model.safetensors": safetensors("BF16", shapes(7)),
            },
        },
        branches={"main": FIRST},
    )
    Path("profile.yaml").write_text(PROFILE)
    with serving(hub):
        yield hub


def devmap(hub, *arguments, **environment):
    with pytest.MonkeyPatch.context() as context:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            context.delenv(name, raising=False)
            context.delenv(name.upper(), raising=False)
        of_the_hub = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(Path("home").absolute())}
        for name, value in {**of_the_hub, "NO_PROXY": "127.0.0.1", **environment}.items():
            context.setenv(name, value)
        return run_command("devmap", *arguments)


def lock():
    return json.loads(Path("profile.lock.json").read_text())


def test_a_branch_is_resolved_once_and_moves_by_update_alone(hub, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("cache").absolute()))  # else an earlier run may have left a header
    done = devmap(hub, "compile", "profile.yaml")
    assert done.returncode == 0, done.stderr
    assert lock()["inputs"]["commit"] == FIRST
    hub.branches["main"] = SECOND
    assert devmap(hub, "check", "profile.yaml").returncode == 0
    assert devmap(hub, "compile", "profile.yaml").returncode == 0
    assert lock()["inputs"]["commit"] == FIRST

    tried = devmap(hub, "update", "profile.yaml", "--dry-run", "--format", "json")
    assert json.loads(tried.stdout)["commit"] == {"before": FIRST, "after": SECOND}
    assert lock()["inputs"]["commit"] == FIRST
    moved = devmap(hub, "update", "profile.yaml")
    assert moved.returncode == 0, moved.stderr
    assert "people/llama at `main`: 111111111111 → 222222222222" in moved.stdout
    assert "model.layers.6   – → cuda:0" in moved.stdout
    assert lock()["inputs"]["commit"] == SECOND
    assert "model.layers.6" in lock()["plan"]["device_map"]
    assert devmap(hub, "check", "profile.yaml").returncode == 0
    assert "still is 222222222222" in devmap(hub, "update", "profile.yaml").stdout
    ends = {header_end(files["model.safetensors"]) for files in hub.files.values()}
    assert {file for file, _, _ in hub.sent} == {"config.json", "model.safetensors"}
    assert {end for _, end in hub.sent_of("model.safetensors")} == {8, *ends}


def test_another_revision_or_model_is_resolved_anew(hub):
    hub.branches["v2"] = SECOND
    devmap(hub, "compile", "profile.yaml")
    Path("profile.yaml").write_text(PROFILE.replace("main", "v2"))
    stale = devmap(hub, "check", "profile.yaml")
    assert (stale.returncode, "`model.revision` main → v2" in " ".join(stale.stderr.split())) == (3, True)
    devmap(hub, "compile", "profile.yaml")
    assert lock()["inputs"]["commit"] == SECOND


def test_update_without_the_hub_says_so_and_leaves_the_lock(hub):
    devmap(hub, "compile", "profile.yaml")
    before = Path("profile.lock.json").read_bytes()
    done = devmap(hub, "update", "profile.yaml", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "the hub cannot be reached" in " ".join(done.stderr.split())
    assert Path("profile.lock.json").read_bytes() == before
    assert devmap(hub, "check", "profile.yaml", HF_HUB_OFFLINE="1").returncode == 0


def test_update_of_a_fixed_revision_changes_nothing(hub):
    Path("profile.yaml").write_text(PROFILE.replace("main", FIRST))
    assert "is a commit, which never moves" in devmap(hub, "update", "profile.yaml").stdout
    Path("profile.yaml").write_text(PROFILE.replace("people/llama, revision: main", "llama"))
    local = devmap(hub, "update", "profile.yaml")
    assert (local.returncode, "no revision to update" in local.stdout) == (0, True)
    assert devmap(hub, "update", "nothing.yaml").returncode == 2


def test_update_makes_the_graph_beside_the_profile_anew(hub):
    devmap(hub, "compile", "profile.yaml", "--vendor")
    hub.branches["main"] = SECOND
    done = devmap(hub, "update", "profile.yaml")
    assert done.stderr == "wrote profile.lock.json and profile.graph.json\n"
    assert json.loads(Path("profile.graph.json").read_text())["commit"] == SECOND
    assert devmap(hub, "check", "profile.yaml", HF_HUB_OFFLINE="1", HF_HOME="nowhere").returncode == 0


def test_a_vendored_graph_is_compared_with_the_config_in_the_hubs_cache(hub):
    devmap(hub, "compile", "profile.yaml", "--vendor")
    assert devmap(hub, "check", "profile.yaml").stderr == ""
    cached = next(Path("home").glob(f"hub/models--people--llama/snapshots/{FIRST}/config.json"))
    text = cached.read_text()
    cached.unlink()
    cached.write_text(text.replace('"num_hidden_layers": 6', '"num_hidden_layers": 5'))
    done = devmap(hub, "check", "profile.yaml")
    assert (done.returncode, "warning[stale-graph]" in done.stderr) == (3, True)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_dtype_missing_from_the_config_is_read_from_the_header_only(hub, is_sharded):
    """The header of a weights file is sent once, and kept for use without the hub."""
    text = json.dumps({key: value for key, value in LLAMA.items() if key != "dtype"}).encode()
    names = list(shapes(6).items())
    shards = {
        f"model-0000{number}-of-00002.safetensors": safetensors("F16", dict(names[number - 1 :: 2]))
        for number in (1, 2)
    }
    weight_map = {name: list(shards)[place % 2] for place, (name, _) in enumerate(names)}
    files = {"model.safetensors": safetensors("F16")}
    if is_sharded:
        files = {**shards, "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}
    hub.files[OTHER[:-1] + str(int(is_sharded))] = {"config.json": text, **files}
    hub.branches["main"] = OTHER[:-1] + str(int(is_sharded))
    kept = str(Path("cache").absolute())  # of this test alone: an earlier run of it may have left a header
    done = devmap(hub, "compile", "profile.yaml", XDG_CACHE_HOME=kept)
    assert "in float16" in done.stdout, done.stderr
    assert "unknown-dtype" not in done.stderr
    weights = {name: content for name, content in files.items() if name.endswith(".safetensors")}
    for _ in range(2):
        assert {name: hub.sent_of(name) for name in weights} == {
            name: [(0, 8), (8, header_end(content))] for name, content in weights.items()
        }
        assert devmap(hub, "check", "profile.yaml", XDG_CACHE_HOME=kept, HF_HUB_OFFLINE="1").returncode == 0


def test_a_checkpoint_on_the_hub_is_checked_by_its_headers(hub):
    hub.files[FIRST]["model.safetensors"] = safetensors("BF16", shapes(5))
    done = devmap(hub, "compile", "profile.yaml", XDG_CACHE_HOME=str(Path("cache").absolute()))
    assert (done.returncode, "9 of 57 tensors are missing" in " ".join(done.stderr.split())) == (1, True), done.stderr


def test_a_repository_of_pickles_is_refused(hub):
    hub.files[FIRST] = {"config.json": config(), "pytorch_model.bin": b"a pickle of more than eight bytes"}
    done = devmap(hub, "compile", "profile.yaml", XDG_CACHE_HOME=str(Path("cache").absolute()))
    assert (done.returncode, "error[no-safetensors]" in done.stderr) == (1, True), done.stderr


def test_a_server_without_ranges_is_not_read(hub):
    """The dtype is then assumed, with a warning."""
    text = json.dumps({key: value for key, value in LLAMA.items() if key != "dtype"}).encode()
    hub.files["4" * 40] = {"config.json": text, "model.safetensors": safetensors("F16")}
    hub.branches["main"] = "4" * 40
    hub.ranges = False
    done = devmap(hub, "compile", "profile.yaml", XDG_CACHE_HOME=str(Path("cache").absolute()))
    assert (done.returncode, "warning[unknown-dtype]" in done.stderr) == (0, True)


def test_more_bytes_than_requested_are_not_read(hub):
    hub.surplus_megabytes = 64
    done = devmap(hub, "compile", "profile.yaml", XDG_CACHE_HOME=str(Path("cache").absolute()))
    assert (done.returncode, lock()["inputs"]["checkpoint"]) == (0, None), done.stderr
    assert 0 < hub.flooded_megabytes < 32


def test_a_header_on_the_hub_has_the_same_size_limit_as_on_disk(hub):
    hub.files[FIRST]["model.safetensors"] = len(NESTED).to_bytes(8, "little") + NESTED
    done = devmap(hub, "compile", "profile.yaml", XDG_CACHE_HOME=str(Path("cache").absolute()))
    assert (done.returncode, "its header is nested deeper than 32" in " ".join(done.stderr.split())) == (1, True)
