"""The workbench in a real browser: JupyterLab, the pages of `make app`, and the report.

What a test sees is decoded pixels and text, never a mere change of an image's address. Each page's
screenshot stays in outputs/screenshots/. Nothing is asserted of time: benchmarks/slider.py measures
that.
"""

import os
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from statistics import median

import browser
import numpy as np
import psutil
import pytest
from conftest import REQUIRED
from PIL import Image
from test_runs_page import made

from idaa_lib import results, runs
from idaa_lib.configs import DecomposeConfig, SSLConfig, VAEConfig
from idaa_lib.train import train_ssl, train_vae

# One server and one browser serve the module; on two workers each has its own, on ports of its own.
pytestmark = pytest.mark.xdist_group("browser")

SMALL = {"limit": 300, "width": 8, "batch_size": 32, "device": "cpu"}
TILE = 33  # 32 pixels and the white line


@pytest.fixture(scope="module")
def context():
    if reason := browser.missing():
        (pytest.fail if "browser" in REQUIRED else pytest.skip)(reason)
    with browser.chromium() as window:
        yield window


@pytest.fixture(scope="module")
def outputs(context, module_outputs):
    """Two VAEs, so that one can be changed for the other, and an encoder."""
    train_vae(VAEConfig(**SMALL, dim=8, epochs=1))
    train_vae(VAEConfig(**SMALL, dim=16, epochs=3))
    train_ssl(SSLConfig(**SMALL, epochs=1))
    return module_outputs


