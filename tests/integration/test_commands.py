"""The commands as processes: output by stream, changed files, and exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_process import run_command

from devmap_config.cli import devmap as devmap_command
from devmap_config.plan.lock import read_lock

GOOD = """\
version: 1
variables: {context: 2, memory: 1GiB}
model: {source: llama}
hardware: {devices: {cuda:0: {memory: "{{ memory }}"}, cpu: {memory: 1GiB}}}
placement: {pins: [{match: lm_head, device: cpu}]}
"""


def devmap(*arguments, program="devmap"):
    """Run a command in a process of its own, since exit codes and streams are tested.

    The dry run is switched off: `test_simulate.py` tests it in one process, while each of these would have to import
    torch.
    """
    if ("compile" in arguments[:1] or program == "devmap-compile") and "--vendor" not in arguments:
        arguments = (*arguments, "--no-simulate")
    return run_command(program, *arguments)


@pytest.fixture
def profile(workspace):
    Path("profile.yaml").write_text(GOOD)
    return Path("profile.yaml")


def test_compile_prints_the_plan_and_writes_the_lock(profile):
    executable = Path(sys.executable).with_name("devmap-compile")
    done = subprocess.run([executable, "profile.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "cuda:0" in done.stdout
    assert "model.layers.[0-5]" in done.stdout
    assert done.stderr == "wrote profile.lock.json\n"
    lock = Path("profile.lock.json").read_text()
    assert lock.endswith("}\n")
    assert json.loads(lock)["plan"]["device_map"]["lm_head"] == "cpu"
    assert str(Path.cwd()) not in lock


def test_compiling_twice_gives_the_same_bytes(profile):
    devmap("compile", "profile.yaml")
    first = Path("profile.lock.json").read_bytes()
    profile.write_text("# a comment\n" + GOOD.replace("{memory: 1GiB}}}", "{memory:   1024MiB}}}"))
    devmap("compile", "profile.yaml")
    assert Path("profile.lock.json").read_bytes() == first


def test_json_is_one_object_whatever_happens(profile):
    good = devmap("compile", "profile.yaml", "--format", "json")
    value = json.loads(good.stdout)
    assert (good.returncode, value["diagnostics"], good.stderr) == (0, [], "")
    assert value["plan"]["device_map"]["lm_head"] == "cpu"
    assert set(value["plan"]) == {
        "strategy", "executor", "main_device", "measured", "device_map", "compute", "devices", "prediction",
        "offload_buffers", "loading_ram_bytes", "basis",
    }  # fmt: skip
    for use in value["plan"]["devices"]:
        others = sum(use[key] for key in ("weights_bytes", "kv_cache_bytes", "activation_bytes", "overhead_bytes"))
        assert use["free_bytes"] == use["capacity_bytes"] - others
        assert use["loading_bytes"] >= use["weights_bytes"]

    profile.write_text(GOOD.replace("lm_head", "lm_haed"))
    bad = devmap("compile", "profile.yaml", "--format", "json")
    value = json.loads(bad.stdout)
    assert (bad.returncode, value["plan"]) == (1, None)
    [finding] = value["diagnostics"]
    assert (finding["code"], finding["line"], finding["column"], finding["end_column"]) == (
        "unmatched-pattern",
        5,
        28,
        35,
    )

    missing = devmap("compile", "nothing.yaml", "--format", "json")
    assert (missing.returncode, json.loads(missing.stdout)["diagnostics"][0]["code"]) == (2, "missing-file")
    usage = devmap("compile", "--format", "json")
    assert (usage.returncode, json.loads(usage.stdout)["diagnostics"][0]["code"]) == (2, "usage")


def test_a_profile_that_is_wrong_leaves_the_lock_alone(profile):
    devmap("compile", "profile.yaml")
    before = Path("profile.lock.json").read_bytes()
    profile.write_text(GOOD.replace("lm_head", "lm_haed"))
    done = devmap("compile", "profile.yaml")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "error[unmatched-pattern]" in done.stderr
    assert Path("profile.lock.json").read_bytes() == before


def test_compile_options_dry_run_output_and_quiet(profile):
    assert devmap("compile", "profile.yaml", "--dry-run").returncode == 0
    assert not Path("profile.lock.json").exists()
    done = devmap("compile", "profile.yaml", "-q", "-o", "elsewhere.json")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert Path("elsewhere.json").exists()
    assert not Path("profile.lock.json").exists()


def test_set_values_are_remembered_by_the_lock(profile):
    devmap("compile", "profile.yaml", "--set", "memory=2GiB")
    lock = json.loads(Path("profile.lock.json").read_text())
    assert lock["set"] == {"memory": "2GiB"}
    assert devmap("check", "profile.yaml").returncode == 0
    devmap("compile", "profile.yaml")
    again = json.loads(Path("profile.lock.json").read_text())
    assert again == lock
    assert devmap("check", "profile.yaml", "--set", "memory=3GiB").returncode == 3


def test_set_of_an_unknown_variable_is_an_error(profile):
    done = devmap("compile", "profile.yaml", "--set", "contxt=3")
    assert done.returncode == 1
    assert "did you mean `context`?" in done.stderr


def test_check_reports_changes_and_writes_nothing(profile):
    missing = devmap("check", "profile.yaml")
    assert missing.returncode == 3
    assert "missing-lock" in missing.stderr
    devmap("compile", "profile.yaml")
    assert devmap("check", "profile.yaml").returncode == 0
    config = json.loads(Path("llama/config.json").read_text())
    Path("llama/config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    stale = devmap("check", "profile.yaml", "--format", "json")
    assert stale.returncode == 3
    [finding] = json.loads(stale.stdout)["diagnostics"]
    assert finding["code"] == "stale-lock"
    assert "the model's config: `num_hidden_layers` 6 → 7" in finding["message"]
    assert "module tree" not in finding["message"]  # it follows
    profile.write_text(GOOD.replace("lm_head", "lm_haed"))
    assert devmap("check", "profile.yaml").returncode == 1


def test_a_plan_that_computes_on_the_cpu_has_no_device_map(profile):
    profile.write_text(GOOD.replace("device: cpu}", "compute: cpu}"))
    done = devmap("compile", "profile.yaml", "--format", "device-map")
    assert (done.returncode, done.stdout) == (1, "")
    assert "lm_head" in done.stderr
    plan = json.loads(devmap("compile", "profile.yaml", "--format", "json").stdout)["plan"]
    assert plan["compute"] == {"lm_head": "cpu"}
    assert plan["prediction"]["streamed_bytes_per_token"] == 0


def test_run_generates_and_reports_what_it_verified(workspace):
    from conftest import REPOSITORY

    done = devmap("run", str(REPOSITORY / "profiles" / "quickstart.yaml"), "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("A model is placed before")
    assert "77 tensors where the lock says" in done.stderr


def test_run_without_a_lock_or_weights_is_an_error(profile):
    assert devmap("run", "profile.yaml").returncode == 3
    devmap("compile", "profile.yaml")
    done = devmap("run", "profile.yaml", "--format", "json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["diagnostics"][0]["code"] == "no-weights"


def test_tree_shows_repeated_blocks_once_and_marks_matches(profile):
    whole = devmap("tree", "llama").stdout
    assert "[0-5]  LlamaDecoderLayer" in whole
    matched = devmap("tree", "profile.yaml", "--match", "model.layers.[0-1].mlp").stdout
    assert "[0-1]  LlamaDecoderLayer" in matched
    assert "self_attn" not in matched
    assert "2 matched" in matched
    nothing = devmap("tree", "llama", "--match", "model.layer.*")
    assert nothing.returncode == 1
    assert "`model.layers` (6 layers)" in nothing.stderr
    assert devmap("tree", "llama", "--match", "model.[").returncode == 2


def test_explain_prints_the_page_of_a_code(workspace):
    assert devmap("explain", "unmatched-pattern").stdout.startswith("# unmatched-pattern")
    wrong = devmap("explain", "unmatched-patern")
    assert wrong.returncode == 2
    assert "did you mean `unmatched-pattern`?" in wrong.stderr


def test_hardware_lists_the_catalogue(workspace):
    assert "rtx-4090" in devmap("hardware").stdout
    assert "memory_source: nvidia-smi" in devmap("hardware", "rtx-4090").stdout
    assert devmap("hardware", "rtx-4900").returncode == 2


def test_importing_the_package_imports_no_torch(workspace):
    code = (
        "import sys, devmap_config, devmap_config.cli; from devmap_config import compile_profile;"
        "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_compiling_with_a_cached_graph_imports_no_torch(profile):
    devmap("compile", "profile.yaml")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'accelerate')));"
        "from devmap_config import compile_profile as compile;"
        "assert compile('profile.yaml').device_map['lm_head'] == 'cpu'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


RUN = "import sys; sys.argv = ['devmap', *sys.argv[1:]]; from devmap_config.cli import main; main()"

WITHOUT_TORCH = f"import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'accelerate'))); {RUN}"


def devmap_without_torch(*arguments):
    environment = {**os.environ, "XDG_CACHE_HOME": str(Path("no-cache").absolute())}
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_vendored_graph_needs_neither_torch_nor_the_model(profile):
    profile.write_text(GOOD + "workload: {context_length: 64}\n")
    assert devmap("compile", "profile.yaml", "--vendor").stderr == "wrote profile.lock.json and profile.graph.json\n"
    assert devmap_without_torch("check", "profile.yaml").returncode == 0
    Path("llama").rename("elsewhere")
    assert devmap_without_torch("check", "profile.yaml").returncode == 0
    profile.write_text(GOOD.replace("lm_head", "lm_haed") + "workload: {context_length: 64}\n")
    assert "nearest: `lm_head`" in devmap_without_torch("compile", "profile.yaml").stderr


def test_without_torch_or_a_kept_graph_compile_is_an_error(profile):
    found = json.loads(devmap_without_torch("compile", "profile.yaml", "--format", "json").stdout)["diagnostics"]
    assert [(each["code"], each["line"]) for each in found] == [("torch-missing", 3)]
    devmap("compile", "profile.yaml", "--vendor")
    profile.write_text(GOOD + "workload: {context_length: 64}\n")
    done = devmap_without_torch("check", "profile.yaml")
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert "the graph in `profile.graph.json` was made from another workload, and is made anew" in said
    assert "torch is not installed" in said
    assert "run `devmap compile --vendor profile.yaml` where torch" in said


def test_an_outdated_or_damaged_vendored_graph_is_a_warning(profile):
    devmap("compile", "profile.yaml", "--vendor")
    profile.write_text(GOOD + "workload: {context_length: 64}\n")
    done = devmap("compile", "profile.yaml")
    assert done.returncode == 0
    assert "warning[stale-graph]" in done.stderr
    Path("profile.graph.json").write_text("{")
    damaged = devmap("compile", "profile.yaml")
    assert damaged.returncode == 0
    assert "cannot be used: it is not JSON at line 1, column 2" in " ".join(damaged.stderr.split())


def test_an_edited_vendored_graph_is_not_used(profile):
    devmap("compile", "profile.yaml", "--vendor")
    path = Path("profile.graph.json")
    path.write_text(path.read_text().replace("[256,64]", "[255,64]", 1))
    done = devmap("check", "profile.yaml")
    assert (done.returncode, "its own digest" in " ".join(done.stderr.split())) == (0, True)
    without = devmap_without_torch("check", "profile.yaml")
    assert (
        without.returncode,
        "run `devmap compile --vendor profile.yaml` where torch" in " ".join(without.stderr.split()),
    ) == (1, True)


def test_a_vendored_graph_of_another_config_is_noticed_if_the_config_is_present(profile):
    devmap("compile", "profile.yaml", "--vendor")
    config = json.loads(Path("llama/config.json").read_text())
    Path("llama/config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    done = devmap("check", "profile.yaml")
    assert done.returncode == 3
    assert "warning[stale-graph]" in done.stderr
    assert "`num_hidden_layers` 6 → 7" in " ".join(done.stderr.split())


def test_an_output_that_cannot_be_written_is_a_usage_error(profile):
    Path("folder").mkdir()
    Path("other.yaml").write_text(GOOD)
    for target in ("nowhere/x.json", "folder", "other.yaml", "llama/config.json"):
        done = devmap("compile", "profile.yaml", "-o", target, "--format", "json")
        assert done.returncode == 2, target
        assert json.loads(done.stdout)["plan"] is None
    assert Path("other.yaml").read_text() == GOOD
    for command in (("init", "llama"), ("adopt", "map.json", "--model", "llama")):
        Path("map.json").write_text('{"": 0}')
        assert devmap(*command, "-o", "nowhere/x.yaml").returncode == 2
        assert devmap(*command, "-o", "other.yaml").returncode == 2


def test_a_damaged_lock_is_replaced_with_a_warning_and_a_newer_one_is_kept(profile):
    Path("profile.lock.json").write_text("<<<<<<< HEAD")
    damaged = devmap("compile", "profile.yaml")
    assert damaged.returncode == 0
    assert "it is replaced" in damaged.stderr
    newer = Path("profile.lock.json").read_text().replace('"lock_version": 1', '"lock_version": 2')
    Path("profile.lock.json").write_text(newer)
    refused = devmap("compile", "profile.yaml")
    assert refused.returncode == 2
    assert "upgrade" in " ".join(refused.stderr.split())
    assert Path("profile.lock.json").read_text() == newer


def test_the_remembered_value_of_a_removed_variable_is_dropped(profile):
    devmap("compile", "profile.yaml", "--set", "memory=2GiB", "--set", "context=5")
    assert "with context=5, memory=2GiB as before" in devmap("compile", "profile.yaml").stderr
    profile.write_text(GOOD.replace("context", "length"))
    assert devmap("compile", "profile.yaml").returncode == 0
    assert json.loads(Path("profile.lock.json").read_text())["set"] == {"memory": "2GiB"}


def test_output_in_a_narrow_encoding_does_not_fail(profile):
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    profile.write_text(GOOD.replace("lm_head", "模型"), encoding="utf-8")
    command = Path(sys.executable).with_name("devmap")
    for arguments, code in (
        (["tree", "llama"], 0),
        (["compile", "profile.yaml", "--format", "json"], 1),
        (["explain", "bad-quantity"], 0),
    ):
        done = subprocess.run([command, *arguments], capture_output=True, check=False, env=environment)
        assert done.returncode == code, done.stderr
    assert (
        "模型" in json.loads(devmap("compile", "profile.yaml", "--format", "json").stdout)["diagnostics"][0]["message"]
    )


def test_check_refuses_a_plan_that_misstates_the_bytes_of_a_device(profile):
    devmap("compile", "profile.yaml")
    path = Path("profile.lock.json")
    lock = read_lock(path.read_text())
    card, *others = lock.plan["devices"]
    card = {**card, "weights_bytes": card["weights_bytes"] - 1, "free_bytes": card["free_bytes"] + 1}
    path.write_text(replace(lock, plan={**lock.plan, "devices": [card, *others]}).to_text())
    done = devmap("check", "profile.yaml")
    assert (done.returncode, "what it says cuda:0 holds" in " ".join(done.stderr.split())) == (3, True)


def test_check_refuses_a_plan_that_omits_modules_computed_on_the_cpu(profile):
    profile.write_text(GOOD.replace("device: cpu}", "compute: cpu}"))
    devmap("compile", "profile.yaml")
    path = Path("profile.lock.json")
    lock = read_lock(path.read_text())
    path.write_text(replace(lock, plan={**lock.plan, "compute": {}}).to_text())
    done = devmap("check", "profile.yaml")
    assert (done.returncode, "computes it on cpu" in " ".join(done.stderr.split())) == (3, True)


def test_check_refuses_a_plan_that_separates_a_group(profile):
    group = '{match: "{model.norm,lm_head}", keep_together: true}'
    profile.write_text(GOOD.replace("{match: lm_head, device: cpu}", group))
    devmap("compile", "profile.yaml")
    assert devmap("check", "profile.yaml").returncode == 0
    path = Path("profile.lock.json")
    lock = read_lock(path.read_text())
    plan = {**lock.plan, "device_map": {**lock.plan["device_map"], "lm_head": "cpu"}}
    path.write_text(replace(lock, plan=plan).to_text())
    done = devmap("check", "profile.yaml")
    assert (done.returncode, "keeps together what is on" in " ".join(done.stderr.split())) == (3, True)


def test_check_distinguishes_damaged_newer_and_conflicting_locks(profile):
    devmap("compile", "profile.yaml")
    path = Path("profile.lock.json")
    good = path.read_text()
    version = re.search(r'"lock_version": (\d+)', good)
    newer = good.replace(version.group(), f'"lock_version": {int(version.group(1)) + 1}')
    for text, code, words in (
        (good[: len(good) // 2], "unreadable-lock", "cut off"),
        (good.replace('"lm_head": "cpu"', '"lm_head": 0'), "unreadable-lock", "its own digest"),
        (good.replace('    "compute"', '<<<<<<< ours\n    "compute"'), "unreadable-lock", "merge conflict"),
        (newer, "newer-lock", "upgrade devmap-config"),
    ):
        path.write_text(text)
        done = devmap("check", "profile.yaml")
        assert (done.returncode, f"error[{code}]" in done.stderr) == (3, True), done.stderr
        assert words in " ".join(done.stderr.split())


def test_check_does_not_repeat_the_placement(profile):
    """A valid lock makes placing unnecessary, so numpy, which placing imports, is never imported."""
    profile.write_text(FASTEST)
    devmap("compile", "profile.yaml")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'accelerate', 'numpy', 'jinja2')));"
        "from devmap_config.cli import main; sys.argv = ['devmap', 'check', 'profile.yaml']; main()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def profiles(workspace):
    """Profiles in folders, each compiled, beside other files."""
    Path("profiles/more").mkdir(parents=True)
    Path("profiles/.hidden").mkdir()
    Path(".git").mkdir()
    for name in ("a", "b", "c", "d", "e", "f", "more/g"):
        up = "../.." if "/" in name else ".."
        Path(f"profiles/{name}.yaml").write_text(GOOD.replace("source: llama", f"source: {up}/llama"))
        assert devmap("compile", "-q", f"profiles/{name}.yaml").returncode == 0
    base = "version: 1\nmodel: {source: ../llama}\n"
    Path("profiles/base.yaml").write_text(base)
    Path("profiles/h.yaml").write_text("version: 1\nextends: [base.yaml]\nhardware: {devices: {cpu: {memory: 1GiB}}}\n")
    assert devmap("compile", "-q", "profiles/h.yaml").returncode == 0
    Path("profiles/machine.yaml").write_text("hardware: {devices: {cpu: {memory: 1GiB}}}\n")
    Path("profiles/compose.yaml").write_text("version: '3'\nservices: {}\n")
    Path("profiles/.hidden/x.yaml").write_text("version: 1\nmodel: {}\n")
    return Path("profiles")


@pytest.mark.parametrize("argument", ["profiles", "profiles/"])
def test_check_of_a_folder_checks_all_profiles_below_it(profiles, argument):
    done = devmap("check", argument)
    assert (done.returncode, done.stdout) == (0, "8 locks up to date\n"), done.stderr
    assert devmap("check", argument, "profiles/a.yaml").stdout == done.stdout


def test_check_expands_patterns_that_the_shell_did_not(profiles):
    assert devmap("check", "profiles/[a-c].yaml").stdout == "3 locks up to date\n"
    assert devmap("check", "profiles/**/g.yaml").stdout == "1 lock up to date\n"
    nothing = devmap("check", "profiles/*.yml")
    assert (nothing.returncode, "missing-file" in nothing.stderr) == (2, True)
    Path("empty").mkdir()
    assert devmap("check", "empty").returncode == 2


def test_check_of_many_profiles_reports_them_in_order_with_counts(profiles):
    Path("profiles/b.yaml").write_text(Path("profiles/b.yaml").read_text().replace("lm_head", "lm_haed"))
    Path("profiles/c.lock.json").unlink()
    Path("profiles/e.yaml").write_text(
        Path("profiles/e.yaml").read_text().replace("context: 2,", "").replace("1GiB", "2GiB")
    )
    done = devmap("check", "profiles")
    assert done.returncode == 1
    assert done.stdout == "5 locks up to date, 1 lock is missing, 1 lock is stale, 1 profile is wrong\n"
    places = re.findall(r"--> (profiles/\w+\.yaml)", done.stderr)
    assert places == ["profiles/b.yaml", "profiles/c.yaml", "profiles/e.yaml"]
    value = json.loads(devmap("check", "profiles", "--format", "json").stdout)
    assert list(value["plans"]) == list(value["states"])
    assert value["states"]["profiles/c.yaml"] == "missing"
    # One process, or as many as there are cores: the same is said.
    one = [sys.executable, "-c", "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);" + RUN]
    alone = subprocess.run([*one, "check", "profiles"], capture_output=True, text=True, check=False)
    assert (alone.stdout, alone.stderr) == (done.stdout, done.stderr)


def test_check_goes_on_after_a_missing_profile(profile):
    devmap("compile", "profile.yaml")
    Path("bad.yaml").write_text(GOOD.replace("lm_head", "lm_haed"))
    done = devmap("check", "profile.yaml", "nothing.yaml", "bad.yaml", "--format", "json")
    assert done.returncode == 1
    codes = {finding["code"] for finding in json.loads(done.stdout)["diagnostics"]}
    assert codes == {"missing-file", "unmatched-pattern"}
    assert devmap("check", "profile.yaml", "nothing.yaml").returncode == 2


def test_tree_of_a_broken_profile_prints_one_json_object(profile):
    profile.write_text("version: [")
    done = devmap("tree", "profile.yaml", "--format", "json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["diagnostics"][0]["code"] == "syntax"


def test_the_proposed_command_works_in_the_current_directory(profile):
    Path("profiles").mkdir()
    Path("profiles/p.yaml").write_text(
        GOOD.replace("source: llama", "source: ../llama").replace("lm_head", "model.layer.*")
    )
    Path(".git").mkdir()
    finding = json.loads(devmap("compile", "profiles/p.yaml", "--format", "json").stdout)["diagnostics"][0]
    assert finding["help"] == "`devmap tree llama --match 'model.layers.*'`"


def test_numbers_of_the_catalogue_have_types_in_json(workspace):
    card = json.loads(devmap("hardware", "rtx-4090", "--format", "json").stdout)
    assert card["memory_bytes"] == 25757220864
    assert card["supports_bf16"] is True


def test_run_of_an_empty_prompt_is_an_error(profile):
    assert devmap("run", "profile.yaml", "--prompt", "").returncode == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lm_head": 0}, "`lm_head.weight` is on cuda:0, and `lm_head` puts it on cpu"),
        ({"model.layers.0": "cuda:7"}, "places `model.layers.0` on cuda:7, which is not a device of the profile"),
        ({"model.layers.0": "cpu"}, "what it says cuda:0 holds is not what it puts there"),
        ({"model.nothing": 0}, "places `model.nothing`, which LlamaForCausalLM does not have"),
    ],
)
def test_check_verifies_the_locked_plan_itself(profile, change, said):
    devmap("compile", "profile.yaml")
    path = Path("profile.lock.json")
    lock = read_lock(path.read_text())
    device_map = {**lock.plan["device_map"], **change}
    path.write_text(replace(lock, plan={**lock.plan, "device_map": device_map}).to_text())
    done = devmap("check", "profile.yaml")
    assert done.returncode == 3, done.stderr
    assert "error[broken-lock]" in done.stderr
    assert said in " ".join(done.stderr.split())


def test_a_lock_that_does_not_hold_is_named_where_a_plan_is_made_anew(profile):
    assert devmap("compile", "profile.yaml").returncode == 0
    assert devmap("explain", "profile.yaml").stderr == ""
    path = Path("profile.lock.json")
    whole = path.read_text()
    path.write_text(whole.replace('"lm_head": "cpu"', '"lm_head": 0'))
    for command in ("explain", "simulate"):
        done = devmap(command, "profile.yaml")
        assert (done.returncode, "warning[unreadable-lock]" in done.stderr) == (0, True)
        assert "shown is the plan of the profile as it is now" in " ".join(done.stderr.split())
    path.write_text(whole)
    profile.write_text(GOOD.replace("match: lm_head", "match: model.norm"))
    assert "warning[stale-lock]" in devmap("explain", "profile.yaml").stderr


def test_tree_measures_every_block(workspace):
    done = devmap("tree", "llama", "--measure", "--context", "64", "--format", "json")
    value = json.loads(done.stdout)
    assert (value["workload"]["context_length"], value["measured"]) == (64, True)
    layer = next(block for block in value["blocks"] if block["path"] == "model.layers.1")
    assert layer["cache_bytes"] > 0
    assert layer["prefill_operations"] > layer["decode_operations"] > 0
    shown = devmap("tree", "llama", "--measure").stdout
    assert "4,096 tokens prefilled" in shown
    assert "model.layers.[1-5]" in shown


def test_tree_measures_the_workload_of_the_profile(profile):
    profile.write_text(GOOD + "workload: {context_length: 32, batch_size: 3}\n")
    assert "batch 3, 32 tokens prefilled" in devmap("tree", "profile.yaml", "--measure").stdout
    assert "batch 3, 16 tokens" in devmap("tree", "profile.yaml", "--measure", "--context", "16").stdout
    assert devmap("tree", "profile.yaml", "--context", "16").returncode == 2


FASTEST = """\
version: 1
model: {source: llama}
workload: {context_length: 64}
hardware: {devices: {cuda:0: rtx-4090}}
placement: {strategy: fastest}
"""


def test_explain_of_a_profile_describes_the_plan(workspace, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    Path("profile.yaml").write_text(FASTEST)
    done = devmap("explain", "profile.yaml")
    assert done.returncode == 0
    assert "by `fastest`" in done.stdout
    assert "no plan in the search space can take less than" in done.stdout
    assert "A token waits for the host (" in done.stdout
    assert 3 <= len(done.stdout.splitlines()) <= 12


def test_explain_of_a_module_gives_the_reason_for_its_device(profile):
    by_rule = devmap("explain", "profile.yaml", "lm_head").stdout
    assert "`lm_head` is on cpu, and runs on cuda:0." in by_rule
    assert "`lm_head` (profile.yaml:5) decides: it puts it on cpu." in by_rule
    by_strategy = devmap("explain", "profile.yaml", "model.layers.1.mlp").stdout
    assert "part of the block `model.layers.1`" in by_strategy
    assert "- on cpu, copied to cuda:0 at every forward" in by_strategy


def test_explain_prints_json(profile):
    def explained(*arguments):
        return json.loads(CliRunner().invoke(devmap_command, ["explain", *arguments, "--format", "json"]).stdout)

    story = explained("profile.yaml")
    assert (story["plan"]["device_map"]["lm_head"], story["module"], story["alternatives"]) == ("cpu", None, [])
    assert "stays empty" not in story["explanation"][0]
    assert "by `auto`" in story["explanation"][0]
    norm = explained("profile.yaml", "model.norm")
    assert norm["explanation"][0] == "`model.norm` is on cuda:0."
    assert [each["location"] for each in norm["alternatives"]] == [
        {"stored_on": "cpu", "runs_on": "cuda:0"},
        {"stored_on": "cpu", "runs_on": "cpu"},
    ]
    code = explained("unmatched-pattern")
    assert (code["plan"], code["code"], code["page"].splitlines()[0]) == (
        None,
        "unmatched-pattern",
        "# unmatched-pattern",
    )


def test_explain_of_unknown_names_is_an_error(profile):
    done = devmap("explain", "profile.yaml", "model.layer.1")
    assert (done.returncode, "did you mean `model.layers.1`?" in done.stderr) == (2, True)
    assert "`nothing.yaml` does not exist" in devmap("explain", "nothing.yaml").stderr
    assert devmap("explain", "unmatched-pattern", "lm_head").returncode == 2


TWO_CARDS = """\
version: 1
model: {source: llama}
workload: {context_length: 64}
hardware:
  devices: {"cuda:[0-1]": {memory: 440KiB, bandwidth: 1TB/s}}
  links: {peer: {bandwidth: 1TB/s, latency: 1ns}}
