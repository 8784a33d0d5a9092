"""Code that comes with a model never runs unless the command line allows it, and no command asks."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import LLAMA
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations import hub_kernels

from devmap_config import load_model
from devmap_config.cli import devmap
from devmap_config.libraries.remote_code import code_of_models
from devmap_config.runner.loading import RunnerError

MARK = "from pathlib import Path\nPath(__MARK__).touch()\nprint('printed by the code of a model')\n"

CODE = """
import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, PreTrainedTokenizer
from transformers.modeling_outputs import CausalLMOutputWithPast


class TinyConfig(PretrainedConfig):
    model_type = "tiny-of-its-own"

    def __init__(self, hidden_size=16, vocab_size=300, **options):
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.num_hidden_layers = self.num_attention_heads = 4
        super().__init__(**options)


class TinyForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4))
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, **options):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return CausalLMOutputWithPast(logits=self.head(hidden))


class TinyTokenizer(PreTrainedTokenizer):
    vocab_size = 300

    def get_vocab(self):
        return {chr(index): index for index in range(300)}

    def _tokenize(self, text, **options):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token) % 300

    def _convert_id_to_token(self, index):
        return chr(index)
"""

AUTO_MAP = {
    "AutoConfig": "code_of_model.TinyConfig",
    "AutoModel": "code_of_model.TinyForCausalLM",
    "AutoModelForCausalLM": "code_of_model.TinyForCausalLM",
    "AutoTokenizer": ["code_of_model.TinyTokenizer", None],
    "AutoProcessor": "code_of_model.TinyTokenizer",
    "AutoImageProcessor": "code_of_model.TinyTokenizer",
}

OWN = {
    "architectures": ["TinyForCausalLM"],
    "model_type": "tiny-of-its-own",
    "dtype": "float32",
    "hidden_size": 16,
    "vocab_size": 300,
    "auto_map": AUTO_MAP,
}
"""The config of a model that only its own code can build."""

KNOWN = {**LLAMA, "dtype": "float32", "auto_map": AUTO_MAP}
"""The config of a model that transformers knows, and that brings code all the same."""

PROFILE = """\
version: 1
model: {source: MODEL}
hardware: {devices: {cpu: {memory: 1GiB}, disk: {memory: 1GiB}}}
placement: {offload: {folder: offload}}
"""


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """The file that a model's code writes when it runs."""
    monkeypatch.chdir(tmp_path)
    for name, config in (("own", OWN), ("known", KNOWN)):
        folder = tmp_path / name
        (folder / "custom_generate").mkdir(parents=True)
        code = MARK.replace("__MARK__", repr(str(tmp_path / "ran"))) + CODE
        (folder / "code_of_model.py").write_text(code)
        (folder / "custom_generate" / "generate.py").write_text(
            code + "\ndef generate(model, **options):\n    return type(model).generate(model, **options)\n"
        )
        (folder / "config.json").write_text(json.dumps(config))
        for file in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
            (folder / file).write_text(json.dumps({"tokenizer_class": "TinyTokenizer", "auto_map": AUTO_MAP}))
        Path(f"{name}.yaml").write_text(PROFILE.replace("MODEL", name))
    return tmp_path / "ran"


def save_known():
    """Save random weights beside the config of the model that transformers knows."""
    torch.manual_seed(0)
    values = {key: value for key, value in LLAMA.items() if key not in ("architectures", "dtype", "model_type")}
    LlamaForCausalLM(LlamaConfig(**values)).save_pretrained("known")
    Path("known/config.json").write_text(json.dumps(KNOWN))


