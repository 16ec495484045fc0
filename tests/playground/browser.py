"""Test the page of --explain in a headless browser: mouse, keyboard, touch, a narrow window, dark mode.

    python tests/playground/browser.py PAGE.html [--chromium PROGRAM] [--screenshots FOLDER]

Run by hand, with any Chromium or Chrome; nothing else is needed. Chromium's debugging protocol runs over two
pipes (--remote-debugging-pipe): messages are JSON, each ended by a zero byte, from file descriptor 3 and to 4.
Exit code 0 if every check passes and the browser's console stays empty.
"""

import argparse
import base64
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from cli import run

CHECKS = """({
  heat: new Set(patches.map(cell => cell.style.background)).size,
  word: $("word-title").textContent, patch: $("patch-title").textContent, tint: $("tint").textContent,
  pinned: {...pinned}, map, wide: document.documentElement.scrollWidth,
  sums: range(data.maps.length * N).every(i => Math.abs(1 - scales[4 * i + 2] - scales[4 * i + 3]) < 0.02),
  background: getComputedStyle(document.body).backgroundColor,
})"""


class Browser:
    """One tab. `complaints` collects the console's messages and uncaught errors."""

    def __init__(self, write_to: int, read_from: int):
        self.to, self.back = os.fdopen(write_to, "wb"), os.fdopen(read_from, "rb")
        self.last, self.rest, self.session, self.complaints = 0, b"", None, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def message(self) -> dict:
        while b"\0" not in self.rest:
            part = os.read(self.back.fileno(), 1 << 16)
            if not part:
                raise ValueError("the browser has ended by itself")
            self.rest += part
        line, self.rest = self.rest.split(b"\0", 1)
        message = json.loads(line)
        method, params = message.get("method"), message.get("params", {})
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(json.dumps(params)[:500])
        url = params.get("request", {}).get("url", "data:") if method == "Network.requestWillBeSent" else "data:"
        if not url.startswith(("data:", "file:")):
            self.complaints.append(f"the page asked for {url}")
        return message

    def send(self, method: str, **params) -> dict:
        self.last += 1
        session = {"sessionId": self.session} if self.session else {}
        self.to.write(json.dumps({"id": self.last, "method": method, "params": params} | session).encode() + b"\0")
        self.to.flush()
        while (message := self.message()).get("id") != self.last:
            pass
        if "error" in message:
            raise ValueError(f"{method}: {message['error']['message']}")
        return message["result"]

    def open(self, page: Path) -> None:
        self.send("Page.navigate", url=page.resolve().as_uri())
        while self.message().get("method") != "Page.loadEventFired":
            pass

    def value(self, script: str):
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise ValueError(f"{script}: {result['exceptionDetails']['exception']['description']}")
        return result["result"].get("value")

    def window(self, width: int, height: int, dark: bool = False, touch: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch)

    def middle(self, node: str) -> tuple[float, float]:
        self.value(f"{node}.scrollIntoView({{block: 'center'}})")
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")  # drawn
        return tuple(self.value(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({node}.getBoundingClientRect())"))

    def point(self, node: str, click: bool = False) -> None:
        x, y = self.middle(node)
        for kind in ("mouseMoved", *(("mousePressed", "mouseReleased") if click else ())):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left" if click else "none", clickCount=1)

    def tap(self, node: str) -> None:
        x, y = self.middle(node)
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str) -> None:
        codes = {"Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def picture(self, file: Path) -> None:
        self.value("scrollTo(0, 0)")
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=0, y=0)  # so that it points at nothing
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip={**size, "scale": 1})
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser(program: str) -> Iterator[Browser]:
    (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
    command = [program, "--headless", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run"]
    if os.geteuid() == 0:  # Chromium's sandbox refuses to run as root
        command.append("--no-sandbox")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        shell = f'exec 3<&{their_in} 4>&{their_out}; exec "$@"'
        process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command, f"--user-data-dir={profile}"],
            pass_fds=(their_in, their_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(their_in), os.close(their_out)
        try:
            tab = Browser(our_out, our_in)
            yield tab
            tab.session = None
            tab.send("Browser.close")
        finally:
            process.terminate()
            process.wait(timeout=20)


def check(tab: Browser, page: Path, shots: Path) -> Iterator[tuple[str, bool]]:
    """Each check and whether it passed."""
    tab.window(1200, 900)
    tab.open(page)
    start = tab.value(CHECKS)
    yield "it loads, with a heat map", start["heat"] > 1
    yield "each row of attention sums to 1", start["sums"]
    yield "text stays text", tab.value("document.querySelectorAll('script').length") == 2
    tab.picture(shots / "wide.png")
    side, n, answer_at = (tab.value(name) for name in ("data.side", "N", "data.answer_at"))
    yield from check_pointing(tab, side, n, answer_at)
    tab.picture(shots / "patch.png")
    yield from check_keyboard(tab, side, n, answer_at)
    yield from check_choosers(tab)
    tab.window(1200, 900, dark=True)
    yield "dark mode has another background", tab.value(CHECKS)["background"] != start["background"]
    tab.picture(shots / "dark.png")
    for width in (320, 390):
        tab.window(width, 800, touch=True)
        yield f"nothing sticks out of a window {width} wide", tab.value(CHECKS)["wide"] <= width
        tab.tap(f"words[{answer_at}]")
        yield "a tap chooses a word", tab.value(CHECKS)["pinned"]["word"] == 0
        tab.tap("patches[0]")
        yield "a tap chooses a patch", tab.value(CHECKS)["pinned"]["patch"] == 0
        tab.tap(f"words[{answer_at + n - 1}]")
        yield "a tap goes back to words", tab.value(CHECKS)["pinned"]["word"] == n - 1
        tab.picture(shots / f"narrow-{width}.png")
    yield f"the console is empty {tab.complaints or ''}", not tab.complaints


def check_pointing(tab: Browser, side: int, n: int, answer_at: int) -> Iterator[tuple[str, bool]]:
    start = tab.value(CHECKS)
    other, far = (start["pinned"]["word"] + 1) % n, (start["pinned"]["patch"] + side + 1) % side**2
    tab.point(f"words[{answer_at + other}]")
    pointed = tab.value(CHECKS)
    looks = pointed["word"].startswith("“" + tab.value(f"word({other})") + "”")
    yield "pointing at a word shows it", looks and pointed["pinned"] == start["pinned"]
    tab.point("document.querySelector('h1')")
    yield "leaving it shows the chosen word again", tab.value(CHECKS)["word"] == start["word"]
    tab.point(f"words[{answer_at + other}]", click=True)
    yield "a click keeps it", tab.value(CHECKS)["pinned"]["word"] == other
    tab.point(f"patches[{far}]")
    yield "pointing at a patch shows which words looked there", "row" in tab.value(CHECKS)["tint"]
    tab.point(f"patches[{far}]", click=True)
    yield "a click keeps the patch", tab.value(CHECKS)["pinned"]["patch"] == far


def check_choosers(tab: Browser) -> Iterator[tuple[str, bool]]:
    for chooser in ("layer", "head"):
        last = f"$('{chooser}').selectedIndex = $('{chooser}').length - 1"
        tab.value(f"{last}; $('{chooser}').dispatchEvent(new Event('change'))")
        yield f"a {chooser} can be chosen", tab.value(CHECKS)["map"] > 0
    tab.value("$('layer').selectedIndex = 0; $('layer').dispatchEvent(new Event('change'))")
    yield "and the mean again", tab.value(CHECKS)["map"] == 0


def check_keyboard(tab: Browser, side: int, n: int, answer_at: int) -> Iterator[tuple[str, bool]]:
    tab.value("$('heat').focus()")
    tab.press("Tab")
    yield "tab goes to the patches", tab.value("patches.includes(document.activeElement)")
    tab.press("Home")
    tab.press("ArrowRight")
    tab.press("ArrowDown")
    yield "arrows go from patch to patch", tab.value(CHECKS)["pinned"]["patch"] == side + 1
    tab.press("ArrowLeft")
    tab.press("ArrowLeft")
    yield "and stop at the edge", tab.value(CHECKS)["pinned"]["patch"] == side
    tab.press("Tab")
    yield "tab goes to the words", tab.value("words.includes(document.activeElement)")
    tab.press("Home")
    tab.press("ArrowLeft")
    yield "arrows stop at the first word", tab.value(CHECKS)["pinned"]["word"] == 0
    tab.press("ArrowRight")
    yield "and go to the next", tab.value(CHECKS)["pinned"]["word"] == min(1, n - 1)
    tab.press("End")
    yield "end goes to the last", tab.value("document.activeElement === words.at(-1)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, help="what python llava.py --explain wrote")
    parser.add_argument("--chromium", default="chromium", help="the program (default: %(default)s)")
    parser.add_argument("--screenshots", type=Path, help="a folder for them; without one they are not kept")
    args = parser.parse_args()
    if not args.page.is_file():
        raise ValueError(f"{args.page} is not a file: python llava.py --explain makes one")
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        shots = args.screenshots or Path(scratch)
        shots.mkdir(parents=True, exist_ok=True)
        with browser(args.chromium) as tab:
            for what, passed in check(tab, args.page, shots):
                print("passed" if passed else "FAILED", what)
                failed += [] if passed else [what]
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    sys.exit(run(main))
