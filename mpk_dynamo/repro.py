"""A graph of Dynamo as a Python script that compiles it again, by itself: the code, and inputs of the same kind."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch

from .settings import Settings

_SCRIPT = '''"""Compiles one graph with mpk_dynamo and compares it with plain PyTorch. Weights and inputs are made up:
floats are random, integers 0 and bools True, in the shapes, strides and types of the call that this comes from.

python repro.py [device]
"""

import sys

import torch
{imports}

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "{device}"
OPTIONS = {options}


def tensor(shape, strides, dtype, parameter=False):
    out = torch.empty_strided(shape, strides, dtype=dtype, device=DEVICE)
    if dtype.is_floating_point:
        scale = (shape[-1] if len(shape) > 1 else 1) ** -0.5
        out.copy_(torch.randn(shape, generator=generator) * scale)
    else:
        out.fill_(dtype is torch.bool)
    return torch.nn.Parameter(out, requires_grad=False) if parameter else out


class Graph(torch.nn.Module):
{held}
{code}


if __name__ == "__main__":
    import mpk_dynamo

    generator = torch.Generator().manual_seed(0)
    graph = Graph()
    inputs = [
{inputs}
    ]
    with torch.no_grad():
        theirs = graph(*[x.clone() if isinstance(x, torch.Tensor) else x for x in inputs])
        ours = torch.compile(graph, backend="mpk", fullgraph=True, dynamic=False, options=OPTIONS)(*inputs)
    for report in mpk_dynamo.reports():
        print(report.summary())
    for k, (a, b) in enumerate(zip(ours, theirs)):
        if isinstance(b, torch.Tensor):
            difference = (a.double() - b.double()).abs().max()
            print(f"result {{k}}: {{list(b.shape)}} {{b.dtype}}, greatest difference {{difference:.3g}}")
'''


def script(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], settings: Settings) -> str:
    """The text of the script. Holds no value of a tensor."""
    from torch.fx.graph_module import _format_import_block
    from torch.package import sys_importer

    from .capture.retrace import describe, held_tensors

    code = gm.graph.python_code("self")
    source = re.sub(r"\bdevice\(type='\w+'(, index=\d+)?\)", "torch.device(DEVICE)", code.src)
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    rows = []
    for node, x in zip(nodes, example_inputs, strict=True):
        place = describe(node, x)
        rows.append(f"        {_made(x, place.static)},  # {place.name}")
    held = [f'    setattr(self, "{n}", {_made(x, True)})' for n, x in held_tensors(gm).items()]
    start = ["def __init__(self):", "    super().__init__()", *held]
    chosen = {k: v for k, v in dataclasses.asdict(settings).items() if v != getattr(Settings(), k)}
    chosen.pop("dump_dir", None)
    devices = [str(x.device) for x in example_inputs if isinstance(x, torch.Tensor)]
    return _SCRIPT.format(
        imports=_format_import_block(code.globals, sys_importer),
        device=devices[0] if devices else "cpu",
        options={**chosen, "fallback": "error"},
        held="\n".join(f"    {line}" for line in start),
        code="\n".join(f"    {line}".rstrip() for line in source.strip().splitlines()),
        inputs="\n".join(rows),
    )


def _made(x: Any, static: bool) -> str:
    if not isinstance(x, torch.Tensor):
        return repr(x.node.hint if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)) else x)
    shape, strides = ([int(n) for n in numbers] for numbers in (x.shape, x.stride()))
    return f"tensor({shape}, {strides}, {x.dtype}{', parameter=True' if static else ''})"
