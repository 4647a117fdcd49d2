"""Extract plain text from the file formats of documentation packages."""

import gzip
import re
from html.parser import HTMLParser
from pathlib import Path

BREAK_TAGS = set(
    [
        "p",
        "li",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "dt",
        "dd",
        "td",
        "th",
        "tr",
        "div",
        "pre",
        "title",
        "item",
        "section",
        "note",
        "table",
    ]
)
SKIP_TAGS = set(["script", "style", "head", "nav", "footer", "form", "info", "credit", "svg"])
SKIP_CLASSES = re.compile(
    r"navheader|navfooter|toc|docnav|sphinxsidebar|\brelated\b|footer|nav_table|breadcrumb"
    r"|tocframe|lang-?menu|toplang|bottomlang|up\b|_help_langs|copyright"
)


def read_text(path: Path) -> str:
    """Return the file's text, gunzipped if needed; files that are not UTF-8 are read as Latin-1."""
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


class _HtmlText(HTMLParser):
    """Collects block texts; skips navigation and scripts; keeps line breaks inside <pre>."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self.current: list[str] = []
        self.skipped_tag, self.skip_depth, self.pre_depth = "", 0, 0

    def flush(self) -> None:
        text = "".join(self.current)
        text = text.strip("\n") if self.pre_depth else re.sub(r"\s+", " ", text).strip()
        if text.strip():
            self.blocks.append(text)
        self.current = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skip_depth:
            self.skip_depth += tag == self.skipped_tag
            return
        marks = " ".join(v or "" for k, v in attrs if k in ("class", "id"))
        if tag in SKIP_TAGS or (tag != "body" and SKIP_CLASSES.search(marks)):
            self.skipped_tag, self.skip_depth = tag, 1
        elif tag == "br":
            self.current.append("\n")
        elif tag in BREAK_TAGS:
            self.flush()
            self.pre_depth += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self.skip_depth:
            self.skip_depth -= tag == self.skipped_tag
        elif tag in BREAK_TAGS:
            self.flush()
            self.pre_depth = max(0, self.pre_depth - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if not self.skip_depth:
            self.current.append(data)


def html_blocks(path: Path) -> list[str]:
    """Return the paragraphs of an HTML or Mallard page."""
    parser = _HtmlText()
    parser.feed(read_text(path))
    parser.close()
    parser.flush()
    return parser.blocks


def text_blocks(path: Path) -> list[str]:
    """Return the paragraphs of a text or reStructuredText file."""
    text = "\n".join(line.rstrip() for line in read_text(path).splitlines())
    return [b.strip("\n") for b in re.split(r"\n\s*\n", text) if b.strip()]


def fortune_blocks(path: Path) -> list[str]:
    """Return the sayings of a fortune file, in which lines with a single % separate them."""
    return [b.strip("\n") for b in re.split(r"(?m)^%\n?", read_text(path)) if b.strip()]


ROFF_ESCAPES = [
    (re.compile(r"\\f(\[[^]]*\]|\(..|.)|\\s[+-]?\d|\\[&%|/,^:)]|\\[mn]\[[^]]*\]"), ""),
    (re.compile(r"\\\((?:lq|rq|dq)|\\\[(?:lq|rq|dq)\]|\\\*\(..|\\\*[QU]"), '"'),
    (re.compile(r"\\\((?:aq|cq|oq|ga)|\\\[(?:aq|cq|oq|ga)\]"), "'"),
    (re.compile(r"\\\((?:em|en|mi|hy)|\\\[(?:em|en|mi|hy)\]|\\-"), "-"),
    (re.compile(r"\\\(bu|\\\[bu\]"), "*"),
    (re.compile(r"\\\(ti|\\\[ti\]"), "~"),
    (re.compile(r"\\\(ha|\\\[ha\]"), "^"),
    (re.compile(r"\\\((?:rs)|\\\[rs\]|\\e"), r"\\"),
    (re.compile(r"\\[~ 0]"), " "),
    (re.compile(r"\\\[[^]]*\]|\\\(.."), ""),
    (re.compile(r'\\"[^\n]*'), ""),
]


def _unroff(text: str) -> str:
    for pattern, replacement in ROFF_ESCAPES:
        text = pattern.sub(replacement, text)
    return text


def man_blocks(path: Path) -> list[str]:
    """Return the paragraphs of a manual page in `man` macros; none for pages in other macros."""
    source = read_text(path)
    if ".SH" not in source or source.startswith(".so"):
        return []
    blocks: list[str] = []
    lines: list[str] = []
    verbatim = table = False

    def flush() -> None:
        text = ("\n" if verbatim else " ").join(lines).rstrip()
        if text.strip():
            blocks.append(text)
        lines.clear()

    for line in source.splitlines():
        if table or not line.startswith((".", "'")):
            if not table:
                lines.append(_unroff(line))
            elif line.startswith(".TE"):
                table = False
            continue
        macro, _, rest = line[1:].lstrip().partition(" ")
        arguments = [a or b for a, b in re.findall(r'"([^"]*)"|(\S+)', _unroff(rest))]
        if macro in ("SH", "SS"):
            flush()
            lines.append(" ".join(arguments))
            flush()
        elif macro in ("PP", "P", "LP", "TP", "IP", "HP", "TQ", "RS", "RE", "sp", "br", "UE"):
            flush()
            if macro == "IP" and arguments:
                lines.append(arguments[0])
        elif macro in ("nf", "EX", "fi", "EE"):
            flush()
            verbatim = macro in ("nf", "EX")
        elif macro in ("B", "I", "SM", "SB"):
            lines.append(" ".join(arguments))
        elif macro in ("BR", "RB", "IR", "RI", "BI", "IB"):
            lines.append("".join(arguments))
        elif macro == "TS":
            flush()
            table = True
    flush()
    return blocks
