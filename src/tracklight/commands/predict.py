"""Predicts from files: images for a classifier of images, CSV rows for a regression."""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from pandas import DataFrame, Series, json_normalize
from torch import Tensor

from tracklight.commands.digit_image import doubts, read_image
from tracklight.data.csv_columns import read_features
from tracklight.errors import BadInput
from tracklight.experiment import stored
from tracklight.figures.choose import predict_rows
from tracklight.runs.select import resolve_sweep, select_run

Prediction = dict[str, Any]


def run(args: Namespace) -> int:
    """Print a prediction for each image or row; return the exit code."""
    store = stored.open_store(args.uri, args.dir)
    trained = resolve_sweep(store, select_run(store, args.run, args.experiment))
    if trained.info.status == "FAILED":
        warning = f"warning: run {trained.info.run_id} has failed; its best weights are used"
        print(warning, file=sys.stderr)
    inputs = stored.load_inputs(store, trained)
    shape = inputs.get("shape") or []
    takes_images = inputs.get("class_names") and len(shape) == 2
    if not takes_images and not (inputs.get("feature_names") and len(shape) == 1):
        raise BadInput(f"the model of this run takes {shape or 'what'} of {inputs['name']}, not files")
    cfg = stored.load_config(store, trained, stored.ANY_HARDWARE)
    rebuilt = stored.rebuild(store, trained, cfg, read=False)
    predictions, num_bad = [], 0
    for path in args.files:
        try:
            if takes_images:
                pixels, notes = read_image(path, (shape[0], shape[1]), args.invert)
                notes += doubts(pixels) if inputs["class_names"] == [*"0123456789"] else []
                note = {"note": ", ".join(notes)} if notes else {}
                features, labels = torch.from_numpy(pixels)[None], [{"file": str(path), **note}]
            else:
                features, labels = _read_table(path, inputs["feature_names"], rebuilt.data)
            predictions += _predict(rebuilt, inputs, features, labels)
        except BadInput as error:
            num_bad += 1
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    _write_predictions(predictions, args.format)
    return 0 if not num_bad else 1 if predictions else 2


def _read_table(path: Path, names: list[str], data: Any) -> tuple[Tensor, list[Prediction]]:
    values = read_features(path, names, getattr(data, "delimiter", ","), getattr(data, "decimal", "."))
    encode = getattr(data, "encode", None)
    try:
        features = encode(values) if encode else torch.tensor(values, dtype=torch.float32)
    except BadInput as error:
        raise BadInput(f"{path}: {str(error).partition(': ')[2]}") from None
    return features, [{"file": str(path), "row": i + 1} for i in range(len(values))]


def _predict(
    rebuilt: stored.RebuiltRun, inputs: dict[str, Any], features: Tensor, labels: list[Prediction]
) -> list[Prediction]:
    """Extend the labels of raw rows (N, ...) by the model's outputs, as plain values."""
    outputs = predict_rows(rebuilt.model, rebuilt.data, features)  # type: ignore[arg-type]
    if not outputs.isfinite().all():
        raise BadInput(f"{labels[0]['file']}: the model's output is not finite")
    classes = inputs.get("class_names")
    names = classes or inputs.get("target_names") or []
    if outputs.shape[1:] != (len(names),):
        shape = list(outputs.shape[1:])
        raise BadInput(f"{labels[0]['file']}: the model's outputs are {shape}, named are {names[:9]}")
    rows = (outputs.double().softmax(1) if classes else outputs).tolist()
    found: list[Prediction] = [dict(zip(names, row, strict=True)) for row in rows]
    if classes:
        best = [max(shares, key=shares.__getitem__) for shares in found]
        found = [
            {"prediction": name, "probability": shares[name], "probabilities": shares}
            for name, shares in zip(best, found, strict=True)
        ]
    return [label | each for label, each in zip(labels, found, strict=True)]


def _write_predictions(predictions: list[Prediction], form: str) -> None:
    if form == "json":
        print(json.dumps(predictions, indent=1, ensure_ascii=False))
    elif form == "csv":
        frame = json_normalize(predictions)
        keys = [key for key in frame if key != "note"]
        frame = frame.reindex(columns=[*keys, "note"] if keys else ["file"])
        header = [re.sub(r"^probabilities\.(.*)", r"p(\1)", key) for key in frame]
        frame.to_csv(sys.stdout, header=header, index=False, lineterminator="\n")
    elif predictions:
        _print_table(predictions)


def _print_table(predictions: list[Prediction]) -> None:
    frame = DataFrame(predictions)
    if "probabilities" in frame:
        ranked = [Series(each).nlargest(3) for each in frame.pop("probabilities")]
        rest = [", ".join(f"{name} {share:.1%}" for name, share in each.iloc[1:].items()) for each in ranked]
        frame["probability"] = frame["probability"].map("{:.1%}".format)
        frame.insert(3, "next", rest)
    if "note" in frame:
        frame["note"] = frame.pop("note").fillna("")
    print(frame.to_string(index=False, float_format="{:.6g}".format))
