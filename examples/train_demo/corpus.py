"""Gather training text from Debian packages: five domains, deduplicated, split by document.

The packages are downloaded with `apt-get download` and unpacked below --work, without root and
without installing them. The script writes --work/corpus/<domain>.{train,heldout}.jsonl with one
{"source", "text"} per line.
"""

import argparse
import hashlib
import json
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import arithmetic
import readers

HELDOUT_BYTES = 1_300_000  # 1 MB to measure bits per byte, the rest for prompts
TRAIN_BYTES = 24_000_000
DOCUMENT_CHARACTERS = 20_000  # longer documents are cut, so that both parts have many documents

DOC, MAN, HELP = "usr/share/doc", "usr/share/man", "usr/share/help"
LILYPOND = DOC + "/lilypond/html/Documentation"
Reader = Callable[[Path], list[str]]
html, text = readers.html_blocks, readers.text_blocks
man, fortune = readers.man_blocks, readers.fortune_blocks

# (package, pattern of files below the unpacked package, reader) by domain
SOURCES: dict[str, list[tuple[str, str, Reader]]] = {
    "english": [
        ("debian-handbook", DOC + "/debian-handbook/html/en-US/*.html", html),
        ("debian-reference-en", "usr/share/debian-reference/*.en.html", html),
        ("developers-reference", "usr/share/developers-reference/*.html", html),
        ("debian-faq", DOC + "/debian/FAQ/*.html", html),
        ("debian-policy", DOC + "/debian-policy/policy.html/_sources/*.txt", text),
        ("debian-history", DOC + "/debian-history/docs/*.en.html", html),
        ("installation-guide-amd64", DOC + "/installation-guide-amd64/en/*.html", html),
        ("libreoffice-help-en-us", "usr/share/libreoffice/help/en-US/text/**/*.html", html),
        ("gnome-user-docs", HELP + "/C/**/*.page", html),
        ("evolution-common", HELP + "/C/**/*.page", html),
        ("python3.11-doc", DOC + "/python3.11/html/_sources/**/*.txt", text),
        ("git-doc", DOC + "/git-doc/**/*.txt", text),
        ("postgresql-doc-15", DOC + "/postgresql-doc-15/html/*.html", html),
        ("apache2-doc", DOC + "/apache2-doc/manual/en/**/*.html", html),
        ("lilypond-doc-html", LILYPOND + "/[elmnu]*/**/*.html", html),
        ("gimp-help-en", "usr/share/gimp/2.0/help/en/*.html", html),
        ("linux-doc-6.1", DOC + "/linux-doc-6.1/html/_sources/[a-p]*/*.txt", text),
        ("manpages", MAN + "/man*/*.gz", man),
        ("fortunes", "usr/share/games/fortunes/[a-z]*", fortune),
    ],
    "german": [
        ("debian-handbook", DOC + "/debian-handbook/html/de-DE/*.html", html),
        ("debian-reference-de", "usr/share/debian-reference/*.de.html", html),
        ("developers-reference-de", "usr/share/developers-reference/de/*.html", html),
        ("debian-faq-de", DOC + "/debian/FAQ/de/*.html", html),
        ("maint-guide-de", DOC + "/maint-guide-de/html/*.html", html),
        ("installation-guide-amd64", DOC + "/installation-guide-amd64/de/*.html", html),
        ("libreoffice-help-de", "usr/share/libreoffice/help/de/text/**/*.html", html),
        ("gnome-user-docs", HELP + "/de/**/*.page", html),
        ("evolution-common", HELP + "/de/**/*.page", html),
        ("lilypond-doc-html-de", LILYPOND + "/*/*.de.html", html),
        ("gimp-help-de", "usr/share/gimp/2.0/help/de/*.html", html),
        ("manpages-de", MAN + "/de/man*/*.gz", man),
        ("manpages-de-dev", MAN + "/de/man*/*.gz", man),
        ("fortunes-de", "usr/share/games/fortunes/de/[a-z]*", fortune),
    ],
    "french": [
        ("debian-handbook", DOC + "/debian-handbook/html/fr-FR/*.html", html),
        ("debian-reference-fr", "usr/share/debian-reference/*.fr.html", html),
        ("developers-reference-fr", "usr/share/developers-reference/fr/*.html", html),
        ("debian-faq-fr", DOC + "/debian/FAQ/fr/*.html", html),
        ("maint-guide-fr", DOC + "/maint-guide-fr/html/*.html", html),
        ("aptitude-doc-fr", DOC + "/aptitude/html/fr/*.html", html),
        ("installation-guide-amd64", DOC + "/installation-guide-amd64/fr/*.html", html),
        ("libreoffice-help-fr", "usr/share/libreoffice/help/fr/text/**/*.html", html),
        ("gnome-user-docs", HELP + "/fr/**/*.page", html),
        ("evolution-common", HELP + "/fr/**/*.page", html),
        ("apache2-doc", DOC + "/apache2-doc/manual/fr/**/*.html", html),
        ("lilypond-doc-html-fr", LILYPOND + "/*/*.fr.html", html),
        ("gimp-help-fr", "usr/share/gimp/2.0/help/fr/*.html", html),
        ("manpages-fr", MAN + "/fr/man*/*.gz", man),
        ("manpages-fr-dev", MAN + "/fr/man*/*.gz", man),
    ],
}
# Debian packages of Python source; NO_CODE leaves out tests, vendored copies and generated files
CODE = [
    *["libpython3.11-stdlib", "libpython3.11-minimal", "ansible-core", "beets", "black"],
    *["borgbackup", "buildbot", "deluge-common", "gajim", "gramps", "mailman3", "meld"],
    *["mercurial-common", "meson", "picard", "pylint", "python3-aiohttp", "python3-astropy"],
    *["python3-breezy", "python3-cherrypy3", "python3-dask", "python3-distributed"],
    *["python3-django", "python3-docutils", "python3-dulwich", "python3-flask"],
    *["python3-fonttools", "python3-ipython", "python3-jedi", "python3-matplotlib"],
    *["python3-networkx", "python3-nltk", "python3-numpy", "python3-pandas", "python3-paramiko"],
    *["python3-passlib", "python3-pil", "python3-pygments", "python3-pyqtgraph"],
    *["python3-requests", "python3-rich", "python3-scipy", "python3-scrapy", "python3-setuptools"],
    *["python3-sklearn", "python3-sphinx", "python3-spyder", "python3-sqlalchemy"],
    *["python3-statsmodels", "python3-sympy", "python3-tornado", "python3-twisted"],
    *["python3-werkzeug", "python3-whoosh", "python3-xarray", "qutebrowser", "quodlibet"],
    *["ranger", "solaar", "terminator", "virt-manager", "yt-dlp"],
]
NO_CODE = re.compile(
    r"/tests?/|/test_|_test\.py|/testing/|/_?vendor(ed)?/|/migrations/|/locale/|_pb2|/_?data/"
    r"|/benchmarks?/|lib2to3|/lextab|/yacctab|/encodings/"
)
HEADER = re.compile(r"\A(?:[ \t]*(?:#.*)?\n)+")  # comments before the code: mostly licences
NO_PROSE = re.compile(
    r"big-page|\.dat$|\.u8$|copyright|legal|/changelog|/index\.|whatsnew/changelog"
)


