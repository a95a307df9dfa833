"""A page that needs no other file, opens from disk and loads nothing: its skeleton and the parts that it is made of."""

from base64 import b64encode
from collections.abc import Iterable, Mapping
from html import escape
from string import Template

__all__ = ["cell", "figure", "keys", "name_cell", "page", "pair", "row", "section", "table", "tile", "tiles"]

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --page: #f6f7f9; --card: #fff; --ink: #1d2127; --quiet: #5c6570; --line: #dde1e6; --mark: #b34700; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --card: #1e2226; --ink: #e7eaed; --quiet: #a2abb5; --line: #363c43; --mark: #ff9d5c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 2.5rem 0 .25rem; font-size: 1.25rem; }
p { margin: .25rem 0 .75rem; max-width: 50rem; }
.quiet, figcaption, dt { color: var(--quiet); }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.5rem 0; }
.tiles div { flex: 1 1 13rem; padding: 1rem 1.25rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
.tiles dt { font-size: .875rem; }
.tiles dd { margin: 0; font-size: .875rem; }
.tiles dd:first-of-type { font-size: 1.75rem; line-height: 1.3; font-weight: 600; }
.keys { display: grid; grid-template-columns: auto 1fr; gap: .125rem 1.5rem; margin: .5rem 0; font-size: .9375rem; }
.keys dd { margin: 0; }
@media (max-width: 40rem) { .keys { display: block; } .keys dd { margin: 0 0 .375rem; } }
.keys, td { font-variant-numeric: tabular-nums; }
.keys dt, .keys dd { font-family: ui-monospace, Consolas, monospace; font-size: .875rem; }
figure { margin: 0; }
figure div { margin-top: .5rem; overflow-x: auto; background: #fff; border: 1px solid var(--line);
  border-radius: .5rem; }
img { display: block; width: 100%; height: auto; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 1.5rem; }
.scroll { overflow: auto; width: fit-content; max-width: 100%; max-height: 80vh; background: var(--card);
  border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; font-size: .875rem; white-space: nowrap; overflow-wrap: normal; }
th, td { padding: .375rem .75rem; text-align: left; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--card); font-weight: 600; white-space: normal; vertical-align: bottom; }
tbody th { left: 0; font-weight: 400; }
@media (max-width: 40rem) { tbody th { min-width: 9.5rem; max-width: 9.5rem; overflow-wrap: anywhere; } }
tbody tr:last-child > * { border-bottom: 0; }
.best td, td.best { color: var(--mark); font-weight: 600; }
.pruned td, .failed td { color: var(--quiet); }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="quiet">$facts</p>
</header>
<main>
$content
</main>
</body>
</html>
""")


def page(title: str, facts: str, content: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: Its name and heading.
        facts: A line below that.
        content: Its parts; empty ones are left out.
    """
    return PAGE.substitute(title=escape(title), facts=escape(facts), content="\n".join(filter(None, content)))


def section(heading: str, *parts: str) -> str:
    """Parts below a heading."""
    return "\n".join(["<section>", f"<h2>{escape(heading)}</h2>", *filter(None, parts), "</section>"])


def tiles(parts: Iterable[str]) -> str:
    """Tiles side by side."""
    return f'<dl class="tiles">\n{"".join(parts)}\n</dl>'


def tile(name: str, value: str, told: str) -> str:
    """A number that matters, and what it is of."""
    return f"\n<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd>{escape(told)}</dd></div>"


def keys(items: Mapping[str, str]) -> str:
    """Keys with their values."""
    rows = [f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in items.items()]
    return f'<dl class="keys">\n{"".join(rows)}\n</dl>'


def pair(figures: Iterable[str]) -> str:
    """Figures side by side where there is room for that."""
    return "\n".join(['<div class="pair">', *figures, "</div>"])


def figure(heading: str, caption: str, picture: bytes, *, alt: str, min_width: float = 40) -> str:
    """A picture with its heading and how it is read.

    Args:
        heading: Its heading.
        caption: How it is read.
        picture: The content of a PNG file.
        alt: What it shows, for those who do not see it.
        min_width: Width, in rem, below which it is scrolled instead of made smaller.
    """
    source = f"data:image/png;base64,{b64encode(picture).decode()}"
    image = f'<img src="{source}" alt="{escape(alt)}" style="min-width: {min_width:g}rem">'
    text = f"<figcaption>{escape(caption)}</figcaption>"
    return f"<figure>\n<h2>{escape(heading)}</h2>\n{text}\n<div>{image}</div>\n</figure>"


def table(head: Iterable[str], rows: Iterable[str], name: str) -> str:
    """A table; it can be scrolled with the keys, too.

    Args:
        head: The names of its columns.
        rows: Its rows, made by `row`.
        name: What it holds, for those who do not see it.
    """
    box = f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">'
    cells = "".join(f'<th scope="col">{_breakable(text)}</th>' for text in head)
    return f"{box}\n<table>\n<thead><tr>{cells}</tr></thead>\n<tbody>\n{''.join(rows)}\n</tbody>\n</table>\n</div>"


def row(cells: Iterable[str], kind: str = "complete") -> str:
    """A row of a table, of a kind that the skeleton has a style for."""
    return f'<tr class="{kind}">{"".join(cells)}</tr>\n'


def cell(text: str, kind: str = "") -> str:
    """A cell of a row, of a kind that the skeleton has a style for."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<td{attribute}>{escape(text)}</td>"


def name_cell(text: str) -> str:
    """The first cell of a row that has a name: it stays in sight."""
    return f'<th scope="row">{_breakable(text)}</th>'


def _breakable(text: str) -> str:
    return escape(text).replace(".", ".<wbr>")
