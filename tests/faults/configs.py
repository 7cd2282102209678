"""The runs that the faults befall: small, quick, and of every kind that resuming can get wrong."""

ALLOWED = "allowed_targets=[tracklight.models,tracklight.data,torch.optim,torch.nn," + (
    "pytorch_lightning.callbacks,foreign,foreign_loaders]"
)
QUICK = ("num_threads=1", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", ALLOWED)
BLOBS = (
    *(
        "data._target_=foreign.Blobs",
        "data.batch_size=16",
        "data.num_val=64",
        "+data.num_train=2400",
    ),
    *(
        f"~data.{key}"
        for key in ("root", "download", "fallback", "mean", "std", "shift", "fold", "num_folds")
    ),
)
MLP = ("model=mlp", *BLOBS, "model.hidden=[16]", *QUICK)
NET = (
    "model._target_=foreign.Net",
    "~model.bias",
    "data._target_=foreign.NoisyData",
    "data.batch_size=20",
    "+data.num_workers=2",
    *(f"~data.{key}" for key in ("seed", "slope", "intercept", "noise", "num_points", "fold", "num_folds")),
    *("~data.num_features", "score.metric=val_loss", "score.mode=min", *QUICK),
)
LISTENER = "+callbacks.listener={_target_: foreign.Listener}"
DROPOUT_ADAM_COSINE = (*MLP, "model.dropout=0.3", "optimizer=adam", "scheduler=cosine")

BATCH_END = "tracklight.engine.blocks:Blocks.on_train_batch_end"
BLOCK_END = "tracklight.engine.blocks:Blocks._log_losses"  # the same, where steps are taken in blocks
CONFIGS = {
    "blocks": DROPOUT_ADAM_COSINE,
    "plain": (*DROPOUT_ADAM_COSINE, LISTENER),
    "plateau": (*MLP, "model.dropout=0.3", "scheduler=plateau", "scheduler.patience=1"),
    "early_stopping": (
        *(*MLP, "model.dropout=0.3", "callbacks=early_stopping"),
        *("callbacks.early_stopping.patience=5", "optimizer=adam", "optimizer.lr=0.1"),
    ),
    "foreign": NET,
}


def loaders(kind: str) -> tuple[str, ...]:
    """Foreign data loaders of a kind."""
    keys = ("seed", "slope", "intercept", "noise", "num_points", "fold", "num_folds", "num_features")
    target = "data._target_=foreign_loaders.Loaders"
    return (target, f"+data.kind={kind}", "data.batch_size=20", *(f"~data.{key}" for key in keys), *QUICK)


def restless(kind: str, *more: str) -> tuple[str, ...]:
    """A module that draws in every hook, on foreign data loaders of a kind."""
    model = ("model._target_=foreign_loaders.Restless", "~model.bias")
    return (*model, *loaders(kind), "score.metric=val_loss", "score.mode=min", *more)


def scheduled(kind: str, *more: str) -> tuple[str, ...]:
    """A model of ours whose schedule takes the run's length from foreign data loaders."""
    return ("model=mlp", "data=line", *loaders(kind), "model.hidden=[16]", "model.dropout=0.3", *more)


RATES = "+callbacks.rates={_target_: pytorch_lightning.callbacks.LearningRateMonitor}"
EMA = "+callbacks.ema={_target_: pytorch_lightning.callbacks.EMAWeightAveraging, decay: 0.9}"
TOP_3 = (
    "+callbacks.top={_target_: pytorch_lightning.callbacks.ModelCheckpoint, monitor: val/loss, save_top_k: 3,"
    " save_last: true}"
)
FURTHER_CONFIGS = {
    "max_steps": (*DROPOUT_ADAM_COSINE, "trainer.max_steps=1400"),  # ends amid the tenth epoch
    "averaged": (*MLP, "optimizer=adam", EMA),
    "two_checkpoints": (*MLP, "optimizer=adam", "optimizer.lr=0.003", TOP_3),
    "double_precision": (*DROPOUT_ADAM_COSINE, "trainer.precision=64-true"),
    "total": restless("workers", "+model.total=true"),
    "manual": restless("dictionary", "+model.manual=true", RATES),
    "hidden": ("model._target_=foreign_loaders.Hiding", *restless("in_process")[1:]),
    "accumulated": restless("workers", "trainer.accumulate_grad_batches=4", RATES),
    **{
        kind: restless(kind, f"trainer.reload_dataloaders_every_n_epochs={int(kind == 'subsets')}")
        for kind in (
            *("persistent", "generator", "combined", "subsets", "stream", "numpy"),
            *("weighted", "python", "nested", "own_class", "stream_of_workers"),
        )
    },
    "cosine": scheduled("workers", "optimizer=adam", "scheduler=cosine"),
    "onecycle": scheduled("python", "scheduler=onecycle"),
}
EPOCHS = "trainer.max_epochs=12"
EACH_EPOCH = ["put", "tracklight.engine.checkpoint_io:INTERVAL_S", 0.0]
