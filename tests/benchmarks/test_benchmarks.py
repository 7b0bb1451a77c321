"""The benchmarks of speed: arithmetic on made-up times, and every script at its smallest."""

import importlib
import itertools
import math
import re
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import monitor_cost
import numpy as np
import pytest
from registry import public_limits, public_strategies

import gradclip_jax

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    name: importlib.import_module(name)
    for name in (
        "step_overhead", "norm", "compile_time", "strategies", "scaling", "per_example",
        "lstm_throughput",
    )
}  # fmt: skip
step_overhead, norm, compile_time, strategies, scaling, _, lstm_throughput = SCRIPTS.values()
BY_HAND = {"lstm_throughput"}  # `make bench` does not run it
# A program runs under the promotion that jax has by default.
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """No pauses, a tree that compiles at once, and no other framework."""
    monkeypatch.setattr(harness, "PAUSE", 0)
    tiny = step_overhead.Tree("a tiny tree", [(3, 2), (2,)])
    monkeypatch.setitem(step_overhead.TREES, "tiny", tiny)
    monkeypatch.setattr(step_overhead, "EAGER", {"3 elements": [(3,)]})
    recipe = lstm_throughput.PRESETS["zaremba-small"] | {"units": 4, "batch": 2, "unroll": 3}
    monkeypatch.setitem(lstm_throughput.PRESETS, "tiny", recipe)
    monkeypatch.setattr(lstm_throughput, "VOCABULARY", 11)
    peer = harness.peer
    monkeypatch.setattr(harness, "peer", lambda name: None if name == "torch" else peer(name))
    yield
    jax.config.update("jax_enable_compilation_cache", True)


# --- times ---


def made_up_clock(seconds):
    """A clock that is moved by the cases, and the cases: each takes the next of its seconds."""
    now, order = [0.0], []
    left = {name: iter(times) for name, times in seconds.items()}

    def case(name):
        order.append(name)
        now[0] += next(left[name])

    return lambda: now[0], {name: lambda name=name: case(name) for name in seconds}, order


def test_cases_run_in_turn_and_the_warm_up_is_not_counted():
    clock, cases, order = made_up_clock({"a": [9, 1, 2, 3], "b": [8, 4, 5, 6]})
    times = harness.interleaved(cases, rounds=3, clock=clock)
    assert "".join(order) == "abababab"
    assert times == {"a": [1, 2, 3], "b": [4, 5, 6]}


@pytest.mark.parametrize(("least", "rounds"), [(1, 3), (5, 5)])
def test_no_round_begins_after_the_time_is_over_but_the_first_ones(least, rounds):
    clock, cases, _ = made_up_clock({"a": itertools.repeat(1)})
    times = harness.interleaved(cases, rounds=30, seconds=2.5, least=least, clock=clock)
    assert len(times["a"]) == rounds


def test_rounds_are_compared_before_the_median_is_taken():
    # The machine is ten times slower in the second round: no single time tells the overhead.
    alone, ours, theirs = [1.0, 10.0, 1.0], [2.0, 20.0, 2.0], [5.0, 50.0, 5.0]
    assert harness.differences(ours, alone) == [1, 10, 1]
    assert harness.ratios(ours, alone) == [2, 2, 2]
    times = {"no clip": alone, "gradclip_jax": ours, "optax": theirs}
    row = step_overhead.Row(["tree"], times, {}, 1)
    assert row.overhead("gradclip_jax") == [1, 10, 1]
    assert row.relative("gradclip_jax", "optax") == (0.25, 0.25, 0.25)
    assert row.milliseconds("optax").median == 4000
    assert math.isnan(harness.ratios([1.0], [0.0])[0])


def test_the_spread_is_that_of_the_quartiles():
    spread = harness.Spread.of([5, 1, 4, 2, 3], 10)
    assert spread == (20, 30, 40)
    assert str(spread) == "30.0 (20.0 to 40.0)"
    assert str(harness.Spread.of([0.0012345] * 2)) == "0.00123 (0.00123 to 0.00123)"


