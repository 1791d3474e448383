"""Build the documentation as one folder of HTML: the hand-written pages and the API reference from the docstrings.

    python docs/site/build.py --output build/docs          what `make docs` runs; open build/docs/index.html

Everything is imported to be described, so the packages of `make setup` must be there; no JVM and no Ray is started.
The pages load nothing from the network. A warning (a broken link, a docstring that cannot be read) ends it with code 2.
"""

from __future__ import annotations

import html
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from string import Template

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from usr_ray.cli import JobParser, run_job
from usr_ray.config import UserError
from usr_ray.files import write_whole

PACKAGES = ("usr_ray", "etl", "jobs")
FIRST_PAGES = ("README.md", "docs/running.md", "docs/own-logs.md", "docs/operations.md", "docs/cluster.md")
_TEMPLATES = Path(__file__).parent / "templates"


def pages() -> dict[str, str]:
    """Hand-written page -> its file in the site; the README is the site's front."""
    found = sorted(
        p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")]
    )
    order = [*FIRST_PAGES, *(page for page in found if page not in FIRST_PAGES)]
    names = {
        page: "index.html" if page == "README.md" else page.replace("/README", "").removesuffix(".md") + ".html"
        for page in order
    }
    return {page: name.removeprefix("docs/") for page, name in names.items()}


def build_guides(output: Path) -> None:
    """Write the hand-written pages as HTML, their links led to each other, and what they show.

    Raises:
        UserError: a page links to a file that is not there.
    """
    import markdown2

    site, frame = pages(), Template((_TEMPLATES / "guide.html").read_text(encoding="utf-8"))
    for page, name in site.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            _check_link(page, link)
        body = markdown2.markdown(text, extras=["tables", "fenced-code-blocks", "header-ids", "cuddled-lists"])
        up = "../" * name.count("/")
        body = re.sub(r'(href|src)="([^"#]+)(#[^"]*)?"', lambda m, page=page, up=up: _link(m, page, up, site), body)
        title = (re.search(r"<h1[^>]*>(.*?)</h1>", body) or [page, page])[1]
        target = output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, frame.substitute(title=re.sub("<.*?>", "", title), up=up, nav=_nav(site, up), body=body))
    for image in (ROOT / "docs" / "images").glob("*.png"):
        (output / "images").mkdir(exist_ok=True)
        (output / "images" / image.name).write_bytes(image.read_bytes())


def build_api(output: Path, modules: Sequence[str] = PACKAGES) -> None:
    """Write the API reference of `modules` below <output>/api; docstrings that name a page of docs/ lead there.

    Raises:
        UserError: pdoc had something to warn of.
    """
    import pdoc

    # A default that equals something of the environment would be hidden, with a warning: none of ours is a secret.
    os.environ.setdefault("PDOC_DISPLAY_ENV_VARS", "1")
    pdoc.render.configure(docformat="google", show_source=False, template_directory=_TEMPLATES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"pdoc(\\.|$)")
        warnings.filterwarnings("always", category=UserWarning, message=r"(?i).*(docstring|render|type annotation).*")
        pdoc.pdoc(*modules, output_directory=output / "api")
    if caught:
        raise UserError(f"API reference: {' '.join(str(caught[0].message).split())[:300]}")
    for path in (output / "api").rglob("*.html"):
        up = "../" * len(path.relative_to(output).parts[:-1])
        text = path.read_text(encoding="utf-8")
        linked = re.sub(
            r"\bdocs/([\w-]+)\.md\b",
            lambda m, up=up: f'<a href="{up}{m[1]}.html">{m[1]}.md</a>' if (ROOT / m[0]).exists() else m[0],
            text,
        )
        if linked != text:
            write_whole(path, linked)


def _check_link(page: str, link: str) -> None:
    if "://" not in link and not ((ROOT / page).parent / link).exists():
        raise UserError(f"{page}: links to {link}, which is not there; mend the link")


def _link(match: re.Match[str], page: str, up: str, site: dict[str, str]) -> str:
    """A link of a page as it is in the site; a file that is not in it is named without a link."""
    kind, target, anchor = match[1], html.unescape(match[2]), match[3] or ""
    if "://" in target:
        return match[0]
    path = os.path.relpath(os.path.normpath(ROOT / Path(page).parent / target), ROOT)
    path += "/README.md" if (ROOT / path / "README.md").is_file() else ""
    if path in site:
        return f'{kind}="{up}{site[path]}{anchor}"'
    if path.startswith("docs/images/"):
        return f'{kind}="{up}{path.removeprefix("docs/")}"'
    return f'title="{path}"'


def _nav(site: dict[str, str], up: str) -> str:
    guides = [(name, _words(Path(page).stem)) for page, name in site.items() if page.startswith("docs/")]
    shown = [(name, _words(Path(page).parent.name)) for page, name in site.items() if page.startswith("examples/")]
    api = [(f"api/{package}.html", package) for package in PACKAGES]
    parts = []
    for title, links in (("Guides", guides), ("Examples", shown), ("API reference", api)):
        parts.append(f"<b>{title}</b>")
        parts += [f'<a href="{up}{name}">{text}</a>' for name, text in links]
    return "".join(parts)


def _words(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")


def main(argv: list[str]) -> None:
    """Build both parts."""
    parser = JobParser(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "docs", metavar="DIR")
    output: Path = parser.parse_args(argv).output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    build_guides(output)
    build_api(output)
    num = len(list(output.rglob("*.html")))
    print(f"{num} pages; open {output / 'index.html'}")


if __name__ == "__main__":
    sys.exit(run_job(main))
