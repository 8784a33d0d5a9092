"""Exported files load in plain transformers and llama.cpp without this package; plans that a program cannot run are
refused.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest
import torch
from click.testing import CliRunner
from conftest import LLAMA
from small_models import TOKENS, config_of
from transformers import LlamaConfig, LlamaForCausalLM

from devmap_config.cli import devmap

PROFILE = """\
version: 1
model: {source: weights}
hardware: {devices: {cpu: {memory: 1GiB}, disk: {memory: 1GiB}}}
placement:
  pins: [{match: "model.layers.[0-2]", device: disk}]
  offload: {folder: offload}
"""


def run(*arguments):
    return CliRunner().invoke(devmap, arguments, standalone_mode=False)


def compiled(text, name="p"):
    Path(f"{name}.yaml").write_text(text)
    done = run("compile", f"{name}.yaml", "-q", "--no-simulate")
    assert done.return_value == 0, done.stderr
    return f"{name}.yaml"


@pytest.fixture
def weights(workspace):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config_of(LLAMA))).eval()
    model.save_pretrained("weights")
    return model


LOADED_WITHOUT_THIS_PACKAGE = """\
import json, sys
sys.modules["devmap_config"] = None  # to import it is an error
sys.path.insert(0, sys.argv[1])
import torch
from load_model import load_model
model = load_model()
logits = model(torch.tensor(json.loads(sys.argv[2]))).logits
on = {name: str(parameter.device) for name, parameter in model.named_parameters()}
print(json.dumps([model.hf_device_map, on, logits[0, -1].float().tolist()]))
"""


def test_plain_transformers_loads_the_exported_script(weights):
    profile = compiled(PROFILE)
    done = run("export", profile, "--to", "transformers", "-o", "exported")
    assert done.return_value == 0, done.stderr
    assert "it takes longer than predicted" in done.stderr
    command = [sys.executable, "-c", LOADED_WITHOUT_THIS_PACKAGE, "exported", json.dumps(TOKENS.tolist())]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    device_map, on, logits = json.loads(ended.stdout)
    assert device_map == json.loads(Path("p.lock.json").read_text())["plan"]["device_map"]
    assert {name for name, device in on.items() if device == "meta"} == {
        name for name in on if name.startswith(("model.layers.0.", "model.layers.1.", "model.layers.2."))
    }
    with torch.no_grad():
        expected = weights(TOKENS).logits[0, -1]
    assert torch.allclose(torch.tensor(logits), expected, atol=1e-5)
    assert Path("offload").is_dir()  # the profile's folder, as it is seen from the exported file


def test_infinite_numbers_are_exported_as_python(workspace):
    quantization = "{method: bitsandbytes, load_in_8bit: true, llm_int8_threshold: .inf, llm_int8_skip_modules: [a, b]}"
    profile = compiled(
        f"version: 1\nmodel: {{source: llama, quantization: {quantization}}}\n"
        "hardware: {devices: {cuda:0: {memory: 1GiB}}}\n"
    )
    done = run("export", profile, "--to", "transformers", "-o", "new/exported", "--model", "x/y")
    assert done.return_value == 0, done.stderr
    written = run_path("new/exported/load_model.py")["QUANTIZATION"]
    assert written["llm_int8_threshold"] == float("inf")
    assert (written["quant_method"], written["llm_int8_skip_modules"]) == ("bitsandbytes", ["a", "b"])


def test_exporting_a_plan_that_computes_on_the_cpu_is_refused_at_its_pin(workspace):
    profile = compiled(
        "version: 1\nmodel: {source: mixture}\n"
        "hardware: {devices: {cuda:0: {memory: 1GiB}, cpu: {memory: 1GiB}}}\n"
        "placement:\n  pins:\n    - {match: 'model.layers.[2-3].mlp.experts', device: cpu, compute: cpu}\n"
    )
    done = run("export", profile, "--to", "transformers", "-o", "exported", "--model", "some/model", "--format", "json")
    [found] = [each for each in json.loads(done.stdout)["diagnostics"] if each["severity"] == "error"]
    assert (done.return_value, found["code"], found["line"]) == (1, "not-a-device-map", 6)
    assert not Path("exported").exists()


def test_export_needs_weights_and_replaces_changed_files_only_with_force(workspace):
    profile = compiled("version: 1\nmodel: {source: llama}\nhardware: {devices: {cuda:0: {memory: 1GiB}}}\n")
    done = run("export", profile, "--to", "transformers", "-o", "exported")
    assert (done.return_value, "error[no-weights]" in done.stderr) == (1, True)
    hostile = 'x"; import os; os.system("touch ran") #\n\'""" {0} %s'
    given = ("export", profile, "--to", "transformers", "-o", "exported", "--model", hostile)
    assert run(*given).return_value == 0
    Path("exported/load_model.py").write_text("changed")
    refused = run(*given)
    assert "exists: pass `--force`" in str(refused.exception)
    assert run(*given, "--force").return_value == 0
    code = "import sys; sys.path.insert(0, 'exported'); import load_model; print(load_model.SOURCE, end='')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == hostile
    assert not Path("ran").exists()
    assert json.loads(Path("exported/device_map.json").read_text()) == {"": 0}


