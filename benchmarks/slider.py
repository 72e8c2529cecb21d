"""How soon after a move of the ε slider are the pixels and the meters new?

With networks of the paper's size (a VAE of width 64 and dim 512, an encoder of width 64; what they
learned does not matter to time), 16 images of 32 × 32 pixels:

in the kernel: a real IPython kernel sets the slider's value, and its callback the picture's; once
with nothing else to do, once while the background is never idle;
in the page: JupyterLab in Chromium, an arrow key to the decoded, different pixels and to the meters
that name the new ε; browser, server and kernel share the machine.

Run it on a quiet machine: `.venv/bin/python benchmarks/slider.py`. And
`.venv/bin/python benchmarks/slider.py opening`: how soon after opening notebook 02, without a run
of one's own, has the first move of the slider new pixels?
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import record

from idaa_lib.configs import DecomposeConfig, SSLConfig, VAEConfig
from idaa_lib.train import train_ssl, train_vae

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

IMAGES, WARM_UP = 16, 10
KERNEL_MOVES, PAGE_MOVES = 300, 30


def main() -> None:
    import browser

    if lacks := browser.missing():
        sys.exit(lacks)
    outputs = Path(tempfile.gettempdir()) / "idaa-slider"  # a second run finds its networks
    os.environ["IDAA_OUTPUTS"] = str(outputs)
    train_vae(VAEConfig(width=64, dim=512, epochs=1, limit=1000))
    train_ssl(SSLConfig(width=64, epochs=1, limit=256))
    kernel = in_kernel()
    page = in_page()
    rows = [
        *both("slider_kernel", kernel["idle"]),
        *both("slider_kernel_busy", kernel["busy"]),
        *both("slider_to_pixels", [move["pixels"] for move in page]),
        *both("meters", [move["meters"] for move in page]),
    ]
    for row in rows:
        print(f"{row['what']:<32}{row['value']:>8.1f} ms  n = {row['n']}")
    protocol = (
        f"{IMAGES} images of 32 px, VAE of width 64 and dim 512, ResNet-18 of width 64, "
        f"{kernel['threads']} threads of torch; IDAA, ε in steps of 0.01 of log10. slider_kernel: "
        f"in an IPython kernel, from setting the slider's value to the picture's value set, after "
        f"{WARM_UP} moves, all work in the background done before each; slider_kernel_busy: the "
        f"same while the background measures without end, 0.09 to 0.3 s between moves. "
        f"slider_to_pixels, meters: JupyterLab in headless Chromium on the same machine, from the "
        f"arrow key's event to decoded pixels that differ, and to meters that name the slider's "
        f"ε, after {WARM_UP} moves, the curves over ε drawn before. spread: smallest and largest."
    )
    print(record.write("slider", protocol, rows))


def measure_opening(times: int = 3) -> str:
    """Where the seconds from opening notebook 02 to the pixels of a first move were written."""
    import browser

    if lacks := browser.missing():
        sys.exit(lacks)
    pictures, moves = [], []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as name, browser.chromium() as context:
            folder = Path(name)
            with browser.jupyter(folder, {"IDAA_OUTPUTS": str(folder / "outputs")}) as server:
                start = time.monotonic()
                notebook = browser.Notebook(context, server, "02_decompose")
                notebook.run_all(wait=False)
                first = browser.picture(notebook.page)
                pictures.append(time.monotonic() - start)
                browser.show(notebook.page, ".idaa-explorer")
                browser.press(notebook.page, times=5)
                browser.picture(notebook.page, first)
                moves.append(time.monotonic() - start)
    rows = []
    for what, seconds in (("opening_to_pictures", pictures), ("opening_to_first_move", moves)):
        spread = [round(min(seconds), 1), round(max(seconds), 1)]
        rows.append(record.row(what, round(median(seconds), 1), "s", times, spread))
    protocol = (
        "The starter's networks and images, no run of one's own. From opening notebook 02 in "
        "JupyterLab (its server runs, Chromium is new and empty) over its kernel's start and "
        "Run All Cells to the first picture of x′, and to pixels that differ after five steps "
        "of the slider by keyboard (the kernel first runs the cells below). spread: smallest and "
        "largest."
    )
    return str(record.write("opening", protocol, rows))


def both(name: str, values: list[float]) -> list[dict[str, Any]]:
    """Rows of the median and of the 95th percentile (nearest rank), in ms."""
    ordered = sorted(values)
    n = len(ordered)
    spread = [round(ordered[0], 1), round(ordered[-1], 1)]
    p95 = ordered[-(-95 * n // 100) - 1]
    return [
        record.row(f"{name}_median_ms", round(median(ordered), 1), "ms", n, spread),
        record.row(f"{name}_p95_ms", round(p95, 1), "ms", n, spread),
    ]


def in_kernel() -> dict[str, Any]:
    """`moves()` in a kernel of its own: what a widget sends is sent there."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", cwd=str(Path(__file__).parent))
    texts: list[str] = []

    def listen(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
            texts.append(message["content"]["text"])
        elif message["msg_type"] == "error":
            sys.exit("\n".join(message["content"]["traceback"]))

    try:
        code = "import json, slider; print(json.dumps(slider.moves()))"
        client.execute_interactive(code, output_hook=listen, timeout=900)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return json.loads("".join(texts))


def moves() -> dict[str, Any]:
    """Milliseconds of the slider's callback, for each move. Runs inside a kernel."""
    import torch

    from idaa_lib.identity.scene import read
    from idaa_lib.lab.explorer import Explorer

    explorer = Explorer(DecomposeConfig(images=IMAGES))
    if explorer.status.value:
        raise RuntimeError(explorer.status.value)
    explorer.show()
    background, picture, slider = (
        explorer._background,
        explorer.picture.image,
        explorer.epsilon.slider,
    )

    def move() -> float:
        before, step = picture.value, random.choice((-0.01, 0.01))
        # Back and forth within the slider's range, never to the value that it has.
        target = min(max(slider.value * 10**step, 1e-2), 1.0)
        if abs(target / slider.value - 1) < 1e-6:
            target = 0.1
        start = time.perf_counter()
        slider.value = target
        seconds = time.perf_counter() - start
        if picture.value == before:
            raise RuntimeError(f"ε = {target:g} brought no new picture: {explorer.status.value}")
        return 1e3 * seconds

    random.seed(0)
    if not background.settle(timeout=600):  # the curves over ε
        raise RuntimeError("the curves over ε were not drawn within 10 minutes")
    times: dict[str, Any] = {"threads": torch.get_num_threads(), "idle": [], "busy": []}
    for n in range(WARM_UP + KERNEL_MOVES):
        value = move()
        background.settle()
        if n >= WARM_UP:
            times["idle"].append(value)
    engine = explorer.engine
    assert engine is not None
    # A unit of work as the curves are made of, again and again.
    background.request("curves", lambda: bool(read(engine.scene, engine.witness, "idaa", 0.5)))
    for n in range(WARM_UP + KERNEL_MOVES):
        time.sleep(random.uniform(0.09, 0.3))  # within, or after, the rest that moves ask for
        value = move()
        if n >= WARM_UP:
            times["busy"].append(value)
    background.request("curves", lambda: False)  # in its place
    return times


def in_page() -> list[dict[str, float]]:
    """Milliseconds to `pixels` and to `meters`, for each move."""
    import browser

    with tempfile.TemporaryDirectory() as name, browser.chromium() as context:
        environment = {"IDAA_OUTPUTS": os.environ["IDAA_OUTPUTS"]}
        with browser.jupyter(Path(name), environment) as server:
            server.set("02_decompose", images=IMAGES)
            notebook = browser.Notebook(context, server, "02_decompose")
            notebook.run_all()
            page = notebook.page
            browser.show(page, ".idaa-explorer")
            browser.meters_follow(page)
            latest: dict[str, Any] = {"curves": "", "since": time.monotonic()}

            def is_at_rest() -> bool:
                """The curves have been the same for so long that they are whole."""
                now = page.locator(".idaa-curves").inner_html()
                if now != latest["curves"]:
                    latest.update(curves=now, since=time.monotonic())
                return time.monotonic() - latest["since"] > 20

            browser.until(page, is_at_rest, "curves over ε that are whole", 600)
            return browser.moves(page, WARM_UP + PAGE_MOVES)[WARM_UP:]


if __name__ == "__main__":
    if sys.argv[1:] == ["opening"]:
        print(measure_opening())
    else:
        main()
