"""The benchmark of collectives: what it reads in a compiled program, and that its verdicts hold."""

import os
import subprocess
import sys
from pathlib import Path

import collectives as benchmark
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import gradclip_jax

ROOT = Path(__file__).parents[2]


def entry(*lines):
    """A program of these instructions."""
    return "\n".join(["ENTRY %main (x: f32[]) -> f32[] {", *(f"  {line}" for line in lines), "}"])


def only(*lines):
    (one,) = benchmark.collectives(entry(*lines))
    return one


LINES = {
    "a scalar": (
        [
            "%x = f32[] parameter(0)",
            "ROOT %all-reduce.3 = f32[] all-reduce(%x), channel_id=4, "
            "replica_groups=[4,2]<=[8], use_global_device_ids=true, to_apply=%add",
        ],
        ("all-reduce", (1,), 4, 2),
    ),
    "a tuple that XLA combined": (
        [
            "%x = f32[2,3]{1,0} parameter(0)",
            "%y = bf16[5]{0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%fused",
            "%sums = (f32[2,3]{1,0}, bf16[5]{0}) all-reduce(%x, /*index=1*/%y), "
            "replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add",
        ],
        ("all-reduce", (6, 5), 34, 4),
    ),
    "the start of an asynchronous pair": (
        [
            "%x = f32[3]{0} parameter(0)",
            "%start = f32[3]{0} all-reduce-start(%x), replica_groups={}, to_apply=%add",
            "ROOT %done = f32[3]{0} all-reduce-done(%start)",
        ],
        ("all-reduce", (3,), 12, None),
    ),
    "one whose start has a tuple for a type": (
        [
            "%x = s8[4,2]{1,0} parameter(0)",
            "%start = (s8[4,2]{1,0}, s8[16,2]{1,0}) all-gather-start(%x), dimensions={0}, "
            "replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}",
            "ROOT %done = s8[16,2]{1,0} all-gather-done(%start)",
        ],
        ("all-gather", (8,), 8, 4),
    ),
    "operands with their types": (
        ["%r = f32[2]{0} reduce-scatter(f32[8]{0} %x), replica_groups={{0,1,2,3}}, to_apply=%add"],
        ("reduce-scatter", (8,), 32, 4),
    ),
    "part of a mesh axis": (
        ["%r = c64[] all-reduce(c64[] %x), replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}"],
        ("all-reduce", (1,), 8, 2),
    ),
    "two mesh axes": (
        ["%r = pred[7] all-to-all(pred[7] %x), replica_groups=mesh['a'=4,'b'=2] {'a','b'}"],
        ("all-to-all", (7,), 7, 8),
    ),
    "pairs of devices": (
        ["%r = f8e4m3fn[9] collective-permute(f8e4m3fn[9] %x), source_target_pairs={{0,1},{1,0}}"],
        ("collective-permute", (9,), 9, None),
    ),
}


@pytest.mark.parametrize(("lines", "expected"), LINES.values(), ids=LINES)
def test_a_line_is_read(lines, expected):
    one = only(*lines)
    assert (one.kind, one.sizes, one.bytes, one.group) == expected
    assert not one.conditional


@pytest.mark.parametrize(
    "line",
    [
        "%all-reduce.1 = f32[] get-tuple-element(%all-reduce), index=0",
        '%y = f32[] negate(%x), metadata={op_name="jit(f)/ all-gather(x)"}',
        "%y = f32[] fusion(%all-reduce.7), kind=kLoop, calls=%fused",
        "%alone = f32[] all-reduce(f32[] %x), replica_groups={{0},{1}}, to_apply=%add",
        "%alone = f32[] all-reduce(f32[] %x), replica_groups=[8,1]<=[8], to_apply=%add",
    ],
)
def test_what_is_none_is_not_counted(line):
    assert benchmark.collectives(entry(line)) == []


def test_what_is_in_a_branch_may_not_run():
    program = """\
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}
%taken (x.1: f32[]) -> f32[] {
  ROOT %first = f32[] all-reduce(f32[] %x.1), replica_groups={{0,1}}, to_apply=%add
}
%inner (x.2: f32[]) -> f32[] {
  ROOT %second = f32[] all-reduce(f32[] %x.2), replica_groups={{0,1}}, to_apply=%add
}
%called (x.3: f32[]) -> f32[] {
  ROOT %third = f32[4] all-gather(f32[2] %x.3), replica_groups={{0,1}}
}
%other (x.4: f32[]) -> f32[] {
  ROOT %call.1 = f32[] call(%x.4), to_apply=%inner
}
%unused (x.5: f32[]) -> f32[] {
  ROOT %fourth = f32[] all-reduce(f32[] %x.5), replica_groups={{0,1}}, to_apply=%add
}
ENTRY %main.5_spmd (x: f32[], p: s32[]) -> f32[] {
  %either = f32[] conditional(%p, %x, %x), branch_computations={%taken, %other}
  ROOT %call.2 = f32[] call(%either), to_apply=%called
}
"""
    found = benchmark.collectives(program)
    assert sorted((one.kind, one.conditional) for one in found) == [
        ("all-gather", False),
        ("all-reduce", True),
        ("all-reduce", True),
    ]
    assert [one.reshards for one in found] == [one.kind == "all-gather" for one in found]


