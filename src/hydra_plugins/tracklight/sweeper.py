"""What Hydra instantiates for `-m`; all that it does is in `tracklight.sweep`."""

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class TracklightSweeper(Sweeper):
    """Grids and searches whose trials are pruned, continued and explained."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what Hydra hands over; the task is replaced by trials of our own."""
        self.hydra_context = hydra_context
        self.config = config

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep that the overrides describe."""
        from tracklight.sweep.sweeper import sweep

        assert self.config is not None
        assert self.hydra_context is not None
        return sweep(arguments, self.config, self.hydra_context)
