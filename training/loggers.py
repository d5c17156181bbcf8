"""The callbacks that a config names: loggers by their names, and classes of the user's own."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from inspect import isclass
from pathlib import Path
from types import ModuleType

from parallel.config import Config
from parallel.errors import ConfigError, closest, shown
from parallel.regular_file import check_regular
from training.callbacks import Callback
from training.tensorboard_logger import TensorBoardLogger
from training.wandb_logger import WandbLogger

LOGGERS: dict[str, type[Callback]] = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger}
"""The loggers by the names that `output.loggers` has, which are those of the packages that they need."""


def callbacks_of(config: Config) -> tuple[type[Callback], ...]:
    """Return the classes of the loggers and callbacks of a config; none of them is called.

    Raises ConfigError, with all problems, where a package is not installed, or a class cannot be found.
    """
    problems = [
        f"output.loggers: {name!r} needs the package {name}, which is not installed: pip install {name}."
        " Or leave it out."
        for name in config.output.loggers
        if not _is_installed(name)
    ]
    found = [LOGGERS[name] for name in dict.fromkeys(config.output.loggers)]
    for text in config.output.callbacks:
        try:
            found.append(_class_of(text))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return tuple(found)


def _is_installed(package: str) -> bool:
    """Return whether a package can be imported; a folder of its name, as its own runs leave, is none."""
    try:
        spec = find_spec(package)
    except ValueError:  # a module that was put into sys.modules without one
        return sys.modules.get(package) is not None
    return spec is not None and spec.origin is not None


def _class_of(text: str) -> type[Callback]:
    """Return the class that "module:Class" or "FILE.py:Class" names. Raises ConfigError."""
    name, _, attribute = text.rpartition(":")
    if not name or not attribute:
        raise ConfigError(f"output.callbacks: {shown(text)} names no class. Try 'module:Class' or 'FILE.py:Class'.")
    module = _module_of(name)
    kind = getattr(module, attribute, None)
    if not isclass(kind) or not issubclass(kind, Callback) or kind is Callback:
        known = [key for key, value in vars(module).items() if isclass(value) and issubclass(value, Callback)]
        hint = closest(attribute, known)
        tries = f" Did you mean {name}:{hint}?" if hint else ""
        problem = f"{name} has no {attribute}" if kind is None else f"{attribute} is not a training.callbacks.Callback"
        raise ConfigError(f"output.callbacks: {shown(text)}: {problem}.{tries}")
    return kind


def _module_of(name: str) -> ModuleType:
    """Import a module of this name, or the file. Raises ConfigError with the reason where that fails."""
    try:
        with _working_directory_first():
            return _module_of_file(Path(name)) if name.endswith(".py") else import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or name.split(".")[0] != error.name.split(".")[0]:
            raise ConfigError(f"output.callbacks: {name} needs the module {error.name}, which is not there.") from error
        raise ConfigError(
            f"output.callbacks: there is no module {name} in {Path.cwd()}, beside the config, or among the installed"
            " packages. Try the path of its file: 'FILE.py:Class'."
        ) from error
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"output.callbacks: importing {name} failed: {type(error).__name__}: {shown(str(error))}."
        ) from error


def _module_of_file(file: Path) -> ModuleType:
    """Execute a file as a module, once in a process."""
    check_regular(
        file, lambda text: ConfigError(f"output.callbacks: {text} Try the path of a Python file."), links=True
    )
    name = str(file.resolve())
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, file)
    assert spec is not None, f"{file} ends in .py"
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _working_directory_first() -> Iterator[None]:
    """Have modules of the working directory found in the block, as those beside a script are; sys.path is as before."""
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before
