"""The report page of a plan works in headless Chromium; `make test-report` installs it, else these tests fail."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import REPOSITORY, write_models
from reported import PROFILE

from devmap_config.cli import devmap

pytestmark = pytest.mark.browser

WIDTHS = (360, 768, 1600)
SCHEMES = ("light", "dark")

RECEIPT = REPOSITORY / "receipts" / "encoder-decoder-0.7b-float32.json"
"""Its figures have long names."""

MORE_PINS = """\
  {match: "model.layers.[0-4/2].self_attn.{q_proj,k_proj}", device: cpu},
  {match: "model.layers.[1-3/2].mlp.{gate_proj,down_proj}", device: cpu, compute: cpu}]"""
"""By which what moved has long names."""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a page with two plans and their difference."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        write_models(folder)
        patch.chdir(folder)
        Path("plan.yaml").write_text(PROFILE)
        other = PROFILE.replace("1: 320KiB", "1: 280KiB").replace("cuda:1}]", f"cuda:1}},\n{MORE_PINS}")
        Path("other.yaml").write_text(other)
        command = ["report", "plan.yaml", "other.yaml", "--receipt", str(RECEIPT), "-o", "plan.html", "-q"]
        done = CliRunner().invoke(devmap, command)
        assert done.exit_code == 0, done.output
        drawn = CliRunner().invoke(devmap, ["report", "plan.yaml", "--svg", "plan.svg", "-q"])
        assert drawn.exit_code == 0, drawn.output
    return (folder / "plan.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    executable = shutil.which("chromium")
    assert executable, "Chromium is not installed: `make test-report` does it"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def opened(browser, address):
    """Open the page, and check that its console shows no error."""
    contexts, said = [], []

    def open_page(width=1200, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url != address else None)
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_page_fits_the_window_and_passes_axe(opened, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = opened(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = Axe().run(page).response["violations"]
    assert [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in found] == []


WIDER = """[...document.querySelectorAll(".scroll")].filter((part) => part.scrollWidth > part.clientWidth)
    .map((part) => part.getAttribute("aria-labelledby"))"""


def test_tables_need_no_scrolling_but_those_of_many_columns_on_a_phone(opened):
    wider = {width: opened(width).evaluate(WIDER) for width in (600, 721, *WIDTHS[1:])}
    assert not any(wider.values()), wider
    assert opened(WIDTHS[0]).evaluate(WIDER) == ["plan-1-sizes", "plan-2-sizes", "receipts-title"]


LABELS = """Array.from(document.querySelectorAll("text.on:not(.free)")).map((label) => [
    getComputedStyle(label).fill,
    getComputedStyle(document.querySelector(`rect.${label.classList[1]}`)).fill,
])"""


def luminance(colour):
    """Return the relative luminance that WCAG defines, of a colour such as `rgb(1, 2, 3)`."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_labels_on_the_picture_have_enough_contrast(browser, address, scheme):
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(address.replace("plan.html", "plan.svg"))
    pairs = page.evaluate(LABELS)
    context.close()
    assert pairs
    for label, ground in pairs:
        darker, lighter = sorted((luminance(label), luminance(ground)))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (label, ground)


def test_background_follows_the_colour_scheme(opened):
    grounds = [opened(scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor") for scheme in SCHEMES]
    light, dark = (sum(map(int, ground[4:-1].split(","))) for ground in grounds)
    assert light > 600
    assert dark < 150


def test_keyboard_reaches_every_block_and_shows_its_details(opened):
    page = opened()
    page.locator(".bar").nth(1).locator("a").first.focus()
    assert page.locator("#card").is_visible()
    first = page.locator("#card").inner_text()
    assert "of weights" in first
    page.keyboard.press("ArrowRight")
    assert page.locator("#card").inner_text() != first
    page.keyboard.press("ArrowDown")
    bars = page.evaluate("[...document.querySelectorAll('.bar')].indexOf(document.activeElement.closest('.bar'))")
    assert bars == 2
    page.keyboard.press("Escape")
    assert page.locator("#card").is_hidden()
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('.row:target') !== null")


def test_pointing_at_a_block_shows_its_details(opened):
    page = opened()
    page.locator(".bar a").first.hover()
    assert page.locator("#card").is_visible()


def test_a_plan_prints_on_one_page(opened):
    printed = opened().pdf(prefer_css_page_size=True)
    assert printed.count(b"/Type /Page\n") == 4  # two plans, what is different, and the receipt
