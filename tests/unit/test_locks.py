"""Changed locks are refused even with a right digest: derived values are derived again, others are validated."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import LLAMA

from devmap_config.amounts import format_duration
from devmap_config.cli import devmap
from devmap_config.cli.checking import check_one
from devmap_config.cli.command import ProfileOptions
from devmap_config.cli.compile import compile_command
from devmap_config.graph.digest import digest
from devmap_config.locked import compile_locked
from devmap_config.plan.lock import LockError, read_lock
from devmap_config.runner.loading import RunnerError
from devmap_config.runner.runner import prepare

PROFILE = """\
version: 1
variables: {context: 16}
model: {source: small}
workload: {context_length: "{{ context }}"}
hardware:
  devices: {cuda:0: rtx-4090, cuda:1: {memory: 1GiB, bandwidth: 1TB/s}, cpu: {memory: 1GiB, bandwidth: 50GB/s}}
  links: {host: 25GB/s, peer: 12GB/s}
placement:
  strategy: sequential
  pins:
    - {match: lm_head, device: cuda:1}
    - {match: model.layers.1.mlp, compute: cpu}
"""

FASTEST = PROFILE.replace("sequential", "fastest").replace("16}", "8}")

OPTIONS = ProfileOptions()

NOTHING = object()


@pytest.fixture
def lock(workspace):
    """A lock with every kind of content, as JSON."""
    return compiled(PROFILE)


def compiled(text, *arguments, layers=2):
    Path("small").mkdir(exist_ok=True)
    Path("small/config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": layers}))
    Path("p.yaml").write_text(text)
    options = ["-q", "--no-simulate", "--set", "context=24", *arguments]
    assert compile_command.main(["p.yaml", *options], standalone_mode=False) == 0
    return json.loads(Path("p.lock.json").read_text())


def resealed(lock):
    """Return the text of a lock with a matching digest."""
    sealed = {key: value for key, value in lock.items() if key not in ("digest", "made_with")}
    return json.dumps({**lock, "digest": digest(sealed)})


def judged(text):
    """Return the message about a lock with this text, or nothing if it is valid; `check` and `run` agree."""
    Path("p.lock.json").write_text(text)
    checked = check_one(Path("p.yaml"), OPTIONS)
    try:
        prepare(Path("p.yaml"), variables={})
    except RunnerError as error:
        found = (error.code, str(error)) if error.code != "no-weights" else None
    said = [(each.code, each.message) for each in checked.diagnostics if each.severity == "error"]
    assert said == ([] if found is None else [found])
    assert (checked.state in ("stale", "damaged")) == (found is not None)
    return found and found[1]


def is_believed(text):
    """Tell whether a lock is valid, by the check that `check`, `run` and `diff` share."""
    try:
        _, drift = compile_locked(Path("p.yaml"), read_lock(text))
    except LockError:
        return False
    return drift is None


def routes(value, route=()):
    """Yield the route of every mapping, list and scalar in plain data."""
    yield route, value
    if isinstance(value, dict):
        for key, part in value.items():
            yield from routes(part, (*route, key))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from routes(part, (*route, index))


def changed(lock, route, value):
    """Return a copy of a lock with another value at a route, or without it."""
    lock = copy.deepcopy(lock)
    *parents, last = route
    holder = lock
    for part in parents:
        holder = holder[part]
    if value is NOTHING:
        del holder[last]
    else:
        holder[last] = value
    return lock


def others(value):
    """Return values that differ from this one: of its type, then of others."""
    if isinstance(value, bool):
        return (not value, int(value), None)
    if isinstance(value, int):
        return (value + 1, value - 1, float(value), True, str(value), None)
    if isinstance(value, str):
        is_digest = value.startswith("sha256:")
        return (f"sha256:{'0' * 64}" if is_digest else f"{value}x", "", 1, None, [value], {value: value})
    return (0, "x", [])


SEALED = ("hardware", "inputs", "lock_version", "plan", "set", "values")


def test_a_lock_with_any_changed_leaf_is_refused(lock):
    leaves = [(route, value) for route, value in routes(lock) if route and not isinstance(value, (dict, list))]
    leaves = [(route, value) for route, value in leaves if route[0] in SEALED]
    assert len(leaves) > 100
    believed = [
        (route, other)
        for route, value in leaves
        # Values may be of any type, so that each is compared: two of them are enough.
        for other in (*others(value)[: 2 if route[0] == "values" else None], NOTHING)
        if is_believed(resealed(changed(lock, route, other)))
    ]
    assert believed == []
    assert judged(resealed(lock)) is None


def test_a_lock_with_parts_removed_emptied_or_added_is_refused(lock):
    parts = [(route, value) for route, value in routes(lock) if isinstance(value, (dict, list))]
    believed = []
    for route, value in parts:
        if isinstance(value, dict):
            invented = [changed(lock, (*route, "invented"), each) for each in (1, "cpu", None, {})]
        else:
            invented = [changed(lock, route, [*value, value[0]]), changed(lock, route, value[::-1])]
        if value and route:
            invented += [changed(lock, route, NOTHING), changed(lock, route, type(value)())]
        believed += [(route, each) for each in invented if is_believed(resealed(each))]
    assert believed == []


def test_versions_are_typed_but_not_part_of_digest_or_comparison(lock):
    for library in lock["made_with"]:
        for version in ("0.0.1", None):
            assert judged(json.dumps(changed(lock, ("made_with", library), version))) is None
        assert f"`made_with.{library}` cannot be 5" in judged(json.dumps(changed(lock, ("made_with", library), 5)))
        assert f"`made_with.{library}` is missing" in judged(json.dumps(changed(lock, ("made_with", library), NOTHING)))


@pytest.mark.parametrize(
    ("route", "value", "said"),
    [
        (("plan", "prediction", "longest_context"), 999_999_999, "`plan.prediction.longest_context` is 999,999,999,"),
        (("plan", "prediction", "decode_nanoseconds_per_token"), 1, "_per_token` is 1, and"),
        (("plan", "devices", 0, "weights_bytes"), 1, "what it says cuda:0 holds is not what it puts there"),
        (("plan", "devices", 2, "capacity_bytes"), 2**40, "`plan.devices[2].capacity_bytes` is 1,099,511,627,776, and"),
        (("plan", "main_device"), "cuda:1", "its main device is cuda:0, and it says cuda:1"),
        (("plan", "measured"), False, "`plan.measured` is false, and true follows"),
        (("plan", "executor"), "magic", "`plan.executor` is magic, and accelerate follows"),
        (("plan", "strategy"), "fastest", "`plan.strategy` is fastest, and sequential follows"),
        (("plan", "compute", "a"), "b", "it computes `a` somewhere, which it places nowhere"),
        (("plan", "compute", "model.layers.1.mlp"), "disk", "`model.layers.1.mlp` on disk"),
        (("plan", "compute", "model.layers.0"), "cpu", "it runs `model.layers.0` on cpu, which is stored on cuda:0"),
        (("plan", "device_map", "model.norm"), 1, "what it says cuda:0 holds"),
        (("plan", "device_map", "lm_head"), 0, "`lm_head` puts it on cuda:1"),
        (("plan", "device_map", "lm_head"), 7, "it places `lm_head` on cuda:7, which is not a device of the profile"),
        (("plan", "device_map", "model.nothing"), 0, "which LlamaForCausalLM does not have"),
        (("values", "config", "vocab_size"), 1, "`values.config.vocab_size` is 1, and 256 follows"),
        (("hardware", "cuda:9"), {"accelerator": None, "memory_bytes": 1, "overhead_bytes": 0}, "`hardware.cuda:9` is"),
        (("hardware", "cuda:0", "accelerator"), "h100-sxm", "`hardware.cuda:0.accelerator` is h100-sxm, and rtx-4090"),
        (("inputs", "config"), f"sha256:{'0' * 64}", "the model's config changed"),
        (("inputs", "graph"), f"sha256:{'0' * 64}", "the model's module tree changed"),
        (("inputs", "measurement"), f"sha256:{'0' * 64}", "what running the model was measured to take changed"),
        (("set", "context"), "8", "the profile: `workload.context_length` 24 → 8"),
        (("plan", "prediction", "bound_decode_nanoseconds_per_token"), 1, "is 1, and `sequential` proves none"),
        (("plan", "magic"), 1, "`plan.magic` is not a key of a lock"),
        (("plan", "devices", 1, "id"), NOTHING, "`plan.devices[1].id` is missing"),
        (("plan", "devices", 1, "id"), "cuda:0", "`plan.devices[1].id` is cuda:0, and cuda:1 follows"),
        (("plan", "prediction", "hops"), -1, "`plan.prediction.hops` cannot be -1"),
        (("inputs", "commit"), "main", '`inputs.commit` cannot be "main"'),
        (("values", "config", "x"), "\ud800", "no Unicode"),
        (("values", "config", "vocab_size"), [1], "`values.config.vocab_size` cannot be [1]"),
        (("plan", "device_map", "lm_head"), None, "`plan.device_map.lm_head` cannot be null"),
        (("plan", "device_map", "lm_head"), True, "`plan.device_map.lm_head` cannot be true"),
        (("hardware",), [], "`hardware` cannot be []"),
    ],
)  # fmt: skip
def test_a_changed_and_resealed_lock_is_refused_with_the_route(lock, route, value, said):
    try:
        text = resealed(changed(lock, route, value))
    except UnicodeEncodeError:
        text = json.dumps(changed(lock, route, value))
    assert said in judged(text)


@pytest.mark.parametrize("version", [True, False, 0, -1, 1.0, "1", None, [1]])
def test_a_version_is_an_integer_of_at_least_1(lock, version):
    with pytest.raises(LockError, match="lock_version"):
        read_lock(resealed({**lock, "lock_version": version}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested deeper than 32"),
        ('{"lock_version": 1, "lock_version": 1}', "`lock_version` stands in it twice"),
        ('{"lock_version": ' + "9" * 5000 + "}", "not JSON"),
        ("null", "no `lock_version`"),
        ("", "not JSON"),
        ("\x00", "not JSON"),
    ],
)
def test_text_that_is_no_lock_is_an_error_without_traceback(text, said):
    with pytest.raises(LockError, match=said):
        read_lock(text)


def test_a_bound_needs_a_strategy_that_proves_it_and_is_at_most_the_plans_time(workspace):
    lock = compiled(FASTEST)
    route = ("plan", "prediction", "bound_decode_nanoseconds_per_token")
    bound, decode = lock["plan"]["prediction"][route[-1]], lock["plan"]["prediction"]["decode_nanoseconds_per_token"]
    assert 0 < bound <= decode
    for other, said in (
        (decode + 1, f"is {decode + 1:,}, and the plan takes {decode:,}"),
        (0, "is 0, and the plan takes"),
        (None, "is null, and `fastest` proves one"),
    ):
        assert said in judged(resealed(changed(lock, route, other)))


def test_a_locked_bound_is_trusted_unless_it_is_to_be_proven(workspace):
    lock = compiled(FASTEST)
    assert check_one(Path("p.yaml"), OPTIONS, proves=True).state == "fresh"
    route = ("plan", "prediction", "bound_decode_nanoseconds_per_token")
    bound = lock["plan"]["prediction"][route[-1]]
    assert judged(resealed(changed(lock, route, bound - 1))) is None
    checked = check_one(Path("p.yaml"), OPTIONS, proves=True)
    assert (checked.state, checked.diagnostics[-1].code) == ("stale", "unproven-lock")
    assert f"is {bound - 1:,}, and {bound:,} is what is proven" in checked.diagnostics[-1].message


def test_a_lock_linked_from_outside_the_repository_is_read_only_if_allowed(lock):
    Path("home/.git").mkdir(parents=True)
    for name in ("p.yaml", "small"):
        Path(name).rename(f"home/{name}")
    Path("home/p.lock.json").symlink_to("../p.lock.json")

    def said(command, *arguments):
        return CliRunner().invoke(devmap, [command, *arguments, "home/p.yaml"]).output

    assert "1 lock cannot be read" in said("check")
    assert "1 lock up to date" in said("check", "--allow-outside")
    assert "error[unreadable-lock]" in said("run", "--no-probe")
    assert "error[no-weights]" in said("run", "--no-probe", "--allow-outside")
    assert "warning[unreadable-lock]" in said("diff", "home/p.yaml")
    assert "are the same plan" in said("diff", "--allow-outside", "home/p.lock.json")


SPREAD = """\
version: 1
variables: {context: 24}
model: {source: small}
workload: {context_length: "{{ context }}"}
hardware:
  devices: {"cuda:[0-1]": {memory: 3000KiB, bandwidth: 1TB/s}}
  links: {host: 25GB/s, peer: 12GB/s}
  host: {dispatch: 1ns}
