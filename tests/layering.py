"""The layers of the code, and a check that imports only go down, from the source with ast: nothing is executed."""

import ast
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

PACKAGES = ("parallel", "models", "training", "colonnade")

# From the lowest up: each folder of `parallel/` is a layer, which may import from itself and from the layers below it.
# `NAME.*` is a package and everything in it; a plain name is only that module (for a package: its __init__.py).
LAYERS = (
    "parallel.errors",
    "parallel.regular_file",
    "parallel.plan.*",
    "parallel.config.*",
    "parallel.ops.*",
    "parallel.watch.*",
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
    "colonnade.*",
    "launch",
)

MAY_USE_TORCH_DISTRIBUTED = (
    "parallel.mesh.process_groups",
    "parallel.mesh.collectives",
    "parallel.mesh.comparison",
    "parallel.pipeline.p2p",
)

# Modules of plain data and arithmetic, which import neither torch nor a module of ours that does.
PURE = (
    "parallel.errors",
    "parallel.regular_file",
    "parallel.plan.*",
    "parallel.config.*",
    "parallel.watch.*",
    "parallel.mesh.topology",
    "parallel.layout.sources",
    "models.shape",
    "models.linears",
    "models.*.shape",
    "models.llama.rope",
    "models.llama.shared",
    "models.llama.sizes",
    "models.family",
    "models.fits",
    "models.shapes",
    "models.model_folder",
    "models.costs",
    "models.kept",
    "parallel.pipeline.orders",
    "parallel.pipeline.one_stage",
    "parallel.pipeline.interleaved",
    "parallel.pipeline.filling",
    "parallel.pipeline.zero_bubble",
    "parallel.pipeline.evaluation",
    "parallel.pipeline.transfers",
    "parallel.pipeline.receives",
    "parallel.pipeline.schedule",
    "parallel.pipeline.picture",
    "parallel.pipeline.drawing",
    "parallel.pipeline.svg",
    "parallel.pipeline.partition",
)

# Pairs of which the first must not import the second, whatever the order of their layers.
SEPARATE = (
    ("parallel.tensor.*", "parallel.pipeline.*"),
    ("parallel.pipeline.*", "parallel.tensor.*"),
    ("parallel.zero.*", "parallel.tensor.*"),
    ("parallel.zero.*", "parallel.pipeline.*"),
    ("parallel.storage.*", "parallel.mesh.*"),
)


@dataclass(frozen=True)
class Module:
    """A module of the project: its dotted name, its file, relative to the root, and its source."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def package(self) -> str:
        """Return the package that a single leading dot stands for in this module."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Reference:
    """An import at `line`: of `module`, or of `name` from it, which may be a module too."""

    line: int
    module: str
    name: str = ""

    @property
    def dotted(self) -> str:
        """Return the dotted name of what is imported."""
        return f"{self.module}.{self.name}" if self.name else self.module


def matches(name: str, *patterns: str) -> bool:
    """Return whether a dotted name fits one of the patterns."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(f"{name}.", pattern) for pattern in patterns)


Layers = Sequence[str | tuple[str, ...]]
"""Patterns from the lowest layer up; in an older checkout, a layer has several."""


def layer_of(name: str, layers: Layers = LAYERS) -> int | None:
    """Return the number of a module's layer, by the longest pattern that fits it; None where none does."""
    fitting = [
        (len(pattern), layer)
        for layer, patterns in enumerate(layers)
        for pattern in ((patterns,) if isinstance(patterns, str) else patterns)
        if matches(name, pattern)
    ]
    return max(fitting)[1] if fitting else None


def layers_under(root: Path) -> Layers:
    """Return the layers that a checkout's own copy of this file has: LAYERS, which older ones call FLOORS."""
    file = root / "tests" / "layering.py"
    for statement in ast.parse(file.read_text(encoding="utf-8")).body if file.exists() else ():
        match statement:
            case ast.Assign(targets=[ast.Name(id="LAYERS" | "FLOORS")], value=value):
                found: Layers = ast.literal_eval(value)
                return found
    return LAYERS


def modules_under(root: Path) -> dict[str, Module]:
    """Return the modules of the PACKAGES, and launch.py, by their dotted names."""
    packages = (root.glob(f"{package}/**/*.py") for package in PACKAGES)
    paths = [*itertools.chain(*packages), *root.glob("launch.py")]
    modules = {}
    for path in sorted(paths):
        relative = path.relative_to(root)
        parts = relative.parent.parts if path.name == "__init__.py" else relative.with_suffix("").parts
        name = ".".join(parts)
        modules[name] = Module(name, relative, ast.parse(path.read_text(encoding="utf-8")))
    return modules


