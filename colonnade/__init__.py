"""The command `colonnade`, and what makes it run in any folder: `parallel`, `models` and `training` are its own.

A working directory often has a `models` folder, a `training` folder or a config called parallel.py, and Python searches
it first. So this package, once imported, answers for these three names before any folder is searched: with the packages
that lie beside it, in a clone as well as among the installed packages. Nothing is imported until it is asked for.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from colonnade.version import __version__

__all__ = ["__version__"]

FOLDER = Path(__file__).resolve().parent.parent
PACKAGES = ("parallel", "models", "training")


class OwnPackages:
    """A finder, as `sys.meta_path` has them, that finds each of PACKAGES in FOLDER and nothing else."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return where one of our packages is; None for any other module, also for one that is in a package."""
        return PathFinder.find_spec(name, [str(FOLDER)]) if name in PACKAGES else None


def refuse_others() -> None:
    """Raise ImportError, with the file, if another package of one of these names has been imported already."""
    for name in PACKAGES:
        module = sys.modules.get(name)
        if module is not None and FOLDER not in (folder.parent for folder in _places(module)):
            place = next(iter(_places(module)), "nowhere")
            raise ImportError(
                f"colonnade has a package {name!r} of its own, but another one has been imported already, from {place}."
                " Import colonnade before it, or give the other one another name.",
                name=name,
                path=str(place),
            )


def _places(module: ModuleType) -> list[Path]:
    """Return the folders of a package, or the file of a module that is no package."""
    found = list(getattr(module, "__path__", None) or filter(None, [getattr(module, "__file__", None)]))
    return [Path(place).resolve() for place in found]


refuse_others()
sys.meta_path.insert(0, OwnPackages)
