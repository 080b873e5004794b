"""One CUDA device as the runtime uses it: torch's memory and streams, the driver's modules and launches.

Everything happens in the device's primary context, the one torch uses. Each driver call is checked.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from ..errors import LaunchError

_REMEDIES = {
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the kernel was built for another GPU; clear the option 'target'",
    "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE": "other work limits the SMs (MPS, MIG or a green context); set 'workers'",
    "CUDA_ERROR_OUT_OF_MEMORY": "free device memory, or use a smaller batch or cache",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "the CUDA context is lost: restart the process; run under compute-sanitizer",
    "CUDA_ERROR_LAUNCH_FAILED": "the CUDA context is lost: restart the process; run under compute-sanitizer",
    "CUDA_ERROR_INVALID_PTX": "update the NVIDIA driver or install the NVRTC of its CUDA version",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "update the NVIDIA driver or install the NVRTC of its CUDA version",
}


@cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver

        call(driver, "cuInit", 0)
    except (ImportError, RuntimeError, OSError) as why:
        raise LaunchError(f"the CUDA driver cannot be used: {why}", remedy="install cuda-bindings, a driver") from why
    return driver


def call(driver: Any, name: str, *args: Any) -> Any:
    """A driver function's results (None, a value or a tuple). Raises LaunchError when it fails."""
    status, *values = getattr(driver, name)(*args)
    if int(status) != 0:
        raise failure(driver, name, status)
    return values[0] if len(values) == 1 else tuple(values) or None


def failure(driver: Any, name: str, status: Any) -> LaunchError:
    """The exception for a failed driver call."""
    code = getattr(status, "name", str(status))
    _, text = driver.cuGetErrorString(status)
    text = text.decode() if isinstance(text, bytes) else str(text)
    return LaunchError(f"{name} failed: {code} ({text})", remedy=_REMEDIES.get(code, ""))


@cache
def device(index: int) -> "Device":
    """The Device of that index, one object per process. Raises LaunchError when it cannot be used."""
    return Device(index)


