"""GPU values stand alone: what one device, one value or the driver does not tell takes nothing else down."""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.gpu import RETRY_S, NvmlReader, PatientReader, visible_devices
from tests.actors.proc_tree import Clock, FakeHost, FakeProcess

NAN = math.nan


class NVMLError(Exception):
    """What pynvml raises for everything."""


@dataclass
class Gpu:
    """One device as NVML shows it; None where it refuses."""

    uuid: str = "GPU-aaaa"
    used_percent: int | None = 50
    memory: tuple[int, int] | None = (30, 100)
    slices: list[Gpu] | None = None
    refuses: bool = False
    """Its handle cannot be had: no permission, or fallen off the bus."""


@dataclass
class FakeNvml:
    """The calls that pynvml has, over devices that tests break and mend."""

    gpus: list[Gpu]
    problem: str = ""
    opened: int = 0
    NVMLError: Any = field(default=NVMLError)

    def nvmlInit(self) -> None:
        self.opened += 1
        if self.problem:
            raise NVMLError(self.problem)

    def nvmlShutdown(self) -> None:
        if self.opened == 0:
            raise NVMLError("Uninitialized")

    def nvmlDeviceGetCount(self) -> int:
        self._alive()
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, i: int) -> Gpu:
        return self._told(None if self.gpus[i].refuses else self.gpus[i])

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetUtilizationRates(self, gpu: Gpu) -> Any:
        return SimpleNamespace(gpu=self._told(gpu.used_percent))

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu) -> Any:
        used, total = self._told(gpu.memory)
        return SimpleNamespace(used=used, total=total)

    def nvmlDeviceGetMigMode(self, gpu: Gpu) -> list[int]:
        return [int(self._told(gpu.slices) is not None)] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: Gpu) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: Gpu, i: int) -> Gpu:
        return self._told(gpu.slices[i] if gpu.slices and i < len(gpu.slices) else None)

    def _alive(self) -> None:
        if self.problem:
            raise NVMLError(self.problem)

    def _told(self, value: Any) -> Any:
        self._alive()
        if value is None:
            raise NVMLError("Not Supported")
        return value


def read(*gpus: Gpu, visible: str | None = None) -> tuple[float, float]:
    return NvmlReader(FakeNvml(list(gpus)), visible).read()


@pytest.mark.parametrize(
    "memory", [None, (0, 0), (2**64 - 1, 2**64 - 1)], ids=["not-supported", "total-0", "not-available"]
)
def test_a_gpu_without_memory_of_its_own_has_utilisation_and_unknown_memory(memory: tuple[int, int] | None) -> None:
    assert read(Gpu(used_percent=40, memory=memory)) == pytest.approx((0.4, NAN), nan_ok=True)
    assert read(Gpu(used_percent=40, memory=memory), Gpu(used_percent=60)) == pytest.approx((0.5, 0.3))


@pytest.mark.parametrize("used_percent", [None, 2**32 - 1], ids=["not-supported", "not-available"])
def test_a_gpu_that_does_not_tell_utilisation_has_memory(used_percent: int | None) -> None:
    assert read(Gpu(used_percent=used_percent)) == pytest.approx((NAN, 0.3), nan_ok=True)
    assert read(Gpu(used_percent=used_percent), Gpu(used_percent=60)) == pytest.approx((0.6, 0.3))


def test_a_gpu_in_mig_mode_counts_as_its_slices() -> None:
    slices = [Gpu("MIG-1", None, (10, 20)), Gpu("MIG-2", None, (1, 10))]
    mig = Gpu("GPU-m", None, (11, 80), slices)
    assert read(mig) == pytest.approx((NAN, 0.5), nan_ok=True)
    assert read(mig, visible="MIG-2") == pytest.approx((NAN, 0.1), nan_ok=True)
    assert read(mig, Gpu("GPU-n", 80, (1, 100)), visible="MIG-2") == pytest.approx((NAN, 0.1), nan_ok=True)
    assert read(Gpu("GPU-m", None, (11, 80), [])) == pytest.approx((NAN, 11 / 80), nan_ok=True)


def test_one_broken_gpu_leaves_the_others() -> None:
    assert read(Gpu(refuses=True), Gpu(used_percent=60)) == pytest.approx((0.6, 0.3))
    assert read(Gpu(used_percent=None, memory=None), Gpu(used_percent=60)) == pytest.approx((0.6, 0.3))


