"""The report page and picture of a plan state what `--format json` states, and names in them stay text."""

from __future__ import annotations

import base64
import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner
from conftest import REPOSITORY, write_models
from reported import PROFILE

from devmap_config.amounts import format_bytes, format_duration
from devmap_config.cli import devmap
from devmap_config.report.page import page_of, svg_of
from devmap_config.report.picture import LEGEND, picture_of

HOSTILE = "\"'><img src=x onerror=alert(1)><script>alert(1)</script><svg onload=alert(1)>{{ 7*7 }}`</title></style>"


def run(*arguments):
    done = CliRunner().invoke(devmap, list(arguments), standalone_mode=False, catch_exceptions=False)
    assert done.return_value == 0, done.output
    return done


def told(*arguments):
    return json.loads(run(*arguments, "--format", "json").stdout)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a profile, its page and picture, and the object from which they were made."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        write_models(folder)
        patch.chdir(folder)
        Path("plan.yaml").write_text(PROFILE)
        data = told("report", "plan.yaml", "-o", "plan.html", "--svg", "plan.svg")
        yield folder, data


@pytest.fixture
def folder(made, monkeypatch):
    monkeypatch.chdir(made[0])
    return made[0]


@pytest.fixture
def data(made):
    return made[1]


class Page(HTMLParser):
    """A parser that collects the elements of a page, and the text of each table row."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.ids, self.attributes, self.in_cell = [], [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        if self.in_cell:
            self.rows[-1][-1] += data.strip()


def test_the_report_is_made_from_what_other_commands_print(folder, data):
    [report] = data["reports"]
    assert report["plan"] == told("compile", "plan.yaml", "--dry-run")["plan"] == data["plan"]
    explained = told("explain", "plan.yaml")
    assert {**explained, **{key: report[key] for key in ("explanation", "waits")}} == explained
    assert [{key: value for key, value in run.items() if key not in ("why", "alternatives")} for run in report["runs"]]
    assert [{**run, **found} for run, found in zip(explained["runs"], report["runs"], strict=True)] == report["runs"]
    simulated = told("simulate", "plan.yaml")["simulation"]
    assert {**simulated, **report["simulation"]} == simulated
    whole = told("explain", "plan.yaml", report["runs"][0]["first"])
    assert report["runs"][0]["alternatives"] == whole["alternatives"]


def test_weights_of_runs_add_up_to_those_of_their_devices(data):
    [report] = data["reports"]
    held = dict.fromkeys((use["id"] for use in report["plan"]["devices"]), 0)
    for run_ in report["runs"]:
        held[run_["device"]] += run_["weights_bytes"]
    assert held == {use["id"]: use["weights_bytes"] for use in report["plan"]["devices"]}
    assert {run_["mode"] for run_ in report["runs"]} == {"resident", "streamed", "computed-on-cpu"}


def test_the_page_states_the_exact_values(folder, data):
    [report] = data["reports"]
    text = Path("plan.html").read_text(encoding="utf-8")
    rows = Page(text).rows
    for use in report["plan"]["devices"]:
        keys = ("capacity", "weights", "kv_cache", "activation", "overhead", "free")
        sizes = [use[f"{key}_bytes"] for key in keys]
        assert [use["id"], *(format_bytes(size) if size else "–" for size in sizes)] in rows
    for link in report["simulation"]["links"]:
        row = next(row for row in rows if row[:2] == [link["source"], link["target"]])
        assert format_bytes(link["size_bytes"]) in row[2 if link["phase"] == "prefill" else 3]
    prediction = report["plan"]["prediction"]
    for figure in ("decode_nanoseconds_per_token", "prefill_nanoseconds"):
        assert f"<strong>{format_duration(prediction[figure])}</strong>" in text


def test_parts_of_bars_are_to_scale(data):
    [report] = data["reports"]
    picture = picture_of(report)
    for bar, use in zip(picture.bars, report["plan"]["devices"], strict=True):
        drawn_bytes = picture.scale_bytes * bar.width / 100
        for part in bar.parts:
            if part.kind != "free":
                assert part.size_bytes / drawn_bytes == pytest.approx(part.share / 100, abs=1e-4)
        assert bar.is_cut == (use["capacity_bytes"] > drawn_bytes * 1.001)
        assert bar.parts[-1].start + bar.parts[-1].share == pytest.approx(100, abs=0.3)


def test_the_page_is_self_contained_and_allows_only_its_own_script(folder):
    text = Path("plan.html").read_text(encoding="utf-8")
    page = Page(text)
    named = [value for name, value in page.attributes if name in ("src", "href", "action", "data", "xlink:href")]
    assert named
    assert all(value.startswith("#") for value in named)
    assert {value[1:] for value in named} <= {*page.ids}
    assert len(page.ids) == len({*page.ids})
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "@import" not in text
    assert "url(" not in text


def test_the_same_plan_gives_the_same_bytes(folder, data):
    [report] = data["reports"]
    assert svg_of(json.loads(json.dumps(report))) == Path("plan.svg").read_text(encoding="utf-8")
    assert page_of([report], version="1") == page_of(json.loads(json.dumps([report])), version="1")
    assert str(folder) not in Path("plan.html").read_text(encoding="utf-8")


def hostile(value):
    """The same with names that look like markup or commands."""
    if isinstance(value, dict):
        return {
            key: hostile(each) if key not in NAMES else [HOSTILE] if isinstance(each, list) else HOSTILE
            for key, each in value.items()
        }
    return [hostile(each) for each in value] if isinstance(value, list) else value


NAMES = {"profile", "patterns", "first", "explanation", "why", "accelerator", "block", "full_device", "lock", "message"}


def test_hostile_names_stay_text(data):
    [report] = data["reports"]
    finding = dict.fromkeys(("file", "message", "help", "code", "severity"), HOSTILE) | {"line": 1}
    case = {
        "receipt": HOSTILE,
        "name": HOSTILE,
        "failed": HOSTILE,
        "figures": [{"name": "running", "device": HOSTILE, "predicted": 1, "seen": 2}],
    }
    home = {"device": HOSTILE, "computes_there": True, "runs_on": HOSTILE}
    change = {"before": HOSTILE, "after": HOSTILE}
    figures = {key: {"before": 1, "after": 2} for key in report["plan"]["prediction"]}
    diff = {
        "equal": False,
        "moved": [{"modules": [HOSTILE], "before": home, "after": home}],
        "models_differ": True,
        "devices": [{"id": HOSTILE, "before": report["plan"]["devices"][0], "after": None}],
        "prediction": figures,
        "basis": {"decode": change, "prefill": change},
        "settings": {HOSTILE: change},
    }
    bad = {**hostile(report), "diagnostics": [finding]}
    options = {"cases": [case], "diff": diff, "sides": (HOSTILE, HOSTILE), "version": "1"}
    text = page_of([bad], **options)
    page = Page(text)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert [name for name, _ in page.attributes if name.startswith("on")] == []
    assert "<svg onload" not in text
    assert "{{ 7*7 }}" in text
    picture = svg_of(bad)
    tags = {element.tag.rpartition("}")[2] for element in ET.fromstring(picture).iter()}  # noqa: S314  our own
    assert tags <= {
        *("svg", "title", "desc", "style", "defs", "pattern", "rect", "circle", "path", "text", "tspan", "g")
    }
    assert "<script" not in picture


def test_two_profiles_and_receipts_have_their_own_sections(folder):
    Path("other.yaml").write_text(PROFILE.replace("1: 320KiB", "1: 280KiB"))
    case = {
        "case": "a-run",
        "by": "devmap run",
        "generation": {"decode_seconds_per_token": 0.5, "prefill_seconds": None},
        "load_seconds": 1.0,
        "seen": {"cpu": {"peak_bytes": 3 * 2**20, "process_bytes": 2**20}},
        "predicted": {
            "devices": [dict.fromkeys(("weights_bytes", "activation_bytes", "loading_bytes"), 2**19)],
            "prediction": {"decode_nanoseconds_per_token": 250_000_000, "prefill_nanoseconds": 1},
        },
    }
    case["predicted"]["devices"][0] |= {"id": "cpu", "kv_cache_bytes": 2**18, "overhead_bytes": 0}
    Path("receipt.json").write_text(json.dumps({"cases": [case]}))
    options = ("plan.yaml", "other.yaml", "-o", "both.html", "--receipt", "receipt.json")
    data = told("report", *options)
    assert data["diff"] == json.loads(diff("plan.yaml", "other.yaml"))["diff"]
    assert data["cases"] == told("receipts", "receipt.json")["cases"]
    page = Page(Path("both.html").read_text(encoding="utf-8"))
    assert {"plan-1", "plan-2", "diff", "receipts"} <= {*page.ids}
    running = next(row for row in page.rows if row[:2] == ["a-run", "memory while it runs on cpu"])
    assert [running[2], running[3], *running[-2:]] == ["1.2 MiB", "2.0 MiB", "1.60", "768.0 KiB"]
    token = next(row for row in page.rows if row[:2] == ["a-run", "a token"])
    assert (token[2], token[3], token[-1]) == ("250 ms", "500 ms", "–")


def test_process_memory_of_a_cpu_plan_is_compared_with_the_prediction(folder):
    receipt = REPOSITORY / "receipts" / "dense-0.4b-bfloat16-torchao.json"
    told("report", "plan.yaml", "-o", "page.html", "--receipt", str(receipt))
    rows = {
        row[1]: row for row in Page(Path("page.html").read_text(encoding="utf-8")).rows if row[:1] == [receipt.stem]
    }
    assert "memory while it runs on cpu" not in rows
    assert rows["the process at most"][2:4] == ["1.6 GiB", "1.6 GiB"]
    assert rows["weights on cpu"][2] == rows["weights on cpu"][3]


def diff(*sides):
    return CliRunner().invoke(devmap, ["diff", *sides, "--format", "json"], standalone_mode=False).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan.yaml",), "name a file for the page"),
        (("plan.yaml", "-o", "plan.yaml"), "ends in `.html`"),
        (("plan.yaml", "--svg", "plan.html"), "ends in `.svg`"),
        (("plan.yaml", "-o", "none/plan.html"), "does not exist"),
    ],
)
def test_a_page_does_not_overwrite_a_profile(folder, arguments, said):
    done = CliRunner().invoke(devmap, ["report", *arguments])
    assert done.exit_code != 0
    assert said in done.output
    assert Path("plan.yaml").read_text() == PROFILE


def test_the_page_states_the_workload(data):
    [report] = data["reports"]
    assert "For 1 sequence of 64 tokens." in page_of([report], version="1")
    workload = {"batch_size": 2, "context_length": 9_000, "prompt_length": 1_000}
    workload |= {"images": 2, "image_width": 896, "image_height": 448, "audio_seconds": 30}
    said = "For 2 sequences of 9,000 tokens and a prompt of 1,000, with 2 images of 896 × 448 pixels and 30 s of sound."
    assert said in page_of([{**report, "workload": workload}], version="1")


def test_equal_links_from_a_device_are_one_row(data):
    [report] = data["reports"]
    link = {"phase": "decode", "source": "cuda:1", "transfers": 1, "size_bytes": 2**20, "weights_bytes": 0}
    links = [{**link, "target": target} for target in ("cuda:0", "cuda:2", "cuda:3", "cpu")]
    links.append({**link, "source": "cpu", "target": "cuda:0"})
    simulation = {**report["simulation"], "links": links}
    rows = Page(page_of([{**report, "simulation": simulation}], version="1")).rows
    assert ["cuda:1", "cuda:[0,2-3] and cpu", "–", "1.0 MiB in 1 copy"] in rows
    assert ["cpu", "cuda:0", "–", "1.0 MiB in 1 copy"] in rows


def test_stages_are_drawn_with_their_numbers_and_transfers(data):
    [report] = data["reports"]
    stage = {"first_layer": 0, "last_layer": 2, "decode_nanoseconds": 5, "prefill_nanoseconds": 9, "blocks": 7}
    stages = [{**stage, "devices": ["cuda:0", "cuda:1"]}, {**stage, "devices": ["cpu"]}]
    plan = {**report["plan"], "pipeline": {"stages": stages}}
    told_ = {**report, "plan": plan, "simulation": None, "sent_bytes": 2**13}
    [arc] = picture_of(told_).arcs
    assert (arc.source, arc.target, arc.title) == (1, 2, "cuda:0 to cuda:1 to cpu: 8.0 KiB")
    assert picture_of(told_).bars[2].flows == ("8.0 KiB from cuda:0 to cuda:1",)
    rows = Page(page_of([told_], version="1")).rows
    assert [row[:2] for row in rows if row[2:3] == ["0–2"]] == [["0", "cuda:[0-1]"], ["1", "cpu"]]


def test_equal_devices_and_shares_of_a_group_are_one_row(data):
    [report] = data["reports"]
    run_ = {**report["runs"][0], "mode": "tensor-parallel", "alternatives": []}
    runs = [{**run_, "device": f"cuda:{index}"} for index in range(2)]
    first, second, *others = report["plan"]["devices"]
    plan = {**report["plan"], "devices": [first, {**first, "id": second["id"]}, *others]}
    text = page_of([{**report, "plan": plan, "runs": runs}], version="1")
    assert text.count('class="row"') == 1
    assert text.count('href="#plan-1-run-0"') == 2
    assert "cuda:[0-1], " in text
    assert "of weights each" in text
    capacity = format_bytes(first["capacity_bytes"])
    assert next(row[0] for row in Page(text).rows if row[1:2] == [capacity]) == "cuda:[0-1], each"


def test_a_large_group_is_drawn_as_one_device_of_many(data):
    [report] = data["reports"]
    group = [f"left/cuda:{index}" for index in range(4)]
    run_ = {**report["runs"][0], "mode": "tensor-parallel", "alternatives": []}
    first, *_, last = report["plan"]["devices"]
    devices = [*({**first, "id": device} for device in group), {**last, "id": "right/cpu"}]
    stage = {"first_layer": 0, "last_layer": 2, "decode_nanoseconds": 5, "prefill_nanoseconds": 9, "blocks": 7}
    stages = [{**stage, "devices": group}, {**stage, "devices": ["right/cpu"]}]
    plan = {**report["plan"], "devices": devices, "pipeline": {"stages": stages}}
    runs = [{**run_, "device": device} for device in group]
    told_ = {**report, "plan": plan, "runs": runs, "simulation": None, "sent_bytes": 2**13}
    picture = picture_of(told_)
    assert [(bar.device, bar.name, bar.count, bar.row) for bar in picture.bars] == [
        ("left/cuda:[0-3]", "cuda:[0-3]", 4, 0),
        ("right/cpu", "cpu", 1, 1),
    ]
    assert [(arc.source, arc.target) for arc in picture.arcs] == [(0, 1)]
    assert picture.summary.startswith("left/cuda:[0-3]: ")
    for text in (page_of([told_], version="1"), svg_of(told_)):
        assert text.count(" free on each") == 1 + text.count("</desc>")
    assert all(len(words) * 7.5 < 484 - 29 for words in LEGEND.values())  # what the picture has room for in a column
    # Two are drawn by themselves, and so is what differs from its neighbours.
    others = [{**first, "id": device, "free_bytes": index} for index, device in enumerate(group)]
    for drawn in (devices[:2], others):
        bars = picture_of({**told_, "plan": {**plan, "devices": drawn, "pipeline": None}}).bars
        assert [bar.name for bar in bars] == [use["id"].removeprefix("left/") for use in drawn]


def test_alternatives_of_a_split_block_are_those_of_its_part(data):
    [report] = data["reports"]
    part = next(run_ for run_ in report["runs"] if run_["mode"] == "computed-on-cpu")
    assert (part["first"], part["block"]) == ("model.layers.5.mlp", "model.layers.5.mlp")
    assert part["alternatives"]
    assert "cpu" not in [str(other["location"]["runs_on"]) for other in part["alternatives"]]