def references(module: Module) -> Iterator[Reference]:
    """Yield every import, wherever and however it is written, and every use of `torch.distributed` without one."""
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


def imports(modules: dict[str, Module], module: Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the dotted name of each module of the project that a module imports."""
    for reference in references(module):
        if reference.module.partition(".")[0] in (*PACKAGES, "launch"):
            yield reference.line, reference.dotted if reference.dotted in modules else reference.module


def violations(root: Path) -> list[str]:
    """Return everything that is wrong in the tree under `root`, a line each."""
    modules = modules_under(root)
    problems = [
        f"{module.path}: no layer; give it a layer in LAYERS"
        for module in modules.values()
        if layer_of(module.name) is None
    ]
    graph: dict[str, list[str]] = {}
    for module in modules.values():
        graph[module.name] = [target for _, target in imports(modules, module)]
        problems += [
            f"{module.path}:{line}: {module.name} {problem}"
            for line, target in imports(modules, module)
            for problem in problems_of_import(module.name, target)
        ]
        problems += [
            f"{module.path}:{reference.line}: {module.name} {problem}"
            for reference in references(module)
            if matches(reference.dotted, "torch.*")
            for problem in problems_of_torch(module.name, reference)
        ]
    return problems + [f"circle: {' -> '.join(circle)}" for circle in circles(graph)]


def problems_of_torch(name: str, reference: Reference) -> Iterator[str]:
    """Yield what is wrong with an import of torch in the module of this name."""
    if matches(name, *PURE):
        yield "imports torch, but is listed as pure"
    if matches(reference.dotted, "torch.distributed.*") and name not in MAY_USE_TORCH_DISTRIBUTED:
        yield f"uses torch.distributed; only {', '.join(MAY_USE_TORCH_DISTRIBUTED)} may"


def problems_of_import(name: str, target: str) -> Iterator[str]:
    """Yield what is wrong with an import of a module of the project in the module of this name."""
    layer, target_layer = layer_of(name), layer_of(target)
    if target_layer is None:
        yield f"imports {target}, which has no layer; give it a layer in LAYERS"
    elif layer is not None and target_layer > layer:
        yield f"in the layer {LAYERS[layer]} imports {target} from the layer {LAYERS[target_layer]} above"
    if name.startswith(f"{target}."):
        yield f"imports the __init__.py of its own package, {target}"
    if matches(name, *PURE) and not matches(target, *PURE):
        yield f"is listed as pure, but imports {target}, which is not"
    if any(matches(name, one) and matches(target, other) for one, other in SEPARATE):
        yield f"imports {target}, which it must not depend on"


def circles(graph: dict[str, list[str]]) -> list[list[str]]:
    """Return a circle for every import that closes one, found depth first."""
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


def node_of(name: str) -> str:
    """Return the folder directly under parallel/ that a module is in; a module in none is a node of its own."""
    return ".".join(name.split(".")[:2])


def folder_measures(root: Path) -> Iterator[str]:
    """Yield a line for each measure of the folders of parallel/ and of the imports between them.

    The nodes are the folders, and the modules that are in no folder. An arrow is a pair of nodes of which one imports
    the other, however often. It is in a circle where arrows lead back, and upward by the checkout's own layers.
    """
    layers = layers_under(root)
    modules = {name: module for name, module in modules_under(root).items() if matches(name, "parallel.*")}
    nodes = {node_of(name) for name in modules}
    folders = {node_of(name) for name, module in modules.items() if len(module.path.parts) > 2}
    arrows: set[tuple[str, str]] = set()
    upward: set[tuple[str, str]] = set()
    for name, module in modules.items():
        for target in {target for _, target in imports(modules, module)} & modules.keys():
            arrow = node_of(name), node_of(target)
            if arrow[0] != arrow[1]:
                arrows.add(arrow)
                layer, target_layer = layer_of(name, layers), layer_of(target, layers)
                if layer is not None and target_layer is not None and target_layer > layer:
                    upward.add(arrow)
    circular = [(a, b) for a, b in arrows if a in reachable(b, arrows)]
    count = len({layer_of(name, layers) for name in modules})
    yield f"folders of parallel/: {len(folders)}; modules in no folder: {len(nodes - folders)}; layers: {count}"
    yield f"arrows between these: {len(arrows)}; in a circle: {len(circular)}; upward: {len(upward)}"


def reachable(start: str, arrows: Iterable[tuple[str, str]]) -> set[str]:
    """Return the nodes to which arrows lead from this one, over any number of others."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        node = waiting.pop()
        following = {b for a, b in arrows if a == node} - found
        found |= following
        waiting += following
    return found
