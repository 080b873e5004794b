"""DeviceCallable: an Executable with the calling convention of the captured graph: tensors in, tensors out."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import LaunchError
from ..ir.graph import Graph, Output
from ..ir.region import Span, check_apart
from ..ir.types import Buffer, BufferKind
from ..ops.evaluate import TORCH_DTYPE
from .launch import Binding, Executable

ALIGNMENT = 16
"""Bytes. What the kernel may assume of every PARAM and STATE of at least that size, and of floating-point INPUTs of
at least that size. OUTPUTs are aligned to 512. Everything else is aligned to its element."""

_data_ptr = torch.Tensor.data_ptr


@dataclass(frozen=True)
class _Caller:
    """A binding that is a tensor of the caller."""

    word: int  # place in the pointer array
    argument: int
    buffer: Buffer

    @property
    def mask(self) -> int:
        """Address bits that must be zero."""
        b = self.buffer
        vector = b.nbytes >= ALIGNMENT and (b.kind is not BufferKind.INPUT or b.dtype.is_float)
        return (ALIGNMENT if vector else b.dtype.itemsize) - 1


class DeviceCallable:
    """`callable(*args)` runs one step on torch's current stream and returns a tuple in the order of graph.outputs.

    `arguments` maps storages to positions in `args`, `constants` to tensors that the graph holds. Shapes, strides,
    dtypes and devices of `args` are those of the graph's buffers: checked on the first call and, for parameters and
    state, when one of them moved; otherwise by whoever guards the call (Dynamo). Addresses may change with each call.
    An output that is a caller's buffer is the caller's tensor object; others are new tensors.

    Raises LaunchError for arguments the kernel cannot take and when the driver refuses, DeviceFault for a fault of
    an earlier step.
    """

    def __init__(
        self,
        executable: Executable,
        graph: Graph,
        arguments: Mapping[str, int],
        constants: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.executable, self._buffers = executable, graph.buffers
        self._device = executable.device.torch_device
        self._constants = dict(constants or {})
        callers, made, self._fixed = [], [], []
        for word, storage in enumerate(executable.program.bindings):
            buffer = self._buffers[storage]
            if buffer.kind is BufferKind.OUTPUT:
                made.append((word, buffer))
            elif storage in self._constants:
                tensor = self._constants[storage]
                _check_tensor(tensor, buffer, self._device, f"constant {storage}")
                self._fixed.append((_Caller(word, -1, buffer), tensor.data_ptr()))
            elif storage in arguments:
                callers.append(_Caller(word, arguments[storage], buffer))
            else:
                raise LaunchError(f"binding {storage} ({buffer.kind.value}) is neither an argument nor an output")
        self._checked = False
        # parameters and state move rarely, so their addresses are compared in bulk; inputs are new at each step
        self._stable = [c for c in callers if c.buffer.kind is not BufferKind.INPUT]
        self._inputs = [(c.word, c.argument, c.mask) for c in callers if c.buffer.kind is BufferKind.INPUT]
        self._pick = _picker([c.argument for c in self._stable])
        self._callers = callers
        self._writes = any(c.buffer.kind is BufferKind.STATE for c in callers)
        self._input_spans = [(c.buffer.span_bytes, c.buffer.name) for c in callers if c.buffer.kind is BufferKind.INPUT]
        self._made = [(word, b.shape, TORCH_DTYPE[b.dtype]) for word, b in made]
        position = {b.name: i for i, (_, b) in enumerate(made)}
        self._results = [self._result(output, position, arguments) for output in graph.outputs]

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        return self.run(args)

    def run(self, args: tuple[Any, ...], steps: int = 1, done: torch.Tensor | None = None) -> tuple[Any, ...]:
        """One launch of up to `steps` steps, which ends and is followed by none as Executable.launch says; done: the
        first of three int64. What a step is fed must be STATE."""
        if not self._checked:
            self._check(args)
        addresses = [*map(_data_ptr, self._pick(args))]
        with self.executable.prepared(steps, 0 if done is None else done.data_ptr()) as binding:
            if addresses != binding.stable:
                self._rebind(binding, addresses, args)
            words, keep = binding.words, []
            if self._writes:
                self._check_inputs(args, binding.written)
            for word, argument, mask in self._inputs:
                address = args[argument].data_ptr()
                if address & mask:
                    keep.append(_aligned_copy(args[argument]))
                    address = keep[-1].data_ptr()
                words[word] = address
            made = []
            for word, shape, dtype in self._made:
                tensor = torch.empty(shape, dtype=dtype, device=self._device)
                words[word] = tensor.data_ptr()
                made.append(tensor)
        # copies in `keep` may be freed now: their memory is reused only by later work of this stream
        return tuple([result(made, args) for result in self._results])

    def check_fault(self) -> None:
        """Raises DeviceFault when a step that is known to be finished gave up. See Executable.check_fault."""
        self.executable.check_fault()

    def _rebind(self, binding: Binding, addresses: list[int], args: Sequence[Any]) -> None:
        binding.touch()
        for caller, tensor in zip(self._stable, self._pick(args), strict=True):
            # guards may not have noticed: `weight.data = ...` changes no dictionary that Dynamo watches
            _check_tensor(tensor, caller.buffer, self._device, f"argument {caller.argument}")
        for caller, address in [*zip(self._stable, addresses, strict=True), *self._fixed]:
            if address & caller.mask:
                raise LaunchError(
                    f"{caller.buffer.kind.value} {caller.buffer.name} lies at {address:#x}, which is not a multiple of "
                    f"{caller.mask + 1} bytes",
                    origin=caller.buffer.origin,
                    remedy="pass a tensor that owns its storage, e.g. a clone() of the view",
                )
            binding.words[caller.word] = address
        if self._writes:
            spans = [
                (address, address + c.buffer.span_bytes, c.buffer.kind is BufferKind.STATE, c.buffer.name)
                for c, address in zip(self._stable, addresses, strict=True)
            ]
            check_apart(spans)
            binding.written = sorted(span for span in spans if span[2])
        binding.stable = addresses

    def _check_inputs(self, args: tuple[Any, ...], written: list[Span]) -> None:
        """Whether an input lies in what is written. What is written is apart, so that its spans' ends are in order."""
        for (_, argument, _), (size, name) in zip(self._inputs, self._input_spans):
            start = args[argument].data_ptr()
            k = bisect.bisect_left(written, (start + size,)) - 1  # the last that begins before its end
            if k >= 0 and written[k][1] > start:
                check_apart([written[k], (start, start + size, False, name)])

    def _check(self, args: Sequence[Any]) -> None:
        """Whether the arguments are those the program was made for."""
        for caller in self._callers:
            value = args[caller.argument] if caller.argument < len(args) else None
            _check_tensor(value, caller.buffer, self._device, f"argument {caller.argument}")
        self._checked = True

    def _result(self, output: Output, made: Mapping[str, int], arguments: Mapping[str, int]) -> Callable[..., Any]:
        """A function of (new tensors, args) that gives one result."""
        if output.buffer is None:
            return lambda _made, _args: output.constant
        buffer = self._buffers[output.buffer]
        base = self._buffers[buffer.storage]
        same = (buffer.shape, buffer.strides) == (base.shape, base.strides)
        if base.name in made:
            index = made[base.name]
            if same:
                return lambda made, _args: made[index]
            return lambda made, _args: made[index].as_strided(buffer.shape, buffer.strides)
        if base.name in self._constants:
            held = self._constants[base.name]
            return lambda _made, _args: held if same else held.as_strided(buffer.shape, buffer.strides)
        if base.name not in arguments:
            raise LaunchError(f"output {output.buffer} is neither written by the kernel nor an argument")
        argument = arguments[base.name]
        if same:
            return lambda _made, args: args[argument]
        return lambda _made, args: args[argument].as_strided(buffer.shape, buffer.strides)


