"""Training processes for the fault tests, and what each kind of run comes to undisturbed."""

from collections.abc import Callable

import pytest
from configs import CONFIGS, EPOCHS, FURTHER_CONFIGS

from process import TrialResult


@pytest.fixture(scope="session")
def undisturbed(trainees, tmp_path_factory) -> Callable[[str], TrialResult]:
    """The outcome of one of the configs that nothing befalls; each is run once."""
    outcomes: dict[str, TrialResult] = {}

    def undisturbed(name: str) -> TrialResult:
        if name not in outcomes:
            directory = tmp_path_factory.mktemp("undisturbed") / name
            process = trainees.train(
                directory, *(CONFIGS | FURTHER_CONFIGS)[name], EPOCHS, faults=[["spare_model"]]
            )
            assert process.exit_code == 0, process.stderr
            outcomes[name] = TrialResult(directory)
        return outcomes[name]

    return undisturbed
