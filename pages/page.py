"""One HTML file that needs no network: the skeleton, the style and the escaping of all pages.

A page's policy (CSP) allows its own style and script, by their hashes, and nothing else: no request
to any host, and no script that a text might bring along. Texts reach a page in two ways: as HTML
through `escape`, or as JSON in `data`, which a script puts into the page as text.
"""

import base64
import hashlib
import json
import os
import zlib
from html import escape
from pathlib import Path
from string import Template

from infra.files import written_whole

__all__ = ["check_place", "escape", "fill", "make_page", "options", "pack", "write_page"]

FOLDER = Path(__file__).parent
DATA = '<script type="application/json" id="data">'  # in every page, see page.html


def make_page(title: str, body: str, data, style: Path, script: Path) -> str:
    """Return a page.

    title: as text
    body: HTML between the heading and the scripts
    data: what the script reads from the element `data`, any JSON
    style: file with what the page has besides page.css
    script: file with JavaScript
    """
    css = read(FOLDER / "page.css") + read(style)
    javascript = read(script)
    return fill(
        FOLDER / "page.html",
        title=escape(title),
        body=body,
        data=json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),
        style=css,
        style_hash=digest(css),
        script=javascript,
        script_hash=digest(javascript),
    )


def fill(template: Path, **parts: str) -> str:
    """Return a file of HTML with `$name` replaced by the part of that name."""
    return Template(read(template)).substitute(parts)


def check_place(path: Path) -> None:
    """Raise ValueError if something other than a page of this project stands where one shall go."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, which stays as it is; name a file for the page")
    if os.path.exists(path) and DATA.encode() not in path.read_bytes():
        raise ValueError(
            f"{path} holds something other than a page of curves or rollouts, and stays as it is; "
            "name another file"
        )


def write_page(path: Path, page: str) -> Path:
    """Write a page, whole or not at all, and return its path.

    Half a character becomes a question mark.
    """
    with written_whole(path) as temporary:
        temporary.write_bytes(page.encode(errors="replace"))
    return path


def pack(text: str) -> str:
    """Return a text compressed, in base64: a script unpacks it as `deflate`."""
    packed = zlib.compress(text.encode(errors="replace"), 9)
    return base64.b64encode(packed).decode()


def options(names) -> str:
    """Lay out the choices of a <select>."""
    return "".join(f"<option>{escape(name)}" for name in names)


def read(file: Path) -> str:
    """Read one of the files that a page is put together from."""
    return file.read_text(encoding="utf-8")


def digest(text: str) -> str:
    """Return a text's hash, by which the page's content security policy allows this text alone."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
