"""How the dashboard's page is assembled from its files, and what is rejected."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gateway.debug.dashboard import dashboard
from gateway.debug.dashboard.assembly import SCRIPT, STYLE, assemble, bundle


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The folder of a small page."""
    (tmp_path / "index.html").write_text(f"<head>{STYLE}</head><body>{SCRIPT}</body>")
    (tmp_path / "style.css").write_text("p { color: red; }\n")
    (tmp_path / "scripts").mkdir()
    script(tmp_path, "main", "run();\n")
    return tmp_path


def script(folder: Path, name: str, text: str) -> None:
    (folder / "scripts" / f"{name}.mjs").write_text(text)


class Inline(HTMLParser):
    """Collects the text of inline elements, by tag, as a browser would hash it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: dict[str, list[str]] = {"script": [], "style": []}
        self._tag = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        if tag in self.found:
            self.found[tag].append("")

    def handle_data(self, data: str) -> None:
        if self._tag in self.found:
            self.found[self._tag][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""


def test_the_policy_allows_the_pages_own_script_and_style_by_their_hashes() -> None:
    content, headers = dashboard()
    policy = dict(headers)["Content-Security-Policy"]
    for tag, texts in Inline(content.decode()).found.items():
        [text] = texts
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert re.search(f"(^|; ){tag}-src 'sha256-{re.escape(digest)}'(;|$)", policy)


def test_the_page_refers_to_none_of_its_sources() -> None:
    content, _ = dashboard()
    assert not re.search(rb'^(?:import|export)\b|\b(?:src|href)="(?!data:)', content, re.MULTILINE)


def test_the_texts_take_the_place_of_the_references(source: Path) -> None:
    page = assemble(source)
    start, end = '<body><script type="module">', "</script></body>"
    assert page.html == f"<head><style>{page.style}</style></head>{start}{page.script}{end}"
    assert page.style == "p { color: red; }\n"
    assert "run();" in page.script


@pytest.mark.parametrize("reference", [STYLE, SCRIPT])
@pytest.mark.parametrize("times", [0, 2])
def test_each_reference_must_occur_once(source: Path, reference: str, times: int) -> None:
    html = (source / "index.html").read_text()
    (source / "index.html").write_text(html.replace(reference, reference * times))
    with pytest.raises(ValueError, match=re.escape(reference)):
        assemble(source)


@pytest.mark.parametrize("text", ['"</script>"', '"</SCRIPT x"', '"<!--"'])
def test_a_script_must_not_end_its_own_element(source: Path, text: str) -> None:
    script(source, "main", f"run({text});\n")
    with pytest.raises(ValueError, match="</script>"):
        assemble(source)


def test_a_style_must_not_end_its_own_element(source: Path) -> None:
    (source / "style.css").write_text("/* </style> */")
    with pytest.raises(ValueError, match="</style>"):
        assemble(source)


def test_every_module_occurs_once_and_after_what_it_imports(source: Path) -> None:
    script(source, "main", 'import "./one.mjs";\nimport "./two.mjs";\n')
    script(source, "one", 'import { base } from "./base.mjs";\n')
    script(source, "two", 'import { base } from "./base.mjs";\n')
    script(source, "base", "export const base = 1;\n")
    found = re.findall(r"^const \$(\w+)", bundle(source / "scripts", "main"), re.MULTILINE)
    assert found == ["base", "one", "two", "main"]


def test_imports_that_form_a_cycle_are_rejected(source: Path) -> None:
    script(source, "main", 'import "./one.mjs";\n')
    script(source, "one", 'import "./two.mjs";\n')
    script(source, "two", 'import "./one.mjs";\n')
    with pytest.raises(ValueError, match="main → one → two → one"):
        assemble(source)


@pytest.mark.parametrize(
    "line",
    [
        'import { a as b } from "./base.mjs";',
        'import * as base from "./base.mjs";',
        'import base from "./base.mjs";',
        'import { base } from "./folder/base.mjs";',
        'import { base } from "https://example.com/base.mjs";',
        'import { base } from "./base.mjs"',
        '  import { base } from "./base.mjs";',
        'const base = await import("./base.mjs");',
        "const here = import.meta.url;",
        "export default 1;",
        "export let base = 1;",
        "export { base };",
        "export const { base } = one;",
        'export * from "./base.mjs";',
        "  export const base = 1;",
    ],
)
def test_any_other_form_of_import_or_export_is_rejected(source: Path, line: str) -> None:
    script(source, "base", "export const base = 1;\n")
    script(source, "main", f"run();\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(line.strip().rstrip(";"))):
        assemble(source)
