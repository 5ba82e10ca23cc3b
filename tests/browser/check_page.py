"""The page of `hf-unigd serve`, driven in Debian's chromium: `make browser`."""

import os
import re
import shutil
import time
from contextlib import contextmanager

import pytest
from PIL import Image
from playwright.sync_api import Error, expect, sync_playwright

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.retrieval import build_index
from index_cases import IMAGES, knowledge
from serving_cases import serving
from tiny_models import make_vlm


PHONE = {"width": 360, "height": 740}
EVIL = "<img src=x onerror='window.broken = 1'> ${window.broken = 1}"


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium")
    assert program, "chromium is missing; `make browser` installs it"
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # of which chromium has none for root
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program, args=arguments)


@pytest.fixture(scope="module")
def pair():
    tiny = make_vlm()
    return UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)


@pytest.fixture(scope="module")
def index(pair, tmp_path_factory):
    rows = knowledge().add_item({"images": [], "messages": [{"role": "user", "content": EVIL}]})
    return build_index(*pair, rows, tmp_path_factory.mktemp("i") / "index", model_name="m", show_progress=False)


@pytest.fixture(scope="module")
def server(pair, index):
    with serving(*pair, index, page=True) as running:
        yield running


@contextmanager
def opened(browser, address, **settings):
    """The page on a phone. It loads nothing from elsewhere, and no script of it fails."""
    context = browser.new_context(viewport=PHONE, **settings)
    page, loaded, failures = context.new_page(), [], []
    page.on("request", lambda request: loaded.append(request.url))
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto(address)
    expect(page.get_by_role("tab", name="Search")).to_be_visible(timeout=30_000)
    yield page
    width = page.evaluate("document.documentElement.scrollWidth")
    context.close()
    assert [url for url in loaded if not url.startswith((address, "data:", "blob:"))] == []
    assert failures == []
    assert width <= PHONE["width"]


@pytest.fixture
def page(browser, server):
    with opened(browser, server.address) as page:
        yield page


@pytest.fixture
def picture(tmp_path):
    IMAGES[1].save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def open_tab(page, name):
    page.get_by_role("tab", name=name).click()
    return page.get_by_role("tabpanel").filter(visible=True)


def upload(panel, file, box=0):
    """Uploads a file, and waits until it is shown."""
    panel.locator("input[type=file]").nth(box).set_input_files(file)
    expect(panel.get_by_label("Remove")).to_have_count(1)


def press(panel, name):
    panel.get_by_role("button", name=name, exact=True).click()


def hits(panel):
    """The ids of the entries that are shown."""
    expect(panel.locator(".unigd-entries")).to_be_visible()
    return panel.locator(".unigd-entries small").all_inner_texts()


def problem(panel):
    shown = panel.get_by_role("alert")
    expect(shown).to_be_visible()
    return shown.inner_text()


def test_it_says_in_one_line_what_it_is(page):
    expect(page.get_by_text("tiny: one vision-language model that finds pictures and texts")).to_be_visible()


def test_a_text_finds_entries_with_scores_and_pictures(page, server):
    panel = open_tab(page, "Search")
    panel.get_by_role("textbox").fill("two blue dogs")
    press(panel, "Search")
    found = hits(panel)
    body = {"query": "two blue dogs", "k": 12}
    wanted = server.client().post("/search", body=body, cast_to=object)["data"]
    assert found == [entry["id"] for entry in wanted] and found[0] == "rows/4"
    scores = panel.locator(".unigd-score").all_inner_texts()
    assert scores == [f"{entry['score']:.3f}" for entry in wanted]
    widths = panel.locator(".unigd-entries img").evaluate_all("all => all.map(each => each.naturalWidth)")
    assert len(widths) == 4 and min(widths) > 0
    # The text of an entry is a text.
    assert any(EVIL in text for text in panel.locator("figcaption").all_inner_texts())
    assert page.evaluate("window.broken") is None


def test_a_picture_finds_entries_and_both_find_the_entry_of_both(page, picture):
    panel = open_tab(page, "Search")
    upload(panel, picture)
    press(panel, "Search")
    assert len(hits(panel)) == 6
    panel.get_by_role("textbox").fill("what is it")
    panel.get_by_role("textbox").press("Enter")
    expect(panel.locator(".unigd-entries small").first).to_have_text("rows/2")
    expect(panel.locator(".unigd-score").first).to_have_text("1.000")


