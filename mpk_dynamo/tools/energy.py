"""The GPU's own energy counter, through NVML."""

from __future__ import annotations


class EnergyMeter:
    """missing: why there is no counter, or "". The counter is the whole board's, since the driver was loaded."""

    def __init__(self, device: str = "cuda") -> None:
        self.missing = ""
        try:
            import pynvml
        except ImportError:
            self.missing = "the Python package nvidia-ml-py is not installed"
            return
        import torch

        self._nvml = pynvml
        index = torch.device(device).index or torch.cuda.current_device()
        try:
            pynvml.nvmlInit()
            # by UUID: NVML counts devices that CUDA_VISIBLE_DEVICES hides
            uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self.joules()
        except pynvml.NVMLError as error:
            self.missing = f"NVML: {error}"

    def joules(self) -> float:
        """Since some point in the past."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
