"""HTML of pages that need nothing else: what is escaped, tables, lists, and the frame of a page."""

from __future__ import annotations

import base64
import hashlib
import html
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import lora_sr
from lora_sr.errors import printable

STYLE, SCRIPT = (Path(__file__).with_name(name) for name in ('page.css', 'page.js'))
# The browser is told, too, to fetch nothing and to run no script but ours.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<footer>Written by lora_sr {version}.</footer>
<script>{script}</script>
</body>
</html>
"""


def text(content: object) -> str:
    """Any text as HTML, also between quotes, without what cannot be shown."""
    return html.escape(printable(str(content)))


def page(title: str, body: str) -> bytes:
    """A page.

    Args:
        title: As plain text.
        body: As HTML, the heading of first level included.
    """
    script = SCRIPT.read_text('utf-8')
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return PAGE.format(
        policy=text(POLICY.format(digest=digest)).replace('&#x27;', "'"),
        title=text(title),
        style=STYLE.read_text('utf-8'),
        body=body,
        version=text(lora_sr.__version__),
        script=script,
    ).encode()


def heading(content: str, level: int) -> str:
    """A heading of plain text."""
    return f'<h{level}>{text(content)}</h{level}>'


def paragraph(content: str, kind: str = '') -> str:
    """A paragraph of plain text."""
    return f'<p{_class(kind)}>{text(content)}</p>'


def items(contents: Iterable[str]) -> str:
    """A list of plain texts."""
    return f'<ul>{"".join(f"<li>{text(one)}</li>" for one in contents)}</ul>'


def facts(values: Mapping[str, str]) -> str:
    """Names and their values, all plain texts."""
    shown = (f'<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>' for name, value in values.items())
    return f'<dl>{"".join(shown)}</dl>'


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], chosen: int | None = None) -> str:
    """A table of plain texts, the first cell of each row its heading; it scrolls by itself where it is too wide.

    Args:
        caption: What it shows.
        head: The headings of its columns.
        rows: Its rows.
        chosen: The number of a row that is set off.
    """
    columns = ''.join(f'<th scope="col">{text(cell)}</th>' if cell else '<td></td>' for cell in head)
    lines = [
        f'<tr{_class("chosen" if number == chosen else "")}><th scope="row">{text(first)}</th>'
        f'{"".join(f"<td>{text(cell)}</td>" for cell in rest)}</tr>'
        for number, (first, *rest) in enumerate(rows)
    ]
    body = '\n'.join(lines)
    return (
        f'<div class="wide" role="region" aria-label="{text(caption)}" tabindex="0"><table>\n'
        f'<caption>{text(caption)}</caption>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def folded(summary: str, content: str) -> str:
    """HTML that is shown when it is asked for, and in print."""
    return f'<details><summary>{text(summary)}</summary>\n{content}\n</details>'


def command(words: Iterable[str]) -> str:
    """A line for the shell, which breaks between its words where it is too long."""
    shown = ' '.join(f'<span>{text(shlex.quote(word))}</span>' for word in words)
    return f'<pre><code>{shown}</code></pre>'


def _class(name: str) -> str:
    return f' class="{name}"' if name else ''
