"""Checkpoints that continue a run bit for bit, on one device or split over several processes."""

import json
import logging
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from examples.language_model.command_line import InputError, writing
from examples.language_model.directory import (
    History,
    make_directory,
    read_json,
    saved_steps,
    write_json,
)

KEPT = 2
FILES = "files.json"
# Orbax warns of every checkpoint that is only read, and logs a traceback for each of its threads
# that ends with the error it raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class Checkpoints:
    """The latest states of a run, each written whole or not at all.

    A state is a tree of arrays that holds all that the next step depends on: parameters, optimizer
    and clip, random keys. Arrays on a mesh (`NamedSharding`) are saved one by one: every process
    writes what it holds, and any number of devices reads it back as it needs it.
    """

    def __init__(self, out: Path):
        self.folder = (out / "checkpoints").absolute()
        make_directory(out)
        # Saving takes milliseconds at this size; in the background it would race with donation.
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
        with writing(out):
            self.manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.close()

    def save(self, step: int, state: Any, history: History) -> None:
        if _on_mesh(state):
            digest, save = checksum(state), ocp.args.StandardSave(_by_path(state))
        else:
            packed = _pack(state)
            digest, save = zlib.crc32(packed.tobytes()), ocp.args.ArraySave(packed)
        log = {"history": history, "digest": _digest(step, digest, history)}
        items = ocp.args.Composite(state=save, log=ocp.args.JsonSave(log))
        with writing(self.folder, _unsaved(self.folder.parent, step)):
            self.manager.save(step, args=items)
        if jax.process_index() == 0:  # all processes have written when `save` returns
            folder = self.folder / str(step)
            crcs = {str(file.relative_to(folder)): _crc(file) for file in _files(folder)}
            write_json(folder / FILES, crcs)

    def restore(self, state: Any) -> tuple[int, Any, History]:
        """Step, state and history of the last checkpoint, or 0, what was given and an empty one.

        The given state says shapes, dtypes and shardings.
        """
        if not (steps := sorted(self.manager.all_steps())):
            return 0, state, {}
        *earlier, step = steps
        damage = self._damage(step) if jax.process_index() == 0 else ""
        if multihost_utils.broadcast_one_to_all(np.bool_(damage)):
            raise _unreadable(self.folder / str(step), earlier, damage or "see process 0")
        try:
            return step, *self._read(step, state)
        except Exception as error:  # a damaged file fails in many ways, all with the same remedy
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
            raise _unreadable(self.folder / str(step), earlier, reason) from error

    def _read(self, step: int, state: Any) -> tuple[Any, History]:
        on_mesh = _on_mesh(state)
        if on_mesh:
            as_saved = ocp.args.StandardRestore(_by_path(state))
        else:
            as_bytes = ocp.RestoreArgs(restore_type=np.ndarray)
            as_saved = ocp.args.ArrayRestore(restore_args=as_bytes)
        items = ocp.args.Composite(state=as_saved, log=ocp.args.JsonRestore())
        saved = self.manager.restore(step, args=items)
        if on_mesh:
            restored = jax.tree.unflatten(jax.tree.structure(state), list(saved["state"].values()))
            digest = checksum(restored)
        else:
            digest = zlib.crc32(saved["state"].tobytes())
            restored = _unpack(saved["state"], state)
        history = saved["log"]["history"]
        if saved["log"]["digest"] != _digest(step, digest, history):
            raise ValueError("the checksum differs")
        return restored, history

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


def _unsaved(out: Path, step: int) -> str:
    """What is left where a checkpoint could not be written: those before it."""
    steps = saved_steps(out)
    return (
        f" The checkpoint of step {step} is not saved; with room for it, the same command goes on "
        f"from {f'step {steps[-1]}' if steps else 'the start'}."
    )


def _unreadable(checkpoint: Path, earlier: list[int], reason: str) -> InputError:
    """The refusal of a damaged checkpoint, and what to do about it."""
    return InputError(
        f"`--out` must hold checkpoints that can be read, got {checkpoint}: {reason}. Nothing was "
        f"changed; move that directory away to continue from "
        f"{f'step {earlier[-1]}' if earlier else 'the start'}, or give another `--out`."
    )


def _on_mesh(state: Any) -> bool:
    return all(isinstance(leaf.sharding, NamedSharding) for leaf in jax.tree.leaves(state))


def _pack(state: Any) -> np.ndarray:
    # One array of bytes takes a fifth of the time of an array per leaf. The copy outlives a
    # donation.
    leaves = [_plain(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    return np.frombuffer(b"".join(leaves), np.uint8)


def _plain(leaf: jax.Array) -> np.ndarray:
    # Keys of random numbers are saved as the integers they are.
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _unpack(packed: np.ndarray, state: Any) -> Any:
    leaves, tree = jax.tree.flatten(state)
    plain = [_plain(leaf) for leaf in leaves]
    ends = np.cumsum([leaf.nbytes for leaf in plain])
    if len(packed) != ends[-1]:
        raise ValueError(f"it holds {len(packed)} bytes, this run needs {ends[-1]}")
    arrays = [
        jnp.array(part.view(old.dtype).reshape(old.shape))
        for part, old in zip(np.split(packed, ends[:-1]), plain, strict=True)
    ]
    keyed = [
        jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if _is_key(old) else new
        for new, old in zip(arrays, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, keyed)


def _digest(step: int, arrays: int, history: History) -> int:
    # The step is only the name of a directory: of a renamed one the run would go on with the
    # wrong data.
    return zlib.crc32(json.dumps([step, arrays, history]).encode())


def checksum(state: Any) -> int:
    """A sum over the bits of all arrays, the same however they are split over devices.

    Integers wrap around, so that the order of the sum cannot matter, and each word is weighted
    by its place, so that exchanged ones are noticed.
    """
    return int(_checksum(jax.tree.leaves(state)))


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
