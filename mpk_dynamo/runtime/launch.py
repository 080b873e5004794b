"""Executable: a compiled Program on one device. One cooperative launch per step, no allocation, no synchronisation."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import abi
from ..errors import DeviceFault, LaunchError
from ..ir.program import Program
from ..ir.region import Span
from .faults import explain

if TYPE_CHECKING:
    import torch

    from ..targets import Target
    from .build import Artifact
    from .device import Device

FAULT_WRITTEN = 2
_FIXED_BYTES = abi.LAUNCH_FIXED.dtype.itemsize
_TABLE_ALIGNMENT = 16
_SENTINEL_BYTE = 0xFF
_CAPTURES_KEPT = 16


class Binding:
    """The kernel's parameter for one stream, with the arena and the control block that no other stream shares.

    `words` are the launch's pointers, in the order of Program.bindings; a caller may write single entries between
    `Executable.prepared()` and its end. `stable` is free for the caller to remember what it wrote, `written` for where
    the tensors lie that the launch writes.
    """

    def __init__(self, fixed: dict[str, Any], count: int, stream: Any, keep: tuple[Any, ...]) -> None:
        self.stream, self._keep = stream, keep
        # numpy aligns it to 16 bytes; C++ has no array of 0 pointers
        self._memory = np.zeros(_FIXED_BYTES // 8 + max(count, 1), "<u8")
        self.fixed = self._memory[: _FIXED_BYTES // 8].view(abi.LAUNCH_FIXED.dtype)
        for name, value in {"steps": 1, **fixed}.items():
            self.fixed[name] = value
        self._loop = (1, 0)
        self.words = memoryview(self._memory)[_FIXED_BYTES // 8 :].cast("B").cast("Q")
        self.stable: object = None
        self.written: list[Span] = []
        self._last: tuple[int, ...] | None = None
        self._packer = struct.Struct(f"={count}Q")
        self._params = (ctypes.c_void_p * 1)(self._memory.ctypes.data)
        self.params = ctypes.addressof(self._params)

    @property
    def bytes(self) -> bytes:
        """The parameter as the kernel sees it."""
        return self._memory.tobytes()

    def bind(self, pointers: Sequence[int]) -> None:
        """Sets all pointers; nothing to do when they are the last ones."""
        pointers = tuple(pointers)
        if pointers != self._last:
            self._packer.pack_into(self.words, 0, *pointers)
            self._last, self.stable = pointers, None

    def loop(self, steps: int, done: int) -> None:
        """Sets how many steps the launch runs, and the address of the word that ends it."""
        if (steps, done) != self._loop:
            self.fixed["steps"], self.fixed["done"] = self._loop = steps, done

    def touch(self) -> None:
        """Says that `words` were written directly, so that `bind` compares with nothing stale."""
        self._last = None


class Executable:
    """A compiled Program, loaded on a device.

    `device_index`: an index or a torch.device. timeout_ns: bound of every wait in the kernel. flight: ring slots a
    worker's loader may have in flight, 0: as the program says; flight_waiting: the same while the worker waits, 0: half
    of it. profile: device address of
    profile records, 0 for none. `device` replaces the CUDA device, for tests.

    Raises LaunchError when the cubin is for another GPU or the workers cannot be resident at once.
    """

    def __init__(
        self,
        artifact: "Artifact",
        program: Program,
        target: "Target",
        device_index: "int | torch.device" = 0,
        *,
        timeout_ns: int = 4_000_000_000,
        flight: int = 0,
        flight_waiting: int = 0,
        profile: int = 0,
        device: "Device | None" = None,
    ) -> None:
        self.program, self.artifact, self.target = program, artifact, target
        if len(program.bindings) > abi.MAX_BINDINGS:
            raise LaunchError(f"{len(program.bindings)} tensors; one launch can carry {abi.MAX_BINDINGS}")
        if device is None:
            from .device import device as cuda_device

            device = cuda_device(_index(device_index))
        self.device = device
        if device.capture_id(device.stream()):
            raise LaunchError("a kernel cannot be loaded while a CUDA graph is captured", remedy="call it once before")
        _check_arch(device, target)
        schedule = program.schedule
        self.kernel = device.load(artifact.cubin, abi.KERNEL_NAME)
        self._grid, self._threads, self._shared = schedule.workers, program.threads, program.shared_bytes
        self._check_residency()
        self._tables, addresses = _upload_tables(device, program.tables)
        self._control_bytes = abi.control_bytes(max(schedule.slots, default=-1) + 1)
        self._record = device.pinned(abi.FAULT.dtype.itemsize)
        self._state = ctypes.c_uint32.from_address(self._record.host)
        self._fault: DeviceFault | None = None
        flight = flight or program.flight
        self._fixed = {
            "tables": addresses,
            "fault": self._record.device,
            "profile": profile,
            "timeout_ns": timeout_ns,
            "flight": flight,
            "flight_waiting": flight_waiting or (flight + 1) // 2,
        }
        self._bindings: dict[int, Binding] = {}
        self._captured: dict[tuple[int, int], Binding] = {}
        self._lock = threading.Lock()

    def launch(self, pointers: Sequence[int], steps: int = 1, done: int = 0) -> None:
        """Enqueues one launch of up to `steps` steps on torch's current stream. `pointers`: device addresses in the
        order of Program.bindings; the tensors must stay alive as for any operation on that stream. `done`: address of
        three int64; a step that leaves the first other than 0, or finds the third so when it ends, is the last of this
        launch and of all that come later with the same `done`, which the launch notes in the second.

        Raises DeviceFault for a fault of an earlier launch, LaunchError when the driver refuses.
        """
        if len(pointers) != len(self.program.bindings):
            raise LaunchError(f"{len(pointers)} pointers for {len(self.program.bindings)} bindings")
        with self.prepared(steps, done) as binding:
            binding.bind(pointers)

    @contextmanager
    def prepared(self, steps: int = 1, done: int = 0) -> Iterator[Binding]:
        """`with executable.prepared() as binding:` gives the current stream's Binding to fill, and launches at the
        end of the block. Other threads wait meanwhile; an exception in the block launches nothing. `steps`, `done`:
        see `launch`."""
        with self._lock:
            if self._state.value:
                self.check_fault()
            stream = self.device.stream()
            binding = self._bindings.get(stream)
            if binding is None or stream:
                binding = self._binding(stream)
            yield binding
            binding.loop(steps, done)
            self.kernel.launch(self._grid, self._threads, self._shared, binding.stream, binding.params)

    def profile(self, address: int) -> None:
        """Later launches write their profile records (abi.PROFILE: one per worker, then one per task) to this device
        address; 0: none. Nothing else of the kernel depends on it. CUDA graphs keep what they were captured with."""
        with self._lock:
            self._fixed["profile"] = address
            for binding in self._bindings.values():
                binding.fixed["profile"] = address

    def check_fault(self) -> None:
        """Raises DeviceFault when a kernel gave up. Does not synchronise: call it after a synchronize to know of
        all launches before it. The fault stays: so do the exceptions, since the step's results are lost."""
        if self._fault is None:
            if self._state.value != FAULT_WRITTEN:
                return
            raw = ctypes.string_at(self._record.host, abi.FAULT.dtype.itemsize)
            record = np.frombuffer(raw, abi.FAULT.dtype)[0]
            self._fault = explain({name: int(record[name]) for name in abi.FAULT.dtype.names or ()}, self.program)
        raise DeviceFault(self._fault.message, origin=self._fault.origin, remedy=self._fault.remedy)

    def _binding(self, stream: int) -> Binding:
        """The Binding for a stream: made once per stream, and once per CUDA graph capture.

        A capture gets memory of its own, from the graph's pool, because the graph may be replayed on any stream, at
        the same time as a launch on the stream that captured it. Nodes of the graph zero its control block and clear
        both sets of flagged buffers: a replay starts at epoch 0.
        """
        ident = self.device.capture_id(stream)
        if ident:
            key = (ident, stream)
            found = self._captured.get(key)
            if found is None:
                if len(self._captured) >= _CAPTURES_KEPT:
                    self._captured.pop(next(iter(self._captured)))
                found = self._captured[key] = self._new_binding(stream)
            return found
        found = self._bindings.get(stream)
        if found is None:
            found = self._bindings[stream] = self._new_binding(stream)
        return found

    def _new_binding(self, stream: int) -> Binding:
        schedule = self.program.schedule
        arena = self.device.empty(schedule.arena_bytes)
        start, size = schedule.flagged_start, schedule.flagged_bytes
        if size:
            arena[start : start + 2 * size].fill_(_SENTINEL_BYTE)
        control = self.device.zeros(self._control_bytes)
        fixed = {**self._fixed, "arena": arena.data_ptr(), "control": control.data_ptr()}
        fixed |= {"flagged": arena.data_ptr() + start, "flagged_bytes": size}
        handle = self.device.stream_handle(stream)
        return Binding(fixed, len(self.program.bindings), handle, (arena, control))

    def _check_residency(self) -> None:
        if not self.device.attribute("COOPERATIVE_LAUNCH"):
            raise LaunchError("the device does not support cooperative launches", remedy="use the fallback")
        resident = self.kernel.co_resident(self._threads, self._shared)
        if resident < self._grid:
            raise LaunchError(
                f"{self._grid} workers of {self._threads} threads, {self._shared} bytes of shared memory and "
                f"{self.artifact.report.registers} registers per thread: the device can hold {resident} at once",
                remedy=f"compile with at most {resident} workers" if resident else "the kernel is too large for an SM",
            )


