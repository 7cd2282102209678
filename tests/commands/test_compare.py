import csv
import io
import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from small_runs import train

from tracklight.commands.compare import sparkline
from tracklight.commands.parser import main
from tracklight.errors import BadInput
from tracklight.runs.leaderboard import rank_runs
from tracklight.runs.reader import RunFilter, SqliteReader, open_reader
from tracklight.runs.select import select_id
from tracklight.tracking.tags import IDENTITY_TAG, OUTCOME_TAG, PARENT_TAG, REPRODUCES_TAG


def board(tmp_path, *, metric=None, mode=None, limit=50, each=False, **filters):
    return rank_runs(open_reader(None, tmp_path), RunFilter(**filters), metric, mode, limit, each)


def test_settings_are_ranked_by_the_mean_over_their_seeds(add, tmp_path):
    for seed, score in enumerate([0.7, 0.9]):
        add(score, "even", seed)
    add(0.85, "single")
    add(0.1, "poor")
    found = board(tmp_path)
    assert [place.score for place in found.rows] == pytest.approx([0.85, 0.8, 0.1])
    assert [place.rank for place in found.rows] == [1, 2, 3]
    assert [len(place.runs) for place in found.rows] == [1, 2, 1]
    assert [place.delta for place in found.rows][1:] == pytest.approx([-0.05, -0.75])
    assert found.rows[1].half_width == pytest.approx(12.7062 * 0.1, rel=1e-4)
    assert found.rows[0].half_width is None


def test_the_same_seed_again_is_no_new_evidence_and_other_data_another_place(add, tmp_path):
    for score in (0.5, 0.7):
        add(score, "one", 0)
    add(0.6, "one", 1)
    add(0.9, "one", 0, data="other", data_name="other")
    found = board(tmp_path)
    assert [place.scores for place in found.rows] == [[0.9], [0.6, 0.7]]
    assert [place.rank for place in found.rows] == [1, 1]  # on different data they are no rivals
    assert found.columns == ["data"] and [place.params["data"] for place in found.rows] == ["other", "n"]


def test_each_data_set_has_a_ranking_of_its_own_and_its_own_first_row(add, tmp_path):
    for number, (name, score) in enumerate([("a", 0.9), ("b", 0.5), ("a", 0.8), ("b", 0.7)]):
        tags = {"tracklight.code": "x" if name == "a" else "y"}
        add(score, f"{number}", data=name, data_name=name, tags=tags)
    found = [(row.params["data"], row.rank, row.score, row.flags) for row in board(tmp_path).rows]
    assert found == [("b", 1, 0.7, []), ("b", 2, 0.5, []), ("a", 1, 0.9, []), ("a", 2, 0.8, [])]
    assert [row.delta for row in board(tmp_path).rows][1::2] == pytest.approx([-0.2, -0.1])
    assert [row.score for row in board(tmp_path, tags={"tracklight.data_name": "a"}).rows] == [0.9, 0.8]


def test_other_data_read_by_the_same_setting_is_a_place_of_its_own_and_no_evidence(tmp_path, capsys):
    path, made = tmp_path / "table.csv", {}
    words = (
        "data=table",
        f"data.path={path}",
        "data.target=y",
        "data.batch_size=null",
        "trainer.max_epochs=1",
    )
    for slope, seeds in ((1, (0, 1)), (9, (1, 2))):
        path.write_text("\n".join(["x,y", *(f"{x},{slope * x}" for x in range(40))]))
        made[slope] = {train(tmp_path, *words, f"seed={seed}") for seed in seeds}
    first, second = board(tmp_path).rows
    assert ({*first.run_ids}, {*second.run_ids}) == (made[9], made[1])  # the newest data first
    assert (first.rank, second.rank) == (1, 1) and first.score > second.score
    assert first.params["data"].split()[0] == second.params["data"].split()[0] == "table.csv"
    assert first.params["data"] != second.params["data"]
    reader = open_reader(None, tmp_path)
    assert select_id(reader, "best") in made[9]  # as the newest, though the others score better
    main("compare", [*(min(made[slope]) for slope in (1, 9)), "--dir", str(tmp_path)])
    report = capsys.readouterr().out
    assert report.count("over 2 seeds of its setting") == 2 and "of one setting" not in report


