"""Bring the help in the page of every verb up to date: `python docs/write_help.py`. A test compares the two."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from deltaw.cli.main import VERBS

for verb in VERBS:
    page = Path(__file__).with_name(f"{verb}.md")
    text = import_module(f"deltaw.cli.{verb}").parser().format_help()
    block = f"<!-- help -->\n```text\n{text}```\n<!-- /help -->"
    old = page.read_text(encoding="utf-8")
    page.write_text(re.sub(r"<!-- help -->.*?<!-- /help -->", lambda _, new=block: new, old, flags=re.DOTALL),
                    encoding="utf-8")
