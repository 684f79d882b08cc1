"""One HTML page that needs nothing but itself: no network, one inline script (sorting), light, dark and print.

A page is put together from blocks, each of which is a text of HTML made by one function:

    section(title, content, note=)           a headed part; nothing where it has no content
    finding(text, ...)                       what a figure says, in plain words, beside it
    figure(content, caption)                 a chart or a row of charts with its caption
    side_by_side(contents)                   charts in a row that wraps
    folded(summary, content)                 what only some readers want; printed as it stands
    table(columns, rows, caption=)           `report.table`: sortable, figures on the right
    line_chart(lines, ...)                   `report.chart`: curves
    bar_chart(groups, ...)                   `report.bars`: shares and amounts by name
    heat_map(values, ...)                    `report.heatmap`: a matrix of numbers from 0 to 1

A verb's page is a function in a file of its own here (`training.py`, `analysis.py`) from the verb's result to
`page(title, sections)`, and `write_page` puts it on disk. Texts given to a block are escaped by it; `content` is HTML.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from deltaw.errors import ConfigError, Fault
from deltaw.store.atomic import replace_text

_STYLE, _SCRIPT = (Path(__file__).with_name(name) for name in ("page.css", "sort.js"))


def page(title: str, sections: Iterable[str], *, footer: str = "", lead: str = "") -> str:
    """The whole page; `sections` that are empty are left out, `lead` stands under the title."""
    return "\n".join([
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">', f"<title>{escape(title)}</title>",
        f"<style>\n{_STYLE.read_text(encoding='utf-8')}</style>", "</head>", "<body>", "<main>",
        f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>' if lead else "",
        *(section for section in sections if section), f"<footer>{escape(footer)}</footer>", "</main>",
        f"<script>\n{_SCRIPT.read_text(encoding='utf-8')}</script>", "</body>", "</html>", "",
    ])


def write_page(text: str, path: str | Path) -> Path:
    """Write a page whole and return its path; ConfigError where it cannot be written."""
    target = Path(path).expanduser()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_text(target, text)
    except OSError as error:
        raise ConfigError(Fault(f"report '{target}'", f"cannot be written: {error.strerror}",
                                "a writable place")) from error
    return target


def section(title: str, content: str, note: str = "") -> str:
    """A headed part of the page; nothing where it has no content."""
    if not content:
        return ""
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{said}\n{content}\n</section>"


def finding(*texts: str) -> str:
    """Sentences that say what the figures beside them show, one paragraph each."""
    return "".join(f'<p class="finding">{escape(text)}</p>\n' for text in texts if text)


def figure(content: str, caption: str) -> str:
    """A chart with its caption; nothing where there is no chart."""
    return f"<figure>\n{content}\n<figcaption>{escape(caption)}</figcaption>\n</figure>" if content else ""


def side_by_side(contents: Sequence[str]) -> str:
    """Blocks in a row, which wraps where the page is narrow."""
    return '<div class="row">\n' + "\n".join(content for content in contents if content) + "\n</div>"


def heading(text: str) -> str:
    """A heading within a section."""
    return f"<h3>{escape(text)}</h3>"


def folded(summary: str, content: str) -> str:
    """Content behind a line that opens it; nothing where there is none."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n{content}\n</details>" if content else ""


def escape(text: object) -> str:
    """Any text as HTML shows it."""
    return html.escape(str(text))
