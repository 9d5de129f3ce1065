"""All arms by name."""

from __future__ import annotations

from bench.llm.rivals import RIVALS
from bench.llm.routers import OURS

RULES = {rule.name: rule for rule in (*RIVALS, *OURS)}
OURS_NOW = "step 1, own x 2"
"""What is wired."""
