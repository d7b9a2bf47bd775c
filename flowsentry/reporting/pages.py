"""HTML pages from the templates of this package: self-contained, without scripts, everything escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flowsentry.reporting.tables import percent, plain


def number(value: float | None) -> str:
    """A number for a narrow column: separators for thousands, else three significant digits."""
    if value is None or value != value:  # noqa: PLR0124
        return "–"
    if float(value).is_integer() and abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, number=number, plain=plain)
    return environment


_ENVIRONMENT: Final = _environment()


def render(template: str, **context: object) -> str:
    """The page made from a template of this package."""
    return _ENVIRONMENT.get_template(template).render(context)
