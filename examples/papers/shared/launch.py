"""Several processes as one program: start them here, join them anywhere, end them together."""

import argparse
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.language_model.command_line import InputError
from examples.language_model.directory import make_directory

# A process that meets a dead peer ends by itself, with its own message, within about a second.
GRACE_SECONDS = 5.0
# Peers that do not come are a mistake in the command sooner than a slow start.
MEET_SECONDS = 120
# A process that waits where no connection breaks learns of a dead peer by its missing heartbeat.
HEARTBEAT_SECONDS = 20


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("processes").add_argument
    add("--cpu-devices", type=int, metavar="N", help="devices that the CPU of a process stands for")
    add("--processes", type=int, metavar="N", help="start N on this machine, or with --coordinator")
    add("--coordinator", metavar="HOST:PORT", help="where process 0 listens, given to each process")
    add("--process-id", type=int, metavar="I", help="0 … N - 1, which of them this one is")
    add("--distributed", action="store_true",
        help="one of several processes that Slurm, Kubernetes, MPI or a TPU pod started: "
        "JAX finds the others")  # fmt: skip
    # Set by `launch`: end when the launcher does, however it ended.
    add("--launched", action="store_true", help=argparse.SUPPRESS)


def check_options(args: argparse.Namespace) -> None:
    for name in ("cpu_devices", "processes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"`--{name.replace('_', '-')}` must be at least 1, got {value}.")
    if args.distributed and (args.processes or args.coordinator or args.process_id is not None):
        raise InputError(
            "`--distributed` finds processes by itself: leave out `--processes`, `--coordinator` "
            "and `--process-id`."
        )
    if (args.coordinator is None) != (args.process_id is None):
        raise InputError(
            "`--coordinator` and `--process-id` must be given together, "
            f"got {args.coordinator} and {args.process_id}."
        )
    if args.coordinator is None or args.process_id is None:
        return
    if not args.processes or not 0 <= args.process_id < args.processes:
        raise InputError(
            "`--process-id` must lie between 0 and `--processes` - 1, "
            f"got {args.process_id} of {args.processes}."
        )
    host, _, port = args.coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise InputError(f"`--coordinator` must look like host:port, got {args.coordinator!r}.")


def launches(args: argparse.Namespace) -> bool:
    """Whether this command only starts the processes that do the work."""
    return bool(args.processes and args.processes > 1 and args.coordinator is None)


def launch(args: argparse.Namespace, argv: list[str], resumes: Callable[[], str]) -> int:
    """Runs this script `args.processes` times, and ends all when one ends badly.

    Process 0 writes to this terminal, each one's errors go to a file beside the run. `resumes`
    says from where the same command goes on.
    """
    count, address = args.processes, f"127.0.0.1:{_free_port()}"
    make_directory(args.out)
    logs = [args.out / f"process-{i}.log" for i in range(count)]
    children = []
    # Without a choice of its own the CPU: processes on one machine would fight for its GPU.
    platform = {} if args.cpu_devices else {"JAX_PLATFORMS": "cpu"}
    for i, log in enumerate(logs):
        command = [sys.executable, sys.argv[0], *argv, "--launched",
                   "--coordinator", address, "--process-id", str(i)]  # fmt: skip
        with open(log, "wb") as file:
            # In a session of their own Ctrl-C reaches them through this process alone.
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=None if i == 0 else file, stderr=file,
                env={**platform, **os.environ}, start_new_session=True,
            )  # fmt: skip
        children.append(child)
        print(f"Process {i} of {count}: pid {child.pid}, errors in {log}", flush=True)
    try:
        while any(child.poll() != 0 for child in children):
            if any(child.poll() for child in children):
                _wait(children, GRACE_SECONDS)
                # Before those are killed that still wait for it.
                ended = {i: child.returncode for i, child in enumerate(children)}
                first = min((i for i in ended if ended[i]), key=lambda i: _consequence(ended[i]))
                status = ended[first]
                hung = _hung(ended, logs)
                who = f"Process {first} of {count} {_how(status, logs[first])}"
                if hung is not None:
                    who = (f"Process {hung} of {count} hangs: it gave no sign of life for "
                           f"{HEARTBEAT_SECONDS} seconds; see {logs[hung]}.")  # fmt: skip
                print(f"{who}\nThe others were ended with it. {resumes()}", file=sys.stderr)
                return max(status, 1)
            time.sleep(0.05)
    except KeyboardInterrupt:
        print(f"Stopped. {resumes()}", file=sys.stderr)
        return 130
    finally:
        for child in children:
            child.kill()
            child.wait()
    return 0


