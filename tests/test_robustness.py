"""Ways of compiling and calling, and what happens to a model afterwards: all must reach the program.

Each case runs on the reference executor, and on a GPU by the kernel.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from test_modules import STRICT, assert_near, device, mlp, programs  # noqa: F401  (device is a fixture)
from torch import nn

import mpk_dynamo
from mpk_dynamo.errors import LaunchError


class Block(nn.Module):
    """Of a class of its own: PyTorch's Module.compile() passes over modules that are all torch.nn's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@pytest.fixture
def model(device: str) -> nn.Module:  # noqa: F811
    return Block().to(device)


@pytest.fixture
def x(device: str) -> torch.Tensor:  # noqa: F811
    return torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).to(device)


def in_place(module: nn.Module, **how: object) -> nn.Module:
    module.compile(**how)
    return module


WAYS: dict[str, Callable[..., Callable[..., torch.Tensor]]] = {
    "torch.compile(model)": torch.compile,
    "torch.compile(model.forward)": lambda m, **how: torch.compile(m.forward, **how),
    "model.compile()": in_place,
    "model.forward = ": lambda m, **how: setattr(m, "forward", torch.compile(m.forward, **how)) or m,
}


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("way", list(WAYS))
def test_ways_of_compiling(device: str, model: nn.Module, x: torch.Tensor, way: str, fullgraph: bool) -> None:  # noqa: F811
    plain = copy.deepcopy(model)
    compiled = WAYS[way](model, backend="mpk", fullgraph=fullgraph, options=STRICT)
    with torch.no_grad():
        assert_near(compiled(x), plain(x))
    assert programs(device) == 1


def test_a_graph_break_in_between(device: str, x: torch.Tensor) -> None:  # noqa: F811
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = mlp(), mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model = Broken().to(device)
    with torch.no_grad():
        assert_near(torch.compile(model, backend="mpk", options=STRICT)(x), model(x))
    assert programs(device) == 2


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "neither"])
def test_grad_modes(device: str, model: nn.Module, x: torch.Tensor, mode: str) -> None:  # noqa: F811
    compiled = torch.compile(model.requires_grad_(False), backend="mpk", options=STRICT)
    with getattr(torch, mode)() if mode != "neither" else torch.enable_grad():
        for _ in range(2):
            ours = compiled(x)
        assert_near(ours, model(x))
    assert ours.is_inference() == (mode == "inference_mode") and not ours.requires_grad
    assert programs(device) == 1


def test_changed_weights_take_effect(device: str, model: nn.Module, x: torch.Tensor) -> None:  # noqa: F811
    compiled = torch.compile(model, backend="mpk", options=STRICT)
    linear = model.body[0]

    def fresh() -> dict[str, torch.Tensor]:
        return {name: torch.randn_like(p) for name, p in model.state_dict().items()}

    def merged() -> None:
        """What merging a low-rank adapter does."""
        linear.weight.add_(torch.randn(128, 4, device=device) @ torch.randn(4, 64, device=device))

    changes: list[Callable[[], object]] = [
        lambda: model.load_state_dict(fresh()),
        lambda: model.load_state_dict(fresh(), assign=True),
        merged,
        lambda: setattr(linear.weight, "data", torch.randn(128, 64, device=device)),
        lambda: setattr(linear, "weight", nn.Parameter(torch.randn(128, 64, device=device))),
        lambda: model.to("cpu").to(device),
    ]
    with torch.no_grad():
        before = compiled(x)
        for change in changes:
            change()
            after = compiled(x)
            assert_near(after, model(x))
        assert (after - before).norm() > 0.1 * before.norm()
    assert programs(device) == 1, "none of this needs another program"


def test_weights_of_another_layout(device: str, model: nn.Module, x: torch.Tensor) -> None:  # noqa: F811
    compiled = torch.compile(model, backend="mpk", options=STRICT)
    with torch.no_grad():
        compiled(x)
        model.body[0].weight.data = torch.randn(64, 128, device=device).t()
        try:
            assert_near(compiled(x), model(x))
        except LaunchError as refused:  # PyTorch 2.11's guards do not see the change
            assert "torch.compiler.reset()" in str(refused) and programs(device) == 1


def test_copies_are_models_of_their_own(device: str, model: nn.Module, x: torch.Tensor) -> None:  # noqa: F811
    model.compile(backend="mpk", options=STRICT)
    with torch.no_grad():
        kept = model(x)
        other = copy.deepcopy(model)
        other.body[3].weight.zero_()
        other.body[3].bias.fill_(1.0)
        assert_near(other(x), nn.functional.silu(torch.ones_like(kept)))
        assert torch.equal(model(x), kept)
    programs(device)


def test_reset_compiles_again(device: str, model: nn.Module, x: torch.Tensor) -> None:  # noqa: F811
    compiled = torch.compile(model, backend="mpk", options=STRICT)
    with torch.no_grad():
        kept = compiled(x)
        torch.compiler.reset()
        assert torch.equal(compiled(x), kept)
    assert programs(device) == 2


def test_autocast_falls_back_and_says_why(
    device: str, model: nn.Module, x: torch.Tensor, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:
    compiled = torch.compile(model, backend="mpk", options={"fallback": "eager"})
    with torch.no_grad(), caplog.at_level(logging.WARNING, "mpk_dynamo"):
        with torch.autocast(device, dtype=torch.bfloat16):
            assert_near(compiled(x), model(x))
        assert "autocast is on" in caplog.text and "cast the model" in caplog.text
        assert_near(compiled(x), model(x))  # outside of it there is a program
    assert [bool(r.reason) for r in mpk_dynamo.reports()] == [True, False]
