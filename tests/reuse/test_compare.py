import csv
import io
import json
import sqlite3
import subprocess
import time

import pytest

from tracklight.errors import BadInput
from tracklight.reuse import leaderboard, pair
from tracklight.reuse.compare import main
from tracklight.reuse.layout import sparkline
from tracklight.tracking.layout import PARENT_TAG
from tracklight.tracking.ledger import Chosen, open_ledger


@pytest.fixture
def answer(tmp_path, capsys):
    def answer(*words):
        assert main([*words, "--dir", str(tmp_path)]) == 0
        return capsys.readouterr().out

    return answer


def board(tmp_path, *, metric=None, mode=None, limit=50, each=False, **filters):
    return leaderboard.rank(
        open_ledger(None, tmp_path), Chosen(**filters), metric, mode, limit, each
    )


def test_settings_are_ranked_by_the_mean_over_their_seeds(add, tmp_path):
    for seed, score in enumerate([0.7, 0.9]):
        add(score, "even", seed)
    add(0.85, "single")
    add(0.1, "poor")
    found = board(tmp_path)
    assert [place.mean for place in found.places] == pytest.approx([0.85, 0.8, 0.1])
    assert [place.rank for place in found.places] == [1, 2, 3]
    assert [len(place.runs) for place in found.places] == [1, 2, 1]
    assert [place.delta for place in found.places][1:] == pytest.approx([-0.05, -0.75])
    assert found.places[1].half_width == pytest.approx(12.7062 * 0.1, rel=1e-4)
    assert found.places[0].half_width is None


def test_each_run_has_its_own_place_when_asked(add, tmp_path):
    add(0.7, "one", 0), add(0.9, "one", 1)
    assert [place.mean for place in board(tmp_path, each=True).places] == [0.9, 0.7]


def test_loss_is_ranked_with_the_smallest_first(add, tmp_path):
    loss = {"score.metric": "val/loss", "score.mode": "min"}
    add(0.3, "a", params=loss), add(0.2, "b", params=loss)
    assert [place.mean for place in board(tmp_path).places] == [0.2, 0.3]


def test_runs_scored_by_another_metric_are_left_out(add, tmp_path):
    add(5.0, "other", params={"score.metric": "val/loss", "score.mode": "min"})
    add(0.5, "newest")
    assert [place.mean for place in board(tmp_path).places] == [0.5]


def test_only_parameters_that_differ_are_columns_and_no_seed_among_them(add, tmp_path):
    same = {"model.hidden": "[8]", "data.seed": 3}
    for seed in range(2):
        add(0.5, "a", seed, params={**same, "optimizer.lr": 0.1, "tracking.run_name": f"n{seed}"})
        add(0.6, "b", seed, params={**same, "optimizer.lr": 0.2, "data.root": f"/{seed}"})
    found = board(tmp_path)
    assert found.columns == ["optimizer.lr"]
    assert [place.params for place in found.places] == [
        {"optimizer.lr": "0.2"},
        {"optimizer.lr": "0.1"},
    ]


def test_runs_without_a_score_come_last_with_their_status(add, tmp_path):
    add(None, "failed", status="FAILED")
    add(0.5, "good")
    add(float("nan"), "diverged")
    places = board(tmp_path).places
    assert [place.rank for place in places] == [1, None, None]
    assert sorted(flag for place in places for flag in place.flags) == ["failed"]


def test_other_code_and_data_than_the_first_places_are_flagged(add, tmp_path):
    git = "mlflow.source.git."
    add(0.9, "a", tags={f"{git}commit": "1" * 40, f"{git}dirty": "false", "tracklight.code": "x"})
    add(
        *(0.8, "b"),
        data="other",
        tags={f"{git}commit": "2" * 40, f"{git}dirty": "true", "tracklight.code": "y"},
    )
    assert [place.flags for place in board(tmp_path).places] == [
        [],
        ["other git", "other code", "other data", "uncommitted"],
    ]


