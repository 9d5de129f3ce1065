"""One routing policy a file, each with its source."""

from __future__ import annotations

from collections.abc import Callable

from bench.simulate.arms.base import Arm
from bench.simulate.arms.clairvoyant import Clairvoyant
from bench.simulate.arms.consistent_hash import ConsistentHash
from bench.simulate.arms.least_requests import LeastRequests
from bench.simulate.arms.p2c import LocalPowerOfTwo, TruePowerOfTwo
from bench.simulate.arms.peak_ewma import PeakEwma
from bench.simulate.arms.prequal import Prequal, TunedPrequal
from bench.simulate.arms.product import Product
from bench.simulate.arms.ray_p2c import RayPowerOfTwo
from bench.simulate.arms.simple import RandomChoice, RoundRobin

BASELINES: dict[str, Callable[[], Arm]] = {
    "random": RandomChoice,
    "round_robin": RoundRobin,
    "consistent_hash": ConsistentHash,
    "least_requests": LeastRequests,
    "p2c_local": LocalPowerOfTwo,
    "p2c_ray": RayPowerOfTwo,
    "p2c_true": TruePowerOfTwo,
    "peak_ewma": PeakEwma,
    "prequal": Prequal,
    "prequal_tuned": TunedPrequal,
    "clairvoyant": Clairvoyant,
}

_RESUMES = {"balance": {"resume": "had"}}
_HANDING_OVER: dict[str, Callable[[], Arm]] = {
    "live_capacity": lambda: Product(None, _RESUMES),
    "shadecast": lambda: Product("realistic", _RESUMES),
    "shadecast_shipped": lambda: Product("shipped", _RESUMES),
}
PRODUCT: dict[str, Callable[[], Arm]] = {
    "live_capacity": lambda: Product(None),
    "shadecast": lambda: Product("realistic"),
    "shadecast_perfect": lambda: Product("perfect"),
    "shadecast_wrong": lambda: Product("wrong"),
    "shadecast_shipped": lambda: Product("shipped"),
    **{f"{name}_handover": make for name, make in _HANDING_OVER.items()},
}

ARMS: dict[str, Callable[[], Arm]] = {
    **{name: make for name, make in BASELINES.items() if name != "clairvoyant"},
    **PRODUCT,
    "clairvoyant": Clairvoyant,
}

ALWAYS = tuple(name for name in ARMS if not name.endswith("_handover"))
"""Arms of a scenario that names none: hand-over is for streams."""