def test_an_invalid_lock_is_not_exported(weights):
    profile = compiled(PROFILE)
    Path(profile).write_text(PROFILE.replace("[0-2]", "[0-3]"))
    done = run("export", profile, "--to", "transformers", "-o", "exported")
    assert (done.return_value, "error[stale-lock]" in done.stderr) == (3, True)
    Path("p.lock.json").unlink()
    done = run("export", profile, "--to", "transformers", "-o", "exported")
    assert (done.return_value, "error[missing-lock]" in done.stderr) == (3, True)


HOSTS = """\
version: 1
name: two
model: {source: llama}
workload: {context_length: 256}
hardware:
  hosts:
    left: {devices: {cuda:0: {memory: 4GiB}}, network: {bandwidth: 1GB/s, address: 10.0.0.1, interface: eth0}}
    right: {devices: {cuda:1: {memory: 4GiB}}, network: {bandwidth: 1GB/s, address: 10.0.0.2}}
placement: {pins: [{match: "model.layers.[4-5]", device: right/cuda:1}, {match: "model.layers.3", device: left/cuda:0}]}
targets: [vllm]
"""


def test_a_plan_for_vllm_is_exported_as_files_for_every_host(workspace):
    profile = compiled(HOSTS)
    done = run("export", profile, "--to", "vllm", "-o", "exported", "--model", "/models/llama")
    assert done.return_value == 0, done.stderr
    plan = Path("exported/plan.env").read_text()
    assert {"MODEL=/models/llama", "VLLM_PP_LAYER_PARTITION=4,2", "MASTER_ADDR=10.0.0.1", "NODES=2"} <= set(
        plan.split()
    )
    assert "DEVICE_IDS=1\n" in Path("exported/node.1.env").read_text()
    assert "INTERFACE=eth0\n" in Path("exported/node.0.env").read_text()
    assert "| 1 | right | 10.0.0.2 | cuda:1 | 4–5 |" in Path("exported/README.md").read_text()
    with_other = run("export", profile, "--to", "transformers", "-o", "other", "--model", "/models/llama")
    assert (with_other.return_value, "error[not-a-device-map]" in with_other.stderr) == (1, True)


@pytest.mark.parametrize(
    ("before", "after", "line", "message"),
    [
        ("targets: [vllm]\n", "", 5, "the plan is made for transformers"),
        (", address: 10.0.0.2", "", 8, "vLLM needs the address of `right`"),
        ("10.0.0.2", "10.0.0.1", 8, "`right` has the address of `left`"),
        ("10.0.0.2", '"::FFFF:10.0.0.1"', 8, "`right` has the address of `left`"),
        ("{source: llama}", "{source: llama, dtype: float64}", 3, "vLLM has no float64"),
    ],
)
def test_a_profile_without_what_vllm_needs_is_refused(workspace, before, after, line, message):
    text = HOSTS.replace(before, after)
    if before.startswith("targets"):
        text = text.partition("hardware:")[0] + "hardware: {devices: {cuda:0: {memory: 4GiB}}}\n"
    profile = compiled(text)
    done = run("export", profile, "--to", "vllm", "-o", "exported", "--model", "x/y", "--format", "json")
    [found] = [each for each in json.loads(done.stdout)["diagnostics"] if each["severity"] == "error"]
    assert (done.return_value, found["code"]) == (1, "unfit-export")
    assert found["message"].startswith(message)
    assert found["line"] == (1 if line == 5 else line)


