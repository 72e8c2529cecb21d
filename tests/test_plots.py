"""Figures: every axis named, colours that anyone can tell apart, SVG and PDF as promised."""

import html
import math
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, product

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats
from IPython.utils.capture import capture_output
from matplotlib import font_manager
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image
from scipy import stats
from skimage.color import rgb2lab
from test_runs_page import made

from idaa_lib.configs import SSLConfig, VAEConfig
from idaa_lib.evaluate.metrics import embedding_std
from idaa_lib.lab import pictures, plots, style

R = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def reading(epsilon, share):
    percent = 100 * (1 - share)
    ends = dict(low=percent - 5, high=percent + 5)
    return dict(
        epsilon=epsilon, loss_after=1 + share, loss_before=1.0, retrieved=percent, n=50, **ends
    )


CURVES = {
    name: [reading(10.0**k, (k + 3) / (4 + i)) for k in range(-3, 2)]
    for i, name in enumerate(("idaa", "clae", "random_sign"))
}


@pytest.fixture
def run(outputs):
    lines = [{"step": i, "epoch": 0, "loss": 2 - 0.1 * i} for i in range(9)]
    return made(VAEConfig(), {}, lines=lines)


INVARIANCE = [
    dict(augmentation=name, layer=layer, value=0.5, low=0.4, high=0.6)
    for name in ("crop", "color") for layer in ("input", "layer1", "layer2")
]  # fmt: skip


def figures(run):
    labels = torch.arange(20) % 3
    features = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    classes = ("cat", "dog", "ship")
    rows = pd.DataFrame([
        {"axis": axis, "at": v, "seed": s, "metric": m, "value": 40 + v, "low": 35.0, "high": 47.0}
        for axis in ("epsilon", "beta") for v in (0.1, 1.0) for s in (0, 1)
        for m in ("kNN", "linear")
    ]).assign(adversary="IDAA", split="validation", features="encoder")  # fmt: skip
    backbone_rows = rows[rows["axis"] == "beta"].assign(axis="backbone", adversary="no adversary")
    backbone_rows["at"] = backbone_rows["at"].map({0.1: "resnet18", 1.0: "resnet34"})
    rows = pd.concat([rows, backbone_rows, backbone_rows.assign(adversary="IDAA")])
    cells = product(("SimCLR", "MoCo"), ("no adversary", "IDAA"), (0, 1), ("kNN", "linear"))
    evaluations = pd.DataFrame([
        {"method": m, "adversary": a, "metric": probe, "value": 40.0 + s, "low": 38, "high": 42}
        for m, a, s, probe in cells
    ]).assign(features="encoder", dataset="photos")  # fmt: skip
    references = evaluations[:2].assign(features="untrained encoder", low=math.nan, high=math.nan)
    evaluations = pd.concat([evaluations, references])
    return {
        "curves": plots.curves({"a": run, "b": run}, ["loss"]),
        "energy_maps": pictures.energy_maps({"R": R}),
        "spectra": pictures.spectra({"R": R, "x": 2 * R}),
        "evaluation": plots.accuracies(evaluations, "dataset", "features", "metric"),
        "confusion": plots.confusion(labels, labels, classes),
        "embedding_map": plots.embedding_map(features, labels, classes),
        "sensitivity": plots.sensitivity(rows),
        "one axis": plots.sensitivity(rows[rows["axis"] == "epsilon"]),
        "invariance": plots.plot_invariance({"a": INVARIANCE, "b": INVARIANCE}),
        "neighbours": plots.neighbours(features, torch.zeros(20, 3, 8, 8), labels, [0, 1], classes),
        "image_rows": pictures.image_rows({"x": R, "a long name of a row": R}, "title"),
        "methods": plots.accuracies(evaluations, "metric", "method", "adversary"),
        "identity_curves": pictures.identity_curves(CURVES),
        "likeness": pictures.likeness(
            (0.0, 0.5, 1.0), {"z": torch.rand(3, 2), "R": torch.rand(3, 2)}
        ),
    }


