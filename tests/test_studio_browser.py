"""The studio as somebody clicks through it, in a headless Chromium that reaches no network."""

from __future__ import annotations

import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("gradio", reason="needs gradio: pip install 'sfumato[studio]'")
pytest.importorskip("selenium", reason="needs selenium")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER or not DRIVER, reason="needs Chromium and chromedriver"),
]
HOSTILE = 'a red star <img src=x onerror="document.title=1"> \u202eevil'
LONG = 300.0


class Page:
    """What a person does: look, type, click, wait."""

    def __init__(self, driver: Any, url: str):
        self.driver = driver
        driver.get(url)

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements("css selector", css)

    def until(self, true: Callable[[], Any], what: str, seconds: float = LONG) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException

        start = time.monotonic()
        while time.monotonic() - start < seconds:
            try:
                if found := true():
                    return found
            except StaleElementReferenceException:
                pass
            time.sleep(0.2)
        raise AssertionError(f"waited {seconds:.0f} s for {what}; the page says: {self.text('body')[:2000]}")

    def seen(self, css: str) -> Any:
        return self.until(lambda: next((e for e in self.all(css) if e.is_displayed()), None), css)

    def text(self, css: str) -> str:
        return " ".join(e.text for e in self.all(css))

    def click(self, css: str) -> None:
        element = self.seen(css)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def tab(self, name: str) -> None:
        self.until(lambda: [e for e in self.all("button[role=tab]") if e.text == name], f"the tab {name}")
        next(e for e in self.all("button[role=tab]") if e.text == name).click()

    def type(self, elem_id: str, words: str) -> None:
        from selenium.webdriver.common.keys import Keys

        field = self.seen(f"#{elem_id} textarea, #{elem_id} input")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE)
        if words:
            self.driver.execute_script(  # ChromeDriver types no control characters
                "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
                field, words,
            )  # fmt: skip

    def over(self, kind: str) -> str:
        """Wait until a tab's job has ended, and how it did."""
        css = f"#{kind}-state [data-state]:not([data-state=running]):not([data-state=waiting]), #{kind}-state .refused"
        self.seen(css)
        return self.text(css)

    def pictures(self, kind: str, step: str) -> list[tuple[str, str]]:
        """(source, alt) of the pictures of a step, all of them loaded."""
        css = f"#{kind}-result .pictures[data-step='{step}'] img"
        whole = "return [...document.querySelectorAll(arguments[0])].every(i => i.complete && i.naturalWidth > 0)"
        self.seen(css)
        self.until(lambda: self.driver.execute_script(whole, css), f"the pictures of {step}")
        return [(e.get_attribute("src"), e.get_attribute("alt")) for e in self.all(css)]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: Any) -> Iterator[tuple[str, Any]]:
    from sfumato.studio.serve import serving

    root = tmp_path_factory.mktemp("studio")
    with serving(root / "made", port=0, largest=10_000_000) as (url, _, made):
        yield url, made


@pytest.fixture(scope="module")
def page(studio: Any, tmp_path_factory: Any) -> Iterator[Page]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for word in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1360,1800",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={tmp_path_factory.mktemp('web')}",
    ):  # fmt: skip
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Page(driver, studio[0])
    finally:
        driver.quit()


def test_a_model_is_loaded(page):
    page.click("#load")
    assert "sketch is loaded" in page.over("load") and "StableDiffusionPipeline" in page.text("#load-state")


def test_pictures_are_drawn_with_their_record_and_command(page):
    page.tab("draw")
    page.type("draw-prompts", f"{HOSTILE}\na blue fish")
    page.type("draw-draw-sampling_steps", "2")
    page.click("#draw-go")
    assert "done in" in page.over("draw")
    assert len(page.pictures("draw", "drawn")) == 2
    shown = page.text("#draw-result figcaption")
    assert "onerror" in shown and "\\u202e" in shown and "\u202e" not in shown
    assert page.driver.title == "sfumato studio" and not page.all("#draw-result img[src=x]")
    page.click("#draw-result figure:last-child summary")
    record = page.text("#draw-result figure:last-child details")
    assert "a blue fish" in record and "sampling_steps" in record
    assert "sfumato sample 'a blue fish'" in record and "--seeds 0" in record
    page.click("#draw-result figure:last-child button.copy")
    page.until(lambda: "copied" in page.text("#draw-result figure:last-child button.copy"), "copied", 5)


def test_a_patch_steers_beside_the_plain_model(page):
    page.tab("steer")
    page.click("#steer-method input")
    option = lambda: [e for e in page.all("[role=option]") if e.text.strip().endswith("decor") and e.is_displayed()]
    page.until(option, "decor among the methods")[0].click()
    page.type("steer-decor-undesired", "fish")
    page.type("steer-draw-sampling_steps", "2")
    page.click("#steer-go")
    assert "done in" in page.over("steer")
    assert len(page.pictures("steer", "without")) == len(page.pictures("steer", "with decor")) == 1
    assert "--undesired fish" in page.text("#steer-result .again")


