"""The dashboard in a real Chromium: it shows what happens, and logs no errors to the console."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from tests.browser import TIMEOUT, Window, chromium
from tests.processes import Gateway, Simulator, eventually, eventually_equal, free_port

KEY, ADMIN, WRONG = "inference-key-0123456789", "admin-key-0123456789abc", "wrong-key-0123456789abc"
MODEL, BIG = "qwen2-1.5b-instruct", "llama-3.3-70b-instruct"
CHAT = "/v1/chat/completions"


class Dashboard(Window):
    """The browser, showing the dashboard of ``gateway``."""

    def __init__(self, driver: webdriver.Chrome, gateway: Gateway) -> None:
        super().__init__(driver, gateway.url)
        self.gateway = gateway

    def open_live(self, key: str = ADMIN) -> None:
        self.open(key)
        self.see("#connection", "Live")

    def gone(self, selector: str, words: str) -> None:
        """Wait until no element that matches ``selector`` contains ``words``."""
        eventually(lambda: not any(words in one for one in self.texts(selector)), TIMEOUT)

    def press(self, selector: str) -> None:
        """Press Enter on an element: everything works without a mouse."""

        def pressed() -> bool:
            try:
                self.driver.find_element(By.CSS_SELECTOR, selector).send_keys(Keys.ENTER)
            except StaleElementReferenceException:  # it has just been redrawn
                return False
            return True

        eventually(pressed, TIMEOUT)

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
        """What the browser has logged to its console, except for failed requests: the dashboard
        itself shows those."""
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
    """The module's gateway with keys. No model is loaded or active."""
    admin(shared_guarded, "deactivate")
    return shared_guarded


