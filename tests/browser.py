"""A real browser on JupyterLab and on `make app`: for tests/test_browser.py, benchmarks/slider.py.

Servers listen on a free port of this machine with a token that no command line shows, work on a
copy of the notebooks, and keep Jupyter's own files in that folder too. Nothing here sleeps for a
fixed time: `until` polls a condition, and stops at once where a widget's status tells of an error.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from idaa_lib.lab.controls import read_epsilon

ROOT = Path(__file__).resolve().parent.parent
# A CI artefact: git ignores it.
SHOTS = ROOT / "outputs" / "screenshots"
WINDOW = {"width": 1280, "height": 900}
TALL = {"width": 1280, "height": 1180}
INSTALL = "run `make browser` once (Chromium, on Debian and Ubuntu), or name one as IDAA_CHROMIUM"


def chromium_path() -> str | None:
    """`IDAA_CHROMIUM`, else the system's; None where there is none."""
    names = os.environ.get("IDAA_CHROMIUM"), "chromium", "chromium-browser"
    return next((path for name in names if name and (path := shutil.which(name))), None)


def missing() -> str | None:
    """What a browser test lacks here, and the command that helps; None if it can run."""
    if chromium_path() is None:
        return f"no Chromium here: {INSTALL}"
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "no playwright here: run `make setup`"
    return None


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A headless Chromium, as a Playwright browser context of 1280 × 900 pixels."""
    from playwright.sync_api import sync_playwright

    # In a container Chromium has neither a sandbox nor a GPU; it must not phone home either.
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    arguments += ["--disable-background-networking", "--no-first-run"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=arguments)
        context = browser.new_context(viewport=WINDOW, device_scale_factor=1)
        context.set_default_timeout(30_000)
        try:
            yield context
        finally:
            browser.close()


# Servers


@dataclass
class Server:
    """A server that this process started: `address` is what a person opens."""

    url: str
    token: str
    folder: Path
    pid: int

    @property
    def address(self) -> str:
        return f"{self.url}?token={self.token}"

    def ask(self, path: str, method: str = "GET") -> Any:
        """The JSON of one request to its API (None where it answers with nothing)."""
        request = urllib.request.Request(self.url + path, method=method)
        request.add_header("Authorization", f"token {self.token}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or "null")

    def end_kernel(self, notebook: str) -> None:
        """End its kernel: a session outlives the tab that opened it."""
        for session in self.ask("api/sessions"):
            if session["path"] == f"{notebook}.ipynb":
                self.ask(f"api/sessions/{session['id']}", "DELETE")

    def copy(self, notebook: str, name: str, first: str) -> None:
        """The notebook once more, with a cell of code before all others."""
        content = json.loads((self.folder / f"{notebook}.ipynb").read_text())
        cell = {"cell_type": "code", "id": "first", "metadata": {}, "outputs": []}
        content["cells"].insert(0, cell | {"execution_count": None, "source": first})
        (self.folder / f"{name}.ipynb").write_text(json.dumps(content))

    def set(self, notebook: str, **values: Any) -> None:
        """Other values in the parameters cell of the copied notebook; a name that is not there gets
        a line of its own, as the notebook says."""
        path = self.folder / f"{notebook}.ipynb"
        content = json.loads(path.read_text())
        (cell,) = [c for c in content["cells"] if "parameters" in c["metadata"].get("tags", [])]
        source = "".join(cell["source"])
        for name, value in values.items():
            line = f"{name} = {value!r}"
            source, n = re.subn(rf"(?m)^{name}\b.*? = .*$", line, source)
            source += "" if n else f"\n{line}"
        cell["source"] = source
        path.write_text(json.dumps(content))


@contextlib.contextmanager
def jupyter(folder: Path, environment: dict[str, str]) -> Iterator[Server]:
    """JupyterLab on a copy of notebooks/, with the settings of `make lab`.

    Args:
        folder: for the copy, the log and Jupyter's own files.
        environment: beside this process's; IDAA_OUTPUTS, OMP_NUM_THREADS, …
    """
    notebooks = folder / "notebooks"
    shutil.copytree(ROOT / "notebooks", notebooks, ignore=shutil.ignore_patterns(".*"))
    settings = folder / "settings"
    settings.mkdir()
    # A save happens where a test asks for it, so that what a second tab finds is known.
    overrides = {"@jupyterlab/docmanager-extension:plugin": {"autosave": False}}
    (settings / "overrides.json").write_text(json.dumps(overrides))
    token = secrets.token_urlsafe(24)
    variables = {name: str(folder / name.lower()) for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    variables["JUPYTER_CONFIG_DIR"] = str(folder / "jupyter_config_dir")
    variables["JUPYTER_CONFIG_PATH"] = str(ROOT / "notebooks")
    # Jupyter looks for a free port first and listens later. Below the range from which the system
    # gives ports to whoever asks for any, nobody takes it in between.
    port = 10_000 + secrets.randbelow(20_000)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1"]
    command += [f"--port={port}", "--allow-root", f"--ServerApp.root_dir={notebooks}"]
    command += [f"--LabApp.app_settings_dir={settings}", "--LabApp.extension_manager=readonly"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    command += [word for word in shlex.split(recipe("lab")) if "tornado_settings" in word]
    log = folder / "jupyter.log"
    runtime = Path(variables["JUPYTER_RUNTIME_DIR"])
    with _start(command, environment | variables | {"JUPYTER_TOKEN": token}, log) as process:

        def find_server() -> Server | None:
            # The file is written once the port is chosen, and that is before it is listened on.
            for path in runtime.glob("jpserver-*.json"):
                with contextlib.suppress(ValueError, OSError):
                    url = json.loads(path.read_text())["url"]
                    server = Server(url, token, notebooks, process.pid)
                    server.ask("api/status")
                    return server
            return None

        yield _wait(process, find_server, log)


@contextlib.contextmanager
def app(folder: Path, environment: dict[str, str]) -> Iterator[Server]:
    """What `make app` starts. Needs an outputs folder of its own in `environment`."""
    log = folder / "app.log"
    # The shell gives way to Voilà, whose process this is then.
    command = ["sh", "-c", f"cd {ROOT} && exec env {recipe('app')}"]
    with _start(command, environment, log) as process:
        link = re.compile(r"(http://127\.0\.0\.1:\d+/)\?token=(\S+)")
        url, token = _wait(process, lambda: (m := link.search(log.read_text())) and m.groups(), log)
        yield Server(url, token, folder, process.pid)


def recipe(verb: str) -> str:
    """What `make verb` runs after set-up, in this environment."""
    # Beneath `make test` a nested make would also print the directory that it enters and leaves.
    command = ["make", "-n", "--no-print-directory", verb, f"ENV={sys.prefix}"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return process.stdout.partition("\n")[2].replace("\\\n", " ").strip()


@contextlib.contextmanager
def _start(command: list[str], environment: dict[str, str], log: Path) -> Iterator[Any]:
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, env=os.environ | environment, cwd=log.parent, stdout=sink,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()  # it ends its kernels first
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(5)


def _wait(process: Any, ready: Callable[[], Any], log: Path, seconds: float = 90) -> Any:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if answer := ready():
            return answer
        time.sleep(0.05)
    raise RuntimeError(f"{process.args[:3]} did not start:\n{log.read_text()[-3000:]}")


# Pages


@dataclass
class Faults:
    """What a page did that it should not: errors on its console, requests that failed or left."""

    errors: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)


def watch(page: Any) -> Faults:
    """Record from now on."""
    faults = Faults()
    pattern = re.compile(r"(https?|wss?)://127\.0\.0\.1[:/]|(blob|data|file|about):")
    page.on("console", lambda m: m.type == "error" and faults.errors.append(m.text))
    page.on("pageerror", lambda error: faults.errors.append(str(error)))
    page.on("requestfailed", lambda r: faults.failures.append(f"{r.url} {r.failure}"))
    page.on("request", lambda r: pattern.match(r.url) or faults.strangers.append(r.url))
    return faults


def until(page: Any, condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """The condition's value once it is true.

    Raises:
        AssertionError: it does not come true, or the page shows a traceback: the text is in the
            message, and how the page looked in a screenshot.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        text = trouble(page)
        if "Traceback" in text or time.monotonic() > end:
            shot(page, f"failed-{re.sub(r'[^a-z0-9]+', '-', what.lower()).strip('-')}")
            raise AssertionError(f"Waited {seconds:g} s at most for: {what}. Page: {text}")
        page.wait_for_timeout(50)
    return value


