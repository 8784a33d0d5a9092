"""The shipped receipts of real cards are shown as they are, and their plans held."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from devmap_config.cli.receipts import receipts
from devmap_config.runner.receipts import FOLDER, cases_of, read_receipts

REPOSITORY = Path(__file__).parents[2]
SHARES_OFF = {"4bit-1": 0.04, "4bit-limited-1": 0.06, "limited-8": 0.05}
"""Copies in float32 were not counted then; where weights are streamed, all that may be there at once seldom is."""

BEYOND_THE_LIMIT = 4_031_578_112
"""Taken by the one case that went beyond its limit, by pieces that torch could not use: docs/real-cards.md tells it."""

CASES = [(receipt, case) for receipt in read_receipts() for case in receipt["cases"]]
OURS = [(receipt, case) for receipt, case in CASES if case.get("by") == "devmap_config.load_model"]


def planned_bytes(case):
    [use] = case["predicted"]["devices"]
    return sum(use[f"{part}_bytes"] for part in ("weights", "kv_cache", "activation", "overhead"))


def run(*arguments):
    return CliRunner().invoke(receipts, arguments, standalone_mode=False, catch_exceptions=False)


def test_the_page_shows_every_receipt_as_it_is():
    table = run("--format", "markdown").stdout
    assert table.count("\n") > 20
    assert table in (REPOSITORY / "docs" / "real-cards.md").read_text(encoding="utf-8")


def test_failed_runs_are_listed_too():
    assert len(list(FOLDER.glob("*.json"))) == 5
    assert [case["case"] for _, case in CASES if "failed" in case] == ["4bit-limited-1"]


@pytest.mark.parametrize(("receipt", "case"), OURS, ids=[f"{each['model']} {case['case']}" for each, case in OURS])
def test_plans_held_on_real_cards(receipt, case):
    seen = case["seen"]["cuda:0"]
    share = SHARES_OFF.get(case["case"], 0.01)
    assert seen["peak_bytes"] == pytest.approx(planned_bytes(case), rel=share)
    if case["limit_bytes"] is not None and seen["card_used_bytes"] != BEYOND_THE_LIMIT:
        assert seen["card_used_bytes"] <= case["limit_bytes"]


@pytest.mark.parametrize("receipt", read_receipts(), ids=lambda receipt: receipt["command"])
def test_logits_in_receipts_are_those_of_the_whole_model(receipt):
    for case in receipt["cases"]:
        if "failed" not in case and not case["case"].startswith("4bit"):
            assert case["logits_difference"] < (0.025 if case["compute"] else 1e-6) or case["by"].startswith("trans")


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_predicted_and_measured_values_fit_a_narrow_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = run().stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert not any("…" in line for line in lines)
    [whole] = [line.split() for line in lines[: lines.index("")] if line.startswith("whole-1")]
    assert " ".join(whole).endswith("15.43 → 15.46 14 → 23 55 → 61" + (" 3.3" if columns >= 80 else ""))
    assert any(line.split() == ["4bit-limited-1", "out", "of", "memory"] for line in lines)


@pytest.mark.parametrize("columns", [60, 120])
def test_rows_of_a_case_on_several_devices_name_the_device(monkeypatch, tmp_path, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    receipt = json.loads((FOLDER / "llama-3.1-8b.json").read_text(encoding="utf-8"))
    case = receipt["cases"][0]
    [card] = case["predicted"]["devices"]
    case["predicted"]["devices"] = [card, {**card, "id": "cpu"}]
    (tmp_path / "two.json").write_text(json.dumps(receipt))
    rows = [line.split()[:2] for line in run(str(tmp_path / "two.json")).stdout.splitlines()]
    assert ["whole-1", "cuda:0"] in rows
    assert ["whole-1", "cpu"] in rows


def test_runs_of_transformers_own_map_have_no_predictions():
    [auto] = [case for case in cases_of(FOLDER / "llama-3.1-8b.json") if case.name == "auto-1"]
    assert {figure.predicted for figure in auto.figures} == {None}
    assert next(figure.seen for figure in auto.figures if figure.name == "token") == 1.752


def test_cpu_memory_excludes_what_the_process_held_before(tmp_path):
    receipt = json.loads((FOLDER / "qwen3-30b-a3b.json").read_text())
    [case] = [case for case in receipt["cases"] if case["case"] == "whole-1"]
    case["predicted"]["devices"][0]["id"] = "cpu"
    case["seen"] = {"cpu": {"process_bytes": 300, "loading_peak_bytes": 400, "peak_bytes": 1_000, "weights_bytes": 77}}
    (tmp_path / "one.json").write_text(json.dumps({**receipt, "cases": [case]}))
    found = json.loads(run(str(tmp_path / "one.json"), "--format", "json").stdout)
    figures = {each["name"]: (each["device"], each["seen"]) for each in found["cases"][0]["figures"]}
    assert figures["running"] == ("cpu", 700)
    assert figures["loading"] == ("cpu", 100)
    assert figures["weights"] == ("cpu", 77)
    assert figures["cache"] == ("cpu", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "does not exist"), ("{", "is not JSON at line 1"), ("{}", "is not a receipt"), ("[1]", "is not a receipt")],
)
def test_a_file_that_is_no_receipt_is_an_error(tmp_path, text, message):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    done = run(str(path))
    assert (done.return_value, message in " ".join(done.stderr.split())) == (2, True)
