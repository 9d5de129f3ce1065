"""Messages of Shadecast 0.1, which sent its dataclasses themselves, pickled by the position of their fields.

Unpickled here they lack the fields that have been added since, and reading one of those raises. An object of a former
version, with the defaults for these, is one of ours: 0.1 reports hold everything, and counts since the last report.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from shadecast.errors import MessageError
from shadecast.messages import SCHEMA
from shadecast.types import NodeReport, NodeSnapshot, Outcome, RouterReport

T = TypeVar("T")


def read_report(received: Any) -> RouterReport:
    """A router's report; raises MessageError if it is none."""
    report = _completed(RouterReport, received)
    views = (_completed(type(view), view) for view in report.replicas)
    whole = [
        dataclasses.replace(view, outcomes=tuple(_completed(Outcome, outcome) for outcome in view.outcomes))
        for view in views
    ]
    return dataclasses.replace(report, replicas=tuple(whole), partial=False)


def read_node(received: Any) -> NodeReport:
    """A forecaster's report; raises MessageError if it is none."""
    report = _completed(NodeReport, received)
    return dataclasses.replace(report, snapshot=_completed(NodeSnapshot, report.snapshot))


def _completed(kind: type[T], received: Any) -> T:
    """The object with the defaults for fields that its sender did not know."""
    if not isinstance(received, kind):
        raise MessageError(f"a {type(received).__name__} where schema {SCHEMA} and 1 expect a {kind.__name__}")
    known = {f.name: getattr(received, f.name) for f in dataclasses.fields(kind) if hasattr(received, f.name)}  # type: ignore[arg-type]
    return kind(**known)
