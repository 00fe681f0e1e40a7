"""Every relative link in every Markdown file leads to a file that is there, and to a heading that it has."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = {".git", "build", "dist", ".pytest_cache", ".venv", "venv", "node_modules"}


def pages() -> list[Path]:
    """The Markdown files under version control; of an unpacked source distribution, all there are."""
    listed = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in ROOT.rglob("*.md") if not NOT_OURS & set(path.relative_to(ROOT).parts)]


def prose(text: str) -> str:
    """Without code, in which brackets are no links and `#` starts no heading."""
    text = re.sub(r"^(`{3,}|~{3,}).*?^\1[`~]*\s*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", lambda code: code.group().strip("`").translate(CODE), text)


CODE = str.maketrans({"[": "", "]": "", "(": "", ")": ""})  # a heading keeps the words of its code


def links(text: str) -> Iterator[str]:
    for match in re.finditer(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", prose(text)):
        yield match.group(1)
    for match in re.finditer(r"^ {0,3}\[[^\]]+\]:\s*(\S+)", prose(text), re.MULTILINE):
        yield match.group(1)


def anchors(text: str) -> set[str]:
    """What GitHub makes of a page's headings."""
    found: dict[str, int] = {}
    made = set()
    for heading in re.findall(r"^ {0,3}#{1,6}\s+(.*?)\s*#*\s*$", prose(text), re.MULTILINE):
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        number = found.get(slug, 0)
        found[slug] = number + 1
        made.add(f"{slug}-{number}" if number else slug)
    return made


def broken(page: Path) -> list[str]:
    wrong = []
    for link in links(page.read_text()):
        if re.match(r"[a-z][a-z0-9+.-]*:", link, re.IGNORECASE):
            continue  # another site
        name, _, anchor = link.partition("#")
        target = page if not name else page.parent / unquote(name)
        if not target.exists():
            wrong.append(f"{link}: there is no {target}")
        elif anchor and target.suffix == ".md" and unquote(anchor) not in anchors(target.read_text()):
            wrong.append(f"{link}: {target.name} has no heading of that name")
    return wrong


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One `code()`, two\n\n## Again\n\n## Again\n```\n# not a heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#one-code-two) [c](other.md#again-1) [d](https://example.org/no)\n"
        "`[e](no.md)` [f](no.md) ![g](no.png) [h](other.md#not-a-heading) [i](#nowhere)\n[j]: missing.md\n"
    )
    assert [line.split(":")[0] for line in broken(page)] == [
        *("no.md", "no.png", "other.md#not-a-heading", "#nowhere", "missing.md")
    ]
