"""What a program does, read off the text of the HLO that the compiler of a TPU or GPU made of it.

Estimated cycles are the TPU compiler's own cost model of each fusion, not a time: scalar operations
and collectives count nothing, and neither does the copy that puts an operand into VMEM beforehand.
Compare variants that were compiled in the same run.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
ALONE = ("copy", "convolution", "dot", "reduce", "sort", "scatter", "dynamic-update-slice")
"""Operations that are kernels where no fusion holds them."""
UNKNOWN = 2**63 - 1
"""Estimated cycles of a fusion of which the compiler does not know them."""
WIDTHS = {"pred": 8, "token": 0, "opaque": 0}


class Instruction(NamedTuple):
    """One line of HLO."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def cycles(self) -> int:
        """Cycles that the compiler estimates; 0 where it says none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found and int(found[1]) < UNKNOWN else 0

    @property
    def is_fusion(self) -> bool:
        """Whether it is one kernel made of many operations, asynchronous or not."""
        return self.opcode in ("fusion", "fusion-start")

    @property
    def is_kernel(self) -> bool:
        """Whether it is launched on its own; the rest is free, control flow or a collective."""
        if self.opcode == "custom-call":  # those of the name only name memory
            return not re.search(r'"(AllocateBuffer|ConcatBitcast)"', self.attributes)
        return self.is_fusion or self.opcode in ALONE

    @property
    def collective(self) -> str | None:
        """The collective that this begins, or None; an asynchronous pair counts once."""
        name = self.opcode.removesuffix("-start")
        return name if name in COLLECTIVES else None


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError(f"`text` must close its parentheses, got {text[start : start + 80]!r}.")


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    begin = found.end()
    end = _closing(line, begin) if line[begin] == "(" else line.index(" ", begin)
    call = line.index("(", end)
    close = _closing(line, call)
    operands = tuple(re.findall(r"%([\w.\-]+)", line[call:close]))
    return Instruction(found[1], line[begin:end], line[end:call].strip(), operands, line[close:])


def size(type_: str, hbm: bool = True) -> int:
    """Bytes of a type, of its arrays in HBM alone if asked so: `S(1)` in a layout is VMEM."""
    total = 0.0
    for dtype, shape, layout in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?", type_):
        if hbm and re.search(r"S\([1-9]\)", layout):
            continue
        bits = WIDTHS.get(dtype) or int((re.findall(r"^[a-z]+(\d+)", dtype) or [0])[0])
        total += bits / 8 * prod([int(n) for n in shape.split(",") if n])
    return int(total)


class Hlo:
    """The computations of a module."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                current = self.computations[found[2]] = []
                self.entry = found[2] if found[1] else self.entry
            elif (one := _instruction(line)) is not None:
                current.append(one)
        self.types: dict[str, Mapping[str, str]] = {
            name: {one.name: one.type for one in lines} for name, lines in self.computations.items()
        }

    def reached(self, start: str, fusions: bool = False) -> Iterator[tuple[str, Instruction]]:
        """Each instruction that runs whenever `start` does, with the name of its computation.

        What a loop holds counts once, what a branch holds not at all, and what is inside of a
        fusion if asked for.
        """
        for one in self.computations[start]:
            yield start, one
            if one.opcode == "conditional" or (one.is_fusion and not fusions):
                continue
            called = r"\b(?:calls|body|condition|called_computations)=\{?%?([\w.\-]+)"
            for name in re.findall(called, one.attributes):
                yield from self.reached(name, fusions)

    def branches(self, start: str) -> list[str]:
        """The computations of all branches, those within branches included."""
        found: list[str] = []
        for _, one in self.reached(start):
            if one.opcode == "conditional":
                listed = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
                text = listed[1] if listed else one.attributes
                names = r"%([\w.\-]+)" if listed else r"_computation=%?([\w.\-]+)"
                for name in re.findall(names, text):
                    found += [name, *self.branches(name)]
        return found

    def operand_bytes(self, computation: str, one: Instruction, hbm: bool = True) -> int:
        """Bytes of the operands, of which each counts once."""
        types = self.types[computation]
        return sum(size(types.get(name, ""), hbm) for name in set(one.operands))

    def bytes_moved(self, computation: str, one: Instruction) -> int:
        """Bytes of HBM that an instruction reads and writes, as if nothing were kept between."""
        if one.opcode == "copy-start":  # its type has both ends
            return size(one.type)
        if one.opcode == "slice-start":  # ((the whole), the slice in VMEM, a counter)
            return size(one.type[_closing(one.type, 1) :].rpartition(",")[0], hbm=False)
        return self.operand_bytes(computation, one) + size(one.type) if one.is_kernel else 0

    def collectives(self, starts: Iterable[str]) -> tuple[dict[str, int], int]:
        """How many of each kind run whenever these do, and the bytes of their operands."""
        lines = [line for start in starts for line in self.reached(start, fusions=True)]
        found = [(name, one) for name, one in lines if one.collective]
        total = sum(self.operand_bytes(name, one, False) for name, one in found)
        return dict(Counter(str(one.collective) for _, one in found)), total


