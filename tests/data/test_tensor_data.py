"""What Trainer arguments do to a DataLoader's sampler holds of our loader, too."""

from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, Sampler, TensorDataset

from foreign import Blobs
from tracklight.data.line import Line
from tracklight.data.mnist import MNIST
from tracklight.data.table import Table
from tracklight.data.tensor_data import Loader, epoch_order
from tracklight.errors import BadInput

SEED, SIZE = 5, 16


class EpochOrder(Sampler):
    """Lightning sets its epoch, and replaces it where no shuffling is asked for."""

    def __init__(self, num: int):
        self.num, self.epoch = num, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num

    def __iter__(self):
        return iter(epoch_order(self.num, SEED, self.epoch).tolist())


class OnDataLoaders(LightningDataModule):
    """The same examples as `Blobs`, by PyTorch's DataLoader."""

    def __init__(self):
        super().__init__()
        splits = Blobs(SIZE, SEED).splits
        self.parts = {name: TensorDataset(part.features, part.targets) for name, part in splits.items()}

    def train_dataloader(self):
        train = self.parts["train"]
        return DataLoader(train, SIZE, sampler=EpochOrder(len(train)), num_workers=0)

    def val_dataloader(self):
        return DataLoader(self.parts["val"], SIZE, num_workers=0)


class Seeing(LightningModule):
    """Remembers its batches."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(8, 4), []

    def training_step(self, batch, batch_idx):
        self.seen.append(("train", self.current_epoch, batch[0]))
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx) -> None:
        self.seen.append(("val", self.current_epoch, batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def batches(data: LightningDataModule, **arguments) -> list:
    module = Seeing()
    trainer = Trainer(
        **{"max_epochs": 3} | arguments,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return module.seen


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning")
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"overfit_batches": 1},
        {"overfit_batches": 3},
        {"overfit_batches": 0.5},
        {"overfit_batches": 1.0},
        {"limit_train_batches": 3},
        {"limit_train_batches": 0.3, "limit_val_batches": 0},
        {"fast_dev_run": 2},
        {"reload_dataloaders_every_n_epochs": 1},
        {"max_steps": 20},
        {"val_check_interval": 5},
        {"num_sanity_val_steps": 1},
    ],
)
def test_a_trainers_arguments_give_the_batches_that_they_give_a_dataloader(arguments, monkeypatch):
    monkeypatch.setattr("tracklight.data.tensor_data.EVALUATION_ROWS", SIZE)
    ours, plain = batches(Blobs(SIZE, SEED), **arguments), batches(OnDataLoaders(), **arguments)
    assert [each[:2] for each in ours] == [each[:2] for each in plain]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(ours, plain, strict=True))


def loader_of(rank: int, overfit: float = 0.0, sharded: bool = True, epoch: int = 0, num: int = 33) -> Loader:
    """Return the loader of one of two processes."""
    data = Blobs(SIZE, SEED, num_train=num)
    data.use_distributed_sampler = sharded
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    fields = {"global_rank": rank, "world_size": 2, "overfit_batches": overfit, "current_epoch": epoch}
    data.trainer = SimpleNamespace(**fields, strategy=strategy)
    return data.train_dataloader()


def rows(loader: Loader) -> torch.Tensor:
    return torch.cat([features for features, _ in loader])


@pytest.mark.parametrize("rank", [0, 1])
def test_of_two_processes_each_takes_the_rows_of_a_distributed_sampler(rank):
    features = Blobs(SIZE, SEED, num_train=33).splits["train"].features
    part = [*DistributedSampler(range(33), num_replicas=2, rank=rank, shuffle=False)]
    assert torch.equal(rows(loader_of(rank, overfit=1.0)), features[part])
    whole = loader_of(rank, sharded=False, epoch=2)
    assert torch.equal(rows(whole), features[epoch_order(33, SEED, 2)])


def line(**folds) -> Line:
    return Line(4, SEED, 2.0, 0.0, 0.0, 23, 1, **folds)


def table(**folds) -> Table:
    return Table(4, SEED, None, None, ["bmi", "bp", "s1"], 0.15, 0.15, False, ",", **folds)


def digits(**folds) -> MNIST:
    return MNIST(4, SEED, "nowhere", 100, True, 0.1307, 0.3081, False, **folds)


def examples(data, split: str) -> list[bytes]:
    part = data.splits.get(split)
    rows = [] if part is None else zip(part.features, part.targets, strict=True)
    return [x.numpy().tobytes() + y.numpy().tobytes() for x, y in rows]


@pytest.mark.filterwarnings("ignore:data.root=nowhere. no MNIST files:UserWarning")
@pytest.mark.parametrize(("make", "num_folds"), [(line, 4), (table, 3), (digits, 2)])
def test_each_training_example_validates_in_one_fold_and_the_test_part_stays(make, num_folds):
    whole = make()
    training = sorted(examples(whole, "train") + examples(whole, "val"))
    assert len({*training}) == len(training)
    validated = []
    for fold in range(num_folds):
        data = make(fold=fold, num_folds=num_folds)
        val = examples(data, "val")
        assert sorted(examples(data, "train") + val) == training
        assert len(val) in (len(training) // num_folds, len(training) // num_folds + 1)
        assert examples(data, "test") == examples(whole, "test")
        assert examples(make(fold=fold, num_folds=num_folds), "val") == val
        validated += val
    assert sorted(validated) == training


def test_the_table_of_a_fold_is_standardised_by_what_trains():
    data = Table(4, SEED, None, None, ["bmi"], 0.15, 0.15, True, ",", fold=2, num_folds=5)
    x = data.splits["train"].features.double()
    assert abs(x.mean().item()) < 1e-6 and x.std(correction=0).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        (
            {"fold": 5, "num_folds": 5},
            "data.fold=5 must be from 0 to below data.num_folds=5; try data.fold=0",
        ),
        ({"num_folds": 1}, "data.num_folds=1 must be 0 for none, or 2 or more; try data.num_folds=5"),
        ({"fold": 1}, "data.fold=1 must be from 0 to below data.num_folds=0"),
    ],
)
def test_a_fold_that_there_is_not_is_refused(folds, message):
    with pytest.raises(BadInput, match=message):
        line(**folds)