def _upload_tables(device: "Device", tables: dict[str, bytes]) -> tuple["torch.Tensor", list[int]]:
    """All tables in one device tensor, and their addresses in the order of abi.TABLES."""
    offsets, packed = [], bytearray()
    for name, entry in abi.TABLES:
        data = tables[name]
        if len(data) % entry.dtype.itemsize:
            raise LaunchError(f"table {name} has {len(data)} bytes, not a multiple of {entry.dtype.itemsize}")
        packed += b"\0" * (-len(packed) % _TABLE_ALIGNMENT)
        offsets.append(len(packed))
        packed += data
    tensor = device.upload(bytes(packed))
    return tensor, [tensor.data_ptr() + offset for offset in offsets]


def _check_arch(device: "Device", target: "Target") -> None:
    found = (device.attribute("COMPUTE_CAPABILITY_MAJOR"), device.attribute("COMPUTE_CAPABILITY_MINOR"))
    if found != target.compute_capability:
        wanted = ".".join(map(str, target.compute_capability))
        raise LaunchError(
            f"the kernel was built for {target.arch} (compute capability {wanted}), the device has "
            f"{found[0]}.{found[1]}",
            remedy="clear the option 'target'",
        )


def _index(device: "int | torch.device") -> int:
    if isinstance(device, int):
        return device
    if device.index is not None:
        return device.index
    import torch

    return torch.cuda.current_device()
