"""`devmap export`: writes files with which another program runs a locked plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from devmap_config.cli.command import CommandError, ProfileOptions, profile_command
from devmap_config.cli.exit_codes import ExitCode
from devmap_config.cli.options import FILE, force_option
from devmap_config.files import exists, is_file, is_folder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from devmap_config.compiler import Compiled
    from devmap_config.exports.export import Export
    from devmap_config.plan.lock import Lock

PROGRAMS = ("transformers", "llama.cpp", "vllm")


@profile_command("export", "table", "json")
@click.option("--to", "program", type=click.Choice(PROGRAMS), required=True, help="The program to export for.")
@click.option("-o", "--output", "folder", type=FILE, required=True, help="The folder to write to, made if needed.")
@click.option(
    "--model", "weights", metavar="WEIGHTS", help="The folder or hub id of the weights. [default: the profile's]"
)
@click.option(
    "--check",
    "python",
    metavar="PYTHON",
    help="Check the arguments with the parser of the installed vLLM.",
)
@force_option
def export(
    profile: Path,
    options: ProfileOptions,
    program: str,
    folder: Path,
    weights: str | None,
    python: str | None,
    force: bool,
) -> None:
    """Write files with which another program runs the locked plan of PROFILE, if that program can express the plan."""
    from devmap_config.cli.reporting import echo

    if python is not None and program != "vllm":
        raise click.UsageError("`--check` asks an installed vLLM: it goes with `--to vllm`")
    if exists(folder) and not is_folder(folder):
        raise click.UsageError(f"`{folder}` is not a folder")
    lock, compiled = _locked(profile, options)
    made = _exported(program, compiled, lock, folder, weights)
    if python is not None:
        made = _checked(made, python, compiled)
    _write(made.files, folder, force=force)
    files = {"files": [str(folder / name) for name in made.files], "notes": list(made.notes)}
    options.report(compiled.diagnostics, compiled.texts, {"plan": compiled.to_json(), **files})
    if options.shows_tables:
        for note in made.notes:
            echo(note, err=True)
        echo(f"wrote {', '.join(made.files)} to {folder}", err=True)


def _locked(profile: Path, options: ProfileOptions) -> tuple[Lock, Compiled]:
    """Return a profile's lock and its plan, derived again.

    Raises:
        CommandError: if the lock is missing, damaged or stale, or the profile is wrong.
    """
    from devmap_config.cli.progress import stages_shown
    from devmap_config.compiler import Rejected
    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.locked import compile_locked
    from devmap_config.plan.drift import remedy
    from devmap_config.plan.lock import LockError, lock_at, lock_path
    from devmap_config.profile.document import whole_file

    path, place = lock_path(profile), whole_file(str(profile))
    try:
        lock = lock_at(path, allow_outside=options.permissions.allow_outside)
    except LockError as error:
        finding = Diagnostic.error(error.code, f"`{path}` {error}", place, help=remedy(error.code, profile))
        raise CommandError((finding,), exit_code=ExitCode.STALE) from None
    with stages_shown(quiet=options.quiet):
        compilation, drift = compile_locked(profile, lock, **options.of_request)
    if isinstance(compilation, Rejected):
        raise CommandError(compilation.diagnostics, compilation.texts)
    if drift is not None:
        finding = Diagnostic.error(drift.code, f"`{path}` {drift.message}", place, help=remedy(drift.code, profile))
        raise CommandError((*compilation.diagnostics, finding), compilation.texts, exit_code=ExitCode.STALE)
    return lock, compilation


def _exported(program: str, compiled: Compiled, lock: Lock, folder: Path, weights: str | None) -> Export:
    """Return the files for a program.

    Raises:
        CommandError: if the program cannot express the plan.
    """
    from devmap_config.exports.export import UnfitExportError, require_text
    from devmap_config.exports.llama_cpp import export_to_llama_cpp
    from devmap_config.exports.plain_transformers import export_to_transformers
    from devmap_config.exports.vllm import export_to_vllm

    try:
        if program == "vllm":
            made = export_to_vllm(compiled, weights=weights)
        elif program == "llama.cpp":
            made = export_to_llama_cpp(compiled, weights=weights)
        else:
            made = export_to_transformers(compiled, folder, made_with=lock.made_with, weights=weights)
        require_text(made, compiled)
    except UnfitExportError as error:
        raise CommandError((*compiled.diagnostics, *error.diagnostics), compiled.texts) from None
    return made


def _checked(made: Export, python: str, compiled: Compiled) -> Export:
    """Return the files after checking that the parser of an installed vLLM accepts their flags.

    Raises:
        CommandError: if it does not, or there is no such vLLM.
    """
    from dataclasses import replace

    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.exports.vllm_parser import ParserError, parsed_by

    try:
        version = parsed_by(python, made.files)
    except ParserError as error:
        finding = Diagnostic.error("unfit-export", str(error), help=error.help)
        raise CommandError((*compiled.diagnostics, finding), compiled.texts) from None
    return replace(made, notes=(*made.notes, f"vLLM {version} takes what it is told"))


def _write(files: Mapping[str, str], folder: Path, *, force: bool) -> None:
    """Write files into a folder, which is made with those around it if needed, each one atomically.

    Raises:
        click.UsageError: if an existing file must not be replaced.
        click.ClickException: if a file cannot be written.
    """
    from devmap_config.cli.locking import write

    existing = [folder / name for name in files if exists(folder / name)]
    if odd := next((path for path in existing if not is_file(path)), None):
        raise click.UsageError(f"`{odd}` is not a regular file")
    if existing and not force:
        raise click.UsageError(f"`{existing[0]}` exists: pass `--force` to replace what is exported there")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"`{folder}` cannot be made: {error.strerror}") from None
    for name, text in files.items():
        write(folder / name, text)
