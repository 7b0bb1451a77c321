"""What a clip costs in communication, and whether it is right, on many devices.

    python benchmarks/collectives.py
    python benchmarks/collectives.py --leaves 1,50 --mesh data=2,model=2 --out results.md

It compiles the clip alone (updates in, clipped updates and state out, the updates donated) in every
way of running JAX on many devices, for this library and for `optax.clip_by_global_norm`, and counts
the collectives in the compiled program; then it runs both and compares with one device. With no
other platform it forces eight devices on the CPU; elsewhere it takes the devices that are there.
"""

import argparse
import contextlib
import datetime
import functools
import itertools
import math
import os
import platform
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

# Read when jax first asks for devices, and about the CPU alone. A number that is there already
# stays, as the last one counts.
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_force_host_platform_device_count=8", os.environ.get("XLA_FLAGS", "")]
)

import jax
import numpy as np
import optax
from harness import table
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import gradclip_jax

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
MAX_NORM = 1.0
NUMBERS_PER_NORM = 3
"""A norm is summed over devices as one number, or as three of different scales."""


class Collective(NamedTuple):
    """A collective in a compiled program."""

    kind: str
    sizes: tuple[int, ...]
    """Elements of each operand on one device; XLA combines many collectives into one."""
    bytes: int
    """Bytes of all operands on one device."""
    group: int | None
    """Devices among which it communicates; None for all, or where the program does not say."""
    conditional: bool
    """Whether it is in a branch of a conditional, so that it may not run."""

    @property
    def reshards(self) -> bool:
        """Whether it may move gradients: it does more than sum a few numbers."""
        return self.kind != "all-reduce" or max(self.sizes, default=0) > NUMBERS_PER_NORM


# --- the compiled program ---


def collectives(program: str) -> list[Collective]:
    """The collectives of a program in HLO text: each counts once, in a loop too."""
    computations = _computations(program)
    always, maybe = _reached(computations)
    found = []
    for name, lines in computations.items():
        if name in always or name in maybe:
            types: dict[str, str] = {}
            for line in lines:
                one = _collective(line, types, name not in always)
                # What is among one device moves nothing.
                if one is not None and one.group != 1:
                    found.append(one)
    return found


_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT\s+)?%?([\w.\-]+)\s+=\s+(.*)$")
# Of an asynchronous pair only the start has the operands, and only it is counted.
_KIND = re.compile(rf"\s(ragged-all-to-all|collective-broadcast|{'|'.join(KINDS)})(?:-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_CALLED_LIST = re.compile(r"(?:calls|called_computations)=\{([^}]*)\}")
_BRANCH = re.compile(r"(?:true_computation|false_computation)=%?([\w.\-]+)")
_BRANCH_LIST = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d\w*)\[([^\]]*)\]")


