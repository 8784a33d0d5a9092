"""`devmap schema`: the JSON Schemas of profiles and locks."""

from __future__ import annotations

import click

from devmap_config.cli.command import command


@command("schema")
@click.argument("name", type=click.Choice(("profile", "lock")), default="profile")
def schema(name: str) -> None:
    """Print the JSON Schema (draft 7) of a profile or a lock."""
    from devmap_config.cli.reporting import print_json

    if name == "lock":
        from devmap_config.plan.lock_format import lock_schema

        print_json(lock_schema())
    else:
        from devmap_config.profile.json_schema import profile_schema

        print_json(profile_schema())
