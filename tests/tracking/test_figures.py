import numpy as np
import pytest
from PIL import Image

from tracklight.tracking import class_figures, figures


def line(axes, label):
    (found,) = (each for each in axes.lines if str(each.get_label()).startswith(label))
    return found


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
    figure = figures.learning_curves(series, best_step=20)
    loss, accuracy = figure.axes
    assert (loss.get_title(loc="left"), accuracy.get_title(loc="left")) == ("loss", "accuracy")
    assert line(loss, "val").get_ydata().tolist() == [1.9, 1.4]
    assert line(loss, "train, each epoch").get_xdata().tolist() == [10, 20]
    assert line(loss, "train, each step").get_ydata().tolist() == list(series["train/loss"][1])
    assert list(line(loss, "best").get_xdata()) == [20, 20]


def test_long_curve_is_drawn_as_means_of_neighbours():
    steps = np.arange(1, 10_001)
    figure = figures.learning_curves({"train/loss": (steps, steps * 2.0)})
    x, y = line(figure.axes[0], "train").get_data()
    assert len(x) <= figures.MAX_DRAWN
    assert y == pytest.approx(2 * x)
    assert y.mean() == pytest.approx(steps.mean() * 2)


def test_test_value_is_marked_at_the_step_of_the_tested_weights():
    series = {"val/loss": ([1, 2, 3], [3, 1, 2]), "test/loss": ([3], [1.25])}
    star = line(figures.learning_curves(series, best_step=2).axes[0], "test 1.25")
    assert [float(v[0]) for v in star.get_data()] == [2, 1.25]


@pytest.mark.parametrize(
    ("values", "scale"), [([100.0, 1.0], "log"), ([2.0, 1.0], "linear"), ([100.0, -1.0], "linear")]
)
def test_wide_positive_metric_has_a_logarithmic_axis(values, scale):
    figure = figures.learning_curves({"val/loss": ([1, 2], values)})
    assert figure.axes[0].get_yscale() == scale


@pytest.mark.parametrize("top", [25.0, 1e3, 1e9, 1e36])
def test_a_logarithmic_axis_is_labelled_however_far_it_goes(top):
    (axes,) = figures.learning_curves({"val/loss": ([1, 2], [1.0, top])}).axes
    low, high = axes.get_ylim()
    assert 3 <= sum(low <= tick <= high for tick in axes.get_yticks()) <= 12


def test_points_that_are_not_finite_are_left_out():
    figure = figures.learning_curves({"val/loss": ([3, 1, 2], [1.0, 3.0, float("nan")])})
    assert line(figure.axes[0], "val").get_xydata().tolist() == [[1, 3], [3, 1]]


def test_nothing_logged_is_said(tmp_path):
    figure = figures.learning_curves({})
    assert "no metric" in figure.axes[0].get_title(loc="left")


def test_fit_shows_the_points_and_the_line():
    x = np.array([1.0, 2.0, 4.0])
    figure = figures.fitted_line({"train": (x, 3 * x)}, (x, 2 * x), "dose", "y = 2 dose")
    axes = figure.axes[0]
    assert np.asarray(axes.collections[0].get_offsets()).tolist() == [[1, 3], [2, 6], [4, 12]]
    assert line(axes, "fitted").get_ydata().tolist() == [2, 4, 8]
    assert axes.get_xlabel() == "dose"


def test_residuals_are_target_minus_prediction_with_their_rms():
    true, predicted = np.array([[3.0], [5.0]]), np.array([[4.0], [2.0]])
    cloud = figures.residuals({"test": (true, predicted)}).axes[0]
    assert np.asarray(cloud.collections[0].get_offsets()).tolist() == [[4, -1], [2, 3]]
    assert f"test: RMSE {5**0.5:.4g}" in cloud.get_title(loc="left")


def test_prediction_against_true_has_the_diagonal():
    pair = (np.array([[1.0], [3.0]]), np.array([[0.0], [2.0]]))
    axes = figures.predicted_against_true({"val": pair}).axes[0]
    assert np.asarray(axes.collections[0].get_offsets()).tolist() == [[1, 0], [3, 2]]
    assert line(axes, "prediction =").get_xydata().tolist() == [[0, 0], [3, 3]]


def test_confusion_counts_stand_in_their_cells_and_only_mistakes_are_coloured():
    counts = np.array([[8, 2, 0], [0, 9, 1], [0, 0, 0]])
    axes = class_figures.confusion(counts, ["a", "b", "c"], "val").axes[0]
    shown = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in axes.texts}
    assert shown == {(0, 0): "8", (0, 1): "2", (1, 1): "9", (1, 2): "1"}
    shares = axes.images[0].get_array()
    assert shares.tolist() == [[0, 0.2, 0], [0, 0, 0.1], [0, 0, 0]]
    assert axes.get_title(loc="left") == "val: 17 of 20 right (85.00%)"
    assert axes.get_ylabel() == "true class"


PROBABILITIES = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.55, 0.45]])
TARGETS = np.array([0, 0, 0, 1])


def test_worst_mistakes_are_the_wrong_rows_by_falling_confidence():
    assert class_figures.worst_mistakes(PROBABILITIES, TARGETS).tolist() == [2, 1, 3]
    assert class_figures.worst_mistakes(PROBABILITIES, TARGETS, count=1).tolist() == [2]


def test_mistakes_are_shown_in_order_with_their_image_and_both_classes():
    images = np.zeros((4, 6, 6))
    images[2, 1, 2] = 7.0  # of the worst mistake
    axes = class_figures.mistakes(images, PROBABILITIES, TARGETS, ["cat", "dog"], "test").axes[0]
    assert texts(axes) == ["cat → dog  0.80", "cat → dog  0.60", "dog → cat  0.55"]
    mosaic = np.asarray(axes.images[0].get_array().filled(np.nan))
    (y,), (x,) = np.nonzero(mosaic == 1)
    at = axes.texts[0].get_position()
    assert x < at[0] < x + 6
    assert y > at[1]


def test_no_mistake_is_said():
    figure = class_figures.mistakes(np.zeros((1, 4, 4)), np.eye(2)[:1], TARGETS[:1], "ab", "val")
    assert [text.get_text() for text in figure.texts] == ["val: no mistake"]


def test_first_layer_shows_every_unit_as_an_image_with_zero_in_the_middle_of_the_scale():
    weights = np.arange(3 * 4 * 5, dtype=float).reshape(3, 4, 5) - 30
    image = class_figures.first_layer(weights).axes[0].images[0]
    shown = np.asarray(image.get_array().filled(np.nan))
    assert np.sort(shown[~np.isnan(shown)]).tolist() == np.sort(weights.ravel()).tolist()
    low, high = image.get_clim()
    assert low == -high


def test_of_many_units_the_strongest_are_shown():
    weights = np.zeros((200, 2, 2))
    weights[50:194] = 1
    shown = np.asarray(class_figures.first_layer(weights).axes[0].images[0].get_array())
    assert np.nansum(shown) == 144 * 4


def test_saved_figure_is_a_readable_png_of_its_size(tmp_path):
    figure = figures.residuals({"train": (np.zeros((3, 1)), np.ones((3, 1)))})
    figures.save(figure, tmp_path / "deep" / "figure.png")
    with Image.open(tmp_path / "deep" / "figure.png") as image:
        assert image.size == (792, 407)
        assert len(image.convert("RGB").getcolors(100_000)) > 10


def test_drawing_leaves_pyplot_alone():
    import subprocess
    import sys

    code = (
        "import sys, numpy; from tracklight.tracking import figures;"
        "figures.learning_curves({'val/loss': ([1, 2], [2.0, 1.0])});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