@pytest.fixture(scope="module")
def lab(outputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    with browser.jupyter(folder, {"IDAA_OUTPUTS": str(outputs)}) as server:
        yield server


@pytest.fixture(scope="module")
def app(outputs, tmp_path_factory):
    with browser.app(tmp_path_factory.mktemp("app"), {"IDAA_OUTPUTS": str(outputs)}) as server:
        yield server


@pytest.fixture(scope="module")
def opened(context, lab):
    """Notebook 02, all cells run."""
    notebook = browser.Notebook(context, lab, "02_decompose")
    notebook.run_all()
    yield notebook
    notebook.close()


@pytest.fixture
def explorer(opened):
    """Its page, at rest: the meters are those of the slider's ε."""
    browser.show(opened.page, ".idaa-explorer")
    browser.meters_follow(opened.page)
    return opened.page


def choose(page, name, index):
    """Another option of a dropdown, by its place."""
    page.locator(f".idaa-{name} select").select_option(index=index)


def test_notebook_02_runs_from_the_top(opened):
    page = opened.page
    size = 3 * TILE, DecomposeConfig().images * TILE, 3
    assert browser.picture(page).shape == size
    assert browser.picture(page, selector=".idaa-still").shape == size
    browser.meters_follow(page)
    curves = page.locator(".idaa-curves svg path")
    browser.until(page, lambda: curves.count() > 10, "curves over ε")
    assert browser.status(page) == ""
    browser.show(opened.page, ".idaa-explorer")
    browser.shot(page, "02_decompose")
    # no error, nothing that failed, nothing off this machine
    assert opened.faults == browser.Faults()


def test_keys_and_mouse_move_epsilon(explorer):
    picture, meters = browser.picture(explorer), browser.meters_follow(explorer)
    start, still = browser.epsilon(explorer), browser.pixels(explorer, ".idaa-still")
    browser.press(explorer, "ArrowRight")
    neighbour = browser.picture(explorer, other_than=picture)
    assert browser.epsilon(explorer) == pytest.approx(start * 10**0.01, rel=0.01)
    assert browser.meters_follow(explorer) != meters
    browser.press(explorer, "ArrowLeft")
    assert np.array_equal(browser.picture(explorer, other_than=neighbour), picture)

    browser.drag(explorer, 0.25)  # of 1e-3 … 10
    assert browser.epsilon(explorer) == pytest.approx(0.01, rel=0.2)
    browser.picture(explorer, other_than=picture)
    browser.meters_follow(explorer)  # at rest: on its way the handle showed other pictures
    weak_pixels, x = browser.pixels(explorer), browser.pixels(explorer, ".idaa-still")
    assert np.array_equal(x, still)  # x, G and R stay as they are
    # At a small ε, x′ is nearly x; at a large one it is not. The rows: x, … and x′ in the middle.
    distance = np.abs(rows(weak_pixels)[1].astype(int) - rows(x)[0]).mean()
    browser.drag(explorer, 1.0)
    browser.picture(explorer, other_than=weak_pixels)
    browser.meters_follow(explorer)
    strong_pixels = browser.pixels(explorer)
    assert distance < 2 < np.abs(rows(strong_pixels)[1].astype(int) - rows(x)[0]).mean()


def type_epsilon(page, text):
    page.locator(".idaa-epsilon input").fill(text)
    page.keyboard.press("Enter")


def test_epsilon_is_typed_exactly(explorer):
    handle = explorer.locator(".idaa-epsilon .noUi-handle")
    for text, epsilon in (("8/255", 8 / 255), ("0,05", 0.05), (".123", 0.123)):
        type_epsilon(explorer, text)
        browser.meters_follow(explorer)
        # The slider's place follows, and does not take the number to its nearest step.
        place = f"ε = {float(f'{10 ** round(np.log10(epsilon), 2):.3g}'):g}"
        browser.until(explorer, lambda place=place: handle.get_attribute("aria-valuetext") == place,
                      f"the slider at {place}")  # fmt: skip
        assert explorer.locator(".idaa-epsilon input").input_value() == text
        assert browser.measured_at(explorer) == pytest.approx(epsilon, rel=1e-5)
    before = browser.pixels(explorer)
    type_epsilon(explorer, "20")
    problem = explorer.locator(".idaa-bad-status [role=alert]")
    browser.until(explorer, problem.count, "what is wrong with 20")
    assert "from 0.001 to 10" in problem.inner_text() and "20" in problem.inner_text()
    assert explorer.locator(".idaa-epsilon.idaa-bad").count() == 1
    assert np.array_equal(browser.pixels(explorer), before)
    type_epsilon(explorer, "0.1")
    browser.until(explorer, lambda: not problem.count(), "nothing that is wrong")
    browser.meters_follow(explorer)


def test_each_image_has_its_verdict_and_a_click_enlarges_it(explorer):
    marks = explorer.locator(".idaa-kept, .idaa-lost")
    browser.until(explorer, marks.count, "marks below the images")
    texts = [mark.split() for mark in marks.all_text_contents()]
    assert len(texts) == DecomposeConfig().images
    assert all((sign == "✓") == (rank == "1") for sign, rank in texts)
    share = 100 * sum(sign == "✓" for sign, _ in texts) / len(texts)
    assert f"{share:.0f} % of {len(texts)} images" in browser.text_of(explorer, ".idaa-meters")
    verdict = lambda: browser.text_of(explorer, ".idaa-verdict")  # noqa: E731
    browser.until(explorer, lambda: "95 %" in verdict() or "No ε" in verdict(), "a verdict", 120)
    explorer.locator(".idaa-still").click(position={"x": 2.5 * 2 * TILE, "y": 2.5 * 2 * TILE})
    enlargement = browser.picture(explorer, selector=".idaa-large")
    x = rows(browser.pixels(explorer, ".idaa-still"))[0]
    assert np.array_equal(enlargement[:, :TILE], x[:, 2 * TILE : 3 * TILE])
    choose(explorer, "chosen", 0)
    # A person without eyes hears what the picture is; no tooltip says "null".
    images = explorer.locator("img.idaa-pixels[src]:visible")
    assert all(images.evaluate_all("all => all.map((e) => e.alt)"))
    assert explorer.locator('.idaa-explorer [title="null"]:visible').count() == 0


def rows(picture):
    """A grid's rows (R, 33, W, 3)."""
    return picture.reshape(-1, TILE, *picture.shape[1:])


def test_thirty_moves_each_bring_new_pixels_and_their_meters(explorer):
    browser.drag(explorer, 0.4)
    browser.meters_follow(explorer)
    before, start = browser.picture(explorer), browser.epsilon(explorer)
    moves = browser.moves(explorer, 30)
    assert len(moves) == 30
    for name in ("pixels", "meters"):
        print(f"{name}: median {median(move[name] for move in moves):.0f} ms of {len(moves)}")
    assert browser.epsilon(explorer) == pytest.approx(start * 10 ** (30 * 0.01), rel=0.01)
    browser.meters_follow(explorer)
    assert not np.array_equal(browser.picture(explorer), before)
    assert browser.status(explorer) == ""


def test_another_vae_is_another_picture(explorer):
    x = rows(browser.pixels(explorer, ".idaa-still"))[0]
    before = browser.picture(explorer)
    index = explorer.locator(".idaa-vae select").evaluate("e => e.selectedIndex")
    choose(explorer, "vae", 1 - index)
    still = browser.pixels(explorer, ".idaa-still")
    browser.picture(explorer, other_than=before)
    browser.until(explorer, lambda: browser.status(explorer) == "", "the other VAE, shown")
    still = rows(browser.pixels(explorer, ".idaa-still"))
    assert np.array_equal(still[0], x)  # the same images
    choose(explorer, "vae", index)
    match = browser.until(
        explorer,
        lambda: np.array_equal(browser.pixels(explorer), before),
        "the first VAE's picture again",
    )
    assert match


def test_an_uploaded_image_is_the_first(explorer, tmp_path):
    tiles = rows(browser.pixels(explorer, ".idaa-still"))[0]
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(image).save(tmp_path / "mine.png")
    upload_large(explorer, tmp_path / "mine.png")

    def first():
        still = browser.pixels(explorer, ".idaa-still")
        return still is not None and np.abs(still[:32, :32].astype(int) - image).max() <= 1

    browser.until(explorer, first, "the uploaded image in the first column")
    x = rows(browser.pixels(explorer, ".idaa-still"))[0]
    assert not np.array_equal(x[:32, :32], tiles[:32, :32])
    browser.meters_follow(explorer)
    browser.shot(explorer, "02_upload")


def upload_large(page, path):
    """The file as one of 12 MiB, as photographs are: a server's default would drop it."""
    with path.open("ab") as file:
        file.write(bytes(12 * 2**20))  # what follows the image is not read
    with page.expect_file_chooser() as chooser:
        page.locator(".idaa-upload").click()
    chooser.value.set_files(path)


def test_save_writes_figures_and_the_code_that_makes_them(explorer, outputs):
    before = set((outputs / "explorer").glob("*/again.py"))
    explorer.locator(".idaa-keep").click()
    browser.until(explorer, lambda: "Saved" in browser.status(explorer), "saved")
    (code,) = set((outputs / "explorer").glob("*/again.py")) - before
    assert str(code.parent) in browser.status(explorer)
    assert list(code.parent.glob("*.png"))
    compile(code.read_text(), str(code), "exec")


def test_a_second_tab_shows_the_same_and_follows(context, lab, opened, explorer):
    type_epsilon(explorer, "0.5")  # away from both ends
    browser.meters_follow(explorer)
    opened.save()
    tab = browser.Notebook(context, lab, "02_decompose", fresh=False)
    try:
        picture = browser.picture(explorer)
        copy = browser.picture(tab.page)
        assert np.array_equal(picture, copy)
        browser.press(explorer, "ArrowRight", 3)
        neighbour = browser.picture(explorer, other_than=picture)
        browser.until(
            tab.page,
            lambda: np.array_equal(browser.pixels(tab.page), browser.pixels(explorer)),
            "the second tab's picture, moved by the first tab's slider",
        )
        assert not np.array_equal(neighbour, picture)
        browser.press(tab.page, "ArrowLeft", 3)  # and the other way round
        browser.picture(explorer, other_than=neighbour)
    finally:
        tab.close()


def test_without_its_kernel_the_notebook_shows_figure_and_table(context, lab, opened, explorer):
    record = '[data-mime-type="image/png"] img'
    cell = opened.page.locator(".jp-CodeCell", has_text="Explorer(config)")
    browser.until(opened.page, cell.locator(record).count, "the record")
    assert not cell.locator(record).is_visible()  # widgets are there
    opened.save()
    shutil.copy(lab.folder / "02_decompose.ipynb", lab.folder / "02_later.ipynb")
    notebook = browser.Notebook(context, lab, "02_later")
    try:
        cell = notebook.page.locator(".jp-CodeCell", has_text="Explorer(config)")
        cell.scroll_into_view_if_needed()
        picture = cell.locator(record)
        browser.until(notebook.page, picture.is_visible, "the figure")
        assert picture.evaluate("e => e.naturalWidth") > 500
        assert "finds x itself" in cell.locator("table").inner_text()
        assert notebook.page.locator(".idaa-explorer").count() == 0
        absent = cell.get_by_text("displaying widget")
        browser.until(notebook.page, absent.count, "JupyterLab's note that the widget is gone")
        assert not absent.is_visible()
        browser.shot(notebook.page, "02_without_kernel")
    finally:
        notebook.close()


def test_it_works_after_restart_and_run_all(opened, explorer):
    opened.restart_and_run_all()
    browser.show(opened.page, ".idaa-explorer")
    before = browser.picture(explorer)
    browser.meters_follow(explorer)
    browser.press(explorer)
    browser.picture(explorer, other_than=before)
    browser.meters_follow(explorer)


def test_without_a_run_of_one_s_own_the_starter_follows_the_slider(context, lab, tmp_path):
    lab.copy("02_decompose", "02_alone", f'import os; os.environ["IDAA_OUTPUTS"] = "{tmp_path}"')
    notebook = browser.Notebook(context, lab, "02_alone")
    try:
        notebook.run_all(wait=False)
        first = browser.picture(notebook.page)
        browser.press(notebook.page, times=5)
        browser.picture(notebook.page, first)
        assert "starter" in browser.text_of(notebook.page, ".idaa-left-out")
        browser.shot(notebook.page, "02_without_a_run")
    finally:
        notebook.close()


def lines(page, column="id"):
    """The texts of a column of the runs page's table, as it stands."""
    return page.locator(f".idaa-runs-table tbody td.idaa-{column}").all_inner_texts()


def choose_runs(page, *selection):
    for run in selection:
        page.locator(".idaa-runs-table tbody tr", has_text=run.id[-8:]).first.click()


def test_the_start_page_sorts_searches_and_overlays_two(context, lab, outputs):
    notebook = browser.Notebook(context, lab, "00_start_here")
    try:
        notebook.run_all()
        page, vaes = notebook.page, runs.find("vae")
        browser.until(page, lambda: len(lines(page, "run")) == len(runs.list_runs()), "all runs")
        assert page.get_by_text("official Jupyter news").count() == 0  # the settings of `make lab`
        choose_runs(page, *vaes)
        names = results.labels(vaes)
        assert len(names) == 2

        def find_names():
            text = browser.text_of(page, ".idaa-runs-curves")
            return all(name in text for name in names) and text

        browser.until(page, find_names, f"curves of {' and '.join(names)}")
        assert page.locator(".idaa-runs-curves svg").count() == 1
        differences = browser.text_of(page, ".idaa-runs-diff")
        assert "dim" in differences and "epochs" in differences

        page.get_by_role("columnheader", name="differs from preset").click()

        def in_order():
            texts = lines(page, "differs")
            return texts == sorted(texts) and len({*texts}) > 1

        browser.until(page, in_order, "lines in order")
        page.locator('.idaa-runs-table input[type="search"]').fill("clae epsilon=0.3")
        browser.until(page, lambda: lines(page, "run") == [], "no line")
        # Search, order and choice stay while the table follows what happens.
        run = made(SSLConfig(adversary="clae", epsilon=0.3))
        browser.until(page, lambda: lines(page, "run") == [run.id[-8:]], "the new run alone")
        choose_runs(page, run)
        counter = page.locator(".idaa-runs-chosen")
        browser.until(page, lambda: "3 runs" in counter.inner_text(), "three runs chosen")
        page.locator('.idaa-runs-table input[type="search"]').fill("")
        browser.until(page, lambda: len(lines(page, "run")) == len(runs.list_runs()), "all lines")
        assert in_order()
        assert page.locator(".idaa-runs-table tr.selected").count() == 3
        browser.show(notebook.page, ".idaa-runs")
        browser.shot(page, "00_start_here")
        assert browser.status(page) == ""
        assert notebook.faults == browser.Faults()
    finally:
        notebook.close()


def test_a_training_is_left_and_attached_to_again(context, lab, outputs):
    # Long enough that it still goes when the tab is closed, also where the page is slow.
    values = SMALL | {"epochs": 16, "log_every": 1}
    lab.set("03_train_ssl", **values)
    notebook = browser.Notebook(context, lab, "03_train_ssl")
    try:
        notebook.run_all(wait=False)
        first = browser.until(notebook.page, lambda: readings(notebook.page), "first readings")
        browser.until(notebook.page, lambda: readings(notebook.page) > first, "further readings")
        browser.picture(notebook.page, selector=".idaa-live-samples")
        notebook.save()
    finally:
        notebook.close()
    (run,) = runs.find("ssl", finished=False, epochs=16)
    assert not run.finished  # nobody watches, and it goes on

    notebook = browser.Notebook(context, lab, "03_train_ssl", fresh=False)
    page = notebook.page
    try:
        browser.until(page, lambda: readings(page) > first, "readings in the new tab")
        browser.show(notebook.page, ".idaa-live")
        browser.shot(page, "03_training")
        browser.until(page, lambda: run.finished, "the end of the training", 180)
        lines = [line for line in run.metrics() if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))

        def full_curve():
            return len(points := vertices(page, "loss")) == len(lines) and points

        x, y = np.array(browser.until(page, full_curve, f"{len(lines)} points of the loss")).T
        # Each line of metrics.jsonl at its place: an SVG's y grows downwards.
        assert np.corrcoef(x, [line["step"] for line in lines])[0, 1] == pytest.approx(1, abs=1e-6)
        assert np.corrcoef(y, [line["loss"] for line in lines])[0, 1] == pytest.approx(-1, abs=1e-6)
        count = len(run.metrics())  # the last validation's line too
        browser.until(page, lambda: readings(page) == count, f"{count} readings")
        browser.shot(page, "03_finished")
        # The page that was left took the cells below the training along.
        assert "the cells below did not run" in browser.status(page)
        assert notebook.cells()["ran"] < notebook.cells()["count"]
        notebook.run_all()
        notebook.save()
    finally:
        notebook.close()

    notebook = browser.Notebook(context, lab, "03_train_ssl")  # in a kernel that knows nothing
    try:
        record = notebook.page.locator(f'.jp-RenderedHTMLCommon:has-text("{run.id[-8:]}")')
        browser.until(notebook.page, lambda: record.count(), "the table of the run")
        assert "finished" in record.first.text_content()
        image = ".jp-RenderedImage img"
        assert browser.picture(notebook.page, selector=image).std() > 10
        browser.show(notebook.page, image)
        browser.shot(notebook.page, "03_without_its_kernel")
    finally:
        notebook.close()


