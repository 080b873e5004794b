"""A Device without CUDA: memory is the host's, streams are numbers, and a launch runs the toy program at once."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from types import SimpleNamespace

import numpy as np
import torch
import toy_program

from mpk_dynamo import abi


class HostKernel:
    """Stands for runtime.device.Kernel. Keeps what each launch was given."""

    def __init__(self, resident: int) -> None:
        self.resident, self.launches = resident, []
        self.tick = itertools.count(1)

    def co_resident(self, threads: int, shared_bytes: int) -> int:
        return self.resident

    def launch(self, grid: int, threads: int, shared_bytes: int, stream: int, params: int) -> None:
        fixed = toy_program.run_on_host(params)
        if fixed["profile"] > 1 << 20:  # a real address, of records for two workers and three tasks
            records = toy_program.read(fixed["profile"], np.dtype("<u8"), 5 * abi.PROFILE.dtype.itemsize // 8)
            records[:] = [next(self.tick) for _ in records]
        self.launches.append({"grid": grid, "threads": threads, "shared": shared_bytes, "stream": stream, **fixed})


class HostDevice:
    """Stands for runtime.device.Device. `current` is the current stream, `captures` maps a stream to a capture id."""

    def __init__(self, resident: int = 8, capability: tuple[int, int] = (9, 0)) -> None:
        self.torch_device = torch.device("cpu")
        self.kernel = HostKernel(resident)
        self.current, self.captures = 0, {}
        major, minor = capability
        attributes = {"COMPUTE_CAPABILITY_MAJOR": major, "COMPUTE_CAPABILITY_MINOR": minor, "COOPERATIVE_LAUNCH": 1}
        self.attribute = attributes.__getitem__

    def stream(self) -> int:
        return self.current

    def stream_handle(self, stream: int) -> int:
        return stream

    def capture_id(self, stream: int) -> int:
        return self.captures.get(stream, 0)

    @contextlib.contextmanager
    def capturing(self, stream: int, ident: int):
        previous, self.current = self.current, stream
        self.captures[stream] = ident
        yield
        del self.captures[stream]
        self.current = previous

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.full((max(nbytes, 1),), 0xA5, dtype=torch.uint8)

    def zeros(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(max(nbytes, 1), dtype=torch.uint8)

    def upload(self, data: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).clone()

    def pinned(self, nbytes: int) -> SimpleNamespace:
        memory = (ctypes.c_char * nbytes)()
        return SimpleNamespace(host=ctypes.addressof(memory), device=ctypes.addressof(memory), memory=memory)

    def load(self, cubin: bytes, name: str) -> HostKernel:
        assert name == "mpk_main"
        return self.kernel
