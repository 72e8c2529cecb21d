"""Figures: every axis named, colours that anyone can tell apart, SVG and PDF as promised."""

import html
import math
import re
from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image
from scipy import stats
from skimage.color import rgb2lab

from idaa_lib.evaluate.metrics import embedding_std
from idaa_lib.lab import pictures, plots, style
from idaa_lib.runs import Run

R = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def reading(epsilon, share):
    return dict(
        epsilon=epsilon, loss_after=1 + share, loss_before=1.0, retrieved=100 * (1 - share), n=50
    )


CURVES = {
    name: [reading(10.0**k, (k + 3) / (4 + i)) for k in range(-3, 2)]
    for i, name in enumerate(("idaa", "clae", "random_sign"))
}


SIMILARITIES = [
    {"step": s, "beta": 0.4 - 0.1 * s, "aggressive_weak": s / 9, "aggressive_aggressive": s / 8}
    for s in range(5)
]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "vae" / "a-run"
    folder.mkdir(parents=True)
    lines = [f'{{"step": {i}, "epoch": 0, "time": 0, "loss": {2 - 0.1 * i}}}\n' for i in range(9)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return Run(folder)


def figures(run):
    labels = torch.arange(20) % 3
    features = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    classes = ("cat", "dog", "ship")
    rows = pd.DataFrame([
        {"axis": axis, "at": v, "seed": s, "metric": m, "value": 40 + v, "low": 35.0, "high": 47.0}
        for axis in ("epsilon", "beta") for v in (0.1, 1.0) for s in (0, 1)
        for m in ("kNN", "linear")
    ]).assign(adversary="IDAA", split="validation", features="encoder")  # fmt: skip
    further = rows[rows["axis"] == "beta"].assign(axis="backbone", adversary="no adversary")
    further["at"] = further["at"].map({0.1: "resnet18", 1.0: "resnet34"})
    rows = pd.concat([rows, further, further.assign(adversary="IDAA")])
    cells = product(("SimCLR", "MoCo"), ("no adversary", "IDAA"), (0, 1), ("kNN", "linear"))
    compared = pd.DataFrame([
        {"method": m, "adversary": a, "metric": probe, "value": 40.0 + s, "low": 38, "high": 42}
        for m, a, s, probe in cells
    ]).assign(features="encoder", dataset="photos")  # fmt: skip
    untrained = compared[:2].assign(features="untrained encoder", low=math.nan, high=math.nan)
    compared = pd.concat([compared, untrained])
    return {
        "curves": plots.curves({"a": run, "b": run}, ["loss"]),
        "energy_maps": pictures.energy_maps({"R": R}),
        "spectra": pictures.spectra({"R": R, "x": 2 * R}),
        "evaluation": plots.accuracies(compared, "dataset", "features", "metric"),
        "confusion": plots.confusion(labels, labels, classes),
        "embedding_map": plots.embedding_map(features, labels, classes),
        "sensitivity": plots.sensitivity(rows),
        "similarities": plots.plot_similarities({"a": SIMILARITIES, "b": SIMILARITIES}),
        "methods": plots.accuracies(compared, "metric", "method", "adversary"),
        "identity_curves": pictures.identity_curves(CURVES),
        "likeness": pictures.likeness(
            (0.0, 0.5, 1.0), {"z": torch.rand(3, 2), "R": torch.rand(3, 2)}
        ),
    }


def test_no_axis_is_without_a_name(run):
    for name, figure in figures(run).items():
        shown = [axis for axis in figure.axes if axis.axison]
        assert shown, name
        for axis in shown:
            # Of axes that share one, only the outermost repeat its name.
            outer = axis.get_subplotspec() is None or axis.get_subplotspec().is_last_row()
            left = axis.get_subplotspec() is None or axis.get_subplotspec().is_first_col()
            if outer and axis.get_label() != "<colorbar>":
                assert axis.get_xlabel(), f"{name}: x"
            if left:
                assert axis.get_ylabel(), f"{name}: y"


def test_no_figure_shows_the_source_of_a_formula(run, tmp_path):
    for name, figure in figures(run).items():
        drawing = re.sub("<!--.*?-->", "", style.svg(figure), flags=re.DOTALL)
        assert "mathdefault" not in drawing, name
        style.save(figure, tmp_path / f"{name}.png")
        texts = [text for text in figure.findobj(Text) if "mathdefault" in text.get_text()]
        assert all(text.get_parse_math() for text in texts), name


def test_sensitivity_is_the_encoder_s_alone():
    """A point that was judged with its references has rows of other features too."""
    frame = pd.DataFrame([
        {"axis": "epsilon", "at": at, "seed": 0, "metric": metric, "value": value, "low": value - 2,
         "high": value + 2, "adversary": "IDAA", "split": "validation", "features": features}
        for at in (0.1, 0.3) for metric in ("kNN", "linear")
        for features, value in (("encoder", 60.0), ("untrained encoder", 30.0), ("raw pixels", 9.0))
    ])  # fmt: skip
    for axis in plots.sensitivity(frame).axes:
        (bars,) = axis.containers
        assert list(bars[0].get_ydata()) == [60.0, 60.0]
        assert {y for bar in bars[2][0].get_segments() for _, y in bar} == {58.0, 62.0}


def test_a_run_has_one_colour_in_all_panels():
    """Also in a panel that an earlier run has no line in."""
    lines = {"a": [{"step": 1, "loss": 1.0}], "b": [{"step": 1, "loss": 2.0, "moved": 3.0}]}
    both, alone = plots.curves(lines, ["loss", "moved"]).axes[:2]
    assert both.lines[1].get_color() == alone.lines[0].get_color() != both.lines[0].get_color()


def test_accuracies_are_means_with_their_intervals_and_references_are_lines():
    rows = [("encoder", "A", 40.0, 35, 44), ("encoder", "B", 50.0, 45, 54)]
    rows += [("encoder", "B", 52.0, 47, 56), ("raw pixels", "B", 30.0, math.nan, math.nan)]
    frame = pd.DataFrame(rows, columns=["features", "method", "value", "low", "high"])
    frame = frame.assign(adversary="IDAA", metric="kNN")
    (axis,) = plots.accuracies(frame, "metric", "method", "adversary").axes
    one, several = axis.containers
    assert [line.get_ydata()[0] for line in (one[0], several[0])] == [40.0, 51.0]
    (bar,) = one[2][0].get_segments()
    assert [y for _, y in bar] == [35, 44]
    (bar,) = several[2][0].get_segments()  # Student's of two seeds
    assert [y for _, y in bar] == pytest.approx(stats.t.interval(0.95, 1, loc=51, scale=1))
    (line,) = [line for line in axis.lines if line.get_label() == "raw pixels"]
    assert set(line.get_ydata()) == {30.0}


def test_image_rows_show_the_pixels_and_no_more_columns_than_asked():
    pixels = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    figure = pictures.image_rows({"a": pixels, "b": 2 * pixels}, "title", columns=3, names="xyz")
    assert len(figure.axes) == 6
    shown = figure.axes[4].images[0].get_array()
    assert np.allclose(shown, (2 * pixels[1]).clamp(0, 1).permute(1, 2, 0))
    assert [axis.get_title() for axis in figure.axes[:3]] == ["x", "y", "z"]


def test_similarities_are_those_of_the_log_with_beta_below():
    lines = [{"step": 1, "knn_top1_val": 3.0}, *SIMILARITIES]  # a line of validation has none
    figure = plots.plot_similarities({"four views": lines})
    above, below = figure.axes
    logged = {name: [line[name] for line in SIMILARITIES] for name in SIMILARITIES[0]}
    weak, both = above.lines
    assert list(weak.get_ydata()) == logged["aggressive_weak"]
    assert list(both.get_ydata()) == logged["aggressive_aggressive"]
    assert list(below.lines[0].get_ydata()) == logged["beta"]
    assert list(weak.get_xdata()) == logged["step"]
    assert [text.get_text() for text in figure.legends[0].texts] == [*plots.SIMILARITIES.values()]


def test_examples_of_partitions_are_of_their_sides():
    images = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 3, 4, 4)
    partitions = torch.stack([torch.arange(12) % 2, torch.arange(12) // 9])
    figure = pictures.plot_partitions(images, partitions, columns=3)
    grid = np.array(figure.axes).reshape(4, 3)
    for row, (partition, side) in zip(grid, product(partitions, range(2)), strict=True):
        numbers = [round(float(axis.images[0].get_array()[0, 0, 0]) * 255) for axis in row]
        assert all(partition[number] == side for number in numbers) and len({*numbers}) == 3
    labels = [text.get_text() for text in figure.findobj(Text) if "side" in text.get_text()]
    assert labels[-1] == "partition 2, side 2: 25 %"


def test_a_table_of_partitions_says_what_is_beyond_chance():
    rows = [
        dict(partition=1, factor="class", value=91.26, chance=50.4, low=48.1, high=52.34, n=90),
        dict(partition=1, factor="brightness", value=51.0, chance=50.4, low=48.1, high=52.3, n=90),
    ]
    table = pictures.partition_table(rows)
    assert list(table["beyond chance"]) == ["yes", "no"]
    assert list(table["95 % by chance"]) == ["48.1 … 52.3", "48.1 … 52.3"]
    assert table["agreement (%)"][0] == 91.3


def test_power_of_one_wave_lies_in_its_ring():
    x = torch.arange(16) * (2 * math.pi / 16)
    wave = torch.cos(3 * x).expand(1, 3, 16, 16)
    frequency, power = pictures.radial_power(wave)
    assert frequency[power.argmax()] == 3
    assert power.sum() == pytest.approx(power[3])
    noise = pictures.radial_power(R)[1]
    assert noise.mean() == pytest.approx(
        R.square().mean().item(), rel=0.3
    )  # white: flat (Parseval)


def test_the_right_panel_compares_at_equal_loss():
    right = pictures.identity_curves(CURVES).axes[2]
    assert len(right.lines) == 3
    for line, curve in zip(right.lines, CURVES.values(), strict=True):
        assert list(line.get_xdata()) == [row["loss_after"] for row in curve]
        assert list(line.get_ydata()) == [row["retrieved"] for row in curve]


# --- the look ------------------------------------------------------------------------------------


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(a, b):
    """WCAG 2.1, 1.4.3: from 1 to 21."""
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_ink_and_lines_stand_out_on_light_and_on_dark_pages():
    assert contrast(style.INK, "white") > 7  # AAA for text
    for colour in style.COLOURS.values():
        assert contrast(colour, "white") > 3  # WCAG 1.4.11 for graphics
        assert contrast(colour, "#111111") > 3


# Machado et al. 2009 (doi:10.1109/TVCG.2009.113), severity 1.0, on linear RGB.
DEFICIENCIES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
}  # fmt: skip


@pytest.mark.parametrize("deficiency", [None, *DEFICIENCIES])
def test_any_two_colours_can_be_told_apart(deficiency):
    def seen(colour):
        rgb = np.array(to_rgb(colour))
        if deficiency:
            linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
            linear = np.clip(np.array(DEFICIENCIES[deficiency]) @ linear, 0, 1)
            rgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        return rgb2lab(rgb[None, None])[0, 0]

    for a, b in combinations(set(style.COLOURS.values()), 2):
        assert np.linalg.norm(seen(a) - seen(b)) > 15, (a, b)  # 2.3 is a just noticeable difference


def test_an_svg_takes_the_page_s_colours_and_is_always_the_same():
    drawn, again = (style.svg(pictures.identity_curves(CURVES)) for _ in range(2))
    assert drawn == again
    assert drawn.startswith("<svg") and drawn.rstrip().endswith("</svg>")
    assert style.INK not in drawn and style.GRID not in drawn and "fill: #ffffff" not in drawn
    assert "--jp-ui-font-color1" in drawn
    assert ">Hardness<" in drawn  # text stays text


def test_a_place_in_an_svg_can_be_computed():
    """The explorer's marker: nothing is cropped, so shares of the figure are shares of the SVG."""
    figure = pictures.identity_curves(CURVES)
    drawn = style.svg(figure)
    width = float(re.search(r'width="([\d.]+)pt"', drawn)[1])
    assert width == pytest.approx(72 * figure.get_figwidth())


def test_a_saved_figure_is_what_the_notebook_shows_and_pdf_on_request(tmp_path, monkeypatch):
    figure = pictures.spectra({"R": R})
    shown = style.save(figure, tmp_path / "a.png")
    assert shown.data == (tmp_path / "a.png").read_bytes()
    width = Image.open(tmp_path / "a.png").width
    assert shown.width == round(width * 96 / style.DPI)
    assert not (tmp_path / "a.pdf").exists()
    monkeypatch.setenv("IDAA_PDF", "1")
    style.save(figure, tmp_path / "a.png")
    pdf = (tmp_path / "a.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and b"/Subtype /Image" not in pdf  # vectors
    assert b"/FontType 42" in pdf or b"/Subtype /Type0" in pdf or b"/TrueType" in pdf
    monkeypatch.setenv("IDAA_PDF", "yes")
    with pytest.raises(ValueError, match="IDAA_PDF must be 1"):
        style.save(figure, tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize(
    "names", [("$5 note", "$10 note", "_background"), ("US$ a$", "R&D <b>bold", "100%"),
              ("a_b^c", "back\\slash", "猫")]
)  # fmt: skip
def test_classes_are_drawn_by_their_names_as_they_are(tmp_path, names):
    draw = torch.Generator().manual_seed(0)
    features, labels = torch.randn(30, 4, generator=draw), torch.arange(30) % 3
    pictures = torch.zeros(30, 3, 8, 8)
    for figure in (
        plots.confusion(labels, labels, names),
        plots.embedding_map(features, labels, names),
        plots.neighbours(features, pictures, labels, [0, 1, 2], names),
    ):
        plots.save(figure, tmp_path / "figure.png")
        text = html.unescape(style.svg(figure))
        assert all(name in text for name in names)
    legend = [
        entry.get_text()
        for entry in plots.embedding_map(features, labels, names).axes[0].get_legend().texts
    ]
    assert legend == [f" {name}" for name in names]


def test_a_log_axis_keeps_its_powers(tmp_path):
    figure, axis = style.axes(figsize=(3, 2))
    axis.plot([1, 1e6], [1, 1e6])
    axis.set(xscale="log", yscale="log")
    plots.save(figure, tmp_path / "figure.png")
    plots.save(figure, tmp_path / "figure.png")
    assert "mathdefault" not in re.sub("<!--.*?-->", "", style.svg(figure), flags=re.DOTALL)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_test_split_of_a_few_images_has_its_figures(n):
    features, labels = torch.randn(n, 8), torch.zeros(n, dtype=torch.int64)
    images, classes = torch.zeros(n, 3, 8, 8, dtype=torch.uint8), ("cat", "dog")
    points = plots.embedding_map(features, labels, classes).axes[0].collections[0].get_offsets()
    assert points.shape == (n, 2) and np.isfinite(points).all()
    assert len(plots.neighbours(features, images, labels, [0], classes).axes) == n
    assert plots.confusion(labels, labels, classes).axes
    assert embedding_std(features[:1]) == 0
