"""The page of the compilers of TPU and GPU, of facts that are made up; and what is compiled."""

import functools
import json
import re
import subprocess
import sys

import accelerators as a
import compiled
import harness
import jax
import pytest
from hlo import Facts

# A program runs under the promotion that jax has by default.
pytestmark = pytest.mark.usefixtures("standard_promotion")
TASKS = [task for section in a.SECTIONS.values() for task in section()]
FACTS = Facts(
    kernels=9, fusions=7, copies=2, cycles=4000, branch_cycles=300, bytes=5_000_000,
    conditionals=1, loops=0, collectives={"all-reduce": 1}, collective_bytes=8,
    branch_collectives={"all-reduce": 2}, host_synchronizations=0,
)  # fmt: skip


def facts_of(task):
    """Each variant costs more than the one before it in a row of steps."""
    more = list(a.programs.CLIPS).index(task.variant) if task.variant in a.programs.CLIPS else 0
    return Facts(**vars(FACTS) | {"cycles": 4000 + 1000 * more, "kernels": 9 + 10 * more})


def test_the_page_has_all_that_was_compiled_and_says_what_was_not():
    page = a.page({task: facts_of(task) for task in TASKS}, {"jax": "1.2.3"})
    assert "jax 1.2.3. Date:" in page
    assert "not compiled" not in page
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    # 5 thousand cycles with optax's clip and 6 with ours, of which 4 are those without.
    assert "| v5e | matmul step | float32 | 4.00 | +1 | +2 | 2.00 |" in page
    assert "| H100 | matmul step | float32 | 9.00 | +10 | +20 | 2.00 |" in page
    assert "1 all-reduce (8 B) + 2 all-reduce" in page
    stopped = a.page(dict.fromkeys(TASKS, "> 100 s"), {})
    assert "| v5e, 4 × 4 | update of small GPT-2 | `spectral_clip` | > 100 s |" in stopped
    assert "not compiled" in a.page({}, {})


@pytest.mark.parametrize(
    "task", {task.section: task for task in TASKS}.values(), ids=lambda task: task.section
)
def test_what_is_compiled_traces(task):
    function, arguments, donate = a.build(task)
    assert donate in ((), (0, 1))
    assert jax.tree.leaves(jax.eval_shape(function, *arguments))


def test_a_task_survives_its_way_to_a_process():
    assert {a.task_of(json.loads(json.dumps(task))) for task in TASKS} == set(TASKS)
    assert len(set(TASKS)) == len(TASKS)


def test_a_compiler_that_is_stopped_leaves_a_row_and_the_next_one_is_asked():
    code = (
        "import os, signal, sys\n"
        'print(\'RESULT {"jax": "1.2.3"}\', flush=True)\n'
        "print('noise', flush=True)\n"
        "if 'LSTM' in input(): os.kill(os.getpid(), signal.SIGXCPU)\n"
        "print('RESULT {\"kernels\": 1}', flush=True)"
    )
    worker = a.Worker(sys.executable)
    worker.start = functools.partial(
        subprocess.Popen,
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    slow, quick = (a.Task("steps", a.V5E, name, "float32", "none") for name in ("LSTM", "matmul"))
    assert worker.ask(slow) == "> 100 s"
    assert worker.ask(quick) == {"kernels": 1}
    assert worker.versions == {"jax": "1.2.3"}
    worker.process.communicate()


def test_bad_input_names_the_argument(capsys):
    assert a.main(["--only", "steps,oak"]) == 2
    assert "`--only` must be some of steps,strategies," in capsys.readouterr().err


def test_results_are_kept_between_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(a, "RESULTS", tmp_path / "build" / "results.json")
    assert a.read() == ({}, {})
    results = {TASKS[0]: FACTS, TASKS[1]: "> 100 s"}
    a.write(results, {"jax": "1.2.3"})
    assert a.read() == (results, {"jax": "1.2.3"})


def test_what_the_host_asks_for_is_that_of_the_target():
    target = compiled.gpu_target(compiled.GPUS["H200"])
    assert "core_count: 132" in target
    assert "memory_bandwidth: 4800000000000" in target
    assert "cuda_compute_capability { major: 9 }" in target


def test_a_compiler_is_asked_only_where_its_interpreter_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(a, "RESULTS", tmp_path / "results.json")
    out = tmp_path / "page.md"
    assert a.main(["--out", str(out)]) == 0
    assert out.read_text().startswith("# TPU and GPU, by their compilers\n")
    assert harness.chosen("--targets", "v5e,B200", a.KINDS) == ["v5e", "B200"]
