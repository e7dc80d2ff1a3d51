"""Figures as files, and as one SVG to stand within a page."""

from __future__ import annotations

import re
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from storage.figures import look
from storage.printable import printable_lines

_PIXELS = 30_000
"""More than this in height, and viewers of PNG give up."""

_NO_METADATA: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}


def save(figures: list[Any], path: Path) -> None:
    """Write figures to a .png, .pdf or .svg file; a .pdf has a page for each, the others take one. The same figure
    gives the same bytes."""
    for figure in figures:
        _escape(figure)
    if path.suffix == ".pdf":
        _save_pdf(figures, path)
        return
    (figure,) = figures
    about = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, dpi=min(300, int(_PIXELS / figure.get_figheight())), metadata=about)


def _escape(figure: Any) -> None:
    """Escape control and bidirectional characters in every text of a figure."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if (escaped := printable_lines(text.get_text())) != text.get_text():
            text.set_text(escaped)


def _save_pdf(figures: list[Any], path: Path) -> None:
    from matplotlib.backends.backend_pdf import PdfPages

    with PdfPages(path, metadata={"CreationDate": None}) as pages:
        for figure in figures:
            pages.savefig(figure, dpi=300)


def png(figure: Any, dpi: int = 150) -> bytes:
    """A figure as PNG."""
    out = BytesIO()
    _escape(figure)
    figure.savefig(out, format="png", dpi=dpi)
    return out.getvalue()


def inline(figure: Any, prefix: str) -> str:
    """A figure as one `<svg>` to stand within a page, transparent, its ink in `currentColor`, every id `prefix-...`,
    scaled to the width that is there. It refers to nothing outside itself and styles nothing but itself."""
    out = StringIO()
    _escape(figure)
    figure.savefig(out, format="svg", transparent=True, dpi=150, metadata=_NO_METADATA)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-").replace('xlink:href="data:', 'href="data:')
    text = text.replace(look.INK, "currentColor").replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    return _scaled(re.sub(r"\n\s*\n+", "\n", text))


def _scaled(text: str) -> str:
    """As wide as its figure, narrower where the page is."""
    found = re.search(r'width="([\d.]+)pt" height="[\d.]+pt"', text)
    assert found
    look_ = f"width:100%;max-width:{float(found[1]) * 1.5:.0f}px;height:auto;stroke-linejoin:round;stroke-linecap:butt"
    return text.replace(found[0], f'role="img" style="{look_}"', 1)