def test_erasing_is_watched_on_the_same_seeds(page, studio):
    page.tab("erase")
    page.type("erase-uce-concepts", "unheard-of")
    page.click("#erase-go")
    page.until(lambda: "unknown concept" in page.text("#erase-state"), "a refusal")
    page.type("erase-uce-concepts", "star")
    page.type("erase-draw-sampling_steps", "2")
    page.click("#erase-go")
    page.until(lambda: "done in" in page.text("#erase-state"), "the end of the erasure")
    before, after = page.pictures("erase", "before"), page.pictures("erase", "after")
    assert [alt for _, alt in before] == [alt for _, alt in after] == ["a red star", "a blue fish"]
    assert studio[1].jobs.all[-1].steps[1].out.is_dir()


def test_an_audit_moves_and_shows_its_report(page, studio):
    erased = str(studio[1].jobs.all[-1].steps[1].out)
    page.tab("audit")
    from selenium.webdriver.common.keys import Keys

    page.seen("#audit-after input").send_keys(erased, Keys.ENTER)
    values = {"concepts": "star", "n": "2", "n_retain": "1", "attacks": "", "sampling_steps": "2"}
    page.seen("#audit-go")
    time.sleep(2)  # the form is made anew when the model is another
    for name, value in values.items():
        page.type(f"audit-{name}", value)
    page.click("#audit-go")
    page.until(lambda: " of " in page.text("#audit-state"), "progress")
    assert "done in" in page.over("audit"), page.text("#audit-state")
    page.driver.switch_to.frame(page.seen("#audit-result iframe"))
    page.until(lambda: "star" in page.text("h1"), "the report")
    page.driver.switch_to.default_content()
    page.tab("reports")
    page.seen("#report-first input").send_keys(str(studio[1].jobs.all[-1].steps[0].out), Keys.ENTER)
    page.click("#report-open")
    page.seen("#compare-result iframe")


def test_two_reports_are_compared(page, studio):
    audit = next(job for job in reversed(studio[1].jobs.all) if job.kind == "audit")
    from selenium.webdriver.common.keys import Keys

    page.tab("reports")
    report = str(audit.steps[0].out)
    page.click("#compare-go")
    page.until(lambda: page.all("#compare-state .refused"), "a refusal: nothing stands beside it")
    page.seen("#report-second input").send_keys(report, Keys.ENTER)
    page.click("#compare-go")
    page.until(lambda: "done in" in page.text("#compare-state"), "the end of the comparison")
    page.driver.switch_to.frame(page.seen("#compare-result iframe"))
    page.until(lambda: "star" in page.text("body"), "the page of both")
    page.driver.switch_to.default_content()


def test_an_erased_model_is_attacked(page, studio):
    from selenium.webdriver.common.keys import Keys

    erased = next(job for job in reversed(studio[1].jobs.all) if job.kind == "erase").steps[1].out
    page.tab("attack")
    page.seen("#attack-model input").send_keys(str(erased), Keys.ENTER)
    page.click("#attack-method input")
    named = lambda e: e.text.strip().endswith("paraphrase") and e.is_displayed()
    page.until(lambda: list(filter(named, page.all("[role=option]"))), "paraphrase among the methods")[0].click()
    page.seen("#attack-go")
    time.sleep(2)  # the form is made anew when the method is another
    page.type("attack-given-concept", "unheard-of")
    page.type("attack-given-original", "sketch")
    page.type("attack-given-n", "2")
    page.click("#attack-go")
    page.until(lambda: "unheard-of" in page.text("#attack-state"), "a refusal")
    page.type("attack-given-concept", "star")
    page.click("#attack-go")
    page.until(lambda: "done in" in page.text("#attack-state"), "the end of the attack")
    assert page.all("#attack-result img") or page.all("#attack-result iframe")


def test_a_job_is_cancelled(page, studio):
    page.tab("draw")
    page.type("draw-prompts", "a red star")
    page.type("draw-draw-seeds", "0-400")
    page.type("draw-draw-sampling_steps", "50")
    page.click("#draw-go")
    page.until(lambda: page.all("#draw-state [data-state=running]"), "the job")
    page.click("#draw-cancel")
    assert "cancelled" in page.over("draw")
    assert not list(studio[1].jobs.all[-1].folder.glob("*pictures*"))


def test_a_pickle_is_refused_at_the_door(page, studio, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(pickle.dumps({"a": 1}, protocol=4))
    page.driver.find_element("css selector", "input[type=file]").send_keys(str(file))
    page.until(lambda: "pickle" in page.text("#load-state"), "a refusal")
    assert not (studio[1].root / "uploads").exists()


def test_the_ledger_is_there_and_nothing_was_fetched(page, studio):
    page.tab("ledger")
    assert "reproduced" in page.seen("#ledger table").text
    used = page.driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert used and all(name.startswith((studio[0], "blob:", "data:")) for name in used)
    told = [entry["message"] for entry in page.driver.get_log("browser")]
    assert not [line for line in told if "Content Security Policy" in line or "ERR_NAME_NOT_RESOLVED" in line]
