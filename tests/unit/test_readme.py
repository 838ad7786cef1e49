"""README's tree of the files is the tree of the files: every source file with a caption, and no other."""

import fnmatch
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEVER_LISTED = [".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "build", "demo"]
PICTURES = {".jpg", ".jpeg", ".png", ".svg", ".webp", ".gif"}


def files_on_disk(root: Path) -> list[str]:
    """What git tracks or would track; where there is no git, all but what is made by tools."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        # A clone has .git at its root; an unpacked archive may lie inside another project's clone.
        listed = (root / ".git").exists() and subprocess.run(
            command, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        listed = False
    if listed:
        return [path for path in listed.stdout.split("\0") if path and (root / path).is_file()]
    found = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return [path.as_posix() for path in found if not any(map(is_made_by_tools, path.parts))]


def is_made_by_tools(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in NEVER_LISTED)


def lines_of_tree(files: Iterable[str]) -> set[str]:
    """The lines that the tree should have: tests, assets, pictures as folders; no package markers."""
    lines = set()
    for path in map(Path, files):
        if path.name == "__init__.py":
            continue
        if path.parts[0] == "tests" and len(path.parts) > 2:
            lines.add(f"tests/{path.parts[1]}/")
        elif "assets" in path.parts[:-1]:
            lines.add("/".join(path.parts[: path.parts.index("assets") + 1]) + "/")
        elif path.suffix in PICTURES and len(path.parts) > 1:
            lines.add(f"{path.parent.as_posix()}/")
        else:
            lines.add(path.as_posix())
    return lines


def read_tree(readme: str) -> dict[str, str]:
    """Path -> caption, from the first fenced block under the heading "Tree"."""
    section = re.search(r"^## Tree$(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    assert section, 'README.md has no heading "## Tree"'
    block = re.search(r"^```\w*\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL)
    assert block, 'README.md has no block between ``` lines under "## Tree"'
    tree: dict[str, str] = {}
    for line in filter(str.strip, block[1].splitlines()):
        parts = re.fullmatch(r"(\S+) {2,}(?:— )?(\S.*)", line)
        assert parts, f"not `path  — caption`: {line!r}"
        assert parts[1] not in tree, f"{parts[1]} is listed twice"
        tree[parts[1]] = parts[2]
    return tree


def test_tree_matches_the_files() -> None:
    listed = set(read_tree((ROOT / "README.md").read_text("utf-8")))
    wanted = lines_of_tree(files_on_disk(ROOT))
    assert listed == wanted, (
        f"README's tree lacks {sorted(wanted - listed)} and has without a file {sorted(listed - wanted)}"
    )


def test_tree_shows_a_missing_and_a_superfluous_line() -> None:
    readme = (
        "# x\n## Tree\nWords.\n```text\na.py  — does a\nb/      holds b\n```\n## Next\n```\nno tree\n```\n"
    )
    assert read_tree(readme) == {"a.py": "does a", "b/": "holds b"}


@pytest.mark.parametrize(
    ("readme", "message"),
    [
        ("# x\n", "no heading"),
        ("## Tree\nnothing\n## Next\n```\na.py  — a\n```\n", "no block"),
        ("## Tree\n```\na.py\n```\n", "not `path  — caption`"),
        ("## Tree\n```\na.py  — a\na.py  — b\n```\n", "listed twice"),
    ],
)
def test_what_is_no_tree_is_refused(readme: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        read_tree(readme)


def test_lines_of_tree() -> None:
    files = [
        "Makefile", ".ci/run", "for_ray/__init__.py", "for_ray/model/text.py",
        "for_ray/model/assets/x/encoder.toml",
        "tests/conftest.py", "tests/unit/model/test_text.py", "tests/unit/test_sheet.py", "docs/sheet.jpg",
    ]  # fmt: skip
    assert lines_of_tree(files) == {
        "Makefile", ".ci/run", "for_ray/model/text.py", "for_ray/model/assets/", "tests/conftest.py",
        "tests/unit/", "docs/",
    }  # fmt: skip


def test_files_without_git(tmp_path: Path) -> None:
    for name in ("a.py", ".venv/b.py", "x/__pycache__/c.pyc", "x/d.py", "y.egg-info/e", ".mypy_cache/f"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(files_on_disk(tmp_path)) == ["a.py", "x/d.py"]