@pytest.mark.parametrize(
    ("number", "words"),
    [(1234.5, "1,234"), (12.345, "12.3"), (-0.5, "-0.500"), (0.0, "0"), (math.nan, "nan")],
)
def test_numbers_have_three_digits_and_no_exponent(number, words):
    assert harness.digits(number) == words


def test_a_compiled_program_says_what_it_needs():
    program = harness.compiled(lambda x: (x * 2, jnp.sum(x)), jnp.ones(3), donate=(0,))
    assert program.instructions >= 4  # a parameter, a product, a sum, and the tuple
    assert program.seconds > 0
    assert program.temporary < 1000
    x = jnp.ones(3)
    doubled, total = program.run(x)
    assert doubled.tolist() == [2, 2, 2]
    assert total == 3
    assert x.is_deleted()


# --- the page of a machine ---


def test_a_section_takes_the_place_of_the_one_before():
    first = harness.page_with("", "## Norm\n\nold\n")
    both = harness.page_with(first, "## Steps\n\n### adamw\n")
    new = harness.page_with(both, "## Norm\n\nnew\n")
    assert new == f"# {harness.machine()}\n\n## Norm\n\nnew\n\n## Steps\n\n### adamw\n"


def test_the_page_has_the_name_of_the_machine(monkeypatch):
    monkeypatch.setattr(harness, "processor", lambda: "Intel(R) Xeon(R) CPU @ 2.20GHz")
    monkeypatch.setattr(harness.os, "cpu_count", lambda: 4)
    assert harness.slug() == "intel-xeon-cpu-2-20ghz-4-cores"


class Accelerator:
    platform, device_kind = "gpu", "NVIDIA H200"

    def memory_stats(self):
        return {"bytes_limit": 100, "bytes_in_use": 30}


def test_a_gpu_is_known_by_its_kind(monkeypatch):
    assert harness.peak_bandwidth() is None
    monkeypatch.setattr(harness.jax, "devices", lambda: [Accelerator()])
    assert harness.machine() == "NVIDIA H200"
    assert harness.slug() == "nvidia-h200"
    assert harness.peak_bandwidth() == 4.8e12
    assert harness.available_bytes() == 70


# --- what is measured ---


def test_trees_have_the_sizes_they_claim():
    sizes = {
        name: (len(tree.shapes), sum(math.prod(shape) for shape in tree.shapes))
        for name, tree in step_overhead.TREES.items()
    }
    assert sizes["large"] == (1, 2**24)
    assert sizes["gpt2"] == (148, 124_439_808)
    assert sizes["lstm"] == (7, 19_775_200)
    assert sizes["500"] == (500, 500 * 64 * 64)
    assert sizes["2000"] == (2000, 2000 * 32 * 32)


def test_in_a_mixed_tree_matrices_alone_are_bfloat16():
    kinds = {
        name: [str(np.dtype(step_overhead.dtype_of(shape, name))) for shape in [(2, 2), (2,)]]
        for name in step_overhead.DTYPES
    }
    assert kinds == {
        "float32": ["float32", "float32"],
        "bfloat16": ["bfloat16", "bfloat16"],
        "mixed": ["bfloat16", "float32"],
    }


@pytest.mark.parametrize("name", ["gradclip_jax", "optax"])
def test_the_clip_acts_in_the_steps_that_are_timed(name):
    arrays = [np.full(4, 3.0, np.float32)]
    cases, _, _ = step_overhead.jax_cases(arrays, "float32", "sgd", ["no clip", name])
    (before, _), _ = cases["no clip"]()
    before = float(before[0][0])  # 0.02 · 3 − 1e-3 · 3
    assert before == pytest.approx(0.057)
    (after, _), _ = cases[name]()
    assert before - float(after[0][0]) == pytest.approx(1e-3 * 0.5, rel=1e-3)