def test_seeds_that_split_the_data_differently_are_one_place_without_a_flag(add, tmp_path):
    for setting, score in (("one", 0.5), ("two", 0.4)):
        for seed in (0, 1):
            add(score, setting, seed, data=f"split {seed}")
    add(0.3, "three", 1, data="changed")
    found = board(tmp_path)
    assert [len(place.scores) for place in found.rows] == [2, 2, 1]
    assert [place.flags for place in found.rows] == [[], [], ["other data"]]


def test_runs_scored_otherwise_are_counted_and_a_metric_is_a_filter(add, tmp_path, capsys):
    add(0.3, "other", params={"score.metric": "val/loss", "score.mode": "min"})
    add(0.5, "one", losses=[2.0])
    add(0.7, "two")
    assert board(tmp_path).left_out == "1 run scored by another metric left out (--metric val/loss)"
    add(0.3, "third", params={"score.metric": "val/f1", "score.mode": "max"})
    add(0.6, "two", 1)
    assert board(tmp_path).left_out.endswith("left out (--metric val/f1 or val/loss)")
    found = board(tmp_path, metric="train/loss_epoch")
    assert [place.scores for place in found.rows] == [[2.0]]
    main("compare", ["--dir", str(tmp_path), "--metric", "train/loss_epoch"])
    assert "; 4 runs without a finite train/loss_epoch left out" in capsys.readouterr().out


def test_a_reproduction_is_no_new_evidence(add, tmp_path):
    run_id = add(0.5, "one", 0)
    add(0.9, "one", 1, tags={REPRODUCES_TAG: run_id})
    assert [place.scores for place in board(tmp_path).rows] == [[0.5]]


def test_a_pruned_trial_is_shown_as_such_after_all_others_and_is_no_part_of_a_mean(add, tmp_path):
    pruned = {OUTCOME_TAG: "pruned"}
    add(0.5, "one", 0, losses=[2.0])
    add(0.7, "one", 1, losses=[3.0])
    add(0.95, "one", 2, losses=[0.1], tags=pruned)
    add(0.99, "two", 0, losses=[0.2], tags=pruned)
    add(0.4, "three", 0, losses=[4.0])
    for metric, means in ((None, [0.6, 0.4, None]), ("train/loss_epoch", [2.5, 4.0, None])):
        places = board(tmp_path, metric=metric).rows
        assert [place.score for place in places] == [pytest.approx(mean) for mean in means]
        assert [place.rank for place in places] == [1, 2, None]
        assert [place.flags for place in places] == [["pruned"], [], ["pruned"]]
        assert [len(place.runs) for place in places] == [3, 1, 1]
        assert (len(places[0].scores), places[2].delta, places[2].half_width) == (2, None, None)


def test_a_leaderboard_has_no_patch(add, tmp_path):
    add(0.5)
    with pytest.raises(BadInput, match="--diff is of two runs"):
        main("compare", ["--dir", str(tmp_path), "--diff"])


def test_who_reads_but_the_beginning_gets_no_traceback(add, tmp_path):
    for seed in range(40):
        add(0.5, f"{seed}" * 40, seed, params={"note": "x" * 2000})
    script = Path(__file__).resolve().parents[2] / "scripts" / "compare.py"
    words = f"{sys.executable} {script} --dir {tmp_path} --json | head -c 10"
    read = subprocess.run(words, shell=True, capture_output=True, text=True, timeout=60)
    assert (read.stdout[:1], read.stderr) == ("[", "")


def test_a_run_whose_process_is_gone_is_said_to_have_died(store, tmp_path, capsys):
    def begin(name):
        run = store.create("tracklight", name, {IDENTITY_TAG: name})
        run.log_params({"score.metric": "train/loss", "score.mode": "min"})
        run.upload_artifacts()
        return run

    alive, dead = begin("alive"), begin("dead")
    dead.abandon()
    main("compare", ["--dir", str(tmp_path), "--json"])
    places = json.loads(capsys.readouterr().out)
    flags = {place["runs"][0]: place["flags"] for place in places}
    assert (flags[alive.run_id], flags[dead.run_id]) == (["running"], ["died"])
    alive.finish("FINISHED")


