"""Groups of the lab's hosts; what cannot be set up, in groups or elsewhere, is a `LabError`."""

from train.cgroups import ROOT, Group, version
from train.cgroups import GroupError as LabError

__all__ = ["ROOT", "Group", "LabError", "version"]
