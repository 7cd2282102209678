import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tracklight.engine import steps
from tracklight.engine.cuda_graphs import CapturedStep, DeviceRates, can_capture
from tracklight.engine.replay import Replay
from tracklight.engine.seeding import seed_step, step_seed
from tracklight.engine.steps import TracedStep, can_trace, eager_step, make_step, signature
from tracklight.models.linear_regression import LinearRegression
from tracklight.models.mlp import ACTIVATIONS, MLP
from tracklight.models.supervised import Supervised

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "decay": lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
UPDATES = [
    (SGD, {}),
    (SGD, {"weight_decay": 0.01, "foreach": True}),
    (SGD, {"maximize": True, "fused": True}),
    (SGD, {"momentum": 0.9}),
    (SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    (SGD, {"momentum": 0.8, "nesterov": True, "maximize": True}),
    (Adam, {}),
    (Adam, {"weight_decay": 0.01, "betas": (0.8, 0.99), "foreach": False}),
    (AdamW, {"maximize": True}),
    (AdamW, {"weight_decay": 0.1, "eps": 1e-3, "foreach": True}),
]


def build(dropout: float = 0.0) -> MLP:
    torch.manual_seed(0)
    return MLP(in_features=20, out_features=4, hidden=[16, 8], dropout=dropout).train()


@pytest.fixture(autouse=True)
def _trace_early(monkeypatch):
    monkeypatch.setattr(steps, "EAGER_STEPS", 2)


def minibatches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = [16] * 6 + [5]
    return [
        (torch.randn(n, 20, generator=generator), torch.randint(4, (n,), generator=generator)) for n in sizes
    ]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_traced_step_has_the_bits_of_the_step_by_hand(optimizer, dropout):
    ours, by_hand = build(dropout), build(dropout)
    step = make_step(ours, OPTIMIZERS[optimizer](ours.parameters()))
    assert isinstance(step, TracedStep)
    reference = OPTIMIZERS[optimizer](by_hand.parameters())
    for index, (inputs, targets) in enumerate(minibatches()):
        seed_step(3, index)
        loss = step(inputs, targets)
        seed_step(3, index)
        expected = by_hand.loss(by_hand(inputs), targets)
        reference.zero_grad()
        expected.backward()
        reference.step()
        assert torch.equal(loss, expected.detach())
    assert len(step.traces) == 1  # of the frequent shape; the odd one is not worth a trace
    assert all(map(torch.equal, ours.parameters(), by_hand.parameters()))


class Convolutional(Supervised):
    pure = True

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Unflatten(1, (1, 4, 5)),
            nn.Conv2d(1, 3, 2),
            nn.GELU(),
            nn.Flatten(),
            nn.LayerNorm(36),
            nn.Linear(36, 4),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1)


class Scattering(MLP):
    """Writes in place into tensors of zeros and ones that it makes at each step."""

    pure = True

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        wanted = torch.zeros_like(outputs).scatter_(1, targets[:, None], 1.0)
        weights = torch.ones_like(outputs).add_(wanted.view_as(outputs))
        return (weights * (outputs.softmax(1) - wanted) ** 2).sum(1).mean()


class Spectral(MLP):
    """Has constants: a tensor, a complex number, no dimensions, an infinite bound."""

    pure = True

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
        penalty = (outputs * (1 + 2j)).abs().clamp(max=math.inf).mean().view([])
        return super().loss(outputs * weights, targets) + penalty


class Transposed(MLP):
    """Has gradients that are laid out otherwise than their parameters."""

    pure = True

    def __init__(self) -> None:
        super().__init__(20, 4, hidden=[8])
        self.square = nn.Parameter(torch.randn(4, 6))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        further = nn.functional.linear(outputs, self.square.t().contiguous())
        return super().loss(outputs, targets) + further.square().mean()


class Masking(MLP):
    """Writes into a part of a tensor that it makes, by the targets."""

    pure = True

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        weights = torch.ones(outputs.shape)
        left, _ = weights.chunk(2, 1)
        left.masked_fill_((targets > 1)[:, None], 0.0)
        return (outputs * weights).square().mean()


class Median(MLP):
    """Has an operation of two results, and then another of its name."""

    pure = True

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        (only,) = outputs.chunk(1)
        return super().loss(outputs, targets) + only.median(1).values.median() + outputs.median()