placement: {strategy: fastest}
"""
"""Of many layers, those that are not on the first card take a little longer: what it makes is brought to each."""

FASTEST_DECODE = ("plan", "prediction", "fastest_decode_nanoseconds_per_token")


def test_the_fastest_plans_time_is_between_bound_and_plan(workspace):
    lock = compiled(SPREAD, layers=60)
    prediction = lock["plan"]["prediction"]
    bound, decode = prediction["bound_decode_nanoseconds_per_token"], prediction["decode_nanoseconds_per_token"]
    fastest = prediction[FASTEST_DECODE[-1]]
    assert bound <= fastest < decode
    shown = CliRunner().invoke(devmap, ["compile", "p.yaml", "--no-simulate"]).output
    proof = f"no plan in the search space is below {format_duration(bound)}"
    times = f"(the fastest plan takes {format_duration(fastest)}; {proof})"
    assert times in " ".join(shown.split())
    story = " ".join(CliRunner().invoke(devmap, ["explain", "p.yaml"]).output.split())
    share = 100 * (decode - fastest) / decode
    assert f"The fastest plan that was found takes {format_duration(fastest)} a token, {share:.1f} % less." in story
    assert "This one was preferred because the context may grow to 49 tokens instead of " in story
    assert check_one(Path("p.yaml"), OPTIONS, proves=True).state == "fresh"
    for other, said in (
        (decode, f"is {decode:,}, and the plan takes {decode:,}"),
        (bound - 1, f"is {bound - 1:,}, and the bound is {bound:,}"),
        (None, "cannot be null"),
    ):
        assert said in judged(resealed(changed(lock, FASTEST_DECODE, other)))
    for believed in (decode - 1, NOTHING):  # until it is to be proven; early locks do not say
        assert judged(resealed(changed(lock, FASTEST_DECODE, believed))) is None
        checked = check_one(Path("p.yaml"), OPTIONS, proves=True)
        assert (checked.state, checked.diagnostics[-1].code) == ("stale", "unproven-lock")
        assert f"{fastest:,} is what placing anew gives" in checked.diagnostics[-1].message


def test_a_lock_of_a_static_cache_is_proven_as_any_other(workspace):
    """transformers then compiles decoding on one CUDA card; the time and its bound are of uncompiled code."""
    compiled(
        SPREAD.replace('context }}"}', 'context }}", cache: static}').replace("[0-1]", "0").replace("3000KiB", "1GiB")
    )
    assert check_one(Path("p.yaml"), OPTIONS, proves=True).state == "fresh"


def test_a_fastest_time_is_refused_for_strategies_that_compute_none(lock):
    said = judged(resealed(changed(lock, FASTEST_DECODE, 1)))
    assert f"`{'.'.join(FASTEST_DECODE)}` is 1, and `sequential` looks for none" in said


def test_a_plan_can_be_proven_to_be_its_strategys(workspace):
    """A consistent lock of another strategy's plan, which is otherwise accepted, is refused."""
    pinned = compiled(PROFILE.replace("pins:", 'pins:\n    - {match: "model.layers.0", device: cuda:1}'))
    lock = compiled(PROFILE)
    forged = {**lock, "plan": pinned["plan"]}
    assert judged(resealed(forged)) is None
    checked = check_one(Path("p.yaml"), OPTIONS, proves=True)
    assert (checked.state, checked.diagnostics[-1].code) == ("stale", "unproven-lock")
    assert "`plan.device_map.model.layers.0` is 1, and placing anew gives 0" in checked.diagnostics[-1].message


