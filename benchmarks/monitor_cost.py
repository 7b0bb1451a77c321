"""What watching costs: metrics and a monitor at every tenth step of the example's LSTM.

    python benchmarks/monitor_cost.py
    python benchmarks/monitor_cost.py --units 650 --every 1

The model, its sizes and its clip are those of `examples/language_model`. Steps with a monitor
and without take turns; what differs by less than the machine does from round to round is told by
the second table, of the time that the calls take on the host.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from harness import Spread, ratios

import gradclip_jax
from examples.language_model.model import LanguageModel

VOCABULARY, MAX_NORM = 100, 5.0
CALLS = 200
"""Calls on the host that are timed."""
TEXT = """\
A layer of {units} units, {batch} streams, {unroll} time steps, SGD with momentum behind
`clip_by_global_norm(5)`. One case is {every} steps. Without a monitor the step returns its loss
alone. Either the step returns `metrics(state)` as well, or they are read from the state after the
last of the {every}; then `record` takes them in. Medians over at most {rounds} rounds, and
quartiles; the ratio is that within a round.

"""
HOST_TEXT = """\
The calls on the host by themselves, with results that are ready, so that `record` also takes in
what was recorded: median and quartiles of {calls} calls. Beside a GPU they run while it computes.

"""


def language_model(units: int, batch: int, unroll: int) -> tuple[Callable[..., Any], list[Any]]:
    """A training step and its arguments; the first three are to be donated."""
    model = LanguageModel(VOCABULARY, "lstm", 1, units, 0.0, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    clip = gradclip_jax.clip_by_global_norm(MAX_NORM)
    optimizer = optax.chain(clip, optax.sgd(0.3, momentum=0.9))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (unroll + 1, batch))

    def loss_of(params: Any, carry: Any, inputs: Any, targets: Any) -> Any:
        logits, carry = nnx.merge(graph, params, rest)(inputs, carry, deterministic=True)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return unroll * nats.mean(), carry

    def step(params: Any, state: Any, carry: Any, inputs: Any, targets: Any, *, watch: bool) -> Any:
        differentiated = jax.value_and_grad(loss_of, has_aux=True)
        (loss, carry), grads = differentiated(params, carry, inputs, targets)
        updates, state = optimizer.update(grads, state, params)
        seen = {"loss": loss} | (gradclip_jax.metrics(state) if watch else {})
        return optax.apply_updates(params, updates), state, carry, seen

    data = [jnp.asarray(piece, jnp.int32) for piece in (tokens[:-1], tokens[1:])]
    return step, [params, optimizer.init(params), model.start(batch), *data]


def programs_of(step: Callable[..., Any], arguments: list[Any]) -> dict[bool, Any]:
    """The compiled step that returns metrics, and the one that does not."""
    return {
        watch: harness.compiled(
            functools.partial(step, watch=watch), *arguments, donate=(0, 1, 2)
        ).run
        for watch in (False, True)
    }


def copied(arguments: list[Any]) -> list[Any]:
    """What a step donates, to be donated."""
    return [*jax.tree.map(jnp.copy, tuple(arguments[:3]))]


def cases_of(
    programs: dict[bool, Any], arguments: list[Any], every: int
) -> dict[str, Callable[[], Any]]:
    """So many steps each, with and without a monitor at the last of them."""

    def case(watch: bool, monitor: gradclip_jax.Monitor | None) -> Callable[[], Any]:
        own, count = copied(arguments), 0

        def run() -> Any:
            nonlocal count
            seen = {}
            for _ in range(every):
                *own[:], seen = programs[watch](*own, *arguments[3:])
            count += every
            if monitor is not None:
                numbers = seen if watch else gradclip_jax.metrics(own[1])
                monitor.record(count, numbers, loss=seen["loss"])
            return own

        return run

    return {
        "no monitor": case(False, None),
        "metrics in the step, monitor": case(True, silent_monitor()),
        "metrics of the state, monitor": case(False, silent_monitor()),
    }


def silent_monitor() -> gradclip_jax.Monitor:
    """A monitor that goes through all its conditions and tells no one."""
    return gradclip_jax.Monitor(on_alert=lambda alert: None)


def host_times(program: Any, arguments: list[Any]) -> dict[str, list[float]]:
    """Seconds of each call, in turn."""
    _, state, _, seen = program(*copied(arguments), *arguments[3:])
    loss = seen["loss"]
    monitor = silent_monitor()
    noise = np.exp(0.3 * np.random.default_rng(0).standard_normal(CALLS + 1))
    times: dict[str, list[float]] = {"metrics(state)": [], "record": [], "both": []}
    for number, factor in enumerate(noise.tolist()):
        numbers = jax.block_until_ready(gradclip_jax.metrics(state) | {"grad_norm": loss * factor})
        start = time.perf_counter()
        gradclip_jax.metrics(state)
        between = time.perf_counter()
        monitor.record(number, numbers, loss=loss)
        end = time.perf_counter()
        if number:  # the first one compiles
            for name, length in zip(
                times, (between - start, end - between, end - start), strict=True
            ):
                times[name].append(length)
    return times


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; bad input ends in one line on stderr and exit status 2."""
    parser = harness.command_line("Measure what metrics and a monitor add to a training step.")
    add = parser.add_argument
    add("--units", default="256", help="units of the LSTM (%(default)s)")
    add("--batch", default="32", help="parallel streams (%(default)s)")
    add("--unroll", default="50", help="time steps (%(default)s)")
    add("--every", default="10", help="steps from record to record (%(default)s)")
    return harness.run("Cost of the monitor", parser, measure, argv)


def measure(args: argparse.Namespace) -> str:
    """Both tables."""
    sizes = {
        name: harness.number(f"--{name}", getattr(args, name))
        for name in ("units", "batch", "unroll", "every")
    }
    every = sizes.pop("every")
    step, arguments = language_model(**sizes)
    harness.progress("compile")
    programs = programs_of(step, arguments)
    cases = cases_of(programs, arguments, every)
    harness.progress("steps")
    times = harness.interleaved(cases, rounds=args.rounds, seconds=args.seconds)
    alone = times["no monitor"]
    rows = [
        [name, Spread.of(of_case, 1e3 / every), Spread.of(ratios(of_case, alone))]
        for name, of_case in times.items()
    ]
    harness.progress("calls")
    host = host_times(programs[True], arguments)
    part = 100 / float(np.median(alone))
    calls = [[name, Spread.of(one, 1e6), Spread.of(one, part)] for name, one in host.items()]
    return "".join(
        [
            TEXT.format(**sizes, every=every, rounds=args.rounds),
            harness.table(("case", "ms per step", "ratio"), rows),
            "\n",
            HOST_TEXT.format(calls=CALLS),
            harness.table(("call", "µs", f"% of {every} steps"), calls),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
