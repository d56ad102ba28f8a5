"""The page at ``/`` in a real browser before the real server: keys alone, growth, cancelling, errors, names."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from xdit_compile.serving.http.settings import Settings

from .test_http import Ranks, served
from .test_serve import Server, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; apt-get install chromium"),
    pytest.mark.skipif(DRIVER is None, reason="no chromedriver here; apt-get install chromium-driver"),
]
STEPS = 8
LONG = 500
"""Steps of a request that is given up."""
CONTROLS = "a[href], button, input, select, textarea, video, progress"
WATCH = """
window.seen = {pictures: [], steps: [], said: []};
const bar = document.getElementById("progress"), picture = document.getElementById("picture");
new MutationObserver(() => {
  const {pictures, steps, said} = window.seen, text = document.getElementById("status").textContent;
  if (!picture.hidden && pictures.at(-1) !== picture.src) pictures.push(picture.src);
  if (steps.at(-1) !== bar.getAttribute("aria-valuetext")) steps.push(bar.getAttribute("aria-valuetext"));
  if (said.at(-1) !== text) said.push(text);
}).observe(document.body, {subtree: true, childList: true, characterData: true, attributes: true});
"""
"""Note in the page what is shown, since a test that looks now and then would miss some of it."""


class Page:
    """The page as somebody without a mouse uses it."""

    def __init__(self, driver: Chrome, server: Server):
        self.driver, self.server = driver, server

    def open(self) -> None:
        """Load it anew, and wait until it says what is served."""
        self.driver.get(self.server.address + "/")
        self.wait(lambda: "xdit-compile/shapes" in self.one("model").text)
        self.driver.execute_script(WATCH)

    def one(self, id: str) -> WebElement:
        return self.driver.find_element(By.ID, id)

    def wait(self, holds: Any, seconds: float = 60) -> None:
        WebDriverWait(self.driver, seconds, 0.05).until(lambda _: holds())

    def press(self, *keys: str) -> None:
        """Send keys to whatever has the focus."""
        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def press_with_control(self, key: str) -> None:
        """The same while Ctrl is held."""
        chain = ActionChains(self.driver, duration=0)
        chain.key_down(Keys.CONTROL).send_keys(key).key_up(Keys.CONTROL).perform()

    @property
    def focus(self) -> str:
        """The id of what has the focus."""
        return self.driver.switch_to.active_element.get_attribute("id") or ""

    def tab_to(self, id: str) -> None:
        """Press Tab until an element has the focus."""
        for _ in range(40):
            if self.focus == id:
                return
            self.press(Keys.TAB)
        raise AssertionError(f"Tab does not reach {id}")

    def fill(self, **texts: str) -> None:
        """Go on with Tab and type into fields, in the order they have on the page."""
        for id, text in texts.items():
            self.tab_to(id)
            self.press(text)

    def wait_for(self, status: str) -> None:
        self.wait(lambda: self.one("status").text == status)

    def seen(self, what: str) -> list[str]:
        values: list[str] = self.driver.execute_script(f"return window.seen.{what}")
        return values

    def gallery(self) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, "#gallery > li")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("page"), "--nproc", "1", "--max_batch", "2") as one:
        yield one


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    assert CHROMIUM is not None
    options.binary_location = CHROMIUM
    folder = tmp_path_factory.mktemp("chromium")
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-proxy-server", "--window-size=1200,1000",
        "--disable-background-networking", f"--user-data-dir={folder}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with Chrome(options, Service(DRIVER)) as driver:
        yield driver


@pytest.fixture
def page(driver: Chrome, server: Server) -> Iterator[Page]:
    """The page, freshly loaded; at the end it has to have been content with its own server, and without errors."""
    for log in ("browser", "performance"):
        driver.get_log(log)
    page = Page(driver, server)
    page.open()
    yield page
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    assert f"{server.address}/" in urls
    assert [url[:200] for url in urls if not url.startswith((f"{server.address}/", "data:"))] == []
    entries = driver.get_log("browser")
    refusals = [entry for entry in entries if entry["source"] == "network" and "status of 400" in entry["message"]]
    assert [entry for entry in entries if entry not in refusals] == []


def _pixels(url: str) -> np.ndarray:
    start, data = url.split(",", 1)
    assert start == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def test_keys_alone_make_a_picture_that_grows(page: Page, server: Server) -> None:
    page.fill(prompt="a red circle", steps=str(STEPS), seed="7")
    page.tab_to("make")
    page.press(Keys.ENTER)
    page.wait_for("Done.")
    assert page.seen("steps")[-1] == f"{STEPS} of {STEPS} steps"
    assert {f"{step} of {STEPS} steps" for step in range(1, STEPS)} <= set(page.seen("steps"))
    assert {f"Step {step} of {STEPS}." for step in (2, 4, 6)} <= set(page.seen("said"))

    pictures = [_pixels(url) for url in page.seen("pictures")]
    assert len(pictures) == STEPS
    distances = [np.abs(picture - pictures[-1]).mean() for picture in pictures]
    assert all(later < earlier for earlier, later in zip(distances[1:], distances[2:], strict=False)), distances
    expected = server.picture(prompt="a red circle", num_inference_steps=STEPS, seed=7)
    np.testing.assert_array_equal(pictures[-1], expected)

    picture = page.one("picture")
    assert picture.is_displayed() and picture.accessible_name == "a red circle, seed 7"
    assert page.driver.execute_script("return arguments[0].naturalWidth", picture) == expected.shape[1]
    assert page.focus == "make"
    assert page.one("problem").text == "" and "s at work" in page.one("timings").text

    (item,) = page.gallery()
    (image,) = item.find_elements(By.TAG_NAME, "img")
    np.testing.assert_array_equal(_pixels(str(image.get_property("src"))), expected)
    assert not page.one("empty").is_displayed()


def test_pictures_stay_beside_one_another(page: Page) -> None:
    page.fill(prompt="a blue square", steps="4", seed="3")
    page.tab_to("grow")
    page.press(Keys.SPACE, Keys.ENTER)
    page.wait_for("Done.")
    assert len(page.seen("pictures")) == 1
    while page.focus != "prompt":
        page.driver.switch_to.active_element.send_keys(Keys.SHIFT, Keys.TAB)
    page.press_with_control("a")
    page.press("a green star")
    page.press_with_control(Keys.ENTER)
    page.wait(lambda: len(page.gallery()) == 2)
    page.wait_for("Done.")
    first, second = (item.rect for item in reversed(page.gallery()))
    assert first["y"] == second["y"] and first["x"] != second["x"]
    words = ["a green star, seed 3", "a blue square, seed 3"]
    assert [item.find_element(By.TAG_NAME, "p").text for item in page.gallery()] == words

    page.tab_to("make")
    page.press(*[Keys.TAB] * (1 + len(page.gallery()[0].find_elements(By.CSS_SELECTOR, "a, button"))))
    assert page.driver.switch_to.active_element.accessible_name == f"Show: {words[1]}"
    page.press(Keys.ENTER)
    assert page.one("picture").accessible_name == words[1] and page.focus == "picture"
    page.gallery()[1].find_element(By.CSS_SELECTOR, "button.small").send_keys(Keys.ENTER)
    assert page.one("prompt").get_property("value") == "a blue square" and page.focus == "prompt"


def test_cancel_ends_it_on_the_server_too(page: Page, server: Server) -> None:
    page.fill(prompt="a red circle", steps=str(LONG))
    page.tab_to("make")
    page.press(Keys.ENTER)
    page.wait(lambda: len(page.seen("pictures")) > 1)
    assert json.loads(server.get("/v1/status")[1])["running"][0]["steps"] == LONG
    page.press(Keys.TAB)
    assert page.focus == "cancel"
    page.press(Keys.ENTER)
    page.wait_for("Cancelled.")
    page.wait(lambda: json.loads(server.get("/v1/status")[1])["running"] == [], 20)
    assert page.focus == "make" and page.one("make").is_enabled() and not page.one("cancel").is_enabled()
    assert page.one("problem").text == "" and page.gallery() == []
    assert not page.one("picture").is_displayed()
    assert page.one("progress").get_property("value") == 0


@pytest.mark.parametrize("width, height", [(99999, 64), (251, 256), (64, None)], ids=["large", "odd", "half"])
def test_a_wrong_size_is_said_aloud(page: Page, server: Server, width: int, height: int | None) -> None:
    size = {"width": width, **({"height": height} if height else {})}
    status, answer = server.send(**size)
    assert status == 400
    page.fill(prompt="a red circle", **{id: str(pixels) for id, pixels in size.items()}, steps="6")
    page.press(Keys.ENTER)
    page.wait_for("Failed.")
    problem = page.one("problem")
    assert problem.text == answer["error"]["message"]
    assert problem.is_displayed() and problem.aria_role == "alert"
    assert page.gallery() == [] and page.one("make").is_enabled()


def test_what_is_no_number_is_not_left_out_in_silence(page: Page) -> None:
    page.fill(prompt="a red circle", steps="1e")
    page.press(Keys.ENTER)
    page.wait(lambda: page.one("problem").text != "")
    assert "Steps" in page.one("problem").text and page.focus == "steps"
    assert page.one("steps").get_attribute("aria-invalid") == "true"


def test_an_empty_prompt_is_said_aloud(page: Page) -> None:
    page.tab_to("make")
    page.press(Keys.ENTER)
    assert "prompt" in page.one("problem").text and page.focus == "prompt"


def test_everything_has_a_name(page: Page) -> None:
    page.fill(prompt="a red circle", steps="2", seed="1")
    page.press(Keys.ENTER)
    page.wait_for("Done.")
    controls = [each for each in page.driver.find_elements(By.CSS_SELECTOR, CONTROLS) if each.is_displayed()]
    named = [(each.aria_role, each.accessible_name.strip()) for each in controls]
    assert len(set(named)) == len(named)
    numbers = ("Width, pixels", "Height, pixels", "Steps", "Guidance", "Seed", "How many")
    assert set(named) == {
        ("link", "API"), ("textbox", "Prompt"), ("textbox", "Not to be seen"),
        *(("spinbutton", each) for each in numbers),
        ("checkbox", "Show the picture while it grows"), ("textbox", "API key, where the server wants one"),
        ("button", "Make"), ("button", "Cancel"), ("progressbar", "Steps that are done"),
        *(("button", f"{verb}: a red circle, seed 1") for verb in ("Show", "Use again")),
        ("link", "Save: a red circle, seed 1"),
    }  # fmt: skip
    regions = [each.accessible_name for each in page.driver.find_elements(By.TAG_NAME, "section")]
    assert all(regions) and len(set(regions)) == len(regions)
    assert page.one("status").aria_role == "status" and page.one("status").get_attribute("aria-live") == "polite"


def test_a_narrow_window_scrolls_one_way_only(page: Page) -> None:
    metrics = {"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert page.driver.execute_script("return innerWidth") == 320
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 320
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_documentation_is_used_with_a_key(driver: Chrome) -> None:
    """Swagger UI shows every field, takes the key, and sends it; the browser refuses none of it."""

    def click(*labels: str) -> None:
        for label in labels:
            WebDriverWait(driver, 30).until(lambda _, label=label: driver.find_elements(By.CSS_SELECTOR, label))
            driver.execute_script("arguments[0].click()", driver.find_element(By.CSS_SELECTOR, label))

    with served(Ranks(), Settings(api_key="sesame")) as server:
        driver.get_log("browser")
        driver.get(f"http://127.0.0.1:{server.port}/docs")
        click("button.authorize")
        WebDriverWait(driver, 30).until(lambda _: driver.find_elements(By.CSS_SELECTOR, ".auth-container input"))
        driver.find_element(By.CSS_SELECTOR, ".auth-container input").send_keys("sesame")
        click(".auth-btn-wrapper .authorize", ".btn-done")
        models = "[id*=models-models]"
        click(f"{models} .opblock-summary-control", f"{models} .try-out__btn", f"{models} .execute")
        status = f"{models} .live-responses-table .response-col_status"
        WebDriverWait(driver, 30).until(
            lambda _: "200" in [each.text for each in driver.find_elements(By.CSS_SELECTOR, status)]
        )
        assert '"tiny"' in driver.find_element(By.CSS_SELECTOR, f"{models} .live-responses-table").text
        assert [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize("makes", ["images", "videos"])
def test_a_key_and_several_at_once(driver: Chrome, makes: str) -> None:
    """With a key in its field the page makes pictures, several at once, and videos; without it says what is wrong."""
    with served(Ranks(makes=makes), Settings(api_key="sesame")) as server:
        driver.get(f"http://127.0.0.1:{server.port}/")
        page = Page(driver, server)
        page.fill(prompt="a red circle", steps="3")
        page.press(Keys.ENTER)
        page.wait(lambda: "key" in page.one("problem").text)
        page.one("key").send_keys("sesame", Keys.TAB)
        page.wait(lambda: "tiny" in page.one("model").text)
        if makes == "images":
            page.one("number").clear()
            page.one("number").send_keys("2")
        page.one("make").send_keys(Keys.ENTER)
        page.wait_for("Done: 2 pictures." if makes == "images" else "Done.")
        shown = "#gallery img" if makes == "images" else "#gallery video"
        assert len(driver.find_elements(By.CSS_SELECTOR, shown)) == (2 if makes == "images" else 1)
        if makes == "videos":
            page.wait(lambda: page.one("film").get_property("videoWidth") == 24)
            assert not page.one("number").is_displayed()
