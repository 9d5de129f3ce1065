"""All arms by name."""

from __future__ import annotations

from bench.llm.rivals import RIVALS
from bench.llm.routers import NOW, OURS

RULES = {rule.name: rule for rule in (*RIVALS, *OURS)}
MAIN = (*(rule.name for rule in RIVALS), "Shadecast without prefixes", "step 1, own x 1", "step 1, own x 2", NOW)
"""Everybody's, ours without prefixes, and both steps of ours; the rest are parts of ours."""