MODELS = {
    "transposed": Transposed,
    "masking": lambda: Masking(in_features=20, out_features=4, hidden=[8]),
    "median": lambda: Median(in_features=20, out_features=4, hidden=[8]),
    "spectral": lambda: Spectral(in_features=20, out_features=4, hidden=[8]),
    "regression": lambda: LinearRegression(20, 4),
    "convolutional": Convolutional,
    "scattering": lambda: Scattering(in_features=20, out_features=4, hidden=[8]),
    **{name: partial(MLP, 20, 4, hidden=[8], dropout=0.2, activation=name) for name in ACTIVATIONS},
}


@pytest.mark.parametrize("model", MODELS)
def test_operations_replayed_on_memory_allocated_once_have_the_bits_of_the_step_by_hand(model, capfd):
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(MODELS[model]())
    ours, by_hand = pair
    step = make_step(ours, torch.optim.SGD(ours.parameters(), lr=0.1))
    take = eager_step(by_hand, torch.optim.SGD(by_hand.parameters(), lr=0.1))
    losses = []
    for index, (inputs, targets) in enumerate(minibatches()):
        targets = targets if model != "regression" else inputs[:, :4]
        seed_step(3, index)
        losses.append(step(inputs, targets))
        seed_step(3, index)
        expected = take(inputs, targets)
        assert torch.equal(losses[-1], expected)
        gradients = [(a.grad, b.grad) for a, b in zip(ours.parameters(), by_hand.parameters(), strict=True)]
        assert all(torch.equal(a, b) for a, b in gradients)
    assert len({loss.item() for loss in losses}) == len(losses)  # no loss is another's memory
    (replayed,) = step.traces.values()
    assert isinstance(replayed, Replay)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "settings"), UPDATES)
def test_steps_taken_at_once_have_the_bits_of_the_steps_by_hand(dropout, kind, settings):
    ours, by_hand = build(dropout), build(dropout)
    optimizers = [kind(each.parameters(), **{"lr": 0.1} | settings) for each in (ours, by_hand)]
    step, take = make_step(ours, optimizers[0]), eager_step(by_hand, optimizers[1])
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(85, 20, generator=generator), torch.randint(4, (85,), generator=generator)
    assert len(step.take_block(inputs, targets, 16, lambda index: index)) == 0  # not traced yet
    for batch in minibatches()[:3]:
        for each in (step, take):
            seed_step(3, 0)
            each(*batch)
    seeds = [step_seed(3, index) for index in range(5)]
    assert max(seeds) >= 1 << 63  # beyond a signed number
    losses = step.take_block(inputs, targets, 16, seeds.__getitem__)
    for index, loss in enumerate(losses):
        seed_step(3, index)
        rows = slice(16 * index, 16 * index + 16)
        assert torch.equal(loss, take(inputs[rows], targets[rows]))
    assert len(losses) == 5  # the last five rows are no full minibatch
    assert_same_state(ours, by_hand, *optimizers)


def assert_same_state(ours, by_hand, own, other):
    for a, b in zip(ours.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a.grad, b.grad)
        assert own.state[a].keys() == other.state[b].keys()
        for name, value in other.state[b].items():
            assert value is None or torch.equal(own.state[a][name], value)


@pytest.mark.parametrize("kind", [partial(SGD, momentum=0.9), AdamW])
def test_steps_taken_at_once_follow_a_schedule_until_they_need_other_state(kind):
    ours, by_hand = build(), build()
    optimizers = own, other = [kind(each.parameters(), lr=0.1) for each in (ours, by_hand)]
    step, take = make_step(ours, own), eager_step(by_hand, other)
    for batch in minibatches()[:3]:
        step(*batch)
        take(*batch)
    inputs, targets = torch.randn(64, 20), torch.randint(4, (64,))

    def schedule(optimizer, index):
        (group,) = optimizer.param_groups
        group["lr"] = 0.1 / (1 + index)
        name, value = ("momentum", 3 - index) if "momentum" in group else ("amsgrad", index == 3)
        group[name] = value

    schedule(own, 0)
    losses = step.take_block(inputs, targets, 16, int, partial(schedule, own))
    assert len(losses) == 3  # the fourth is one without momentum, or one with AMSGrad
    for index, loss in enumerate(losses):
        schedule(other, index)
        rows = slice(16 * index, 16 * index + 16)
        assert torch.equal(loss, take(inputs[rows], targets[rows]))
    assert_same_state(ours, by_hand, *optimizers)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (SGD, {"lr": torch.tensor(0.1)}),
        (SGD, {"momentum": 0.9}),  # without the buffers of a first step
        (partial(SGD, momentum=0.9), {"fused": True}),
        (partial(SGD, momentum=0.9, nesterov=True), {"foreach": True}),  # changes the gradient itself
        (SGD, {"differentiable": True}),
        (Adam, {"fused": True}),
        (Adam, {"amsgrad": True}),
        (AdamW, {"capturable": True}),
        (AdamW, {"betas": (torch.tensor(0.9), 0.999)}),
    ],
)
def test_other_steps_are_taken_one_by_one(kind, change):
    model = build()
    optimizer = kind(model.parameters(), lr=0.1)
    step = make_step(model, optimizer)
    batch = torch.randn(32, 20), torch.zeros(32, dtype=torch.long), 16, int
    for each in minibatches()[:3]:
        step(*each)
    (group,), before = optimizer.param_groups, [each.detach().clone() for each in model.parameters()]
    known = {**group}
    group |= change
    assert len(step.take_block(*batch)) == 0
    assert all(map(torch.equal, before, model.parameters()))
    group |= known
    assert len(step.take_block(*batch)) == 2


