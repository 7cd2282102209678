"""The sweeper that Hydra instantiates for `-m`; the sweep itself is in `tracklight.sweep`."""

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class TracklightSweeper(Sweeper):
    """Runs grids and searches whose trials can be pruned and continued."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store the context and the config; our own trials replace the task function."""
        self.hydra_context = hydra_context
        self.config = config

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep that the overrides describe."""
        from tracklight.sweep.sweeper import sweep

        assert self.config is not None
        assert self.hydra_context is not None
        return sweep(arguments, self.config, self.hydra_context)
