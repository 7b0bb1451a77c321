"""Checkpoints of arrays that are split over devices and processes.

Every process writes what it holds, and any number of devices reads it back as it needs it.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from examples.language_model.command_line import writing
from examples.language_model.run import (
    History,
    make_directory,
    read_json,
    unreadable,
    unsaved,
    write_json,
)

KEPT = 2
FILES = "files.json"


class ShardedCheckpoints:
    """The latest states of a run, each written whole or not at all.

    A state is a tree of arrays with `NamedSharding`s: parameters, optimizer, clip. With the step
    it is all that the next step depends on.
    """

    def __init__(self, out: Path):
        self.folder = (out / "checkpoints").absolute()
        make_directory(out)
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
        with writing(out):
            self.manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "ShardedCheckpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.close()

    def save(self, step: int, state: Any, history: History) -> None:
        log = {"history": history, "checksum": _digest(step, checksum(state), history)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_by_path(state)), log=ocp.args.JsonSave(log)
        )
        with writing(self.folder, unsaved(self.folder.parent, step)):
            self.manager.save(step, args=items)
        if jax.process_index() == 0:  # all processes have written when `save` returns
            folder = self.folder / str(step)
            write_json(
                folder / FILES, {str(f.relative_to(folder)): _crc(f) for f in _files(folder)}
            )

    def restore(self, state: Any) -> tuple[int, Any, History]:
        """Step, state and history of the last checkpoint; `state` says the shapes and shardings."""
        *earlier, step = self.manager.all_steps()
        damage = self._damage(step) if jax.process_index() == 0 else ""
        if multihost_utils.broadcast_one_to_all(np.bool_(damage)):
            raise unreadable(self.folder / str(step), earlier, damage or "see process 0")
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(_by_path(state)), log=ocp.args.JsonRestore()
        )
        try:
            saved = self.manager.restore(step, args=items)
            restored = jax.tree.unflatten(jax.tree.structure(state), list(saved["state"].values()))
            history = saved["log"]["history"]
            if _digest(step, checksum(restored), history) != saved["log"]["checksum"]:
                raise ValueError("the checksum differs")
        except Exception as error:  # a damaged file fails in many ways, all with the same remedy
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
            raise unreadable(self.folder / str(step), earlier, reason) from error
        return step, restored, history

    def _damage(self, step: int) -> str:
        """Which file is not what was saved; looked at before orbax, which reads all at once and
        reports a damaged one in a traceback for each of the others."""
        folder = self.folder / str(step)
        if not (folder / FILES).exists():  # killed in between: orbax alone has to notice
            return ""
        for name, crc in read_json(folder / FILES).items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _crc(folder / name) != crc:
                return f"{name} was changed"
        return ""

    def latest(self) -> int | None:
        return self.manager.latest_step()


def checksum(state: Any) -> int:
    """A sum over the bits of all arrays, the same however they are split over devices.

    Integers wrap around, so that the order of the sum cannot matter, and each word is weighted
    by its place, so that exchanged ones are noticed.
    """
    return int(_checksum(jax.tree.leaves(state)))


def _digest(step: int, arrays: int, history: History) -> int:
    # The step is only the name of a directory, which may be renamed.
    return zlib.crc32(json.dumps([step, arrays, history]).encode())


@jax.jit
def _checksum(arrays: list[jax.Array]) -> jax.Array:
    total = jnp.zeros((), jnp.uint32)
    for number, x in enumerate(arrays, start=1):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for dimension, size in enumerate(x.shape):
            place = place * np.uint32(size) + jax.lax.broadcasted_iota(
                jnp.uint32, x.shape, dimension
            )
        # Odd weights lose no bit of a word.
        weight = np.uint32(2) * (place + np.uint32(7919 * number)) + np.uint32(1)
        total = total + jnp.sum(bits * weight, dtype=jnp.uint32)
    return total


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _crc(file: Path) -> int:
    crc = 0
    with open(file, "rb") as content:
        while block := content.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _by_path(state: Any) -> dict[str, Any]:
    # Names of the run's own, so that no version of flax or optax is part of the file's format.
    named = jax.tree_util.tree_leaves_with_path(state)
    width = len(str(len(named)))
    return {
        f"{i:0{width}}{jax.tree_util.keystr(path)}".replace("/", "."): leaf
        for i, (path, leaf) in enumerate(named)
    }
