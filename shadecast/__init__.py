"""The decisions of Shadecast: pure Python and numpy. No ray, torch, clock, randomness, logging or files in here."""

__version__ = "0.2.0"