def save_own():
    """Save random weights beside the config and code of the other model."""
    config = AutoConfig.from_pretrained("own", trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    model.save_pretrained("weights")
    Path("weights/model.safetensors").rename("own/model.safetensors")
    return model


def forget_code(marker):
    """Remove the code from Python's modules, since it would not run a second time."""
    for name in [name for name in sys.modules if name.startswith("transformers_modules.")]:
        del sys.modules[name]
    marker.unlink()


def command(*arguments):
    """Run a command in this process, with a user who would answer yes to every question."""
    return CliRunner().invoke(devmap, arguments, input="y\n" * 100, standalone_mode=False)


COMMANDS = {
    "compile": ["compile", "{}.yaml", "--format", "json"],
    "check": ["check", "{}.yaml", "--format", "json"],
    "run": ["run", "{}.yaml", "--max-new-tokens", "2", "--format", "json"],
    "simulate": ["simulate", "{}.yaml", "--format", "json"],
    "export": ["export", "{}.yaml", "--to", "transformers", "-o", "{}-exported"],
    "explain": ["explain", "{}.yaml"],
    "report": ["report", "{}.yaml", "-o", "{}.html", "--format", "json"],
    "fit": ["fit", "{}.yaml", "--on", "2xrtx-4090", "--format", "json"],
    "tree": ["tree", "{}", "--measure", "--context", "8", "--format", "json"],
    "init": ["init", "{}", "--output", "{}-first.yaml"],
    "adopt": ["adopt", "map.json", "--model", "{}"],
    "diff": ["diff", "{}.yaml", "{}.yaml", "--format", "json"],
    "update": ["update", "{}.yaml", "--format", "json"],
}


def test_no_command_runs_a_models_code_or_asks_whether_it_may(marker):
    without_model = {"probe", "calibrate", "hardware", "schema", "receipts"}
    apart = {"bench", "serve"}  # one works in processes, the other goes on
    assert set(COMMANDS) == set(devmap.commands) - without_model - apart
    save_known()
    Path("map.json").write_text('{"": "cpu"}')
    for name, arguments in COMMANDS.items():
        for model in ("known", "own"):
            done = command(*(argument.replace("{}", model) for argument in arguments))
            said = done.stdout + done.stderr + str(done.exception or "")
            assert not marker.exists(), f"{name} {model}"
            assert "custom code" not in said, f"{name} asks of {model}"
            assert "printed by" not in said
            if model == "known":
                assert done.return_value == 0, f"{name}: {said}"
            else:  # nothing was compiled, so that there is no lock to run
                assert ("missing-lock" if name in ("run", "export") else "--trust-remote-code") in said, (
                    f"{name}: {said}"
                )
            if "json" in arguments and done.stdout:
                json.loads(done.stdout)


def test_a_model_whose_tokenizer_is_code_is_not_served(marker):
    save_known()
    assert command("compile", "known.yaml", "-q").return_value == 0
    done = command("serve", "known.yaml", "--port", "0")
    assert (done.return_value, marker.exists()) == (1, False)
    said = " ".join(done.stderr.split())
    assert "warning[remote-code]: the tokenizer is code that comes with the model, which was not run" in said
    assert "error[no-tokenizer]" in said


def test_the_refusal_names_the_code(marker):
    done = command("compile", "own.yaml", "--format", "json")
    [finding] = json.loads(done.stdout)["diagnostics"]
    assert (done.return_value, finding["code"], finding["line"]) == (1, "remote-code", 2)
    assert "`code_of_model.py`" in finding["message"]


def test_attention_that_the_config_takes_from_the_hub_is_refused(marker, monkeypatch):
    """It would be downloaded and imported wherever the package `kernels` is installed."""
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *arguments, **options: marker.touch())
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    Path("known/config.json").write_text(json.dumps({**KNOWN, "attn_implementation": "stranger/kernel"}))
    done = command("compile", "known.yaml")
    assert (done.return_value, marker.exists()) == (1, False)
    assert "error[remote-code]" in done.stderr
    assert "`stranger/kernel`" in done.stderr
    command("compile", "known.yaml", "--trust-remote-code")
    assert marker.exists()


def test_with_a_tokenizer_of_code_run_prints_tokens_and_a_warning(marker):
    save_known()
    assert command("compile", "known.yaml").return_value == 0
    done = command("run", "known.yaml", "--max-new-tokens", "2", "--format", "json")
    value = json.loads(done.stdout)
    assert [(each["code"], each["severity"]) for each in value["diagnostics"]] == [("remote-code", "warning")]
    assert value["output"].startswith("tokens [1, 2, 3, 4, 5, 6, 7, 8, ")
    assert not marker.exists()


def test_allowed_code_that_is_not_used_is_named(marker):
    """The class is one of transformers, and the code is in another repository, which is unreachable."""
    save_known()
    config = json.loads(Path("known/config.json").read_text())
    references = {"AutoModelForCausalLM": "stranger/other--code_of_model.Other"}
    Path("known/config.json").write_text(json.dumps({**config, "auto_map": references}))
    Path("known/tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["stranger/other--code_of_tokenizer.Other", None]}})
    )
    assert command("compile", "known.yaml", "--trust-remote-code").return_value == 0
    done = command("run", "known.yaml", "--max-new-tokens", "2", "--trust-remote-code", "--format", "json")
    found = {each["code"]: each["message"] for each in json.loads(done.stdout)["diagnostics"]}
    assert found["remote-code"].endswith("none of the code that the config names: `stranger/other: code_of_model.py`")
    assert "which is code (`stranger/other: code_of_tokenizer.py`), cannot be had or run" in found["no-tokenizer"]


