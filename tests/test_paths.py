"""What counts as a project, and what is said of one that is not right."""

from pathlib import Path

import pytest

from tracklight.paths import CLONE, CONF, REPLACES, find_project

TABLE = '[tool.tracklight]\npackage = "mine"\n'


def make(root: Path, table: str = TABLE, package: str = "src/mine") -> Path:
    (root / package).mkdir(parents=True)
    (root / "pyproject.toml").write_text(f'[project]\nname = "x"\n{table}')
    return root


def test_the_project_is_the_nearest_folder_above_whose_pyproject_says_so(tmp_path):
    root = make(tmp_path / "outer", TABLE + 'allowed_targets = ["timm.models"]\n')
    below = root / "notebooks" / "first"
    below.mkdir(parents=True)
    (root / "notebooks" / "pyproject.toml").write_text("[tool.ruff]\n")  # no project
    project = find_project(below)
    assert (project.root, project.sources, project.conf) == (root, root / "src", None)
    assert project.allowed_targets == ("mine", "timm.models")
    assert (project.problem, [*project.warnings()]) == ("", [])


def test_elsewhere_it_is_the_repository_and_without_one_the_folder(tmp_path, monkeypatch):
    assert find_project(tmp_path).root == CLONE == CONF.parent
    monkeypatch.setattr("tracklight.paths.CLONE", None)
    assert find_project(tmp_path).root == tmp_path


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('[tool.tracklight]\nconf = "src"\n', "names no package; add package = "),
        ('[tool.tracklight]\npackage = "a.b"\n', "names no package"),
        ("[tool.tracklight]\npackage = 3\n", "names no package"),
        (
            '[tool.tracklight]\npackage = "gone"\n',
            "names gone, but there is no folder src/gone or gone beside it",
        ),
        (TABLE + 'config = "conf"\n', "has a key config; it takes package, conf, allowed_targets"),
        (TABLE + 'conf = "gone"\n', "conf = 'gone' is no folder"),
        (TABLE + 'allowed_targets = "timm"\n', "allowed_targets must be a list"),
        (TABLE + "package =\n", "cannot be read"),
        ("[tool]\ntracklight = 3\n", "must be a table"),
    ],
)
def test_what_is_wrong_with_a_project_is_one_line(tmp_path, table, said):
    project = find_project(make(tmp_path / "x", table))
    assert said in project.problem
    assert str(tmp_path / "x" / "pyproject.toml") in project.problem
    assert "\n" not in project.problem
    assert project.allowed_targets == ()


def test_a_file_that_anybody_may_have_put_there_makes_no_project(tmp_path):
    shared = make(tmp_path / "shared")
    shared.chmod(0o1777)
    (shared / "mine_alone").mkdir()
    assert find_project(shared / "mine_alone").root == CLONE


def test_of_two_nested_projects_the_inner_counts_and_that_is_said(tmp_path):
    outer = make(tmp_path / "outer")
    inner = make(outer / "inner")
    project = find_project(inner)
    assert project.root == inner
    assert [*project.warnings()] == [
        f"the project {inner} lies in another, {outer}, which has no part in this"
    ]


def test_a_file_that_hides_one_of_ours_is_said_unless_it_says_so_itself(tmp_path):
    root = make(tmp_path / "x")
    (root / "conf" / "optimizer").mkdir(parents=True)
    sgd, mine = (root / "conf" / "optimizer" / f"{name}.yaml" for name in ("sgd", "mine"))
    for path in (sgd, mine):
        path.write_text("_target_: torch.optim.SGD\n")
    (said,) = find_project(root).warnings()
    assert said.startswith(f"{sgd} replaces tracklight's own optimizer/sgd.yaml")
    sgd.write_text(f"{REPLACES}\n_target_: torch.optim.SGD\n")
    assert [*find_project(root).warnings()] == []
