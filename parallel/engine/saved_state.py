"""A checkpoint of an engine as it was read, and how it differs from the engine that is to load it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.checkpoint import checkpoint, saved_values
from parallel.checkpoint.index import Index
from parallel.checkpoint.newest import naming_the_one_before
from parallel.checkpoint.shared_failure import fail_together
from parallel.checkpoint.verify import verify
from parallel.engine.counters import check_counters
from parallel.errors import CheckpointError, names_text, shown
from parallel.mesh.mesh import Axis
from parallel.optim.param_groups import SavedGroup
from parallel.tensor.scaling import Histories, is_history

FORMAT = 2
"""The format of the metadata. Before 2, a checkpoint lacked frozen parameters, and of groups it had `lr` alone."""

WEIGHTS = ("master", "buffer")
"""The kinds of tensors that are weights; all other kinds are states of the optimizer."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class SavedState:
    """A checkpoint that was verified, and its values without the tensors of the model.

    `shapes` has the shape of each of these tensors, named KIND/NAME.
    """

    index: Index
    values: Mapping[str, Any]
    shapes: Shapes

    @classmethod
    def read(cls, folder: str | Path, axis: Axis, *, option: str) -> "SavedState":
        """Read and verify a checkpoint, or the latest of a folder that was saved to.

        Every rank of the axis calls this. Raises CheckpointError, on every rank.
        """
        with fail_together(axis):
            found = checkpoint.find_checkpoint(str(folder), option)
            with naming_the_one_before(found):
                index = Index.read(found)
                _check_metadata(index)
        with naming_the_one_before(found):
            verify(index, axis)
        with fail_together(axis):
            values = _values_of(index, axis)
        return cls(index, values, {n: shape for n, shape in index.shapes.items() if kind_of(n) != saved_values.KIND})

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint."""
        return self.index.folder

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The metadata of the checkpoint."""
        return self.index.metadata

    @property
    def is_older(self) -> bool:
        """True if frozen parameters and the fields of param groups were not saved."""
        return int(self.metadata.get("format", 1)) < FORMAT

    @property
    def frozen(self) -> frozenset[str]:
        """The public names of the parameters that were frozen."""
        return frozenset(self.metadata.get("frozen", ()))

    @property
    def optimizer(self) -> str | None:
        """The kind of the optimizer that was saved; None where that was not recorded."""
        return self.metadata.get("optimizer")

    @property
    def groups(self) -> list[SavedGroup]:
        """The param groups of the optimizer; none for the config's own."""
        names: Sequence[Sequence[str]] = self.metadata.get("group_names", ())
        return [SavedGroup(*pair) for pair in zip(names, self.values.get("param_groups", ()), strict=False)]

    @property
    def histories(self) -> Histories:
        """The largest magnitudes by which tensors are scaled to 8 bits; none of a run in another precision."""
        found: Histories = self.values.get("scaling", {})
        return found

    def check_shapes(self, wanted: Shapes) -> None:
        """Raise CheckpointError with all tensors that have another shape in the model."""
        problems = [
            f"{self.folder}: {name_of(name)} is {self.shapes[name]}, the model needs {shape}"
            for name, shape in wanted.items()
            if self.shapes.get(name, shape) != shape and kind_of(name) in WEIGHTS
        ]
        if problems:
            raise CheckpointError(". ".join(problems) + ".")

    def weight_problems(self, wanted: Shapes, *, frozen: frozenset[str]) -> list[str]:
        """Return messages about weights that only the checkpoint has, or only the model.

        `frozen`: parameters that are frozen now, and that an older checkpoint need not have.
        """
        saved, now = ({n for n in shapes if kind_of(n) in WEIGHTS} for shapes in (self.shapes, wanted))
        allowed = {f"master/{name}" for name in frozen} if self.is_older else set()
        return self._messages(now - saved - allowed, saved - now, "the model")

    def state_problems(self, wanted: Shapes, *, frozen: frozenset[str]) -> list[str]:
        """Return messages about optimizer states that only one side has, though its parameter was and is trained."""
        saved, now = (
            {n for n in shapes if kind_of(n) not in WEIGHTS and name_of(n) not in frozen | self.frozen}
            for shapes in (self.shapes, wanted)
        )
        return self._messages(now - saved, saved - now, "the optimizer")

    def without_states(self, wanted: Shapes) -> set[str]:
        """Return the names of the parameters with states now, of which the checkpoint has none."""
        saved, now = ({name_of(n) for n in shapes if kind_of(n) not in WEIGHTS} for shapes in (self.shapes, wanted))
        return now - saved

    def _messages(self, missing: set[str], left_over: set[str], what: str) -> list[str]:
        found = []
        if missing:
            found.append(f"{self.folder} lacks {_text(missing)}, which {what} has")
        if left_over:
            found.append(f"{self.folder} has {_text(left_over)}, which {what} lacks")
        return found


