"""Which part of the package may import which: the arrows of the README's map go one way."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "minimti").rglob("*.py")}
FOLDERS = ("networks", "checkpoint", "io", "world", "pretrain", "evaluate", "bench")


def module_of(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, wherever in it; not those for type checking alone."""
    found, modules = set(), {module_of(name) for name in FILES}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("minimti"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in modules else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("minimti")}
    return found


GRAPH = {module_of(name): imports(path) - {"minimti"} for name, path in FILES.items()}


def folder(module: str) -> str:
    part = module.split(".")[1] if "." in module else ""
    return part if part in FOLDERS else "method"


def test_imports_have_no_cycle_between_files_or_folders():
    assert len(GRAPH) > 40 and GRAPH["minimti.pipeline"] >= {"minimti.invert", "minimti.svd"}
    list(TopologicalSorter(GRAPH).static_order())  # raises CycleError
    folders: dict[str, set[str]] = {}
    for module, others in GRAPH.items():
        folders.setdefault(folder(module), set()).update(folder(other) for other in others)
    for name, others in folders.items():
        others.discard(name)
    # the method as a whole stands on these three, which take nothing of it but config and signals
    for name in ("networks", "checkpoint", "io"):
        folders[name].discard("method")
    list(TopologicalSorter(folders).static_order())


def test_every_folder_imports_only_what_stands_below_it():
    allowed = {
        "io": {"io"},
        "networks": {"networks"},
        "checkpoint": {"checkpoint", "io"},
        "world": {"world", "io"},
        "method": {"method", "networks", "checkpoint", "io"},
        "pretrain": {"pretrain", "method", "world", "networks", "checkpoint", "io"},
        "evaluate": {"evaluate", "method", "world", "networks", "checkpoint", "io"},
        "bench": {"bench", "method", "networks", "checkpoint", "io"},
    }
    for module, others in GRAPH.items():
        for other in others:
            known = folder(other) in allowed[folder(module)] or other in ("minimti.config", "minimti.signals")
            assert known, f"{module} imports {other}"