def test_no_axis_is_without_a_name(run):
    for name, figure in figures(run).items():
        if name in ("neighbours", "image_rows"):  # their rows have names
            continue
        axes = figure.axes
        assert axes, name
        for axis in axes:
            # Of axes that share one, only the outermost repeat its name.
            outer = axis.get_subplotspec() is None or axis.get_subplotspec().is_last_row()
            left = axis.get_subplotspec() is None or axis.get_subplotspec().is_first_col()
            if outer and axis.get_label() != "<colorbar>":
                assert axis.get_xlabel(), f"{name}: x"
            if left:
                assert axis.get_ylabel(), f"{name}: y"


def test_every_text_stands_inside_its_figure(run):
    for name, figure in figures(run).items():
        figure.draw_without_rendering()
        for text in filter(Text.get_text, figure.texts):  # the title of the whole figure too
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= figure.bbox.width, f"{name}: {text.get_text()}"


def test_however_many_runs_are_drawn_their_names_hide_no_panel(run):
    heights = []
    for count, words in ((2, 1), (13, 40)):
        names = {f"{i} {'optimizer = sgd, ' * words}": run for i in range(count)}
        figure = plots.curves(names, plots.CURVES["ssl"][:4])
        figure.draw_without_rendering()
        top = figure.legends[0].get_window_extent().y1
        assert all(top <= axis.get_tightbbox().y0 for axis in figure.axes)
        heights.append(figure.axes[0].get_window_extent().height)
    assert heights[1] == pytest.approx(heights[0], rel=0.02)


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


@pytest.mark.parametrize("axis", ["epsilon", "beta", "dim", "epochs", "width"])
@pytest.mark.parametrize("values", [[8.0], [0.0, 8.0], [0.0], [2.0, 8.0, 32.0], ["8", "2"]])
def test_each_value_of_an_axis_is_in_its_panel(axis, values):
    """Also where there is one alone, or 0, which no axis in factors has."""
    frame = pd.DataFrame([
        {"axis": axis, "at": at, "seed": 0, "metric": metric, "value": 60.0, "low": 58.0,
         "high": 62.0, "adversary": "IDAA", "split": "validation", "features": "encoder"}
        for at in values for metric in ("kNN", "linear")
    ])  # fmt: skip
    figure = plots.sensitivity(frame)
    figure.draw_without_rendering()
    for panel in figure.axes:
        low, high = panel.bbox.x0, panel.bbox.x1
        (bars,) = panel.containers
        places = panel.transData.transform(bars[0].get_xydata())[:, 0]
        assert len(places) == len(values) and low + 5 < min(places) <= max(places) < high - 5
    lower = figure.axes[-1]
    labels = {tick.get_text(): tick.get_position()[0] for tick in lower.get_xticklabels()}
    assert {f"{float(value):g}" for value in values} == labels.keys()
    for x in labels.values():
        assert abs(places - lower.transData.transform((x, 60.0))[0]).min() < 1


def test_names_on_an_embedding_map_have_room_of_their_own():
    """And all are in the legend, however many classes there are and wherever they lie."""
    names = [f"class {i}" for i in range(40)]
    random = torch.Generator().manual_seed(3)
    features, labels = torch.randn(160, 4, generator=random), torch.arange(160) % 40
    figure = plots.embedding_map(features, labels, names)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert [text.get_text() for text in figure.legends[0].texts] == names
    apart = 100 * torch.eye(4).repeat_interleave(25, 0)
    apart += torch.randn(100, 4, generator=random)
    figure = plots.embedding_map(apart, torch.arange(4).repeat_interleave(25), names[:4])
    assert [text.get_text() for text in figure.axes[0].texts] == names[:4]


@pytest.mark.parametrize("adversary", ["IDAA", "CLAE", "random sign"])
def test_parts_and_adversaries_have_one_colour_in_all_figures(adversary):
    labels = {"x": "x", "G(x)": "G", "R(x)": "R", f"{adversary} x′": None}
    figure = pictures.spectra(dict.fromkeys([*labels, f"{adversary} x′ − x"], R))
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    colours = {name: line.get_color() for name, line in lines.items()}
    assert [colours[name] for name in ("x", "G(x)", "R(x)")] == [
        pictures.LOOKS[part]["color"] for part in "xGR"
    ]
    assert colours[f"{adversary} x′"] == colours[f"{adversary} x′ − x"] == style.colour(adversary)
    assert len({(line.get_color(), line.get_linestyle()) for line in lines.values()}) == 5


