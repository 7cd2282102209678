from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from tracklight.figures import plots


def line(axes, label):
    (found,) = (each for each in axes.lines if str(each.get_label()).startswith(label))
    return found


def drawn(series):
    """Return each panel's title and place, and its lines as x and y by their label."""
    return {
        f"{axes.get_title(loc='left')}, {place}": {
            str(each.get_label()): np.asarray(each.get_data()).tolist() for each in axes.lines
        }
        for place, axes in enumerate(plots.learning_curves(series).axes, 1)
    }


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_learning_curves_show_each_stage_of_a_metric_in_one_panel_loss_first():
    series = {
        "val/accuracy": ([10, 20], [0.5, 0.75]),
        "train/loss": (range(1, 21), np.linspace(2, 1, 20)),
        "train/loss_epoch": ([10, 20], [1.8, 1.2]),
        "val/loss": ([10, 20], [1.9, 1.4]),
        "score": ([20], [0.75]),
        "system/cpu": ([1, 2], [3.0, 4.0]),
    }
    figure = plots.learning_curves(series, best_step=20)
    loss, accuracy = figure.axes
    assert (loss.get_title(loc="left"), accuracy.get_title(loc="left")) == ("loss", "accuracy")
    assert line(loss, "val").get_ydata().tolist() == [1.9, 1.4]
    assert line(loss, "train epoch").get_xdata().tolist() == [10, 20]
    assert line(loss, "train step").get_ydata().tolist() == list(series["train/loss"][1])
    assert list(line(loss, "best").get_xdata()) == [20, 20]
    assert loss.get_xlim() == accuracy.get_xlim()


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        ("train_loss", "train/loss"),
        ("val_acc", "val/acc"),
        ("valid_loss", "val/loss"),
        ("validation/loss", "val/loss"),
        ("test_loss", "test/loss"),
        ("train_loss_epoch", "train/loss_epoch"),
        ("val_top_5_acc", "val/top_5_acc"),
    ],
)
def test_stage_is_read_before_a_slash_and_before_an_underscore(foreign, ours):
    points = ([1, 2], [2.0, 1.0])
    assert drawn({foreign: points}) == drawn({ours: points}) != {}


def test_each_metric_without_a_stage_has_a_panel_behind_those_with_one_learning_rates_last():
    points = ([1, 2], [2.0, 1.0])
    series = dict.fromkeys(("lr-SGD", "my_metric", "loss", "val_loss", "trainer"), points)
    series["single"] = ([2], [1.0])
    assert list(drawn(series)) == ["loss, 1", "loss, 2", "my metric, 3", "trainer, 4"]
    del series["trainer"]
    assert list(drawn(series)) == ["loss, 1", "loss, 2", "my metric, 3", "lr-SGD, 4"]
    assert drawn(series)["my metric, 3"] == {"no stage": [[1, 2], [2, 1]]}


@pytest.mark.parametrize(
    "name",
    [
        *("system/cpu", "gradient/norm", "evaluate/test_loss", "best/val/loss", "sweep/failed"),
        *("ols/loss", "DeviceStatsMonitor.on_train_batch_start/cpu", "score", "epoch"),
    ],
)
def test_what_is_logged_beside_training_has_no_panel(name):
    assert drawn({name: ([1, 2], [2.0, 1.0])}) == {"no metric was logged twice, 1": {}}


@pytest.mark.parametrize(("key", "stage"), [("train_loss", "train "), ("loss", "")])
def test_steps_and_epochs_of_a_metric_share_a_panel(key, stage):
    steps, epochs = ([1, 2, 3, 4], [4.0, 3.0, 2.0, 1.0]), ([2, 4], [3.5, 1.5])
    shown = {f"{stage}step": list(map(list, steps)), f"{stage}epoch": list(map(list, epochs))}
    for at_step in (f"{key}_step", key):
        assert drawn({at_step: steps, f"{key}_epoch": epochs}) == {"loss, 1": shown}


def test_step_that_is_an_epoch_is_drawn_once():
    points = ([1, 2], [2.0, 1.0])
    series = {"train/loss": points, "train/loss_epoch": points}
    assert drawn(series) == {"loss, 1": {"train epoch": [[1, 2], [2, 1]]}}


def test_batches_of_an_evaluation_are_left_out_where_their_mean_is_known():
    series = {"val_loss_step": ([2] * 3 + [4] * 3, [1.0] * 6), "val_loss_epoch": ([2, 4], [3, 1])}
    assert drawn(series) == {"loss, 1": {"val epoch": [[2, 4], [3, 1]]}}


def test_name_that_merely_ends_as_steps_do_is_kept():
    assert list(drawn({"time_per_step": ([1, 2], [2.0, 1.0])})) == ["time per step, 1"]