placement: {strategy: fastest}
"""


def test_keep_moves_as_few_layers_as_possible(workspace):
    """The second card lost room for one layer: one layer moves, while a new plan would move two."""
    cards = '"cuda:[0-1]": {memory: 440KiB, bandwidth: 1TB/s}'
    Path("profile.yaml").write_text(TWO_CARDS)
    devmap("compile", "profile.yaml")
    first = json.loads(Path("profile.lock.json").read_text())["plan"]["device_map"]
    smaller = "cuda:0: {memory: 600KiB, bandwidth: 1TB/s}, cuda:1: {memory: 290KiB, bandwidth: 1TB/s}"
    Path("profile.yaml").write_text(TWO_CARDS.replace(cards, smaller))
    moved = {}
    for keep in ((), ("--keep",)):
        plan = json.loads(devmap("compile", "profile.yaml", "--dry-run", "--format", "json", *keep).stdout)["plan"]
        moved[keep] = {unit for unit, device in plan["device_map"].items() if device != first[unit]}
    assert moved["--keep",] == {"model.layers.3"}
    assert len(moved[()]) > 1


def test_keep_returns_the_locked_plan_if_it_is_as_good(workspace):
    Path("profile.yaml").write_text(TWO_CARDS)
    assert devmap("compile", "profile.yaml").returncode == 0
    first = json.loads(Path("profile.lock.json").read_text())["plan"]["device_map"]
    assert set(first.values()) == {0, 1}
    # With more memory on the first, another layer there would leave room for a longer context, and make nothing faster.
    cards = '"cuda:[0-1]": {memory: 440KiB, bandwidth: 1TB/s}'
    larger = "cuda:0: {memory: 600KiB, bandwidth: 1TB/s}, cuda:1: {memory: 440KiB, bandwidth: 1TB/s}"
    Path("profile.yaml").write_text(TWO_CARDS.replace(cards, larger))
    fresh = json.loads(devmap("compile", "profile.yaml", "--dry-run", "--format", "json").stdout)
    assert fresh["plan"]["device_map"] != first
    assert devmap("compile", "profile.yaml", "--keep").returncode == 0
    assert json.loads(Path("profile.lock.json").read_text())["plan"]["device_map"] == first
    assert devmap("check", "profile.yaml").returncode == 0
    # Where a hop takes long, one card that holds all is better, and the locked plan is not as good any more.
    Path("profile.yaml").write_text(TWO_CARDS.replace("440KiB", "100MiB").replace("1ns", "1ms"))
    assert devmap("compile", "profile.yaml", "--keep").returncode == 0
    assert set(json.loads(Path("profile.lock.json").read_text())["plan"]["device_map"].values()) == {0}
