"""What ``umbel site doctor`` and ``umbel server doctor`` share."""

from __future__ import annotations

from collections.abc import Iterable

import typer

from umbel.cli import output
from umbel.cli.output import Format
from umbel.deploy.findings import Finding, worst


def tell(found: Iterable[Finding], format: Format) -> None:
    """Shows the findings; ends with exit code 1 where one is an error."""
    findings = list(found)
    code = worst(findings)
    if format is Format.json:
        output.emit({"ok": code == 0, "findings": [f._asdict() for f in findings]})
    else:
        marks = {"ok": "ok", "warning": "WARNING", "error": "ERROR"}
        for finding in findings:
            print(f"{marks[finding.level]:8}{finding.what}: {finding.found}")
            if finding.fix:
                print(f"        → {finding.fix}")
    if code:
        raise typer.Exit(code)