@pytest.mark.parametrize(
    ("visible", "used"),
    [
        (None, 0.4),
        ("1", 0.6),
        ("1,0", 0.4),
        ("GPU-b", 0.6),
        ("GPU-bbbb, GPU-aaaa", 0.4),
        ("1,-1,0", 0.6),
        ("1,7", 0.6),
        ("", NAN),
        ("-1", NAN),
        ("NoDevFiles", NAN),
    ],
)
def test_devices_are_those_that_are_visible(visible: str | None, used: float) -> None:
    gpus = [Gpu("GPU-aaaa", 20), Gpu("GPU-bbbb", 60)]
    assert read(*gpus, visible=visible)[0] == pytest.approx(used, nan_ok=True)


def test_a_lost_driver_is_unknown_is_told_once_and_recovers(caplog: pytest.LogCaptureFixture) -> None:
    nvml, clock = FakeNvml([Gpu()]), Clock()
    reader = NvmlReader(nvml, clock=clock)
    assert reader.read() == pytest.approx((0.5, 0.3))
    nvml.problem = "GPU is lost"
    with caplog.at_level(logging.INFO, logger="actors.gpu"):
        for _ in range(300):
            clock.now_s += 1.0
            assert reader.read() == pytest.approx((NAN, NAN), nan_ok=True)
    assert len(caplog.records) <= 4, "each call that fails, once"
    nvml.problem = ""
    clock.now_s += RETRY_S
    assert reader.read() == pytest.approx((0.5, 0.3))
    assert nvml.opened < 10


def test_a_driver_that_comes_late_is_found() -> None:
    nvml, clock = FakeNvml([Gpu()], problem="Driver Not Loaded"), Clock()
    reader = NvmlReader(nvml, clock=clock)
    assert math.isnan(reader.read()[0])
    nvml.problem = ""
    clock.now_s += RETRY_S
    assert reader.read() == pytest.approx((0.5, 0.3))


def test_a_library_that_lacks_calls_is_no_error() -> None:
    class Old:
        def nvmlInit(self) -> None: ...

        def nvmlDeviceGetCount(self) -> int:
            return 1

        def nvmlDeviceGetHandleByIndex(self, i: int) -> int:
            return i

        def nvmlDeviceGetMemoryInfo(self, gpu: int) -> Any:
            return SimpleNamespace(used=1, total=4)

    assert NvmlReader(Old()).read() == pytest.approx((NAN, 0.25), nan_ok=True)


def test_a_driver_that_hangs_holds_nobody_and_recovers() -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Hanging:
        def read(self) -> tuple[float, float]:
            entered.set()
            assert go_on.wait(30.0)
            return 0.5, 0.3

    reader = PatientReader(Hanging(), wait_s=0.05)
    assert math.isnan(reader.read()[0])
    assert entered.wait(30.0)
    assert math.isnan(reader.read()[0])
    go_on.set()
    found = PatientReader(Hanging(), wait_s=30.0)
    assert found.read() == (0.5, 0.3)
    assert found.read() == (0.5, 0.3)


def test_what_a_slow_driver_says_is_told_with_the_next_reading() -> None:
    said = threading.Semaphore(0)

    class Slow:
        def read(self) -> tuple[float, float]:
            assert said.acquire(timeout=30.0)
            return 0.5, 0.3

    reader = PatientReader(Slow(), wait_s=0.0)
    assert math.isnan(reader.read()[0])
    said.release()
    for _ in range(5000):
        if not math.isnan((found := reader.read())[0]):
            break
        time.sleep(0.001)
    assert found == (0.5, 0.3)
    said.release()


@pytest.mark.parametrize(
    ("raylets", "own", "visible"),
    [
        ("A=1\0CUDA_VISIBLE_DEVICES=2,3\0", "CUDA_VISIBLE_DEVICES=\0", "2,3"),
        ("CUDA_VISIBLE_DEVICES=\0", "", ""),
        ("A=1\0", "CUDA_VISIBLE_DEVICES=\0", None),
        (None, "CUDA_VISIBLE_DEVICES=1\0", "1"),
        (None, "CUDA_VISIBLE_DEVICES=\0", None),
        (None, None, None),
    ],
)
def test_the_raylets_devices_are_the_nodes(
    tmp_path: Path, raylets: str | None, own: str | None, visible: str | None
) -> None:
    host = FakeHost(tmp_path)
    host.add(FakeProcess(10, "raylet", 1), FakeProcess(11, "ray::Forecaster", 10))
    host.write()
    for pid, text in ((10, raylets), (11, own)):
        if text is not None:
            host.put(f"proc/{pid}/environ", text)
    assert visible_devices(host.roots.proc, 11) == visible
