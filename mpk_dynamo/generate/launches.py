"""A generation's steps: launches of the loop, the first of each segment through Dynamo, the others without it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, exceptions_allowed_to_be_fallback
from torch._dynamo.exc import Unsupported as DynamoUnsupported

from .. import pipeline
from ..errors import MpkError, Unsupported
from ..loop import Launched, Loop, LoopState, Sampling
from ..progress import progress
from ..report import Report, record
from ..settings import Settings
from ..specialize import free_numbers, has_symbols, returned_numbers, size_key
from .inputs import count, counting_layers

if TYPE_CHECKING:
    from transformers import CompileConfig, PreTrainedModel

_log = logging.getLogger("mpk_dynamo")
_ATTRIBUTE = "_mpk_dynamo_compiled"


@functools.cache
def notice(text: str) -> None:
    """Log `text` as a warning, the first time it is said in this process."""
    _log.warning("%s", text)


@dataclass
class Segment:
    """Launches that follow each other without the host touching what the steps are fed.

    before: tokens that were chosen before them. inputs: what the model's forward takes for the first of them; the
    tensors of `fed` among them are advanced by each launch. reads: whether the host wants to read the tokens of each
    launch. repeat: launches again, and is None until the first launch, or when the graph is for one step only.
    launched: the last one.
    """

    inputs: dict[str, Any]
    fed: dict[str, Any]
    state: LoopState
    before: int
    reads: bool = False
    steps: int = 0
    repeat: "Callable[[Segment, int], None] | None" = None
    launched: Launched | None = None
    _counted: int = 1  # the model's own code runs once, and counts the first step itself

    def count(self, chosen: int) -> None:
        """`chosen` tokens are chosen by now: of which layers that count in Python should know."""
        steps = chosen - self.before
        count(self.inputs, steps - self._counted)
        self._counted = steps


class LoopForward:
    """A model's forward whose captured graph runs the loop. One per model and set of sampling stages.

    Dynamo's guards are checked by `start`; `repeat` of the segment reuses the arguments that Dynamo handed over.
    """

    def __init__(self, model: "PreTrainedModel", sampling: Sampling, settings: Settings) -> None:
        self._sampling, self._settings = sampling, settings
        self._local = threading.local()
        self.step_s: dict[int, float] = {}
        """Seconds that a step took lately, by batch."""
        # with dynamic=False, a cache that counts its tokens in Python would compile for every length
        self._forward = torch.compile(_forward_of(model), backend=self._compile, fullgraph=True)

    def start(self, segment: Segment, steps: int) -> None:
        """The first launch, of up to `steps` steps, or of one where the graph is for the present lengths only. It is
        under way when this returns.

        Raises Unsupported when the model's step has no loop.
        """
        self._local.segment, segment.steps = segment, steps
        try:
            self._forward(**segment.inputs, return_dict=True)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, MpkError):
                raise error.inner_exception from None
            raise
        except (DynamoUnsupported, FailOnRecompileLimitHit) as error:  # no single graph, or too many of them
            first = str(error).strip().split("\n")[0]
            raise Unsupported(f"the decode step is not one graph: {type(error).__name__}: {first}") from error
        finally:
            self._local.segment = None

    def _compile(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """The backend: a callable for the graph that runs the present segment, with a loop for each of the sizes that
        come. It returns None in place of logits, which nobody reads."""
        key = size_key(gm, example_inputs) if has_symbols(gm, example_inputs) else lambda _args: ()
        loops = {key(example_inputs): self._loop(gm, example_inputs)}
        counts = any(n.op == "placeholder" and n in free_numbers(gm) for n in gm.graph.nodes)
        results = (None,) * len(_outputs(gm))

        def launch(*args: Any) -> tuple[Any, ...]:
            segment: Segment = self._local.segment
            size = key(args)
            if size not in loops:
                loops[size] = self._loop(gm, args)
            # where the cache counts in Python and the count is no input, it is a constant of this graph
            repeats = counts or not counting_layers(segment.inputs)
            _launch(loops[size], args, segment, segment.steps if repeats else 1)
            if repeats:
                segment.repeat = functools.partial(_launch, loops[size], args)
            return results

        return returned_numbers(gm, launch)

    def _loop(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Loop | Unsupported:
        """The loop for the present sizes, or why there is none."""
        report = record(Report(fx_nodes=sum(n.op not in ("placeholder", "output", "get_attr") for n in gm.graph.nodes)))
        fed = self._local.segment.fed
        try:
            with progress(report, self._settings.progress):
                loop = pipeline.compile_loop(gm, inputs, fed, self._sampling, self._settings, report)
        except Unsupported as error:
            why = error
        except exceptions_allowed_to_be_fallback as error:
            why = Unsupported(f"the graph cannot be traced: {type(error).__name__}: {error}")
        except MpkError as error:
            report.blame(error)
            raise
        else:
            _log.info("%s", report.summary())
            return loop
        report.blame(why)
        report.outcome = "no loop"
        return why


def _launch(loop: Loop | Unsupported, args: tuple[Any, ...], segment: Segment, steps: int) -> None:
    if isinstance(loop, Unsupported):
        raise loop
    segment.launched = loop.start(args, segment.state, steps, tokens=segment.reads)


def _outputs(gm: torch.fx.GraphModule) -> Sequence[Any]:
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    return output.args[0] if isinstance(output.args[0], (list, tuple)) else (output.args[0],)


def _forward_of(model: "PreTrainedModel") -> Callable[..., Any]:
    """The model's call as a function with a code object and a name of its own. By the code object, Dynamo keeps its
    graphs and limits how many there are; by the name, it remembers which numbers changed from call to call, and would
    take another model's numbers for changes of this one's."""

    def forward(**inputs: Any) -> Any:
        return model(**inputs)

    code = forward.__code__.replace(co_name=f"decode_step_{next(_numbers)}")
    return types.FunctionType(code, globals(), code.co_name, None, forward.__closure__)


_numbers = itertools.count()


class _Compiled(dict[Any, Callable[..., Any]]):
    """What is compiled of a model. Copies of the model start with nothing: compiled calls are bound to the original."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Compiled, ()


def _kept(model: "PreTrainedModel", key: Any, make: Callable[[], Any]) -> Any:
    compiled = model.__dict__.setdefault(_ATTRIBUTE, _Compiled())
    if key not in compiled:
        compiled[key] = make()
    return compiled[key]


def loop_forward(model: "PreTrainedModel", sampling: Sampling, settings: Settings) -> LoopForward:
    """The model's LoopForward for these sampling stages and settings, kept on the model."""
    key = (sampling.stages, dataclasses.replace(settings, loop_steps=0))
    return _kept(model, key, lambda: LoopForward(model, sampling, settings))


def compiled_step(model: "PreTrainedModel", config: "CompileConfig") -> Callable[..., Any]:
    """The model's call for a single decode step, compiled as `config` says, kept on the model."""
    how = config.to_dict()
    return _kept(model, repr(how), lambda: torch.compile(_forward_of(model), **how))


def forget_compiled(model: "PreTrainedModel") -> None:
    model.__dict__.pop(_ATTRIBUTE, None)