def test_what_is_measured_are_public_strategies_and_limits():
    named = {name for name in strategies.STRATEGIES if not name.startswith("limits.")}
    assert named <= {*public_strategies()}
    limits = {name.removeprefix("limits.") for name in {*strategies.STRATEGIES} - named}
    assert limits <= {*public_limits()}
    assert len(strategies.STRATEGIES) >= 25
    assert {*strategies.SLOW} < {*strategies.STRATEGIES}


def test_the_norm_of_a_long_vector_is_taken_in_chunks(monkeypatch):
    monkeypatch.setattr(norm, "CHUNK", 2)
    assert norm.exact_norm(np.array([1, 2, 4, 2], np.float32)) == 5
    x = norm.normals(5, np.float32)
    np.testing.assert_array_equal(x, np.random.default_rng(0).standard_normal(5, np.float32))


def test_the_lstm_takes_the_steps_of_the_example_and_clips():
    recipe = lstm_throughput.PRESETS["tiny"]
    steps = lstm_throughput.jax_steps(recipe)
    # With weights within 0.1 of 0 the network knows nothing.
    assert steps.loss == pytest.approx(math.log(11), rel=0.01)
    limited = lstm_throughput.jax_steps(recipe | {"max_norm": 1e-3})
    assert limited.norm == steps.norm > 1e-3
    free, held = (case.run(1) for case in (steps, limited))
    assert free["clipped"] == 0
    assert held["clipped"] == 1


# --- every script, at its smallest ---

SMALLEST = {
    "step_overhead": ["--trees", "tiny", "--dtypes", "mixed", "--optimizers", "sgd", "--eager"],
    "norm": ["--megabytes", "1", "--elements", "16"],
    "compile_time": ["--leaves", "2", "--step-leaves", "2"],
    "strategies": ["--trees", "tiny", "--strategies", "zclip,soft_spectral_clip"],
    "scaling": ["--parameters", "10,1e15", "--optimizers", "sgd"],
    "per_example": [
        "--networks", "dense,lstm,conv", "--batches", "3", "--microbatch", "2", "--width", "2"
    ],
    "lstm_throughput": ["--presets", "tiny"],
}  # fmt: skip
ROWS = {
    "step_overhead": ["| a tiny tree | mixed | sgd |", "| 3 elements |"],
    "norm": ["| bfloat16 | optax.tree.norm |", "| 16 ones, float32 | 0.0e+00 |"],
    "compile_time": ["### In front of AdamW", "| 2 |"],
    "strategies": ["### a tiny tree", "| `zclip` |", "| `soft_spectral_clip` |"],
    "scaling": [
        "| sgd | 10 |",
        "sgd, 1,000,000,000,000,000 parameters: skipped, as it needs 13200000",
    ],
    "per_example": [
        "### A network with two hidden layers of 2 units, 42 weights",
        "### A network with an LSTM of 2 units over 20 steps, 60 weights",
        "### A network with two convolutions to 2 channels on 8 × 8 images, 200 weights",
        "| 3 | 2 | gradclip_jax |", "| 3 | 3 | gradclip_jax, ghost |", "| 3 | 3 | optax |",
    ],
    "lstm_throughput": ["| tiny | 6 |"],
}  # fmt: skip


def run(name, *argv):
    return SCRIPTS[name].main([*SMALLEST[name], "--rounds", "1", *argv])


@pytest.mark.parametrize("name", SMALLEST)
def test_every_script_ends_in_tables_and_keeps_them(name, tmp_path, capsys):
    out = tmp_path / "results"
    assert run(name, "--out", str(out)) == 0
    printed = capsys.readouterr().out
    page = (out / f"{harness.slug()}.md").read_text()
    assert page == f"# {harness.machine()}\n\n{printed}"
    for row in ROWS[name]:
        assert f"\n{row}" in page
    assert f"`python benchmarks/{name}.py --" in page
    assert f"jax {jax.__version__}, " in page
    assert f"gradclip_jax {gradclip_jax.__version__}, " in page
    assert ("torch: not installed, skipped." in page) == (
        name in ("step_overhead", "norm", "lstm_throughput")
    )
    # Each row of a table has as many cells as its header.
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert [*out.glob("*.png")] == ([out / f"{harness.slug()}_scaling.png"] * (name == "scaling"))


