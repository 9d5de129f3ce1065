"""`pip install shadecast` brings what a user's replica needs, each extra the rest of its part, and errors name it.

What is imported is read from the sources. `make test-install` installs a wheel with each extra alone and tries it.
"""

import ast
import json
import subprocess
import sys
import textwrap
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from serve_app import extras
from shadecast.errors import NotInstalledError

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PRODUCT = ("shadecast", "actors", "models", "serve_app", "train")
OURS = (*PRODUCT, "bench")
CALLED_IN_USERS_PROCESSES = (
    *("serve_app.router", "serve_app.routing.request_router", "serve_app.user_functions"),
    *("serve_app.mirror", "serve_app.copying"),
)
BROUGHT_ALONG = {"pydantic_core": "pydantic", "starlette": "fastapi", "PIL": "matplotlib"}
"""What comes with a package that we ask for, and has no life without it."""
INSTALLED = packages_distributions()
ASKED_FOR_BY_RAY = {"fsspec": "ray", "tensorboardX": "ray"}
WITHOUT_A_GPU = {"pynvml": "nvidia-ml-py"}
"""Not everybody's development environment has it."""


def requirements(extra):
    """Names of the distributions that the package, or one of its extras, asks for; those of extras in it, too."""
    found = set()
    for line in PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]:
        wanted = Requirement(line)
        if wanted.name == PROJECT["name"]:
            found = found.union(*map(requirements, wanted.extras))
        else:
            found.add(canonicalize_name(wanted.name))
    return found


def distributions(module):
    """Those that a module may come from."""
    owner = {**BROUGHT_ALONG, **ASKED_FOR_BY_RAY, **WITHOUT_A_GPU}.get(module)
    named = INSTALLED.get(module, [])
    return {owner} if owner else {canonicalize_name(name) for name in named}


@cache
def path_of(module):
    place = ROOT.joinpath(*module.split("."))
    return next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.exists()), None)


@cache
def imports(module, with_lazy):
    """Modules that one of ours imports as it is loaded; with_lazy: those that it imports ever."""
    found = set()

    def look(node):
        for child in ast.iter_child_nodes(node):
            match child:
                case ast.Import():
                    found.update(alias.name for alias in child.names)
                case ast.ImportFrom():
                    found.add(child.module)
                    found.update(f"{child.module}.{alias.name}" for alias in child.names)
                case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                    for other in child.orelse:
                        look(other)
                case ast.FunctionDef() | ast.AsyncFunctionDef() if not with_lazy:
                    pass
                case _:
                    look(child)

    look(ast.parse(path_of(module).read_text(encoding="utf-8")))
    return frozenset(found)


def reached(start, *, with_lazy=False):
    """Our modules that are loaded with one, each with its packages' `__init__`, and the others' that they import."""
    ours, theirs, left = set(), set(), [start]
    while left:
        module = left.pop()
        if module.split(".")[0] not in OURS:
            if module.split(".")[0] not in sys.stdlib_module_names:
                theirs.add(module)
        elif module not in ours and path_of(module) is not None:
            ours.add(module)
            left += imports(module, with_lazy)
            left += [module.rpartition(".")[0]] if "." in module else []
    return ours, theirs


def packages(theirs):
    return {module.split(".")[0] for module in theirs}


def room(*folders):
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


def is_brought(package, asked_for):
    return bool(distributions(package) & asked_for)


def test_the_package_alone_asks_for_no_more_than_ray_serve_and_numpy():
    assert requirements("") == {"ray", "numpy", "jinja2"}
    (ray,) = (Requirement(line) for line in PROJECT["dependencies"] if line.startswith("ray"))
    assert ray.extras == {"serve"}, "Ray Data and Ray Train are for training"


@pytest.mark.parametrize("module", CALLED_IN_USERS_PROCESSES)
def test_what_runs_in_users_processes_imports_ray_and_numpy_alone(module):
    ours, theirs = reached(module)
    assert "serve_app.routing.request_router" in reached("serve_app.router", with_lazy=True)[0]
    assert module in ours
    assert packages(theirs) <= {"ray", "numpy"}
    assert not {name for name in theirs if name.startswith(("ray.data", "ray.train"))}


@pytest.mark.parametrize(
    ("modules", "extra"),
    [
        (["serve_app.app", "serve_app.grpc_proxy", *room("serve_app/gateway")], "gateway"),
        ([*room("serve_app/launch", "serve_app/page", "actors", "models"), "serve_app.gateway.digits"], "control"),
        (room("train"), "train"),
    ],
)
def test_each_part_imports_only_what_its_extra_brings(modules, extra):
    brought = requirements("") | requirements(extra)
    assert len(modules) > 8
    for module in modules:
        if (module, extra) != ("serve_app.gateway.digits", "gateway"):
            missing = {name for name in packages(reached(module)[1]) if not is_brought(name, brought)}
            assert not missing, f"{module} imports {missing}: the extra {extra!r} does not bring them"