def test_parameters_split_into_groups_later_are_stepped_by_the_optimizer():
    ours, by_hand = build(), build()
    optimizers = [AdamW(each.parameters(), lr=0.1) for each in (ours, by_hand)]
    step, take = make_step(ours, optimizers[0]), eager_step(by_hand, optimizers[1])
    for index, batch in enumerate(minibatches()):
        if index == 4:
            for optimizer in optimizers:
                bias = optimizer.param_groups[0]["params"].pop()
                optimizer.add_param_group({"params": [bias], "lr": 0.2})
        assert torch.equal(step(*batch), take(*batch))
    assert all(map(torch.equal, ours.parameters(), by_hand.parameters()))


def test_where_torchscript_fails_the_trace_itself_is_replayed(monkeypatch):
    def fail(_):
        raise RuntimeError("object has no attribute relu")

    monkeypatch.setattr(torch.jit, "CompilationUnit", fail)
    ours, by_hand = build(), build()
    step = make_step(ours, torch.optim.SGD(ours.parameters(), lr=0.1))
    take = eager_step(by_hand, torch.optim.SGD(by_hand.parameters(), lr=0.1))
    for batch in minibatches():
        assert torch.equal(step(*batch), take(*batch))
    (replayed,) = step.traces.values()
    assert replayed is not None and not isinstance(replayed, Replay)
    assert all(map(torch.equal, ours.parameters(), by_hand.parameters()))


class KeepsGradients(torch.optim.Optimizer):
    """Descends by the mean of this gradient and the last, which it keeps as the tensor it is."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            last = self.state[parameter].get("last", parameter.grad)
            parameter -= 0.05 * (parameter.grad + last)
            self.state[parameter]["last"] = parameter.grad


def test_an_optimizer_of_someone_else_may_keep_a_gradient():
    ours, by_hand = build(), build()
    step = make_step(ours, KeepsGradients(ours.parameters()))
    take = eager_step(by_hand, KeepsGradients(by_hand.parameters()))
    for batch in minibatches():
        assert torch.equal(step(*batch), take(*batch))
    assert all(map(torch.equal, ours.parameters(), by_hand.parameters()))


def test_a_parameter_with_new_memory_needs_a_new_step():
    model = build()
    before = signature(model)
    parameter = next(model.parameters())
    parameter.data = parameter.data.clone()
    assert signature(model) != before


class Penalised(MLP):
    """Its loss depends on the parameters beside the outputs."""

    pure = True

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs, targets) + 0.1 * sum(p.square().sum() for p in self.parameters())


def test_a_traced_step_has_the_gradient_of_parameters_that_the_loss_itself_uses():
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Penalised(in_features=20, out_features=4, hidden=[16]))
    ours, by_hand = models
    step = make_step(ours, torch.optim.SGD(ours.parameters(), lr=0.1))
    take = eager_step(by_hand, torch.optim.SGD(by_hand.parameters(), lr=0.1))
    for batch in minibatches():
        assert torch.equal(step(*batch), take(*batch))
    assert isinstance(step, TracedStep) and any(step.traces.values())
    assert all(map(torch.equal, ours.parameters(), by_hand.parameters()))


def test_momentum_that_is_switched_on_later_counts():
    ours, by_hand = build(), build()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (ours, by_hand)]
    step, take = make_step(ours, optimizers[0]), eager_step(by_hand, optimizers[1])
    for index, batch in enumerate(minibatches()):
        for optimizer in optimizers:
            optimizer.param_groups[0]["momentum"] = 0.9 if index > 3 else 0.0
        assert torch.equal(step(*batch), take(*batch))
    assert all(map(torch.equal, ours.parameters(), by_hand.parameters()))


def test_a_learning_rate_that_is_a_tensor_is_left_to_the_optimizer():
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01))
    step = make_step(model, optimizer)
    losses = [step(*batch).item() for batch in 4 * minibatches()]
    assert losses[-2] < losses[0]


def test_an_optimizer_of_some_parameters_leaves_the_others_alone():
    model = build()
    head = list(model.parameters())[-2:]
    step = make_step(model, torch.optim.SGD(head, lr=0.1))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for inputs, targets in minibatches():
        step(inputs, targets)
    same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert same == [True] * (len(same) - 2) + [False] * 2


def test_purity_is_promised_by_a_class_itself():
    class Heir(MLP):
        pass

    assert not can_trace(Heir(in_features=20, out_features=4, hidden=[8]))


def test_a_traced_step_sees_a_changed_learning_rate():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = make_step(model, optimizer)
    (inputs, targets), *_ = minibatches()
    step(inputs, targets)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.param_groups[0]["lr"] = 0.0
    step(inputs, targets)
    assert all(map(torch.equal, before, model.parameters()))


class Counting(Supervised):
    """Its loss depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(20, 4)
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.cross_entropy(outputs, targets) * self.calls


