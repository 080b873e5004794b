"""The GPU's own energy counter, through the driver's management library (NVML)."""

from __future__ import annotations

import ctypes
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"


class EnergyMeter:
    """missing: why there is no counter, or "". The counter is the whole board's, since the driver was loaded."""

    def __init__(self, device: str = "cuda") -> None:
        import torch

        self.missing, self._handle = "", ctypes.c_void_p()
        try:
            self._nvml = ctypes.CDLL(_LIBRARY)
        except OSError:
            self.missing = f"the driver's {_LIBRARY} cannot be loaded"
            return
        index = torch.device(device).index
        index = torch.cuda.current_device() if index is None else index
        # by UUID: NVML counts devices that CUDA_VISIBLE_DEVICES hides
        uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}".encode()
        try:
            self._call("nvmlInit_v2")
            self._call("nvmlDeviceGetHandleByUUID", ctypes.c_char_p(uuid), ctypes.byref(self._handle))
            self.joules()
        except (RuntimeError, AttributeError) as error:  # an old library lacks the function
            self.missing = f"NVML: {error}"

    def joules(self) -> float:
        """Since some point in the past. Raises RuntimeError when the driver refuses."""
        found = ctypes.c_ulonglong()  # millijoules
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._handle, ctypes.byref(found))
        return found.value / 1e3

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._nvml, name)(*arguments)
        if status:
            self._nvml.nvmlErrorString.restype = ctypes.c_char_p
            raise RuntimeError(f"{name}: {self._nvml.nvmlErrorString(status).decode()}")
