"""The example trains on any text, says what is wrong with bad input, and survives being killed."""

import hashlib
import io
import itertools
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tensorboardX.proto import event_pb2

import gradclip_jax
from examples.language_model import (
    data,
    dialogues,
    model as lm_model,
    optimizers,
    options as lm_options,
    recurrent,
    train as language_model,
)

WORDS = ["the", "norm", "of", "a", "gradient", "is", "held", "to", "its", "limit", "at", "each"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """About 5,000 characters in 100 lines."""
    drawn = np.random.default_rng(0).choice(WORDS, (100, 10))
    file = tmp_path / "text.txt"
    file.write_text("\n".join(" ".join(line) for line in drawn) + "\n")
    return file


def options(text: Path, *more: str, steps: int = 3) -> list[str]:
    """A command that takes a second; the run lies beside the text."""
    sizes = ["--units", "8", "--batch", "4", "--unroll", "5", "--sample", "20"]
    places = ["--data", str(text), "--out", str(text.parent / "run")]
    return [*places, "--cache", str(text.parent / "cache"), *sizes, "--steps", str(steps), *more]


def result_of(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def digest_of_checkpoint(out: Path, step: int) -> int:
    """Of every array in it, parameters and clip state included, and of the loss curve."""
    return json.loads((out / "checkpoints" / str(step) / "log" / "metadata").read_text())["digest"]


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def status(arguments: list[str]) -> int:
    """The exit status of a command, which argparse may end by itself."""
    try:
        return language_model.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line with which a command is refused."""
    capsys.readouterr()
    assert status(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("train.py: error: ")
    assert line.count("\n") == 1
    return line


# Presets


def test_a_preset_sets_what_is_not_given(text):
    """Zaremba et al. 2014, section 4.1; sizes are made smaller so that it takes a second."""
    words = ["--vocabulary", "50", "--layers", "1"]
    assert language_model.main([*options(text, *words), "--preset", "zaremba-small"]) == 0
    config = json.loads((text.parent / "run" / "config.json").read_text())
    assert config["units"] == 8
    assert config["init_scale"] == 0.1
    assert (config["epochs"], config["constant_epochs"], config["epoch_divisor"]) == (13, 4, 2.0)
    assert (config["level"], config["momentum"], config["max_norm"]) == ("word", 0.0, 5.0)


def test_the_shakespeare_preset_is_of_characters_and_adam(text, standard_promotion):
    assert language_model.main([*options(text), "--preset", "shakespeare"]) == 0
    run = text.parent / "run"
    config = json.loads((run / "config.json").read_text())
    assert (config["level"], config["cell"], config["optimizer"]) == ("char", "lstm", "adam")
    result, lines = result_of(run), (run / "results.txt").read_text().splitlines()
    (row,) = (line.split() for line in lines if line.startswith("clip_by_global_norm"))
    nats = (result["history"]["valid"][-1][1], result["test"])
    assert [float(bits) for bits in row[1:3]] == pytest.approx(np.divide(nats, np.log(2)), rel=1e-3)
    assert 'preset: "shakespeare"' in lines
    assert f'gradclip_jax: "{gradclip_jax.__version__}"' in lines
    assert str(text.parent) not in "\n".join(lines)


def test_the_rate_is_divided_after_every_epoch_but_the_first_ones():
    args = lm_options.options().parse_args(["--clip", "none", "--momentum", "0"])
    args.learning_rate, args.epoch_divisor, args.constant_epochs = 1.0, 2.0, 4
    chain = optimizers.build_optimizer(args, "none", steps=21, per_epoch=3)
    params, rates = jnp.ones(()), []
    state = chain.init(params)
    for _ in range(21):
        updates, state = chain.update(jnp.ones(()), state, params)
        rates.append(-float(updates))
    np.testing.assert_allclose(rates, [1] * 12 + [1 / 2] * 3 + [1 / 4] * 3 + [1 / 8] * 3)


# Training


@pytest.mark.parametrize("level", ["char", "word"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_three_steps_of_every_cell_leave_scores_and_a_plot(text, capsys, cell, level):
    assert language_model.main(options(text, "--cell", cell, "--level", level)) == 0
    result = result_of(text.parent / "run")
    assert len(result["history"]["loss"]) == result["steps"] == 3
    assert np.isfinite(result["history"]["loss"] + result["history"]["grad_norm"]).all()
    assert np.isfinite(result["test"])
    assert (text.parent / "run" / "run.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert ("bits per character" if level == "char" else "perplexity") in shown
    assert ("5-gram" if level == "char" else "3-gram") in shown
    assert "step 3 of 3 · loss" in shown
    assert "e+" not in shown


def test_it_learns_a_text_that_repeats(text):
    text.write_text("abcdefgh" * 200)
    assert language_model.main(options(text, "--learning-rate", "0.1", steps=150)) == 0
    (at, loss), *_ = result_of(text.parent / "run")["history"]["valid"][-1:]
    assert at == 150
    assert loss < 0.5 * np.log(8)


def test_a_second_epoch_starts_the_text_and_the_state_again(text, monkeypatch):
    text.write_text("abcdefgh" * 8)  # 57 of 64 characters: 2 pieces of 4 × 5, and a rest
    seen = []
    step = language_model.train_step

    def spy(model, optimizer, carry, inputs, targets, *, mean_loss):
        seen.append((inputs.tolist(), float(np.abs(carry[0][0]).sum())))
        return step(model, optimizer, carry, inputs, targets, mean_loss=mean_loss)

    monkeypatch.setattr(language_model, "train_step", spy)
    assert language_model.main(options(text, steps=4)) == 0
    texts, states = zip(*seen, strict=True)
    assert texts[0] == texts[2] != texts[1] == texts[3]
    assert states[0] == states[2] == 0
    assert min(states[1], states[3]) > 0


def test_the_limit_and_other_arguments_reach_the_strategy(text):
    more = ["--clip", "clip_by_global_norm", "--max-norm", "0.25", "--clip-arg", "order=1"]
    assert language_model.main(options(text, *more)) == 0
    history = result_of(text.parent / "run")["history"]
    assert history["clip_limit"] == [0.25] * 3
    assert history["clipped"] == [1.0] * 3
    factors = np.divide(history["clip_limit"], history["grad_norm"])
    np.testing.assert_allclose(history["clip_factor"], factors, rtol=1e-6)


def test_without_a_clip_the_norm_is_still_measured(text):
    assert language_model.main(options(text, "--clip", "none")) == 0
    history = result_of(text.parent / "run")["history"]
    assert min(history["grad_norm"]) > 0
    assert history["clip_factor"] == [1.0] * 3
    assert history["clip_limit"] == [np.inf] * 3


def test_optimizers_of_all_kinds_can_stand_behind_strategies_of_all_kinds(standard_promotion):
    for clip in ("clip_by_norm", "clip_by_value", "clip_by_unit_norm", "adaptive_grad_clip"):
        for optimizer in ("sgd", "adam", "rmsprop", "lion"):
            arguments = ["--clip", clip, "--optimizer", optimizer]
            args = lm_options.options().parse_args(arguments)
            chain = optimizers.build_optimizer(args, clip, steps=10)
            params = {"w": jnp.ones((2, 2))}
            updates, state = jax.jit(chain.update)(params, chain.init(params), params)
            assert float(jnp.abs(updates["w"]).max()) > 0
            assert float(lm_model.measured_by_clip(state)["grad_norm"]) > 0


CLIPS = {
    "clip_by_norm": gradclip_jax.clip_by_norm(5.0),
    "clip_by_value --clip-arg limit=2": gradclip_jax.clip_by_value(2.0),
    "zclip --max-norm 3 --clip-arg max_norm=None": gradclip_jax.zclip(3.0, max_norm=None),
    "constant": gradclip_jax.clip_to_limit(5.0),
    "percentile --max-norm 90 --clip-arg window=2": gradclip_jax.clip_to_limit(
        gradclip_jax.limits.percentile(90.0, window=2)
    ),
    "clip_to_limit --clip-arg limit={'method':'growth'} --clip-arg measure=leaf_norms "
    "--clip-arg response=smooth": gradclip_jax.clip_to_limit(
        gradclip_jax.limits.growth(),
        measure=gradclip_jax.leaf_norms,
        response=gradclip_jax.responses.smooth,
    ),
}


@pytest.mark.parametrize("arguments", CLIPS)
def test_a_clip_is_chosen_by_the_name_of_a_strategy_or_a_limit(arguments):
    args = lm_options.options().parse_args(["--clip", *arguments.split()])
    clip, expected = optimizers.build_clip(args, args.clip), CLIPS[arguments]
    params = {"w": jnp.ones((2, 2)), "b": jnp.zeros(2)}
    state, other = clip.init(params), expected.init(params)
    for scale in (1.0, 2.0, 50.0):
        grads = jax.tree.map(lambda x, scale=scale: scale * x, params)
        updates, state = clip.update(grads, state, params)
        result, other = expected.update(grads, other, params)
        jax.tree.map(np.testing.assert_array_equal, (updates, state), (result, other))


def test_the_loss_is_summed_over_time_unless_its_mean_is_asked_for(text):
    base = options(text, "--max-norm", "inf", steps=1)
    assert language_model.main(base) == 0
    mean = [*base, "--mean-loss", "--out", str(text.parent / "mean")]
    assert language_model.main(mean) == 0
    one, other = (result_of(text.parent / name)["history"] for name in ("run", "mean"))
    assert one["loss"] == other["loss"]
    np.testing.assert_allclose(one["grad_norm"][0], 5 * other["grad_norm"][0], rtol=1e-5)


def test_a_loss_that_is_no_number_ends_the_run_without_a_clip(text):
    more = ["--clip", "none", "--learning-rate", "1e38", "--momentum", "0"]
    assert language_model.main(options(text, *more, steps=60)) == 0
    result = result_of(text.parent / "run")
    assert result["steps"] == 20
    assert not np.isfinite(result["history"]["loss"][-1])


def test_a_clip_goes_on_after_a_loss_that_is_no_number(text):
    more = ["--learning-rate", "1e38", "--momentum", "0", "--decay-from", "1"]
    assert language_model.main(options(text, *more, steps=30)) == 0
    result = result_of(text.parent / "run")
    assert result["steps"] == 30
    assert not np.isfinite(result["history"]["loss"][-1])
    assert result["nonfinite_count"] > 0


def test_compare_draws_both_runs_and_says_which_one_diverged(text, capsys):
    more = ["--compare", "--learning-rate", "1000", "--max-norm", "1e-4", "--decay-from", "1"]
    assert language_model.main(options(text, *more, steps=10)) == 0
    out = text.parent / "run"
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out.splitlines()
    rows = [re.split(r"\s{2,}", line.strip()) for line in shown]
    table = {name: cells for name, *cells in rows}
    assert table["clip_by_global_norm"][-2:] == ["100%", "no"]
    assert table["no clip"][-2:] == ["0%", "yes"]
    assert {"1-gram", "3-gram", "5-gram"} < table.keys()
    score = r"\d+\.\d\d"
    assert re.fullmatch(
        rf"With the clip {score} bits per character; without it the run diverged: {score}\.",
        shown[-1],
    )
    clipped, free = (result_of(out / name)["history"] for name in ("clip_by_global_norm", "none"))
    assert clipped["loss"][0] == free["loss"][0]  # the same weights saw the same text
    assert clipped["loss"][-1] < free["loss"][-1]


def test_the_event_file_holds_every_scalar_of_every_step(text):
    assert language_model.main(options(text)) == 0
    (file,) = (text.parent / "run").glob("events.out.tfevents.*")
    content, scalars = file.read_bytes(), {}
    while content:  # a record: length, checksum, event, checksum
        (length,) = struct.unpack("<Q", content[:8])
        event = vars(event_pb2)["Event"].FromString(content[12 : 12 + length])
        for value in event.summary.value:
            scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
        content = content[16 + length :]
    history = result_of(text.parent / "run")["history"]
    for name in optimizers.SCALARS:
        assert scalars[name] == [(i + 1, value) for i, value in enumerate(history[name])]
    assert [step for step, _ in scalars["valid_loss"]] == [3]


# Dialogues


@pytest.fixture
def few_dialogues(monkeypatch):
    sizes = {"train": 200, "valid": 20, "test": 60}
    monkeypatch.setattr(dialogues, "DIALOGUES", sizes)


def test_the_chatbot_is_a_gru_with_rmsprop_that_answers_at_a_prompt(
    text, few_dialogues, standard_promotion, monkeypatch, capsys
):
    command = [*options(text), "--preset", "chatbot", "--chat"]
    del command[:2]  # the dialogues are generated
    typed = "hello.\n\nwhat is 1 plus 2?"
    said = []
    for _ in range(2):  # after training, and from the run that is finished
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert language_model.main(command) == 0
        said.append(capsys.readouterr().out.partition("Ctrl-D ends.")[2])
    assert said[0] == said[1]
    assert said[0].count("> ") == 4
    run = text.parent / "run"
    config = json.loads((run / "config.json").read_text())
    assert (config["level"], config["cell"], config["optimizer"]) == ("word", "gru", "rmsprop")
    assert config["max_norm"] == 5
    # A run from before these options is still the same run.
    assert not {"chat", "dialogues", "preset"} & config.keys()
    answers = result_of(run)["answers"]
    assert answers.keys() == {"name", "colour", "hours", "open?", "sum"}
    assert all(0 <= right <= asked for right, asked in answers.values())
    assert "right answers" in (run / "results.txt").read_text()


def test_a_result_without_answers_is_reported(text):
    assert language_model.main(options(text)) == 0
    saved = text.parent / "run" / "result.json"
    content = json.loads(saved.read_text())
    assert content.pop("answers") is None
    saved.write_text(json.dumps(content))
    assert language_model.main(options(text)) == 0


def test_it_learns_to_answer_the_turns_of_a_file(text, standard_promotion, monkeypatch, capsys):
    text.write_text("what is red?\nA rose, of course.\n\nwhat is blue?\nThe sky.\n\n" * 60)
    sizes = ["--level", "word", "--cell", "gru", "--units", "32", "--batch", "4"]
    learn = ["--optimizer", "rmsprop", "--learning-rate", "0.02"]
    command = [*options(text, steps=150), "--dialogues", "--chat", *sizes, *learn]
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is red?\n\nwhat is blue?\n"))
    assert language_model.main(command) == 0
    (counts,) = result_of(text.parent / "run")["answers"].values()
    assert counts[0] == counts[1] > 3
    assert "> A rose, of course.\n> > The sky.\n" in capsys.readouterr().out


def test_questions_have_the_answers_that_follow_from_what_was_told(few_dialogues):
    corpus = dialogues.generated(0, "word", 1000)
    for question in dialogues.questions(corpus, dialogues.KINDS):
        read = dialogues.readable(corpus.text(np.array(question.context[1:-1])))
        *told, asked = read.splitlines()
        answer = dialogues.readable(corpus.text(np.array(question.answer)))
        told = "\n".join(told)
        opens, closes = [*re.findall(r"opens at (\d+) and closes at (\d+)", told), (0, 0)][0]
        match question.kind:
            case "sum":
                a, b = re.findall(r"\d+", asked)
                assert answer == f"that is {int(a) + int(b)}."
            case "name":
                assert re.fullmatch(r"your name is (.*)\.", answer)[1] in re.findall(
                    r"^(?:my name is|i am) (\w+)", told, re.M
                )
            case "colour":
                colour = re.fullmatch(r"you like (.*)\.", answer)[1]
                assert re.search(rf"i like {colour}|{colour} is the best", told)
            case "hours":
                hour = opens if asked.endswith("open?") else closes
                assert answer == f"it {'opens' if hour == opens else 'closes'} at {hour}."
            case "open?":
                (hour,) = map(int, re.findall(r"\d+", asked))
                is_open = int(opens) <= hour < int(closes)
                assert answer.startswith("yes" if is_open else "no")
                assert answer.endswith(f" {opens if hour < int(opens) else closes}.")


def test_what_is_asked_in_the_test_is_never_trained_on():
    told = {
        "sums": r"what is (\d+ plus \d+)",
        "hours": r"the (\w+ opens at \d+ and closes at \d+)",
    }
    draw = random.Random(0)
    texts = [
        "\n".join(turn for _ in range(400) for turn in dialogues.dialogue(draw, held_out))
        for held_out in (False, True)
    ]
    for pattern in told.values():
        trained, held_out = ({*re.findall(pattern, text)} for text in texts)
        assert trained.isdisjoint(held_out)
        assert min(len(trained), len(held_out)) >= 10


def test_an_answer_does_not_depend_on_the_other_contexts():
    model = network(cell="gru", layers=1)
    contexts = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 2]]
    together = lm_model.replies(model, contexts, 0, 5)
    alone = [lm_model.replies(model, [context], 0, 5)[0] for context in contexts]
    assert together == alone
    # By hand: the whole context at once, then the likeliest token again and again.
    tokens = [8, 9, 2]
    for _ in range(5):
        logits, _ = model(np.array(tokens)[:, None], model.start(1), deterministic=True)
        tokens.append(int(jnp.argmax(logits[-1, 0])))
    assert together[2] == [*itertools.takewhile(lambda token: token != 0, tokens[3:])]


# Checkpoints


def interrupt_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step, left = language_model.train_step, [calls]

    def limited(*args, **kwargs):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return step(*args, **kwargs)

    monkeypatch.setattr(language_model, "train_step", limited)


def test_an_interrupted_run_continues_bit_for_bit(text, monkeypatch):
    text.write_text(
        text.read_text()[:140]
    )  # 6 pieces: the second epoch begins after the interruption's checkpoint
    more = ["--dropout", "0.3", "--checkpoint-every", "4", "--max-norm", "1"]
    whole = [*options(text, *more, steps=9), "--out", str(text.parent / "whole")]
    assert language_model.main(whole) == 0
    with monkeypatch.context() as patch:
        interrupt_after(7, patch)  # the checkpoint is of step 4: three steps are done again
        assert language_model.main(options(text, *more, steps=9)) == 130
    run = text.parent / "run"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["4"]
    assert not (run / "result.json").exists()
    assert language_model.main(options(text, *more, steps=9)) == 0
    assert result_of(run) == result_of(text.parent / "whole")
    assert 0 < result_of(run)["clip_count"] <= 9
    assert digest_of_checkpoint(run, 9) == digest_of_checkpoint(text.parent / "whole", 9)


def test_a_killed_process_continues_bit_for_bit(text):
    more = ["--dropout", "0.3", "--checkpoint-every", "10"]
    command = options(text, *more, steps=80)
    script = language_model.__file__
    # The package as this process found it, wherever that is.
    package = str(Path(gradclip_jax.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, script, *command],
        env={**os.environ, "PYTHONPATH": package},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    run = text.parent / "run"
    while process.poll() is None and not (run / "checkpoints" / "20").exists():
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (run / "result.json").exists()
    assert language_model.main(command) == 0
    assert language_model.main([*command, "--out", str(text.parent / "whole")]) == 0
    assert result_of(run) == result_of(text.parent / "whole")
    assert digest_of_checkpoint(run, 80) == digest_of_checkpoint(text.parent / "whole", 80)


def test_a_finished_run_is_reported_again_and_left_alone(text, capsys):
    assert language_model.main(options(text)) == 0
    first = capsys.readouterr().out
    before = contents(text.parent / "run")
    assert language_model.main(options(text)) == 0
    again = capsys.readouterr().out
    assert f"finished. To train anew, delete {text.parent / 'run'}" in again
    assert first[first.index("text written with") :] in again
    assert contents(text.parent / "run") == before


@pytest.mark.parametrize("damage", ["truncated", "garbled", "log"])
def test_a_damaged_checkpoint_is_named_and_kept(text, capsys, damage):
    assert language_model.main(options(text, "--checkpoint-every", "2")) == 0
    run = text.parent / "run"
    (run / "result.json").unlink()  # as if it had been killed just before the end
    checkpoint = run / "checkpoints" / "3"
    if damage == "log":
        log = checkpoint / "log" / "metadata"
        log.write_text(log.read_text().replace('"loss": [', '"loss": [1'))
    else:
        files = (path for path in checkpoint.rglob("*") if path.is_file())
        arrays = max(files, key=lambda file: file.stat().st_size)
        content = arrays.read_bytes()
        middle = len(content) // 2
        garbled = content[:middle] + bytes(b ^ 255 for b in content[middle:])
        arrays.write_bytes(content[:middle] if damage == "truncated" else garbled)
    before = contents(run)
    line = refusal(capsys, options(text, "--checkpoint-every", "2"))
    assert str(checkpoint) in line
    assert "move that directory away to continue from step 2" in line
    assert contents(run) == before
    checkpoint.rename(text.parent / "away")
    assert language_model.main(options(text, "--checkpoint-every", "2")) == 0


def test_a_directory_of_another_run_is_refused_with_what_differs(text, capsys):
    assert language_model.main(options(text)) == 0
    run = text.parent / "run"
    before = contents(run)
    line = refusal(capsys, options(text, "--units", "16", "--clip", "none"))
    assert "units 8 (now 16)" in line
    assert "clip 'clip_by_global_norm' (now 'none')" in line
    assert str(run) in line
    text.write_text(text.read_text().upper())
    assert "corpus" in refusal(capsys, options(text))
    assert contents(run) == before


def test_a_garbled_configuration_is_named(text, capsys):
    assert language_model.main(options(text)) == 0
    config = text.parent / "run" / "config.json"
    config.write_text(config.read_text()[:-9])
    assert str(config) in refusal(capsys, options(text))
    config.unlink()
    assert "must hold the config.json" in refusal(capsys, options(text))


# Bad input


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--units", "0"], "`--units` must be at least 1, got 0."),
        (["--layers", "-1"], "`--layers` must be at least 1, got -1."),
        (["--batch", "0"], "`--batch` must be at least 1, got 0."),
        (["--unroll", "0"], "`--unroll` must be at least 1, got 0."),
        (["--epochs", "0"], "`--epochs` must be at least 1, got 0."),
        (["--steps", "0"], "`--steps` must be at least 1, got 0."),
        (["--checkpoint-every", "0"], "`--checkpoint-every` must be at least 1, got 0."),
        (["--vocabulary", "1"], "`--vocabulary` must be at least 2, got 1."),
        (["--dropout", "1"], "`--dropout` must be at least 0 and below 1, got 1.0."),
        (["--learning-rate", "nan"], "`--learning-rate` must be positive, got nan."),
        (["--cotangent-limit", "0"], "`--cotangent-limit` must be positive, got 0.0."),
        (["--unroll", "x"], "argument --unroll: invalid int value: 'x'"),
        (["--clip", "clip_by_globl_norm"], "the nearest are `clip_by_global_norm`"),
        (["--clip", "clip_cotangent"], "`--clip` must be a clip, got clip_cotangent: "),
        (["--clip", "skip_spikes"], "wraps an optimizer and is not a clip"),
        (["--clip", "clip_by_group_norm"], "a `labels`, which `clip_by_group_norm` needs"),
        (["--clip", "percentile", "--clip-arg", "k=1"], "unknown argument of `percentile` 'k'"),
        (["--clip", "zero_nonfinite"], "`--clip` must measure a norm to be logged"),
        (["--optimizer", "adm"], "nearest: adam"),
        (["--optimizer", "lbfgs"], "must work on gradients and parameters alone"),
        (["--max-norm", "-1"], "`max_norm` must be non-negative, got -1.0."),
        (["--max-norm", "nan"], "`max_norm`"),
        (["--clip-arg", "order"], "`--clip-arg` must look like key=value, got 'order'."),
        (["--clip-arg", "ordr=1"], "unknown argument of `clip_by_global_norm` 'ordr'"),
        (["--optimizer-arg", "momentm=1"], "unexpected keyword argument 'momentm'"),
        (["--compare", "--clip", "none"], "`--compare` needs a strategy as `--clip`, got 'none'."),
        (["--batch", "2000"], "must hold at least batch × unroll + 1 = 10001 chars to train on"),
        (["--chat"], "`--chat` needs `--dialogues`, or `--preset chatbot`."),
        (["--dialogues"], "`--data` must hold, for `--dialogues`, a question among its last lines"),
        (["--data", "no/such/file"], "`--data` must be a file or a directory that exists, got no/"),
    ],
)
def test_a_bad_argument_is_refused_in_one_line(text, capsys, arguments, expected):
    assert expected in refusal(capsys, options(text, *arguments))
    assert sorted(path.name for path in text.parent.iterdir()) == ["text.txt"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "`--data` must hold text, got the empty file"),
        (b" \n\n", "`--data` must hold text, got the empty file"),
        (b"caf\xe9 au lait" * 50, "`--data` must be UTF-8 text, got"),
        (b"too short", "`--data` must hold at least batch × unroll + 1 = 21 chars to train on"),
    ],
)
def test_a_bad_text_is_refused_in_one_line(text, capsys, content, expected):
    text.write_bytes(content)
    assert expected in refusal(capsys, options(text))
    assert sorted(path.name for path in text.parent.iterdir()) == ["text.txt"]


def test_a_directory_without_the_three_files_is_refused(text, capsys):
    folder = text.parent / "splits"
    folder.mkdir()
    (folder / "ptb.train.txt").write_text(text.read_text())
    (folder / "ptb.test.txt").write_text(text.read_text())
    line = refusal(capsys, options(text, "--data", str(folder)))
    assert "one file named after each of train, valid and test" in line
    assert "0 for valid" in line
    (folder / "ptb.valid.txt").write_text("x")
    line = refusal(capsys, options(text, "--data", str(folder)))
    assert "`--data` must hold at least 2 chars for valid, got 1." in line
    assert not (text.parent / "run").exists()


def test_an_output_that_is_a_file_is_refused_and_kept(text, capsys):
    line = refusal(capsys, options(text, "--out", str(text)))
    assert f"`--out` must be a directory, got the file {text}." in line
    assert len(text.read_text()) > 1000


# Text


def test_segments_are_contiguous_streams_and_every_token_but_the_first_is_a_target_once():
    pieces = list(data.segments(np.arange(23, dtype=np.int32), batch=2, unroll=5))
    assert [piece[0].shape for piece in pieces] == [(5, 2)] * 3
    inputs, targets, weights = (np.concatenate(part) for part in zip(*pieces, strict=True))
    np.testing.assert_array_equal(inputs[:, 0], np.arange(15))
    np.testing.assert_array_equal(inputs[:7, 1], np.arange(15, 22))
    np.testing.assert_array_equal(targets[weights == 1], (inputs + 1)[weights == 1])
    assert sorted(targets[weights == 1]) == list(range(1, 23))


def test_a_single_text_is_split_in_its_own_order(text):
    corpus = data.load_corpus(text, "char", 100, text.parent)
    splits = (corpus.train, corpus.valid, corpus.test)
    assert "".join(map(corpus.text, splits)) == text.read_text()
    sizes = [len(split) / len(text.read_text()) for split in splits]
    np.testing.assert_allclose(sizes, [0.90, 0.05, 0.05], atol=0.001)


def test_rare_and_unseen_words_are_unknown_and_lines_end(tmp_path):
    (tmp_path / "a.train.txt").write_text("b a <unk> b\nb a it's\n")
    (tmp_path / "a.valid.txt").write_text("a new b\n")
    (tmp_path / "a.test.txt").write_text("b\n")
    corpus = data.load_corpus(tmp_path, "word", 4, tmp_path)
    assert corpus.vocabulary == ["<unk>", "b", "<eos>", "a"]
    assert corpus.train.tolist() == [1, 3, 0, 1, 2, 1, 3, 0, 2]
    assert corpus.valid.tolist() == [3, 0, 1, 2]
    assert corpus.text(corpus.train) == "b a <unk> b\nb a <unk> <eos>"


def test_words_of_plain_text_stand_apart_from_punctuation():
    tokens = data.tokenise("Clip, then step.\n", "word", r"\w+|[^\w\s]")
    assert tokens == ["Clip", ",", "then", "step", ".", "<eos>"]


def test_the_digest_tells_one_text_from_another(text):
    one = data.load_corpus(text, "char", 100, text.parent).digest
    assert one == data.load_corpus(text, "char", 100, text.parent).digest
    assert one != data.load_corpus(text, "word", 100, text.parent).digest
    text.write_text(text.read_text().replace("norm", "morn"))
    assert one != data.load_corpus(text, "char", 100, text.parent).digest


def test_prose_is_read_without_running_code_each_paragraph_once(tmp_path):
    library = tmp_path / "library"
    (library / "test").mkdir(parents=True)
    prose = "A sentence of prose that\n    goes on here."
    (library / "a.py").write_text(
        f'"""{prose}\n\n    >>> f(1, 2, 3, 4, 5)\n    1.\n"""\nraise OSError'
    )
    (library / "b.py").write_text(
        f'def f():\n    """{prose}\n\n    x = [[0, 1], [2, 3], [4, 5]].\n    """'
    )
    (library / "c.py").write_text("this is } not Python")
    (library / "test" / "d.py").write_text('"""Tests are no prose, so this is left out."""')
    expected = "A sentence of prose that goes on here."
    assert data.python_prose(tmp_path / "cache", library) == expected
    (cached,) = (tmp_path / "cache").iterdir()
    assert cached.read_text() == expected
    assert data.python_prose(tmp_path / "cache") == expected  # not the library: the cache


def test_the_built_in_corpus_is_english_and_the_same_from_the_cache(tmp_path):
    corpus = data.load_corpus(None, "char", 10_000, tmp_path)
    assert len(corpus.train) > 1_000_000
    assert len(corpus.vocabulary) < 100
    assert corpus.digest == data.load_corpus(None, "char", 10_000, tmp_path).digest
    assert 1.5 < data.WittenBell(corpus.train, 5, 100).nats(corpus.valid) / np.log(2) < 2.5


def test_an_unwritable_cache_costs_only_time(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "a.py").write_text('"""One sentence of English prose is enough."""')
    prose = data.python_prose(tmp_path / "file" / "cache", tmp_path)
    assert prose == "One sentence of English prose is enough."
    assert "not cached" in capsys.readouterr().err


# The n-gram


def test_a_bigram_gives_the_probabilities_worked_out_by_hand():
    # Counts 3, 2, 1 of 6 tokens and 3 types: unigrams (c + 3 · 1/3) / 9.
    # After 0 come 1, 1 and 2, which are 2 types: (c + 2 · unigram) / 5.
    bigram = data.WittenBell(np.array([0, 1, 0, 1, 0, 2]), 2, 3)
    after_0 = [bigram.probabilities(np.array([0, w]))[0] for w in range(3)]
    np.testing.assert_allclose(after_0, [8 / 45, 24 / 45, 13 / 45], rtol=1e-12)
    after_2 = [bigram.probabilities(np.array([2, w]))[0] for w in range(3)]  # 2 had no successor
    np.testing.assert_allclose(after_2, [4 / 9, 3 / 9, 2 / 9], rtol=1e-12)


@pytest.mark.parametrize("order", [1, 3, 5])
def test_the_probabilities_of_all_tokens_sum_to_one(order):
    rng = np.random.default_rng(order)
    gram = data.WittenBell(rng.zipf(1.5, 2000) % 7, order, 8)  # the token 7 never occurs
    for context in rng.integers(0, 8, (20, order)):
        total = sum(gram.probabilities(np.append(context, w))[-1] for w in range(8))
        assert total == pytest.approx(1, rel=1e-12)


def test_a_gram_with_too_many_contexts_is_refused():
    with pytest.raises(data.InputError, match=r"below 2 \*\* 63, got 10000 \*\* 5"):
        data.WittenBell(np.arange(9), 5, 10_000)


# The network


def network(**options) -> lm_model.LanguageModel:
    defaults = {"cell": "lstm", "layers": 2, "units": 8, "dropout": 0.0, "rngs": nnx.Rngs(0)}
    return lm_model.LanguageModel(11, **{**defaults, **options})


TOKENS = np.random.default_rng(0).integers(0, 11, 101).astype(np.int32)


def test_a_network_that_knows_nothing_scores_the_log_of_the_vocabulary():
    model = network()
    model.output[...] = jnp.zeros_like(model.output[...])
    nats = lm_model.score(model, data.segments(TOKENS, 4, 7), 4)
    assert nats == pytest.approx(np.log(11), rel=1e-6)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_the_state_carried_over_makes_pieces_equal_to_the_whole(cell):
    model = network(cell=cell)
    whole = lm_model.score(model, data.segments(TOKENS, 1, 100), 1)
    pieces = lm_model.score(model, data.segments(TOKENS, 1, 20), 1)
    assert pieces == pytest.approx(whole, rel=1e-6)
    forgetful = np.mean([
        lm_model.score(model, data.segments(TOKENS[at : at + 21], 1, 20), 1)
        for at in range(0, 100, 20)
    ])  # fmt: skip
    assert abs(forgetful - whole) > 1e-5


def test_an_lstm_step_is_that_of_flax():
    cell = nnx.OptimizedLSTMCell(8, 8, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    h, c, x = (jnp.asarray(rng.normal(size=(3, 8)), jnp.float32) for _ in range(3))
    (new_c, new_h), _ = cell((c, h), x)
    # Flax keeps the bias with the recurrent weights, in the same order of gates: i, f, g, o.
    assert cell.dense_h.bias is not None
    inputs = x @ cell.dense_i.kernel[...] + cell.dense_h.bias[...]
    ours = recurrent.lstm_step(inputs, (h, c), cell.dense_h.kernel[...])
    np.testing.assert_allclose(ours, (new_h, new_c), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("limit", [None, 1e-3])
@pytest.mark.parametrize("name", [name for name, cell in recurrent.CELLS.items() if cell.sums])
def test_the_gradient_of_the_weights_is_that_of_the_plain_scan(name, limit):
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.normal(size=(6, 3, 8)), jnp.float32) for _ in range(2))
    gradients = []
    for sums in (True, False):
        layer = recurrent.Recurrent(
            recurrent.CELLS[name], 8, 8, scale=0.5, cotangent_limit=limit, rngs=nnx.Rngs(0)
        )
        layer.cell = layer.cell._replace(sums=sums)

        def loss(layer, x, state):
            outputs, last = layer(x, state)
            return (outputs * cotangent).sum() + sum(jnp.sum(part) for part in last)

        start = tuple(part + 0.1 for part in layer.start(3))
        gradients.append(jax.tree.leaves(nnx.grad(loss, argnums=(0, 1, 2))(layer, x, start)))
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_dropout_draws_anew_in_training_and_never_in_validation():
    model = network(dropout=0.5)
    tokens = jnp.asarray(TOKENS[:20].reshape(5, 4))
    first, second = (model(tokens, model.start(4), deterministic=False)[0] for _ in range(2))
    assert float(jnp.abs(first - second).max()) > 1e-3
    first, second = (model(tokens, model.start(4), deterministic=True)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_cotangent_limit_acts_at_every_time_step_and_only_backwards():
    tokens = jnp.asarray(TOKENS[:80].reshape(20, 4))
    gradients, logits = {}, {}
    for limit in (None, 1e-8):
        model = network(cell="rnn", layers=1, cotangent_limit=limit)

        def loss(model):
            logits, _ = model(tokens, model.start(4), deterministic=True)
            return logits.sum(), logits

        grads, logits[limit] = nnx.grad(loss, has_aux=True)(model)
        gradients[limit] = float(jnp.abs(grads["layers"][0]["recurrent"][...]).max())
    np.testing.assert_array_equal(logits[None], logits[1e-8])
    assert gradients[None] > 1e-2
    # 20 steps × 4 streams, each with a state of at most 1 and a cotangent of at most 1e-8.
    assert 0 < gradients[1e-8] <= 80 * 1e-8


def test_a_sample_is_text_of_the_length_asked_for():
    drawn = lm_model.sample(network(), jnp.int32(0), jax.random.key(0), length=50)
    assert drawn.shape == (50,)
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < 11
    assert len(set(drawn.tolist())) > 3


def test_the_help_explains_which_loss_a_norm_of_5_belongs_to(capsys):
    with pytest.raises(SystemExit) as end:
        language_model.main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "Zaremba" in shown
    assert "steps of back-propagation through time (default: 50)" in " ".join(shown.split())
    listed = shown[shown.index("strategies of gradclip_jax:") :]
    assert {"zclip", "clip_by_value", "percentile"} < {*re.findall(r"\w+", listed)}


def test_every_name_that_the_help_lists_is_a_clip(standard_promotion):
    args = lm_options.options().parse_args([])
    for name in (*optimizers.strategies(), *optimizers.limits()):
        optimizers.build_optimizer(args, name, steps=1)