def _computations(program: str) -> dict[str, list[str]]:
    """The instructions of each computation; the entry has the name ENTRY."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in program.splitlines():
        if header := _HEADER.match(line):
            lines = computations.setdefault("ENTRY" if header[1] else header[2], [])
        else:
            # Strings that quote an operation, and comments that count operands, are no part of it.
            lines.append(re.sub(r", metadata=\{.*|/\*.*?\*/", "", line))
    return computations


def _reached(computations: dict[str, list[str]]) -> tuple[set[str], set[str]]:
    """Computations that always run, and those that do in some branch of a conditional."""
    always: set[str] = set()
    maybe: set[str] = set()
    pending = [("ENTRY", always)]
    while pending:
        name, reached = pending.pop()
        if name in reached or name not in computations:
            continue
        reached.add(name)
        text = "\n".join(computations[name])
        pending += [(callee, reached) for callee in _named(text, _CALLED, _CALLED_LIST)]
        pending += [(callee, maybe) for callee in _named(text, _BRANCH, _BRANCH_LIST)]
    return always, maybe


def _named(text: str, one: re.Pattern[str], many: re.Pattern[str]) -> Iterator[str]:
    yield from one.findall(text)
    for listed in many.findall(text):
        yield from (name.strip().lstrip("%") for name in listed.split(","))


def _collective(line: str, types: dict[str, str], conditional: bool) -> Collective | None:
    """The collective in a line, if there is one; the type of every result goes to `types`."""
    instruction = _INSTRUCTION.match(line)
    if instruction is None:
        return None
    name, rest = instruction.groups()
    # The type comes first: `f32[2,3]{1,0} multiply(…)`.
    types[name] = re.split(r"\s[a-z][\w\-]*\(", rest, maxsplit=1)[0]
    found = _KIND.search(rest)
    if found is None:
        return None
    arrays = []
    for operand in _operands(rest[found.end() :]):
        # Some printers write the type of an operand before its name, others the name alone.
        arrays += _ARRAY.findall(operand if "[" in operand else types[operand.lstrip("%")])
    sizes = tuple(_elements(shape) for _, shape in arrays)
    total = sum(math.ceil(n * _bits(kind) / 8) for n, (kind, _) in zip(sizes, arrays, strict=True))
    return Collective(found[1], sizes, total, _group_size(rest), conditional)


def _operands(text: str) -> list[str]:
    """What stands between an opened parenthesis and the one that closes it, cut at its commas."""
    depth, start, parts = 0, 0, []
    for i, character in enumerate(text):
        if character in ")]}" and depth == 0:
            return [part.strip() for part in [*parts, text[start:i]] if part.strip()]
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return []


def _elements(shape: str) -> int:
    # A dimension may be bounded (`<=8`) instead of fixed.
    return math.prod(int(size.strip("<=")) for size in shape.split(",") if size)


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])


def _group_size(text: str) -> int | None:
    """Devices in each of the `replica_groups`, of which XLA knows three notations."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        whole = dict(re.findall(r"('\w+')=(\d+)", mesh[1]))
        # Part of an axis is written `'axis_0':(2)4`: 4 devices, of which the next is 2 further on.
        named = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or whole[axis]) for axis, part in named)
    return None


# --- what is compiled ---

Program = Callable[[Any], Any]


class Style(NamedTuple):
    """A way of running on many devices."""

    name: str
    specs: Callable[[Mesh, int], dict[str, P]]
    """How each of so many leaves is split."""
    axis_name: Callable[[dict[str, P]], Any]
    """What this library must be told there."""
    run: Callable[[Program, Mesh, dict[str, P]], Any]
    """The function to compile."""
    axis_type: AxisType = AxisType.Auto
    stacked: bool = False
    """Whether arrays have a first axis of devices, as in `pmap`."""


def update_of(make: Callable[..., Any], axis_name: Any = None) -> Program:
    """One update of a clip, from a new state."""
    clip = make(MAX_NORM, axis_name=axis_name)

    def update(updates: Any) -> Any:
        return clip.update(updates, clip.init(updates))

    return update


def whole(devices: int, count: int) -> dict[str, np.ndarray]:
    """A square matrix for each leaf, of a size that every layout divides."""
    side = 2 * devices
    draw = np.random.default_rng(0)
    return {f"leaf{i}": 10 * draw.standard_normal((side, side), np.float32) for i in range(count)}


def mixed(mesh: Mesh, count: int) -> dict[str, P]:
    """Leaves split along both axes, the first, the second, both as a pair, and not at all."""
    data, model = mesh.axis_names
    layouts = (P(data, model), P(data), P(None, model), P((data, model)), P())
    return {f"leaf{i}": spec for i, spec in zip(range(count), itertools.cycle(layouts))}


def split(mesh: Mesh, count: int) -> dict[str, P]:
    """Every leaf split over all devices."""
    return {f"leaf{i}": P(mesh.axis_names) for i in range(count)}


def replicated(mesh: Mesh, count: int) -> dict[str, P]:
    """Every leaf the same on all devices."""
    del mesh
    return {f"leaf{i}": P() for i in range(count)}


