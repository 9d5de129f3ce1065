"""The live benchmark: isolated hosts on one Linux machine, real faults, all routers side by side."""