def join(args: argparse.Namespace) -> None:
    """Makes this process one of several, before anything asks jax for devices."""
    if args.launched:
        threading.Thread(target=_end_with_launcher, daemon=True).start()
        # Gloo tells on the standard output of each connection it makes: that goes to the log.
        sys.stdout = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
    if args.coordinator and args.process_id == 0:
        _check_port(args.coordinator, args.launched)
    if args.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    if args.distributed:
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"`--distributed` must be given within a cluster that jax knows: {error} Outside "
                "of one give `--coordinator`, `--processes` and `--process-id`."
            ) from error
    elif args.coordinator:
        local = args.coordinator if args.launched else None
        jax.distributed.initialize(
            args.coordinator, args.processes, args.process_id,
            coordinator_bind_address=local, initialization_timeout=MEET_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )  # fmt: skip


def agree(config: dict[str, Any]) -> None:
    """Raises InputError unless all processes were given the same options and the same text."""
    mine = np.uint32(zlib.crc32(repr(sorted(config.items())).encode()))
    try:
        multihost_utils.assert_equal(mine)
    except AssertionError:
        raise InputError(
            f"all processes must be given the same options and the same text, got {config} in "
            f"process {jax.process_index()} and something else in another."
        ) from None


def end_alone(error: BaseException) -> None:
    """Ends this process at once and says why; at a normal exit jax would wait for its peers.

    The peers meet a closed connection, or miss its heartbeat, and end as well.
    """
    who = f"Process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, InputError | KeyboardInterrupt):
        print(f"{who}: {error or 'stopped'}", file=sys.stderr)
    elif isinstance(error, jax.errors.JaxRuntimeError):
        reason = (str(error).splitlines() or [""])[0]
        print(f"{who} has lost another one, or its own device: {reason}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit({InputError: 2, KeyboardInterrupt: 130}.get(type(error), 1))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _check_port(address: str, launched: bool) -> None:
    """Raises InputError for a port that process 0 cannot have: jax ends of it in a crash."""
    port = int(address.rpartition(":")[2])
    for family, every in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:  # or it would take the other family's as well
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind((every, port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                continue  # a machine without IPv6
            how = "another program took it: give the command again" if launched else (
                "give another one to all processes"
            )  # fmt: skip
            raise InputError(
                f"`--coordinator` must be a free port of process 0, got {address}: "
                f"{error.strerror}; {how}."
            ) from None


def _wait(children: list[subprocess.Popen], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)


def _consequence(status: int) -> int:
    """How likely a process ended because another one had: they may end within milliseconds."""
    if status == 2:  # its input was refused
        return 0
    if status == -signal.SIGABRT:  # as jax does to a process whose coordinator is gone
        return 3
    return 1 if status < 0 else 2  # killed from outside; an error, as of a closed connection


def _hung(ended: dict[int, int | None], logs: list[Path]) -> int | None:
    """The process that others missed: it still runs, and jax ended them for its silence.

    jax aborts a process then, or first raises in it, where it waits for all at a checkpoint.
    """
    alive = [i for i, status in ended.items() if status is None]
    missed = all(
        status in (-signal.SIGABRT, 1) and b"heartbeat" in logs[i].read_bytes().lower()
        for i, status in ended.items()
        if status
    )
    # Process 0 is asked for signs of life: while it runs, it is the one that gave none.
    return alive[0] if alive and missed else None


def _end_with_launcher() -> None:
    # Nothing is ever written to this pipe: it ends when the launcher does.
    os.read(0, 1)
    os._exit(1)


def _how(status: int, log: Path) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}; see {log}."
    lines = log.read_text(errors="replace").splitlines()
    return f"failed: {lines[-1] if lines else f'exit status {status}'}"