def jitted(program: Program, mesh: Mesh, specs: dict[str, P]) -> Any:
    """Under `jit`, which reads the shardings of its arguments."""
    del mesh, specs
    return jax.jit(program, donate_argnums=0)


def checked(program: Program, mesh: Mesh, specs: dict[str, P], check_vma: bool = True) -> Any:
    """Under `shard_map`, where the types tell what is split."""
    out = (specs, P())
    inside = jax.shard_map(
        program, mesh=mesh, in_specs=(specs,), out_specs=out, check_vma=check_vma
    )
    return jax.jit(inside, donate_argnums=0)


def unchecked(program: Program, mesh: Mesh, specs: dict[str, P]) -> Any:
    """Under `shard_map` with `check_vma=False`, where they do not."""
    return checked(program, mesh, specs, check_vma=False)


def pmapped(program: Program, mesh: Mesh, specs: dict[str, P]) -> Any:
    """Under `pmap`, where they do not either."""
    del specs
    devices = mesh.devices.flatten().tolist()
    return jax.pmap(program, axis_name="i", devices=devices, donate_argnums=0)


def types_tell(specs: dict[str, P]) -> None:
    """Nothing has to be told."""
    del specs


STYLES = [
    Style("jit, auto axes", mixed, types_tell, jitted),
    Style("jit, explicit axes", mixed, types_tell, jitted, AxisType.Explicit),
    Style("shard_map, checked", mixed, types_tell, checked),
    Style("shard_map, unchecked", mixed, lambda specs: specs, unchecked),
    Style("pmap, gradients averaged", replicated, lambda specs: (), pmapped, stacked=True),
    Style("pmap, gradients split", split, lambda specs: "i", pmapped, stacked=True),
]
ALL_SPLIT = Style("shard_map, checked, every leaf split", split, types_tell, checked)

LIBRARIES: dict[str, Callable[..., Any]] = {
    "gradclip_jax": gradclip_jax.clip_by_global_norm,
    "optax": lambda max_norm, axis_name: optax.clip_by_global_norm(max_norm),
}


class Case(NamedTuple):
    """A clip, made for one style, and how its leaves are split."""

    style: Style
    mesh: Mesh
    specs: dict[str, P]
    make: Callable[..., Any]

    def compiled(self) -> Any:
        """The program of the clip alone on many devices."""
        program = update_of(self.make, self.style.axis_name(self.specs))
        # Explicit axes need a mesh that is set; pmap takes none but its own.
        with contextlib.nullcontext() if self.style.stacked else jax.set_mesh(self.mesh):
            function = self.style.run(program, self.mesh, self.specs)
            return function.lower(self.gradients()).compile()

    def gradients(self) -> dict[str, jax.Array]:
        """The numbers of `whole`, split over the devices."""
        placed = {}
        for name, leaf in whole(self.mesh.size, len(self.specs)).items():
            spec = self.specs[name]
            if self.style.stacked:
                rows = (self.mesh.size, -1, leaf.shape[-1])
                alike = spec == P()
                leaf = np.stack([leaf] * self.mesh.size) if alike else leaf.reshape(rows)
                spec = P(self.mesh.axis_names)
            placed[name] = jax.device_put(leaf, NamedSharding(self.mesh, spec))
        return placed

    def parts(self, updates: dict[str, jax.Array]) -> Iterator[list[np.ndarray]]:
        """Each part of each leaf, as all devices hold it that should hold the same."""
        for name, leaf in updates.items():
            one_part = self.style.stacked and self.specs[name] == P()
            copies: dict[str, list[np.ndarray]] = {}
            for shard in leaf.addressable_shards:
                place = "all" if one_part else str(shard.index)
                copies.setdefault(place, []).append(np.asarray(shard.data))
            yield from copies.values()


def prepare(style: Style, make: Callable[..., Any], mesh: Mesh, count: int) -> Case:
    """A clip of so many leaves in one style."""
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(style.axis_type,) * 2)
    return Case(style, mesh, style.specs(mesh, count), make)


