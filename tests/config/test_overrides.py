"""Every bad word on the command line is one clear line."""

import shlex

import hydra
import pytest
from omegaconf import OmegaConf

from tracklight.config.compose import compose
from tracklight.config.overrides import check_overrides, split_for_resume
from tracklight.errors import BadInput

ID = "0123456789abcdef0123456789abcdef"


def composed(*words, multirun=False):
    return compose(check_overrides(words, multirun=multirun))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["optimizer.lrr=1"], "unknown key optimizer.lrr; did you mean optimizer.lr?"),
        (["lr=1"], "unknown key lr; did you mean optimizer.lr?"),
        (["batch_size=1"], "did you mean data.batch_size?"),
        (["modle=mlp"], "unknown key modle; did you mean model?"),
        (["epochs=3"], "unknown key epochs; did you mean trainer.max_epochs?"),
        (["optimizer.learning_rate=1"], "did you mean optimizer.lr?"),
        (["@seed=1"], "there is no group before @; write seed=1"),
        (["callbacks={m: {a: 1}}"], "unknown key callbacks.m; `python train.py --cfg job`"),
        (["model=[linear,mlp]"], "model=[linear,mlp] names no file of conf/model"),
        (["callbacks=[ema,x]"], "callbacks=[ema,x] names no file of conf/callbacks"),
        (["callbacks=[{a: 1}]"], "names no file of conf/callbacks"),
        (["overrides=[x]"], "tracklight fills overrides itself"),
        (["+optimizer.lr=1"], "optimizer.lr is there already; leave out the +: optimizer.lr=1"),
        (["+seed=1"], "leave out the +: seed=1"),
        (["+model=linear"], "+model=linear: model is there already; leave out the +: model=linear"),
        (["+model=mlp"], "leave out the +: model=mlp"),
        (["+optimizer@optimizer=sgd"], "leave out the +: optimizer@optimizer=sgd"),
        (['tracking.run_name="a\x1b[31mred"'], r"tracking.run_name='a\x1b[31mred' holds a control character"),
        (['tracking.experiment="a\x07"'], "tracking.experiment='a\\x07' holds a control character"),
        (['tracking.note="\x9b31m!"'], "tracking.note='\\x9b31m!' holds a control character"),
        (['tracking.tags.x="a\x1b]0;!"'], "tracking.tags.x='a\\x1b]0;!' holds a control character"),
        (['+model.extra={k: ["a\x7f"]}'], "model.extra.k[0]='a\\x7f' holds a control character"),
        (["~model.nothing"], "nothing to delete: model.nothing is null already, or no key"),
        (["xyzzy=1"], "unknown key xyzzy; `python train.py --cfg job` shows all"),
        (["trainer.max_epoch=1"], "did you mean trainer.max_epochs?"),
        (["model=mpl"], "model=mpl is not there; model can be cnn, linear, mlp; did you mean mlp?"),
        (["experiment=nope"], "experiment can be debug, diabetes, fashion_cnn"),
        (["trainer=5"], "trainer=5 names no file of conf/trainer; trainer can be"),
        (["seed=1", "seed=2"], "seed is given twice, as seed=1 and as seed=2"),
        (["seed=1", "+seed=2"], "seed is given twice"),
        (["model=mlp", "model=linear"], "model is given twice"),
        (["seed="], "seed= has no value; write seed=null for none"),
        (["model="], "model= has no value"),
        (["seed=1,2"], "seed=1,2 is a list of values; add -m"),
        (["optimizer.lr=interval(0,1)"], "optimizer.lr=interval(0,1) is an interval; add -m to"),
        (["optimizer.lr=[interval(0,1)]"], "an interval or a range stands alone"),
        (["optimizer.lr=interval(0.1)"], "an interval lies between two numbers"),
        (["sweep=lr"], "sweep=lr is of sweeps, and this is a single run; add -m"),
        (["sweep.trials=3"], "sweep.trials=3 is of sweeps"),
        (["optimizer.lr=interval(0,1)"], "add -m"),
        (["model.hidden=[8"], "cannot read model.hidden=[8"),
        (["a b"], "cannot read a b"),
        (["seed"], "cannot read seed"),
        (["seed=choice()"], "choice() is empty"),
        (["seed=rnage(1,3)"], "no function rnage; did you mean range?"),
        (["trainer.logger=true"], "use tracking=mlflow or tracking=none"),
        (["+trainer.logger=true"], "use tracking=mlflow or tracking=none"),
        (["trainer.default_root_dir=/tmp"], "use tracking.dir=FOLDER"),
        (["trainer.callbacks=[]"], "use callbacks="),
        (["trainer.enable_checkpointing=false"], "use tracking=none"),
        (["tracking.run_name=${oc.env:NO_SUCH_VARIABLE}"], "'NO_SUCH_VARIABLE' not found"),
        (["tracking.run_name=${nowhere.to.be}"], "tracking.run_name"),
        (["tracking.run_name=???"], "tracking.run_name has no value"),
        (["score=0.9"], "score=0.9 must be a group of keys"),
        (["model=null"], "model=null names no file of conf/model"),
        (["model=[linear,mlp]"], "model can be cnn, linear, mlp"),
        (["+modle=mlp"], "+modle=mlp adds a key that nothing reads; did you mean model?"),
        (["++nothing.of=3"], "++nothing.of=3 adds a key that nothing reads"),
        (["+score.mod=max"], "+score.mod=max adds a key that nothing reads; did you mean score.mode?"),
        (["+tracking.experimnt=x"], "did you mean tracking.experiment?"),
        (["score.metric=val/thing"], "score.metric=val/thing: is less of it better, or more?"),
        (["score.metric=val/loss_accuracy"], "Add score.mode=min or =max"),
        (["experiment=seed_mlp", "model=linear"], "seed_mlp sets model.hidden, which model=linear"),
        (["experiment=seed_mlp", "data=line"], "seed_mlp sets data.num_val, which data=line"),
    ],
)  # fmt: skip
def test_a_bad_override_is_told_with_what_would_work(words, says):
    with pytest.raises(BadInput) as refusal:
        composed(*words)
    assert says in " ".join(str(refusal.value).split())


