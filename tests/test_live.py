"""The training panel without a browser: a process of its own, requests, and what is shown."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import outcome
from PIL import Image
from test_runs_page import made

from idaa_lib import runs
from idaa_lib.configs import SemiConfig, SSLConfig, VAEConfig
from idaa_lib.lab import kernel, live, process
from idaa_lib.lab.live import Panel
from idaa_lib.lab.process import look, start
from idaa_lib.results import full_name
from idaa_lib.runs import RunError, Stopped, checkpoints, machine
from idaa_lib.train import locate, samples, train_vae
from idaa_lib.train.loop import Fit
from idaa_lib.views import denormalise

TINY = {"limit": 96, "batch_size": 16, "epochs": 2, "width": 4, "log_every": 1, "device": "cpu"}
VAE = VAEConfig(**TINY, dim=8)
LONG = VAE.model_copy(update={"epochs": 4000, "checkpoint_every": 10})


@pytest.fixture
def outputs(outputs):
    """As every test's, and no process outlives the test."""
    yield outputs
    for path in outputs.rglob("process.json"):
        about = json.loads(path.read_text())
        if machine.is_alive(about["pid"], about["born"]):
            os.kill(about["pid"], signal.SIGKILL)
        if child := process._children.pop(about["pid"], None):
            child.wait(30)


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


def wait_for_steps(run):
    """Wait until some steps were logged."""
    until(lambda: look(run).word == "going" and len(run.metrics()) > 5)
    return run


def pid_of(run):
    return json.loads((run.path / "process.json").read_text())["pid"]


def vertices(panel, key):
    """How many points the line of `key` has in the panel's drawing."""
    (line,) = re.findall(rf'<g id="{key}">\s*<path d="([^"]*)"', panel.curves.value)
    return len(re.findall("[ML]", line))


# --- the process ------------------------------------------------------------------------------


def test_a_killed_process_leaves_a_run_that_ends_like_one_that_was_not(outputs):
    config = VAE.model_copy(update={"epochs": 20})
    run = wait_for_steps(start(config))
    assert os.getsid(pid_of(run)) == pid_of(run) != os.getsid(0)
    os.kill(pid_of(run), signal.SIGKILL)
    until(lambda: look(run).word == "interrupted")
    assert run.state["state"] == "interrupted"
    assert "process was killed" in look(run).reason
    first = pid_of(run)
    assert start(config) == run
    assert pid_of(run) != first
    until(lambda: run.finished)
    repeat = outcome(run)
    shutil.rmtree(run.path)
    result = outcome(train_vae(config))
    assert all(torch.equal(result[0][k], repeat[0][k]) for k in result[0])
    assert result[1] == repeat[1]


def test_a_zombie_and_a_later_process_of_the_same_number_are_not_alive():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    birth = machine.birth(child.pid)
    assert machine.is_alive(child.pid, birth)
    assert not machine.is_alive(child.pid, birth - 3600)
    child.kill()
    until(lambda: not machine.is_alive(child.pid, birth), 30)  # nobody has waited for it yet
    child.communicate()
    assert machine.birth(child.pid) is None


