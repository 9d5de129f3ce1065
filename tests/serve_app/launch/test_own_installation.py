"""Our own processes import our own packages; the import path of a user's process is left as it is."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from serve_app.launch import own_installation

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def users(tmp_path):
    """A folder with packages of a user under our names, one of them without an `__init__.py`."""
    for name in ("models", "train", "actors"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("ANSWER = 42\n")
    (tmp_path / "shadecast").mkdir()
    return tmp_path


def run(code, folder):
    """What a Python with `folder` on its PYTHONPATH prints, as words."""
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()


def test_our_packages_come_before_a_users_of_the_same_name_and_the_path_stays(users):
    code = """
        import sys
        from serve_app.launch import own_installation
        before = list(sys.path)
        own_installation.put_first()
        own_installation.put_first()
        assert sys.path == before
        assert sum(isinstance(finder, own_installation.OwnPackages) for finder in sys.meta_path) == 1
        import actors.cgroups, models.grid, shadecast.errors, train
        print(actors.__file__, models.__file__, shadecast.__file__, train.__file__)
    """
    ours = [str(ROOT / name / "__init__.py") for name in ("actors", "models", "shadecast", "train")]
    assert run(code, users) == ours


def test_other_packages_of_a_user_are_found_as_before(users):
    (users / "shop").mkdir()
    (users / "shop" / "models.py").write_text("ANSWER = 43\n")
    code = """
        from serve_app.launch import own_installation
        own_installation.put_first()
        import shop.models
        print(shop.models.ANSWER)
    """
    assert run(code, users) == ["43"]


def test_a_users_package_that_is_loaded_already_gives_way(users):
    (users / "models" / "grid.py").write_text("")
    code = """
        import models.grid
        import shadecast
        from serve_app.launch import own_installation
        own_installation.put_first()
        import models.grid, shadecast.errors
        print(models.grid.__file__, shadecast.errors.__file__)
    """
    assert run(code, users) == [str(ROOT / "models" / "grid.py"), str(ROOT / "shadecast" / "errors.py")]


def test_what_is_loaded_from_our_installation_stays_the_same_object():
    before = {name: sys.modules.get(name) for name in ("shadecast.errors", "serve_app.launch.own_installation")}
    finders = list(sys.meta_path)
    try:
        own_installation.put_first()
        assert {name: sys.modules.get(name) for name in before} == before
    finally:
        sys.meta_path[:] = finders


def test_where_a_users_model_is_loaded_the_users_packages_win(users):
    code = """
        import os, sys
        from serve_app.launch import own_installation
        own_installation.put_first()
        before = list(sys.path)
        with own_installation.users_folder_first(os.getcwd()):
            import models
        import train
        assert sys.path == before
        print(models.ANSWER, hasattr(train, "ANSWER"))
    """
    assert run(code, users) == ["42", "False"]


def test_who_imports_the_launch_room_as_a_library_keeps_its_import_path_and_its_packages(users):
    (users / "shadecast").rmdir()
    code = """
        import ray.serve, sys
        path, finders = list(sys.path), list(sys.meta_path)
        import serve_app.launch.cli, serve_app.launch.control_plane, serve_app.launch.local, serve_app.launch.processes
        assert (sys.path, sys.meta_path) == (path, finders)
        print(*[name for name in ("actors", "models", "train") if name in sys.modules])
        import models
        print(models.ANSWER)
    """
    assert run(code, users) == ["42"]


def test_serve_takes_a_model_that_needs_a_users_own_models(users):
    (users / "shadecast").rmdir()
    (users / "mine.py").write_text(
        "import actors, models\nANSWER = models.ANSWER + actors.ANSWER\n"
        "class Model:\n    def infer(self, inputs):\n        return {}\n"
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [Path(sys.executable).with_name("shadecast"), "serve", "--model", "mine:Model", "--port", port]
        ran = subprocess.run(command, cwd=users, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 2
    assert f"port {port}" in ran.stderr, "the model is loaded, and only then is the port looked at"
