"""One validated, immutable configuration, grouped by concern.

Every field carries its bounds and the reason for them. `Config.from_mapping` takes plain (JSON) mappings, refuses
unknown keys, and reports the first wrong value as one `ConfigError` line: field, value, bound, reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from keyword import iskeyword
from typing import Any, Self, TypeVar, cast

from shadecast.errors import ConfigError

T = TypeVar("T")

TICK_S = 0.5
"""Between two tables. Slower ones herd requests, faster ones cost more than they tell."""
TICK_JITTER = 0.1
"""Of a tick: coordinators must not fall into step."""
REPORT_S = 1.0
"""Between two reports of a router. A late report hides a slow node."""
TABLE_TTL_S = 3.0
"""An older table says nothing of queues any more, nor of what was forecast."""
LOCAL_ONLY_AGE_S = 5.0
"""From this age of its table on a router goes by power of two choices."""
LOST_AFTER_S = 5.0
"""A replica, router or node that was not heard of for so long is gone."""
CHOICES = 4
"""d of the pick: 1 is random, with all replicas routers herd."""

_RETIRED = {
    "balance": frozenset(
        (
            *("tick_s", "tick_jitter", "report_s", "table_ttl_s", "local_only_age_s", "lost_after_s", "choices"),
            *("dead_band", "rise_per_s", "fall_per_s", "half_life_s", "rescue_speed"),
            *("veto_speed", "veto_factor", "veto_max_fraction"),
        )
    ),
    "trial": frozenset(("hard_errors", "hard_errors_window", "error_margin", "primary_rise")),
    "forecast": frozenset(("skill_full",)),
}
"""Settings of former versions. Deployments that still name them must not lose their others: they are left out."""


def _check_function(name: str, value: Any, words: tuple[str, ...], what: str) -> None:
    """Refuse what is neither one of `words` nor "module:function"."""
    module, _, function = value.partition(":") if isinstance(value, str) else ("", "", "")
    path = all(part.isidentifier() for part in (*module.split("."), function))
    if value not in words and not path:
        known = ", ".join(f'"{word}"' for word in words)
        raise ConfigError(f'{name} = {value!r}: must be {known} or "module:function" ({what})')


def _bounded(default: float, low: float, high: float, why: str) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "why": why})


class _Section:
    """Checks every bounded field when made; an instance that exists is valid."""

    __slots__ = ()
    _name = ""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            if "low" in f.metadata:
                value = _checked(f"{self._name}.{f.name}", getattr(self, f.name), f.type, f.metadata)
                object.__setattr__(self, f.name, value)

    @classmethod
    def from_mapping(cls, values: Any) -> Self:
        """Build from plain values; raises ConfigError on an unknown key or a value out of bounds."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"{cls._name} = {values!r}: must be a mapping of settings")
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        retired = _RETIRED.get(cls._name, ())
        for key in values:
            if key not in known and key not in retired:
                raise ConfigError(
                    f"{cls._name}.{key} = {values[key]!r}: unknown setting; known are {', '.join(sorted(known))}"
                )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})