def test_two_starts_make_one_process(outputs):
    """At once in this kernel, and from a kernel that knows nothing of it."""
    config, starts = LONG, []
    threads = [threading.Thread(target=lambda: starts.append(start(config))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({run.path for run in starts}) == 1
    first = pid_of(starts[0])
    code = (
        "import json, sys; from idaa_lib import VAEConfig; from idaa_lib.lab import process\n"
        "run = process.start(VAEConfig(**json.loads(sys.argv[1])))\n"
        "print(process.look(run).word, len(process._children))"
    )
    command = [sys.executable, "-c", code, config.model_dump_json()]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert output.split() in (["starting", "0"], ["going", "0"])
    assert pid_of(wait_for_steps(starts[0])) == first == starts[0].state["pid"]


def test_one_that_another_process_trains_is_attached_to(outputs):
    """Started in a terminal: the refusal of a second writer is no failure of the run."""
    words = [f"{k}={v}" for k, v in TINY.items()] + ["dim=8", "epochs=4000"]
    rival = subprocess.Popen(
        [sys.executable, "-m", "idaa_lib.train", "vae", *words], stdout=subprocess.DEVNULL
    )
    try:
        run = start(VAE.model_copy(update={"epochs": 4000}))  # before that one has the lock
        ours = process._children[pid_of(run)]
        until(lambda: ours.poll() is not None or rival.poll() is not None)
        wait_for_steps(run)
        assert run.state["pid"] == (rival.pid if rival.poll() is None else ours.pid)
        panel = Panel(run)
        assert panel.status.value == ""
        assert not panel.buttons["pause"].disabled
    finally:
        rival.kill()
        rival.wait()


def test_a_start_that_fails_says_why(outputs, tmp_path):
    """The images vanish between the look and the process."""
    folder = tmp_path / "pictures"
    for split in ("train", "test"):
        (folder / split / "one").mkdir(parents=True)
        for i in range(40):
            pixels = np.full((32, 32, 3), i * 3, np.uint8)
            pixels[0, 0] = (1, 2, 3 if split == "train" else 4)
            Image.fromarray(pixels).save(folder / split / "one" / f"{i}.png")
    config = VAE.model_copy(update={"dataset": str(folder), "limit": None})
    full_config, run = process.stages.settle(config)
    shutil.rmtree(folder)
    process.launch(run, full_config)
    panel = Panel(run)
    until(lambda: look(run).word != "starting")
    panel.refresh()
    assert look(run).word == "failed"
    assert str(folder) in look(run).reason
    assert str(folder) in panel.status.value
    assert "Traceback" not in panel.status.value
    assert not panel.buttons["start"].disabled


# --- the panel --------------------------------------------------------------------------------


def test_pause_holds_the_step_resume_goes_on_and_stop_stops(outputs):
    run = start(LONG)
    panel = Panel(run)
    assert panel.buttons["start"].disabled
    wait_for_steps(run)
    panel.refresh()
    choices = lambda: {n for n, b in panel.buttons.items() if not b.disabled}  # noqa: E731
    assert choices() == {"pause", "stop"}

    panel.buttons["pause"].click()
    until(lambda: look(run).word == "paused")
    panel.refresh()
    assert choices() == {"resume", "stop"}
    assert "paused" in panel.figures.value
    count = len(run.metrics())
    time.sleep(1)
    assert len(run.metrics()) == count

    panel.buttons["resume"].click()
    until(lambda: len(run.metrics()) > count)
    panel.buttons["stop"].click()
    until(lambda: look(run).word == "interrupted")
    panel.refresh()
    assert choices() == {"start"}
    assert panel.status.value == ""
    step = run.metrics()[-1]["step"]
    assert checkpoints.load(run)[1]["step"] == step

    panel.buttons["start"].click()
    until(lambda: run.metrics()[-1]["step"] > step)
    assert [line["step"] for line in run.metrics() if "loss" in line] == list(
        range(1, 1 + sum("loss" in line for line in run.metrics()))
    )


def test_every_reading_is_shown_also_to_who_comes_late(outputs):
    """1,500 of them: from 1,000 on matplotlib would leave some out."""
    run = train_vae(VAE)
    witness, log = Panel(run), run.path / "metrics.jsonl"
    log.unlink()
    for part in range(3):
        with log.open("a") as file:
            for step in range(500 * part, 500 * (part + 1)):
                line = {"step": step + 1, "epoch": step // 750, "loss": step % 7, "lr": 1.0}
                line |= {"reconstruction_val": 1 / (step + 1)} if step % 5 == 0 else {}
                file.write(json.dumps(line) + "\n")
        witness.refresh()
    latecomer = Panel(run)
    for panel in (witness, latecomer):
        assert vertices(panel, "loss") == vertices(panel, "lr") == 1500
        assert vertices(panel, "reconstruction_val") == 300
        assert "1,500 readings" in panel.figures.value
        assert "finished" in panel.figures.value
    assert witness.curves.value == latecomer.curves.value
    assert "#1f2328" not in latecomer.curves.value  # its ink is the page's


def test_nothing_is_sent_that_did_not_change(outputs):
    run = train_vae(VAE)
    panel, changes = Panel(run), []
    for widget in (panel.figures, panel.curves, panel.status, panel.progress, panel.samples.image):
        widget.observe(changes.append, "value")
    for _ in range(3):
        panel.refresh()
    assert not changes


def test_the_panel_follows_a_log_that_grows_and_is_rewound(outputs):
    run = runs.run_for(VAE, "pixels")
    run.path.mkdir(parents=True)
    runs.write_json(run.path / "config.json", VAE.model_dump(mode="json"))
    panel, path = Panel(run), run.path / "metrics.jsonl"
    assert panel.lines == []

    def write(text):
        path.write_text(text)
        panel.refresh()
        return [line["value"] for line in panel.lines]

    def log(*values):
        lines = [json.dumps({"step": s, "value": v}) + "\n" for s, v in enumerate(values, 1)]
        return "".join(lines)

    assert write(log(0, 0) + '{"step": 3, "va') == [0, 0]  # half a line is being written
    assert write(log(0, 0, 0, 0)) == [0, 0, 0, 0]
    assert write(log(0, 0, 0, 9)) == [0, 0, 0, 9]  # as long as before
    assert write(log(0, 0)) == [0, 0]
    assert write(log(0, 0) + "3, 9\n") == [0, 0]
    assert "line 3 is no reading" in panel.status.value and "step" in panel.figures.value
    assert write(log(0, 0, 5)) == [0, 0, 5]
    assert panel.status.value == ""


def test_a_failed_run_says_why(outputs):
    config = VAE.model_copy(update={"learning_rate": 1e30})
    run = start(config)
    until(lambda: look(run).word == "failed")
    panel = Panel(run)
    assert "lower learning_rate" in panel.status.value
    assert not panel.buttons["start"].disabled
    assert panel.buttons["stop"].disabled


# --- what is trained on -----------------------------------------------------------------------


def tiles(run):
    """The rows of the run's picture by label, (images, 32, 32, 3) in [0, 1]."""
    with Image.open(run.path / "samples" / "latest.png") as picture:
        rows, grid = json.loads(picture.info["rows"]), np.asarray(picture) / 255
    images = grid.reshape(len(rows), 33, -1, 33, 3).transpose(0, 2, 1, 3, 4)
    assert np.all(grid[32::33] == 1) and np.all(grid[:, 32::33] == 1)
    return dict(zip(rows, images[:, :, :32, :32], strict=True))


def cells(pixels):
    return pixels[:8].clamp(0, 1).permute(0, 2, 3, 1).numpy()


def test_the_picture_is_what_the_loop_saw(outputs, monkeypatch):
    pictures, original = [], Fit.train_step

    def step(self, *args):
        values = original(self, *args)
        pictures.append(self._last.pictures)
        return values

    monkeypatch.setattr(Fit, "train_step", step)
    run = train_vae(VAE)
    picture, batch = tiles(run), pictures[-1]
    assert list(picture) == ["x", "G(x)", "R(x), × 3"]
    data = process.stages._plan(VAE).data
    to_pixels = lambda x: denormalise(x, data.mean, data.std)  # noqa: E731
    half = 0.5 / 255 + 1e-6
    for row in ("x", "G(x)"):
        assert np.abs(picture[row] - cells(to_pixels(batch[row]))).max() <= half
    residual = 0.5 + 3 * (to_pixels(batch["x"]) - to_pixels(batch["G(x)"]))
    assert np.abs(picture["R(x), × 3"] - cells(residual)).max() <= half
    assert not batch["G(x)"].requires_grad


@pytest.mark.parametrize("adversary", ["none", "clae", "idaa"])
def test_an_attack_is_shown_beside_the_views(outputs, adversary):
    if adversary == "idaa":
        train_vae(VAE)
    config = SSLConfig(**TINY, projection_dim=8, adversary=adversary)
    run = process.stages.train(config)
    rows = {
        "none": ["view 1", "view 2"],
        "clae": ["view 1", "view 2", "x′", "x′ − x, × 3"],
        "idaa": ["view 1", "view 2", "G(x)", "x′", "x′ − x, × 3"],
    }
    picture = tiles(run)
    assert list(picture) == rows[adversary]
    if adversary != "none":
        change = 0.5 + 3 * (picture["x′"] - picture["view 1"])
        mask = (picture["x′"] > 0) & (picture["x′"] < 1) & (change > 0) & (change < 1)
        assert np.abs((picture["x′ − x, × 3"] - change)[mask]).max() <= 4 / 255
        assert np.abs(change - 0.5).max() > 0
    state = run.state
    assert state["memory"]["resident"] > 100  # MiB: torch alone is more
    assert state["seconds_left"] == 0
    assert any(line.get("images_per_second", 0) > 0 for line in run.metrics())
    panel = Panel(run)
    assert panel.samples.rows == tuple(rows[adversary])
    assert panel.samples.image.value == samples.grid([*samples.read(run).values()], form="webp")


def test_large_images_make_a_picture_of_a_bounded_width(outputs):
    run = runs.run_for(VAE, "pixels")
    run.path.mkdir(parents=True)
    samples.write(run, {"x": torch.rand(16, 3, 224, 224)}, (0.0,) * 3, (1.0,) * 3)
    with Image.open(run.path / "samples" / "latest.png") as picture:
        assert picture.size == (4 * 225, 225)


# --- the notebook's cell ----------------------------------------------------------------------


def test_unattended_it_trains_in_the_foreground(outputs, monkeypatch, capsys):
    monkeypatch.setattr(live, "start", lambda config: pytest.fail("a process was started"))
    assert not kernel.is_attended()
    run = live.train(VAE)
    assert run.finished
    assert not (run.path / "process.json").exists()
    assert "step 12/12" in capsys.readouterr().out


def test_a_record_has_an_interval_in_the_line_of_its_accuracy(outputs, monkeypatch):
    """Of each stage and split: no end of one is a line of its own, and no name is a key."""
    parts = []
    monkeypatch.setattr(live, "display", parts.append)
    for config, key, split in (
        (SSLConfig(), "knn", "_val"), (SemiConfig(), "ema", "_val"), (SemiConfig(), "ema", ""),
    ):  # fmt: skip
        figures = {f"{key}_{end}{split}": value for end, value in
                   (("top1", 41.25), ("low", 36.5), ("high", 46.0))}  # fmt: skip
        run = made(config, figures, f"pixels{split}", lines=[{"step": 1, "epoch": 0, "loss": 2.0}])
        live.leave_record(run)
        lines = dict(parts[-2][full_name(run)])
        (name,) = (name for name, text in lines.items() if text == "41.25 [36.5, 46]")
        assert name.endswith("top-1 (%)") and not any("_" in name for name in lines)


@pytest.mark.parametrize("value", [1e-30, 0.0123456, 7.0, 999.96, 1e3, 123456.7, 1e9, 1e30, -1e12])
def test_a_figure_is_short_and_near_its_value(value):
    text = live.write_value(value)
    assert float(text.replace(",", "")) == pytest.approx(value, rel=6e-4)
    assert len(text) <= 11


def test_attended_the_cell_waits_for_the_finished_run(outputs, monkeypatch, capsys):
    monkeypatch.setattr(live, "is_attended", lambda: True)
    parts = []
    monkeypatch.setattr(live, "display", parts.append)
    run = live.train(VAE)
    assert run.finished
    assert pid_of(run) != os.getpid()
    _, ui, *record = parts
    assert "finished" in ui.children[3].value
    assert "panel below is for a page with its kernel" in capsys.readouterr().out
    live._panels[run.path].close()
    parts.clear()
    assert live.train(VAE) == run
    assert "is finished: showing its result" in capsys.readouterr().out
    for table, picture in (record, parts):
        values = table[full_name(run)]
        assert values["state"] == "finished"
        reading = run.metrics()[-1]["reconstruction_val"]
        assert values["validation reconstruction (MSE)"] == f"{reading:.4g}"
        assert values["rate (nats per image)"] == f"{run.summary['rate_nats']:.4g}"
        assert picture.data == (run.path / "figures" / "curves.png").read_bytes()


@pytest.fixture
def interruptible():
    """As a kernel is: a shell's background job, and what it starts, ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_stop_and_an_interrupt_are_one_sentence_each(outputs, monkeypatch, interruptible):
    display, run = threading.Event(), locate(LONG)
    monkeypatch.setattr(live, "is_attended", lambda: True)
    records = []
    monkeypatch.setattr(live, "display", lambda part: records.append(part) or display.set())

    def start_thread(act):
        """Once the cell shows its panel: a stop before it looks would make it start anew."""
        display.clear()

        def wait_and_act():
            assert display.wait(120)
            wait_for_steps(run)
            act()

        thread = threading.Thread(target=wait_and_act)
        thread.start()
        return thread

    waiter = start_thread(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped, match="goes on in a process of its own: run this cell again"):
        live.train(LONG)
    waiter.join()
    assert look(run).word == "going"
    first = pid_of(run)
    waiter = start_thread(lambda: live._panels[run.path].buttons["stop"].click())
    with pytest.raises(Stopped, match=r"was stopped after step \d+ of 24000 and saved"):
        live.train(LONG)
    waiter.join()
    assert pid_of(run) == first
    live._panels[run.path].close()
    assert records[-2][full_name(run)]["state"] == "interrupted"  # a table, then a picture

    config = VAE.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(RunError, match=r"failed\. .*lower learning_rate"):
        live.train(config)
    live._panels[locate(config).path].close()


CELL = """
from idaa_lib import VAEConfig
from idaa_lib.lab import kernel, live
print("attended", kernel.is_attended())
live.train(VAEConfig(**{fields!r}))
"""


def until_idle(client, request):
    """What the kernel says until it is done with this request: its texts (also of widgets) and the
    kinds of its messages."""
    texts, kinds = "", []
    while True:
        message = client.get_iopub_msg(timeout=60)
        content, kind = message["content"], message["msg_type"]
        state = content.get("data", {}).get("state", {}) if kind == "comm_msg" else {}
        texts += content.get("text", "") + str(state.get("value", ""))
        kinds.append(kind)
        is_reply = message["parent_header"].get("msg_id") == request
        if is_reply and content.get("execution_state") == "idle":
            return texts, kinds


@pytest.mark.parametrize("stdin", [True, False])
def test_who_can_be_asked_for_input_is_in_front_of_the_kernel(outputs, stdin):
    """A page like JupyterLab's and one like papermill's; the kernel's death takes no run along."""
    from jupyter_client.manager import start_new_kernel

    config = LONG if stdin else VAE
    fields = {k: v for k, v in config if v is not None}
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        client.execute(CELL.format(fields=fields), allow_stdin=stdin)
        run = locate(config)
        if stdin:
            wait_for_steps(run)
        else:
            until(lambda: run.finished)
        output = ""
        deadline = time.monotonic() + 60
        while "attended" not in output and time.monotonic() < deadline:
            message = client.get_iopub_msg(timeout=60)
            output += message["content"].get("text", "")
        assert f"attended {stdin}" in output
        if stdin:
            request = client.execute("print('the cell below')")
            manager.interrupt_kernel()
            texts, kinds = until_idle(client, request)
            assert "No longer waiting for" in texts and "The cells below did not run." in texts
            assert "error" not in kinds and "the cell below" not in texts
            assert look(run).word == "going"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert (run.path / "process.json").exists() is stdin
    if stdin:
        steps = len(run.metrics())
        until(lambda: len(run.metrics()) > steps)
        assert Panel(run).status.value == ""


def test_while_the_cell_waits_its_buttons_are_answered_and_another_page_is_let_in(outputs):
    """What JupyterLab sends: clicks to a subshell, and who opens the notebook anew says hello."""
    from jupyter_client.manager import start_new_kernel
    from jupyter_client.session import Session

    manager, client = start_new_kernel(kernel_name="python3")
    page = manager.client()
    page.session = Session(key=manager.session.key)
    try:
        client.control_channel.send(client.session.msg("create_subshell_request"))
        subshell = client.get_control_msg(timeout=60)["content"]["subshell_id"]
        fields = {k: v for k, v in LONG if v is not None}
        client.execute(CELL.format(fields=fields), allow_stdin=True)
        request = client.execute("print('the cell below')", allow_stdin=True)
        run, comm = locate(LONG), None
        while comm is None:
            message = client.get_iopub_msg(timeout=60)
            if message["msg_type"] == "comm_open":
                state = message["content"]["data"]["state"]
                comm = (
                    message["content"]["comm_id"] if state.get("description") == "pause" else None
                )
        wait_for_steps(run)
        click = {"method": "custom", "content": {"event": "click"}}
        message = client.session.msg("comm_msg", {"comm_id": comm, "data": click})
        message["header"]["subshell_id"] = subshell
        client.shell_channel.send(message)
        until(lambda: look(run).word == "paused", 30)
        page.start_channels()
        page.kernel_info()
        texts, kinds = until_idle(client, request)
        assert "No longer waiting for" in texts and "error" not in kinds
        assert "opened anew while its cell waited" in texts  # in the panel, which outlives the cell
        assert "the cell below" not in texts
        assert look(run).word == "paused"
        assert page.get_shell_msg(timeout=60)["msg_type"] == "kernel_info_reply"
    finally:
        client.stop_channels()
        page.stop_channels()
        manager.shutdown_kernel(now=True)
