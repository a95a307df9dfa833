"""The page of `demo`, used in a real browser: drawings by mouse and finger, photographs, and the end of the server."""

import base64
import os
import re
import shutil
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CONFIGS
from PIL import Image
from runs import begun, printed

from mnist_lit import MNISTDataModule, main

# Corners of one stroke, in shares of the sheet's side from its middle.
SEVEN = [(-0.25, -0.3), (0.25, -0.3), (-0.05, 0.35)]
ONE = [(0.0, -0.3), (0.0, 0.3)]
PATIENCE = 60  # seconds; the machine may have more to do


@pytest.fixture(scope="module")
def run_dir(mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that recognises simple drawings."""
    folder = tmp_path_factory.mktemp("fast") / "run"
    flags = [f"--data.data_dir={mnist_dir}", "--test_after_fit=false", "--trainer.limit_train_batches=0.3"]
    main(["fit", f"--config={CONFIGS / 'fast.yaml'}", *flags, f"--run_dir={folder}"])
    return folder


@pytest.fixture(scope="module")
def url(run_dir: Path) -> Iterator[str]:
    """The address of a demo of that run, which has nothing to complain about and leaves nothing."""
    (folder := run_dir.parent / "empty").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = begun(folder, ["demo", f"--ckpt_path={run_dir}", f"--port={port}"])
    try:
        while not printed(folder)[0].endswith("\n"):
            assert process.is_alive(), printed(folder)
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(PATIENCE)
        assert process.exitcode == 0
        assert printed(folder) == (f"demo: http://127.0.0.1:{port} (Ctrl-C ends it)\n", "")
    finally:
        process.kill()
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium."""
    selenium = pytest.importorskip("selenium.webdriver")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    switches = "headless=new no-sandbox disable-gpu disable-dev-shm-usage no-first-run disable-background-networking"
    for switch in [*switches.split(), "disable-component-update", "disable-sync", "window-size=1280,900"]:
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    with selenium.Chrome(options, selenium.ChromeService(driver)) as browser:
        yield browser


class Visit:
    """The page in the browser, as a person uses it."""

    def __init__(self, browser: Any, url: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        self.browser = browser
        self.waiting = WebDriverWait(browser, PATIENCE, poll_frequency=0.05)
        browser.get(url)
        self.sheet = self.waiting.until(lambda _: self.find("canvas"))
        self.wait_for("nothing found")

    def find(self, selector: str) -> Any:
        return next(iter(self.browser.find_elements("css selector", selector)), None)

    def draw(self, stroke: list[tuple[float, float]], pointer: str = "mouse") -> None:
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.actions.pointer_input import PointerInput

        (start, *corners), size = stroke, self.sheet.size
        actions = ActionChains(self.browser, duration=50, devices=[PointerInput(pointer, pointer)]).w3c_actions
        hand = actions.pointer_action
        hand.move_to(self.sheet, start[0] * size["width"], start[1] * size["height"]).pointer_down()
        for x, y in corners:
            hand.move_to(self.sheet, x * size["width"], y * size["height"])
        hand.pointer_up()
        actions.perform()

    def press(self, name: str) -> None:
        self.find(f"button.{name}").click()

    def choose(self, file: Path) -> None:
        self.find("input[type=file]").send_keys(str(file))

    def drop(self, file: Path) -> None:
        script = """
            const bytes = Uint8Array.from(atob(arguments[0]), (each) => each.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], arguments[1]));
            document.body.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));
        """
        self.browser.execute_script(script, base64.b64encode(file.read_bytes()).decode(), file.name)

    def wait_for(self, prediction: str) -> None:
        self.waiting.until(lambda _: self.prediction().splitlines()[1:2] == [prediction], self.prediction())

    def prediction(self) -> str:
        element = self.find("#prediction")
        return str(element.text) if element else ""

    def probabilities(self) -> dict[str, int]:
        """In percent, by digit."""
        shares = re.findall(r"^(\d)\n(\d+)%$", self.prediction(), re.MULTILINE)
        return {digit: int(percent) for digit, percent in shares}


@pytest.fixture
def visit(chromium: Any, url: str) -> Visit:
    return Visit(chromium, url)


@pytest.fixture(scope="module")
def photograph(mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test image of a 7, written with a dark pen on grey paper that is lit from the left."""
    data = MNISTDataModule(data_dir=str(mnist_dir))
    data.setup("test")
    image, label = data.splits["test"].images[:1], data.splits["test"].labels[0]
    assert label == 7
    ink = np.asarray(Image.fromarray(image[0].numpy()).resize((300, 300), Image.Resampling.BICUBIC), dtype=float) / 255
    paper = np.linspace(210, 160, 640)[None].repeat(480, axis=0)
    paper[90:390, 170:470] *= 1 - 0.8 * ink
    file = tmp_path_factory.mktemp("photograph") / "seven.png"
    Image.fromarray(paper.astype(np.uint8)).save(file)
    return file


@pytest.mark.parametrize("pointer", ["mouse", "touch"])
def test_a_digit_is_drawn_predicted_cleared_and_drawn_again(pointer: str, visit: Visit) -> None:
    visit.draw(SEVEN, pointer)
    visit.wait_for("7")
    probabilities = visit.probabilities()
    assert probabilities.keys() == set("0123456789")
    assert visit.find("#network-input img") is not None
    visit.press("clear")
    visit.wait_for("nothing found")
    assert visit.probabilities() == {}
    assert visit.find("#network-input img") is None
    visit.draw(ONE, pointer)
    visit.wait_for("1")


def test_a_photograph_is_predicted_and_what_is_none_is_named(visit: Visit, photograph: Path, tmp_path: Path) -> None:
    empty, notes = tmp_path / "paper.png", tmp_path / "notes.png"
    Image.new("L", (400, 300), 180).save(empty)
    notes.write_text("seven")
    for bring in (visit.choose, visit.drop):
        bring(photograph)
        visit.wait_for("7")
        assert visit.probabilities()["7"] > 50
        bring(empty)
        visit.wait_for("nothing found")
    visit.choose(notes)
    visit.waiting.until(lambda _: "notes.png is not an image" in visit.find("output").text)


def test_the_page_is_served_until_a_signal_ends_it_without_a_word(url: str) -> None:
    """Its end is that of the fixture."""
    with urllib.request.urlopen(url, timeout=PATIENCE) as page:
        assert page.status == 200


def test_the_page_works_on_a_telephone(visit: Visit) -> None:
    size = {"width": 375, "height": 812, "deviceScaleFactor": 2, "mobile": True}
    visit.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        visit.draw(SEVEN, "touch")
        visit.wait_for("7")
        assert visit.browser.execute_script("return document.documentElement.scrollWidth") == 375
        assert visit.sheet.rect["width"] > 250
        assert visit.find("#prediction").rect["y"] > visit.sheet.rect["y"] + visit.sheet.rect["height"]
    finally:
        visit.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_an_address_that_is_not_available_is_named(run_dir: Path, fails: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        in_use = fails("demo", f"--ckpt_path={run_dir}", f"--port={port}")
    elsewhere = fails("demo", f"--ckpt_path={run_dir}", "--host=192.0.2.1")
    assert str(port) in in_use
    assert "192.0.2.1" in elsewhere
    assert "--host or --port" in elsewhere


def test_a_missing_package_is_named(run_dir: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "mnist_lit.inference.demo", raising=False)
    assert "mnist_lit[demo]" in fails("demo", f"--ckpt_path={run_dir}")
