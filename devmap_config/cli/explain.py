"""`devmap explain`: what a diagnostic's code means."""

from __future__ import annotations

import difflib

import click


@click.command("explain")
@click.argument("code")
def explain(code: str) -> int:
    """Print what the diagnostic CODE means, with an example and its mend."""
    from devmap_config.diagnostics.pages import codes, page

    known = codes()
    if code not in known:
        close = difflib.get_close_matches(code, known, n=1)
        raise click.UsageError(f"there is no diagnostic `{code}`" + (f"; did you mean `{close[0]}`?" if close else ""))
    text = page(code)
    import sys

    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(text))
    else:
        click.echo(text.rstrip())
    return 0
