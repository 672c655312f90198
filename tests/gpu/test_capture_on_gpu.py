"""Steps that are captured in a CUDA graph: replays have the bits of eager steps of torch.optim.ASGD."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dist_asgd import ShardedASGD
from tests.support.oracle import same_bits
from tests.support.ranks import message_of, run_alone

pytestmark = pytest.mark.gpu

OPTIONS: dict[str, Any] = {"t0": 5, "lambd": 0.01, "weight_decay": 0.1}
RATES = torch.linspace(0.2, 0.05, 14).tolist()  # lr of each step, numbers of fp32
WARMUP = 3  # steps


@pytest.fixture(autouse=True, scope="module")
def _gpu() -> None:
    if not run_alone(torch.cuda.is_available):  # in a child: CUDA does not survive a fork
        pytest.skip("there is no CUDA GPU")


class Trained:
    """Parameters, static gradients and an optimizer of ours, and the same of torch's."""

    def __init__(self, count: int, capturable: bool = True) -> None:
        torch.manual_seed(0)
        values = [torch.randn(17 * index + 3000 * (index % 2), device="cuda") for index in range(1, count + 1)]
        self.ours, self.theirs = ([torch.nn.Parameter(value.clone()) for value in values] for _ in range(2))
        for param in self.ours + self.theirs:
            param.grad = torch.zeros_like(param)
        self.lr = torch.tensor(RATES[0], device="cuda")
        self.optimizer = ShardedASGD(self.ours, self.lr, **OPTIONS, capturable=capturable)
        self.twin = torch.optim.ASGD(self.theirs, RATES[0], **OPTIONS, foreach=False)

    def next_gradients(self, step: int) -> None:
        self.lr.fill_(RATES[step])
        self.twin.param_groups[0]["lr"] = RATES[step]
        for own, their in zip(self.ours, self.theirs, strict=True):
            their.grad = torch.randn_like(their)
            assert own.grad is not None
            own.grad.copy_(their.grad)

    def check(self, step: int) -> None:
        torch.cuda.synchronize()
        assert all(map(same_bits, self.ours, self.theirs)), f"step {step}"

    def check_state(self) -> None:
        state = self.optimizer.full_state_dict()["state"]
        for index, param in enumerate(self.theirs):
            for key, value in self.twin.state[param].items():
                assert torch.equal(state[index][key], value.cpu().to(state[index][key].dtype)), (index, key)


def on_a_side_stream(work: Callable[[], None]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)


def capture(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def warm_up(trained: Trained) -> None:
    for step in range(WARMUP):
        trained.next_gradients(step)
        trained.optimizer.step()
        trained.twin.step()
        trained.check(step)


def replayed(count: int) -> None:
    trained = Trained(count)
    on_a_side_stream(lambda: warm_up(trained))
    graph = capture(trained.optimizer.step)
    for step in range(WARMUP, len(RATES)):
        trained.next_gradients(step)
        if step == 8:  # eager ones may come between
            trained.optimizer.step()
        else:
            graph.replay()
        trained.twin.step()
        trained.check(step)
    trained.check_state()


@pytest.mark.parametrize("count", [1, 50])
def test_replays_have_the_bits_of_eager_steps(count: int) -> None:
    run_alone(replayed, count, timeout=300)


def replayed_after_loading() -> None:
    """State is loaded into the memory that the graph has."""
    trained, graph = Trained(20), None
    on_a_side_stream(lambda: warm_up(trained))
    graph = capture(trained.optimizer.step)
    state = trained.optimizer.full_state_dict()
    values = [param.detach().clone() for param in trained.ours]
    for _ in range(4):
        graph.replay()
    trained.optimizer.load_state_dict(state)
    with torch.no_grad():
        for param, value in zip(trained.ours, values, strict=True):
            param.copy_(value)
    for step in range(WARMUP, len(RATES)):
        trained.next_gradients(step)
        graph.replay()
        trained.twin.step()
        trained.check(step)
    trained.check_state()


def test_a_state_dict_is_loaded_where_the_graph_has_it() -> None:
    run_alone(replayed_after_loading, timeout=300)


def replayed_with_backward() -> None:
    """Forward, backward and step in one graph: gradients lie in its memory, at other addresses than before."""
    warnings.simplefilter("ignore")  # torch's, of parameters that were made on another stream
    trained = Trained(20)
    inputs = [torch.zeros_like(param) for param in trained.ours]

    def iteration() -> None:
        trained.optimizer.zero_grad()
        torch.autograd.backward([(param * x).sum() for param, x in zip(trained.ours, inputs, strict=True)])
        trained.optimizer.step()

    def before(step: int) -> None:
        trained.lr.fill_(RATES[step])
        trained.twin.param_groups[0]["lr"] = RATES[step]
        for their, x in zip(trained.theirs, inputs, strict=True):
            their.grad = x.normal_().clone()
        trained.twin.step()

    def eager() -> None:
        for step in range(WARMUP):
            before(step)
            iteration()
            trained.check(step)

    on_a_side_stream(eager)
    trained.optimizer.zero_grad()
    graph = capture(iteration)
    for step in range(WARMUP, len(RATES)):
        before(step)
        graph.replay()
        trained.check(step)
    trained.check_state()


def test_a_graph_of_backward_and_step() -> None:
    run_alone(replayed_with_backward, timeout=300)


def replayed_with_scaled_gradients() -> None:
    trained = Trained(20)
    optimizer: Any = trained.optimizer
    optimizer.grad_scale, optimizer.found_inf = (torch.ones((), device="cuda") for _ in range(2))

    def before(step: int) -> None:
        trained.next_gradients(step)
        optimizer.grad_scale.fill_(2.0**step)
        optimizer.found_inf.fill_(step % 4 == 0)
        for param in trained.ours:
            param.grad.mul_(2.0**step)  # type: ignore[union-attr]
        if step % 4:
            trained.twin.step()

    def eager() -> None:
        for step in range(WARMUP):
            before(step)
            optimizer.step()
            trained.check(step)

    on_a_side_stream(eager)
    graph = capture(optimizer.step)
    for step in range(WARMUP, len(RATES)):
        before(step)
        graph.replay()
        trained.check(step)
    trained.check_state()


def test_gradscaler_in_a_graph() -> None:
    run_alone(replayed_with_scaled_gradients, timeout=300)


def refused() -> None:
    warnings.simplefilter("ignore")  # graphs without a node
    for capturable, steps, said in ((False, 2, "capturable=True"), (True, 0, "the first step()"), (True, 2, "")):
        trained = Trained(5, capturable)
        for step in range(steps):
            trained.next_gradients(step)
            trained.optimizer.step()
        torch.cuda.synchronize()
        if said:
            assert said in message_of(lambda trained=trained: capture(trained.optimizer.step), RuntimeError)
        else:
            capture(trained.optimizer.step)
            assert "step()" in message_of(lambda trained=trained: capture(trained.optimizer.step), RuntimeError)


def test_steps_that_a_graph_cannot_hold() -> None:
    run_alone(refused, timeout=300)


def cut_in_a_graph() -> None:
    warnings.simplefilter("ignore")
    trained = Trained(5)
    warm_up(trained)
    trained.ours[2].grad = None
    assert "before the capture" in message_of(lambda: capture(trained.optimizer.step), RuntimeError)
    trained.theirs[2].grad = None
    trained.optimizer.step()
    trained.twin.step()
    graph = capture(trained.optimizer.step)
    graph.replay()
    trained.twin.step()
    trained.check(WARMUP + 1)
    trained.check_state()


def test_a_parameter_without_a_gradient() -> None:
    run_alone(cut_in_a_graph, timeout=300)
