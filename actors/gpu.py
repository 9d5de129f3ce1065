"""GPU utilisation and memory through NVML, where the library and a device are present.

Each value of each device stands alone: what a device does not tell is left out, and NaN where no device tells it.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from actors.procfs import NAN, raylet_above, read_text

logger = logging.getLogger(__name__)

RETRY_S = 60.0
"""NVML is opened again this often while a device does not answer: drivers come late, are reloaded, lose a GPU."""
NOT_AVAILABLE = 2**64 - 1
"""NVML's -1 in an unsigned field."""
WAIT_S = 0.25
"""How long sampling waits for NVML; a healthy one answers in a few milliseconds."""


class GpuReader(Protocol):
    """Anything that reports (mean utilisation, greatest memory use), both as fractions."""

    def read(self) -> tuple[float, float]:
        """Read once; NaN where a device does not answer."""
        ...


class NvmlReader:
    """Reads the node's devices. `nvml` is the `pynvml` module (package nvidia-ml-py).

    `visible` chooses devices as CUDA_VISIBLE_DEVICES does, None means all. A GPU in MIG mode counts as its slices.
    """

    def __init__(self, nvml: Any, visible: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._nvml = nvml
        self._visible = visible
        self._clock = clock
        self._devices: list[Any] = []
        self._told: set[str] = set()
        self._opened_s = -math.inf
        self._failed = True

    def read(self) -> tuple[float, float]:
        """Mean utilisation over devices and the fullest device's memory fraction."""
        if self._failed and not 0.0 <= self._clock() - self._opened_s < RETRY_S:
            self._open()
        used, memory = [], []
        for device in self._devices:
            rates = self._ask("nvmlDeviceGetUtilizationRates", device)
            info = self._ask("nvmlDeviceGetMemoryInfo", device)
            if rates is not None and rates.gpu <= 100:
                used.append(rates.gpu / 100.0)
            if info is not None and 0 < info.total < NOT_AVAILABLE:  # 0: the device has no memory of its own
                memory.append(info.used / info.total)
            self._failed |= rates is None and info is None
        return _bounded(sum(used) / len(used) if used else NAN), _bounded(max(memory, default=NAN))

    def _open(self) -> None:
        self._opened_s = self._clock()
        self._ask("nvmlShutdown", expected=True)
        self._ask("nvmlInit")
        gpus = [self._ask("nvmlDeviceGetHandleByIndex", i) for i in range(self._ask("nvmlDeviceGetCount") or 0)]
        self._devices = [device for gpu in self._chosen(gpus) for device in self._parts(gpu)]
        self._devices += self._slices_named(gpus)
        self._failed = not self._devices or None in gpus

    def _chosen(self, gpus: list[Any]) -> list[Any]:
        """Whole GPUs that are visible. As with CUDA, the first name that means nothing ends the list."""
        present = [gpu for gpu in gpus if gpu is not None]
        if self._visible is None:
            return present
        chosen: list[Any] = []
        for name in (n.strip() for n in self._visible.split(",")):
            if name.isdecimal() and int(name) < len(gpus):
                found = gpus[int(name) : int(name) + 1]
            elif name.startswith("GPU-"):
                found = [gpu for gpu in present if self._uuid(gpu).startswith(name)]
            elif name.startswith("MIG-"):
                continue
            else:
                break
            chosen += [gpu for gpu in found if gpu is not None and gpu not in chosen]
        return chosen

    def _slices_named(self, gpus: list[Any]) -> list[Any]:
        names = tuple(n.strip() for n in (self._visible or "").split(",") if n.strip().startswith("MIG-"))
        slices = [part for gpu in gpus if names and gpu is not None for part in self._parts(gpu) if part is not gpu]
        return [part for part in slices if self._uuid(part).startswith(names) and part not in self._devices]

    def _parts(self, gpu: Any) -> list[Any]:
        """The MIG slices of a GPU that can be seen from here, or the GPU itself where there are none."""
        mode = self._ask("nvmlDeviceGetMigMode", gpu, expected=True)
        if not mode or not mode[0]:
            return [gpu]
        count = self._ask("nvmlDeviceGetMaxMigDeviceCount", gpu) or 0
        parts = [self._ask("nvmlDeviceGetMigDeviceHandleByIndex", gpu, i, expected=True) for i in range(count)]
        return [part for part in parts if part is not None] or [gpu]

    def _uuid(self, device: Any) -> str:
        uuid = self._ask("nvmlDeviceGetUUID", device)
        return uuid.decode() if isinstance(uuid, bytes) else str(uuid or "")

    def _ask(self, name: str, *arguments: Any, expected: bool = False) -> Any:
        """The answer, or None where NVML refuses; each kind of refusal is written once."""
        try:
            return getattr(self._nvml, name)(*arguments)
        except Exception as error:
            problem = f"{name}: {error}"
            if not expected and problem not in self._told:
                self._told.add(problem)
                logger.log(logging.WARNING if self._devices else logging.INFO, "GPU value unknown, %s", problem)
            return None


class PatientReader:
    """Reads another reader in a thread of its own: a driver that has lost a GPU can hold a call for minutes."""

    def __init__(self, reader: GpuReader, wait_s: float = WAIT_S) -> None:
        self._reader = reader
        self._wait_s = wait_s
        self._wanted = threading.Event()
        self._done = threading.Event()
        self._value = (NAN, NAN)
        self._error: Exception | None = None
        self._late = False
        threading.Thread(target=self._run, name="gpu", daemon=True).start()

    def read(self) -> tuple[float, float]:
        """What the other reader says, its exceptions too; NaN as long as a reading hangs.

        One that is slower than `wait_s`, but quicker than we ask, is told with the next one.
        """
        if self._wanted.is_set():
            return NAN, NAN
        value, error = (self._value, self._error) if self._late else ((NAN, NAN), None)
        self._done.clear()
        self._wanted.set()
        self._late = not self._done.wait(self._wait_s)
        if not self._late:
            value, error = self._value, self._error
        if error is not None:
            raise error
        return value

    def _run(self) -> None:
        while self._wanted.wait():
            try:
                self._value, self._error = self._reader.read(), None
            except Exception as error:
                self._value, self._error = (NAN, NAN), error
            self._wanted.clear()
            self._done.set()


def visible_devices(proc: Path, pid: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of the raylet above a process, else the process's own; None where neither limits anything.

    Ray empties the variable for an actor that asks for no GPU, so that an empty one counts at the raylet only.
    """
    raylet = raylet_above(proc, pid)
    for owner in (raylet, pid):
        environ = read_text(proc / str(owner) / "environ") if owner is not None else None
        settings = dict(s.split("=", 1) for s in (environ or "").split("\0") if "=" in s)
        value = settings.get("CUDA_VISIBLE_DEVICES")
        if environ and owner == raylet:
            return value
        if value and value.strip():
            return value
    return None


def open_gpu() -> GpuReader | None:
    """A reader, or None where the package nvidia-ml-py is absent."""
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    return PatientReader(NvmlReader(pynvml, visible_devices(Path("/proc"), os.getpid())))


def _bounded(value: float) -> float:
    return value if math.isnan(value) else min(1.0, max(0.0, value))
