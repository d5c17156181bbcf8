"""The whole state of an engine, in checkpoints and in state_dicts."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from parallel.checkpoint import checkpoint
from parallel.checkpoint.index import Index
from parallel.checkpoint.saved_values import encode_on_ranks
from parallel.checkpoint.shared_failure import fail_together
from parallel.checkpoint.values import decode, encode
from parallel.engine.base import EngineBase
from parallel.engine.saved_state import FORMAT, WEIGHTS, SavedState, Shapes, histories_of, kind_of, name_of
from parallel.engine.scales import histories_of_all, restore_scales
from parallel.engine.state_dict import check_layout, refuse_other, tensor_problems
from parallel.errors import CheckpointError, names_text
from parallel.layout.layout import Piece
from parallel.mesh.collectives import gather_objects
from parallel.modules.extra_state import extra_states, set_extra_states
from parallel.optim.adamw import AdamW
from parallel.optim.param_groups import SavedGroup, check_fields, group_problems
from parallel.tensor.scaling import Histories

log = logging.getLogger(__name__)


class EngineState(EngineBase):
    """The part of an engine that saves its whole state, and goes on from a saved one.

    It is: all weights, also frozen ones, buffers, extra states of the module; the optimizer's states, and every field
    of its param groups; counters, the loss scale, and the placement. Each method is called by every rank together.
    """

    def save_checkpoint(
        self, folder: str | Path, extra: Mapping[str, Any] | None = None, *, keep: int = 2, wait: bool = True
    ) -> Path:
        """Write the whole state to folder/checkpoints/step_N, and return that path.

        `extra` is saved too: what schedulers' and loaders' state_dicts hold, with tensors, on the host, and keys of any
        type; where ranks have different ones, that of each. Training can be resumed on any number of ranks and in any
        stage. The last `keep` checkpoints are kept. `wait=False`: it is written in the background, from the state as it
        is now, unless `output.checkpoint_async` is False; `finish_saving` waits for it.

        Raises CheckpointError, with its path, for a value that cannot be stored (a function, an object of a class of
        yours), and where a rank cannot write; DiskFullError where a disk is full; NonFiniteError, before anything is
        written, where a weight or a state is not finite. Those of a save in the background are raised at the next step,
        on every rank.
        """
        self.agree_on(f"a checkpoint after step {self.num_steps}")
        world, target = self.mesh.world, checkpoint.step_folder(Path(folder), self.num_steps)
        if self.has_gradients:
            self._log(["save_checkpoint: the gradients since the last step are not saved"])
        self.check_finite("It is not saved, and earlier checkpoints stay.", states=True)
        own = self.optimizer.counters()["steps"]
        steps = {k: v for part in gather_objects(own, world) for k, v in part.items()}
        names, fields = self._groups()
        module = extra_states(self.module)
        values = dict(extra={} if extra is None else extra, param_groups=fields, extra_state=module)
        values |= {} if self.scaling is None else {"scaling": histories_of_all(self.scaling, self.mesh)}
        entries, pieces = encode_on_ranks(values, world)
        metadata = dict(
            format=FORMAT,
            counters=self.counters(),
            optimizer=self.optimizer.kind,
            steps=steps,
            frozen=sorted(self._frozen()),
            group_names=names,
            values=entries,
        )
        pieces += self.state_pieces(owned=True)
        self.save(pieces, checkpoint.Target(target, keep), metadata, wait=wait)
        return target

    def save(
        self, pieces: Sequence[Piece], target: checkpoint.Target, metadata: Mapping[str, Any], *, wait: bool = False
    ) -> None:
        """Write these pieces, which this rank owns, and `metadata` as a checkpoint: in the background, unless this is
        to `wait` or `output.checkpoint_async` is False.
        """
        waits = wait or not self.config.output.checkpoint_async
        self.saver.save(pieces, target, metadata=metadata, waits=waits, guarded=not self.writes.is_on)

    def encoded_scales(self) -> tuple[list[dict[str, Any]], list[Piece]]:
        """Return the history of 8-bit scales as the `values` of a checkpoint, and the pieces that this rank writes.

        Nothing in another precision. Every rank calls this.
        """
        if self.scaling is None:
            return [], []
        return encode_on_ranks({"extra": {}, "scaling": histories_of_all(self.scaling, self.mesh)}, self.mesh.world)

    def restore_scales(self, index: Index) -> None:
        """Go on from the history of 8-bit scales in a checkpoint; without one they start anew. Every rank calls this.

        Raises CheckpointError, on every rank, where the history has another form.
        """
        if self.scaling is None:
            return
        with fail_together(self.mesh.world):
            histories = histories_of(index, self.mesh.world)
        self._restore_scales(histories, index.folder)

    def reserve_for_saving(self) -> None:
        """Start to allocate the memory on the host for copies, where it has to be pinned for a GPU, which takes long:
        else the first save in the background does it.
        """
        if self.mesh.device.type == "cuda":
            owned = [chunk for chunk in self.chunks if chunk.spec.is_owner and not chunk.is_frozen]
            self.saver.reserve({chunk: self.optimizer.state_bytes(chunk) for chunk in owned})

    def finish_saving(self) -> None:
        """Return when the checkpoint that is written in the background is complete on every rank.

        Raises its error, on every rank: CheckpointError, DiskFullError for a full disk, LostRankError.
        """
        self.agree_on("the end of a save")
        self.saver.finish()

    def load_checkpoint(self, folder: str | Path, *, strict: bool = True) -> dict[str, Any]:
        """Go on from a checkpoint, or from the latest in a folder that was saved to, and return its `extra`.

        A parameter that was frozen, and is not now, starts with new optimizer states; the states of one that is frozen
        now are left out. With `strict`, all else that only one side has is an error; otherwise it is left as it is,
        and logged. Raises CheckpointError, on every rank, for a checkpoint that is missing, damaged, or of another
        model or optimizer; NonFiniteError for one with a weight or a state that is not finite; the error of a save in
        the background, which is finished first. Of param groups the fields that choose kernels (foreach, fused,
        capturable, differentiable) stay as they are now.
        """
        self._finish_saves("loading a checkpoint")
        saved = SavedState.read(folder, self.mesh.world, option="load_checkpoint")
        problems = self._weight_problems(saved)
        more, groups = self._group_problems(saved)
        self._refuse_or_log(problems + more, strict=strict)
        wanted = self._shapes(self._pieces_with(groups))
        self._refuse_or_log(saved.state_problems(wanted, frozen=self._frozen()), strict=strict)
        self._restore_groups(groups)  # from here on nothing is refused
        self._load(saved, self.state_pieces())
        new = saved.without_states(wanted)
        for piece in self.state_pieces():
            if kind_of(piece.name) not in WEIGHTS and piece.name not in saved.shapes:
                piece.data.fill_(self.optimizer.initial_value(kind_of(piece.name), name_of(piece.name)))
        infos = [info for chunk in self.chunks for info in chunk.infos]
        steps = {info.name: 0 for info in infos if not new.isdisjoint(info.names)}
        self.restore(saved.metadata["counters"], steps={**saved.metadata.get("steps", {}), **steps})
        set_extra_states(self.module, saved.values.get("extra_state", {}))
        self._restore_scales(saved.histories, saved.folder)
        self.check_finite(f"It was loaded from {saved.folder}.", states=True)
        self._log_what_starts_anew(saved, new)
        extra: dict[str, Any] = saved.values["extra"]
        return extra

    def load_weights(self, folder: str | Path, *, strict: bool = True) -> None:
        """Load the weights of a checkpoint, or of the latest in a folder that was saved to, and nothing else.

        They are parameters, frozen ones too, buffers, and extra states of the module. The optimizer, its states, and
        the counters stay as they are. Scales of 8 bits start anew, with a step in bf16, since they are made of the
        weights that were. Raises CheckpointError and NonFiniteError as `load_checkpoint` does.
        """
        self._finish_saves("loading weights")
        saved = SavedState.read(folder, self.mesh.world, option="load_weights")
        self._refuse_or_log(self._weight_problems(saved), strict=strict)
        self._load(saved, [piece for piece in self.state_pieces() if kind_of(piece.name) in WEIGHTS])
        set_extra_states(self.module, saved.values.get("extra_state", {}))
        self.write_back()
        if self.scaling is not None:
            self.scaling.forget()
        self.check_finite(f"It was loaded from {saved.folder}.")

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's whole state as a dict of plain values, and of tensors on the host.

        `torch.save` writes it, and `torch.load` reads it with `weights_only=True`. Each rank has a state of its own,
        for the same layout alone: for any other there is `save_checkpoint`. (FSDP's counterpart is its sharded
        state_dict.) Raises ModelError, on every rank, where ranks have written different values into their parameters.
        """
        self.agree_on("a state_dict")
        self.writes.take_if_any()
        names, fields = self._groups(gathers=False)
        scales = {} if self.scaling is None else self.scaling.histories()
        values = encode(dict(param_groups=fields, extra_state=extra_states(self.module), scaling=scales))
        steps = self.optimizer.counters()["steps"]
        return {
            "layout": self._layout(),
            "tensors": {key: x.detach().to("cpu", copy=True) for key, x in _by_key(self.state_pieces()).items()},
            "counters": self.counters() | dict(steps=steps),
            "group_names": names,
            "values": values.json,
            "value_tensors": values.tensors,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned on this rank, bit for bit.

        Raises CheckpointError on every rank where the state of one is of another rank, layout, model or optimizer.
        """
        self.agree_on("loading a state_dict")
        with fail_together(self.mesh.world):
            check_layout(state, self._layout())
            values = decode(state["values"], state["value_tensors"])
            saved = [SavedGroup(*pair) for pair in zip(state["group_names"], values["param_groups"], strict=True)]
            now = [SavedGroup(*pair) for pair in zip(*self._groups(gathers=False), strict=True)]
            self._check_fields(saved, now)
            problems, groups = group_problems(saved, now, frozen=frozenset())
            refuse_other(problems)
        expected = self._pieces_with(groups)
        with fail_together(self.mesh.world):
            refuse_other(tensor_problems(state["tensors"], _by_key(expected)))
        self._restore_groups(groups)
        for key, x in _by_key(self.state_pieces()).items():
            x.copy_(state["tensors"][key])
        self.restore(state["counters"], steps=state["counters"]["steps"])
        set_extra_states(self.module, values["extra_state"])
        if self.scaling is not None:
            restore_scales(self.scaling, values.get("scaling", {}), self.mesh)

    # -- details

    def _finish_saves(self, action: str) -> None:
        """Begin an action that reads checkpoints: those that are written in the background are complete then, also that
        of another engine of this mesh, and all ranks see the same ones.
        """
        self.agree_on(action)
        self.saver.finish()
        self.mesh.wait_for_background()

    def _restore_scales(self, histories: Histories, folder: Path) -> None:
        """Go on from the history of scales in a checkpoint, and log where all of them start anew."""
        unscaled = [] if self.scaling is None else restore_scales(self.scaling, histories, self.mesh)
        if unscaled:
            self._log([f"{folder} has no scales of {names_text(unscaled)}: all scales start anew, in bf16"])

    def _load(self, saved: SavedState, pieces: Sequence[Piece]) -> None:
        """Load those of the pieces that the checkpoint has. Raises CheckpointError, on every rank."""
        with fail_together(self.mesh.world):
            saved.index.archive.read_into(piece for piece in pieces if piece.name in saved.shapes)

    def _pieces_with(self, groups: Mapping[int, SavedGroup]) -> list[Piece]:
        """Return the pieces that `state_pieces` returns once these param groups are restored; states with other data.

        Nothing changes: which states there are depends on fields such as `amsgrad`.
        """
        found = self.state_pieces()
        if isinstance(self.optimizer, AdamW):
            return found
        states = self.optimizer.states_with(groups).items()
        weights = [piece for piece in found if kind_of(piece.name) in WEIGHTS]
        return weights + [replace(piece, name=f"{kind}/{piece.name}") for kind, pieces in states for piece in pieces]

    def _shapes(self, pieces: Sequence[Piece]) -> Shapes:
        """Return the shape of each tensor of which ranks have these pieces, by KIND/NAME."""
        own = {piece.name: piece.shape for piece in pieces}
        return {name: shape for part in gather_objects(own, self.mesh.world) for name, shape in part.items()}

    def _frozen(self) -> frozenset[str]:
        """Return the public names of all frozen parameters, of all ranks."""
        own = {name for chunk in self.chunks if chunk.is_frozen for info in chunk.infos for name in info.names}
        return frozenset().union(*gather_objects(own, self.mesh.world))

    def _groups(self, *, gathers: bool = True) -> tuple[list[list[str]], list[Mapping[str, Any]]]:
        """Return the param groups' names, those of all pipeline stages, and their fields; none for the config's AdamW.

        `gathers=False`: this rank's names.
        """
        own = [] if isinstance(self.optimizer, AdamW) else self.optimizer.groups.state()
        of_ranks = [[group.names for group in own]]
        if gathers:
            of_ranks = gather_objects(of_ranks[0], self.mesh.world)
        same = zip_longest(*of_ranks, fillvalue=())  # a pipeline stage may lack a group
        names = [list(dict.fromkeys(name for part in parts for name in part)) for parts in same]
        return names, [group.fields for group in own]

    def _weight_problems(self, saved: SavedState) -> list[str]:
        """Return messages about weights that one side lacks. Raises CheckpointError where shapes differ."""
        wanted = self._shapes(self.state_pieces())
        saved.check_shapes(wanted)
        return saved.weight_problems(wanted, frozen=self._frozen())

    def _group_problems(self, saved: SavedState) -> tuple[list[str], dict[int, SavedGroup]]:
        """Return messages about optimizers and groups that differ, and the saved groups to restore, by number."""
        now = [SavedGroup(*pair) for pair in zip(*self._groups(), strict=False)]
        if saved.optimizer is None:  # of a run of launch.py, or older
            rates: Sequence[float] = saved.metadata.get("rates", [])
            problem = [f"the checkpoint has {len(rates)} param groups, the optimizer {len(now)}"]
            of_rates = {i: SavedGroup([], {"lr": rate}) for i, rate in enumerate(rates[: len(now)])}
            return problem if rates and len(rates) != len(now) else [], of_rates
        if saved.optimizer != self.optimizer.kind:
            return [f"the checkpoint's optimizer is {saved.optimizer}, and this one {self.optimizer.kind}"], {}
        with fail_together(self.mesh.world):
            self._check_fields(saved.groups, now)
        return group_problems(saved.groups, now, frozen=self._frozen() | saved.frozen)

    def _check_fields(self, saved: Sequence[SavedGroup], now: Sequence[SavedGroup]) -> None:
        if not isinstance(self.optimizer, AdamW):
            check_fields(saved, now, own=self.optimizer.inner.defaults.keys())

    def _restore_groups(self, saved: Mapping[int, SavedGroup]) -> None:
        if not isinstance(self.optimizer, AdamW):
            self.optimizer.restore_groups(saved)

    def _refuse_or_log(self, problems: Sequence[str], *, strict: bool) -> None:
        """Raise CheckpointError with these messages, on every rank where one has any; without `strict`, log them."""
        with fail_together(self.mesh.world):
            if strict and problems:
                raise CheckpointError(". ".join(problems) + ". Try strict=False, which loads the rest.")
        self._log([f"left out: {problem}" for problem in problems])

    def _log_what_starts_anew(self, saved: SavedState, new: set[str]) -> None:
        frozen = self._frozen()
        left_out = {name_of(n) for n in saved.shapes if kind_of(n) not in WEIGHTS} & frozen
        if new:
            self._log([f"{saved.folder} has no optimizer states of {names_text(sorted(new))}: they start as new ones"])
        if left_out:
            self._log([f"{names_text(sorted(left_out))} is frozen now: its optimizer states are left out"])
        if saved.is_older and (frozen or not isinstance(self.optimizer, AdamW)):
            what = "frozen parameters, and fields of param groups but lr"
            self._log([f"{saved.folder} is of an older version without {what}: they stay as they are"])

    def _log(self, messages: Sequence[str]) -> None:
        for message in messages if self.mesh.world.rank == 0 else ():
            log.warning("%s", message)

    def _layout(self) -> dict[str, Any]:
        """Return what decides which part of the state this rank has, and which states there are."""
        place = dict(rank=self.mesh.world.rank, world_size=self.mesh.world.size, stage=self.config.zero.stage)
        return place | dict(mesh=dict(self.mesh.topology.shape), optimizer=self.optimizer.kind)


def _by_key(pieces: Sequence[Piece]) -> dict[str, Tensor]:
    """Return the tensors of pieces by KIND/NAME[BOX]."""
    return {f"{x.name}[{','.join(f'{start}:{stop}' for start, stop in x.box)}]": x.data for x in pieces}
