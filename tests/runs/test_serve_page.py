"""The page of ``g2r serve`` in a real headless Chromium: it is used by keyboard, and hostile texts stay texts.

The machine's own Chromium is driven by playwright; without one the tests are skipped. Leaves out how it looks.
"""

import json
import shutil

import pytest

from service import Service

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
HOSTILE = "<img src=x onerror=window.acted=1><script>window.acted=1</script>\u202e"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    running = Service(tmp_path_factory.mktemp("page"), "--judge.max_length", "400")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser(service):
    url = service.url()
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield lambda width: chromium.new_page(viewport={"width": width, "height": 900}, base_url=url)
        chromium.close()


def opened(browser, width: int = 1400):
    """A page, and what goes wrong on it: console errors, exceptions, requests to other hosts."""
    page, problems = browser(width), []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto("/")
    page.wait_for_selector("#attribution option", state="attached")
    return page, problems


@pytest.mark.parametrize("width", [390, 1400])
def test_judge_switch_and_hide_by_keyboard(browser, width):
    """An example is judged; the first criterion's credit is shown; a hidden sentence changes the margins. No sideways scroll."""
    page, problems = opened(browser, width)
    page.select_option("#example", label="A tired patient")
    page.focus("#judge")
    page.keyboard.press("Enter")
    page.wait_for_selector("#verdicts tr:nth-child(2)")
    assert page.text_content("#text") == page.input_value("#response")
    assert page.locator("#verdicts tr").count() == 4
    before = page.locator("#text .sentence span").evaluate_all("all => all.map(one => one.style.backgroundColor)")
    page.focus("#view-all")
    page.keyboard.press("ArrowDown")
    after = page.locator("#text .sentence span").evaluate_all("all => all.map(one => one.style.backgroundColor)")
    assert page.is_checked("#view-0") and before != after and len({*before}) > 1
    page.focus(".sentence")
    page.keyboard.press("Enter")
    expect(page.locator("#verdicts tr:nth-child(2) td:last-child")).to_contain_text("sentence 1: ")
    assert page.get_attribute(".sentence >> nth=0", "aria-pressed") == "true"
    assert page.evaluate("document.activeElement.dataset.sentence") == "0"
    page.select_option("#attribution", "occlusion")
    expect(page.locator(".sentence").first).to_have_attribute("aria-pressed", "false")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not problems


def test_hostile_texts_stay_texts(browser):
    """Markup in every field is shown as it is, direction characters as a mark; the policy blocks what a page could inject."""
    page, problems = opened(browser)
    page.fill("#prompt", HOSTILE)
    page.fill("#response", "try. " + HOSTILE)
    page.fill(".criterion", HOSTILE)
    page.click("#judge")
    page.wait_for_selector("#verdicts tr:nth-child(2)")
    assert page.text_content("#text") == "try. " + HOSTILE.replace("\u202e", "\u2423")
    assert HOSTILE.replace("\u202e", "\u2423") in page.text_content("#verdicts")
    assert page.locator("#result img, #result script").count() == 0
    page.fill("#response", "rest. " * 300)
    page.click("#judge")
    expect(page.locator("#problem")).to_contain_text("max_length")
    assert not [problem for problem in problems if "422" not in problem]
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.acted = 1'}))"
    )
    assert page.evaluate("window.acted") is None
    assert problems and any("Content Security Policy" in problem for problem in problems)


def test_the_api_page_lists_the_routes(browser):
    page = browser(1400)
    page.goto("/docs")
    page.wait_for_selector("#routes dt")
    routes = page.locator("#routes dt").all_text_contents()
    assert {"POST /v1/credit", "POST /v1/score", "GET /healthz"} <= {*routes}
    assert json.loads(page.request.get("/openapi.json").text())["openapi"].startswith("3.")