def test_a_key_that_is_null_is_deleted_where_hydra_can_do_it():
    try:
        config = composed("~model.in_features")
    except BadInput as refusal:
        assert hydra.__version__.startswith("1.3."), "Hydra 1.4 deletes it"
        assert "nothing to delete: model.in_features is null already" in str(refusal)
    else:
        assert "in_features" not in config.model


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["model=mlp", "model.hidden=[800,", "400]", "seed=1"], "model.hidden", [800, 400]),
        (["data=table", "data.path=a=b.csv"], "data.path", "a=b.csv"),
        (["data=table", 'data.path=a"b=c.csv'], "data.path", 'a"b=c.csv'),
        (["model=mlp", "model.hidden=64,32"], "model.hidden", [64, 32]),
    ],
)
def test_the_spelling_that_a_refusal_offers_means_what_was_meant(words, key, value):
    with pytest.raises(BadInput) as refusal:
        composed(*words)
    offered = [
        word for word in shlex.split(str(refusal.value).partition("write ")[2]) if word.startswith(key)
    ][0]
    assert OmegaConf.select(composed(words[0], offered), key) == value


def test_a_range_is_not_offered_as_a_list_nor_a_list_where_none_fits():
    for word in ("seed=range(0,3)", "seed=1,2", "model.hidden=glob(*)"):
        with pytest.raises(BadInput, match="add -m to run each of them$"):
            composed("model=mlp", word)


@pytest.mark.parametrize(
    "group", ["callbacks", "scheduler", "optimizer", "model", "data", "trainer", "tracking"]
)
def test_a_group_that_every_run_reads_is_not_deleted(group):
    with pytest.raises(BadInput, match=f"~{group}: {group} cannot be deleted"):
        composed(f"~{group}")


@pytest.mark.parametrize(
    "words",
    [
        ["tracking.run_name=''"],
        ["tracking.run_name=null"],
        ["hydra.run.dir=a", "hydra.run.dir=b", "hydra.job.name="],
        ["+model.extra=1"],
        ["model=mlp", "model.hidden=[64,32]"],
        ["experiment=seed_linear", "optimizer=adam", "+optimizer.mine=1"],
        ["tracking.run_name='a=b'"],
        ["data={batch_size:2}"],
    ],
)
def test_unusual_overrides_that_mean_something_pass(words):
    if "tracking.run_name=''" in words:
        assert check_overrides(words, multirun=False) == words
    else:
        composed(*words)


def test_lists_of_values_are_for_multirun():
    words = ["seed=1,2", "optimizer.lr=interval(0,1)"]
    assert check_overrides(words, multirun=True) == words


@pytest.mark.parametrize("run_id", ["1234e567", "12345678", "0e0", "00000000000000000000000000000001"])
def test_a_run_id_of_digits_stays_text(run_id):
    cfg = composed(f"init_from={run_id}")
    assert cfg.init_from == run_id
    now, _ = split_for_resume(check_overrides([f"resume={run_id}"], multirun=False))
    assert compose(now).resume == run_id


def test_a_resumed_run_takes_single_keys_for_its_own_config():
    words = [f"resume={ID}", "model.hidden=[9]", "tracking.uri=x", "allow_changes=true"]
    now, later = split_for_resume(words)
    assert now == [f"resume={ID}", "tracking.uri=x", "allow_changes=true"]
    assert later == ["model.hidden=[9]", "tracking.uri=x", "allow_changes=true"]


@pytest.mark.parametrize("word", ["model=mlp", "optimizer=adam", "experiment=debug", "tracking=none"])
def test_a_resumed_run_takes_no_group(word):
    with pytest.raises(BadInput, match=f"{word} chooses a group, but resume={ID}.*; leave it out, "):
        split_for_resume([f"resume={ID}", word])


def test_resume_auto_composes_like_a_new_run():
    words = ["model=mlp", "resume=auto", "seed=3"]
    assert split_for_resume(words) == (words, [])


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("val/loss", "min"),
        ("val_rmse", "min"),
        ("train/loss_epoch", "min"),
        ("val/accuracy", "max"),
        ("f1", "max"),
    ],
)
def test_a_metric_brings_its_mode_to_all_who_read_it(metric, mode):
    cfg = composed("model=mlp", f"score.metric={metric}", "scheduler=plateau", "callbacks=early_stopping")
    assert cfg.score.mode == cfg.scheduler.mode == cfg.callbacks.early_stopping.mode == mode
    assert compose(["model=mlp", f"score.metric={metric}"]).score.mode == mode  # without a command line
    assert composed("model=mlp", f"score.metric={metric}", "score.mode=max").score.mode == "max"
    with pytest.raises(BadInput, match="score.metric=val/thing: is less of it better"):
        compose(["model=mlp", "score.metric=val/thing"])


def test_a_key_may_be_added_for_a_class_or_an_interpolation():
    words = ["+width=16", "model=mlp", "model.hidden=['${width}']", "+callbacks.mine=null", "+model.own=1"]
    cfg = composed(*words)
    assert (cfg.width, cfg.model.own) == (16, 1)


def test_several_files_of_callbacks_are_composed_into_one():
    assert [*composed("callbacks=[early_stopping,ema]").callbacks] == ["early_stopping", "ema"]
