"""The drawings of docs/architecture.md: ``python tests/drawings.py`` writes them; tests/test_house.py compares them.

The rooms are those of STANDS_ON, which the sources are held against.
"""

from __future__ import annotations

from pathlib import Path

from test_house import STANDS_ON, heights

IMAGES = Path(__file__).parent.parent / "docs" / "images"

_STYLE = (
    "text{font:13px sans-serif;fill:#222}.n{font-weight:bold}.s{font-size:11px;fill:#555}"
    "rect.b{fill:#eef3fa;stroke:#5577aa}rect.w{fill:#fff}path{stroke:#5577aa;fill:none;stroke-width:1.2}"
)
# room: middle of its box from the left, what it holds
_ROOMS = {
    "cli": (450, "every command"),
    "study": (300, "does it help on your data?"),
    "jobs": (300, "run, train: resumable"),
    "training": (160, "classifiers, autoencoders"),
    "report": (390, "pages and pictures"),
    "distributed": (590, "shards, Ray, packing"),
    "export": (800, "ONNX, TorchScript, AOTI"),
    "synthesis": (590, "the ascent"),
    "evaluation": (160, "metrics, shifts, attacks"),
    "posteriors": (450, "T samples for the price of one"),
    "data": (160, "readers, splits, streams"),
    "models": (390, "networks and their files"),
    "ops": (590, "fused operators"),
    "fx": (800, "graph surgery"),
    "utils": (390, "errors, files, hashes, devices"),
}
_WIDTH, _HEIGHT, _FLOOR = 190, 40, 74

# the way of a batch: module, what happens there
_WAY = [
    ("data/dataset.py", "images [B, C, H, W] in [0, 1], labels, sample ids; checked once"),
    ("synthesis/synthesizer.py", "in whole tiles, so that the batch size changes no image"),
    ("models/autoencoder.py", "z0 = encode(x)"),
    ("synthesis/ascent.py", "K times: one value, one gradient, one step"),
    ("models/autoencoder.py", "x = decode(z)"),
    ("posteriors/mc_dropout.py", "up to the first active dropout once: features [B, D]"),
    ("ops/operators.py", "T samples in one call: MI [B] and its gradient; back through the decoder"),
    ("ops/operators.py", "ascend_: step along the gradient, projected into the ball around z0"),
    ("synthesis/result.py", "the best iterate: images, labels, uncertainty before and after, status"),
]
_LOOP = (3, 7)


def _page(width: int, height: int, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    marker = (
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" style="fill:#5577aa;stroke:none"/></marker></defs>'
    )
    ground = f'<rect class="w" width="{width}" height="{height}" rx="6"/>'
    return "\n".join([head, f"<style>{_STYLE}</style>", marker, ground, *parts, "</svg>", ""])


def _box(middle: int, top: int, width: int, name: str, text: str) -> str:
    return (
        f'<rect class="b" x="{middle - width // 2}" y="{top}" width="{width}" height="{_HEIGHT}" rx="4"/>'
        f'<text class="n" x="{middle}" y="{top + 17}" text-anchor="middle">{name}</text>'
        f'<text class="s" x="{middle}" y="{top + 32}" text-anchor="middle">{text}</text>'
    )


def house() -> str:
    """The rooms by floors, and who stands on whom."""
    pairs = {(room, part) for room, parts in STANDS_ON.items() for part in parts}
    height = heights(pairs)
    top = {room: 16 + (max(height.values()) - height[room]) * _FLOOR for room in STANDS_ON}
    lines = []
    for a, b in sorted(pairs):
        start, end = (_ROOMS[a][0], top[a] + _HEIGHT), (_ROOMS[b][0], top[b] - 2)
        bend = (end[1] - start[1]) // 2
        curve = f"M{start[0]} {start[1]}C{start[0]} {start[1] + bend} {end[0]} {end[1] - bend} {end[0]} {end[1]}"
        lines.append(f'<path d="{curve}" marker-end="url(#a)"/>')
    boxes = [_box(_ROOMS[room][0], top[room], _WIDTH, room, _ROOMS[room][1]) for room in STANDS_ON]
    return _page(910, max(top.values()) + _HEIGHT + 16, lines + boxes)


def way() -> str:
    """One batch from the data to the result."""
    parts = []
    for number, (module, text) in enumerate(_WAY):
        top = 16 + number * 58
        parts.append(_box(330, top, 500, f"tsynd/{module}", text))
        if number:
            parts.append(f'<path d="M330 {top - 18}V{top - 2}" marker-end="url(#a)"/>')
    first, last = (16 + number * 58 + _HEIGHT // 2 for number in _LOOP)
    parts.append(f'<path d="M580 {last}H620V{first}H582" marker-end="url(#a)"/>')
    parts.append(f'<text class="s" x="628" y="{(first + last) // 2}">K steps</text>')
    return _page(700, 16 + len(_WAY) * 58, parts)


DRAWINGS = {"house.svg": house, "batch.svg": way}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (IMAGES / name).write_text(draw())
