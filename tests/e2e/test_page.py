"""The page for looking, in a real Chromium: it shows what happens, and the console stays clean."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from tests.browser import TIMEOUT, Window, chromium
from tests.processes import Gateway, Simulator, eventually, free_port

KEY, ADMIN, WRONG = "inference-key-0123456789", "admin-key-0123456789abc", "wrong-key-0123456789abc"
MODEL, BIG = "qwen2-1.5b-instruct", "llama-3.3-70b-instruct"
CHAT = "/v1/chat/completions"


class Page(Window):
    """The browser, and one gateway's page in it."""

    def __init__(self, driver: webdriver.Chrome, gateway: Gateway) -> None:
        super().__init__(driver, gateway.url)
        self.gateway = gateway

    def open_live(self, key: str = ADMIN) -> None:
        self.open(key)
        self.see("#connection", "Live")

    def gone(self, selector: str, words: str) -> None:
        """Wait until no such element shows these words any more."""
        eventually(lambda: not any(words in one for one in self.texts(selector)), TIMEOUT)

    def press(self, selector: str) -> None:
        """With the keyboard, for which everything can be reached."""
        self.driver.find_element(By.CSS_SELECTOR, selector).send_keys(Keys.ENTER)

    def field(self, name: str) -> Any:
        return self.driver.find_element(By.ID, name)

    def events(self) -> list[str]:
        return self.texts("#log-rows li")

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})

    def complaints(self) -> list[str]:
        """What the browser's console has said; refused and broken fetches are the page's own
        business, which it tells in words."""
        entries = self.driver.get_log("browser")
        return [str(entry) for entry in entries if entry["source"] != "network"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chrome = chromium(tmp_path_factory.mktemp("chromium"))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def shared_guarded(
    shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("guarded")
    keys = {"GATEWAY_API_KEY": f"app:{KEY}", "GATEWAY_ADMIN_KEY": f"ops:{ADMIN}"}
    gateway = Gateway(folder, shared_simulator.url, WEB_CONCURRENCY=1, **keys)
    yield gateway
    gateway.stop()


@pytest.fixture
def guarded(shared_guarded: Gateway, simulator: Simulator) -> Gateway:
    """The module's gateway with keys; nothing is loaded or active."""
    admin(shared_guarded, "deactivate")
    return shared_guarded


@pytest.fixture
def page(driver: webdriver.Chrome, guarded: Gateway) -> Iterator[Page]:
    """The guarded gateway's page, not opened yet. At the end the console must be clean."""
    opened = Page(driver, guarded)
    opened.complaints()
    yield opened
    told = opened.complaints()
    opened.resize(1360, 1000)
    driver.execute_script("sessionStorage.clear()")
    driver.get("about:blank")
    assert told == []


def admin(gateway: Gateway, action: str, **body: Any) -> requests.Response:
    headers = {"X-API-Key": ADMIN}
    url = f"{gateway.url}/admin/models/{action}"
    return requests.post(url, json=body, headers=headers, timeout=60)


def loaded(gateway: Gateway) -> dict[str, dict[str, Any]]:
    """The loaded models by their instance ids."""
    answer = requests.get(
        f"{gateway.url}/admin/models", headers={"X-API-Key": ADMIN}, timeout=60
    ).json()
    return {model["identifier"]: model for model in answer["loaded"]}


def chat(
    gateway: Gateway, request_id: str, count: int = 3, model: str = MODEL
) -> requests.Response:
    """A stream, opened but not read."""
    body = {
        "model": model,
        "stream": True,
        "messages": [{"role": "user", "content": f"count to {count}"}],
    }
    headers = {"X-API-Key": KEY, "X-Request-Id": request_id, "X-Simulator-Pace-Ms": "50"}
    return requests.post(gateway.url + CHAT, json=body, headers=headers, stream=True, timeout=60)


@contextmanager
def meanwhile(work: Callable[[], Any]) -> Iterator[None]:
    """Do something in a thread, and wait for its end."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join(60)


# What the browser gets


def test_the_page_comes_without_a_key_and_allows_the_browser_nothing_else(guarded: Gateway) -> None:
    answer = guarded.get("/debug/")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    policy = dict(
        rule.split(" ", 1) for rule in answer.headers["Content-Security-Policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for name in ("base-uri", "form-action", "frame-ancestors"):
        assert policy[name] == "'none'"
    for name in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy[name])
    # nothing of it comes from elsewhere, and no markup is made of text
    markup = re.sub(r"(?s)<(script|style).*?</\1>", "", answer.text)
    assert not re.search(r'(?i) (src|srcset|action|style|on\w+)=|href="(?!data:)', markup)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write", answer.text)


def test_debug_without_its_slash_leads_to_the_page_wherever_it_is(guarded: Gateway) -> None:
    answer = guarded.get("/debug", allow_redirects=False)
    assert (answer.status_code, answer.headers["Location"]) == (308, "debug/")
    head = requests.head(guarded.url + "/debug/", timeout=30)
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/debug/"), ("OPTIONS", "/debug/"), ("GET", "//debug/"), ("GET", "/debug//")]
    + [("GET", path) for path in ("/debug/status", "/debug/stream", "/debug/metrics", "/debug/x")],
)
def test_only_the_page_itself_comes_without_a_key(guarded: Gateway, method: str, path: str) -> None:
    answer = requests.request(method, guarded.url + path, timeout=30)
    assert answer.status_code == 401


def test_the_allowlist_holds_for_the_page(launch: Callable[..., Gateway]) -> None:
    gateway = launch(IP_ALLOWLIST="10.1.2.3", WEB_CONCURRENCY=1)
    assert gateway.get("/debug/").status_code == 403


# Keys


def test_a_wrong_key_is_told_and_the_right_one_shows_the_models(page: Page) -> None:
    admin(page.gateway, "load", modelKey=MODEL, loadConfig={"contextLength": 2048}, ttlSeconds=5400)
    page.open(WRONG)
    page.see("#sign-in-problem", "not accepted")
    page.enter_key("clé")
    page.see("#sign-in-problem", "no special letters")
    page.enter_key(ADMIN)
    page.see("#connection", "Live")
    page.see("#lmstudio", "LM Studio is there")
    shown = page.see("#models > li", MODEL)
    assert "context 2,048" in shown
    assert "unloads after 1 h 30 min idle" in shown
    assert "active" in shown
    assert page.driver.current_url == page.gateway.url + "/debug/"


def test_the_key_lasts_as_long_as_its_tab_and_can_be_forgotten(page: Page) -> None:
    page.open_live()
    page.open()
    page.see("#connection", "Live")
    stored = page.driver.execute_script("return [localStorage.length, document.cookie]")
    assert stored == [0, ""]
    page.press("#forget")
    page.see("#sign-in", "Your key, please")
    page.open()
    page.see("#sign-in", "Your key, please")
    assert page.texts("#desk") == []


def test_an_inference_key_sees_what_it_may_and_why_no_more(page: Page) -> None:
    page.open(KEY)
    page.see("#restricted-why", "This path needs an admin key.")
    page.see("#usable", MODEL)
    assert page.texts("#desk") == page.texts("#load-open") == []


def test_without_keys_it_opens_at_once(driver: webdriver.Chrome, gateway: Gateway) -> None:
    page = Page(driver, gateway)
    page.complaints()
    page.open()
    page.see("#connection", "Live")
    page.see("#models-empty", "No model is loaded.")
    assert page.texts("#forget") == page.texts("#sign-in") == []
    assert page.complaints() == []


# Models


def test_a_load_by_somebody_else_shows_its_progress(page: Page) -> None:
    page.open_live()
    with meanwhile(lambda: admin(page.gateway, "load", modelKey=BIG, instanceId="theirs")):
        page.see("#loads > li", f"Loading {BIG} as theirs", "%")
        value = "return document.querySelector('#loads progress')?.value"
        eventually(lambda: 0 < (page.driver.execute_script(value) or 0) < 100, TIMEOUT)
        assert page.texts("#loads button") == []  # it is theirs to cancel
    page.see("#models > li", "theirs", "active")
    page.gone("#loads > li", BIG)
    page.see("#log-rows li", "model_load_complete", f"{BIG} as theirs")


def test_the_page_loads_activates_and_unloads(page: Page) -> None:
    page.open_live()
    page.see("#models-empty", "No model is loaded.")
    page.press("#load-open")
    Select(page.field("load-model")).select_by_value(MODEL)
    page.see("#load-facts", "context up to 32,768")
    page.field("load-instance").send_keys("mine")
    page.field("load-context").send_keys("2048")
    Select(page.field("load-ttl")).select_by_value("300")
    Select(page.field("load-gpu")).select_by_value("part")
    page.see("#load-ratio-label", "0.5")
    page.field("load-activate").send_keys(Keys.SPACE)
    page.field("load-instance").send_keys(Keys.ENTER)
    page.see(".notice", f"{MODEL} as mine was loaded in")
    assert page.texts("#load-dialog") == []
    found = loaded(page.gateway)["mine"]
    assert (found["contextLength"], found["ttlMs"]) == (2048, 300_000)
    page.see("#log-rows li", "model_load_start", '"gpu":{"ratio":0.5}')

    page.see("#models > li", "mine", "Activate")
    page.press("[aria-label='Activate mine']")
    page.see("#models > li", "mine", "active", "Deactivate")
    page.press("[aria-label='Deactivate mine']")
    page.see("#models > li", "mine", "Activate")
    page.press("[aria-label='Unload mine']")
    page.see("#unload-text", "mine will be taken out of memory")
    page.press("#unload-go")
    page.gone("#models > li", "mine")
    assert loaded(page.gateway) == {}


def test_a_load_that_is_refused_or_fails_is_told_in_words(page: Page, simulator: Simulator) -> None:
    admin(page.gateway, "load", modelKey=MODEL, instanceId="taken")
    page.open_live()
    page.see("#models > li", "taken")
    page.press("#load-open")
    page.field("load-instance").send_keys("taken")
    page.press("#load-go")
    page.see("#load-problem", "instance taken exists")
    page.field("load-instance").send_keys("-no-more")
    simulator.faults(fail_loads="The GPU is on fire.")
    page.press("#load-go")
    # the progress has begun, which closes the dialog
    page.see(".notice.failed", "as taken-no-more: ", "The GPU is on fire.")
    page.see("#log-rows li", "model_load · ", "The GPU is on fire.")


def test_the_pages_own_load_can_be_cancelled(page: Page) -> None:
    page.open_live()
    page.see("#models-empty", "No model is loaded.")
    page.press("#load-open")
    Select(page.field("load-model")).select_by_value(BIG)
    page.press("#load-go")
    page.see("#loads button", "Cancel")
    page.press("#loads button")
    page.see(".notice", f"Loading {BIG} was cancelled")
    page.gone("#loads > li", BIG)
    assert loaded(page.gateway) == {}


def test_lm_studio_away_is_told_in_words(
    driver: webdriver.Chrome, launch: Callable[..., Gateway]
) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    page = Page(driver, launch(away, WEB_CONCURRENCY=1, SDK_RETRY_DELAY=10))
    page.open()
    page.see("#lmstudio", "LM Studio is away")
    page.see("#models-problem", "Failed to connect to LM Studio SDK after 3 attempts.")
    assert not page.field("load-open").is_enabled()


# Requests and events


def test_a_stream_is_in_flight_and_then_in_the_log(page: Page) -> None:
    page.open_live()
    with chat(page.gateway, "endless", 100_000):
        shown = page.see("#running > li", MODEL, "endless")
        assert CHAT in shown
        assert "stream" in shown
        assert "app" in shown  # the key's name
        page.see("#running > li", "endless", " s")
        page.see("#running > li", "endless", "≈ ", " tokens")
    page.see("#log-rows li", "inference_complete", "499 client left", MODEL)
    page.gone("#running > li", "endless")
    with chat(page.gateway, "short", 12) as answer:
        assert b"[DONE]" in answer.content
    page.see("#log-rows li", "inference_complete", "200 · ", "tokens · ", "tokens/s")
    page.see("#recent > li", "200", MODEL, "tokens")
    eventually(lambda: int(page.texts("#requests-now")[0]) >= 2, TIMEOUT)
    eventually(lambda: re.fullmatch(r"[\d.,]+", page.texts("#speed-now")[0]), TIMEOUT)
    assert re.search(r"\d m?s$", page.texts("#latency-now")[0])
    outline = page.driver.find_element(By.CSS_SELECTOR, "#speed-chart path").get_attribute("d")
    assert outline.startswith("M")


def test_what_others_send_is_text_and_nothing_more(page: Page) -> None:
    evil = "<img src=x onerror=alert(1)><b>"
    page.open_live()
    assert chat(page.gateway, "evil", model=evil).status_code == 400
    page.see("#log-rows li", "inference_start", evil)
    page.see("#recent > li", evil)
    inside = "return document.querySelectorAll('main img, main li b').length"
    assert page.driver.execute_script(inside) == 0


def test_events_are_filtered_by_kind_and_text(page: Page) -> None:
    page.open_live()
    admin(page.gateway, "load", modelKey=MODEL, instanceId="filtered")
    chat(page.gateway, "needle-1").close()
    chat(page.gateway, "needle-2").close()
    page.see("#log-rows li", "inference_complete")
    page.see("#log-rows li", "model_load_complete")
    assert not any("model_load_progress" in one for one in page.events())
    page.press("#chips button:nth-child(3)")
    page.see("#log-rows li", "model_load_progress")
    page.press("#chips button:nth-child(1)")
    page.gone("#log-rows li", "inference_")
    page.see("#log-rows li", "model_load_complete")
    page.press("#chips button:nth-child(1)")
    page.see("#log-rows li", "inference_start")
    page.field("filter").send_keys("NEEDLE-2")
    page.gone("#log-rows li", "model_")
    assert 1 <= len(page.events()) <= 2
    page.field("filter").send_keys("-nothing")
    page.see("#log-empty", "No event passes the filters.")


def test_an_event_opens_with_the_keyboard(page: Page) -> None:
    page.open_live()
    chat(page.gateway, "to-be-opened").close()
    page.field("filter").send_keys("to-be-opened")
    eventually(lambda: 1 <= len(page.events()) <= 2, TIMEOUT)
    page.driver.find_element(By.CSS_SELECTOR, "#log-rows summary").send_keys(Keys.ENTER)
    page.see("#log-rows pre", '"requestId": "to-be-opened"')


def test_a_paused_log_stands_still_and_loses_nothing(page: Page) -> None:
    page.open_live()
    chat(page.gateway, "before-the-pause").close()
    page.field("filter").send_keys("-the-pause")
    page.see("#log-rows li", "inference_complete")
    before = page.events()
    page.press("#pause")
    chat(page.gateway, "after-the-pause").close()
    page.see("#log-count", "Paused, ", " new")
    eventually(lambda: not page.texts("#log-count")[0].startswith("Paused, 0"), TIMEOUT)
    assert page.events() == before
    page.press("#pause")
    eventually(lambda: len(page.events()) == len(before) + 2, TIMEOUT)


def test_many_events_leave_a_short_log(page: Page) -> None:
    page.open_live()
    with requests.Session() as http:
        http.headers["X-API-Key"] = KEY
        for number in range(200):
            http.headers["X-Request-Id"] = f"crowd-{number}"
            assert http.get(page.gateway.url + "/v1/models", timeout=30).status_code == 200
    page.field("filter").send_keys("crowd-")
    page.see("#log-count", "300 of ")
    assert len(page.events()) == 300


def test_it_comes_back_after_a_restart_and_misses_nothing(page: Page) -> None:
    page.open_live()
    chat(page.gateway, "before-restart").close()
    page.field("filter").send_keys("-restart")
    eventually(lambda: len(page.events()) == 2, TIMEOUT)
    page.gateway.stop()
    page.see("#connection", "Not connected")
    page.see("#trouble", "The gateway", "Try now")
    assert page.driver.execute_script("return document.getElementById('models').inert")
    page.gateway.start()
    # the page may be waiting for its next attempt still: this comes from the log
    chat(page.gateway, "after-restart").close()
    page.see("#connection", "Live")
    eventually(lambda: len(page.events()) == 4, TIMEOUT)
    assert page.texts("#trouble") == []


def test_it_says_that_its_key_counts_no_more(
    page: Page, driver: webdriver.Chrome, launch: Callable[..., Gateway]
) -> None:
    gateway = launch(GATEWAY_API_KEY=KEY, WEB_CONCURRENCY=1)
    own = Page(driver, gateway)
    own.open_live(KEY)
    gateway.stop()
    gateway.environ["GATEWAY_API_KEY"] = WRONG
    gateway.start()
    own.see("#sign-in-problem", "not accepted")


# Looks


def test_a_phone_needs_no_sideways_scrolling(page: Page) -> None:
    long_name = "instance-" + "x" * 120
    admin(page.gateway, "load", modelKey=MODEL, instanceId=long_name)
    page.resize(360, 740)
    page.open()
    page.see("#sign-in", "Your key, please")
    assert overflow(page) == 0
    page.enter_key(ADMIN)
    page.see("#models > li", long_name)
    with chat(page.gateway, "r" * 128, 100_000, long_name):
        page.see("#running > li", long_name)
        page.see("#log-rows li", long_name)
        assert overflow(page) == 0
        page.press("#load-open")
        page.see("#load-dialog", "Instance id")
        assert overflow(page) == 0


def test_it_follows_the_systems_light_and_dark(page: Page) -> None:
    colour = "return getComputedStyle(document.body).backgroundColor"
    page.open_live()
    page.resize(1360, 1000, dark=True)
    assert brightness(page.driver.execute_script(colour)) < 60
    page.resize(1360, 1000, dark=False)
    assert brightness(page.driver.execute_script(colour)) > 200


def overflow(page: Page) -> int:
    """Pixels by which the page is wider than its window."""
    width = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    return int(page.driver.execute_script(width))


def brightness(colour: str) -> float:
    """Of ``rgb(r, g, b)``, from 0 to 255."""
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