def test_each_interval_is_in_sight_whatever_the_first_axis_has():
    """Panels of a row share their limits; the first one's interval is the smallest."""
    frame = pd.DataFrame([
        {"axis": axis, "at": at, "seed": 0, "metric": metric, "value": value, "low": value - 5,
         "high": value + 5, "adversary": "IDAA", "split": "validation", "features": "encoder"}
        for axis, value in (("epsilon", 60.0), ("beta", 30.0), ("dim", 80.0))
        for at in (1.0, 2.0) for metric in ("kNN", "linear")
    ])  # fmt: skip
    for axis in plots.sensitivity(frame).axes:
        (bars,) = axis.containers
        low, high = axis.get_ylim()
        ends = [y for bar in bars[2][0].get_segments() for _, y in bar]
        assert low < min(ends) and max(ends) < high


def test_texts_of_a_heat_map_stand_in_their_own_cells():
    frame = pd.DataFrame([
        {"epsilon": epsilon, "width": width, "seed": 0, "metric": metric, "value": 60.0,
         "low": 33.3, "high": 86.7, "adversary": "IDAA", "split": "validation",
         "features": "encoder"}
        for epsilon in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0) for width in (2, 4, 8, 16, 32, 64, 128)
        for metric in ("kNN", "linear")
    ])  # fmt: skip
    figure = plots.heat_maps(frame, ["epsilon", "width"])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for axis in figure.axes for text in axis.texts]
    assert len(boxes) == 2 * 6 * 7
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_a_wide_interval_does_not_hide_the_others():
    """Student's interval of two seeds reaches from -85 to 147 %; the axis ends where shares do."""
    frame = pd.DataFrame([
        {"axis": "epsilon", "at": at, "seed": seed, "metric": metric, "value": value, "low": 20.0,
         "high": 40.0, "method": "a", "adversary": "IDAA", "split": "validation",
         "features": "encoder"}
        for at in (0.1, 0.3) for metric in ("kNN", "linear")
        for seed, value in enumerate((22.0, 40.0) if at == 0.1 else (30.0, 30.0))
    ])  # fmt: skip
    figures = plots.sensitivity(frame), plots.accuracies(frame, "metric", "at", "adversary")
    for panel in (panel for figure in figures for panel in figure.axes):
        low, high = panel.get_ylim()
        assert -5 <= low <= 22 and 40 <= high <= 105
    for figure in (*figures, plots.heat_maps(frame.assign(width=8), ["at", "width"])):
        assert "cut at 0 and 100 %" in figure.get_suptitle().replace("\n", " ")
    few = frame.assign(value=30.0)  # all seeds alike: nothing to cut
    for figure in (plots.sensitivity(few), plots.accuracies(few, "metric", "at", "adversary")):
        assert "cut" not in figure.get_suptitle()


def test_a_run_has_one_colour_in_all_panels():
    """Also in a panel that an earlier run has no line in."""
    lines = {"a": [{"step": 1, "loss": 1.0}], "b": [{"step": 1, "loss": 2.0, "moved": 3.0}]}
    loss_axis, moved_axis = plots.curves(lines, ["loss", "moved"]).axes[:2]
    assert (
        loss_axis.lines[1].get_color()
        == moved_axis.lines[0].get_color()
        != loss_axis.lines[0].get_color()
    )


def test_accuracies_are_means_with_their_intervals_and_references_are_lines():
    rows = [("encoder", "A", 40.0, 35, 44), ("encoder", "B", 50.0, 45, 54)]
    rows += [("encoder", "B", 52.0, 47, 56), ("raw pixels", "B", 30.0, math.nan, math.nan)]
    frame = pd.DataFrame(rows, columns=["features", "method", "value", "low", "high"])
    frame = frame.assign(adversary="IDAA", metric="kNN")
    figure = plots.accuracies(frame, "metric", "method", "adversary")
    (axis,), title = figure.axes, figure.get_suptitle().replace("\n", " ")
    assert title == "95 % intervals over up to 2 trainings a point, or the images of a single one"
    one, mean_bar = axis.containers
    assert [line.get_ydata()[0] for line in (one[0], mean_bar[0])] == [40.0, 51.0]
    (bar,) = one[2][0].get_segments()
    assert [y for _, y in bar] == [35, 44]
    (bar,) = mean_bar[2][0].get_segments()  # Student's of two seeds
    assert [y for _, y in bar] == pytest.approx(stats.t.interval(0.95, 1, loc=51, scale=1))
    (line,) = [line for line in axis.lines if line.get_label() == "raw pixels"]
    assert set(line.get_ydata()) == {30.0}