def test_hosts_with_two_spellings_of_one_address_are_refused(workspace):
    profile = compiled(HOSTS.replace("10.0.0.1", '"::1"').replace("10.0.0.2", '"0:0:0:0:0:0:0:1"'))
    done = run("export", profile, "--to", "vllm", "-o", "exported", "--model", "x/y")
    assert (done.return_value, "error[unfit-export]: `right` has the address of `left`" in done.stderr) == (1, True)


def test_exported_files_hold_absolute_paths_of_models(workspace):
    profile = compiled(HOSTS)
    Path("rel").mkdir()
    Path("-rel").mkdir()
    for given in ("./rel", "-rel"):
        done = run("export", profile, "--to", "vllm", "-o", "exported", f"--model={given}", "--force")
        assert done.return_value == 0, done.stderr
        whole = str(Path(given).resolve())
        assert f"MODEL={whole}\n" in Path("exported/plan.env").read_text()
        assert f'"source": "{whole}"' in Path("exported/compose.0.yaml").read_text()
    for given in ("./other", "~/llama", "--trust-remote-code", "a/b/c"):
        done = run("export", profile, "--to", "vllm", "-o", "refused", f"--model={given}")
        assert (done.return_value, f"error[unfit-export]: `{given}` is not here" in done.stderr) == (1, True)
    assert not Path("refused").exists()


def test_a_path_that_is_not_utf_8_is_refused_if_the_exported_file_cannot_hold_it(workspace):
    of_hosts = compiled(HOSTS, "hosts")
    of_one = compiled("version: 1\nmodel: {source: llama}\nhardware: {devices: {cuda:0: {memory: 4GiB}}}\n")
    for profile, program in ((of_hosts, "vllm"), (of_one, "llama.cpp")):
        done = run("export", profile, "--to", program, "-o", "exported", "--model", "/models/bad\udcff")
        assert (done.return_value, "error[unfit-export]: the path or the name" in done.stderr) == (1, True)
        assert not Path("exported").exists()
    Path(of_hosts).write_text(HOSTS.replace("name: two", 'name: "a\\0b"'))
    run("compile", of_hosts, "-q", "--no-simulate")
    done = run("export", of_hosts, "--to", "vllm", "-o", "exported", "--model", "/models/x")
    assert (done.return_value, "the name of the model holds a zero" in " ".join(done.stderr.split())) == (1, True)
    done = run("export", of_one, "--to", "transformers", "-o", "exported", "--model", "/models/bad\udcff")
    assert done.return_value == 0, done.stderr  # Python has a way to write it


def test_export_check_with_a_python_without_vllm_is_an_error(workspace):
    profile = compiled(HOSTS)
    done = run("export", profile, "--to", "vllm", "-o", "exported", "--model", "x/y", "--check", sys.executable)
    assert (done.return_value, "No module named 'vllm'" in " ".join(done.stderr.split())) == (1, True)
    assert not Path("exported").exists()


MIXED = """\
version: 1
model: {source: mixture}
workload: {context_length: 64, batch_size: 2}
hardware: {devices: {"cuda:[0-1]": {memory: 1GiB}, cpu: {memory: 1GiB}}}
placement:
  pins:
    - {match: "model.layers.0", device: cpu, compute: cpu}
    - {match: "model.layers.[1-2]", device: cuda:0}
    - {match: "model.layers.[1-2].mlp.experts", device: cpu, compute: cpu, override: true}
    - {match: "model.{embed_tokens,norm}", device: cuda:0}
    - {match: "model.layers.3", device: cuda:1}
    - {match: lm_head, device: cuda:1}
"""


