"""A hook of MkDocs: files that lie outside docs/ become pages of the site, and links to them lead there.

On a code host README, CONTRIBUTING, CHANGELOG and the tables beside the results are read where they lie; the site has
the same text, not a copy of it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Names in the site of files at the root; what else is linked there is found by its own name.
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
ROOT_FILES = ("CITATION.cff", "SECURITY.md")
RESULTS = "benchmarks/results"
ON_SITE = f"{RESULTS}/|CONTRIBUTING|CHANGELOG|SECURITY"


def on_files(files: Any, config: Any) -> Any:
    """Adds them."""
    from mkdocs.structure.files import File

    for source, name in ROOT_PAGES.items():
        files.append(File.generated(config, name, content=at_root((ROOT / source).read_text())))
    for source in (*ROOT_FILES, *(f"{RESULTS}/{path.name}" for path in sorted((ROOT / RESULTS).iterdir()))):
        files.append(File.generated(config, source, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of pages in docs/ that leave it: to pages of the site, or to sources, of which the names are left."""
    markdown = re.sub(rf"\]\(\.\./(?={ON_SITE})", "](", markdown)
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)


def at_root(text: str) -> str:
    """Links of a page at the root as those of one in docs/."""
    text = re.sub(r"\]\(docs/", "](", text)
    text = text.replace("](README.md", "](index.md")
    return re.sub(r'((?:src|srcset)=")docs/', r"\1", text)
