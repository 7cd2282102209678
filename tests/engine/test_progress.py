"""What a run prints while it trains."""

import warnings

from pytorch_lightning import Trainer

from foreign import Blobs
from tracklight.engine.progress import EpochLines
from tracklight.models.mlp import MLP


class Numbered(MLP):
    """Logs the number of each epoch as it ends."""

    def on_train_epoch_end(self) -> None:
        self.log("train/number", float(self.current_epoch + 1))


def test_an_epochs_line_has_what_the_module_logs_at_its_end(capsys):
    trainer = Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[EpochLines()],
    )  # fmt: skip
    model = Numbered(8, 4, hidden=[4])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, datamodule=Blobs(batch_size=16, seed=0))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 3
    for number, line in enumerate(lines, 1):
        assert line.startswith(f"epoch {number}/3  ") and f"train/number {number}" in line