def fetch(work: Path) -> None:
    """Download and unpack the packages of SOURCES that --work/packages lacks."""
    packages = work / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    wanted = {*CODE, *(p for rows in SOURCES.values() for p, _, _ in rows)}
    missing = [p for p in sorted(wanted) if not (packages / p).exists()]
    if not missing:
        return
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise SystemExit(
            "apt-get and dpkg-deb are missing: run this on Debian 12 to fetch the packages "
            f"{' '.join(missing)}"
        )
    debs = work / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    for package in missing:
        got = subprocess.run(["apt-get", "download", "-q", package], cwd=debs)
        found = sorted(debs.glob(f"{package}_*.deb"))
        if got.returncode or not found:
            raise SystemExit(
                f"apt-get download {package} failed: run apt-get update first, on Debian 12"
            )
        with tempfile.TemporaryDirectory(dir=debs) as folder:  # keeps no half-unpacked package
            unpacked = Path(folder, package)
            subprocess.run(["dpkg-deb", "-x", str(found[-1]), str(unpacked)], check=True)
            unpacked.rename(packages / package)


def shuffled(paths: list[Path], root: Path) -> list[Path]:
    """Return the paths in an order that depends only on their names below `root`."""
    return sorted(
        set(paths), key=lambda p: hashlib.sha1(str(p.relative_to(root)).encode()).digest()
    )