def test_two_points_in_all_stages_together_are_enough_for_a_panel():
    once = {"val/accuracy": ([9], [0.75]), "test/accuracy": ([9], [0.5])}
    assert drawn(once)["accuracy, 1"] == {"val": [[9], [0.75]], "test 0.5": [[9], [0.5]]}
    assert list(drawn({"val/accuracy": ([9], [0.75])})) == ["no metric was logged twice, 1"]
    once["test/accuracy"] = ([9], [float("nan")])
    assert list(drawn(once)) == ["no metric was logged twice, 1"]


def test_each_stage_is_seen_where_all_meet():
    (axes,) = plots.learning_curves(
        {f"{stage}/accuracy": ([9], [0.5]) for stage in plots.STAGES}, best_step=9
    ).axes
    marked = [each for each in axes.lines if each.get_label() != "best"]
    marked.sort(key=lambda each: each.get_zorder())  # stable: those of one height in drawing order
    assert [each.get_label() for each in marked] == ["test 0.5", "train", "val"]
    sizes = [each.get_markersize() for each in marked]
    assert all(larger > 1.5 * smaller for larger, smaller in pairwise(sizes))


def test_star_lies_on_the_line_of_many_points():
    series = {"val/loss": (range(90), range(90)), "test/loss": ([89], [3.0])}
    (axes,) = plots.learning_curves(series).axes
    assert line(axes, "test").get_zorder() > line(axes, "val").get_zorder()


def test_words_stay_inside_the_figure_and_those_above_a_panel_cover_no_curve():
    name, values = "long_" * 50 + "name", [-1.2345e-05, -2.3456e-05]
    series = {f"{stage}/{name}": ([1, 2], values) for stage in ("train", "val", "test")}
    series[f"train/{name}_epoch"] = ([2], [-2e-05])
    series["train/a"] = ([1, 2], values)  # the widest legend is at the right edge
    figure = plots.learning_curves(series, best_step=2)
    figure.draw_without_rendering()
    assert len(figure.axes[1].get_legend().get_texts()) == 5
    left_of_next = figure.axes[1].get_window_extent().x0
    for axes, right in zip(figure.axes, (left_of_next, figure.bbox.x1), strict=True):
        legend = axes.get_legend().get_window_extent()
        title = axes._left_title.get_window_extent()
        assert axes.get_window_extent().y1 <= legend.y0 + 1 < legend.y1 <= title.y0 + 1
        assert max(legend.x1, title.x1) < right
        assert title.y1 < figure.bbox.y1
        assert axes.yaxis.get_tightbbox().x0 >= 0
        assert axes.yaxis.get_offset_text().get_text() == ""  # it would stand in the legend


def test_long_curve_is_drawn_as_means_of_neighbours():
    steps = np.arange(1, 10_001)
    figure = plots.learning_curves({"train/loss": (steps, steps * 2.0)})
    x, y = line(figure.axes[0], "train").get_data()
    assert len(x) <= plots.MAX_DRAWN
    assert y == pytest.approx(2 * x)
    assert y.mean() == pytest.approx(steps.mean() * 2)


def test_test_value_is_marked_at_the_step_of_the_tested_weights():
    series = {"val/loss": ([1, 2, 3], [3, 1, 2]), "test/loss": ([3], [1.25])}
    star = line(plots.learning_curves(series, best_step=2).axes[0], "test 1.25")
    assert [float(v[0]) for v in star.get_data()] == [2, 1.25]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([12.0, 2.0], "log"),
        ([2.0, 1.0], "linear"),
        ([100.0, -1.0], "linear"),
        ([0.9, 0.1], "log"),
        ([0.1, 0.9], "linear"),
        ([0.1, 0.9, 0.8, 0.05], "log"),
        ([0.1, 0.2, 0.9, 0.09], "linear"),
        ([1.0, 9.0], "log"),
        ([0.0, 9.0], "linear"),
    ],
)
def test_wide_positive_metric_has_a_logarithmic_axis_unless_it_rises_as_an_accuracy(values, scale):
    figure = plots.learning_curves({"val/loss": (range(len(values)), values)})
    assert figure.axes[0].get_yscale() == scale


@pytest.mark.parametrize("low", [1.0, 1.1, 3.4, 5.2, 7.5])
@pytest.mark.parametrize("span", [5.1, 12.0, 25.0, 1e3, 1e9, 1e36])
def test_a_logarithmic_axis_is_labelled_however_far_it_goes(low, span):
    (axes,) = plots.learning_curves({"val/loss": ([1, 2], [low, low * span])}).axes
    low, high = axes.get_ylim()
    assert 3 <= sum(low <= tick <= high for tick in axes.get_yticks()) <= 12


def test_points_that_are_not_finite_are_left_out():
    figure = plots.learning_curves({"val/loss": ([3, 1, 2], [1.0, 3.0, float("nan")])})
    assert line(figure.axes[0], "val").get_xydata().tolist() == [[1, 3], [3, 1]]


def test_nothing_logged_is_said(tmp_path):
    figure = plots.learning_curves({})
    assert "no metric" in figure.axes[0].get_title(loc="left")


