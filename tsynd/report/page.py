"""The page that both reports are: one self-contained HTML file from one template; texts are escaped by it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tsynd.utils.atomic import atomic_path
from tsynd.utils.errors import require

__all__ = ["write_page"]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>{{ style | safe }}</style></head><body>
<h1>{{ heading }}</h1>
<p class="soft">{{ facts | join(" · ") }}</p>
{% for text in lead %}<p class="lead">{{ text }}</p>
{% endfor %}{% for name, body in sections %}<h2>{{ name }}</h2>
{{ body | safe }}
{% endfor %}<details><summary>{{ details[0] }}</summary><div class="card"><table>
{% for row in details[1] %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div></details>
</body></html>
"""


def write_page(
    path: Path,
    *,
    title: str,
    heading: str,
    style: str,
    facts: Sequence[str],
    lead: Sequence[str],
    sections: Iterable[tuple[str, str]],
    details: tuple[str, Sequence[Sequence[Any]]],
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: of the file.
        title: of the browser's tab.
        heading: of the page.
        style: CSS.
        facts: short texts below the heading.
        lead: the first sentences.
        sections: title (text) and body (HTML) each.
        details: summary of a folded table at the end, and its rows.
    """
    environment = require("jinja2", "cli").Environment(autoescape=True)
    page: str = environment.from_string(_PAGE).render(
        title=title, heading=heading, style=style, facts=facts, lead=lead, sections=sections, details=details
    )
    with atomic_path(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))
