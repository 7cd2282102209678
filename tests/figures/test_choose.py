import logging

import numpy as np
import pytest
import torch
from PIL import Image

from tracklight.data.line import Line
from tracklight.data.tensor_data import Split, TensorData
from tracklight.engine.blocks import NonFinite
from tracklight.figures import plots
from tracklight.figures.choose import draw_figures
from tracklight.models.linear_regression import LinearRegression
from tracklight.models.mlp import MLP

SERIES = {"train/loss": ([1, 2], [2.0, 1.0])}


class Pictures(TensorData):
    """Six images whose class is where their one bright pixel is."""

    def load(self):
        self.class_names = ["left", "right"]
        self.in_features, self.out_features = 16, 2
        images = torch.zeros(6, 4, 4, dtype=torch.uint8)
        labels = torch.tensor([0, 1, 0, 1, 0, 1])
        images[range(6), 1, labels * 3] = 255
        return {
            "train": Split(images, labels),
            "val": Split(images[:4], labels[:4]),
            "test": Split(images[:2], 1 - labels[:2]),
        }

    def transform(self, features):
        return features.float().div(255).unsqueeze(1)


def separating_model():
    model = MLP(in_features=16, out_features=2, hidden=[2])
    with torch.no_grad():
        first, last = model.layers[1], model.layers[3]
        first.weight.copy_(torch.zeros(2, 16))
        first.weight[0, 4] = first.weight[1, 7] = 1
        first.bias.zero_()
        last.weight.copy_(torch.eye(2) * 5)
        last.bias.zero_()
    return model


def draw(monkeypatch, tmp_path, model, data, tested=True):
    """Return the figures by name, caught before they are written."""
    drawn = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.update({path.stem: figure}))
    data.setup()
    draw_figures(model, data, SERIES, tmp_path, best_step=2, tested=tested)
    return drawn


def test_classifier_of_images_has_its_four_figures(monkeypatch, tmp_path):
    drawn = draw(monkeypatch, tmp_path, separating_model(), Pictures(2, 0))
    assert set(drawn) == {"learning_curves", "confusion", "mistakes", "first_layer"}
    cells = {t.get_position(): t.get_text() for t in drawn["confusion"].axes[0].texts}
    assert cells == {(0, 1): "1", (1, 0): "1"}  # (predicted, true): the test part is mislabelled


def test_test_part_is_not_looked_at_unless_it_was_tested(monkeypatch, tmp_path):
    drawn = draw(monkeypatch, tmp_path, separating_model(), Pictures(2, 0), tested=False)
    assert drawn["confusion"].axes[0].get_title(loc="left") == "val: 4 of 4 right (100.00%)"


def test_regression_on_one_feature_shows_its_line(monkeypatch, tmp_path):
    model = LinearRegression()
    with torch.no_grad():
        model.linear.weight.fill_(1.5)
        model.linear.bias.fill_(-0.25)
    data = Line(None, 0, 2.0, 0.0, 0.0, 4, 1)
    drawn = draw(monkeypatch, tmp_path, model, data)
    assert set(drawn) == {"learning_curves", "fit", "residuals"}
    axes = drawn["fit"].axes[0]
    assert axes.get_title(loc="left") == "y = 1.5 x - 0.25"
    x, y = axes.lines[0].get_data()
    assert y == pytest.approx(1.5 * x - 0.25)
    offsets = np.asarray(drawn["residuals"].axes[0].collections[0].get_offsets())
    assert offsets[:, 1] == pytest.approx([0.75, 1.25, 1.75, 2.25])


def test_regression_on_several_features_shows_predictions_against_targets(monkeypatch, tmp_path):
    drawn = draw(monkeypatch, tmp_path, LinearRegression(3), Line(None, 0, 2.0, 0.0, 0.0, 9, 3))
    assert drawn["fit"].axes[0].get_title(loc="left") == "Predicted against true"


def test_files_are_pictures_and_the_model_is_left_in_its_mode(tmp_path):
    data = Pictures(2, 0)
    data.setup()
    model = separating_model().train()
    paths = draw_figures(model, data, SERIES, tmp_path / "figures")
    assert model.training
    for path in paths:
        Image.open(path).verify()
    assert len(paths) == 4


def test_model_that_cannot_be_drawn_costs_a_warning_not_the_run(tmp_path, caplog):
    data = Pictures(2, 0)
    data.setup()
    with caplog.at_level(logging.WARNING):
        drawn = draw_figures(LinearRegression(3), data, SERIES, tmp_path)
    assert [path.name for path in drawn] == ["learning_curves.png"]  # which need no model
    assert "no figures" in caplog.text


def test_run_keeps_its_figures_beside_its_checkpoints(train, spare_model):
    finished = train("trainer.max_epochs=2", "num_threads=1")
    names = {path.name for path in (finished.folder / "figures").iterdir()}
    assert names == {"learning_curves.png", "fit.png", "residuals.png"}
    assert finished.history("score") == [(2, finished.score)]


def test_run_that_failed_keeps_the_curves_that_show_why(train, tmp_path):
    with pytest.raises(NonFinite):
        train("optimizer.lr=10.0", "num_threads=1")
    (folder,) = tmp_path.glob("runs/artifacts/*/artifacts/figures")
    assert [path.name for path in folder.iterdir()] == ["learning_curves.png"]


def test_run_without_figures_has_none(train, spare_model):
    finished = train("trainer.max_epochs=1", "num_threads=1", "tracking.figures=false")
    assert not (finished.folder / "figures").exists()
