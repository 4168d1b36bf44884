"""The picture of the page in the README: `python -m demo.page OUT.png`, after `make demo`.

Starts `aligngpt chat … --web` with the demo's model as a user would, and drives Chromium through it: Debian's packages
`chromium` and `chromium-driver`. The page's test drives it by the same `Page`.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

MODEL, PICTURES = Path("runs/demo/stage-2/model"), Path("runs/demo/scenes/test/images")
FLAGS = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
FLAGS += ["disable-component-update", "disable-sync", "hide-scrollbars", "window-size=1320,1020"]
PATIENCE = 120  # seconds, on a machine that is busy with other things


class Page:
    """The page in a browser. What it is told to do has happened, and is seen, when a method returns."""

    def __init__(self, driver: webdriver.Chrome):
        self.driver = driver

    def wait(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, PATIENCE, ignored_exceptions=[Exception]).until(lambda _: condition())

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> Any:
        return self.wait(lambda: self.driver.find_element(By.CSS_SELECTOR, selector))

    def open(self, url: str) -> None:
        self.driver.get(url)
        self.wait(lambda: self.one("#ask").is_displayed())

    def show(self, picture: Path) -> None:
        self.one("#picture input[type=file]").send_keys(str(picture))
        self.wait(lambda: self.all("#picture img"))

    def ask(self, words: str) -> None:
        self.one("#words textarea").send_keys(words)
        self._answered(lambda: self.one("#ask").click())

    def fix_level(self, level: int | None) -> None:
        """Move the slider, and have the question answered again."""
        slider = self.one("#level input[type=range]")
        places = 0 if level is None else level - int(slider.get_attribute("min"))
        slider.send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * places)
        self.wait(lambda: self.one(".ticks .here").text == ("gate" if level is None else str(level)))
        self._answered(lambda: self.one("#again").click())

    def answers(self) -> list[tuple[str, str]]:
        """What made each one's alignment row, and its text."""
        found = "[...document.querySelectorAll('#talk .answer')].map(a => [...a.children].map(c => c.textContent))"
        return [(made_by, text) for made_by, text in self.driver.execute_script(f"return {found}")]

    def _answered(self, act: Callable[[], None]) -> None:
        before = len(self.answers())
        act()
        self.wait(lambda: len(self.answers()) > before and not self.all("#talk .cursor"))
        self.wait(lambda: self.one("#ask").is_displayed() and self.one("#again").is_enabled())


@contextmanager
def browser() -> Iterator[Page]:
    """Chromium, with a profile of its own."""
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    for name, program in programs.items():
        if program is None:
            raise FileNotFoundError(f"{name} is not installed; on Debian: apt-get install chromium chromium-driver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = programs["chromium"] or ""
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        for flag in [*FLAGS, f"user-data-dir={profile}"]:
            options.add_argument(f"--{flag}")
        driver = webdriver.Chrome(options, webdriver.ChromeService(programs["chromedriver"]))
        try:
            yield Page(driver)
        finally:
            driver.quit()


@contextmanager
def served(model: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`aligngpt chat MODEL --web` on a free port: its address, and the process, which is ended if it has not been."""
    command = [sys.executable, "-m", "aligngpt", "chat", str(model), "--web", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = ""
            for line in process.stderr:
                said += line
                if found := re.search(r" at (http://\S+) until Ctrl-C", line):
                    yield found[1], process
                    return
            raise RuntimeError(f"the page did not come up: {said}")
        finally:
            process.terminate()


def main(out: str) -> None:
    """Draw the page into `out`: a question about a scene, answered by the gate's mix and at two levels."""
    with served(MODEL) as (url, _), browser() as page:
        page.driver.set_window_size(1320, 970)
        page.open(url)
        page.show((PICTURES / "00053.jpg").resolve())
        page.ask("where is the triangle")
        for level in (7, 2, None):
            page.fix_level(level)
        page.driver.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
        page.driver.save_screenshot(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