@pytest.mark.parametrize("module", room(*PRODUCT))
def test_all_brings_what_is_ever_imported(module):
    others = {name for name in imports(module, with_lazy=True) if name.split(".")[0] not in OURS}
    foreign = packages(others) - set(sys.stdlib_module_names)
    brought = requirements("") | requirements("all")
    assert {name for name in foreign if not is_brought(name, brought)} == set()


@pytest.mark.parametrize("extra", extras.MODULES)
def test_what_is_looked_for_is_what_the_extra_asks_for(extra):
    asked = requirements(extra)
    for module in extras.MODULES[extra]:
        top = module.split(".")[0]
        assert is_brought(top, asked), f"{module}: nothing that the extra {extra!r} asks for brings it"
    sought = set().union(*(distributions(module.split(".")[0]) for module in extras.MODULES[extra]))
    assert asked <= sought | {"ray"}, f"nobody looks whether {asked - sought} is there"


def test_everything_that_the_extras_bring_is_there_in_the_development_environment():
    for extra in set(extras.MODULES) - {"gpu"}:
        extras.require(extra, "this test")


# ---------------------------------------------------------------- where something is missing

WITHOUT = """
import sys
from importlib.abc import MetaPathFinder

class Without(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Without())
"""


def run_without(missing, code, *arguments):
    """What a Python without some packages does."""
    text = WITHOUT.replace("MISSING", repr(set(missing))) + textwrap.dedent(code)
    command = [sys.executable, "-c", text, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)


COMMAND_LINE = "from serve_app.launch.cli import main; main()"


@pytest.mark.parametrize(
    ("missing", "arguments", "said"),
    [
        (["torch"], ["up"], "shadecast up needs the control plane's packages: pip install 'shadecast[control]'"),
        (["typer", "rich"], ["status"], "shadecast status needs the control plane's packages"),
        (["typer"], [], "shadecast needs the control plane's packages"),
        (["grpc"], ["serve"], "shadecast serve needs the gateway's packages: pip install 'shadecast[gateway]'"),
        (["tensorboardX"], ["train"], "shadecast train needs the packages of training: pip install 'shadecast[train]'"),
    ],
)
def test_a_command_without_its_packages_ends_with_2_and_one_line_that_names_the_extra(missing, arguments, said):
    ran = run_without(missing, COMMAND_LINE, *arguments)
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"shadecast: {said}")
    assert line.endswith(f"(missing: {', '.join(sorted(missing))})")
    assert ran.stdout == ""


def test_a_program_is_told_so_in_json():
    ran = run_without(["torch"], COMMAND_LINE, "up", "--json")
    told = json.loads(ran.stdout)
    assert (told["schema"], told["exit_code"]) == (1, 2)
    assert "pip install 'shadecast[control]'" in told["error"]


def test_training_without_its_packages_ends_with_2_and_one_line():
    ran = run_without(["torch"], "import runpy; runpy.run_module('train', run_name='__main__')")
    assert ran.returncode == 2
    assert ran.stderr.splitlines() == [
        "train: training needs the packages of training: pip install 'shadecast[train]' (missing: torch)"
    ]


def test_a_control_plane_is_not_begun_without_its_packages():
    code = """
        from serve_app.launch.control_plane import start_control_plane
        from shadecast.errors import NotInstalledError
        try:
            start_control_plane()
        except NotInstalledError as error:
            print(error)
    """
    ran = run_without(["pandas"], code)
    assert ran.stdout.startswith("starting the control plane needs the control plane's packages: pip install"), (
        ran.stderr
    )


def test_the_example_model_says_what_it_needs():
    code = """
        from serve_app.app import AppArgs, ArgumentError, build
        try:
            build(AppArgs())
        except ArgumentError as error:
            print(error.format_message())
    """
    ran = run_without(["torch"], code)
    assert "model = 'digits': the example needs 'torch': pip install 'shadecast[control]'" in ran.stdout, ran.stderr


def test_what_is_there_is_not_missed_and_nothing_is_imported_to_find_out():
    code = "import sys; from serve_app import extras; extras.require('control', 'x'); print('torch' in sys.modules)"
    assert run_without([], code).stdout.strip() == "False"
    with pytest.raises(NotInstalledError, match=r"x needs NVIDIA's library: .* \(missing: no_such_module\)"):
        extras.require_modules(["no_such_module"], "gpu", "x")
    assert find_spec("no_such_module") is None