class Device:
    """A CUDA device. Construct it through `device(index)`."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.torch_device = torch.device("cuda", index)
        try:
            torch.cuda.init()
            torch.empty(1, device=self.torch_device)  # makes torch create its context, with its flags
        except RuntimeError as why:
            raise LaunchError(f"cuda:{index} cannot be used: {why}") from why
        self.driver = _driver()
        self.handle = call(self.driver, "cuDeviceGet", index)
        # retained for the life of the process, like torch's own reference
        self.context = call(self.driver, "cuDevicePrimaryCtxRetain", self.handle)
        self._context_id = int(self.context)
        raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        self._raw_stream = raw_stream or (lambda index: torch.cuda.current_stream(index).cuda_stream)

    # --- context and streams -----------------------------------------------------------------------------------

    def is_current(self) -> bool:
        """Whether the calling thread's current context is this device's. It is not in a thread new to CUDA."""
        status, context = self.driver.cuCtxGetCurrent()
        return int(status) == 0 and int(context) == self._context_id

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Makes the context current in this thread for a block."""
        call(self.driver, "cuCtxPushCurrent", self.context)
        try:
            yield
        finally:
            call(self.driver, "cuCtxPopCurrent")

    def stream(self) -> int:
        """Handle of torch's current stream on this device; 0 is the legacy default stream."""
        return self._raw_stream(self.index)

    def stream_handle(self, stream: int) -> Any:
        """A stream's handle as the driver's functions take it."""
        return self.driver.CUstream(stream)

    def capture_id(self, stream: int) -> int:
        """Identity of the CUDA graph capture in progress on a stream, 0 when there is none."""
        if stream == 0:  # cannot be captured, and asking about it fails while other streams capture
            return 0
        handle = self.stream_handle(stream)
        if not int(call(self.driver, "cuStreamIsCapturing", handle)):
            return 0
        _, ident, *_ = call(self.driver, "cuStreamGetCaptureInfo", handle)
        return int(ident)

    def attribute(self, name: str) -> int:
        """A device attribute, e.g. "MULTIPROCESSOR_COUNT"."""
        which = getattr(self.driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(call(self.driver, "cuDeviceGetAttribute", which, self.handle))

    # --- memory ------------------------------------------------------------------------------------------------

    def empty(self, nbytes: int) -> torch.Tensor:
        """Uninitialised device memory, uint8; torch aligns it to 512 bytes."""
        return torch.empty(max(nbytes, 1), dtype=torch.uint8, device=self.torch_device)

    def zeros(self, nbytes: int) -> torch.Tensor:
        """Zeroed device memory, uint8, in the order of the current stream."""
        return torch.zeros(max(nbytes, 1), dtype=torch.uint8, device=self.torch_device)

    def upload(self, data: bytes) -> torch.Tensor:
        """A device copy of `data`, uint8, complete when this returns."""
        tensor = self.empty(len(data))
        if data:
            tensor.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            torch.cuda.current_stream(self.torch_device).synchronize()
        return tensor

    def pinned(self, nbytes: int) -> "Pinned":
        """Zeroed host memory that kernels can write and that survives the loss of the context's device state."""
        with self.entered():
            flags = self.driver.CU_MEMHOSTALLOC_PORTABLE | self.driver.CU_MEMHOSTALLOC_DEVICEMAP
            host = int(call(self.driver, "cuMemHostAlloc", nbytes, flags))
            ctypes.memset(host, 0, nbytes)
            return Pinned(self, host, int(call(self.driver, "cuMemHostGetDevicePointer", host, 0)))

    # --- kernels -----------------------------------------------------------------------------------------------

    def load(self, cubin: bytes, name: str) -> "Kernel":
        """Loads a cubin and finds its kernel. Raises LaunchError."""
        with self.entered():
            module = call(self.driver, "cuModuleLoadData", cubin)
            function = call(self.driver, "cuModuleGetFunction", module, name.encode())
            if hasattr(self.driver, "cuFuncLoad"):
                # lazy loading would load the code at the first launch, which a stream capture may forbid
                call(self.driver, "cuFuncLoad", function)
        return Kernel(self, module, function)


class Pinned:
    """Pinned host memory: `host` and `device` addresses. Freed with the object, unless the process is ending."""

    def __init__(self, device: Device, host: int, device_address: int) -> None:
        self.host, self.device = host, device_address
        # at exit the driver may be gone already, and the memory goes with the process
        weakref.finalize(self, _free_pinned, device, host).atexit = False


def _free_pinned(device: Device, host: int) -> None:
    with contextlib.suppress(Exception):  # a finalizer has nobody to tell
        with device.entered():
            device.driver.cuMemFreeHost(host)


class Kernel:
    """A loaded kernel. The module stays loaded as long as the process: it may be part of a captured graph."""

    def __init__(self, device: Device, module: Any, function: Any) -> None:
        self.device, self.module, self.function = device, module, function

    def co_resident(self, threads: int, shared_bytes: int) -> int:
        """CTAs that the device can hold at once, and allows that much dynamic shared memory. Raises LaunchError."""
        driver = self.device.driver
        which = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with self.device.entered():
            call(driver, "cuFuncSetAttribute", self.function, which, shared_bytes)
            name = "cuOccupancyMaxActiveBlocksPerMultiprocessor"
            per_sm = int(call(driver, name, self.function, threads, shared_bytes))
        return per_sm * self.device.attribute("MULTIPROCESSOR_COUNT")

    def launch(self, grid: int, threads: int, shared_bytes: int, stream: Any, params: int) -> None:
        """Cooperative launch on a stream (a CUstream). `params`: address of an array of pointers to parameters."""
        driver = self.device.driver
        if self.device.is_current():
            (status,) = driver.cuLaunchCooperativeKernel(
                self.function, grid, 1, 1, threads, 1, 1, shared_bytes, stream, params
            )
        else:
            with self.device.entered():
                (status,) = driver.cuLaunchCooperativeKernel(
                    self.function, grid, 1, 1, threads, 1, 1, shared_bytes, stream, params
                )
        if int(status) != 0:
            raise failure(driver, "cuLaunchCooperativeKernel", status)