@dataclass(frozen=True)
class Facts:
    """What a compiled program does at each step, and what it holds."""

    kernels: int
    """Fusions, copies and calls of libraries: the nodes of a CUDA graph. A loop counts once."""
    fusions: int
    copies: int
    cycles: int
    branch_cycles: int
    """Of all branches together, of which at most one in a conditional runs."""
    bytes: int
    """Of HBM, read and written by the kernels and asynchronous copies that always run."""
    conditionals: int
    loops: int
    collectives: dict[str, int] = field(default_factory=dict)
    collective_bytes: int = 0
    """Of the operands on one device."""
    branch_collectives: dict[str, int] = field(default_factory=dict)
    branch_collective_bytes: int = 0
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporary: int = 0
    seconds: float = 0.0
    """CPU seconds to trace, lower and compile it."""
    host_synchronizations: int | None = None
    """Of a GPU: branches and loops for which the host waits; None on TPU, where it never does."""


def facts(text: str, **measured: Any) -> Facts:
    """The facts of the text of an optimized module, and those that were measured otherwise."""
    hlo = Hlo(text)
    branches = hlo.branches(hlo.entry)
    always = list(hlo.reached(hlo.entry))
    opcodes = Counter(one.opcode for _, one in always)
    found, moved = hlo.collectives([hlo.entry])
    found_in_branches, moved_in_branches = hlo.collectives(branches)
    return Facts(
        kernels=sum(one.is_kernel for _, one in always),
        fusions=sum(one.is_fusion for _, one in always),
        copies=opcodes["copy"],
        cycles=sum(one.cycles for _, one in always),
        branch_cycles=sum(one.cycles for name in branches for _, one in hlo.reached(name)),
        bytes=sum(hlo.bytes_moved(name, one) for name, one in always),
        conditionals=opcodes["conditional"],
        loops=opcodes["while"],
        collectives=found,
        collective_bytes=moved,
        branch_collectives=found_in_branches,
        branch_collective_bytes=moved_in_branches,
        **measured,
    )


def host_synchronizations(thunks: str, text: str) -> int:
    """Times that the host waits for a GPU in a step, by the dump of its sequence of thunks.

    A conditional that is not part of a command buffer (a CUDA graph) copies its predicate to the
    host and waits for it, and so does a loop of unknown length. What a loop holds counts once.
    """
    hlo = Hlo(text)
    loops = [one for _, one in hlo.reached(hlo.entry) if one.opcode == "while"]
    waits = sum("known_trip_count" not in one.attributes for one in loops)
    within = -1  # the indent of the command buffer or conditional around
    for indent, kind in re.findall(r"^( *)\d+: k(\w+)", thunks, re.MULTILINE):
        if 0 <= within < len(indent):
            continue
        within = len(indent) if kind in ("CommandBuffer", "Conditional") else -1
        waits += kind == "Conditional"
    return waits