def _values_of(index: Index, axis: Axis) -> Mapping[str, Any]:
    """Return this rank's values, also of a checkpoint whose values were plain JSON."""
    entries = index.metadata.get("values")
    if entries is None:
        return {"extra": index.metadata.get("extra", {})}
    values = saved_values.read_values(index, entries, axis)
    groups, names = values.get("param_groups", []), index.metadata.get("group_names", [])
    is_right = _is_list_of(groups, dict) and len(groups) == len(names)
    if not is_right or not isinstance(values.get("extra_state", {}), dict):
        raise CheckpointError(f"{index.folder} is no checkpoint of this program: its param groups are {shown(groups)}.")
    if not is_history(values.get("scaling", {})):
        raise CheckpointError(f"{index.folder} is no checkpoint of this program: its scales have another form.")
    return values


def histories_of(index: Index, axis: Axis) -> Histories:
    """Return the largest magnitudes by which tensors are scaled to 8 bits; none of a run in another precision."""
    _check_metadata(index)
    found: Histories = _values_of(index, axis).get("scaling", {})
    return found


def _check_metadata(index: Index) -> None:
    """Raise CheckpointError where the metadata are not of the kinds that a saved engine has."""
    metadata = index.metadata
    check_counters(index)
    is_right = {
        "format": type(metadata.get("format", 1)) is int,
        "optimizer": isinstance(metadata.get("optimizer"), str | None),
        "steps": _is_dict_of(metadata.get("steps", {}), int | float),
        "frozen": _is_list_of(metadata.get("frozen", []), str),
        "rates": _is_list_of(metadata.get("rates", []), int | float),
        "group_names": all(_is_list_of(names, str) for names in _list(metadata.get("group_names", []))),
        "values": _is_list_of(metadata.get("values") or [], dict),
    }
    if wrong := [key for key, right in is_right.items() if not right]:
        raise CheckpointError(
            f"{index.folder} is no checkpoint of this program: its {wrong[0]!r} is {shown(metadata[wrong[0]])}."
        )


def _list(x: Any) -> list[Any]:
    return x if isinstance(x, list) else [x]


def _is_list_of(x: Any, kind: Any) -> bool:
    return isinstance(x, list) and all(isinstance(item, kind) for item in x)


def _is_dict_of(x: Any, kind: Any) -> bool:
    return isinstance(x, dict) and _is_list_of([*x.values()], kind)


def kind_of(name: str) -> str:
    """Return the kind in KIND/NAME."""
    return name.partition("/")[0]


def name_of(name: str) -> str:
    """Return the public name in KIND/NAME."""
    return name.partition("/")[2]


def text_of(name: str) -> str:
    """Return KIND/NAME as text: the name of a weight alone, and of a state with its kind."""
    return name_of(name) if kind_of(name) in WEIGHTS else f"{kind_of(name)} of {name_of(name)}"


def _text(names: set[str]) -> str:
    """Return the names as text."""
    return names_text(sorted(map(text_of, names)))