# --- the tables ---


def communication(case: Case) -> list[str]:
    """Cells: collectives, their operands and bytes, those that may not run, and resharding."""
    try:
        found = collectives(case.compiled().as_text())
    except Exception as error:  # What optax raises is a result.
        return [first_words(error), "", "", "", ""]
    always = [one for one in found if not one.conditional]
    return [
        counted(always),
        str(sum(len(one.sizes) for one in always)),
        f"{sum(one.bytes for one in always):,}",
        counted([one for one in found if one.conditional]),
        counted([one for one in found if one.reshards], none="no"),
    ]


def correctness(case: Case) -> list[str]:
    """Cells: whether the norm is that of one device, whether copies agree, and collectives."""
    try:
        compiled = case.compiled()
        updates, _ = compiled(case.gradients())
    except Exception as error:  # What optax raises is a result.
        return [first_words(error), "", ""]
    parts = list(case.parts(updates))
    norm = norm_of(copies[0] for copies in parts)
    expected = norm_on_one_device(case.make, case.mesh, len(case.specs))
    right = math.isclose(norm, expected, rel_tol=1e-6)
    # A part that one device alone holds has nothing to agree with.
    shared = [copies for copies in parts if len(copies) > 1]
    equal = all(copy.tobytes() == copies[0].tobytes() for copies in shared for copy in copies)
    always = [one for one in collectives(compiled.as_text()) if not one.conditional]
    return [
        "yes" if right else f"no ({norm:.3g})",
        ("yes" if equal else "no") if shared else "no such leaf",
        counted(always),
    ]


@functools.cache
def norm_on_one_device(make: Callable[..., Any], mesh: Mesh, count: int) -> float:
    """The norm of the same leaves, clipped on the first device of the mesh alone."""
    updates = jax.device_put(whole(mesh.size, count), mesh.devices.flat[0])
    return norm_of(jax.jit(update_of(make))(updates)[0].values())


def norm_of(arrays: Iterable[Any]) -> float:
    """The norm of all arrays together, in float64."""
    return math.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in arrays))


def counted(found: Sequence[Collective], none: str = "0") -> str:
    """The number of collectives of each kind."""
    counts = Counter(one.kind for one in found)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or none


def first_words(error: Exception) -> str:
    """An error as a cell."""
    words = f"{type(error).__name__}: {error}".replace("|", "/").split()
    return f"error: {' '.join(words[:12])} …"


def report(mesh: Mesh, counts: Sequence[int], command: str) -> str:
    """Both tables, and what they were made with."""
    costs, checks = [], []
    for count, style in itertools.product(counts, STYLES):
        for name, make in LIBRARIES.items():
            print(f"{count} leaves, {style.name}, {name}", file=sys.stderr)
            cells = communication(prepare(style, make, mesh, count))
            costs.append([str(count), style.name, name, *cells])
    for style in [*STYLES[:3], ALL_SPLIT, *STYLES[3:]]:
        cases = [prepare(style, make, mesh, count=5) for make in LIBRARIES.values()]
        ours, theirs = map(correctness, cases)
        checks.append([style.name, *itertools.chain(*zip(ours, theirs, strict=True))])
    axes = " × ".join(f"{name}={size}" for name, size in mesh.shape.items())
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib", "optax"))
    return TEXT.format(
        command=command,
        versions=versions,
        python=platform.python_version(),
        devices=devices_in_words(mesh),
        axes=axes,
        date=datetime.date.today().isoformat(),
        numbers=NUMBERS_PER_NORM,
        side=2 * mesh.size,
        correctness=table(
            ["style", *(f"{what}: {who}" for what in CHECKED for who in LIBRARIES)], checks
        ).strip(),
        communication=table(["leaves", "style", "library", *COUNTED], costs).strip(),
    )


