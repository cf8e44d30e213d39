"""Dependencies point one way: jobs -> pipeline -> engines, and from room to room. Only naming an engine loads its library.

Modules, classes and functions stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "engines": {"pipeline", "jobs", "ray", "hydra", "omegaconf"},
    "pipeline": {"jobs"},
    "jobs": set[str](),
}
HEAVY = "torch transformers llama_cpp vllm ray pyarrow hydra omegaconf aiohttp"


def at_the_top(path: Path) -> set[str]:
    """What a module imports as soon as it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", ["pipeline", "jobs"])
def test_only_engines_name_a_models_library_and_ray_comes_when_it_is_needed(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        assert not imported(path) & {"torch", "transformers", "llama_cpp", "vllm"}, path
        assert not at_the_top(path) & {"ray", "hydra", "omegaconf"}, path


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_module_imports_what_lies_above_it(package: str) -> None:
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths
    for path in paths:
        assert not imported(path) & FORBIDDEN[package], path


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import engines", HEAVY),
        ("import engines.echo, engines; engines.load_engine('echo').infer([{'messages': []}])", HEAVY),
        ("import pipeline.config", HEAVY),
        ("import sys; sys.argv = ['eagleray', '--help']; import jobs.cli; jobs.cli.main()", f"{HEAVY} numpy"),
        ("import jobs.infer; jobs.infer.main(['--help'])", f"{HEAVY} numpy"),
        ("import jobs.infer; jobs.infer.main(['engine=ecko'])", "torch transformers llama_cpp vllm ray pyarrow"),
    ],
)
def test_light_imports_stay_light(statement: str, absent: str) -> None:
    code = f"{statement}; import sys; print([m for m in {absent.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


# -- the rooms --------------------------------------------------------------------------------------------------------

# A module may import only what starts with one of these names.
ALLOWED = {
    "engines.errors": ("engines.usage", "engines.url_secrets"),
    "pipeline.errors": ("engines.errors",),
    "pipeline.hardware": ("engines",),
    "pipeline.config": ("pipeline.hardware", "engines"),
    # The ledger has completions, which are of `engines.types`; errors and their one-line texts are the engines' too.
    "pipeline.storage": ("pipeline.storage", "pipeline.errors", "engines.types", "engines.errors", "engines.text"),
    "pipeline.dataset": ("pipeline.dataset", "pipeline.storage", "pipeline.config", "pipeline.monitor.console", "engines"),
    "pipeline.monitor": ("pipeline.monitor", "pipeline.storage", "pipeline.config", "pipeline.errors", "engines"),
}
# A module must not import what starts with one of these names.
REFUSED = {
    "pipeline.dataset": ("pipeline.executors", "pipeline.output", "pipeline.run"),
    "pipeline.monitor": ("pipeline.executors", "pipeline.output", "pipeline.run"),
    "pipeline.output": ("pipeline.executors", "pipeline.run", "pipeline.passes"),
    "pipeline.report": ("pipeline.executors", "pipeline.run"),
    # One executor does not know the other.
    "pipeline.executors.live": ("pipeline.executors.batch", "pipeline.executors.registry"),
    "pipeline.executors.batch": ("pipeline.executors.live", "pipeline.executors.registry"),
    # The run knows executors by their contract.
    "pipeline.run": ("pipeline.executors.live", "pipeline.executors.batch"),
    "pipeline.passes": ("pipeline.executors.live", "pipeline.executors.batch", "pipeline.executors.registry"),
}
# `metrics` runs in a replica and reports through Ray; `jobs.serve` finds out if Ray Serve is installed.
RAY = ("pipeline.executors.live", "pipeline.serve", "pipeline.monitor.metrics", "jobs.serve")
HYDRA = "pipeline.configuration"
MOST_LINES, MOST_FUNCTION, MOST_CLASS = 450, 60, 300


def modules() -> dict[str, Path]:
    paths = [path for package in FORBIDDEN for path in sorted((ROOT / package).rglob("*.py"))]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    assert len(names) > 100
    return names


def all_imports(path: Path) -> set[str]:
    """The full names of everything a module imports, in functions and for types as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def graph() -> dict[str, set[str]]:
    names = modules()

    def module_of(name: str) -> str:
        while name and name not in names:
            name = name.rpartition(".")[0]
        return name

    return {name: {module_of(n) for n in all_imports(path)} - {"", name} for name, path in names.items()}


def within(name: str, places: Iterable[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def circles(edges: dict[str, set[str]]) -> list[str]:
    """The modules that are left when all that import nothing (left) are taken away, again and again."""
    left = {name: set(found) for name, found in edges.items()}
    while free := {name for name, found in left.items() if not found}:
        left = {name: found - free for name, found in left.items() if name not in free}
    while True:  # and those that nobody imports: they are beside the circle
        wanted = set().union(*left.values()) if left else set()
        if not (outside := left.keys() - wanted):
            return sorted(left)
        left = {name: found for name, found in left.items() if name not in outside}


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"c"}, "e": set()}) == ["b", "c"]
    assert circles(graph()) == []


def test_each_room_imports_only_what_is_below_it() -> None:
    edges = graph()
    for rules, allowed in ((ALLOWED, True), (REFUSED, False)):
        for room, places in rules.items():
            inside = [name for name in edges if within(name, [room])]
            assert inside, room
            wrong = {(name, found) for name in inside for found in edges[name] if within(found, places) is not allowed}
            assert not wrong


def test_ray_is_imported_in_few_places() -> None:
    users = {name for name, path in modules().items() if any(within(found, ["ray"]) for found in all_imports(path))}
    assert {name for name in users if not within(name, RAY)} == set()
    assert all(any(within(name, [place]) for name in users) for place in RAY), "a place in the list needs no Ray"


def test_one_room_imports_hydra() -> None:
    users = {name for name, path in modules().items() if imported(path) & {"hydra", "omegaconf"}}
    assert users and {name for name in users if not within(name, [HYDRA])} == set()


def test_tests_import_modules_that_exist() -> None:
    """`ruff` and `mypy` do not notice in a test that a module was moved."""
    for path in (*ROOT.glob("tests/**/*.py"), *ROOT.glob("bench/*.py"), *ROOT.glob("docs/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in FORBIDDEN:
                place = ROOT.joinpath(*str(node.module).split("."))
                assert place.with_suffix(".py").is_file() or (place / "__init__.py").is_file(), (path.name, node.module)


def test_one_module_names_all_engines() -> None:
    from engines.registry import REGISTRY

    for name, path in modules().items():
        words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        named = words & set(REGISTRY)
        if name == "engines.registry":
            assert named == set(REGISTRY)
        else:  # a provider's batch APIs are four
            assert len(named) <= 4, (name, named)


def sizes() -> Iterator[tuple[str, int, int]]:
    """Each module, class and function with its lines and the most it may have."""
    for name, path in modules().items():
        yield name, len(path.read_text().splitlines()), MOST_LINES
        stack: list[tuple[str, ast.AST]] = [(name, ast.parse(path.read_text()))]
        while stack:
            outer, node = stack.pop()
            for child in ast.iter_child_nodes(node):
                inner = outer
                if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    inner = f"{outer}.{child.name}"
                    most = MOST_CLASS if isinstance(child, ast.ClassDef) else MOST_FUNCTION
                    yield inner, (child.end_lineno or 0) - child.lineno + 1, most
                stack.append((inner, child))


def test_modules_classes_and_functions_are_short() -> None:
    long = {name: lines for name, lines, most in sizes() if lines > most}
    assert long == {}
