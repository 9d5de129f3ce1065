"""Names under which the control plane is found; shared by the router and by those who start it."""

NAMESPACE = "shadecast"
COORDINATOR = "shadecast-coordinator"
PAGE = "shadecast-page"
