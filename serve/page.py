"""The page at `/`: one file that asks nobody but its own endpoint, and that runs no script but its own."""

import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from pathlib import Path


@cache
def html() -> str:
    return Path(__file__).with_name("page.html").read_text("utf-8")


@cache
def headers() -> dict[str, str]:
    """What a browser is to allow: of scripts and styles those alone that stand in the page, known by their hash."""
    script, style = (_hashes(tag, html()) for tag in ("script", "style"))
    policy = f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:"
    policy += "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _hashes(tag: str, page: str) -> str:
    parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return " ".join(f"'sha256-{b64encode(sha256(part.encode()).digest()).decode()}'" for part in parts)
