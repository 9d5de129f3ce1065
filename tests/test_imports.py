"""What runs in users' processes stays light."""

import subprocess
import sys

HEAVY = ("torch", "pandas", "ray.data", "ray.train", "models", "train", "actors", "sklearn", "rich", "typer")


def test_importing_the_router_loads_nothing_heavy_that_ray_serve_does_not():
    code = (
        "import sys; import ray.serve; before = set(sys.modules); import serve_app.routing.request_router; "
        f"print([m for m in {HEAVY!r} if m in sys.modules and m not in before])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_decisions_load_neither_ray_nor_torch():
    code = "import sys; import shadecast.balancer; print('ray' in sys.modules, 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.split() == ["False", "False"]


def test_importing_the_router_adds_next_to_nothing_to_the_import_of_ray_serve():
    # serving processes import it as they take a deployment; what it does is imported when a router is made
    code = (
        "import time, ray.serve, ray.serve.request_router; began_s = time.process_time(); import serve_app.router; "
        "print(time.process_time() - began_s)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert float(ran.stdout) < 0.03