BAD_INPUT = {
    ("step_overhead", "--trees", "oak"): "`--trees` must be some of large,lstm,gpt2,500,2000,tiny,",
    ("step_overhead", "--dtypes", ""): "`--dtypes` must be some of float32,bfloat16,mixed, each",
    ("step_overhead", "--rounds", "0"): "`--rounds` must be at least 1, got 0.",
    ("step_overhead", "--seconds", "nan"): "`--seconds` must be non-negative, got nan.",
    ("norm", "--megabytes", "1,2"): "`--megabytes` must be one number, got '1,2'.",
    ("norm", "--elements", "0"): "`--elements` must be positive whole numbers by comma, got '0'.",
    ("compile_time", "--leaves", "1.5"): "`--leaves` must be positive whole numbers by comma, got",
    ("compile_time", "--step-leaves", "ten"): "numbers by comma, got 'ten'.",
    ("strategies", "--strategies", "zclip,zclip"): "each once, got 'zclip,zclip'.",
    ("scaling", "--optimizers", "lion"): "`--optimizers` must be some of adamw,sgd, each once, got",
    ("scaling", "--parameters", "inf"): "`--parameters` must be positive whole numbers by comma",
    ("per_example", "--networks", "gru"): "`--networks` must be some of dense,lstm,conv, each",
    ("per_example", "--microbatch", "1,2"): "`--microbatch` must be one number, got '1,2'.",
    ("lstm_throughput", "--presets", "chatbot"): "must be some of zaremba-small,zaremba-medium,",
    ("scaling", "--out", "/dev/null/x"): "`--out` must be a directory that can be written, got",
}


@pytest.mark.parametrize("argv", BAD_INPUT, ids=" ".join)
def test_bad_input_ends_in_one_line_and_status_2(argv, capsys):
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert not out
    assert BAD_INPUT[argv] in err
    assert err.count("\n") == 1


def test_without_matplotlib_there_is_a_table_and_no_figure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "peer", lambda name: None)
    assert run("scaling", "--out", str(tmp_path)) == 0
    assert "matplotlib: not installed, no figure." in capsys.readouterr().out
    assert not [*tmp_path.glob("*.png")]


def test_the_makefile_runs_every_script():
    makefile = (ROOT / "Makefile").read_text()
    (names,) = re.findall(r"^BENCHMARKS = (.*)$", makefile, re.MULTILINE)
    assert names.split() == [name for name in SCRIPTS if name not in BY_HAND]


@pytest.mark.parametrize("of_adamw", [-1.0, 1.0])
@pytest.mark.parametrize("of_sgd", [-1.0, 1.0])
def test_scaling_is_drawn_also_where_noise_hid_what_a_clip_adds(of_adamw, of_sgd, tmp_path):
    def times(added: float) -> dict[str, list[float]]:
        return {"no clip": [2.0] * 3} | {name: [2.0 + added] * 3 for name in scaling.LINES}

    file = tmp_path / "scaling.png"
    scaling.draw({("AdamW", 10): times(of_adamw), ("SGD", 10): times(of_sgd)}, file)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_the_cost_of_the_monitor_ends_in_two_tables(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(monitor_cost, "CALLS", 3)
    small = ["--units", "4", "--batch", "2", "--unroll", "3", "--every", "2", "--rounds", "1"]
    try:
        assert monitor_cost.main([*small, "--out", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert monitor_cost.main([*small, "--every", "1,2"]) == 2
        assert "`--every` must be one number, got '1,2'." in capsys.readouterr().err
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    for row in ("no monitor", "metrics in the step, monitor", "metrics(state)", "record"):
        assert f"\n| {row} |" in printed
