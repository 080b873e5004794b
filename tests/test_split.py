"""Graphs with nodes that cannot be captured: the rest runs in programs, results and memory are as eager leaves them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mpk_dynamo

N = 32


@torch.library.custom_op("mpk_test::odd", mutates_args=())
def odd(x: torch.Tensor) -> torch.Tensor:
    return x.sinh().clamp(-2, 2)


@odd.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("mpk_test::scale_", mutates_args=("x",))
def scale_(x: torch.Tensor, by: float) -> None:
    x.mul_(by)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    mpk_dynamo.clear_reports()
    yield
    torch._dynamo.reset()


class Block(torch.nn.Module):
    """Normalisation and a gated MLP, with a place for something odd."""

    def __init__(self, odd: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(N)
        self.up, self.gate, self.down = (torch.nn.Linear(N, N, bias=False) for _ in range(3))
        self.odd = odd or (lambda x: x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.odd(self.up(y)))


def blocks(count: int, **odd_at: Callable[[torch.Tensor], torch.Tensor]) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(Block(odd_at.get(f"at{k}")) for k in range(count)))


def check(model: Callable[..., Any], *args: torch.Tensor, programs: int, calls: int = 2, **options: Any) -> Any:
    """Compare results, and what became of the arguments, over some calls; the report."""
    ours, theirs = ([a.clone() for a in args] for _ in range(2))
    compiled = torch.compile(model, backend="mpk", fullgraph=True, options=options)
    with torch.no_grad():
        for _ in range(calls):
            a, b = compiled(*ours), model(*theirs)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    (report,) = mpk_dynamo.reports()
    assert len(report.programs) == programs, str(report)
    assert report.calls == calls and all(p.calls == calls and p.tasks for p in report.programs)
    return report


def test_a_custom_operator_in_the_middle_leaves_two_programs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mpk_dynamo"):
        report = check(blocks(3, at1=odd), torch.randn(2, N), programs=2)
    assert report.outcome == "reference and eager"
    assert list(report.left_out.values()) == [1]
    assert "mpk_test.odd" in caplog.text and "test_split.py:" in caplog.text
    assert report.tasks == sum(p.tasks for p in report.programs)


def rotated(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(torch.view_as_complex(x.view(2, -1, 2)) * 1j).flatten(1)


def branching(x: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


@pytest.mark.parametrize(
    ("model", "programs"),
    [
        (lambda inner, x: inner(odd(x)), 1),
        (lambda inner, x: odd(inner(x)), 1),
        (lambda inner, x: inner(torch.linalg.qr(inner(x).view(2, 8, 4))[0].reshape(2, N)), 2),
        (lambda inner, x: inner(rotated(inner(x))), 2),
        (lambda inner, x: inner(torch.sort(inner(x)).values), 2),
        (lambda inner, x: inner(branching(inner(x))), 2),
        (lambda inner, x: inner(odd(inner(odd(inner(x))))), 3),
    ],
    ids=["start", "end", "linalg", "complex", "sort", "cond", "several"],
)
def test_places_and_kinds(model: Any, programs: int) -> None:
    inner = blocks(1)
    check(lambda x: model(inner, x), torch.randn(2, N), programs=programs)


class Cached(torch.nn.Module):
    """Appends a row to a cache, counts, and attends, with something odd between the two."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.qkv, self.out = torch.nn.Linear(N, 3 * N), torch.nn.Linear(N, N)
        self.block = Block()

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        x = self.block(x)
        q, k, v = (t.view(2, 1, 4, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        at = count.view(1)
        if self.where == "before":
            k = odd(k)
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        if self.where == "between":
            torch.ops.mpk_test.scale_(keys, 0.5)
        count.add_(1)
        mask = (torch.arange(8) < count)[None, None, None]
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).transpose(1, 2).reshape(2, N)
        if self.where == "after":
            y = odd(y)
        return self.block(x + self.out(y))


@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_around_a_cache(where: str) -> None:
    torch.manual_seed(0)
    cache = [torch.zeros(2, 4, 8, 8) for _ in range(2)]
    report = check(Cached(where), torch.randn(2, N), *cache, torch.tensor(0), programs=2, calls=5)
    assert report.node_kinds["Attention"] == 1


def test_order_of_writes_and_reads() -> None:
    """A program reads, the fallback writes, a program reads again; through views as well."""
    torch.manual_seed(0)
    first, second = blocks(1), blocks(1)

    def model(x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a = first(x) + state
        row = state[1]
        torch.ops.mpk_test.scale_(row, 3.0)
        b = second(a + state)
        state.add_(1)
        torch.ops.mpk_test.scale_(b, 2.0)
        c = b.view(4, 16)
        torch.ops.mpk_test.scale_(c, 0.5)
        return second(b) + first(a), c, b

    check(model, torch.randn(2, N), torch.randn(2, N), programs=3, calls=3)


def test_results_that_share_memory_do_so_behind_a_split() -> None:
    inner = blocks(1)

    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = inner(odd(inner(x)))
        return y, y.view(4, 16), x

    compiled, x = torch.compile(model, backend="mpk", fullgraph=True), torch.randn(2, N)
    with torch.no_grad():
        a, b, c = compiled(x)
    assert a.data_ptr() == b.data_ptr() and c is x
    assert len(mpk_dynamo.reports()[0].programs) == 2


def test_what_is_not_worth_a_launch_stays_outside() -> None:
    one = torch.nn.Linear(N, N)

    def model(x: torch.Tensor) -> torch.Tensor:
        return odd(blocks_(odd(one(odd(x)) + 1)))

    blocks_ = blocks(2)
    report = check(model, torch.randn(2, N), programs=1)
    (line,) = report.small
    assert "one launch in place of 1" in line and "apart" in line
    text = str(mpk_dynamo.explain(model, torch.randn(2, N)))
    assert line in text and "mpk_test.odd" in text and "test_split.py:" in text


def test_nothing_worth_it_falls_back_whole() -> None:
    compiled, x = torch.compile(lambda x: odd(x + 1) * 2, backend="mpk"), torch.randn(2, N)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), odd(x + 1) * 2)
    (report,) = mpk_dynamo.reports()
    assert report.outcome == "fallback to eager" and "not worth a launch" in report.reason and not report.programs


def test_error_is_raised_where_a_split_is_not_wanted() -> None:
    with torch.no_grad(), pytest.raises(Exception, match="mpk_test.odd"):
        torch.compile(blocks(3, at1=odd), backend="mpk", options={"fallback": "error"})(torch.randn(2, N))


@pytest.mark.slow
def test_inductor_runs_the_pieces_outside() -> None:
    report = check(blocks(3, at1=odd), torch.randn(2, N), programs=2, fallback="inductor")
    assert report.outcome == "reference and inductor"


def test_weights_that_change_are_used() -> None:
    model, x = blocks(3, at1=odd), torch.randn(2, N)
    compiled = torch.compile(model, backend="mpk", fullgraph=True)
    with torch.no_grad():
        compiled(x)
        model[2].down.weight.mul_(3)
        model[0].down.weight = torch.nn.Parameter(model[0].down.weight * 2)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(mpk_dynamo.reports()) == 1


def test_every_stage_of_every_piece_is_dumped(tmp_path: Any) -> None:
    check(blocks(3, at1=odd), torch.randn(2, N), programs=2, dump_dir=str(tmp_path))
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("4-schedule.txt"))
    assert [f.split("/")[1] for f in found] == ["piece-1", "piece-3"]