def flags_of(*arguments):
    """Return the flags that an exported script passes to a program."""
    done = run("export", *arguments, "--to", "llama.cpp", "-o", "exported", "--model", "it's a model.gguf", "--force")
    assert done.return_value == 0, done.stderr
    Path("program").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    Path("program").chmod(0o755)
    command = ["sh", "exported/serve.sh", "--port", "1"]
    environment = {"LLAMA_SERVER": "./program", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()


def test_llama_cpp_flags_give_the_device_of_every_tensor(workspace):
    profile = compiled(MIXED)
    flags = flags_of(profile)
    assert flags == [
        *shlex.split("-m 'it'\\''s a model.gguf' --fit off --device CUDA0,CUDA1 -ngl 4 --split-mode layer -ts 2,2"),
        *("-ot", r"^blk\.(1|2)\.(ffn_down_exps|ffn_gate_exps|ffn_up_exps)\.(weight|bias)$=CPU"),
        *("-ot", r"^output_norm\.(weight|bias)$=CUDA0"),
        *shlex.split("-c 128 -np 2 -ctk bf16 -ctv bf16 --port 1"),
    ]


def test_experts_of_the_first_layers_on_the_cpu_use_llama_cpps_own_flag(workspace):
    profile = compiled(
        "version: 1\nmodel: {source: mixture}\nhardware: {devices: {cuda:0: {memory: 1GiB}, cpu: {memory: 1GiB}}}\n"
        'placement: {pins: [{match: "model.layers.[0-2].mlp.experts", device: cpu, compute: cpu}]}\n'
    )
    flags = flags_of(profile)
    assert flags[flags.index("--n-cpu-moe") + 1] == "3"
    assert "-ot" not in flags
    assert flags[flags.index("-ngl") + 1] == "5"


@pytest.mark.parametrize(
    ("model", "pin", "message"),
    [
        ("llama", "match: model.layers.5, device: cpu", "llama.cpp computes weights where they are"),
        ("llama", "match: model.layers.5, device: cpu, compute: cpu", "layer 5 is on cpu, behind one on cuda:0"),
        ("llama", "match: model.layers.2, device: cuda:1", "layer 3 is on cuda:0, behind one on cuda:1"),
        ("llama", "match: model.layers.2.self_attn.q_proj, device: cuda:1", "the attention of layer 2 is on"),
        ("unmeasurable", "match: layers, device: cuda:0", "how llama.cpp names the tensors of vit is not known here"),
    ],
)
def test_plans_that_llama_cpp_cannot_run_are_refused(workspace, model, pin, message):
    profile = compiled(
        f"version: 1\nmodel: {{source: {model}}}\n"
        'hardware: {devices: {"cuda:[0-1]": {memory: 1GiB}, cpu: {memory: 1GiB}}}\n'
        f"placement: {{pins: [{{match: '{{model,lm_head}}', device: cuda:0, optional: true}}, {{{pin}}}]}}\n"
    )
    done = run("export", profile, "--to", "llama.cpp", "-o", "exported", "--model", "x.gguf", "--format", "json")
    found = [each for each in json.loads(done.stdout)["diagnostics"] if each["severity"] == "error"]
    assert (done.return_value, {each["code"] for each in found}) == (1, {"unfit-export"})
    assert found[0]["message"].startswith(message)
    assert found[0]["line"] == (2 if model == "unmeasurable" else 4)


@pytest.mark.parametrize("cache", ["static", "offloaded", "{implementation: quantized, backend: fp8}"])
def test_llama_cpp_flags_place_the_cache_as_planned(workspace, cache):
    profile = compiled(
        f"version: 1\nmodel: {{source: llama}}\nworkload: {{context_length: 64, cache: {cache}}}\n"
        "hardware: {devices: {cuda:0: {memory: 1GiB}, cpu: {memory: 1GiB}}}\n"
    )
    if "quantized" in cache:
        done = run("export", profile, "--to", "llama.cpp", "-o", "exported", "--model", "x.gguf", "--format", "json")
        [found] = [each for each in json.loads(done.stdout)["diagnostics"] if each["severity"] == "error"]
        assert (found["code"], found["line"], Path("exported").exists()) == ("unfit-export", 3, False)
    else:
        assert ("--no-kv-offload" in flags_of(profile)) == (cache == "offloaded")