def test_runs_of_a_place_that_were_made_by_different_code_are_flagged(add, tmp_path):
    for seed, code in enumerate("ab"):
        add(0.5, "one", seed, tags={"tracklight.code": code})
    assert board(tmp_path).rows[0].flags == ["mixed code"]


def test_an_infinite_loss_ranks_nothing(add, tmp_path):
    for seed in (0, 1):
        add(0.5, "one", seed, losses=(float("inf"),))
    add(0.4, "two", 0, losses=(2.0,))
    found = board(tmp_path, metric="train/loss_epoch")
    assert [place.scores for place in found.rows] == [[2.0]]
    assert found.left_out == "2 runs without a finite train/loss_epoch left out"


def test_a_metric_that_is_the_score_is_ranked_as_the_score_is(add, tmp_path):
    params = {"score.metric": "val/nll", "score.mode": "min"}
    for score in (0.5, 0.4):
        add(score, params=params)
    assert [place.scores for place in board(tmp_path, metric="score").rows] == [[0.4], [0.5]]


def test_each_run_has_its_own_place_when_asked(add, tmp_path):
    add(0.7, "one", 0), add(0.9, "one", 1)
    assert [place.score for place in board(tmp_path, each=True).rows] == [0.9, 0.7]


def test_loss_is_ranked_with_the_smallest_first(add, tmp_path):
    loss = {"score.metric": "val/loss", "score.mode": "min"}
    add(0.3, "a", params=loss), add(0.2, "b", params=loss)
    assert [place.score for place in board(tmp_path).rows] == [0.2, 0.3]


def test_runs_scored_by_another_metric_are_left_out(add, tmp_path):
    add(5.0, "other", params={"score.metric": "val/loss", "score.mode": "min"})
    add(0.5, "newest")
    assert [place.score for place in board(tmp_path).rows] == [0.5]


def test_only_parameters_that_differ_are_columns_and_no_seed_among_them(add, tmp_path):
    same = {"model.hidden": "[8]", "data.seed": 3}
    for seed in range(2):
        add(0.5, "a", seed, params={**same, "optimizer.lr": 0.1, "tracking.dir": f"n{seed}"})
        add(0.6, "b", seed, params={**same, "optimizer.lr": 0.2, "data.root": f"/{seed}"})
    found = board(tmp_path)
    assert found.columns == ["optimizer.lr"]
    assert [place.params for place in found.rows] == [
        {"optimizer.lr": "0.2"},
        {"optimizer.lr": "0.1"},
    ]


def test_parameters_that_matter_come_first_and_names_that_were_given_show(add, tmp_path, answer, monkeypatch):
    for number in range(9):
        params = {
            **{"num_threads": number % 2, "data.download": number % 2, "trainer.precision": number},
            **{"data.batch_size": number, "optimizer.lr": number / 8, "other.thing": number},
            **({"model.channels": number} if number % 3 == 0 else {}),
            **({"tracking.run_name": f"n{number}"} if number > 6 else {}),
        }
        add(number / 10, f"{number}", params=params, name=f"n{number}")
    columns = ["name", "model.channels", "optimizer.lr", "data.batch_size", "trainer.precision"]
    assert board(tmp_path).columns == [*columns, "other.thing", "data.download", "num_threads"]
    assert [row.params["name"] for row in board(tmp_path).rows] == ["n8", "n7", *[""] * 7]
    for width, shown in ((160, 6), (70, 3), (60, 2)):
        monkeypatch.setattr("tracklight.commands.compare.WIDTH", width)
        head, *_, note = answer().split("\n\n")[0].strip().splitlines()
        names = ["name", "channels", "lr", "batch_size", "precision", "thing"]
        assert head.split() == ["#", "val/accuracy", "delta", *names[:shown], "loss", "run"], head  # unbroken
    assert "further parameters that differ: optimizer.lr, data.batch_size" in " ".join(answer().split())
    assert answer("--columns", "lr").split()[3:5] == ["lr", "loss"]