def test_fit_shows_the_points_and_the_line():
    x = np.array([1.0, 2.0, 4.0])
    figure = plots.fitted_line({"train": (x, 3 * x)}, (x, 2 * x), "dose", "y = 2 dose")
    axes = figure.axes[0]
    assert np.asarray(axes.collections[0].get_offsets()).tolist() == [[1, 3], [2, 6], [4, 12]]
    assert line(axes, "fitted").get_ydata().tolist() == [2, 4, 8]
    assert axes.get_xlabel() == "dose"


def test_residuals_are_target_minus_prediction_with_their_rms():
    true, predicted = np.array([[3.0], [5.0]]), np.array([[4.0], [2.0]])
    cloud = plots.residuals({"test": (true, predicted)}).axes[0]
    assert np.asarray(cloud.collections[0].get_offsets()).tolist() == [[4, -1], [2, 3]]
    assert f"test: RMSE {5**0.5:.4g}" in cloud.get_title(loc="left")


def test_prediction_against_true_has_the_diagonal():
    pair = (np.array([[1.0], [3.0]]), np.array([[0.0], [2.0]]))
    axes = plots.predicted_against_true({"val": pair}).axes[0]
    assert np.asarray(axes.collections[0].get_offsets()).tolist() == [[1, 0], [3, 2]]
    assert line(axes, "prediction =").get_xydata().tolist() == [[0, 0], [3, 3]]


def test_confusion_counts_stand_in_their_cells_and_only_mistakes_are_coloured():
    counts = np.array([[8, 2, 0], [0, 9, 1], [0, 0, 0]])
    axes = plots.confusion(counts, ["a", "b", "c"], "val").axes[0]
    shown = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in axes.texts}
    assert shown == {(0, 0): "8", (0, 1): "2", (1, 1): "9", (1, 2): "1"}
    shares = axes.images[0].get_array()
    assert shares.tolist() == [[0, 0.2, 0], [0, 0, 0.1], [0, 0, 0]]
    assert axes.get_title(loc="left") == "val: 17 of 20 right (85.00%)"
    assert axes.get_ylabel() == "true class"


PROBABILITIES = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.55, 0.45]])
TARGETS = np.array([0, 0, 0, 1])


def test_worst_mistakes_are_the_wrong_rows_by_falling_confidence():
    assert plots.worst_mistakes(PROBABILITIES, TARGETS).tolist() == [2, 1, 3]
    assert plots.worst_mistakes(PROBABILITIES, TARGETS, count=1).tolist() == [2]


def test_mistakes_are_shown_in_order_with_their_image_and_both_classes():
    images = np.zeros((4, 6, 6))
    images[2, 1, 2] = 7.0  # of the worst mistake
    axes = plots.mistakes(images, PROBABILITIES, TARGETS, ["cat", "dog"], "test").axes[0]
    assert texts(axes) == ["cat → dog  0.80", "cat → dog  0.60", "dog → cat  0.55"]
    mosaic = np.asarray(axes.images[0].get_array().filled(np.nan))
    (y,), (x,) = np.nonzero(mosaic == 1)
    at = axes.texts[0].get_position()
    assert x < at[0] < x + 6
    assert y > at[1]


def test_no_mistake_is_said():
    figure = plots.mistakes(np.zeros((1, 4, 4)), np.eye(2)[:1], TARGETS[:1], "ab", "val")
    assert figure.axes[0].get_title(loc="left") == "val: no mistake"


def test_first_layer_shows_every_unit_as_an_image_with_zero_in_the_middle_of_the_scale():
    weights = np.arange(3 * 4 * 5, dtype=float).reshape(3, 4, 5) - 30
    image = plots.first_layer(weights).axes[0].images[0]
    shown = np.asarray(image.get_array().filled(np.nan))
    assert np.sort(shown[~np.isnan(shown)]).tolist() == np.sort(weights.ravel()).tolist()
    low, high = image.get_clim()
    assert low == -high


def test_of_many_units_the_strongest_are_shown():
    weights = np.zeros((200, 2, 2))
    weights[50:194] = 1
    shown = np.asarray(plots.first_layer(weights).axes[0].images[0].get_array())
    assert np.nansum(shown) == 144 * 4


def test_saved_figure_is_a_readable_png_of_its_size(tmp_path):
    figure = plots.residuals({"train": (np.zeros((3, 1)), np.ones((3, 1)))})
    plots.save(figure, tmp_path / "deep" / "figure.png")
    with Image.open(tmp_path / "deep" / "figure.png") as image:
        assert image.size == (792, 407)
        assert len(image.convert("RGB").getcolors(100_000)) > 10


def test_drawing_leaves_pyplot_alone():
    import subprocess
    import sys

    code = (
        "import sys, numpy; from tracklight.figures import plots;"
        "plots.learning_curves({'val/loss': ([1, 2], [2.0, 1.0])});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