# In the kernel itself, where a run of so few steps takes a moment.
MAKE_HERE = """
import time
from idaa_lib import evaluate, sweeps, train_ssl
def make(config):
    time.sleep(4)
    return train_ssl(config) if config.stage == "ssl" else evaluate(config)
sweeps.Kernels.ensure = lambda kernels, config: make(config)
"""


def test_a_study_goes_on_in_a_page_that_is_opened_anew(context, lab):
    grid = {
        "fixed": {"all": {"limit": 100, "device": "cpu"}, "ssl": {"width": 8, "epochs": 1}},
        "cross": {"ssl": {"learning_rate": [1e-3, 2e-3, 3e-3]}},
    }
    grid["fixed"]["ssl"] |= {"batch_size": 32, "adversary": "none"}
    grid["fixed"]["eval"] = {"references": False}
    lab.copy("05_sensitivity", "05_anew", MAKE_HERE)
    lab.set("05_anew", grid=grid, jobs=1)
    notebook = browser.Notebook(context, lab, "05_anew")
    study = notebook.page.locator(".idaa-study")
    try:
        notebook.run_all(wait=False)
        browser.until(notebook.page, study.locator("svg").count, "a point on the curve", 120)
        notebook.save()
    finally:
        notebook.close()
    notebook = browser.Notebook(context, lab, "05_anew", fresh=False)
    study = notebook.page.locator(".idaa-study")
    try:
        sentences = ("the cells below did not run", "6 of 6 runs finished")
        for text in sentences:
            part = study.locator(f':text("{text}")')
            browser.until(notebook.page, part.count, f"the study in the new page: {text}", 120)
        rows = study.locator("tbody tr")
        browser.until(notebook.page, lambda: rows.count() == 3, "a row for each run")
        browser.show(notebook.page, ".idaa-study")
        browser.shot(notebook.page, "05_opened_anew")
        assert notebook.cells()["ran"] < notebook.cells()["count"]
    finally:
        notebook.close()


