"""A real Chromium that shows the dashboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys

from tests.nginx import require
from tests.processes import eventually

TIMEOUT = 40.0
SWITCHES = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-dev-shm-usage", "--lang=en"]  # fmt: skip
#: The text of every visible element of a selector.
TEXTS = """
return [...document.querySelectorAll(arguments[0])]
    .filter((one) => one.checkVisibility()).map((one) => one.innerText)
"""


def chromium(folder: Path) -> webdriver.Chrome:
    """Start a headless Chromium that keeps its files in ``folder``."""
    options = webdriver.ChromeOptions()
    options.binary_location = require("chromium")
    for switch in (*SWITCHES, f"--user-data-dir={folder}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, Service(require("chromedriver")))


class Window:
    """The browser with the dashboard of the gateway at ``url``."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        self.url = url

    def open(self, key: str = "") -> None:
        self.driver.get(f"{self.url}/debug/")
        if key:
            self.enter_key(key)

    def enter_key(self, key: str) -> None:
        """Type the key without a click: the field must have the focus."""
        field = eventually(lambda: self.focused("key"), TIMEOUT)
        field.send_keys(key, Keys.ENTER)

    def focused(self, name: str) -> Any:
        element = self.driver.switch_to.active_element
        return element if element.get_attribute("id") == name else None

    def texts(self, selector: str) -> list[str]:
        """The text of each visible element that matches."""
        found: list[str] = self.driver.execute_script(TEXTS, selector)
        return found

    def see(self, selector: str, *words: str) -> str:
        """Wait until a matching element shows all these words, and return its text."""

        def shown() -> str | None:
            texts = self.texts(selector)
            return next((text for text in texts if all(word in text for word in words)), None)

        try:
            return str(eventually(shown, TIMEOUT))
        except AssertionError:
            raise AssertionError(f"{words} not in {selector}: {self.texts(selector)}") from None