CHECKED = ("norm equals one device", "replicated leaves stay equal", "collectives per update")
COUNTED = ("collectives", "operands", "bytes", "more after an overflow", "resharding")
TEXT = """\
# Collectives of a clip

`{command}`

{versions}, Python {python}, {devices}; mesh {axes}. Date: {date}.

The program is one update of `clip_by_global_norm(1.0)` alone, compiled with its updates
donated. Leaves are float32 matrices of {side} × {side}.

## Right, and at what price

Five leaves, one of each layout: split along both mesh axes, along the first, along the second,
along both as a pair, and replicated. In pmap all are split along the rows, or none is. The norm is
that of the clipped gradient, right when it is within 1e-6 of that of one device; replicated leaves
are equal when all devices hold the same bits. Where leaves are split, a clip without collectives
measures the part of each device alone.

{correctness}

## What the clip communicates

Leaves cycle through the five layouts. Collectives are counted in the compiled program: an
asynchronous pair is one, and one that XLA combined of many is one with many operands. Bytes are
those of the operands on one device, which is what each device puts in; what crosses the wires
depends on the algorithm (a ring moves nearly twice as much). Those that may not run are in a branch
of a conditional: the sum of squares is taken again, scaled, when it overflowed or underflowed.
Resharding is anything but an all-reduce of at most {numbers} numbers: one for each norm, or three
where sums of different scales are kept apart.

{communication}
"""


# --- the command line ---


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; bad input ends in one line on stderr and exit status 2."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description="Count the collectives of a clip.")
    parser.add_argument("--leaves", default="1,50,500", help="numbers of leaves (%(default)s)")
    parser.add_argument("--mesh", help="two axes and their sizes (data=4,model=2 of 8 devices)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the tables, too")
    args = parser.parse_args(given)
    try:
        counts = leaf_counts(args.leaves)
        mesh = make_mesh(args.mesh, jax.devices())
        if args.out is not None:
            check_writable(args.out)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    text = report(mesh, counts, shlex.join(["python", "benchmarks/collectives.py", *given]))
    print(text, end="")
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")
    return 0


class InputError(Exception):
    """Bad input, in one line that names the argument, the rule and the value."""


def check_writable(file: Path) -> None:
    """Finds out before the work is done."""
    try:
        file.open("a").close()
    except OSError as error:
        raise InputError(
            f"`--out` must be a file that can be written, got {file}: {error.strerror}."
        ) from None


def leaf_counts(text: str) -> list[int]:
    """The numbers of leaves."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise InputError(f"`--leaves` must be positive whole numbers as in 1,50,500, got {text!r}.")
    return [int(count) for count in text.split(",")]


def make_mesh(text: str | None, devices: Sequence[Any]) -> Mesh:
    """A mesh of two axes over the first of the devices."""
    count = len(devices)
    if count < 2:
        raise InputError(
            f"at least 2 devices are needed, got 1 ({devices[0].device_kind}): with "
            "JAX_PLATFORMS=cpu in the environment this runs on 8 CPU devices."
        )
    if text is None:
        text = f"data={count // 2},model=2" if count % 4 == 0 else f"data={count},model=1"
    found = re.fullmatch(r"([a-z]\w*)=([1-9]\d*),([a-z]\w*)=([1-9]\d*)", text)
    if found is None or found[1] == found[3]:
        raise InputError(f"`--mesh` must be two axes as in data=4,model=2, got {text!r}.")
    names, shape = (found[1], found[3]), (int(found[2]), int(found[4]))
    if not 2 <= math.prod(shape) <= count:
        raise InputError(
            f"`--mesh` must have 2 to {count} devices, as many as there are, got {text!r}."
        )
    return Mesh(np.array(devices[: math.prod(shape)]).reshape(shape), names)


def devices_in_words(mesh: Mesh) -> str:
    """What the devices are, and whether they are devices at all."""
    device = mesh.devices.flat[0]
    words = f"{mesh.size} devices of kind {device.device_kind} (platform {device.platform})"
    if device.platform == "cpu":
        words += f", forced on one machine with {os.cpu_count()} cores"
    return words


if __name__ == "__main__":
    sys.exit(main())
