"""The Transformer on a mesh: every style is one device, several processes are one program."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import make_mesh
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import gradclip_jax
from examples.language_model.checkpoints import checksum
from examples.language_model.command_line import InputError
from examples.papers import sharded_transformer
from examples.papers.shared import launch
from examples.papers.shared.parallel import STYLES, Style
from examples.papers.shared.transformer import next_token_loss

ROOT = Path(__file__).parents[3]
SCRIPT = sharded_transformer.__file__
SIZES = ["--layers", "1", "--units", "16", "--heads", "2", "--context", "8", "--batch", "16"]
SIZES = [*SIZES, "--dtype", "float32"]


@pytest.fixture(autouse=True)
def promotion(standard_promotion):
    """AdamW needs implicit promotion."""


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 5,000 characters."""
    words = ["the", "norm", "of", "a", "gradient", "is", "held", "to", "its", "limit"]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    drawn = np.random.default_rng(0).choice(words, (100, 10))
    file.write_text("\n".join(map(" ".join, drawn)))
    return file


def options(text: Path, out: Path, *more: str, steps: int = 3) -> list[str]:
    places = ["--data", str(text), "--out", str(out), "--steps", str(steps)]
    return [*places, *SIZES, *more]


def result_of(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line with which a command is refused."""
    try:
        status = sharded_transformer.main(arguments)
    except SystemExit as end:  # of argparse
        status = end.code
    line = capsys.readouterr().err
    assert status == 2
    assert line.startswith("sharded_transformer.py: error: ")
    assert line.count("\n") == 1
    return line


def readme_commands() -> list[list[str]]:
    """The commands that the README and the docs show, each once, without the script."""
    shown = "".join(
        "\n".join(re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.M | re.S))
        for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    )
    found = re.findall(r"^python examples/papers/sharded_transformer.py (.*)$", shown, re.M)
    return [command.split() for command in dict.fromkeys(found)]


# One program in every style


def test_every_style_is_one_device_for_twenty_steps(text, tmp_path, capsys):
    (command,) = [c for c in readme_commands() if "--compare" in c]
    at = command.index("--cpu-devices")  # eight are there already
    assert command[at + 1] == "8"
    command = command[:at] + command[at + 2 :]
    assert sharded_transformer.main([*command, *options(text, tmp_path, steps=20)]) == 0
    names = ["one_device", "jit", "explicit", "shard_map", "pmap"]
    one, *others = [result_of(tmp_path / name) for name in names]
    assert len(one["history"]["loss"]) == 20
    # The clip acts, so that a wrong norm would be a wrong step.
    assert sum(one["history"]["clipped"]) > 0
    assert one["history"]["loss"][-1] < one["history"]["loss"][0] - 0.1
    for other in others:
        for name in ("loss", "grad_norm", "clip_factor", "max_logit"):
            np.testing.assert_allclose(
                other["history"][name], one["history"][name], rtol=5e-5, err_msg=other["style"]
            )
        assert other["valid"] == pytest.approx(one["valid"], rel=1e-5)
        assert other["replicas_equal"]
    rows = capsys.readouterr().out.splitlines()
    for result in (one, *others):
        assert any(row.startswith(result["style"]) and "equal" in row for row in rows)


def test_in_every_style_the_clip_of_logits_is_that_of_all_examples(text, tmp_path):
    """0.002 is far below the first logits, so that each step rescales heads on both devices."""
    ways = {"jit": "data=4,model=2", "shard_map": "data=4,model=2", "pmap": "data=8"}
    found = {}
    for style, mesh in ways.items():
        more = ["--style", style, "--mesh", mesh, "--qk-clip", "0.002"]
        assert sharded_transformer.main(options(text, tmp_path / style, *more)) == 0
        found[style] = result_of(tmp_path / style)
    logits = found["jit"]["history"]["max_logit"]
    assert logits[0] > 0.02
    assert logits[-1] < 0.003
    for result in found.values():
        for name in ("loss", "max_logit"):
            np.testing.assert_allclose(
                result["history"][name], found["jit"]["history"][name], rtol=1e-4
            )
        assert result["replicas_equal"]


def test_under_muon_logits_explode_without_the_clip_and_return_to_the_threshold_with_it(
    text, tmp_path, capsys
):
    way = ["--mesh", "data=4,model=2", "--optimizer", "muon", "--weight-decay", "0"]
    more = ["--learning-rate", "0.7", "--accumulate", "1", "--qk-clip", "30", "--compare"]
    assert sharded_transformer.main(options(text, tmp_path, *way, *more, steps=50)) == 0
    without, held = (
        np.array(result_of(tmp_path / name)["history"]["max_logit"])
        for name in ("without", "qk_clip")
    )
    first = int(np.argmax(held > 30))
    np.testing.assert_array_equal(held[: first + 1], without[: first + 1])
    assert without[-1] > 1000
    # Logits exceed it by what one step adds, and the clip acts behind that step.
    assert held.max() < 3 * 30
    assert held[-1] < 1.2 * 30
    table = (tmp_path / "results.txt").read_text()
    assert f"without {max(without):.4g}" in " ".join(table.split())
    assert (tmp_path / "sharded_transformer.png").stat().st_size > 10_000
    assert "qk_clip" in capsys.readouterr().out


def program(text: Path, tmp_path: Path, style: str, *more: str, **axes: int):
    args = sharded_transformer.options().parse_args(options(text, tmp_path, *more))
    corpus = sharded_transformer.load_corpus(text, "char", 10_000, tmp_path)
    made = sharded_transformer.Program(args, STYLES[style](make_mesh(**axes)), 23)
    return made, corpus.train


def test_the_printed_norm_is_that_of_the_gradient_of_the_whole_batch(text, tmp_path):
    """Against NumPy in float64, without a mesh, a scan over micro-batches or the library."""
    made, train = program(text, tmp_path, "shard_map", data=4, model=2)
    params, opt_state = made.start()
    batch = made.batch(train, (0, 0))
    whole = jax.device_get(batch).reshape(-1, batch.shape[-1])
    alone = jax.tree.map(jnp.asarray, jax.device_get(params))
    plain, _ = program(text, tmp_path, "pmap", data=8, model=1)  # the model without collectives
    grads = jax.jit(jax.grad(lambda p: next_token_loss(nnx.merge(plain.graph, p), whole)[0]))
    leaves = jax.tree.leaves(jax.device_get(grads(alone)))
    expected = np.sqrt(sum(np.square(leaf.astype(np.float64)).sum() for leaf in leaves))
    _, _, scalars = made.step(params, opt_state, batch)
    assert float(scalars["grad_norm"]) == pytest.approx(expected, rel=1e-6)


def test_weights_and_moments_are_split_by_the_rules(text, tmp_path):
    made, _ = program(text, tmp_path, "jit", data=4, model=2)
    params, opt_state = made.start()
    (adam,) = [s for s in jax.tree.leaves(opt_state, is_leaf=lambda s: hasattr(s, "mu"))
               if hasattr(s, "mu")]  # fmt: skip
    for tree in (params, adam.mu, adam.nu):
        block = tree["blocks"][0]
        assert block["qkv"][...].addressable_shards[0].data.shape == (4, 3, 1, 8)
        assert block["down"][...].addressable_shards[0].data.shape == (32, 4)
        assert block["up_bias"][...].addressable_shards[0].data.shape == (32,)
        assert tree["embedding"][...].addressable_shards[0].data.shape == (23, 4)
        assert tree["scale"][...].sharding.is_fully_replicated
    assert gradclip_jax.metrics(opt_state)["grad_norm"].sharding.is_fully_replicated


def test_products_are_bfloat16_and_all_that_is_kept_is_float32(text, tmp_path):
    made, train = program(text, tmp_path, "jit", "--dtype", "bfloat16", data=4, model=2)
    batch = made.batch(train, (0, 0))
    kept = {x.dtype for x in jax.tree.leaves(made.abstract)}
    assert kept == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}  # and counters
    with jax.set_mesh(made.style.mesh):
        jaxpr = str(jax.make_jaxpr(made._step)(*made.abstract, batch))
        differentiated = jax.grad(made._objective, has_aux=True)
        grads, _ = jax.eval_shape(differentiated, made.abstract[0], batch[0])
    types = dict(re.findall(r"(\w+):(\w+)\[", jaxpr))
    operands = re.findall(r" dot_general\[.*?\] (\w+) (\w+)", jaxpr, re.S)
    assert len(operands) >= 3 * 7  # seven products, each with two gradients
    assert {types[name] for pair in operands for name in pair} == {"bf16"}
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


def test_every_process_reads_only_its_own_sequences(text, tmp_path):
    made, train = program(text, tmp_path, "jit", data=4, model=2)
    whole = np.asarray(made.batch(train, (0, 7)))
    assert whole.shape == (2, 8, 9)
    read = []
    made.style.batch = lambda shape, f: read.append(f((slice(None), slice(2, 4), slice(None))))
    made.batch(train, (0, 7))
    np.testing.assert_array_equal(read[0], whole[:, 2:4])


def test_replicas_that_drifted_apart_are_noticed():
    mesh = make_mesh(data=4, model=2)
    sharding = NamedSharding(mesh, P("data"))
    rows = [jax.device_put(jnp.full(2, float(i // 2)), d) for i, d in enumerate(mesh.devices.flat)]

    def array():
        return jax.make_array_from_single_device_arrays((8,), sharding, rows)

    assert Style(mesh).replicas_equal({"w": array()})
    rows[3] = rows[3].at[1].add(1e-7)
    assert not Style(mesh).replicas_equal({"w": array()})
    stacked = STYLES["pmap"](make_mesh(data=8, model=1))
    assert stacked.replicas_equal(jax.pmap(lambda x: x)(jnp.ones(8)))
    assert not stacked.replicas_equal(jax.pmap(lambda x: x)(jnp.arange(8.0)))


# Checkpoints


def test_a_checksum_is_of_the_bits_wherever_they_lie():
    x = jax.random.normal(jax.random.key(0), (8, 6))
    count = jnp.int32(3)
    mesh = make_mesh(data=4, model=2)
    known = checksum((x, count))
    for spec in (P("data", "model"), P("model"), P(None, ("model",))):
        assert checksum((jax.device_put(x, NamedSharding(mesh, spec)), count)) == known
    assert checksum((x[::-1], count)) != known
    assert checksum((x.at[5, 5].set(jnp.nextafter(x[5, 5], 9)), count)) != known
    assert checksum((x, count + 1)) != known


EVERY_STEP = ["--mesh", "data=4,model=2", "--accumulate", "1", "--checkpoint-every", "1"]


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on 4 × 2 devices, with checkpoints of the last two."""
    out = tmp_path_factory.mktemp("finished")
    with jax.numpy_dtype_promotion("standard"):
        assert sharded_transformer.main(options(text, out, *EVERY_STEP)) == 0
    return out


def test_a_run_goes_on_with_other_devices_and_another_style(finished, text, tmp_path):
    """From a checkpoint of 4 × 2 devices to eight others, to rounding."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "result.json").unlink()
    shutil.rmtree(out / "checkpoints" / "3")
    other_way = ["--mesh", "data=8", "--style", "pmap"]
    assert sharded_transformer.main(options(text, out, *EVERY_STEP, *other_way)) == 0
    one, other = result_of(finished)["history"], result_of(out)["history"]
    assert other["loss"][:2] == one["loss"][:2]
    np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-6)
    np.testing.assert_allclose(other["grad_norm"], one["grad_norm"], rtol=1e-5)


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_checkpoint_is_named_and_left_alone(finished, text, tmp_path, capsys, damage):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "result.json").unlink()
    files = (out / "checkpoints" / "3" / "state").rglob("*")
    largest = max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        largest.unlink()
    else:
        largest.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    before = contents(out)
    line = refusal(capsys, options(text, out, *EVERY_STEP))
    what = "is missing" if damage == "missing" else "was changed"
    reason = f"{largest.relative_to(out / 'checkpoints' / '3')} {what}."
    assert (
        f"`--out` must hold checkpoints that can be read, got {out}/checkpoints/3: {reason}" in line
    )
    assert "move that directory away to continue from step 2" in line
    assert contents(out) == before


def test_a_checkpoint_of_another_step_is_refused(finished, text, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "result.json").unlink()
    (out / "checkpoints" / "3").rename(out / "checkpoints" / "7")
    line = refusal(capsys, options(text, out, *EVERY_STEP, steps=3))
    assert f"got {out}/checkpoints/7: the checksum differs." in line
    assert "continue from step 2" in line


def test_a_full_disk_is_told_in_one_line_and_the_last_checkpoint_stays(
    finished, text, tmp_path, monkeypatch, capsys
):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "result.json").unlink()
    shutil.rmtree(out / "checkpoints" / "3")
    before = contents(out / "checkpoints")
    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    line = refusal(capsys, options(text, out, *EVERY_STEP))
    assert f"can be written, got {out}/checkpoints: No space left on device. The" in line
    assert "The checkpoint of step 3 is not saved;" in line
    assert "goes on from step 2." in line
    assert contents(out / "checkpoints") == before


def test_a_finished_run_is_reported_again_and_another_refused(finished, text, capsys):
    command = options(text, finished, *EVERY_STEP)
    assert sharded_transformer.main(command) == 0
    assert "finished" in capsys.readouterr().out
    line = refusal(capsys, [*command, "--max-norm", "7"])
    assert f"got {finished}, whose run has max_norm 0.5 (now 7.0)" in line


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "data=3,rows=2"], "`--mesh` must look like data=4,model=2, got 'data=3,rows"),
        (["--mesh", "data=0"], "`--mesh` must look like data=4,model=2, got 'data=0'"),
        (["--mesh", "data=16"], "data=16,model=1 needs 16 devices, there are 8 in 1 process(es)"),
        (["--mesh", "data=4,model=2", "--style", "pmap"], "`--mesh` must have model=1, got data=4"),
        (["--mesh", "data=8", "--units", "12"], "`--units` must be a multiple of data=8 = 8, got"),
        (["--mesh", "data=8", "--batch", "8"], "`--batch` must be a multiple of data=8 × accum"),
        (["--mesh", "data=2,model=4"], "`--heads` must be a multiple of model=4 = 4, got 2"),
        (["--heads", "3"], "`--units` must be a multiple of `--heads` 3, got 16"),
        (["--steps", "0"], "`--steps` must be at least 1, got 0"),
        (["--max-norm", "-1"], "`--max-norm` must be a number of at least 0, got -1.0"),
        (["--max-norm", "nan"], "`--max-norm` must be a number of at least 0, got nan"),
        (["--qk-clip", "-1"], "`--qk-clip` must be a number of at least 0, got -1.0"),
        (
            ["--optimizer", "muon", "--style", "shard_map"],
            "`--optimizer muon` needs whole matrices",
        ),
        (["--optimizer", "muon", "--compare"], "and `--compare` only with `--qk-clip`"),
        (["--learning-rate", "inf"], "`--learning-rate` must be a number of at least 0, got inf"),
        (["--axes", "explicit", "--style", "pmap"], "`--axes explicit` belongs to `--style jit`"),
        (["--compare", "--processes", "2"], "`--compare` runs on one device as well"),
        (["--processes", "0"], "`--processes` must be at least 1, got 0"),
        (["--process-id", "1"], "must be given together, got None and 1"),
        (["--coordinator", "a:1", "--process-id", "2", "--processes", "2"], "got 2 of 2"),
        (["--coordinator", "a", "--process-id", "0", "--processes", "2"], "host:port, got 'a'"),
        (["--distributed", "--processes", "2"], "`--distributed` finds processes by itself"),
        (["--coordinator", "a:0", "--process-id", "0", "--processes", "2"], "host:port, got 'a:0'"),
        (["--coordinator", "a:65536", "--process-id", "0", "--processes", "2"], "got 'a:65536'"),
        (["--data", "nowhere"], "`--data` must be a file or a directory that exists, got nowhere"),
        (["--context", "600"], "`--data` must hold more than context + 1 = 601 characters for val"),
    ],
)
def test_bad_input_is_refused_in_one_line(text, tmp_path, capsys, arguments, message):
    assert message in refusal(capsys, options(text, tmp_path / "run", *arguments))
    assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_written_is_named(text, tmp_path, capsys):
    (tmp_path / "file").touch()
    for more in (["--mesh", "data=1"], ["--processes", "2"]):
        line = refusal(capsys, options(text, tmp_path / "file" / "run", *more))
        assert f"`--out` must be a directory that can be written, got {tmp_path}/file/run: " in line


# Several processes


def start(command: list[str], **environment: str) -> subprocess.Popen:
    # One flag of the suite would give each process eight devices; the others compile fast.
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    inherited = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, SCRIPT, *command], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**inherited, **environment},
    )  # fmt: skip


def wait_for(checkpoint: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not checkpoint.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pids(output: str) -> list[int]:
    return [int(pid) for pid in re.findall(r"^Process \d of 2: pid (\d+)", output, re.M)]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory):
    """Processes started by these tests read back what an earlier one compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture
def two_processes(text):
    """The command of the README that starts two processes of four devices, with small sizes."""
    (command,) = [c for c in readme_commands() if "--processes" in c and "--coordinator" not in c]
    assert command[command.index("--processes") + 1] == "2"
    assert command[command.index("--cpu-devices") + 1] == "4"

    def of(out: Path, steps: int = 8) -> list[str]:
        every = ["--accumulate", "1", "--checkpoint-every", "2"]
        return [*command, *options(text, out, *every, steps=steps)]

    return of


def test_two_processes_are_one_and_survive_a_kill_bit_for_bit(two_processes, text, tmp_path):
    whole, killed, single = tmp_path / "whole", tmp_path / "killed", tmp_path / "single"
    undisturbed = start(two_processes(whole))
    output, errors = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, errors
    assert "replicas equal" in output
    assert "Gloo" not in output

    # The losses of one process with eight devices
    alone = options(text, single, "--accumulate", "1", "--mesh", "data=4,model=2", steps=8)
    assert sharded_transformer.main([*alone, "--checkpoint-every", "8"]) == 0
    two, one = result_of(whole), result_of(single)
    np.testing.assert_allclose(two["history"]["loss"], one["history"]["loss"], rtol=1e-6)
    np.testing.assert_allclose(two["history"]["grad_norm"], one["history"]["grad_norm"], rtol=2e-5)

    # One of them dies on the way
    run = start(two_processes(killed))
    wait_for(killed / "checkpoints" / "2", run)
    lines = [run.stdout.readline() for _ in range(2)]
    first, second = pids("".join(lines))
    os.kill(second, signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1
    assert f"Process 1 of 2 was killed by SIGKILL; see {killed / 'process-1.log'}." in errors
    assert re.search(rf"The same command goes on from step \d+ in {killed}\n", errors)
    assert not alive(first)
    assert not alive(second)
    assert not (killed / "result.json").exists()

    # The same command again
    resumed = start(two_processes(killed))
    _, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert result_of(killed) == two


def test_a_process_that_is_refused_ends_the_others_and_is_quoted(two_processes, tmp_path):
    run = start([*two_processes(tmp_path / "run"), "--mesh", "data=2,model=2"])
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 2
    assert "failed: Process" in errors
    assert "`--mesh` data=2,model=2 needs 4 devices, there are 8 in 2 process(es)" in errors


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("launched", [False, True])
def test_a_port_that_is_taken_is_named_before_jax_crashes_of_it(
    text, tmp_path, capsys, family, launched
):
    place = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.socket(family) as taken:
        try:
            taken.bind((place, 0))
        except OSError:
            pytest.skip("no IPv6 on this machine")
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = ["--coordinator", address, "--process-id", "0", "--processes", "2"]
        if launched:
            with pytest.raises(InputError, match="another program took it: give the command again"):
                launch._check_port(address, launched=True)
        else:
            line = refusal(capsys, options(text, tmp_path / "run", *command))
            assert f"`--coordinator` must be a free port of process 0, got {address}: " in line
            assert "Address already in use; give another one to all processes." in line
    launch._check_port(address, launched=False)  # free again


@pytest.mark.parametrize("which", [0, 1])
def test_a_process_that_hangs_is_named_and_not_the_one_that_missed_it(
    two_processes, tmp_path, which
):
    run = start(two_processes(tmp_path / "run", steps=10_000))
    started = pids("".join(run.stdout.readline() for _ in range(2)))
    wait_for(tmp_path / "run" / "checkpoints" / "2", run)
    os.kill(started[which], signal.SIGSTOP)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1
    log = tmp_path / "run" / f"process-{which}.log"
    assert (
        f"Process {which} of 2 hangs: it gave no sign of life for 20 seconds; see {log}." in errors
    )
    assert "was killed" not in errors
    assert not any(map(alive, started))


def test_a_crash_of_its_own_is_no_hanging_of_another(tmp_path):
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    for log, said in zip(logs, ("", "free(): invalid pointer"), strict=True):
        log.write_text(said)
    assert launch._hung({0: None, 1: -signal.SIGABRT}, logs) is None
    logs[1].write_text("RPC: /xla.coordination.CoordinationService/Heartbeat")
    assert launch._hung({0: None, 1: -signal.SIGABRT}, logs) == 0
    assert launch._hung({0: -signal.SIGABRT, 1: -signal.SIGABRT}, logs) is None
    assert launch._hung({0: None, 1: -signal.SIGKILL}, logs) is None
    logs[0].write_text("INTERNAL: Barrier failed because: Task 1 heartbeat timeout.")
    assert launch._hung({0: 1, 1: None}, logs) == 1
    logs[0].write_text("ValueError: a mistake of its own")
    assert launch._hung({0: 1, 1: None}, logs) is None


def slurm(text: Path, out: Path, *more: list[str], steps: int = 2) -> list[subprocess.Popen]:
    """One process for each list of options, with the variables that Slurm sets for each."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    job |= {"SLURM_NTASKS": str(len(more)), "SLURM_LOCALID": "0"}
    common = ["--distributed", "--cpu-devices", "4", "--mesh", "data=4,model=2"]
    common += ["--accumulate", "1"]
    return [
        start(
            [*options(text, out, *common, steps=steps), *options_of_one],
            SLURM_PROCID=str(i),
            **job,
        )
        for i, options_of_one in enumerate(more)
    ]


def test_processes_that_slurm_started_find_each_other(text, tmp_path):
    processes = slurm(text, tmp_path / "run", [], [])
    (first, _), (second, _) = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "jit, data=4, model=2" in first
    assert "step 2 of 2 · loss" in first
    assert "loss" not in second
    assert len(result_of(tmp_path / "run")["history"]["loss"]) == 2


def test_a_process_that_lost_another_says_so_and_ends(text, tmp_path):
    """Without a launcher to watch over them."""
    out, every = tmp_path / "run", ["--checkpoint-every", "1"]
    first, second = slurm(text, out, every, every, steps=10_000)
    wait_for(out / "checkpoints" / "1", first)
    second.kill()
    _, errors = first.communicate(timeout=300)
    second.communicate()
    assert first.returncode != 0
    # The first where a connection broke, the second, of jax, where it waited for a heartbeat.
    ours, of_jax = "Process 0 of 2 has lost another one", "likely indicates that another task died"
    assert ours in errors or of_jax in errors


def test_processes_with_different_options_are_refused(text, tmp_path):
    processes = slurm(text, tmp_path / "run", [], ["--max-norm", "3"])
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "Process 0 of 2: all processes must be given the same options" in errors[0]
    assert "'max_norm': 3.0" in errors[1]
    assert not (tmp_path / "run" / "config.json").exists()


def test_processes_end_with_their_launcher(two_processes, tmp_path):
    run = start(two_processes(tmp_path / "run", steps=10_000))
    started = pids("".join(run.stdout.readline() for _ in range(2)))
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 60
    while any(map(alive, started)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