def test_python_runs_at_each_step_of_a_model_that_does_not_promise_purity():
    model = Counting()
    step = make_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for batch in minibatches():
        step(*batch)
    assert model.calls == len(minibatches())


@pytest.mark.parametrize("spoil", ["hook", "buffer", "frozen", "compiled"])
def test_what_a_trace_would_miss_is_not_traced(spoil):
    model = LinearRegression(20, 4)
    assert can_trace(model)
    match spoil:
        case "hook":
            model.linear.register_forward_hook(lambda *_: None)
        case "buffer":
            model.register_buffer("count", torch.zeros(()))
        case "frozen":
            model.linear.bias.requires_grad_(False)
        case "compiled":
            model.compile(backend="eager")
    assert not can_trace(model)


class Idle(MLP):
    """Has a parameter that plays no part."""

    pure = True

    def __init__(self) -> None:
        super().__init__(20, 4, hidden=[8])
        self.idle = nn.Parameter(torch.ones(3))


class Overwriting(MLP):
    """Changes its batch."""

    pure = True

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs.sub_(0.5))


class Placing(MLP):
    """Has an operation write into a tensor that it is given by name, and one into a list."""

    pure = True

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            weights = torch.sigmoid(outputs.detach(), out=torch.empty(outputs.shape))
            torch._foreach_mul_([weights], 2.0)
        return super().loss(outputs * weights, targets)


@pytest.mark.parametrize("kind", [Overwriting, Placing])
def test_what_a_replay_cannot_hold_has_the_bits_of_the_steps_by_hand(kind):
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(kind(in_features=20, out_features=4, hidden=[8]))
    makes = zip((make_step, eager_step), pair, strict=True)
    step, take = (make(each, torch.optim.SGD(each.parameters(), lr=0.1)) for make, each in makes)
    for (inputs, targets), (same, _) in zip(minibatches(), minibatches(), strict=True):
        assert torch.equal(step(inputs, targets), take(same, targets))
        assert torch.equal(inputs, same)
    assert all(map(torch.equal, *(each.parameters() for each in pair)))


class Recurrent(Supervised):
    """Its trace holds an operation that cannot be called by itself."""

    pure = True

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 4, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.lstm(inputs.view(-1, 4, 5))[0][:, -1]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)


@pytest.mark.parametrize("optimizer", [SGD, KeepsGradients])
def test_a_trace_that_fails_leaves_the_steps_as_by_hand(optimizer):
    ours, by_hand = Recurrent(), Recurrent()
    by_hand.load_state_dict(ours.state_dict())
    settings = {"lr": 0.1} if optimizer is SGD else {}
    step = make_step(ours, optimizer(ours.parameters(), **settings))
    take = eager_step(by_hand, optimizer(by_hand.parameters(), **settings))
    for batch in minibatches():
        assert torch.equal(step(*batch), take(*batch))
    assert all(map(torch.equal, ours.parameters(), by_hand.parameters()))


