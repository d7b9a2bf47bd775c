"""Great Expectations' result page without anything that it loads from elsewhere."""

from __future__ import annotations

import html
from html.parser import HTMLParser
from importlib.resources import files
from typing import Final

_VOID: Final = {"area", "br", "col", "hr", "input", "meta", "source", "wbr", "link", "img", "embed", "base"}
_DROPPED: Final = {
    "script",
    "style",
    "link",
    "img",
    "iframe",
    "object",
    "embed",
    "form",
    "base",
    "svg",
    "footer",
    "input",
}
_DROPPED_CLASSES: Final = {"modal", "mb-3"}
_KEPT_ATTRIBUTES: Final = {"id", "class", "href", "colspan", "rowspan", "hidden", "charset", "name", "content"}
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"


def self_contained(page: str) -> str:
    """The page without scripts, images, forms and links to other places, with a style sheet of our own inside.

    A content security policy forbids the browser to load or run anything, whatever the flows contain.
    """
    parser = _Cleaner()
    parser.feed(page)
    parser.close()
    style = (files("flowsentry.flows") / "validation_page.css").read_text("utf-8")
    head = f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><style>{style}</style>'
    return "<!DOCTYPE html>" + "".join(parser.kept).replace("<head>", f"<head>{head}", 1)


class _Cleaner(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.kept: list[str] = []
        self._depth = 0
        """Elements open inside an element that is left out, and that one."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = set((dict(attrs).get("class") or "").split())
        if self._depth or tag in _DROPPED or classes & _DROPPED_CLASSES:
            self._depth += tag not in _VOID
            return
        safe = [
            (name, value or "")
            for name, value in attrs
            if name in _KEPT_ATTRIBUTES and (name != "href" or (value or "").startswith("#"))
        ]
        self.kept.append("<" + " ".join([tag, *(f'{name}="{html.escape(value)}"' for name, value in safe)]) + ">")

    def handle_endtag(self, tag: str) -> None:
        if tag in _VOID:
            return
        if self._depth:
            self._depth -= 1
            return
        self.kept.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if not self._depth:
            self.kept.append(html.escape(data, quote=False))