def test_a_program_that_gathers_and_sums_is_seen_to(mesh_2d):
    """Four rows of eight float32 on each device: 128 bytes gathered, and one number summed."""
    x = jax.device_put(jnp.ones((16, 8)), NamedSharding(mesh_2d, P("data")))
    whole = NamedSharding(mesh_2d, P())

    def step(x):
        return jax.lax.with_sharding_constraint(2 * x, whole), jnp.sum(x)

    found = benchmark.collectives(jax.jit(step).lower(x).compile().as_text())
    assert sorted((one.kind, one.sizes, one.bytes, one.group) for one in found) == [
        ("all-gather", (32,), 128, 4),
        ("all-reduce", (1,), 4, 4),
    ]
    assert sorted(one.reshards for one in found) == [False, True]


def styles():
    return {style.name: style for style in [*benchmark.STYLES, benchmark.ALL_SPLIT]}


@pytest.mark.parametrize(
    ("name", "axis_name", "expected"),
    [
        # Eight parts of norm 1: √8.
        ("pmap, gradients split", (), ["no (2.83)", "no such leaf", "0"]),
        # Every copy counted: too small a factor, and the norm is too small with it.
        ("pmap, gradients averaged", "i", ["no (0.354)", "yes", "1 all-reduce"]),
    ],
)
def test_a_wrong_clip_is_found(name, axis_name, expected, mesh_2d):
    """What is told wrongly is measured wrongly, and the table says so."""
    style = styles()[name]._replace(axis_name=lambda specs: axis_name)
    case = benchmark.prepare(style, gradclip_jax.clip_by_global_norm, mesh_2d, 2)
    assert benchmark.correctness(case) == expected


def test_copies_that_differ_are_found(mesh_2d):
    """A norm of each device alone gives replicated leaves a factor of each device."""
    style = styles()["shard_map, unchecked"]._replace(axis_name=lambda specs: ())
    case = benchmark.prepare(style, gradclip_jax.clip_by_global_norm, mesh_2d, 5)
    assert benchmark.correctness(case)[1] == "no"


def rows_of(text):
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [line for line in lines if not line[0].startswith("---")]


def test_the_benchmark_runs_and_finds_this_library_right(tmp_path):
    """On eight devices that it forces itself, warnings being errors."""
    out = tmp_path / "collectives.md"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS")
    command = [sys.executable, "-W", "error", str(ROOT / "benchmarks" / "collectives.py")]
    options = ["--leaves", "1,2", "--out", str(out)]
    done = subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert out.read_text() == done.stdout
    assert "8 devices of kind cpu" in done.stdout
    rows = rows_of(done.stdout)
    checks = {row[0]: row[1:] for row in rows if len(row) == 7}
    costs = [row for row in rows if len(row) == 8]
    assert set(checks) == {"style", *styles()}
    assert len(costs) == 1 + 2 * len(benchmark.STYLES) * 2
    for name in styles():
        assert checks[name][0] == "yes"
        assert checks[name][2] in ("yes", "no such leaf")
        assert "all-reduce" in checks[name][4] or name == "pmap, gradients averaged"
    # The page on many devices has both libraries in one cell each.
    shown = {"no such leaf": "–", "": "–"}
    page = (ROOT / "docs" / "many_devices.md").read_text()
    for name in styles():
        cells = [shown.get(x, "error" if x.startswith("error") else x) for x in checks[name]]
        pairs = [f"{ours} / {optax}" for ours, optax in zip(cells[::2], cells[1::2], strict=True)]
        assert f"\n| {name} | {' | '.join(pairs)} |\n" in page
    for leaves, style, library, found, operands, size, *_, reshards in costs[1:]:
        if library == "gradclip_jax":
            assert reshards == "no", (leaves, style)
        if library == "gradclip_jax" and leaves == "1" and "shard_map" in style:
            # One sum for each of three scales, in float32.
            assert (found, operands, size) == ("1 all-reduce", "1", "12")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--leaves", "1,0"],
            "`--leaves` must be positive whole numbers as in 1,50,500, got '1,0'",
        ),
        (["--leaves", "many"], "`--leaves` must be positive whole numbers"),
        (["--mesh", "data=8"], "`--mesh` must be two axes as in data=4,model=2, got 'data=8'"),
        (["--mesh", "data=4,data=2"], "`--mesh` must be two axes"),
        (["--mesh", "data=8,model=2"], "`--mesh` must have 2 to 8 devices, as many as there are"),
        (["--out", "nowhere/x.md"], "`--out` must be a file that can be written, got nowhere/x.md"),
        (["--out", "."], "`--out` must be a file that can be written, got .: Is a directory."),
    ],
)
def test_bad_input_is_named_and_ends_with_status_2(options, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert benchmark.main(options) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_one_device_is_too_few():
    with pytest.raises(benchmark.InputError, match=r"at least 2 devices .* JAX_PLATFORMS=cpu"):
        benchmark.make_mesh(None, jax.devices()[:1])


def test_without_a_mesh_all_devices_are_taken():
    assert dict(benchmark.make_mesh(None, jax.devices()).shape) == {"data": 4, "model": 2}
    assert dict(benchmark.make_mesh(None, jax.devices()[:2]).shape) == {"data": 2, "model": 1}