def readings(page):
    """How many the live panel tells of; 0 where there is no panel (yet)."""
    figures = page.locator(".idaa-live-figures")
    match = figures.count() and re.search(r"([\d,]+) readings", figures.first.text_content())
    return int(match[1].replace(",", "")) if match else 0


def vertices(page, key):
    """The points (x, y) of a curve in the live panel's SVG."""
    path = page.locator(f'.idaa-live-curves [id="{key}"] > path')
    data = path.first.get_attribute("d") if path.count() else ""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", data)]


def test_the_app_asks_for_its_token(app):
    pages = "", "voila/render/01_explorer.ipynb", "voila/render/00_runs.ipynb", "voila/tree"
    for path in pages:
        with urllib.request.urlopen(app.url + path) as answer:
            assert "/login" in answer.url
            assert "idaa-" not in answer.read().decode()
    for path in ("voila/api/contents/", "voila/files/01_explorer.ipynb"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(app.url + path)
    command = Path(f"/proc/{app.pid}/cmdline")
    if command.exists():
        assert app.token not in command.read_text()


def test_the_app_is_the_explorer_and_the_runs_without_code(context, app, outputs, tmp_path):
    page = context.new_page()
    faults = browser.watch(page)
    try:
        page.goto(app.address)
        assert page.locator("li a").all_inner_texts() == ["ε explorer", "Runs"]
        page.get_by_role("link", name="ε explorer").click()
        before = browser.picture(page)
        browser.meters_follow(page)
        browser.press(page, "ArrowRight", 5)
        browser.picture(page, other_than=before)
        browser.meters_follow(page)
        assert browser.status(page) == ""
        text = page.locator("body").inner_text()
        assert "import " not in text and "from_notebook" not in text
        assert page.locator(".jp-CodeCell .jp-InputArea, .cm-editor, .highlight").count() == 0
        browser.show(page, ".idaa-explorer")
        browser.shot(page, "app_explorer")
        type_epsilon(page, "8/255")
        browser.meters_follow(page)
        page.locator(".idaa-meters a").click()  # the link to this setting
        page.wait_for_url("**epsilon=8%2F255**")
        field = page.locator(".idaa-epsilon input")
        browser.until(page, lambda: field.count() and field.input_value() == "8/255", "its ε")
        browser.meters_follow(page)
        Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
        upload_large(page, tmp_path / "mine.png")
        browser.until(page, page.get_by_text("your own", exact=True).count, "the uploaded image")
        page.get_by_role("link", name="Runs").click()
        # Visitors read: nothing to press that changes a run, no path of this machine.
        run = made(VAEConfig(seed=9), error=f"There is no {outputs / 'x.zip'}.")
        browser.until(page, lambda: len(lines(page, "run")) == len(runs.list_runs()), "all runs")
        assert "There is no …/x.zip." in lines(page, "result")
        choose_runs(page, run, *runs.find("vae"))
        browser.until(page, page.locator(".idaa-runs-curves svg").count, "curves")
        assert str(outputs) not in page.content()
        buttons = page.locator(".idaa-runs button.jupyter-button:visible")
        assert buttons.all_inner_texts() == ["Refresh"]
        browser.shot(page, "app_runs")
        # The page that was left ended its kernel, with a request that outlives it.
        faults.failures = [line for line in faults.failures if "/api/shutdown/" not in line]
        assert faults == browser.Faults()
        kernels = psutil.Process(app.pid).children
        browser.until(page, lambda: len(kernels()) == 1, "one kernel, of the page that is open")
    finally:
        page.close()


def test_the_report_is_one_page_that_opens_from_a_file(context, outputs):
    command = f"cd {browser.ROOT} && {browser.recipe('report')}"
    environment = os.environ | {"IDAA_OUTPUTS": str(outputs)}
    subprocess.run(["sh", "-c", command], env=environment, check=True, capture_output=True)
    page = context.new_page()
    faults = browser.watch(page)
    try:
        page.goto((outputs / "report.html").as_uri())
        text = page.locator("body").inner_text()
        assert all(run.id[-8:] in text for run in runs.find("ssl"))
        sizes = page.locator("img").evaluate_all("found => found.map((e) => e.naturalWidth)")
        assert all(sizes)
        assert sizes or page.locator("svg path").count()
        browser.shot(page, "report")
        assert faults == browser.Faults()
    finally:
        page.close()
