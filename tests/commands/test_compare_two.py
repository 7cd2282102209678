import json
import math

import pytest

from tracklight.commands.parser import main
from tracklight.errors import BadInput
from tracklight.runs import diff
from tracklight.tracking.tags import COMMIT_TAG, DIRTY_TAG, OUTCOME_TAG


def keep(tmp_path, run_id, packages, machine):
    """Put down what a run keeps of its environment."""
    folder = tmp_path / "artifacts" / run_id / "artifacts" / "provenance"
    folder.mkdir(parents=True)
    (folder / "packages.txt").write_text(packages)
    (folder / "machine.json").write_text(json.dumps(machine))


def section(text, title):
    """The lines below a title of the report on two runs."""
    lines = text.split(f"\n{title}\n")[1].split("\n\n")[0].splitlines()
    return [line.strip() for line in lines]


def test_two_runs_are_told_apart_in_all_respects(add, answer, tmp_path):
    one = add(0.5, "a", params={"optimizer.lr": 0.1}, tags={"tracklight.code": "c1"}, losses=[2])
    other = add(
        *(0.5, "b"),
        params={"optimizer.lr": 0.2, "model.hidden": "[8]"},
        tags={"tracklight.code": "c2"},
        losses=[1],
        data="e",
    )
    for run_id, versions in ((one, "torch==2.0\n"), (other, "torch==2.1\nnew==1\n")):
        keep(tmp_path, run_id, versions, {"cores": len(versions)})
    lines = [line.strip() for line in answer(one, other).splitlines()]
    for told in (
        *("optimizer.lr: 0.1 -> 0.2", "model.hidden: absent -> [8]", "digest: c1 -> c2"),
        *("digest: d -> e", "torch: 2.0 -> 2.1", "new: absent -> 1", "cores: 11 -> 18"),
        *("train/loss_epoch: 2 -> 1 (-1)",),
        "a single seed cannot tell chance apart; train both with several seeds",
    ):
        assert told in lines


@pytest.mark.parametrize("place", [0, 1])
def test_environment_of_a_run_whose_files_are_gone_is_not_known(add, answer, tmp_path, place):
    runs = add(0.5), add(0.6, tags={DIRTY_TAG: "true"})
    keep(tmp_path, runs[1 - place], "torch==2.0\n", {"cores": 1})
    text = answer(*runs, "--diff")
    told = f"{'AB'[place]}: not known (its files are gone)"
    assert section(text, "packages") == section(text, "machine") == [told]
    uncommitted = "B: uncommitted changes not known (its files are gone)"
    assert (uncommitted in text) == (place == 1)
    found = json.loads(answer(*runs, "--json"))
    assert found["packages"] is found["machine"] is None


def test_data_of_which_no_run_knows_the_digest_are_not_called_the_same(add, answer):
    one, other, known = add(0.5, data="unknown"), add(0.6, data="unknown"), add(0.6, data="d")
    assert section(answer(one, other), "data")[0].startswith("not known")
    assert json.loads(answer(one, other, "--json"))["data"] is None
    assert section(answer(one, known), "data") == ["digest: unknown -> d"]
    assert section(answer(known, add(0.7, data="d")), "data") == ["the same"]


def test_deleted_files_of_a_trained_run_are_said(kept, capsys):
    assert main("compare", [kept.bare, kept.line, *kept.dir]) == 0
    text = capsys.readouterr().out
    assert section(text, "packages") == ["A: not known (its files are gone)"]
    assert main("compare", [kept.table, kept.line, *kept.dir]) == 0
    text = capsys.readouterr().out
    assert section(text, "packages") == section(text, "machine") == ["the same"]


def test_what_the_report_cuts_short_is_whole_in_json(add, answer, tmp_path):
    runs = add(0.5), add(0.6)
    for at, run_id in enumerate(runs):
        packages = "".join(f"package-{i}=={at}\n" for i in range(60))
        keep(tmp_path, run_id, packages, {f"part-{i}": at for i in range(50)})
    text = answer(*runs)
    assert section(text, "packages")[40:] == ["and 20 more (--json has all)"]
    assert section(text, "machine")[40:] == ["and 10 more (--json has all)"]
    found = json.loads(answer(*runs, "--json"))
    assert found["packages"] == [f"package-{i}: 0 -> 1" for i in range(60)]
    assert found["machine"] == [f"part-{i}: 0 -> 1" for i in range(50)]


