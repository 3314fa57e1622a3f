"""Which checkpoint a start goes on from: the newest that is whole. Rank 0 chooses, all ranks load its choice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fvlm.errors import UserError
from fvlm.files import write_atomic
from fvlm.train.run_state import RunState
from fvlm.train.sinks import WANDB_ID
from fvlm.train.state import STATE, DamagedCheckpoint, verify
from fvlm.train.store import CheckpointStore, require_known


@dataclass(frozen=True)
class Choice:
    name: str | None
    """For `CheckpointStore.open`; None: the run begins at step 0."""
    step: int
    """Steps that it has finished."""
    origin: int
    """Of its plan."""
    notes: tuple[str, ...]
    """What a person should know: checkpoints that were damaged and passed over."""


def choose_checkpoint(store: CheckpointStore, run_dir: Path) -> Choice:
    """The newest whole checkpoint, every byte of it verified. For the process that owns the run, before any other.

    Damaged ones that are newer are set aside, so that nothing takes them for the newest again; leftovers of a killed
    writer are removed; the run folder gets its W&B id back where it has none.

    Raises UserError when there are checkpoints and all are damaged (a run never starts over by itself), when the newest
    whole one is of a newer format or says of the run what we cannot read, or belongs to another W&B run, or when this
    run has saved and nothing is there. StoreUnavailable: the store is away.
    """
    store.clean()
    damages: dict[str, DamagedCheckpoint] = {}
    for name in reversed(store.names()):
        try:
            with store.open(name) as path:
                state = verify(path)
        except DamagedCheckpoint as damage:
            damages[name] = damage
            continue
        run_state = RunState.from_dict(f"{store.locate(name)}/{STATE}", state)
        _settle_wandb_id(run_dir, f"{store.locate(name)}/{STATE}", run_state)
        # Not before: were none whole, the next start would find an empty place and begin at step 0.
        notes = tuple(
            f"WARNING: {store.locate(damaged)} is damaged and passed over: {damage}. "
            f"Its files are kept in {store.set_aside(damaged)}; going on from {name}, steps after it are repeated"
            for damaged, damage in damages.items()
        )
        return Choice(name, state["step"], run_state.origin, notes)
    if damages:
        each = "\n  ".join(map(str, damages.values()))
        raise UserError(
            f"{store.locate()}: all {len(damages)} checkpoints are damaged:\n  {each}\nRestore one of them from a "
            "copy, or use another --run name to start from step 0."
        )
    if aside := store.damaged():
        raise UserError(
            f"{store.locate()}: the only checkpoints left are damaged ones that were set aside ({', '.join(aside)}). "
            "Restore one from a copy, or use another --run name to start from step 0."
        )
    require_known(store, run_dir, [])
    return Choice(None, 0, 0, ())


def _settle_wandb_id(run_dir: Path, file: str, state: RunState) -> None:
    """The checkpoint and the run folder name one W&B run; a folder that lost its id gets it back."""
    stored = state.wandb["id"]
    path = run_dir / WANDB_ID
    if stored is None:
        return
    if not path.exists():
        write_atomic(path, f"{stored}\n")
    elif (there := path.read_text().strip()) != stored:
        raise UserError(
            f"{path}: the W&B run {there!r}, but {file} belongs to {stored!r}. Delete {path} to go on with "
            f"{stored!r}, or use another --run name."
        )
