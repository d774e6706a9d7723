"""Pictures of runs: colours and lines that all can tell apart, layers in order, text that fits."""

from itertools import combinations

import matplotlib.image
import pytest
import torch
from helpers.drawn import kept

from fastals.cli import plots

# Machado, Oliveira, Fernandes 2009, severity 1: linear RGB as seen without one kind of cones.
PROTANOPIA = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
DEUTERANOPIA = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
LEAST = 17  # in CIELAB; 2.3 is a difference that is just seen


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    return kept(monkeypatch, plots, 0)


def lines(losses, **sizes):
    """Lines of metrics with the step sizes of each unit."""
    return [
        {"loss_before": loss, "units": [{"name": n, "step_size": s[i]} for n, s in sizes.items() if s[i] is not None]}
        for i, loss in enumerate(losses)
    ]


def linear(color):
    value = torch.tensor([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)], dtype=torch.float64)
    return torch.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIELAB of linear sRGB, white D65."""
    white = torch.tensor([0.95047, 1.0, 1.08883], dtype=torch.float64)
    xyz = torch.tensor(TO_XYZ, dtype=torch.float64) @ rgb.clamp(0, 1) / white
    x, y, z = torch.where(xyz > 216 / 24389, xyz ** (1 / 3), (24389 / 27 * xyz + 16) / 116)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", [torch.eye(3).tolist(), PROTANOPIA, DEUTERANOPIA], ids=["all", "no red", "no green"])
def test_colours_are_told_apart_without_one_kind_of_cones(seen):
    seen = torch.tensor(seen, dtype=torch.float64)
    colors = {color: lab(seen @ linear(color)) for color in plots.COLORS}
    for one, other in combinations(colors, 2):
        assert torch.dist(colors[one], colors[other]) >= LEAST, (one, other)


def test_colours_stand_out_from_white():
    luminance = torch.tensor(TO_XYZ[1], dtype=torch.float64)
    assert min(1.05 / (luminance @ linear(color) + 0.05) for color in plots.COLORS) > 2.2


def test_every_run_of_a_loss_picture_has_a_look_of_its_own_and_is_named(figures, tmp_path):
    runs = {f"runs/name-of-run-{i}": lines([2.0, 1.5, 1.0]) for i in range(20)}
    plots.plot_losses(runs, tmp_path / "loss.png")
    (axes,) = figures[0].axes
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines]
    assert len(set(looks)) == len(looks) == 40, "raw losses and running mean of each run"
    means = [line for line in axes.lines if line.get_label() in runs]
    assert len({(line.get_linestyle(), line.get_marker()) for line in means}) == 20
    for mean, raw in zip(axes.lines[::2], axes.lines[1::2], strict=True):
        assert (mean.get_color(), mean.get_linestyle()) == (raw.get_color(), raw.get_linestyle())
        assert raw.get_alpha() < 0.5
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == list(runs)
    assert axes.get_window_extent().height > 1.5 * plots.DPI, "the legend takes no room from the axes"


def test_losses_begin_at_zero_if_they_come_near_it(figures, tmp_path):
    for losses in ([2.0, 0.1, float("nan")], [2.0, 1.9, 1.8], [float("nan")]):
        plots.plot_losses({"als": lines(losses)}, tmp_path / "loss.png")
    near, far, _ = (figure.axes[0].get_ylim()[0] for figure in figures)
    assert near == 0
    assert 1.5 < far < 1.8


def test_steps_are_whole_numbers_on_the_axis(figures, tmp_path):
    plots.plot_losses({"als": lines([2.0] * 20)}, tmp_path / "loss.png")
    plots.plot_step_sizes({"als": lines([2.0] * 20, a=[0.1] * 20)}, tmp_path / "sizes.png")
    for figure in figures:
        ticks = figure.axes[0].get_xticks()
        assert 3 < len(ticks) < 10
        assert all(tick == int(tick) for tick in ticks)


def test_step_sizes_go_from_dark_to_light_and_the_scale_names_the_units_from_the_bottom(figures, tmp_path):
    units = {"embeddings": [0.1, 0.2], **{f"bert.layer.{i}": [0.1, None] for i in range(12)}, "head": [0.3, 0.0]}
    plots.plot_step_sizes({"als": lines([2.0, 1.0], **units), "adamw": lines([2.0, 1.0])}, tmp_path / "sizes.png")
    axes, scale = figures[0].axes
    assert [line.get_label() for line in axes.lines] == list(units)
    greens = [line.get_color()[1] for line in axes.lines]
    assert greens == sorted(set(greens)), "the green of viridis grows"
    assert axes.lines[-1].get_ydata() == pytest.approx([0.3, float("nan")], nan_ok=True)
    named = [tick.get_text() for tick in scale.get_yticklabels()]
    places = [tick.get_position()[1] for tick in scale.get_yticklabels()]
    assert (named[0], named[1], named[-1]) == ("embeddings", "layer 1", "head")
    assert places == sorted(places)
    assert scale.get_ylim() == (-0.5, 13.5)


def test_a_merged_unit_moves_its_parts(figures, tmp_path):
    metrics = lines([2.0, 1.0], **{"a": [0.1, None], "b": [0.2, None], "a+b": [None, 0.3], "c": [0.1, 0.1]})
    plots.plot_step_sizes({"als": metrics}, tmp_path / "sizes.png")
    drawn = {line.get_label(): list(line.get_ydata()) for line in figures[0].axes[0].lines}
    assert drawn == {"a": [0.1, 0.3], "b": [0.2, 0.3], "c": [0.1, 0.1]}


def test_the_common_factor_has_a_panel_below_with_the_same_steps(figures, tmp_path):
    relay = lines([2.0, 1.0], a=[1, 1])
    for line, factor in zip(relay, (0.5, 0), strict=True):
        line |= {"joint_trials": 1, "factor": factor}
    plots.plot_step_sizes({"relay": relay, "sweep": lines([2.0, 1.0], a=[1, 1])}, tmp_path / "sizes.png")
    sizes, factor, other = figures[0].axes[:3]
    assert [axes.get_ylabel() for axes in (sizes, factor, other)] == ["step size", "common\nfactor", "step size"]
    assert factor.lines[0].get_ydata() == pytest.approx([0.5, float("nan")], nan_ok=True)
    assert factor.get_xlim() == sizes.get_xlim()
    assert factor.get_position().y1 < sizes.get_position().y0
    assert factor.get_position().x1 == pytest.approx(sizes.get_position().x1)


def test_runs_without_a_search_have_no_picture_of_step_sizes(tmp_path):
    plots.plot_step_sizes({"adamw": lines([2.0, 1.0])}, tmp_path / "sizes.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rows", [1, 3])
def test_pictures_have_the_width_of_a_telephone_in_sharp_print(rows, tmp_path):
    figure, _ = plots.new_figure(rows)
    figure.savefig(tmp_path / "empty.png")
    height, width = matplotlib.image.imread(tmp_path / "empty.png").shape[:2]
    assert (width, height) == (990, rows * 648)