@pytest.fixture
def dashboard(driver: webdriver.Chrome, guarded: Gateway) -> Iterator[Dashboard]:
    """The guarded gateway's dashboard, not opened yet. In the end the console must be empty."""
    opened = Dashboard(driver, guarded)
    opened.complaints()
    yield opened
    logged = opened.complaints()
    opened.resize(1360, 1000)
    driver.execute_script("sessionStorage.clear()")
    driver.get("about:blank")
    assert logged == []


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
    """Run ``work`` in a thread, and wait for it in the end."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join(60)


# The page as it is served


def test_it_is_served_without_a_key_and_allows_the_browser_nothing_else(guarded: Gateway) -> None:
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
    # it loads nothing from elsewhere, and never turns text into markup
    markup = re.sub(r"(?s)<(script|style).*?</\1>", "", answer.text)
    assert not re.search(r'(?i) (src|srcset|action|style|on\w+)=|href="(?!data:)', markup)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write", answer.text)


def test_debug_without_a_slash_redirects_wherever_it_is_mounted(guarded: Gateway) -> None:
    answer = guarded.get("/debug", allow_redirects=False)
    assert (answer.status_code, answer.headers["Location"]) == (308, "debug/")
    head = requests.head(guarded.url + "/debug/", timeout=30)
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/debug/"), ("OPTIONS", "/debug/"), ("GET", "//debug/"), ("GET", "/debug//status")]
    + [("GET", path) for path in ("/debug/status", "/debug/stream", "/debug/metrics", "/debug/x")],
)
def test_only_the_dashboard_itself_is_served_without_a_key(
    guarded: Gateway, method: str, path: str
) -> None:
    answer = requests.request(method, guarded.url + path, timeout=30)
    assert answer.status_code == 401


def test_the_allowlist_applies_to_the_dashboard(launch: Callable[..., Gateway]) -> None:
    gateway = launch(IP_ALLOWLIST="10.1.2.3", WEB_CONCURRENCY=1)
    assert gateway.get("/debug/").status_code == 403


# Keys


def test_a_wrong_key_is_rejected_and_the_right_one_shows_the_models(dashboard: Dashboard) -> None:
    admin(
        dashboard.gateway,
        "load",
        modelKey=MODEL,
        loadConfig={"contextLength": 2048},
        ttlSeconds=5400,
    )
    dashboard.open(WRONG)
    dashboard.see("#sign-in-problem", "not accepted")
    dashboard.enter_key("clé")
    dashboard.see("#sign-in-problem", "non-ASCII")
    dashboard.enter_key(ADMIN)
    dashboard.see("#connection", "Live")
    dashboard.see("#lmstudio", "LM Studio connected")
    shown = dashboard.see("#models > li", MODEL)
    assert "context 2,048" in shown
    assert "unloads after 1 h 30 min idle" in shown
    assert "active" in shown
    assert dashboard.driver.current_url == dashboard.gateway.url + "/debug/"


def test_the_key_lasts_as_long_as_its_tab_and_can_be_forgotten(dashboard: Dashboard) -> None:
    dashboard.open_live()
    dashboard.open()
    dashboard.see("#connection", "Live")
    stored = dashboard.driver.execute_script("return [localStorage.length, document.cookie]")
    assert stored == [0, ""]
    dashboard.press("#forget")
    dashboard.see("#sign-in", "API key")
    dashboard.open()
    dashboard.see("#sign-in", "API key")
    assert dashboard.texts("#dashboard") == []


def test_an_inference_key_sees_its_models_and_why_it_sees_no_more(dashboard: Dashboard) -> None:
    dashboard.open(KEY)
    dashboard.see("#restricted-why", "This path needs an admin key.")
    dashboard.see("#usable", MODEL)
    assert dashboard.texts("#dashboard") == dashboard.texts("#load-open") == []


def test_without_keys_it_opens_at_once(driver: webdriver.Chrome, gateway: Gateway) -> None:
    dashboard = Dashboard(driver, gateway)
    dashboard.complaints()
    dashboard.open()
    dashboard.see("#connection", "Live")
    dashboard.see("#models-empty", "No models are loaded.")
    assert dashboard.texts("#forget") == dashboard.texts("#sign-in") == []
    assert dashboard.complaints() == []


# Models


def test_a_load_by_another_client_shows_its_progress(dashboard: Dashboard) -> None:
    dashboard.open_live()
    with meanwhile(lambda: admin(dashboard.gateway, "load", modelKey=BIG, instanceId="theirs")):
        dashboard.see("#loads > li", f"Loading {BIG} as theirs", "%")
        value = "return document.querySelector('#loads progress')?.value"
        eventually(lambda: 0 < (dashboard.driver.execute_script(value) or 0) < 100, TIMEOUT)
        assert dashboard.texts("#loads button") == []  # only its client can cancel it
    dashboard.see("#models > li", "theirs", "active")
    dashboard.gone("#loads > li", BIG)
    dashboard.see("#log-rows li", "model_load_complete", f"{BIG} as theirs")


def test_it_loads_activates_and_unloads(dashboard: Dashboard) -> None:
    dashboard.open_live()
    dashboard.see("#models-empty", "No models are loaded.")
    dashboard.press("#load-open")
    Select(dashboard.field("load-model")).select_by_value(MODEL)
    dashboard.see("#load-facts", "context up to 32,768")
    dashboard.field("load-instance").send_keys("mine")
    dashboard.field("load-context").send_keys("2048")
    Select(dashboard.field("load-ttl")).select_by_value("300")
    Select(dashboard.field("load-gpu")).select_by_value("fraction")
    dashboard.see("#load-ratio-label", "0.5")
    dashboard.field("load-activate").send_keys(Keys.SPACE)
    dashboard.field("load-instance").send_keys(Keys.ENTER)
    dashboard.see(".notice", f"{MODEL} as mine was loaded in")
    assert dashboard.texts("#load-dialog") == []
    found = loaded(dashboard.gateway)["mine"]
    assert (found["contextLength"], found["ttlMs"]) == (2048, 300_000)
    dashboard.see("#log-rows li", "model_load_start", '"gpu":{"ratio":0.5}')

    dashboard.see("#models > li", "mine", "Activate")
    dashboard.press("[aria-label='Activate mine']")
    dashboard.see("#models > li", "mine", "active", "Deactivate")
    dashboard.press("[aria-label='Deactivate mine']")
    dashboard.see("#models > li", "mine", "Activate")
    dashboard.press("[aria-label='Unload mine']")
    dashboard.see("#unload-text", "mine will be removed from memory")
    dashboard.press("#unload-go")
    dashboard.gone("#models > li", "mine")
    assert loaded(dashboard.gateway) == {}


def test_a_load_that_is_rejected_or_fails_shows_why(
    dashboard: Dashboard, simulator: Simulator
) -> None:
    admin(dashboard.gateway, "load", modelKey=MODEL, instanceId="taken")
    dashboard.open_live()
    dashboard.see("#models > li", "taken")
    dashboard.press("#load-open")
    dashboard.field("load-instance").send_keys("taken")
    dashboard.press("#load-go")
    dashboard.see("#load-problem", "instance taken exists")
    dashboard.field("load-instance").send_keys("-no-more")
    simulator.faults(fail_loads="The GPU is on fire.")
    dashboard.press("#load-go")
    # the dialog has closed: progress had begun
    dashboard.see(".notice.failed", "as taken-no-more failed: ", "The GPU is on fire.")
    dashboard.see("#log-rows li", "model_load · ", "The GPU is on fire.")


def test_its_own_load_can_be_cancelled(dashboard: Dashboard, simulator: Simulator) -> None:
    simulator.faults(load_ms=60_000)
    dashboard.open_live()
    dashboard.see("#models-empty", "No models are loaded.")
    dashboard.press("#load-open")
    Select(dashboard.field("load-model")).select_by_value(BIG)
    dashboard.press("#load-go")
    dashboard.see("#loads button", "Cancel")
    dashboard.press("#loads button")
    dashboard.see(".notice", f"Loading {BIG} was cancelled")
    dashboard.gone("#loads > li", BIG)
    assert loaded(dashboard.gateway) == {}


def test_it_shows_that_lm_studio_is_unreachable(
    driver: webdriver.Chrome, launch: Callable[..., Gateway]
) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    dashboard = Dashboard(driver, launch(away, WEB_CONCURRENCY=1, SDK_RETRY_DELAY=10))
    dashboard.open()
    dashboard.see("#lmstudio", "LM Studio unreachable")
    dashboard.see("#models-problem", "Failed to connect to LM Studio SDK after 3 attempts.")
    assert not dashboard.field("load-open").is_enabled()


# Requests and events


def test_a_stream_is_in_flight_and_then_in_the_log(dashboard: Dashboard) -> None:
    dashboard.open_live()
    with chat(dashboard.gateway, "endless", 100_000):
        shown = dashboard.see("#running > li", MODEL, "endless")
        assert CHAT in shown
        assert "stream" in shown
        assert "app" in shown  # the key's name
        dashboard.see("#running > li", "endless", " s")
        dashboard.see("#running > li", "endless", "≈ ", " tokens")
    dashboard.see("#log-rows li", "inference_complete", "499 client disconnected", MODEL)
    dashboard.gone("#running > li", "endless")
    with chat(dashboard.gateway, "short", 12) as answer:
        assert b"[DONE]" in answer.content
    dashboard.see("#log-rows li", "inference_complete", "200 · ", "tokens · ", "tokens/s")
    dashboard.see("#recent > li", "200", MODEL, "tokens")
    eventually(lambda: int(dashboard.texts("#requests-now")[0]) >= 2, TIMEOUT)
    eventually(lambda: re.fullmatch(r"[\d.,]+", dashboard.texts("#speed-now")[0]), TIMEOUT)
    eventually(lambda: re.search(r"\d m?s$", dashboard.texts("#latency-now")[0]), TIMEOUT)
    outline = "return document.querySelector('#speed-chart path')?.getAttribute('d') ?? ''"
    eventually(lambda: dashboard.driver.execute_script(outline).startswith("M"), TIMEOUT)


def test_what_clients_send_is_shown_as_text(dashboard: Dashboard) -> None:
    evil = "<img src=x onerror=alert(1)><b>"
    dashboard.open_live()
    assert chat(dashboard.gateway, "evil", model=evil).status_code == 400
    dashboard.see("#log-rows li", "inference_start", evil)
    dashboard.see("#recent > li", evil)
    inside = "return document.querySelectorAll('main img, main li b').length"
    assert dashboard.driver.execute_script(inside) == 0


def test_events_are_filtered_by_kind_and_text(dashboard: Dashboard) -> None:
    dashboard.open_live()
    admin(dashboard.gateway, "load", modelKey=MODEL, instanceId="filtered")
    chat(dashboard.gateway, "needle-1").close()
    chat(dashboard.gateway, "needle-2").close()
    dashboard.see("#log-rows li", "inference_complete")
    dashboard.see("#log-rows li", "model_load_complete")
    assert not any("model_load_progress" in one for one in dashboard.events())
    dashboard.press("#chips button:nth-child(3)")
    dashboard.see("#log-rows li", "model_load_progress")
    dashboard.press("#chips button:nth-child(1)")
    dashboard.gone("#log-rows li", "inference_")
    dashboard.see("#log-rows li", "model_load_complete")
    dashboard.press("#chips button:nth-child(1)")
    dashboard.see("#log-rows li", "inference_start")
    dashboard.field("filter").send_keys("NEEDLE-2")
    dashboard.gone("#log-rows li", "model_")
    # its request may still be in flight: its events follow
    eventually(lambda: 1 <= len(dashboard.events()) <= 2, TIMEOUT)
    assert all("inference_" in one for one in dashboard.events())
    dashboard.field("filter").send_keys("-nothing")
    dashboard.see("#log-empty", "No events match the filters.")


def test_an_event_opens_with_the_keyboard(dashboard: Dashboard) -> None:
    dashboard.open_live()
    chat(dashboard.gateway, "to-be-opened").close()
    dashboard.field("filter").send_keys("to-be-opened")
    eventually(lambda: 1 <= len(dashboard.events()) <= 2, TIMEOUT)
    dashboard.press("#log-rows summary")
    dashboard.see("#log-rows pre", '"requestId": "to-be-opened"')


def test_a_paused_log_does_not_change_and_loses_nothing(dashboard: Dashboard) -> None:
    dashboard.open_live()
    chat(dashboard.gateway, "before-the-pause").close()
    dashboard.field("filter").send_keys("-the-pause")
    dashboard.see("#log-rows li", "inference_complete")
    before = dashboard.events()
    dashboard.press("#pause")
    chat(dashboard.gateway, "after-the-pause").close()
    dashboard.see("#log-count", "Paused, ", " new")
    eventually(lambda: not dashboard.texts("#log-count")[0].startswith("Paused, 0"), TIMEOUT)
    assert dashboard.events() == before
    dashboard.press("#pause")
    eventually(lambda: len(dashboard.events()) == len(before) + 2, TIMEOUT)


def test_the_log_shows_the_newest_of_many_events(dashboard: Dashboard) -> None:
    dashboard.open_live()
    with requests.Session() as http:
        http.headers["X-API-Key"] = KEY
        for number in range(200):
            http.headers["X-Request-Id"] = f"crowd-{number}"
            assert http.get(dashboard.gateway.url + "/v1/models", timeout=30).status_code == 200
    dashboard.field("filter").send_keys("crowd-")
    dashboard.see("#log-count", "300 of ")
    assert len(dashboard.events()) == 300


def test_it_reconnects_after_a_restart_and_misses_nothing(dashboard: Dashboard) -> None:
    dashboard.open_live()
    chat(dashboard.gateway, "before-restart").close()
    dashboard.field("filter").send_keys("-restart")
    eventually(lambda: len(dashboard.events()) == 2, TIMEOUT)
    dashboard.gateway.stop()
    dashboard.see("#connection", "Not connected")
    dashboard.see("#trouble", "The gateway", "Retry now")
    inert = "return document.getElementById('models').inert"
    eventually(lambda: dashboard.driver.execute_script(inert), TIMEOUT)
    dashboard.gateway.start()
    # it may still be waiting to reconnect: these events come from the log
    chat(dashboard.gateway, "after-restart").close()
    dashboard.see("#connection", "Live")
    eventually(lambda: len(dashboard.events()) == 4, TIMEOUT)
    eventually_equal(lambda: dashboard.texts("#trouble"), [])


def test_it_says_that_its_key_is_no_longer_accepted(
    dashboard: Dashboard, driver: webdriver.Chrome, launch: Callable[..., Gateway]
) -> None:
    gateway = launch(GATEWAY_API_KEY=KEY, WEB_CONCURRENCY=1)
    own = Dashboard(driver, gateway)
    own.open_live(KEY)
    gateway.stop()
    gateway.environ["GATEWAY_API_KEY"] = WRONG
    gateway.start()
    own.see("#sign-in-problem", "not accepted")


# Appearance


def test_a_phone_needs_no_sideways_scrolling(dashboard: Dashboard) -> None:
    long_name = "instance-" + "x" * 120
    admin(dashboard.gateway, "load", modelKey=MODEL, instanceId=long_name)
    dashboard.resize(360, 740)
    dashboard.open()
    dashboard.see("#sign-in", "API key")
    assert overflow(dashboard) == 0
    dashboard.enter_key(ADMIN)
    dashboard.see("#models > li", long_name)
    with chat(dashboard.gateway, "r" * 128, 100_000, long_name):
        dashboard.see("#running > li", long_name)
        dashboard.see("#log-rows li", long_name)
        assert overflow(dashboard) == 0
        dashboard.press("#load-open")
        dashboard.see("#load-dialog", "Instance id")
        assert overflow(dashboard) == 0


def test_it_follows_the_systems_light_or_dark_scheme(dashboard: Dashboard) -> None:
    colour = "return getComputedStyle(document.body).backgroundColor"
    dashboard.open_live()
    dashboard.resize(1360, 1000, dark=True)
    eventually(lambda: brightness(dashboard.driver.execute_script(colour)) < 60, TIMEOUT)
    dashboard.resize(1360, 1000, dark=False)
    eventually(lambda: brightness(dashboard.driver.execute_script(colour)) > 200, TIMEOUT)


def overflow(dashboard: Dashboard) -> int:
    """The number of pixels by which the dashboard is wider than its window."""
    width = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    return int(dashboard.driver.execute_script(width))


def brightness(colour: str) -> float:
    """Of ``rgb(r, g, b)``, from 0 to 255."""
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
