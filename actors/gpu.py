"""GPU utilisation and memory through NVML, where the library and a device are present."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from actors.procfs import NAN


class GpuReader(Protocol):
    """Anything that reports (mean utilisation, greatest memory use), both as fractions."""

    def read(self) -> tuple[float, float]:
        """Read once; NaN where a device does not answer."""
        ...


class NvmlReader:
    """Reads all devices that NVML shows. `nvml` is the `pynvml` module (package nvidia-ml-py)."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        self._devices = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]

    def read(self) -> tuple[float, float]:
        """Mean utilisation over devices and the fullest device's memory fraction."""
        used, memory = [], []
        for device in self._devices:
            try:
                used.append(self._nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100.0)
                info = self._nvml.nvmlDeviceGetMemoryInfo(device)
                memory.append(info.used / info.total)
            except self._nvml.NVMLError:
                continue
        return (sum(used) / len(used) if used else NAN), max(memory, default=NAN)


def open_gpu() -> GpuReader | None:
    """A reader, or None where NVML or a device is absent."""
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        return NvmlReader(pynvml)
    except pynvml.NVMLError:
        return None