def test_a_plan_kept_by_keep_can_be_proven_as_good(workspace):
    compiled(FASTEST)
    Path("p.yaml").write_text(FASTEST.replace("cuda:1: {memory: 1GiB", "cuda:1: {memory: 2GiB"))
    compiled(Path("p.yaml").read_text(), "--keep")
    assert check_one(Path("p.yaml"), OPTIONS, proves=True).state == "fresh"


def test_check_and_run_refuse_a_forged_lock(lock):
    """With many values changed at once, as a person would forge it."""
    forged = copy.deepcopy(lock)
    forged["plan"].update(strategy="fastest", measured=False, executor="magic", compute={"a": "b"})
    forged["plan"]["prediction"].update(decode_nanoseconds_per_token=1, longest_context=999_999_999)
    forged.update(values={"config": {"vocab_size": 1}}, hardware={"cuda:9": {}})
    Path("p.lock.json").write_text(resealed(forged))
    for command in (["check", "p.yaml"], ["run", "p.yaml"], ["check", "--prove", "p.yaml"]):
        done = CliRunner().invoke(devmap, command, standalone_mode=False)
        assert (done.return_value, "error[unreadable-lock]" in done.stderr) == (3, True), done.output
        assert "`hardware.cuda:9.accelerator` is missing" in " ".join(done.stderr.split())
        assert "up to date" not in done.output


def test_a_revision_that_is_a_commit_overrides_the_lock(lock):
    """A forged commit is not requested from the hub; it is compared, and differs."""
    first, second = "1" * 40, "2" * 40
    forged = changed(lock, ("inputs", "commit"), second)
    forged["values"]["profile"] |= {"model.source": "people/llama", "model.revision": first}
    assert read_lock(resealed(forged)).resolved.commit == first
    forged["values"]["profile"]["model.revision"] = "main"
    assert read_lock(resealed(forged)).resolved.commit == second