def test_a_question_is_answered_with_the_entries_that_were_used(page):
    panel = open_tab(page, "Ask")
    panel.get_by_role("textbox").fill("two blue dogs")
    press(panel, "Ask")
    expect(panel.locator(".unigd-answer")).to_be_visible()
    assert hits(panel)[0] == "rows/4"


def test_two_sequences_are_aligned(page, picture):
    panel = open_tab(page, "Align")
    panel.get_by_role("textbox").nth(0).fill("A red cat. Two dogs.")
    panel.get_by_role("textbox").nth(1).fill("Two blue dogs.")
    upload(panel, picture, 1)
    press(panel, "Align")
    figure = panel.get_by_alt_text("Heat map of the alignment")
    expect(figure).to_be_visible()
    assert figure.evaluate("each => each.naturalWidth") > 100
    assert re.fullmatch(r"[01]\.\d{3}", panel.locator(".unigd-score").inner_text())


def test_the_likeliest_tokens_are_listed(page):
    panel = open_tab(page, "Inside")
    panel.get_by_role("textbox").fill("a red cat")
    press(panel, "Look")
    expect(panel.locator(".unigd-tokens tr")).to_have_count(10)


def test_nothing_is_looked_for_without_a_query(page):
    panel = open_tab(page, "Search")
    press(panel, "Search")
    assert problem(panel).startswith("Nothing to look for yet")


def test_what_is_no_picture_is_told(page, tmp_path):
    (tmp_path / "no.png").write_text("no picture")
    panel = open_tab(page, "Search")
    upload(panel, tmp_path / "no.png")
    press(panel, "Search")
    assert "a corrupt image: cannot identify the format" in problem(panel)


def test_a_huge_picture_is_told(page, tmp_path):
    Image.new("1", (10_000, 6_000)).save(tmp_path / "huge.png")
    panel = open_tab(page, "Search")
    upload(panel, tmp_path / "huge.png")
    press(panel, "Search")
    assert "10000 x 6000 pixels" in problem(panel)


def test_a_file_that_is_too_long_is_told(browser, pair, tmp_path):
    (tmp_path / "long.png").write_bytes(bytes(600_000))
    with serving(*pair, page=True, max_body_mb=1) as running, opened(browser, running.address) as page:
        panel = open_tab(page, "Inside")
        panel.locator("input[type=file]").set_input_files(tmp_path / "long.png")
        expect(page.get_by_text("exceed the maximum allowed size")).to_be_visible()


def test_without_an_index_it_says_what_is_missing_and_the_rest_works(browser, pair):
    with serving(*pair, page=True) as running, opened(browser, running.address) as page:
        for tab in ("Search", "Ask"):
            expect(open_tab(page, tab).get_by_text("This server has no index")).to_be_visible()
        panel = open_tab(page, "Inside")
        panel.get_by_role("textbox").fill("a red cat")
        press(panel, "Look")
        expect(panel.locator(".unigd-tokens tr")).to_have_count(10)


def test_a_browser_sends_the_key_as_a_password(browser, pair, index):
    with serving(*pair, index, page=True, api_key="secret") as running:
        context = browser.new_context()
        with pytest.raises(Error, match="INVALID_AUTH_CREDENTIALS"):
            context.new_page().goto(running.address)
        context.close()
        password = {"username": "anybody", "password": "secret"}
        with opened(browser, running.address, http_credentials=password) as page:
            panel = open_tab(page, "Search")
            panel.get_by_role("textbox").fill("two blue dogs")
            press(panel, "Search")
            assert hits(panel)[0] == "rows/4"


def test_an_open_page_does_not_keep_the_server_from_ending(browser, pair):
    context = browser.new_context()
    with serving(*pair, page=True) as running:
        page = context.new_page()
        page.goto(running.address)
        expect(page.get_by_role("tab", name="Inside")).to_be_visible()
        ends = time.monotonic()
    assert time.monotonic() - ends < 10
    context.close()
