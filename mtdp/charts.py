"""Curves and tables as HTML that asks for nothing: inline SVG, and the Markdown that this package writes."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

# Told apart by those who do not see all colours, and dark enough on white (after Okabe and Ito).
PALETTE: Final = ("#0072b2", "#c1570a", "#008560", "#a5548a", "#8a6d00", "#2f7fa8", "#7a3b1d", "#555555")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 420, 190, 46, 22, 8
_MOST_POINTS: Final = 240
_NEAR_ZERO: Final = 0.2  # of the highest value: an axis that begins so low begins at 0
Points = Sequence[tuple[float, float]]


def chart(title: str, lines: Mapping[str, Points], mark: float | None = None) -> str:
    """Return curves over the same axes; many points are averaged in groups.

    Args:
        title: what the numbers are.
        lines: name -> (x, y), x growing; what is not finite is left out.
        mark: an x at which a dashed line stands.
    """
    drawn = {name: _fewer([p for p in points if math.isfinite(p[1])]) for name, points in lines.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    xs, ys = ([point[axis] for points in drawn.values() for point in points] for axis in (0, 1))
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    if 0 < low < _NEAR_ZERO * high:
        low = 0.0
    if high == low:
        low, high = low - abs(low or 1) / 2, high + abs(high or 1) / 2

    def place(x: float, y: float) -> str:
        across = _LEFT + (x - left) / max(right - left, 1e-12) * (_WIDTH - _LEFT - 6)
        return f"{across:.1f},{_TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM):.1f}"

    parts = [_axes(left, right, low, high)]
    if mark is not None and left <= mark < right:
        x = place(mark, low).split(",")[0]
        parts.append(f"<line class=mark x1={x} x2={x} y1={_TOP} y2={_HEIGHT - _BOTTOM} />")
    for number, points in enumerate(drawn.values()):
        path = " ".join(place(*point) for point in points)
        colour = PALETTE[number % len(PALETTE)]
        if len(points) == 1:
            x, y = path.split(",")
            parts.append(f'<circle cx={x} cy={y} r=3 fill="{colour}" />')
        parts.append(f'<polyline points="{path}" fill=none stroke="{colour}" stroke-width=1.6 />')
    told = "; ".join(f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in drawn.items())
    keys = "".join(
        f'<span class=key style="background:{PALETTE[i % len(PALETTE)]}"></span>{html.escape(name)} '
        for i, name in enumerate(drawn)
    )
    return (
        f"<figure><figcaption><b>{html.escape(title)}</b> {keys if len(drawn) > 1 else ''}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{html.escape(f"{title}: {told}")}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _fewer(points: Points) -> Points:
    size = -(-len(points) // _MOST_POINTS) or 1
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(group[-1][0], math.fsum(y for _, y in group) / len(group)) for group in groups]


def _axes(left: float, right: float, low: float, high: float) -> str:
    bottom = _HEIGHT - _BOTTOM
    lines = "".join(
        f"<line class=axis x1={_LEFT} x2={_WIDTH - 6} y1={y:.1f} y2={y:.1f} />"
        f"<text x={_LEFT - 5} y={y + 4:.1f} text-anchor=end>{value:.3g}</text>"
        for y, value in ((_TOP, high), ((_TOP + bottom) / 2, (low + high) / 2), (bottom, low))
    )
    ends = (
        f"<text x={_LEFT} y={_HEIGHT - 5}>{left:g}</text>"
        f"<text x={_WIDTH - 6} y={_HEIGHT - 5} text-anchor=end>{right:g}</text>"
    )
    return lines + ends


def from_markdown(text: str, folder: Path) -> str:
    """Return the HTML of Markdown as this package writes it: headings, paragraphs, lists, tables, images of a folder.

    An image is put into the page; one that cannot be read is left out. Headings are one level lower than they say.
    """
    blocks = (block.strip() for block in re.split(r"\n\s*\n", _apart(text)))
    return "".join(_block(block.splitlines(), folder) for block in blocks if block)


def _apart(text: str) -> str:
    """Put an empty line between a table and what follows it, and around headings."""
    text = re.sub(r"(?m)^(#+ .*)$", r"\n\1\n", text)
    return re.sub(r"(?m)^(\|.*)\n(?!\|)", r"\1\n\n", text)


def _block(lines: Sequence[str], folder: Path) -> str:
    first = lines[0]
    if heading := re.match(r"(#+) (.*)", first):
        level = min(6, len(heading[1]) + 1)
        return f"<h{level}>{_inline(heading[2])}</h{level}>"
    if image := re.fullmatch(r"!\[(.*)\]\(([^/)]+\.png)\)", first):
        return _image(image[1], folder / image[2])
    if first.startswith("|"):
        return _table(list(_cells(lines)))
    if first.startswith("- "):
        return f"<ul>{''.join(f'<li>{_inline(line[2:])}' for line in lines)}</ul>"
    return f"<p>{_inline(' '.join(lines))}</p>"


def _image(alt: str, path: Path) -> str:
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError:
        return ""
    caption = f"<figcaption>{html.escape(alt)}</figcaption>"
    return f'<figure><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">{caption}</figure>'


def in_table(name: str) -> str:
    """Return a name as a cell of a Markdown table may hold it: a bar would end the cell."""
    return name.replace("|", r"\|")


def _cells(lines: Sequence[str]) -> Iterator[list[str]]:
    for line in lines:
        if not re.fullmatch(r"[|\s:-]+", line):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def _table(rows: list[list[str]]) -> str:
    head = "".join(f"<th scope=col>{_inline(cell)}" for cell in rows[0])
    body = "".join(
        f"<tr><th scope=row>{_inline(row[0])}{''.join(f'<td>{_inline(cell)}' for cell in row[1:])}" for row in rows[1:]
    )
    label = html.escape(rows[0][0])
    return (
        f'<div class=scroll role=region tabindex=0 aria-label="Table: {label}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _inline(text: str) -> str:
    """Return escaped text with its bold words and its code."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text.replace(r"\|", "|")))
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)
