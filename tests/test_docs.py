"""Generated pages are what their generators write today, and the README's links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_integrations_page_is_current():
    command = [sys.executable, str(ROOT / "docs" / "generate_integrations.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, (
        "stale: run python docs/generate_integrations.py"
    )


def test_relative_links_of_the_pages_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
    pages += sorted((ROOT / "docs").glob("*.md"))
    missing = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not missing


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