def test_image_rows_show_the_pixels_and_no_more_columns_than_asked():
    pixels = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    figure = pictures.image_rows({"a": pixels, "b": 2 * pixels}, "title", columns=3, names="xyz")
    (axis,) = figure.axes
    assert len(axis.images) == 6
    picture = axis.images[4].get_array()
    assert np.allclose(picture, (2 * pixels[1]).clamp(0, 1).permute(1, 2, 0))
    assert [text.get_text() for text in axis.get_xticklabels()] == ["x", "y", "z"]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["a", "b"]


def test_examples_of_partitions_are_of_their_sides():
    images = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 3, 4, 4)
    partitions = torch.stack([torch.arange(12) % 2, torch.arange(12) // 9])
    figure = plots.plot_partitions(images, partitions, columns=3)
    grid = np.reshape([image.get_array()[0, 0, 0] for image in figure.axes[0].images], (4, 3))
    for row, (partition, side) in zip(grid, product(partitions, range(2)), strict=True):
        numbers = [round(float(value) * 255) for value in row]
        assert all(partition[number] == side for number in numbers) and len({*numbers}) == 3
    labels = [text.get_text() for text in figure.findobj(Text) if "side" in text.get_text()]
    assert labels[-1] == "partition 2, side 2: 25 %"


def test_a_table_of_partitions_says_what_is_beyond_chance():
    rows = [
        dict(partition=1, factor="class", value=91.26, chance=50.4, low=48.1, high=52.34, n=90),
        dict(partition=1, factor="brightness", value=51.0, chance=50.4, low=48.1, high=52.3, n=90),
    ]
    table = plots.partition_table(rows)
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
    for colour in [*style.COLOURS.values(), *style.OTHERS[1:]]:  # an SVG's ink is the page's
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
    def see(colour):
        rgb = np.array(to_rgb(colour))
        if deficiency:
            linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
            linear = np.clip(np.array(DEFICIENCIES[deficiency]) @ linear, 0, 1)
            rgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        return rgb2lab(rgb[None, None])[0, 0]

    for a, b in combinations(set(style.COLOURS.values()), 2):
        assert np.linalg.norm(see(a) - see(b)) > 15, (a, b)  # 2.3 is a just noticeable difference


def test_an_svg_takes_the_page_s_colours_and_is_always_the_same():
    svg, again = (style.svg(pictures.identity_curves(CURVES)) for _ in range(2))
    assert svg == again
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
    assert style.INK not in svg and style.GRID not in svg and "fill: #ffffff" not in svg
    assert "--jp-ui-font-color1" in svg
    assert ">Hardness<" in svg  # text stays text


def test_a_place_in_an_svg_can_be_computed():
    """The explorer's marker: nothing is cropped, so shares of the figure are shares of the SVG."""
    figure = pictures.identity_curves(CURVES)
    svg = style.svg(figure)
    width = float(re.search(r'width="([\d.]+)pt"', svg)[1])
    assert width == pytest.approx(72 * figure.get_figwidth())


def test_a_saved_figure_is_what_the_notebook_shows(tmp_path):
    figure = pictures.spectra({"R": R})
    picture = style.save(figure, tmp_path / "a.png")
    assert picture.data == (tmp_path / "a.png").read_bytes()
    width = Image.open(tmp_path / "a.png").width
    assert picture.width == round(width * 96 / style.DPI)
    assert not (tmp_path / "a.pdf").exists()


# A legend leaves out what begins with "_"; "$" opens a formula; 猫 is in few fonts.
NAMES = ("$5 <b>note", "US$ \\frac$", "_background", "猫")


@pytest.mark.filterwarnings("ignore:No font")
def test_names_are_drawn_as_they_are(tmp_path):
    """Of classes, runs, methods, adversaries, parts: in every figure that takes names."""
    names = NAMES
    draw = torch.Generator().manual_seed(0)
    features, labels = torch.randn(20, 4, generator=draw), torch.arange(20) % 4
    images, rows = torch.zeros(20, 3, 8, 8), dict.fromkeys(names, R)
    frame = pd.DataFrame([
        {"metric": a, "method": b, "adversary": c, "value": 1.0, "axis": "epsilon", "at": b}
        for a, b, c in zip(names, names[1:] + names[:1], names[2:] + names[:2], strict=True)
    ]).assign(low=0.0, high=2.0, features="encoder", split="validation", seed=0)  # fmt: skip
    layers = [dict(augmentation=n, layer=n, value=0.5, low=0.4, high=0.6) for n in names]
    figure_by_kind = {
        "confusion": plots.confusion(labels, labels, names),
        "embedding_map": plots.embedding_map(features, labels, names),
        "neighbours": plots.neighbours(features, images, labels, [0, 1, 2, 3], names),
        "curves": plots.curves({name: [{"step": 1, "loss": 1.0}] for name in names}, ["loss"]),
        "accuracies": plots.accuracies(frame, "metric", "method", "adversary"),
        "sensitivity": plots.sensitivity(frame.assign(metric="kNN")),
        "invariance": plots.plot_invariance(dict.fromkeys(names, layers)),
        "image_rows": pictures.image_rows(rows, names[0], names=names),
        "energy_maps": pictures.energy_maps(rows),
        "spectra": pictures.spectra(rows),
        "likeness": pictures.likeness((0, 1), dict.fromkeys(names, torch.rand(2, 2))),
    }
    for kind, figure in figure_by_kind.items():
        text = html.unescape(style.svg(figure))
        assert all(name in text for name in names), kind
    for kind in ("embedding_map", "curves", "accuracies", "sensitivity", "invariance", "spectra"):
        entries = [text.get_text().strip() for text in figure_by_kind[kind].legends[0].texts]
        assert sorted(entries) == sorted(names), kind
    style.save(figure_by_kind["accuracies"], tmp_path / "figure.png", "single")


def test_a_letter_of_another_font_is_drawn_by_it_or_said(monkeypatch):
    fonts = {"§": "STIXGeneral", "猫": None}
    monkeypatch.setattr(style, "_font", lambda letter: fonts.get(letter, "DejaVu Sans"))
    figure = pictures.image_rows({"§": R, "x": R, "猫": R})
    with pytest.warns(UserWarning, match="No font of this machine has '猫'.*install.* for CJK"):
        style.svg(figure)
    labels = [text.get_fontfamily() for text in figure.axes[0].get_yticklabels()]
    assert labels == [["DejaVu Sans", "STIXGeneral"], ["DejaVu Sans"], ["DejaVu Sans"]]


@pytest.mark.parametrize("letter", ["猫", "🐶", "ا", "\U00012000", "\uf8ff", "𝛆", "§", "x"])
def test_a_font_of_a_letter_draws_the_letter_and_no_box(letter):
    """By its outline: the fonts of matplotlib that has a box for every letter are no fonts of it.
    On machines without a font for a letter None is named, and `_prepare` says so."""
    name = style._font(letter)
    fonts = [f for f in font_manager.fontManager.ttflist if "Last Resort" not in f.name]
    having = {f.name for f in fonts if ord(letter) in font_manager.get_font(f.fname).get_charmap()}
    assert name in having if having else name is None


@pytest.mark.parametrize("letter", ["\t", "\r", "\x00", "\x07", "\x1b", "\x7f", "\x85", "\x9f"])
def test_a_control_character_is_drawn_as_a_space(letter):
    labels = torch.arange(20) % 2
    kinds = [
        lambda own: plots.confusion(labels, labels, own),
        lambda own: pictures.image_rows(dict.fromkeys(own, R), own[0], names=own),
        lambda own: plots.embedding_map(torch.eye(20), labels, own),
    ]
    names, plain = ((f"a{sign}b", f"{sign}c") for sign in (letter, " "))
    for draw in kinds[: 2 if letter == "\t" else 3]:  # a tab in a legend is several spaces
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert style.svg(draw(names)) == style.svg(draw(plain))


@pytest.mark.parametrize("letter", ["ε", "′", "₂", "x"])
def test_our_own_signs_are_in_our_font(letter):
    assert style._font(letter) == "DejaVu Sans"


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
    panels = plots.neighbours(features, images, labels, [0], classes).axes[0].images
    assert len(panels) == n  # the query among them
    assert plots.confusion(labels, labels, classes).axes
    many = torch.arange(1000)  # ImageNet's: a cell of each would take 22 GB
    figure = plots.confusion(many, many, [f"class {n}" for n in range(1000)])
    assert max(figure.get_size_inches()) < 25 and len(figure.axes[0].get_xticks()) <= 20
    assert embedding_std(features[:1]) == 0


# --- a figure where it is shown -------------------------------------------------------------------


def test_a_user_s_matplotlib_stays_as_it_is():
    code = """if True:
        import matplotlib
        before = dict(matplotlib.rcParams)
        import idaa_lib.lab.explorer, idaa_lib.lab.report, idaa_lib.lab.runs
        from idaa_lib.lab import plots
        plots.curves({"a": [{"step": 1, "loss": 1.0}]}, ["loss"])
        changed = {k for k, v in matplotlib.rcParams.items() if v != before[k]}
        assert not changed, changed
    """
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_figures_drawn_in_threads_leave_it_as_it_is():
    before = dict(mpl.rcParams)
    with ThreadPoolExecutor(3) as pool:
        drawings = [*pool.map(lambda _: style.svg(pictures.spectra({"R": R})), range(3))]
    assert len({*drawings}) == 1 and dict(mpl.rcParams) == before


@pytest.mark.parametrize("formats", [(), ("png",)], ids=["plain", "inline"])
def test_a_figure_at_the_end_of_a_cell_shows_itself_once(formats):
    """Also where matplotlib's own way to show figures is there."""
    shell = InteractiveShell.instance()
    select_figure_formats(shell, formats)
    with capture_output() as capture:
        assert shell.display_formatter.format(pictures.spectra({"R": R})) == ({}, {})
    (output,) = capture.outputs
    assert "image/png" in output.data
    InteractiveShell.clear_instance()


def test_a_column_of_a_paper(run):
    """Text of 8 pt, no title; nothing is cut off, no panel loses its labels."""
    figure_by_name = figures(run)
    double = [(name, 6.9) for name in ("methods", "identity_curves", "sensitivity")]
    for name, inches in [*((name, 3.3) for name in figure_by_name), *double]:
        figure = figure_by_name[name]
        size, title = tuple(figure.get_size_inches()), figure.get_suptitle()
        column_figure, box = style._print(figure, inches)
        assert (box.x0, box.x1) == (0, inches)
        # The figure itself stays as it is.
        assert (tuple(figure.get_size_inches()), figure.get_suptitle()) == (size, title)
        assert {text.get_fontsize() for text in column_figure.findobj(Text)} == {8}, name
        assert not column_figure.get_suptitle()
        extent = column_figure.get_tightbbox()
        assert extent.x0 > -0.01 and extent.x1 < inches + 0.01, name
        for axis in column_figure.axes:
            if name not in ("neighbours", "image_rows") and axis.get_label() != "<colorbar>":
                last_row = axis.get_subplotspec().is_last_row()
                assert axis.get_ylabel() or not axis.yaxis.get_tick_params()["labelleft"], name
                assert axis.get_xlabel() or not last_row, name


def test_a_column_s_files_are_exactly_as_wide(tmp_path):
    figure = pictures.spectra({"R": R})
    style.save(figure, tmp_path / "a.png", "single")
    assert Image.open(tmp_path / "a.png").width == round(3.3 * 2 * style.DPI)
    pdf = (tmp_path / "a.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and b"/Subtype /Image" not in pdf  # vectors
    assert b"/FontType 42" in pdf or b"/Subtype /Type0" in pdf or b"/TrueType" in pdf
    box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", pdf)
    assert float(box[1]) == pytest.approx(72 * 3.3, abs=0.1)
    with pytest.raises(ValueError, match=r"'single' \(3.3 inches\) or .*, and is 'half'"):
        style.save(figure, tmp_path / "a.png", "half")


# --- lines of runs --------------------------------------------------------------------------------


def lines_of(figure):
    return [(ax.get_color(), ax.get_linestyle(), ax.get_marker()) for ax in figure.axes[0].lines]


@pytest.mark.parametrize("points", [3, 100])
def test_twelve_runs_are_twelve_lines_coloured_by_adversary(outputs, points):
    log = [{"step": i, "epoch": 0, "loss": 1.0} for i in range(points)]
    adversaries = ["none", "clae", "idaa", "random_sign"]
    run_by_name = {
        f"{method} {adversary}": made(
            SSLConfig(method=method, adversary=adversary), {}, f"{method} {adversary}", lines=log
        )
        for method in ("simclr", "moco", "byol")
        for adversary in adversaries
    }
    looks = lines_of(plots.curves(run_by_name, ["loss"]))
    assert len({*looks}) == 12
    assert [colour for colour, *_ in looks] == 3 * [style.COLOURS[name] for name in adversaries]
    dashes = [look for _, *look in looks]
    assert all(part == 4 * part[:1] for part in (dashes[:4], dashes[4:8], dashes[8:]))
    # Of one method, and of none (VAEs), too.
    for config in (SSLConfig(adversary="clae"), VAEConfig()):
        run_by_seed = {str(i): made(config.replace(seed=i), {}, lines=log) for i in range(12)}
        assert len({*lines_of(plots.curves(run_by_seed, ["loss"]))}) == 12


def test_an_adversary_of_one_s_own_has_a_colour_of_its_own():
    colours = [style.colour(name) for name in ("mine", "yours", "mine")]
    assert colours[0] == colours[2] != colours[1]
    assert not {*colours} & {
        style.COLOURS[name] for name in ("none", "idaa", "clae", "random_sign")
    }


def test_runs_compare_by_the_loss_on_clean_pairs():
    plain_lines = [{"step": i, "loss": 4.0 - i} for i in range(3)]
    attack_lines = [{"step": i, "loss": 8.0 - i, "clean_loss": 5.0 - i} for i in range(3)]
    (axis,) = plots.curves({"plain": plain_lines, "attacked": attack_lines}, ["loss"]).axes
    assert [[*line.get_ydata()] for line in axis.lines] == [[4, 3, 2], [5, 4, 3]]
    assert "clean pairs" in axis.get_ylabel()
    (lone_axis,) = plots.curves({"attacked": attack_lines}, ["loss"]).axes
    assert [*lone_axis.lines[0].get_ydata()] == [8, 7, 6] and "clean" not in lone_axis.get_ylabel()


@pytest.mark.parametrize("steps", [[2], [1, 2], [0, 5000]])
def test_steps_are_whole_numbers(steps):
    lines = [{"step": step, "loss": 1.0} for step in steps]
    (axis,) = plots.curves({"a": lines}, ["loss"]).axes
    assert all(tick == round(tick) for tick in axis.get_xticks())


def test_validation_has_its_interval_as_a_band():
    ends = {"knn_low_val": 38.0, "knn_high_val": 43.0}
    log = [{"step": i, "knn_top1_val": 40.0 + i, **ends} for i in range(2)]
    (axis,) = plots.curves({"": log}, ["knn_top1_val"]).axes
    (band,) = axis.collections
    assert {y for _, y in band.get_paths()[0].vertices} == {38, 43}


def test_a_study_of_vaes_alone_has_no_line_and_is_no_error():
    row = dict(axis="dim", metric="rate", split="validation", features="encoder", adversary="")
    figure = plots.sensitivity(pd.DataFrame([row | dict(at=at, value=9.0) for at in (8, 16)]))
    assert not any(axis.containers for axis in figure.axes)


def test_no_adversary_is_a_line_over_epsilon():
    row = dict(axis="epsilon", metric="kNN", split="validation", features="encoder", seed=0)
    frame = pd.DataFrame([
        row | dict(at=0.1, adversary="IDAA", value=41.0, low=40.0, high=42.0),
        row | dict(at=0.3, adversary="IDAA", value=43.0, low=42.0, high=44.0),
        row | dict(axis=None, at=None, adversary="no adversary", value=39.0, low=38.0, high=40.0),
    ])  # fmt: skip
    figure = plots.sensitivity(frame, ["axis", "at", "adversary"])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(names) == ["IDAA", "no adversary"]
    line = figure.axes[0].lines[-1]
    assert {*line.get_ydata()} == {39} and line.get_color() == style.COLOURS["none"]
    assert line.get_label() == "no adversary"
    assert figure.axes[0].patches[-1].get_bbox().extents[[1, 3]].tolist() == [38, 40]
