"""The path of a gradient that `docs/layout.md` draws is the one that a gradient takes."""

import os
import re
import sys
from pathlib import Path

import jax.numpy as jnp

import gradclip_jax

PAGE = Path(__file__).parents[2] / "docs" / "layout.md"
PACKAGE = f"{Path(gradclip_jax.__file__).parent}{os.sep}"


def drawn() -> dict[str, str | None]:
    """The step that calls each step, by their indents."""
    steps = re.findall(r"^( *)(\d) ([\w.]+)  ", PAGE.read_text(), flags=re.MULTILINE)
    assert [number for _, number, _ in steps] == list("1234567")
    callers: dict[str, str | None] = {}
    above: list[tuple[str, str]] = []
    for indent, _, name in steps:
        above = [step for step in above if len(step[0]) < len(indent)]
        callers[name] = above[-1][1] if above else None
        above.append((indent, name))
    return callers


def name_of(code) -> str:
    """`_clip.clip_norms.update` for the function that `clip_norms` of `_clip.py` defines."""
    module = code.co_filename.removeprefix(PACKAGE).split(os.sep)[0].removesuffix(".py")
    return f"{module}.{code.co_qualname.replace('<locals>.', '')}"


def test_the_seven_steps_call_each_other_as_drawn():
    within: list[str] = []
    callers: dict[str, list[str]] = {}  # of the first call of each function, in order

    def watch(frame, event, _):
        if frame.f_code.co_filename.startswith(PACKAGE):
            if event == "call":
                name = name_of(frame.f_code)
                callers.setdefault(name, [*within])
                within.append(name)
            elif event == "return":
                within.pop()

    clip = gradclip_jax.clip_by_global_norm(1.0)
    # Shapes of no other test: what is compiled already is not traced again.
    grads = {"w": jnp.ones((3, 1, 7)), "b": jnp.ones(11)}
    state = clip.init(grads)
    sys.setprofile(watch)
    try:
        clip.update(grads, state)
    finally:
        sys.setprofile(None)
    steps = drawn()
    assert [name for name in callers if name in steps] == list(steps)
    assert all(caller is None or caller in callers[name] for name, caller in steps.items())
