"""Pages as a reader's browser shows them: headless Chromium, driven by its own driver."""

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
READY = """
const done = arguments[0];
Promise.all([kvplan.ready, kvplan.timeline?.ready]).then(() => done("ready"), (error) => done(String(error)));
"""


def chromium() -> str | None:
    """The browser's path, None where there is none or no driver for it."""
    found = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    return found if shutil.which("chromedriver") else None


@contextmanager
def browser(profile: Path) -> Iterator["Browser"]:
    """A browser of its own, with an empty profile."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = str(chromium())
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = Chrome(options=options, service=ChromeService(str(shutil.which("chromedriver"))))
    driver.set_script_timeout(30)
    try:
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    """One window. ``driver`` is selenium's, for what is not here."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.page: Path | None = None

    def open(self, page: Path, *, width: int = 1280, scheme: str = "light") -> None:
        """Load ``page`` and wait until every figure is drawn; logs begin anew."""
        self.look(width=width, scheme=scheme)
        self.driver.get("about:blank")
        self.messages(), self.requests()
        self.driver.get(page.as_uri())
        self.page = page
        assert self.driver.execute_async_script(READY) == "ready"

    def look(self, *, width: int, scheme: str) -> None:
        """The reader's window and colours."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def run(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def wait(self, promise: str, *values: Any) -> Any:
        """The value of a promise, ``promise`` being an expression that may use ``arguments``."""
        script = (
            f"const done = arguments[arguments.length - 1]; Promise.resolve({promise}).then((x) => done(x ?? null));"
        )
        return self.driver.execute_async_script(script, *values)

    def until(self, condition: str) -> bool:
        """Wait until a condition holds; False if it does not within some seconds."""
        script = f"""
        const done = arguments[0], start = performance.now();
        const look = () => {{
          if ({condition}) done(true);
          else if (performance.now() - start > 8000) done(false);
          else setTimeout(look, 20);
        }};
        look();"""
        return bool(self.driver.execute_async_script(script))

    def messages(self) -> list[str]:
        """What the console has said since the last time, Chromium's own notices aside."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses asked for since the last time, the page's own and data in it aside."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        own = self.page.as_uri() if self.page else "about:blank"
        return [url for url in asked if not url.startswith((own, "data:", "blob:", "about:"))]

    def point_at(self, x: float, y: float) -> None:
        """Move the mouse, in pixels of the window."""
        self._mouse("mouseMoved", x, y)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press, move, release."""
        self._mouse("mouseMoved", *start)
        self._mouse("mousePressed", *start)
        for share in (0.3, 0.6, 1.0):
            self._mouse("mouseMoved", *(a + share * (b - a) for a, b in zip(start, end, strict=True)), buttons=1)
        self._mouse("mouseReleased", *end)

    def pdf(self) -> bytes:
        """The page on paper."""
        printed = self.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
        return base64.b64decode(printed["data"])

    def _mouse(self, kind: str, x: float, y: float, buttons: int = 0) -> None:
        held = {"button": "left" if kind != "mouseMoved" or buttons else "none", "buttons": buttons, "clickCount": 1}
        self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y} | held)
