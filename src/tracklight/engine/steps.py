"""One optimizer step, as fast as the device allows."""

from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer

from tracklight.models.supervised import Supervised

Step = Callable[[Tensor, Tensor], Tensor]


def make_step(module: Supervised, optimizer: Optimizer) -> Step:
    """Return what takes one optimizer step on a minibatch and returns its loss, detached."""

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = module.loss(module(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
