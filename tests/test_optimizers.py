"""GradientThreshold on optimizers that wrap others: thresholded before the step that changes parameters, or refused."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import triton_thresh as tt

from .conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="once is enough")

Optimizer = torch.optim.Optimizer


class Lookahead(Optimizer):
    """Of timm's shape: takes over the state of the optimizer it wraps, without the constructor of its own class."""

    def __init__(self, base: Any) -> None:
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self._base_optimizer, self.param_groups = base, base.param_groups
        self.defaults, self.state = {}, defaultdict(dict)

    def step(self, closure: Any = None) -> Any:
        return self._base_optimizer.step(closure)


class Accelerated(Optimizer):
    """Of accelerate's shape: no attribute but the optimizer it wraps, whose groups are properties."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class SAM(Optimizer):
    """Takes two steps, neither of which is its own `step`; the second is the wrapped optimizer's."""

    def __init__(self, base: Any) -> None:
        super().__init__(base.param_groups, {})
        self.base_optimizer, self.param_groups = base, base.param_groups

    def first_step(self) -> None:
        pass

    def second_step(self) -> None:
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> Any:
        raise AssertionError("not called")


class Wrapper:
    """No optimizer of torch, as those of DeepSpeed; keeps what it wraps twice, and is known to it."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = self.unwrapped = optimizer
        optimizer.wrapper = self

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda base: base,
    "Lookahead": Lookahead,
    "Accelerated": Accelerated,
    "SAM": SAM,
    "Wrapper": Wrapper,
    "Lookahead in Accelerated": lambda base: Accelerated(Lookahead(base)),
    "Accelerated in Wrapper in Lookahead": lambda base: Lookahead(Wrapper(Accelerated(base))),
    "patched by a scheduler": lambda base: torch.optim.lr_scheduler.ConstantLR(base, 1.0).optimizer,
}


def step(optimizer: Any) -> None:
    if isinstance(optimizer, SAM):
        optimizer.first_step()
        optimizer.second_step()
    else:
        optimizer.step()


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(8, 4), torch.randn(16, 8)


def moved(wrap: Callable[[Any], Any], threshold: Any, zeroed: bool) -> tuple[list[Tensor], Tensor | None]:
    """The parameters after two steps, and what the last kept."""
    net, x = network()
    optimizer = wrap(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    with tt.GradientThreshold(optimizer, threshold, track_kept=True) as thresholded:
        for _ in range(2):
            (optimizer if zeroed else net).zero_grad()  # the optimizer's patches its own step where it was not
            net(x).square().mean().backward()
            step(optimizer)
    return [p.detach() for p in net.parameters()], thresholded.kept


@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize("threshold", [0.05, [0.05, 1e9]])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_steps_are_those_of_the_optimizer_itself(wrap: Callable[[Any], Any], threshold: Any, zeroed: bool) -> None:
    expected, fraction = moved(WRAPPERS["itself"], threshold, False)
    found, kept = moved(wrap, threshold, zeroed)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert fraction is not None
    assert kept is not None
    assert 0 < kept.item() == fraction.item() < 1


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_is_below_moves_nothing_until_removed(wrap: Callable[[Any], Any]) -> None:
    net, x = network()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = wrap(torch.optim.SGD(net.parameters(), lr=0.1))
    thresholded = tt.GradientThreshold(optimizer, 1e9)
    for remains in (True, False):
        net(x).sum().backward()
        step(optimizer)
        assert all(torch.equal(p, was) == remains for p, was in zip(net.parameters(), before, strict=True))
        thresholded.remove()


def test_closures_reach_the_innermost() -> None:
    net, x = network()
    optimizer = Accelerated(torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=2))
    before = [p.detach().clone() for p in net.parameters()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    with tt.GradientThreshold(optimizer, 1e9):
        optimizer.step(closure)
    assert all(torch.equal(p, was) for p, was in zip(net.parameters(), before, strict=True))


def test_a_wrapper_that_changes_gradients_first() -> None:
    """What it adds is thresholded too: the step that changes the parameters sees nothing smaller."""

    class Noisy(Lookahead):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad += 1e-3
            return super().step(closure)

    net, x = network()
    with tt.GradientThreshold(optimizer := Noisy(torch.optim.SGD(net.parameters(), lr=0.1)), 0.25):
        net(x).square().mean().backward()
        optimizer.step()
    grads = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    assert ((grads == 0) | (grads.abs() > 0.25)).all()
    assert (grads == 0).any()


class Alone(Optimizer):
    """Neither prepared by the constructor of its class, nor around another."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups, self.defaults, self.state = [{"params": list(parameters)}], {}, defaultdict(dict)

    def step(self, closure: Any = None) -> None:
        pass


class Halves(Alone):
    """Around two optimizers, of a part of the parameters each."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        weight, bias = self.param_groups[0]["params"]
        self.first, self.second = torch.optim.SGD([weight], lr=0.1), torch.optim.SGD([bias], lr=0.1)


class Turns(Alone):
    """Around two optimizers of the same parameters."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self.first, self.second = (torch.optim.SGD(self.param_groups[0]["params"], lr=0.1) for _ in range(2))


@pytest.mark.parametrize("kind", [Alone, Halves, Turns])
def test_refused_where_no_hook_would_run(kind: Any) -> None:
    net, _ = network()
    with pytest.raises(TypeError, match=rf"GradientThreshold: {kind.__name__}\.step does not run the hooks .* wraps"):
        tt.GradientThreshold(kind(net.parameters()), 0.1)


@pytest.mark.parametrize("given", [nn.Linear(1, 1), [torch.zeros(1)], None, "SGD"], ids=repr)
def test_what_is_no_optimizer(given: Any) -> None:
    with pytest.raises(TypeError, match=r"GradientThreshold: optimizer must be a torch.optim.Optimizer, got "):
        tt.GradientThreshold(given, 0.1)


def test_a_scheduler_is_no_optimizer() -> None:
    net, _ = network()
    scheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got ConstantLR"):
        tt.GradientThreshold(scheduler, 0.1)  # type: ignore[arg-type]