def test_filters_choose_by_experiment_sweep_and_tag(add, tmp_path, answer):
    parent = add(0.2, tags={"tracklight.sweep": "s"})
    trial = add(0.3, tags={PARENT_TAG: parent})
    there = add(0.4, experiment="there")
    tagged = add(0.5, tags={"colour": "red"})

    def runs(*words):
        return [run for place in json.loads(answer("--json", *words)) for run in place["runs"]]

    assert runs("--sweep", parent[:10]) == runs("--sweep", "last") == [trial]
    assert runs("--experiment", "there") == [there]
    assert runs("--tag", "colour=red") == [tagged]
    assert len(runs()) == 4
    assert len(runs("--limit", "2")) == 2


def test_any_metric_ranks(add, tmp_path):
    add(0.9, "a", losses=[3, 2]), add(0.1, "b", losses=[3, 1])
    found = board(tmp_path, metric="train/loss_epoch")
    assert (found.mode, [place.mean for place in found.places]) == ("min", [1, 2])
    assert [p.mean for p in board(tmp_path, metric="train/loss_epoch", mode="max").places] == [2, 1]


def test_csv_and_json_say_the_same(add, answer):
    add(0.25, "a", params={"optimizer.lr": 0.5}, losses=[4, 2])
    add(0.75, "b", params={"optimizer.lr": 0.25}, losses=[4, 1])
    rows = list(csv.DictReader(io.StringIO(answer("--csv"))))
    places = json.loads(answer("--json"))
    for row, place in zip(rows, places, strict=True):
        assert float(row["score"]) == place["score"]
        assert row["optimizer.lr"] == place["params"]["optimizer.lr"]
        assert row["runs"].split() == place["runs"]
    assert [place["loss"] for place in places] == [[4, 1], [4, 2]]


def test_table_shows_rank_score_delta_parameter_loss_and_run(add, answer):
    best = add(0.75, "b", params={"optimizer.lr": 0.25}, losses=[1, 2, 4])
    add(0.25, "a", params={"optimizer.lr": 0.5}, losses=[4, 2, 1])
    head, first, second, closing = answer().splitlines()
    assert head.split() == ["#", "val/accuracy", "delta", "lr", "loss", "run"]
    assert first.split() == ["1", "0.75", "0.25", "▁▃█", best[:8]]
    assert second.split()[:5] == ["2", "0.25", "-0.5", "0.5", "█▃▁"]
    assert closing == "2 runs of 2 settings, max first"


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([], ""),
        ([1, 1], "▁▁"),
        ([1, 2, 3], "▁▅█"),
        ([1, 10, 100], "▁▅█"),
        ([1, float("nan"), 3], "▁█"),
    ],
)
def test_sparkline_rises_with_the_values(values, drawn):
    assert sparkline(values) == drawn


def test_long_series_keeps_its_ends():
    drawn = sparkline([9.0] + [5.0] * 1000 + [1.0])
    assert (len(drawn), drawn[0], drawn[-1]) == (12, "█", "▁")


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
        "one run each cannot tell chance apart; train both with several seeds",
    ):
        assert told in lines


@pytest.mark.parametrize("place", [0, 1])
def test_environment_of_a_run_whose_files_are_gone_is_not_known(add, answer, tmp_path, place):
    runs = add(0.5), add(0.6, tags={pair.DIRTY: "true"})
    keep(tmp_path, runs[1 - place], "torch==2.0\n", {"cores": 1})
    text = answer(*runs, "--diff")
    told = f"{'AB'[place]}: not known (its files are gone)"
    assert section(text, "packages") == section(text, "machine") == [told]
    uncommitted = "B: uncommitted changes not known (its files are gone)"
    assert (uncommitted in text) == (place == 1)
    found = json.loads(answer(*runs, "--json"))
    assert found["packages"] is found["machine"] is None


def test_deleted_files_of_a_trained_run_are_said(kept, capsys):
    assert main([kept.bare, kept.line, *kept.dir]) == 0
    text = capsys.readouterr().out
    assert section(text, "packages") == ["A: not known (its files are gone)"]
    assert main([kept.table, kept.line, *kept.dir]) == 0
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


