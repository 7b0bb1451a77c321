"""The run on a device, at its smallest on CPU: its page, its failures, and what it compares."""

import re
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np
import on_device
import optax
import programs
import pytest

# A program runs under the promotion that jax has by default.
pytestmark = pytest.mark.usefixtures("standard_promotion")
EXPERTS = on_device.EXPERTS


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """One step, one update, four strategies, and no pauses."""
    monkeypatch.setattr(harness, "PAUSE", 0)
    monkeypatch.setattr(on_device, "ROWS", [("matmul step", "mixed"), (EXPERTS, "bfloat16")])
    monkeypatch.setattr(on_device, "CAPTURED", ["matmul step"])
    monkeypatch.setattr(on_device, "REDUCED", ["matmul step"])
    monkeypatch.setitem(
        on_device.SMALL,
        EXPERTS,
        lambda *args, **kwargs: programs.update({"w": (4, 3)}, *args, **kwargs),
    )
    known = {name: on_device.STRATEGIES[name] for name in ("clip_by_value", "spectral_clip")}
    monkeypatch.setattr(on_device, "STRATEGIES", known)
    monkeypatch.setattr(on_device, "BESIDE", {"optax.clip": lambda: optax.clip(1.0)})
    guard = on_device.OPTIMIZERS["skip_nonfinite"]
    monkeypatch.setattr(on_device, "OPTIMIZERS", {"skip_nonfinite": guard})
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def run(*argv):
    return on_device.main(["--small", "--rounds", "2", "--seconds", "0", *argv])


def page_in(out):
    return (out / f"small_on_{harness.slug()}.md").read_text()


def test_one_command_writes_a_page_with_all_sections_and_ends_in_a_short_table(tmp_path, capsys):
    assert run("--out", str(tmp_path)) == 0
    printed, page = capsys.readouterr().out, page_in(tmp_path)
    for heading, _ in on_device.SECTIONS.values():
        assert f"\n## {heading}\n" in page
    rows = ["| matmul step | mixed | ", f"| {EXPERTS} | bfloat16 | ", "| matmul step | without | "]
    rows += ["| AdamW alone | ", "| `clip_by_value` | ", "| `spectral_clip` | "]
    rows += ["| `skip_nonfinite` | ", "| `optax.clip` | "]
    for row in rows:
        assert f"\n{row}" in page
    assert f"jax {jax.__version__}, " in page
    assert "`PYTHONPATH=. python3 benchmarks/on_device.py --small " in page
    assert "Date" not in page
    # Each row of a table has as many cells as its header.
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    last = printed.rstrip().splitlines()[-4:]
    assert last[0] == "| program | dtype | optax / none | gradclip_jax / none | " + (
        "gradclip_jax / optax | overhead / optax's |"
    )
    assert "(" not in last[2] + last[3]


def test_one_section_is_run_alone_and_leaves_the_others_in_the_page(tmp_path):
    out = ("--out", str(tmp_path))
    assert run("--only", "graphs", *out) == run("--only", "steps", *out) == 0
    headings = re.findall(r"^## .*", page_in(tmp_path), re.MULTILINE)
    assert headings == ["## CUDA graphs", "## Steps on the device"]


def test_a_variant_that_fails_says_so_in_its_row_and_the_others_are_measured(monkeypatch, capsys):
    def broken(updates, state, params=None):
        raise ValueError("it | broke")

    clip = optax.GradientTransformation(lambda params: optax.EmptyState(), broken)
    monkeypatch.setitem(on_device.CLIPS, "optax", clip)
    assert run("--only", "steps") == 0
    rows = re.findall(r"^\| matmul step \|.*", capsys.readouterr().out, re.MULTILINE)
    cells = [cell.strip() for cell in rows[0].split("|")]
    assert cells[4] == "failed: it / broke"
    assert float(cells[3].split()[0]) > 0
    assert float(cells[7].split()[0]) > 0
    assert (cells[6], cells[8], cells[9]) == ("failed", "", "")
    assert " / – / " in rows[1]


def test_a_section_that_fails_keeps_its_rows_and_the_next_one_runs(monkeypatch, capsys):
    def broken(plan):
        yield "one row\n"
        raise RuntimeError("out of luck")

    sections = {"steps": ("Broken", broken), "graphs": on_device.SECTIONS["graphs"]}
    monkeypatch.setattr(on_device, "SECTIONS", sections)
    assert run() == 0
    printed = capsys.readouterr().out
    assert "one row\n\nfailed: out of luck\n" in printed
    assert "| matmul step | without |" in printed


def test_after_the_budget_rows_are_named_and_not_measured(capsys):
    assert run("--budget", "1e-9") == 0
    printed = capsys.readouterr().out
    assert "| matmul step | mixed | not measured: the time was over |" in printed
    assert "| `clip_by_value` | not measured: the time was over |" in printed


def test_what_does_not_compile_in_time_is_given_up_on():
    ready = on_device.started(lambda: time.sleep(60))
    with pytest.raises(TimeoutError, match="not compiled after 0 s"):
        ready(0.01)
    assert on_device.started(lambda: "made")(10) == "made"


def test_the_steps_of_a_variant_go_on_from_where_the_last_one_stopped():
    made = programs.update({"w": (4, 3)}, "float32", None)
    variant = on_device.Variant(made)
    grads = np.array(variant.own[2]["w"])
    assert np.abs(grads).min() > 0
    variant.steps = 3
    variant.block()
    assert variant.own[1][0].count == 3
    variant.block()
    assert variant.own[1][0].count == 6
    np.testing.assert_array_equal(variant.own[2]["w"], grads)
    assert len(variant.calls) == 2
    assert variant.moved() > 0


def test_drawn_tokens_are_words_of_the_vocabulary():
    tokens = np.array(on_device.values(on_device.SMALL["LSTM step"]("float32", None))[2])
    assert tokens.dtype == np.int32
    assert 0 <= tokens.min() < tokens.max() < 32


def test_a_reduction_is_chosen_as_on_another_platform():
    def f(x):
        return jax.lax.platform_dependent(
            x, cpu=lambda x: x, tpu=lambda x: 2 * x, default=lambda x: 3 * x
        )

    for kind, factor in (("cpu", 1), ("tpu", 2), ("cuda", 3)):
        with on_device.as_on(kind) as asked:
            assert jax.jit(lambda x: f(x))(jnp.float32(1)) == factor
        assert asked == [kind]
    assert f(jnp.float32(1)) == 1


def test_every_small_program_stands_for_a_true_one():
    assert set(on_device.SMALL) < set(programs.PROGRAMS)
    for name, _ in on_device.ROWS:
        assert on_device.SMALL[name]("float32", None).donate == (0, 1)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--only", "speed"), "`--only` must be some of steps,graphs,reductions,strategies, each"),
        (("--budget", "0"), "`--budget` must be positive, got 0.0."),
        (("--rounds", "0"), "`--rounds` must be at least 1, got 0."),
        (("--out", "/dev/null/x"), "`--out` must be a directory that can be written, got"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2(argv, words, capsys):
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert not out
    assert words in err
    assert err.count("\n") == 1
