"""One self-contained HTML page about a run: alerts, plots and candidates for the limit."""

import html
import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .alerts import Alert
from .plots import draw_histogram, draw_leaves, draw_norms
from .suggest import suggest_max_norm
from .summary import last_given

STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --line: #ddd; --code: #f6f6f6;
        --bad: #fdf3f3; --good: #f3fbf3 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em;
       color: var(--text); background: var(--page) }
h1, h2 { font-weight: 600 } h2 { margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .25em .8em; text-align: right;
        border-bottom: 1px solid var(--line) } td:first-child, th:first-child { text-align: left }
figure { margin: 0; overflow-x: auto } svg { max-width: 100%; min-width: 34em; height: auto }
.alert { border-left: 4px solid #d62728; padding: .3em 1em; margin: .8em 0; background: var(--bad) }
.calm { border-left: 4px solid #2ca02c; padding: .3em 1em; background: var(--good) }
pre { overflow-x: auto; background: var(--code); padding: 1em }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --page: #131313; --line: #444; --code: #222;
          --bad: #331d1d; --good: #1b2b1d }
  svg { filter: invert(.925) hue-rotate(180deg) }  /* plots are black on white */
}
"""


def run_page(
    history: Mapping[str, np.ndarray],
    norms: np.ndarray,
    leaf_norms: Mapping[str, np.ndarray],
    summary: Mapping[str, Any],
    alerts: Iterable[Alert],
) -> str:
    """The HTML: it loads no script, font or image."""
    advice = suggest_max_norm(norms) if np.isfinite(norms).any() else None
    limits = set[float]() if advice is None else {advice.max_norm, *_last_limit(history)}
    figures = {
        "Norm and limit": draw_norms(history),
        "Distribution of the norms": draw_histogram(norms, sorted(limits)),
    }
    if leaf_norms:
        figures["Leaf by leaf"] = draw_leaves(history["step"], leaf_norms)
    return _page(summary, alerts, figures, str(advice or ""))


def _page(
    summary: Mapping[str, Any], alerts: Iterable[Alert], figures: Mapping[str, Any], advice: str
) -> str:
    raised = list(alerts)
    parts = ["<h1>Gradient clipping</h1>", _table(summary), "<h2>Alerts</h2>"]
    parts += [_alert(alert) for alert in raised] or ['<p class="calm">None.</p>']
    for title, figure in figures.items():
        parts += [f"<h2>{html.escape(title)}</h2>", _svg(figure, title)]
    if advice:
        parts += ["<h2>Which limit</h2>", f"<pre>{html.escape(advice)}</pre>"]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>Gradient clipping</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _table(summary: Mapping[str, Any]) -> str:
    rows = []
    for name, value in summary.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {count}" for key, count in value.items()) or "none"
        shown = f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{html.escape(shown)}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def _alert(alert: Alert) -> str:
    since = f", since {alert.since}" if alert.since != alert.step else ""
    return (
        f'<div class="alert"><strong>{html.escape(alert.kind)}</strong> at step {alert.step}'
        f"{since}<br>{html.escape(alert.message)}<br>{html.escape(alert.advice)}</div>"
    )


def _svg(figure: Any, title: str) -> str:
    text = io.StringIO()
    # Without the date, the same run gives the same page.
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = drawing.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
    return f"<figure>{drawing}</figure>"


def _last_limit(history: Mapping[str, np.ndarray]) -> list[float]:
    """The limit of the last step, if it is positive and finite."""
    limit = last_given(history["clip_limit"])
    return [limit] if limit is not None and 0 < limit < math.inf else []