def test_a_model_that_cannot_be_traced_takes_its_steps_by_hand():
    torch.manual_seed(0)
    model = Idle()
    step = make_step(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1))
    losses = [step(*batch).item() for batch in 3 * minibatches()]
    assert isinstance(step, TracedStep) and set(step.traces.values()) == {None}
    assert losses[-2] < losses[0]
    assert torch.equal(model.idle, torch.ones(3))  # no gradient, no decay: as by hand


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
def test_rates_on_the_device_give_the_bits_of_floats_and_leave_the_optimizer_as_it_was(optimizer):
    ours, plain = build(), build()
    unfused, fused = (OPTIMIZERS[optimizer](model.parameters()) for model in (ours, plain))
    fused.param_groups[0]["fused"] = True
    device_rates = DeviceRates(unfused, torch.device("cpu"))
    fused_before = unfused.param_groups[0]["fused"]
    for rate, (inputs, targets) in enumerate(minibatches(), 1):
        for each in (unfused, fused):
            each.param_groups[0]["lr"] = 1 / (64 * rate)  # float32 has it exactly
        with device_rates.applied():
            eager_step(ours, unfused)(inputs, targets)
        eager_step(plain, fused)(inputs, targets)
        assert torch.equal(device_rates.rates[0], torch.tensor(1 / (64 * rate)))
    assert all(torch.allclose(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    group = unfused.param_groups[0]
    assert (group["lr"], group["fused"]) == (1 / 448, fused_before)
    assert can_capture(unfused)


@pytest.fixture
def failing_captures(monkeypatch) -> list[Any]:
    """A CUDA device as far as a step sees it: streams that wait for nothing, and captures that fail."""
    begun = []

    def graph(graph):
        begun.append(graph)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nSearch for it")

    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return begun


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_where_a_capture_fails_steps_are_taken_without_and_one_line_says_so(
    failing_captures, optimizer, capsys
):
    ours, plain = build(), build()
    fused = OPTIMIZERS[optimizer](plain.parameters())
    fused.param_groups[0]["fused"] = True
    own = OPTIMIZERS[optimizer](ours.parameters())
    own.param_groups[0]["lr"] = fused.param_groups[0]["lr"] = 1 / 64  # float32 has it exactly
    step = CapturedStep(eager_step(ours, own), own, [*ours.parameters()])
    for inputs, targets in 5 * minibatches():
        loss = step(inputs, targets)
        assert torch.equal(loss, eager_step(plain, fused)(inputs, targets))
    assert all(map(torch.equal, ours.parameters(), plain.parameters()))
    assert len(failing_captures) == 1  # not tried again
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(
        "no CUDA graph of one (CUDA error: operation not permitted when stream is capturing)"
    )


def test_a_capture_that_runs_out_of_memory_is_left_to_whoever_can_take_fewer_models(
    failing_captures, monkeypatch
):
    def graph(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    model = build()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step = CapturedStep(eager_step(model, optimizer), optimizer, [*model.parameters()])
    with pytest.raises(torch.OutOfMemoryError):
        for batch in minibatches():
            step(*batch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_captured_steps_have_the_bits_of_the_eager_ones(optimizer, dropout):
    ours, eager = build(dropout).cuda(), build(dropout).cuda()
    step = make_step(ours, OPTIMIZERS[optimizer](ours.parameters()))
    assert isinstance(step, CapturedStep)
    reference = OPTIMIZERS[optimizer](eager.parameters())
    device_rates = DeviceRates(reference, torch.device("cuda"))  # the same fused kernels
    take = eager_step(eager, reference)
    for epoch in range(5):
        for index, (inputs, targets) in enumerate(minibatches()):
            torch.cuda.manual_seed(10 * epoch + index)
            loss = step(inputs.cuda(), targets.cuda())
            torch.cuda.manual_seed(10 * epoch + index)
            with device_rates.applied():
                assert torch.equal(loss, take(inputs.cuda(), targets.cuda()))
            for a, b in zip(ours.parameters(), eager.parameters(), strict=True):
                assert a.grad is not None and b.grad is not None
                assert torch.equal(a.grad, b.grad)
    assert all(map(torch.equal, ours.parameters(), eager.parameters()))
