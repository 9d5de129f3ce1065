"""The decisions of Shadecast: pure Python and numpy. No ray, torch, clock, randomness, logging or files in here."""