def prose(domain: str, work: Path, seen: set[bytes]) -> Iterator[tuple[str, str]]:
    """Yield (source, text) of a documentation domain, without paragraphs that are in `seen`."""
    root = work / "packages"
    reader_of: dict[Path, Reader] = {}
    for package, pattern, reader in SOURCES[domain]:
        found = [p for p in (root / package).glob(pattern) if p.is_file()]
        if not found:
            raise SystemExit(f"no file matches {pattern} in package {package}: use Debian 12")
        reader_of |= {p: reader for p in found if not NO_PROSE.search(str(p.relative_to(root)))}
    for path in shuffled(list(reader_of), root):
        blocks = []
        for block in reader_of[path](path):
            key = re.sub(r"\d+", "0", re.sub(r"\W+", " ", block.casefold())).strip()
            digest = hashlib.sha1(key.encode()).digest()[:10]
            if len(key) >= 24:
                if digest in seen:
                    continue
                seen.add(digest)
            blocks.append(block)
        if sum(map(len, blocks)) >= 300:
            chat = len(blocks) > 1 and len(blocks[0]) < 80 and len("".join(blocks)) < 3000
            if chat and hashlib.sha1(path.name.encode()).digest()[0] < 64:
                blocks[0:2] = [f"User: {blocks[0]}\nAssistant: {blocks[1]}"]
            yield str(path.relative_to(root)), "\n\n".join(blocks)


def code(work: Path, seen: set[bytes]) -> Iterator[tuple[str, str]]:
    """Yield (source, text) of Python files, without near duplicates (over 40 % known lines)."""
    root = work / "packages"
    paths = [p for package in CODE for p in (root / package).rglob("*.py") if p.is_file()]
    for path in shuffled(paths, root):
        name = str(path.relative_to(root))
        body = HEADER.sub("", readers.read_text(path))
        lines = body.splitlines()
        digits = sum(c.isdigit() for c in body)
        if NO_CODE.search(name) or not 300 <= len(body) <= 150_000:
            continue
        if max(map(len, lines)) > 400 or digits > len(body) / 8:
            continue
        keys = {
            hashlib.sha1(s.encode()).digest()[:10] for s in map(str.strip, lines) if len(s) > 24
        }
        if len(keys & seen) > 0.4 * len(keys):
            continue
        seen |= keys
        yield name, body


def sums(seed: int) -> Iterator[tuple[str, str]]:
    """Yield (source, text) of generated arithmetic without end and without repetitions."""
    rng, seen = random.Random(seed), set()
    while True:
        page = arithmetic.document(rng)
        if page not in seen:
            seen.add(page)
            yield "arithmetic.py", page


def write(domain: str, documents: Iterator[tuple[str, str]], out: Path) -> None:
    """Write the first HELDOUT_BYTES of documents as held-out text, the next as training text."""
    for part, limit in (("heldout", HELDOUT_BYTES), ("train", TRAIN_BYTES)):
        size = count = 0
        with (out / f"{domain}.{part}.jsonl").open("w") as file:
            for source, body in documents:
                body = body[:DOCUMENT_CHARACTERS]
                file.write(json.dumps({"source": source, "text": body}, ensure_ascii=False) + "\n")
                size, count = size + len(body.encode()), count + 1
                if size >= limit:
                    break
        print(f"{domain:8} {part:8} {count:6} documents {size / 1e6:6.2f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for packages and corpus")
    work: Path = parser.parse_args().work
    fetch(work)
    out = work / "corpus"
    out.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    for domain in SOURCES:
        write(domain, prose(domain, work, seen), out)
    write("code", code(work, set()), out)
    write("math", sums(seed=1), out)


if __name__ == "__main__":
    main()
