"""How fast a norm is beside a plain read of the same bytes, and how exact.

python benchmarks/norm.py
python benchmarks/norm.py --megabytes 64 --elements 1e4,1e6
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import harness
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from harness import Spread, digits, ratios

import gradclip_jax

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
NORMS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gradclip_jax.global_norm": gradclip_jax.global_norm,
    "optax.tree.norm": optax.tree.norm,
    "jnp.linalg.norm": jnp.linalg.norm,
}
READ = "jnp.sum, a plain read"
CHUNK = 10_000_000
"""Elements that are drawn, or squared in float64, at a time."""


def libraries(x: np.ndarray, torch: Any) -> dict[str, Callable[[], Any]]:
    """The norm of one array by everything that can take it, each ready to be called."""
    on_device = jnp.array(x)
    cases: dict[str, Callable[[], Any]] = {}
    for name, norm in NORMS.items():
        program = harness.compiled(norm, on_device)
        cases[name] = lambda program=program: program.run(on_device)
    if torch is not None:
        kind = torch.float32 if x.dtype == np.float32 else torch.bfloat16
        device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        # It does not know the bfloat16 of NumPy, but the bits are the same.
        bits = torch.from_numpy(x.view(np.float32 if x.dtype == np.float32 else np.int16))
        there = bits.view(kind).to(device)

        def of_torch() -> Any:
            norm = torch.linalg.vector_norm(there)
            if device == "cuda":
                torch.cuda.synchronize()
            return norm

        cases["torch.linalg.vector_norm"] = of_torch
    # bfloat16 it would convert to float64 first.
    if x.dtype == np.float32 and jax.default_backend() == "cpu":
        cases["numpy.linalg.norm"] = lambda: np.linalg.norm(x)
    return cases


def normals(count: int, dtype: Any) -> np.ndarray:
    """Seeded normal numbers."""
    draw, x = np.random.default_rng(0), np.empty(count, dtype)
    for part in chunks(x):
        part[:] = draw.standard_normal(part.size, np.float32)
    return x


def exact_norm(x: np.ndarray) -> float:
    """The norm in float64."""
    return math.sqrt(math.fsum(float(np.sum(part.astype(np.float64) ** 2)) for part in chunks(x)))


def chunks(x: np.ndarray) -> Iterator[np.ndarray]:
    """Views of a vector, one after the other."""
    return (x[start : start + CHUNK] for start in range(0, x.size, CHUNK))


def bandwidth(dtype: str, size: int, torch: Any, **rounds: Any) -> list[list[Any]]:
    """Rows of the first table."""
    x = normals(size // np.dtype(DTYPES[dtype]).itemsize, DTYPES[dtype])
    on_device = jnp.array(x)
    read = harness.compiled(lambda x: jnp.sum(x, dtype=jnp.float32), on_device)
    cases = {READ: lambda: read.run(on_device), **libraries(x, torch)}
    times = harness.interleaved(cases, **rounds)
    peak = harness.peak_bandwidth()
    rows = []
    for name, seconds in times.items():
        speed = Spread.of([x.nbytes / one for one in seconds], 1e-9)
        share = Spread.of(ratios(times[READ], seconds))
        rows.append([dtype, name, Spread.of(seconds, 1e3), speed, share])
        if peak is not None:
            rows[-1].append(f"{digits(100 * speed.median * 1e9 / peak)} %")
    return rows


def errors(words: str, x: np.ndarray, torch: Any) -> dict[str, str]:
    """Relative errors of the norm, by library."""
    exact = exact_norm(x)
    found = {name: float(norm()) for name, norm in libraries(x, torch).items()}
    return {"vector": words, **{k: f"{abs(v / exact - 1):.1e}" for k, v in found.items()}}


def accuracy(counts: Sequence[int], torch: Any) -> list[dict[str, str]]:
    """Rows of the second table, as mappings: not every library takes every dtype."""
    rows = []
    for dtype, kind in DTYPES.items():
        for count in counts:
            harness.progress("accuracy", dtype, f"{count:,} ones")
            rows.append(errors(f"{count:,} ones, {dtype}", np.ones(count, kind), torch))
        harness.progress("accuracy", dtype, f"{counts[-1]:,} normals")
        words = f"{counts[-1]:,} normals, {dtype}"
        rows.append(errors(words, normals(counts[-1], kind), torch))
    return rows


# --- the report ---

TEXT = """\
The norm of one vector of {megabytes:,} MB. Each is a program of its own; cells are medians over at
most {rounds} rounds and, in brackets, quartiles. The share of a plain read is the time of
`jnp.sum` (in float32) over that of the norm in the same round.

"""
ACCURACY = """\
Relative error of the norm against the norm of the same elements in float64; 1.2e-7 is one unit in
the last place of float32, 7.8e-3 that of bfloat16.

"""


def measure(args: argparse.Namespace) -> str:
    """Both tables."""
    counts = harness.numbers("--elements", args.elements)
    megabytes = harness.number("--megabytes", args.megabytes)
    torch, skipped = harness.torch_beside_jax()
    rows = []
    for dtype in DTYPES:
        harness.progress("bandwidth", dtype)
        size = megabytes * 10**6
        rows += bandwidth(dtype, size, torch, rounds=args.rounds, seconds=args.seconds)
    header = ["dtype", "norm", "ms", "GB/s", "share of a plain read"]
    header += ["share of the peak"] if harness.peak_bandwidth() is not None else []
    exact = accuracy(counts, torch)
    names = list(exact[0])
    cells = [[row.get(name, "") for name in names] for row in exact]
    parts = [TEXT.format(megabytes=megabytes, rounds=args.rounds), skipped]
    parts += [harness.table(header, rows), "\n", ACCURACY, harness.table(names, cells)]
    return "".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; bad input ends in one line on stderr and exit status 2."""
    parser = harness.command_line("Measure the norm alone: speed and error.")
    add = parser.add_argument
    add("--megabytes", default="256", help="size of the vector whose norm is timed (%(default)s)")
    add(
        "--elements",
        default="1e4,1e5,1e6,1e7,1e8",
        help="sizes of the vectors whose norm is checked, by comma (%(default)s)",
    )
    return harness.run("The norm alone", parser, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
