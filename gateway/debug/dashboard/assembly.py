"""Assembles the dashboard's files into the one page that is served.

``index.html`` refers to its style sheet and its script like any other page. The page that is served
contains their text instead of these references.

The scripts are ES modules, which ``tsc``, node and editors understand as they are. Inline scripts
can't import one another because they have no URL, and an import map could only give them ``data:``
or ``blob:`` URLs, which the Content-Security-Policy would then have to allow. Therefore each module
becomes a function that returns what the module exports, and imports read from its result::

    const $format = (() => {
    function number(value) { ... }
    return { number };
    })();

    const $charts = (() => {
    const { number } = $format;
    ...

This needs neither a bundler nor a JavaScript parser, keeps private names private, and evaluates the
modules in the same order as a browser. It is safe because only a few forms are supported, each at
the start of a line; any other import or export is an error::

    import { one, two } from "./module.mjs";        (on one line or several)
    import "./module.mjs";
    export const, export class, export function     (also async, and generators)

Imports must not form a cycle. ``export let`` is not supported, since an importing module would not
see a later assignment; nor is ``await`` at the top level of a module.
"""

from __future__ import annotations

import re
from importlib.resources.abc import Traversable
from typing import NamedTuple

STYLE = '<link rel="stylesheet" href="style.css">'
SCRIPT = '<script type="module" src="scripts/main.mjs"></script>'

_IMPORT = re.compile(
    r'^import (?:\{(?P<names>\s*\w+(?:,\s*\w+)*,?\s*)\} from )?"\./(?P<module>\w+)\.mjs";$',
    re.MULTILINE,
)
_EXPORT = re.compile(
    r"^export (?=(?:const|class|(?:async )?function\*?) (?P<name>\w+))", re.MULTILINE
)
#: What is left after the supported forms are replaced is not supported.
_UNKNOWN = re.compile(r"^\s*(?:import|export)\b.*|.*\bimport\s*[.(].*", re.MULTILINE)


class Page(NamedTuple):
    """The assembled page, and the text of its ``<style>`` and ``<script>``."""

    html: str
    style: str
    script: str


def assemble(folder: Traversable) -> Page:
    """Assemble ``index.html``, ``style.css`` and ``scripts/main.mjs`` of a folder.

    Raises ValueError if they don't have the form that this module's docstring describes.
    """
    html = folder.joinpath("index.html").read_text("utf-8")
    style = folder.joinpath("style.css").read_text("utf-8")
    script = bundle(folder.joinpath("scripts"), "main")
    html = _inlined(html, STYLE, "<style>", style, "</style>")
    html = _inlined(html, SCRIPT, '<script type="module">', script, "</script>")
    return Page(html, style, script)


def bundle(scripts: Traversable, entry: str) -> str:
    """Combine the module ``entry`` and everything it imports into one script."""
    functions: dict[str, str] = {}
    _add(scripts, entry, functions, ())
    return "\n".join(functions.values())


def _add(
    scripts: Traversable, module: str, functions: dict[str, str], importers: tuple[str, ...]
) -> None:
    """Add a module after everything it imports, which is the order of evaluation."""
    if module in importers:
        raise ValueError(f"the imports form a cycle: {' → '.join([*importers, module])}")
    if module in functions:
        return
    source = scripts.joinpath(f"{module}.mjs").read_text("utf-8")
    for imported in _IMPORT.finditer(source):
        _add(scripts, imported["module"], functions, (*importers, module))
    functions[module] = _as_function(module, source)


def _as_function(module: str, source: str) -> str:
    exported = [export["name"] for export in _EXPORT.finditer(source)]
    body = _EXPORT.sub("", _IMPORT.sub(_as_constants, source))
    if unknown := _UNKNOWN.search(body):
        raise ValueError(f"{module}.mjs: this form is not supported: {unknown[0].strip()}")
    return f"const ${module} = (() => {{\n{body}return {{ {', '.join(exported)} }};\n}})();\n"


def _as_constants(imported: re.Match[str]) -> str:
    names = imported["names"]
    return f"const {{{names}}} = ${imported['module']};" if names else ""


def _inlined(html: str, reference: str, start: str, text: str, end: str) -> str:
    if html.count(reference) != 1:
        raise ValueError(f"index.html must contain this exactly once: {reference}")
    # these end the element early, or make the parser read past its end
    if end[:-1] in text.lower() or "<!--" in text:
        raise ValueError(f"{end} and <!-- must not occur in the text that replaces {reference}")
    return html.replace(reference, f"{start}{text}{end}")