def check_numbers(section: str, of: object, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Raises ConfigError for the first of an object's values that is no number within its bounds."""
    for name, (low, high) in bounds.items():
        value = getattr(of, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ConfigError(f"{section}.{name} = {value!r}: must be a number from {low:g} to {high:g}")


def built_from(kind: type[T], section: str, values: Mapping[str, Any]) -> T:
    """A dataclass of plain values. Raises ConfigError on unknown names, and as its `__post_init__` does."""
    known = {f.name for f in fields(cast("Any", kind))}
    for key in values:
        if key not in known:
            raise ConfigError(f"{section}.{key}: unknown setting; known are {', '.join(sorted(known))}")
    return kind(**values)


def _checked(name: str, value: Any, kind: Any, meta: Mapping[str, Any]) -> int | float:
    """The value as its kind of number; raises ConfigError if it is none or out of bounds."""
    low, high, why = meta["low"], meta["high"], meta["why"]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and kind == "int" and not float(value).is_integer():
        raise ConfigError(f"{name} = {value!r}: must be a whole number from {low:g} to {high:g} ({why})")
    if not number or math.isnan(value) or not low <= value <= high:
        raise ConfigError(f"{name} = {value!r}: must be a number from {low:g} to {high:g} ({why})")
    return int(value) if kind == "int" else float(value)


@dataclass(frozen=True, slots=True)
class BalanceConfig(_Section):
    """The balancing rule (design section 5)."""

    _name = "balance"

    forecast_weight: float = _bounded(1.0, 0.0, 1.0, "how far forecasts count; 0 is live capacity only")
    panic_fraction: float = _bounded(
        0.5, 0.0, 1.0, "with fewer of the proven replicas eligible, all that live get load"
    )
    urgent_load: float = _bounded(0.85, 0.0, 10.0, "predicted load of the active set beyond which newcomers skip trial")
    slots: float = _bounded(0.0, 0.0, 4096.0, "c, parallel slots of a replica; 0 learns it")
    batch_half: float = _bounded(0.0, 0.0, 4096.0, "b0, batch at which speed halves; 0 means FIFO slots")
    bootstrap_s: float = _bounded(15.0, 0.0, 600.0, "after a deployment is first seen, replicas enter without a trial")
    rescue_fraction: float = _bounded(0.01, 0.0, 0.2, "of requests may be sent again from a slow replica; 0: none")
    cost: str = ""
    """A "module:function" of (args, kwargs) of a call that gives its cost in units of work; empty: each costs 1."""

    resume: str = ""
    """Keyword argument by which streaming methods take the items that a reader has had, to go on after them; a stream
    that stalls on a slow replica, or whose replica died, so goes on elsewhere. "openai": of OpenAI servers the rest is
    asked for by prompt and text (`shadecast.continuation`). Empty: streams stay."""

    prefix: str = "off"
    """Whether a prompt goes where most of its beginning is cached: "off", "auto" (the first argument with `messages` or
    a `prompt`), or a "module:function" of (args, kwargs) that gives such a body, a text, token ids, or None."""

    kv_tokens: int = _bounded(
        0, 0, 1_000_000_000, "tokens that a replica's cache holds, host memory included; 0: its own word, else 280,000"
    )

    def __post_init__(self) -> None:
        super(BalanceConfig, self).__post_init__()
        _check_function("balance.prefix", self.prefix, ("off", "auto"), "it gives a call's prompt")
        _check_function("balance.cost", self.cost, ("",), "it gives the cost of a call")
        name: Any = self.resume
        if not isinstance(name, str) or (name and (not name.isidentifier() or iskeyword(name))):
            raise ConfigError(
                f'balance.resume = {name!r}: must be "", "openai", or the name of a keyword argument of the '
                "deployment's streaming methods (it takes the list of items that the reader has had)"
            )


@dataclass(frozen=True, slots=True)
class TrialConfig(_Section):
    """Shadow connections: mirroring, the gate and the ramp (design sections 6 and 7)."""

    _name = "trial"

    mirror_fraction: float = _bounded(0.1, 0.0, 0.5, "of new requests copied to each candidate")
    mirror_fraction_max: float = _bounded(0.5, 0.0, 1.0, "with little traffic and headroom it may grow to this")
    mirror_budget: float = _bounded(0.1, 0.0, 1.0, "of all requests, over all candidates, at full traffic")
    candidate_budget: float = _bounded(0.25, 0.0, 1.0, "of the replicas may be on trial at once (at least one)")
    mirror_concurrency: int = _bounded(4, 1, 256, "copies under way per candidate and router; more are dropped")
    mirror_deadline_s: float = _bounded(30.0, 0.1, 600.0, "a copy that takes longer is cancelled and counts as slow")
    warmup_pairs: int = _bounded(5, 0, 100, "first pairs, not judged: caches are cold")
    min_pairs: int = _bounded(20, 2, 10_000, "no verdict on speed with fewer pairs")
    max_pairs: int = _bounded(600, 10, 100_000, "a trial ends here")
    timeout_s: float = _bounded(30.0, 1.0, 86_400.0, "a trial ends here")
    margin: float = _bounded(4.0, 1.0, 100.0, "times slower than the others: beyond, a replica is of no use")
    alpha: float = _bounded(0.05, 1e-6, 0.5, "error probability a side")
    mixture: float = _bounded(0.03, 1e-6, 10.0, "r, where the anytime interval is tightest: small = later")
    memory_limit: float = _bounded(
        0.92, 0.1, 1.0, "of the node's memory; rising beyond it ends a trial, before the kill"
    )
    backoff_s: float = _bounded(10.0, 0.0, 3600.0, "pause after the first failed trial")
    backoff_max_s: float = _bounded(600.0, 1.0, 86_400.0, "longest pause between trials")
    step_s: float = _bounded(3.0, 0.1, 600.0, "least time on each step of the ramp")
    step_timeout_s: float = _bounded(30.0, 0.1, 3600.0, "without harm, a step is passed after this time")
    drain_s: float = _bounded(30.0, 0.1, 3600.0, "a drain ends here at the latest")
    urgent_share: float = _bounded(0.2, 0.01, 1.0, "first step of a newcomer that skips the shadow")
    ramp: tuple[float, ...] = (0.1, 0.4, 1.0)
    copy_methods: tuple[str, ...] = ()
    """Methods of the deployment that are safe to call twice ("*": all). Others get a small live canary instead."""
    compare: str = ""
    """Whether a copy's answer is compared with the primary's: "exact", "close" (see `compare_tolerance`), or a
    "module:function" of (primary's answer, copy's answer) that says whether they are equal; empty: not compared."""
    compare_tolerance: float = _bounded(1e-3, 0.0, 1e6, 'relative or absolute, by which numbers may differ for "close"')

    def __post_init__(self) -> None:
        super(TrialConfig, self).__post_init__()
        methods: Any = self.copy_methods
        if not isinstance(methods, tuple) or not all(isinstance(m, str) for m in methods):
            raise ConfigError(f"trial.copy_methods = {methods!r}: must be a list of method names")
        _check_function("trial.compare", self.compare, ("", "exact", "close"), "it compares two answers")
        ramp = self.ramp
        try:
            rising = (
                isinstance(ramp, tuple) and len(ramp) > 0 and all(0 < a < b for a, b in pairwise(ramp)) and ramp[0] > 0
            )
            good = rising and ramp[-1] == 1.0
        except TypeError:
            good = False
        if not good:
            raise ConfigError(f"trial.ramp = {ramp!r}: must be rising fractions that end with 1.0 (the full share)")
        if self.max_pairs < self.min_pairs:
            raise ConfigError(
                f"trial.max_pairs = {self.max_pairs}: must be at least trial.min_pairs = {self.min_pairs}, "
                "because otherwise no trial could pass"
            )
        if self.mirror_fraction_max < self.mirror_fraction:
            raise ConfigError(
                f"trial.mirror_fraction_max = {self.mirror_fraction_max}: must be at least "
                f"trial.mirror_fraction = {self.mirror_fraction}"
            )


@dataclass(frozen=True, slots=True)
class SessionConfig(_Section):
    """Sessions (design section 6): where they land and when they move."""

    _name = "session"

    repin_ratio: float = _bounded(2.0, 1.0, 100.0, "a session moves when its score exceeds this times the best")
    migration_cost: float = _bounded(0.5, 0.0, 100.0, "in units of score; a cold cache costs that much")
    moves_per_s: float = _bounded(0.02, 0.0, 1.0, "fraction of a replica's sessions that may leave in a second")
    idle_s: float = _bounded(300.0, 1.0, 86_400.0, "a session not heard of for so long is forgotten")
    max_sessions: int = _bounded(100_000, 1, 10_000_000, "remembered by a router; the oldest are forgotten first")


@dataclass(frozen=True, slots=True)
class ForecastConfig(_Section):
    """Which forecasts count (design section 8)."""

    _name = "forecast"

    ttl_s: float = _bounded(5.0, 1.0, 60.0, "an older forecast is not used")
    residence_s: float = _bounded(0.0, 0.0, 10.0, "H, the look-ahead; 0 takes the median residence of a request")


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration of one deployment's balancing."""

    balance: BalanceConfig = field(default_factory=BalanceConfig)
    trial: TrialConfig = field(default_factory=TrialConfig)
    session: SessionConfig = field(default_factory=SessionConfig)
    forecast: ForecastConfig = field(default_factory=ForecastConfig)

    @classmethod
    def from_mapping(cls, values: Any) -> Config:
        """Build from a mapping of sections, e.g. `{"trial": {"mirror_fraction": 0.05}}`; raises ConfigError.

        None means the defaults. Settings that former versions had are left out; `retired_settings` names them.
        """
        given = {} if values is None else values
        if not isinstance(given, Mapping):
            raise ConfigError(f"config = {values!r}: must be a mapping of sections {', '.join(_SECTIONS)}")
        for key in given:
            if key not in _SECTIONS:
                raise ConfigError(f"{key} = {given[key]!r}: unknown section; known are {', '.join(_SECTIONS)}")
        return cls(**{name: kind.from_mapping(given.get(name, {})) for name, kind in _SECTIONS.items()})


_SECTIONS: dict[str, Any] = {
    "balance": BalanceConfig,
    "trial": TrialConfig,
    "session": SessionConfig,
    "forecast": ForecastConfig,
}


def sections(router_kwargs: Any) -> Any:
    """The mapping of sections in `request_router_kwargs`: under `config`, or given as they are. Not checked."""
    if not isinstance(router_kwargs, Mapping):
        return router_kwargs
    given = router_kwargs.get("config")
    bare = {name: values for name, values in router_kwargs.items() if name != "config"}
    return {**(given or {}), **bare} if given is None or isinstance(given, Mapping) else given


def retired_settings(values: Any) -> list[str]:
    """Names in a valid mapping of sections that are settings no more."""
    given = values if isinstance(values, Mapping) else {}
    return [f"{section}.{key}" for section, gone in _RETIRED.items() for key in given.get(section, {}) if key in gone]