def status(page: Any) -> str:
    """The text of all status widgets (`idaa-status`, `idaa-live-status`, …)."""
    texts = page.locator('[class*="idaa-"][class*="-status"]').all_text_contents()
    return "\n".join(text.strip() for text in texts if text.strip())


def trouble(page: Any) -> str:
    """The same, and what cells wrote to stderr."""
    stderr = page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').all_text_contents()
    return "\n".join([status(page), *stderr]).strip()


def text_of(page: Any, selector: str) -> str:
    """The text of one element; also where it is scrolled out of the window, which JupyterLab does
    not render (`innerText` is empty there)."""
    return page.locator(selector).first.text_content().strip()


def show(page: Any, selector: str) -> None:
    """Scroll so that this is at the top of the window."""
    page.locator(selector).first.evaluate("found => found.scrollIntoView({block: 'start'})")


def shot(page: Any, name: str) -> Path:
    """A screenshot of the window."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    path = SHOTS / f"{name}.png"
    page.screenshot(path=path)
    return path


# What `pixels` and `record_moves` share: the decoded pixels of an image, not its blob's address,
# which is new at each value.
_DECODED = """
const decoded = async (img) => {
  try { await img.decode(); } catch { return null; }  // replaced meanwhile
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [img.naturalWidth, img.naturalHeight];
  const context = canvas.getContext('2d', {willReadFrequently: true});
  context.drawImage(img, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
};
"""


def pixels(page: Any, selector: str = ".idaa-picture") -> np.ndarray | None:
    """What the browser decoded of the first such image, uint8 (H, W, 3); None if it is not there
    (yet)."""
    script = f"""async (selector) => {{ {_DECODED}
      const img = document.querySelector(selector);
      if (!img?.naturalWidth) return null;
      const image = await decoded(img);
      if (!image) return null;
      const parts = [];
      for (let i = 0; i < image.data.length; i += 32768)
        parts.push(String.fromCharCode(...image.data.subarray(i, i + 32768)));
      return [image.height, image.width, btoa(parts.join(''))];
    }}"""
    image = page.evaluate(script, selector)
    if image is None:
        return None
    height, width, data = image
    raw = np.frombuffer(base64.b64decode(data), np.uint8)
    return raw.reshape(height, width, 4)[..., :3].copy()


def picture(
    page: Any, other_than: np.ndarray | None = None, selector: str = ".idaa-picture"
) -> Any:
    """The picture's pixels, once they are there and differ from `other_than`."""

    def find_change() -> Any:
        image = pixels(page, selector)
        is_same = other_than is not None and image is not None and np.array_equal(image, other_than)
        return None if image is None or is_same else (image,)

    return until(page, find_change, f"pixels of {selector} that are new")[0]


def epsilon(page: Any) -> float:
    """What the field of ε says, once it is what the slider's handle says in words."""
    field, handle = page.locator(".idaa-epsilon input"), page.locator(".idaa-epsilon .noUi-handle")

    def agree() -> float | None:
        value = read_epsilon(field.input_value())
        place = float((handle.get_attribute("aria-valuetext") or "").removeprefix("ε = ") or "nan")
        return value if abs(place / value - 1) < 0.02 else None

    return until(page, agree, "a field that says what the slider does")


def measured_at(page: Any) -> float | None:
    """The ε that the meters name; None while there are none."""
    match = re.search(r"ε = ([0-9.]+(?:e[-+]?\d+)?)", text_of(page, ".idaa-meters"))
    return float(match[1]) if match else None


def meters_follow(page: Any) -> str:
    """The meters' text, once they are those of the slider's ε."""

    def agree() -> bool:
        value = measured_at(page)
        return value is not None and abs(value / epsilon(page) - 1) < 0.01

    until(page, agree, "meters of the slider's ε")
    return text_of(page, ".idaa-meters")


def press(page: Any, key: str = "ArrowRight", times: int = 1) -> None:
    """Keys on the ε slider: an arrow is one step."""
    page.locator(".idaa-epsilon .noUi-handle").focus()
    for _ in range(times):
        page.keyboard.press(key)


def drag(page: Any, share: float) -> None:
    """The ε slider's handle by mouse to `share` of its length."""
    handle = page.locator(".idaa-epsilon .noUi-handle").bounding_box()
    track = page.locator(".idaa-epsilon .noUi-target").bounding_box()
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    y = track["y"] + track["height"] / 2
    page.mouse.move(track["x"] + share * track["width"], y, steps=12)
    page.mouse.up()


def moves(page: Any, times: int = 30) -> list[dict[str, float]]:
    """Move the ε slider by keyboard so often, one step after another's pixels and meters.

    For each move the milliseconds from the key's event to `pixels` (decoded and different) and to
    `meters` (they name the slider's ε), as the page itself sees them.
    """
    page.evaluate(f"""async () => {{ {_DECODED}
      const state = window.idaaMoves = [];
      const img = document.querySelector('.idaa-picture');
      const hash = (image) => {{
        let h = 2166136261;
        for (const word of new Uint32Array(image.data.buffer)) h = Math.imul(h ^ word, 16777619);
        return h;
      }};
      let last = hash(await decoded(img));
      img.addEventListener('load', async () => {{
        const image = await decoded(img), now = performance.now();
        if (!image) return;
        const mine = hash(image), move = state.at(-1);
        if (mine !== last && move && move.pixels === undefined) move.pixels = now - move.began;
        last = mine;
      }});
      const number = (text) => parseFloat(text.replace('−', '-'));
      const field = document.querySelector('.idaa-epsilon input');
      const meters = document.querySelector('.idaa-meters');
      const follow = () => {{
        const told = meters.textContent.match(/ε = ([0-9.e+-]+)/), move = state.at(-1);
        if (!told || !move || move.meters !== undefined) return;
        if (Math.abs(number(told[1]) / number(field.value) - 1) < 0.01)
          move.meters = performance.now() - move.began;
      }};
      new MutationObserver(follow).observe(
        meters, {{subtree: true, childList: true, characterData: true}});
      document.addEventListener('keydown', (event) => {{
        if (event.target.closest('.idaa-epsilon')) state.push({{began: event.timeStamp}});
      }}, true);
    }}""")
    for move in range(times):
        press(page)
        test = f"() => window.idaaMoves[{move}]?.pixels && window.idaaMoves[{move}]?.meters"
        until(page, lambda test=test: page.evaluate(test), f"pixels and meters of move {move + 1}")
    return page.evaluate("() => window.idaaMoves")


class Notebook:
    """One notebook in a JupyterLab tab of its own."""

    def __init__(self, context: Any, server: Server, name: str, fresh: bool = True) -> None:
        """Open it; with `fresh` in a new kernel, else in the one that it has, which may be busy."""
        if fresh:
            server.end_kernel(name)
        self.server, self.name = server, name
        self.page = context.new_page()
        self.faults = watch(self.page)
        # A workspace of its own: two tabs must not take each other's layout.
        workspace = f"lab/workspaces/{secrets.token_hex(4)}/tree/{name}.ipynb"
        self.page.goto(f"{server.url}{workspace}?reset&token={server.token}")
        states = ["idle"] if fresh else ["idle", "busy"]
        until(self.page, lambda: self._has_kernel(states), f"{name}: a kernel, {states}", 90)
        if self.page.locator("#jp-left-stack:not(.lm-mod-hidden)").count():
            self.page.keyboard.press("Control+b")  # room for the notebook

    def _has_kernel(self, states: list[str]) -> bool:
        """Named and in such a state for half a second: the indicator says idle before there is a
        kernel, and what is run then is lost."""
        return self.page.evaluate(
            """(states) => {
          const panel = document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden)');
          const name = panel?.querySelector('.jp-Toolbar-kernelName')?.textContent.trim();
          const indicator = panel?.querySelector('.jp-Notebook-ExecutionIndicator');
          const good = name && name !== 'No Kernel' && states.includes(indicator?.dataset.status);
          window.idaaGood = good ? window.idaaGood ?? performance.now() : null;
          return good && performance.now() - window.idaaGood > 500;
        }""",
            states,
        )

    def menu(self, menu: str, command: str) -> None:
        self.page.locator(f'.lm-MenuBar-itemLabel:text-is("{menu}")').click()
        self.page.locator(f'.lm-Menu-item[data-command="{command}"]').click()

    def run_all(self, wait: bool = True) -> None:
        self.menu("Run", "runmenu:run-all")
        self._wait_for_start()
        if wait:
            self.wait_for_end()

    def restart_and_run_all(self) -> None:
        self.menu("Run", "runmenu:restart-and-run-all")
        self.page.locator(".jp-Dialog .jp-mod-accept").click()
        self._wait_for_start()
        self.wait_for_end()

    def _wait_for_start(self) -> None:
        """What cells show of an earlier time is gone once they wait."""
        until(self.page, lambda: self.cells()["waiting"], f"{self.name}: cells that run")

    def save(self) -> None:
        path = self.server.folder / f"{self.name}.ipynb"
        before = path.stat().st_mtime_ns
        self.menu("File", "docmanager:save")

        def read_copy() -> Any:
            with contextlib.suppress(ValueError):  # half of it is there
                return path.stat().st_mtime_ns != before and json.loads(path.read_text("utf-8"))

        until(self.page, read_copy, f"{self.name}: saved")

    def wait_for_end(self, seconds: float = 120) -> None:
        """All cells ran and none failed.

        Raises:
            AssertionError: a cell failed; the message has its error.
        """

        def has_ended() -> bool:
            assert not (error := self.error_text()), f"{self.name}: {error}"
            cells = self.cells()
            return cells["count"] and cells["ran"] == cells["count"]

        until(self.page, has_ended, f"{self.name}: all cells run", seconds)

    def error_text(self) -> str:
        """The error at which the cells stopped; empty while they run, or ran."""
        cells = self.cells()
        # An error looks like any text on stderr; but after it the rest no longer waits.
        stop = not cells["waiting"] and cells["ran"] < cells["count"]
        return "\n".join(cells["stderr"]) if stop else ""

    def cells(self) -> dict[str, Any]:
        """How many code cells there are, ran, and wait or run; what they wrote to stderr."""
        return self.page.evaluate("""() => {
          const panel = document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden)');
          const cells = [...panel.querySelectorAll('.jp-CodeCell')];
          const prompts = cells.map((c) => c.querySelector('.jp-InputArea-prompt')?.textContent);
          const stderr = '[data-mime-type="application/vnd.jupyter.stderr"]';
          return {
            count: cells.length,
            ran: prompts.filter((prompt) => /\\[\\d+\\]/.test(prompt)).length,
            waiting: prompts.filter((prompt) => prompt?.includes('*')).length,
            stderr: [...panel.querySelectorAll(stderr)].map((e) => e.textContent),
          };
        }""")

    def close(self) -> None:
        self.page.close()


def picture_all(outputs: Path) -> None:
    """Screenshots of each page with the runs of `outputs`, such as those of `make demo`: a copy of
    them is shown, and trained into."""
    with tempfile.TemporaryDirectory() as name, chromium() as context:
        folder = Path(name)
        shutil.copytree(outputs, folder / "outputs", ignore=shutil.ignore_patterns("screenshots"))
        environment = {"IDAA_OUTPUTS": str(folder / "outputs")}
        with jupyter(folder, environment) as server:
            server.set("02_decompose", vae="starter", run="starter")  # what a newcomer sees
            explorer = Notebook(context, server, "02_decompose")
            explorer.page.set_viewport_size(TALL)
            explorer.run_all()
            show(explorer.page, ".idaa-explorer")
            drag(explorer.page, 0.6)
            meters_follow(explorer.page)
            explorer.page.wait_for_timeout(60_000)  # all of the curves
            show(explorer.page, ".idaa-explorer")
            shot(explorer.page, "docs_explorer")
            explorer.close()

            server.set("03_train_ssl", adversary="idaa", epochs=6, seed=1)
            training = Notebook(context, server, "03_train_ssl")
            training.run_all(wait=False)
            figures = training.page.locator(".idaa-live-figures")
            half = re.compile(r"epoch\s*4 of 6")
            until(training.page, lambda: figures.filter(has_text=half).count(), "epoch 4", 400)
            show(training.page, ".idaa-live")
            shot(training.page, "docs_training")
            training.page.locator(".idaa-live-stop").click()
            training.close()

            start = Notebook(context, server, "00_start_here")
            start.page.set_viewport_size(TALL)
            start.run_all()
            search = start.page.locator('.idaa-runs-table input[type="search"]')
            search.fill("ssl finished SimCLR validation")
            for row in start.page.locator(".idaa-runs-table tbody tr").all()[:3]:
                row.click()
            label = start.page.get_by_text("3 runs chosen")
            until(start.page, label.count, "three runs chosen")
            names = start.page.locator(".idaa-runs-curves svg text", has_text="vae")
            until(start.page, lambda: names.count() >= 3, "curves of three runs")
            show(start.page, ".idaa-runs")
            shot(start.page, "docs_runs")
            start.close()
        with app(folder, environment) as server:
            page = context.new_page()
            page.goto(server.address)
            page.get_by_role("link", name="ε explorer").click()
            meters_follow(page)
            drag(page, 0.55)
            meters_follow(page)
            shot(page, "docs_app")
            page.close()


if __name__ == "__main__":
    picture_all(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "outputs")