def test_code_between_two_commits_is_that_of_src_and_conf_alone(add, answer, tmp_path, monkeypatch):
    root = tmp_path / "root"
    monkeypatch.setattr(pair, "ROOT", root)

    def git(*words):
        name = ("-c", "user.name=n", "-c", "user.email=e")
        command = ["git", "-C", str(root), *name, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    commits = []
    for text in ("one", "two"):
        for path in ("src/a.py", "conf/b.yaml", "notes", "--"):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
        if not commits:
            git("init", "-q")
        git("add", "--all")
        git("commit", "-q", "-m", text)
        commits.append(git("rev-parse", "HEAD"))
    runs = [add(0.5, tags={pair.COMMIT: commit}) for commit in commits]
    changed = [
        line.split("|")[0].strip() for line in section(answer(*runs), "code") if " | " in line
    ]
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
    assert found["more_than_noise"] == verdict.startswith("more")


def test_two_seeds_of_one_setting_differ_by_chance(add, answer):
    one, other = add(0.5, "a", 0), add(0.6, "a", 1)
    text = answer(one, other)
    assert "seed: 0 -> 1" in text
    assert "of one setting" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a" * 32], "1 RUN given"),
        (["zzz", "last"], "hexadecimal"),
        (["--metric", "nope"], "no chosen run has it; the newest has score"),
        (["--tag", "x"], "must be KEY=VALUE"),
        (["--sweep", "last"], "there is no sweep"),
        (["--limit", "0"], "must be 1 or more"),
        (["--experiment", "nowhere"], "leave a filter out"),
        (["--nonsense"], "unrecognized arguments"),
        (["--csv", "--json"], "not allowed with"),
    ],
)
def test_bad_command_line_is_answered_in_one_line(add, tmp_path, words, told):
    add(0.5)
    with pytest.raises(BadInput, match=told) as caught:
        main([*words, "--dir", str(tmp_path)])
    assert "\n" not in str(caught.value)


def fill(store, num_runs, num_trials):
    """Multiply the one run of the store by SQL; the first so many become trials of sweep 1."""
    own = {"run_uuid": "printf('%032x', i)"}
    setting = "WHEN 'tracklight.setting' THEN 's' || i"
    parent = f"WHEN '{PARENT_TAG}' THEN i <= {num_trials}"
    changes = {
        "runs": own | {"start_time": "start_time + i"},
        "params": own | {"value": "CASE key WHEN 'p1' THEN i ELSE value END"},
        "tags": own | {"value": f"CASE key {setting} {parent} ELSE value END"},
        "latest_metrics": own | {"value": "i * 1.0"},
        "metrics": own,
    }
    counting = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
    with sqlite3.connect(store.database) as connection:
        connection.execute("PRAGMA synchronous = off")
        (model,) = connection.execute("SELECT run_uuid FROM runs").fetchone()
        for table, change in changes.items():
            names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            values = ", ".join(change.get(name, f"{table}.{name}") for name in names)
            connection.execute(
                f"{counting} INSERT INTO {table} ({', '.join(names)}) SELECT {values}"
                f" FROM n, {table} WHERE run_uuid = ?",
                [num_runs, model],
            )


@pytest.mark.slow
def test_ten_thousand_runs_are_ranked_in_three_seconds_and_a_sweep_of_thousand_in_five(
    add, store, answer
):
    params = {f"p{i}": i for i in range(80)}
    add(0.5, "s", params=params, tags={PARENT_TAG: "p"}, losses=range(5, 0, -1))
    fill(store, 10_000, 1000)
    start_s = time.perf_counter()
    places = json.loads(answer("--json"))
    board_s = time.perf_counter() - start_s
    assert [place["score"] for place in places] == [10_000.0 - i for i in range(50)]
    start_s = time.perf_counter()
    entries = open_ledger(None, store.directory).scored(Chosen(parent="1"), "score")
    trials = leaderboard.rank(
        open_ledger(None, store.directory), Chosen(parent="1"), None, None, 1000
    )
    sweep_s = time.perf_counter() - start_s
    assert len(entries) == len(trials.places) == 1000
    assert (board_s < 3, sweep_s < 5) == (True, True), (board_s, sweep_s)