def test_code_between_two_commits_is_that_of_src_and_conf_alone(add, answer, git, tmp_path, monkeypatch):
    root = tmp_path / "root"
    monkeypatch.setattr(diff, "ROOT", root)

    commits = []
    for text in ("one", "two"):
        for path in ("src/a.py", "conf/b.yaml", "notes", "--"):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
        if not commits:
            git(root, "init", "-q")
        git(root, "add", "--all")
        git(root, "commit", "-q", "-m", text)
        commits.append(git(root, "rev-parse", "HEAD"))
    runs = [add(0.5, tags={COMMIT_TAG: commit}) for commit in commits]
    changed = [line.split("|")[0].strip() for line in section(answer(*runs), "code") if " | " in line]
    assert sorted(changed) == ["conf/b.yaml", "src/a.py"]


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [([0.90, 0.91, 0.92], "more than noise: B is better"), ([0.5, 0.9, 0.7], "no more than noise")],
)
def test_seeds_tell_whether_two_settings_differ_by_more_than_chance(add, answer, scores, verdict):
    for seed, score in enumerate([0.70, 0.71, 0.72]):
        one = add(score, "a", seed)
    for seed, score in enumerate(scores):
        other = add(score, "b", seed)
    assert verdict in answer(one, other)
    found = json.loads(answer(one, other, "--json"))
    assert found["more_than_noise"] == verdict.startswith("more") and found["paired"]


def test_pruned_seeds_are_no_evidence(add, answer):
    for seed, score in enumerate([0.70, 0.71, 0.72, 0.1]):
        ended = {OUTCOME_TAG: "pruned" if score == 0.1 else "complete"}
        one, other = (add(score + more, f"{more}", seed, tags=ended) for more in (0, 0.2))
    found = json.loads(answer(one, other, "--json"))
    assert [sorted(each) for each in found["scores"]] == [
        pytest.approx([0.70, 0.71, 0.72]),
        pytest.approx([0.90, 0.91, 0.92]),
    ]
    first = answer(one, other).splitlines()[0]
    assert first.startswith(f"A  {one}") and first.endswith("  FINISHED, pruned")


def test_a_metric_that_is_no_number_is_null_in_json_and_infinite_in_words(add, answer):
    one = add(0.5, "a", losses=[1.0, math.inf])
    other = add(0.5, "b", losses=[1.0, math.nan])

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    found = json.loads(answer(one, other, "--json"), parse_constant=refuse)
    assert found["metrics"]["train/loss_epoch"] == [None, None]
    assert "train/loss_epoch: inf -> nan" in answer(one, other)


@pytest.mark.parametrize(
    "words", [("--metric", "x"), ("--tag", "a=b"), ("--limit", "3"), ("--each",), ("--mode", "min")]
)
def test_what_two_runs_do_not_take_is_refused(add, answer, words):
    one, other = add(0.5, "a"), add(0.6, "b")
    with pytest.raises(BadInput, match=f"{words[0]} is of a leaderboard"):
        answer(one, other, *words)


def test_the_same_seed_twice_is_one_seed(add, answer):
    for score in (0.7, 0.7):
        one = add(score, "a", 0)
    for score in (0.8, 0.8):
        other = add(score, "b", 0)
    assert "a single seed cannot tell chance apart" in answer(one, other)


def test_a_sweep_stands_for_the_best_of_its_trials(add, answer, store):
    best, other = add(0.9, "a", 0, name="trial"), add(0.8, "b", 0)
    sweep = store.create("tracklight", "sweep", {"tracklight.sweep": "x", "best.run": best})
    sweep.finish("FINISHED")
    said = answer(sweep.run_id, other)
    assert said.splitlines()[0] == f"A  {best}  trial, the best of sweep  FINISHED"
    empty = store.create("tracklight", "empty", {"tracklight.sweep": "y"})
    empty.finish("FINISHED")
    with pytest.raises(BadInput, match="is a sweep without a finished trial"):
        answer(empty.run_id, other)


def test_two_seeds_of_one_setting_differ_by_chance(add, answer):
    one, other = add(0.5, "a", 0), add(0.6, "a", 1)
    text = answer(one, other)
    assert "seed: 0 -> 1" in text
    assert "of one setting" in text


def test_scores_of_two_metrics_are_not_compared(add, answer):
    for seed, score in enumerate([0.70, 0.71, 0.72]):
        one = add(score, "a", seed)
        other = add(score + 5, "b", seed, params={"score.metric": "train/loss"})
    text = answer(one, other)
    assert section(text, "score") == ["A is scored by val/accuracy, B by train/loss"]
    assert not any(line.startswith("score:") for line in section(text, "metrics"))
    found = json.loads(answer(one, other, "--json"))
    assert (found["difference"], found["more_than_noise"]) == (None, None)


def test_values_too_long_for_mlflow_are_compared_by_the_stored_configs(add, answer, tmp_path):
    runs = []
    for tail in (1, 2, 2):
        cut = "x" * 6000  # as an earlier version left it
        runs.append(add(0.5, params={"model.hidden": cut}))
        folder = tmp_path / "artifacts" / runs[-1] / "artifacts"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(f"model:\n  hidden: {[8] * 4000 + [tail]}\n")
    (line,) = section(answer(*runs[:2]), "config")
    before, _, after = line.partition(" -> ")
    assert line.startswith("model.hidden: [8,8,") and before.rpartition(" ")[2] != after.rpartition(" ")[2]
    assert section(answer(*runs[1:]), "config") == ["the same"]
