"""Modules stored on the CPU compute there, in models whose blocks run on an accelerator.

A simulated accelerator with real numbers shows what is computed, and on which device. Only a real one can show the
speed, the order of copies with computations in a stream, and the kernels of the card itself.
"""

from __future__ import annotations

import pytest
from command_process import run_command
from conftest import REPOSITORY
from torch.utils import backend_registration
from transformers import LlamaConfig, LlamaForCausalLM

from devmap_config.dispatch.cpu_compute import UncallableUnitError, compute_on_cpu


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch takes no backend written in Python",
)
@pytest.mark.parametrize(
    ("tests", "which"),
    [
        ("on_simulated_accelerator.py", "not zoo"),
        ("media_on_simulated_accelerator.py", "not zoo"),
        ("companions_on_simulated_accelerator.py", "not zoo"),
        ("caches_on_simulated_accelerator.py", "not zoo"),
        *(
            pytest.param(f"{kind}_on_simulated_accelerator.py", "zoo", marks=pytest.mark.zoo)
            for kind in ("media", "companions", "caches")
        ),
    ],
)
def test_on_a_simulated_accelerator(tests, which, monkeypatch):
    """In a process of its own, since torch cannot unregister a device."""
    if tests.startswith("companions"):
        pytest.importorskip("peft")
    monkeypatch.chdir(REPOSITORY)
    done = run_command("pytest", "-q", "-p", "no:cacheprovider", "-m", which, f"tests/integration/{tests}")
    assert done.returncode == 0, done.stdout + done.stderr


def small_llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def test_attention_for_accelerators_only_cannot_compute_on_the_cpu():
    model = small_llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    compute_on_cpu(model, ["model.layers.1.mlp"])
    with pytest.raises(UncallableUnitError, match="attends with flash_attention_2"):
        compute_on_cpu(model, ["model.layers.1"])


def test_a_module_that_is_never_called_cannot_compute_on_the_cpu():
    with pytest.raises(UncallableUnitError, match="is a ModuleList, which the model never calls"):
        compute_on_cpu(small_llama(), ["model.layers"])


def test_the_exit_code_of_a_process_is_returned():
    assert run_command("pytest", "--no-such-option").returncode == 4