def test_retries_of_requests_to_the_hub_are_not_printed():
    hub = logging.getLogger("huggingface_hub.utils._http")
    assert hub.isEnabledFor(logging.ERROR)
    with code_of_models(allowed=True):
        assert not hub.isEnabledFor(logging.ERROR)
    assert hub.isEnabledFor(logging.ERROR)


def test_code_of_a_model_within_a_model_does_not_run(marker):
    """transformers builds it without passing the permission on, and asks if it does not know the type."""
    config = {"architectures": ["EncoderDecoderModel"], "model_type": "encoder-decoder", "encoder": LLAMA}
    Path("own/config.json").write_text(json.dumps({**config, "decoder": {"model_type": "vit", "auto_map": AUTO_MAP}}))
    done = command("compile", "own.yaml")
    assert done.return_value == 1
    assert not marker.exists()
    assert "code_of_model.py" in done.stderr


@pytest.mark.parametrize("name", ["compile", "run"])
def test_commands_read_nothing_from_standard_input(marker, name):
    """Even if the environment allows code, and answers are waiting there."""
    save_known()
    assert command("compile", "known.yaml").return_value == 0
    executable = Path(sys.executable).with_name("devmap")
    arguments = [argument.replace("{}", "known") for argument in COMMANDS[name]]
    environment = {
        **os.environ,
        "TRUST_REMOTE_CODE": "1",
        "HF_TRUST_REMOTE_CODE": "1",
        "TRANSFORMERS_TRUST_REMOTE_CODE": "1",
    }
    reading, writing = os.pipe()
    os.write(writing, b"y\n" * 100)
    os.close(writing)
    done = subprocess.run([executable, *arguments], stdin=reading, capture_output=True, env=environment, check=False)
    assert os.read(reading, 1000) == b"y\n" * 100
    os.close(reading)
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
    assert not marker.exists()


def test_with_the_flag_a_model_of_code_is_found_by_auto_map_and_generates(marker):
    plain = save_own()
    forget_code(marker)
    compiled = command("compile", "own.yaml", "--trust-remote-code", "--format", "json")
    assert json.loads(compiled.stdout)["plan"]["device_map"]
    assert marker.exists()
    assert "printed by" not in compiled.stdout
    done = command(
        "run", "own.yaml", "--trust-remote-code", "--prompt", "abc", "--max-new-tokens", "2", "--format", "json"
    )
    value = json.loads(done.stdout)
    tokens = plain.generate(torch.tensor([[97, 98, 99]]), max_new_tokens=2, do_sample=False)[0].tolist()
    assert (value["diagnostics"], value["verified"]) == ([], True)
    assert value["output"].replace(" ", "") == "".join(map(chr, tokens)).replace(" ", "")
    model = load_model("own.yaml", trust_remote_code=True)
    assert type(model).__name__ == "TinyForCausalLM"


def test_a_class_of_the_code_and_an_auto_class_give_the_same_plan(marker):
    plans = []
    for class_name in ("TinyForCausalLM", "AutoModelForCausalLM", "AutoModel"):
        Path("own.yaml").write_text(PROFILE.replace("MODEL", f"own, class: {class_name}"))
        done = command("compile", "own.yaml", "--trust-remote-code", "--format", "json", "--dry-run")
        plans.append(json.loads(done.stdout)["plan"])
    assert plans[0] is not None
    assert plans[0] == plans[1] == plans[2]


def test_loading_with_a_vendored_graph_needs_the_flag(marker):
    """The graph beside the profile needs no code, but the model does."""
    save_own()
    assert command("compile", "own.yaml", "--trust-remote-code", "--vendor").return_value == 0
    forget_code(marker)
    assert command("check", "own.yaml").return_value == 0
    with pytest.raises(RunnerError, match=r"`code_of_model\.py`") as error:
        load_model("own.yaml")
    assert error.value.code == "remote-code"
    assert not marker.exists()