def test_columns_time_and_data_are_chosen(add, store, answer):
    old = add(0.9, "old", params={"optimizer.lr": 0.5, "model.hidden": "[8]"}, data_name="there")
    new = add(0.8, "new", params={"optimizer.lr": 0.5, "model.hidden": "[8]"})
    with closing(sqlite3.connect(store.database)) as connection, connection:
        begin = "UPDATE runs SET start_time = strftime('%s', 'now', ?) * 1000 WHERE run_uuid = ?"
        connection.execute(begin, ("-50 hours", old))

    def found(*words):
        return [place["runs"][0] for place in json.loads(answer("--json", *words))]

    assert found() == [new, old]
    assert found("--since", "2d") == found("--since", "49h") == [new]
    assert found("--since", "51h") == found("--since", "2000-01-01") == [new, old]
    assert found("--data", "there") == [old] and found("--data", "n") == [new]
    (place,) = json.loads(answer("--json", "--data", "n", "--columns", "model.hidden,lr"))
    assert place["params"] == {"model.hidden": "[8]", "optimizer.lr": "0.5"}
    assert answer("--data", "n").splitlines()[-1] == "1 run of 1 setting, max first"


def test_runs_without_a_score_come_last_with_their_status(add, tmp_path):
    add(None, "failed", status="FAILED")
    add(0.5, "good")
    add(float("nan"), "diverged")
    places = board(tmp_path).rows
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
    assert [place.flags for place in board(tmp_path).rows] == [
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
    assert (found.mode, [place.score for place in found.rows]) == ("min", [1, 2])
    assert [p.score for p in board(tmp_path, metric="train/loss_epoch", mode="max").rows] == [2, 1]


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


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a" * 32], "1 RUN given"),
        (["zzz", "last"], "hexadecimal"),
        (["--metric", "nope"], "no chosen run has it; the newest has score"),
        (["--tag", "x"], "must be KEY=VALUE"),
        (["--sweep", "last"], "there is no sweep"),
        (["--sweep", "best"], "is no sweep"),
        (["--limit", "0"], "must be 1 or more"),
        (["--since", "yesterday"], "must be a date, 2026-11-30, or an age"),
        (["--since", "2999-01-01"], "leave a filter out"),
        (["--columns", "score.mod"], "no run shown has it; the most similar are score.mode"),
        (["--since", "1d", "last", "best"], "--since is of a leaderboard"),
        (["--experiment", "nowhere"], "leave a filter out"),
        (["--nonsense"], "unrecognized arguments"),
        (["--csv", "--json"], "not allowed with"),
        (["--csv", "last", "best"], "of two runs, --json tells all"),
    ],
)
def test_bad_command_line_is_answered_in_one_line(add, tmp_path, words, told):
    add(0.5)
    with pytest.raises(BadInput, match=told) as caught:
        main("compare", [*words, "--dir", str(tmp_path)])
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
    with closing(sqlite3.connect(store.database)) as connection, connection:
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
def test_ten_thousand_runs_are_ranked_by_as_many_queries_as_a_hundred(add, store, answer, monkeypatch):
    params = {f"p{i}": i for i in range(80)}
    add(0.5, "s", params=params, tags={PARENT_TAG: "p"}, losses=range(5, 0, -1))
    queries, query = [], SqliteReader._query

    def count(reader, sql, values=()):
        queries.append(sql)
        return query(reader, sql, values)

    monkeypatch.setattr(SqliteReader, "_query", count)
    counts = {}
    for num_runs in (100, 10_000):
        fill(store, num_runs, num_runs // 10)
        queries.clear()
        rows = json.loads(answer("--json"))
        counts[num_runs] = len(queries)
        assert [row["score"] for row in rows] == [float(num_runs - i) for i in range(50)]
        if num_runs == 100:
            with closing(sqlite3.connect(store.database)) as connection, connection:
                for table in ("tags", "params", "metrics", "latest_metrics", "runs"):
                    connection.execute(f"DELETE FROM {table} WHERE run_uuid LIKE '0000%'")
    assert counts[100] == counts[10_000] < 20
    queries.clear()
    trials = rank_runs(
        open_reader(None, store.directory), RunFilter(tags={PARENT_TAG: "1"}), None, None, 1000
    )
    assert len(trials.rows) == 1000
    assert len(queries) < 20
