"""What cannot be captured is refused by a typed error that names operator, place and reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capturing import Grab
from torch._dynamo.exc import BackendCompilerFailed

from mpk_dynamo.capture import capture
from mpk_dynamo.errors import Unsupported


def refused(function: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The text of the refusal."""
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(function, backend=Grab(), fullgraph=True, **options)(*args)
    assert isinstance(caught.value.inner_exception, Unsupported), repr(caught.value.inner_exception)
    return str(caught.value.inner_exception)


def test_an_operator_without_lowering_names_module_line_and_operator() -> None:
    class Inner(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(x)

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x)

    text = refused(Outer(), torch.eye(3))
    assert "aten.linalg_inv.default: this operator has no lowering" in text
    assert "at block (test_refusals.py:" in text


x, heads = torch.randn(4, 4), torch.randn(1, 2, 17, 8)


@pytest.mark.parametrize(
    ("function", "args", "reason"),
    [
        (lambda a: (a + 1) @ (a * 2), (torch.ones(128, 128),), "product of two computed tensors"),
        (lambda q: F.scaled_dot_product_attention(q, q, q), (heads,), "17 query tokens"),
        (lambda q: F.scaled_dot_product_attention(q[:, :, :1], q, q, dropout_p=0.5), (heads,), "dropout_p=0.5"),
        (lambda a: F.dropout(a, 0.1, training=True), (x,), "dropout with p=0.1 while training"),
        (lambda a: torch.view_as_complex(a.view(4, 2, 2)) + 0, (x,), "dtype torch.complex64|has no lowering"),
        (lambda a: a.to(torch.int8) + 0, (x,), "dtype torch.int8"),
        (lambda a: a.view(torch.int32) + 0, (x,), "reinterprets f32 as i32"),
        (lambda a: a + a.sum().item(), (x,), "depends on data"),
        (lambda a: a.max(1).indices + 0, (x,), "positions of the extreme values"),
        (lambda a: a[:1].expand(4, 4).add_(1), (x,), "expanded tensor"),
        (lambda a: a.long() & 3, (x,), "bitwise arithmetic on integers"),
        (lambda a: torch.sort(a)[0], (x,), "has no lowering"),
    ],
)
def test_reason(function: Callable[..., Any], args: tuple[Any, ...], reason: str) -> None:
    import re

    text = refused(function, *args)
    assert re.search(reason, text), text
    assert "test_refusals.py:" in text, "the line of the model is named"


def test_autocast() -> None:
    def function(a: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.mm(a, a)

    assert "autocast" in refused(function, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast is on" in refused(lambda a: a + 1, x)


def test_symbolic_shapes() -> None:
    text = refused(lambda a: a * a.shape[0], torch.randn(5, 3), dynamic=True)
    assert "dynamic=False" in text


def test_inputs_that_are_no_tensors() -> None:
    graph = torch.fx.Graph()
    graph.output((graph.placeholder("n"),))
    with pytest.raises(Unsupported, match="input n is int, not a tensor"):
        capture(torch.fx.GraphModule({}, graph), [3])


def test_fake_inputs_are_accepted_and_give_the_same_graph() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from mpk_dynamo.ir.printer import print_graph

    graph = torch.fx.Graph()
    a = graph.placeholder("a")
    graph.output((graph.call_function(F.silu, (a,)),))
    gm = torch.fx.GraphModule({}, graph)
    real = torch.randn(3, 4).t()
    fake = FakeTensorMode().from_tensor(real)
    assert print_graph(capture(gm, [real]).graph) == print_graph(capture(gm, [fake]).graph)


def test_prefill_is_refused_with_the_reason() -> None:
    import transformers
    from test_models import tiny

    model = tiny("Llama", torch.float32, num_hidden_layers=1)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    prompt = torch.ones(3, 6, dtype=torch.long)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    text = refused(lambda ids: model(ids, past_key_values=cache).logits, prompt)
    assert "a product of 18 rows" in text and "up to 16 rows" in text and "model.layers.0.self_attn" in text
