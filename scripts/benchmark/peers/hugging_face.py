"""Hugging Face's Trainer on tensors. `python hugging_face.py FOLDER_OF_MNIST_RAW EPOCHS`.

Shapes: `B` images in a minibatch, `P` pixels.
"""

import tempfile

import torch
from mnist import EPOCHS, Lines, load
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed


class Images(Dataset):
    """Examples as the Trainer takes them: dicts, named as the arguments of the model's forward."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"images": self.images[row], "labels": self.labels[row]}


class Classifier(nn.Module):
    """A model for the Trainer returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:  # (B, P), (B,)
        """Return loss and logits."""
        logits = self.layers(images)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


class Each(TrainerCallback):
    """Prints a line an epoch, as soon as its loss is logged."""

    def __init__(self) -> None:
        self.lines = Lines()

    def on_log(self, args, state, control, logs, **others) -> None:
        """Print the line; what is logged at the end of all has no loss of this name."""
        if "loss" in logs:
            self.lines.end_epoch(float(logs["loss"]))


train, test = (Images(*map(torch.from_numpy, part)) for part in load())
set_seed(0)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=1000,
        optim="sgd",
        learning_rate=0.01,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    each = Each()
    trainer = Trainer(
        Classifier(), arguments, train_dataset=train, callbacks=[each],
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean()},
    )  # fmt: skip
    trainer.train()
    each.lines.end(trainer.evaluate(test)["eval_accuracy"])
