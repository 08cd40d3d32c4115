"""`report.html`: a self-contained page without scripts or downloads."""

import html
import json
import pathlib
from collections.abc import Callable
from typing import Any

from keras_dpo.utils.files import write_beside

WIDTH, HEIGHT, LEFT, BOTTOM = 420, 220, 52, 28
# Minimum span of a chart's y axis, as a share of the largest value.
LEAST_SPAN = 0.05
COLORS = ("#1a6fb0", "#c8501e")
CHARTS = (
    ("Loss", ("loss",)),
    ("Reward margin", ("reward_margin",)),
    ("Reward accuracy", ("reward_accuracy",)),
    ("Rewards", ("chosen_reward", "rejected_reward")),
    ("Log-probs", ("chosen_log_prob", "rejected_log_prob")),
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto;
       max-width: 920px; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
.charts { display: flex; flex-wrap: wrap; gap: 1em; }
svg { background: #fafafa; border: 1px solid #ddd; }
svg text { font: 11px system-ui, sans-serif; fill: #555; }
table { border-collapse: collapse; width: 100%; }
td, th { border: 1px solid #ddd; padding: .4em .6em; text-align: left;
         vertical-align: top; white-space: pre-wrap; }
th { background: #f3f3f3; } li { margin: .1em 0; }
"""

Point = tuple[float, float]
Points = list[Point]


def write_report(
    directory: pathlib.Path,
    title: str,
    data_lines: list[str],
    before: list[dict[str, str]],
    after: list[dict[str, str]],
) -> None:
    """Write the page from the run's `metrics.jsonl` and the arguments.

    Args:
        directory: The run's directory; the page is written atomically.
        title: Name of the run.
        data_lines: Lines of the data report.
        before: Samples with `prompt` and `policy` from before training.
        after: Samples from after training, in the same format.
    """
    path = directory / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    charts = "".join(_chart(name, keys, records) for name, keys in CHARTS)
    page = "\n".join(
        [
            "<!doctype html><html lang='en'><meta charset='utf-8'>",
            f"<title>{html.escape(title)}</title><style>{STYLE}</style>",
            f"<h1>{html.escape(title)}</h1>",
            f"<div class='charts'>{charts}</div>",
            "<p>Lines: means over the training pairs since the last logged "
            "step. Dots: validation at the end of an epoch.</p>",
            "<h2>Epochs</h2>" + _final_table(records),
            "<h2>Data</h2><ul>",
            *(f"<li>{html.escape(line)}</li>" for line in data_lines),
            "</ul>",
            _samples_table(before, after),
            "</html>",
        ]
    )
    write_beside(directory / "report.html", page.encode())


def _series(records: list[dict[str, Any]], key: str, ends: bool) -> Points:
    return [
        (record["step"], record[key])
        for record in records
        if record.get(key) is not None and ("end_of_epoch" in record) == ends
    ]


def _chart(
    name: str, keys: tuple[str, ...], records: list[dict[str, Any]]
) -> str:
    lines = {key: _series(records, key, False) for key in keys}
    dots = {key: _series(records, f"val_{key}", True) for key in keys}
    points = [p for group in (lines, dots) for s in group.values() for p in s]
    if not points:
        return ""
    place, axes = _axes(points)
    parts = [
        f"<text x='{LEFT}' y='18' font-weight='bold'>{name}</text>",
        *axes,
    ]
    for index, key in enumerate(keys):
        color = COLORS[index]
        path = " ".join(f"{x},{y}" for x, y in map(place, lines[key]))
        parts.append(
            f"<polyline points='{path}' fill='none' stroke='{color}' "
            "stroke-width='1.8'/>"
        )
        parts += [
            f"<circle cx='{x}' cy='{y}' r='4' fill='{color}'/>"
            for x, y in map(place, dots[key])
        ]
        if len(keys) > 1:
            parts.append(
                f"<text x='{WIDTH - 12}' y='{14 + 12 * index}' "
                f"text-anchor='end' style='fill:{color}'>{key}</text>"
            )
    return f"<svg width='{WIDTH}' height='{HEIGHT}'>{''.join(parts)}</svg>"


def _axes(points: Points) -> tuple[Callable[[Point], Point], list[str]]:
    """(function from a point to its pixel, SVG of the grid and its labels)."""
    xs, ys = zip(*points, strict=True)
    low, high = min(ys), max(ys)
    # A change in the sixth digit must not fill the chart.
    least = LEAST_SPAN * max(abs(low), abs(high)) or LEAST_SPAN
    pad = max(0.05 * (high - low), (least - (high - low)) / 2)
    low, high = low - pad, high + pad
    first, last = min(0, *xs), max(*xs, 1)

    def place(point: Point) -> Point:
        x = LEFT + (point[0] - first) / (last - first) * (WIDTH - LEFT - 12)
        share = (point[1] - low) / (high - low)
        return round(x, 1), round(28 + (1 - share) * (HEIGHT - 28 - BOTTOM), 1)

    parts = []
    for value in (low + pad, (low + high) / 2, high - pad):
        y = place((first, value))[1]
        parts.append(
            f"<line x1='{LEFT}' x2='{WIDTH - 12}' y1='{y}' y2='{y}' "
            f"stroke='#e4e4e4'/><text x='{LEFT - 6}' y='{y + 4}' "
            f"text-anchor='end'>{value:.3g}</text>"
        )
    for value in (first, last):
        x = place((value, low))[0]
        parts.append(
            f"<text x='{x}' y='{HEIGHT - 8}' text-anchor='middle'>"
            f"{value:g}</text>"
        )
    middle = (LEFT + WIDTH) / 2
    parts.append(
        f"<text x='{middle}' y='{HEIGHT - 8}' text-anchor='middle'>step</text>"
    )
    return place, parts


def _final_table(records: list[dict[str, Any]]) -> str:
    ends = [record for record in records if "end_of_epoch" in record]
    if not ends:
        return "<p>No epoch was finished.</p>"
    names = [n for n in ends[-1] if n not in ("step", "end_of_epoch")]
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{_number(end.get(name))}</td>" for end in ends[-6:])
        + "</tr>"
        for name in names
    )
    heads = "".join(
        f"<th>epoch {end['end_of_epoch'] + 1}</th>" for end in ends[-6:]
    )
    return f"<table><tr><th></th>{heads}</tr>{rows}</table>"


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, int | float) else "-"


def _samples_table(
    before: list[dict[str, str]], after: list[dict[str, str]]
) -> str:
    if not after:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(new['prompt'])}</td>"
        f"<td>{html.escape(old['policy'])}</td>"
        f"<td>{html.escape(new['policy'])}</td></tr>"
        for old, new in zip(before, after, strict=True)
    )
    return (
        "<h2>Answers to held-out prompts</h2><table><tr><th>prompt</th>"
        f"<th>before</th><th>after</th></tr>{rows}</table>"
    )