def _check_tensor(value: Any, buffer: Buffer, device: torch.device, what: str) -> None:
    wanted = (buffer.shape, buffer.strides, TORCH_DTYPE[buffer.dtype], device)
    found: object = type(value).__name__
    if isinstance(value, torch.Tensor):
        shape = tuple(value.shape)
        # strides of dimensions of one element, and of empty tensors, mean nothing
        strides = tuple(s if n != 1 else w for n, s, w in zip(shape, value.stride(), buffer.strides))
        found = (shape, strides if value.numel() else buffer.strides, value.dtype, value.device)
    if found != wanted:
        raise LaunchError(
            f"{what} ({buffer.kind.value} {buffer.name}) is {found}, compiled for {wanted}",
            origin=buffer.origin,
            remedy="call with tensors of the shapes, strides, dtypes and device that were captured, or call "
            "torch.compiler.reset() to capture anew",
        )


def _picker(indices: list[int]) -> Callable[[tuple[Any, ...]], Sequence[Any]]:
    """args -> the arguments at these positions."""
    if len(indices) >= 2:
        return operator.itemgetter(*indices)
    return lambda args: [args[i] for i in indices]


def _aligned_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, strides and values at an aligned address. Copies the span of memory that the
    tensor covers, whatever its strides are."""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    return tensor.as_strided((span,), (1,)).clone().as_strided(tensor.shape, tensor.stride())
