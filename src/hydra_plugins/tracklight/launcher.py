"""The launcher `population`; which jobs are trained together is in `tracklight.sweep.populations`."""

from typing import Any

from hydra.plugins.launcher import Launcher


class PopulationLauncher(Launcher):
    """A name and two settings for our sweeper; of itself it launches nothing."""

    def __init__(self, max_members: int | None = None, batch_size: int = 10):
        self.max_members, self.batch_size = max_members, batch_size

    def setup(self, **_: Any) -> None:
        """Store nothing."""

    def launch(self, *_: Any, **__: Any) -> Any:
        """Refuse the jobs of another sweeper."""
        from tracklight.errors import BadInput

        raise BadInput("hydra/launcher=population needs hydra/sweeper=tracklight")
