"""`devmap hardware`: the catalogue of accelerators."""

from __future__ import annotations

import click

from devmap_config.amounts import format_bandwidth, format_bytes, format_flops
from devmap_config.cli.command import command


@command("hardware", "table", "json")
@click.argument("name", required=False)
def hardware(name: str | None, output_format: str) -> None:
    """List the accelerators of the catalogue, or show one of them with the sources of its figures."""
    from devmap_config.cli.reporting import echo, print_json
    from devmap_config.hardware.catalogue import catalogue_rows, load_catalogue, nearest

    catalogue = load_catalogue()
    if name is not None and name not in catalogue:
        close = nearest(name)
        raise click.UsageError(
            f"the catalogue has no accelerator `{name}`" + (f"; did you mean `{close}`?" if close else "")
        )
    rows = {row["name"]: row for row in catalogue_rows() if name in (None, row["name"])}
    if output_format == "json":
        values = {figure: {key: _value(key, text) for key, text in row.items()} for figure, row in rows.items()}
        print_json(values if name is None else values[name])
        return
    if name is not None:
        for key, value in rows[name].items():
            mark = "  (unverified)" if key in catalogue[name].unverified else ""
            echo(f"{key}: {value or '–'}{mark}")
        return
    from devmap_config.cli.console import EscapingConsole
    from devmap_config.cli.tables import new_table

    console = EscapingConsole()
    table = new_table("accelerator", "device", figures=("memory", "bandwidth", "bf16"))
    for accelerator in catalogue.values():
        table.add_row(
            accelerator.name,
            accelerator.kind,
            format_bytes(accelerator.memory_bytes) + ("*" if "memory_bytes" in accelerator.unverified else ""),
            format_bandwidth(accelerator.memory_bandwidth_bytes_per_second),
            format_flops(accelerator.dense_bf16_flops_per_second) if accelerator.supports_bf16 else "–",
        )
    console.print(table)
    console.print("* nobody was seen reporting it; `devmap hardware NAME` shows each figure's source", style="dim")


def _value(key: str, text: str) -> int | float | bool | str | list[str] | None:
    """Return a figure of the catalogue's file as a JSON value."""
    if key == "unverified":
        return text.split()
    if key.startswith("supports_"):
        return text == "yes"
    if text.isdigit():
        return int(text)
    if key == "slack" or key.endswith("link_efficiency") or key in ("memory_efficiency", "compute_efficiency"):
        return float(text)
    return text or None
