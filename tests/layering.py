"""The floors of the house, and a check of who imports whom, read from the source with ast: nothing is executed."""

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

# From the ground up: each folder of `parallel/` has a floor of its own, and imports from itself or from those below.
# `NAME.*` is a package and all that is in it; a plain name is that module alone (for a package: its __init__.py).
FLOORS = (
    "parallel.errors",
    "parallel.config.*",
    "models.shapes",
    "parallel.ops.*",
    "parallel.mesh.*",
    "parallel.layout.*",
    "parallel.sequence.*",
    "parallel.storage.*",
    "parallel.activations.*",
    "parallel.tensor.*",
    "parallel.chunk.*",
    "parallel.checkpoint.*",
    "parallel.optim.*",
    "parallel.placement.*",
    "parallel.zero.*",
    "parallel.modules.*",
    "parallel.pipeline.*",
    "parallel.engine.*",
    "parallel.collectives",
    "parallel",
    "models.*",
    "training.*",
    "launch",
)

SAY_TORCH_DISTRIBUTED = ("parallel.mesh.process_groups", "parallel.mesh.collectives", "parallel.pipeline.p2p")

# Modules of plain data and arithmetic: without torch, and importing none of ours that has it.
PURE = (
    "parallel.errors",
    "parallel.config.*",
    "models.shapes",
    "models.costs",
    "parallel.mesh.topology",
    "parallel.pipeline.schedule",
    "parallel.pipeline.validate",
    "parallel.pipeline.timeline",
    "parallel.pipeline.partition",
)

# Pairs that must not meet although the floors would allow it.
STRANGERS = (
    ("parallel.tensor.*", "parallel.pipeline.*"),
    ("parallel.pipeline.*", "parallel.tensor.*"),
    ("parallel.zero.*", "parallel.tensor.*"),
    ("parallel.zero.*", "parallel.pipeline.*"),
    ("parallel.storage.*", "parallel.mesh.*"),
)


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module

    @property
    def package(self) -> str:
        """What a single leading dot stands for in this module."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Reference:
    """`module` is imported at `line`, or `name` out of it, which may be a module too."""

    line: int
    module: str
    name: str = ""

    @property
    def dotted(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module


def matches(name: str, *patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(f"{name}.", pattern) for pattern in patterns)


def floor_of(name: str) -> int | None:
    """The floor of a module; of the patterns that fit it, the longest knows it best."""
    fitting = [(len(pattern), floor) for floor, pattern in enumerate(FLOORS) if matches(name, pattern)]
    return max(fitting)[1] if fitting else None


def modules_under(root: Path) -> dict[str, Module]:
    packages = (root.glob(f"{package}/**/*.py") for package in ("parallel", "models", "training"))
    paths = [*itertools.chain(*packages), *root.glob("launch.py")]
    modules = {}
    for path in sorted(paths):
        relative = path.relative_to(root)
        parts = relative.parent.parts if path.name == "__init__.py" else relative.with_suffix("").parts
        name = ".".join(parts)
        modules[name] = Module(name, relative, ast.parse(path.read_text(encoding="utf-8")))
    return modules


def references(module: Module) -> Iterator[Reference]:
    """Every import, wherever it stands and however it is written, and every `torch.distributed` that needs none."""
    names_of_torch = set()
    for node in ast.walk(module.tree):
        match node:
            case ast.Import(names=aliases):
                for alias in aliases:
                    yield Reference(node.lineno, alias.name)
                    if alias.name == "torch" or (alias.name.startswith("torch.") and alias.asname is None):
                        names_of_torch.add(alias.asname or "torch")
            case ast.ImportFrom(names=aliases):
                base = _absolute(module, node)
                yield from (Reference(node.lineno, base, alias.name) for alias in aliases)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield Reference(node.lineno, name)
    for node in ast.walk(module.tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr="distributed") if name in names_of_torch:
                yield Reference(node.lineno, "torch.distributed")


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parents = module.package.split(".")
    return ".".join([*parents[: len(parents) - (node.level - 1)], *([node.module] if node.module else [])])


def violations(root: Path) -> list[str]:
    """Everything that is wrong in the tree under `root`, one line each."""
    modules = modules_under(root)
    problems = [
        f"{module.path}: no floor; give it a floor in FLOORS"
        for module in modules.values()
        if floor_of(module.name) is None
    ]
    graph: dict[str, list[str]] = {}
    for module in modules.values():
        edges = graph.setdefault(module.name, [])
        for reference in references(module):
            where = f"{module.path}:{reference.line}: {module.name}"
            if matches(reference.dotted, "torch.*"):
                problems += (f"{where} {wrong}" for wrong in wrong_with_torch(module.name, reference))
            elif reference.module.partition(".")[0] in ("parallel", "models", "training", "launch"):
                target = reference.dotted if reference.dotted in modules else reference.module
                edges.append(target)
                problems += (f"{where} {wrong}" for wrong in wrong_with_import(module.name, target))
    return problems + [f"circle: {' -> '.join(circle)}" for circle in circles(graph)]


def wrong_with_torch(name: str, reference: Reference) -> Iterator[str]:
    if matches(name, *PURE):
        yield "imports torch, but is listed as pure"
    if matches(reference.dotted, "torch.distributed.*") and name not in SAY_TORCH_DISTRIBUTED:
        yield f"says torch.distributed; only {', '.join(SAY_TORCH_DISTRIBUTED)} may"


def wrong_with_import(name: str, target: str) -> Iterator[str]:
    floor, target_floor = floor_of(name), floor_of(target)
    if target_floor is None:
        yield f"imports {target}, which has no floor; give it a floor in FLOORS"
    elif floor is not None and target_floor > floor:
        yield f"on the floor of {FLOORS[floor]} imports {target} from that of {FLOORS[target_floor]} above"
    if name.startswith(f"{target}."):
        yield f"imports the facade of its own package, {target}"
    if matches(name, *PURE) and not matches(target, *PURE):
        yield f"is listed as pure, but imports {target}, which is not"
    if any(matches(name, one) and matches(target, other) for one, other in STRANGERS):
        yield f"imports {target}; the two must not know each other"


def circles(graph: dict[str, list[str]]) -> list[list[str]]:
    """One circle for every import that closes one, found depth first."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in dict.fromkeys(graph.get(name, [])):
                visit(target, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return found
