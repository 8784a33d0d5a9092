"""`devmap serve`: loads a model by its lock, verifies it, and answers OpenAI's clients."""

from __future__ import annotations

import socket
import sys
from importlib.util import find_spec
from ipaddress import ip_address
from typing import TYPE_CHECKING

import click

from devmap_config.cli.command import ProfileOptions, profile_command
from devmap_config.cli.reporting import echo
from devmap_config.cli.running import facts, failures_told, loaded, randomly_weighted, summary, to_tell

if TYPE_CHECKING:
    from pathlib import Path

    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.runner.runner import Deployment
    from devmap_config.server.generation import Writer


@profile_command("serve", "table", "json")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="The port to listen at; 0 takes a free one.",
)
@click.option(
    "--queue",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="The number of requests that may wait while one is answered; further ones get status 429.",
)
@click.option("--random-weights", is_flag=True, help="Serve random weights, to try clients without a checkpoint.")
@click.option("--no-probe", is_flag=True, help="Do not check first that this machine can carry the plan.")
def serve(
    profile: Path, options: ProfileOptions, host: str, port: int, queue: int, random_weights: bool, no_probe: bool
) -> None:
    """Load the model of PROFILE by its lock, verify where every tensor is, and serve it to OpenAI's clients."""
    from devmap_config.cli.progress import stages_shown
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.diagnostics.overheard import passing_on
    from devmap_config.runner.runner import prepare

    sink, context = Sink(), click.get_current_context()
    with failures_told(profile, sink, options), passing_on(sink):
        _require_library()
        from devmap_config.runner.context import PlannedContext
        from devmap_config.server.generation import Writer, require_writes, writing_tokenizer
        from devmap_config.server.media import media_reader

        listener = context.with_resource(_bound(host, port))  # an address in use is reported before anything is loaded
        with stages_shown(quiet=not options.shows_tables):
            deployment = prepare(profile, **options.of_request, needs_weights=not random_weights)
        tokenizer = writing_tokenizer(deployment.request, sink)
        media = media_reader(deployment.compiled.model.graph.measurement, deployment.request)
        if random_weights:
            deployment = context.with_resource(randomly_weighted(deployment, options, asks_machine=not no_probe))
        model, load = loaded(deployment, options, sink, asks_machine=not no_probe)
        require_writes(type(model))
        media = media.of_model(model, deployment.request)
        planned = PlannedContext.of(deployment.compiled.loaded.profile.workload)
        writer = Writer(model, tokenizer, media, planned, queue_length=queue)
    if options.shows_tables:
        echo(f"{summary(deployment)}; it took {load.seconds:.1f} s", err=True)
    _listen(deployment, writer, listener, options, sink)


def _listen(
    deployment: Deployment, writer: Writer, listener: socket.socket, options: ProfileOptions, sink: Sink
) -> None:
    """Print the address of the server, and serve the model until the process is told to end."""
    from devmap_config.runner.demonstration import running
    from devmap_config.server.application import Service, listen

    profile, (host, port, *_) = deployment.compiled.loaded.profile, listener.getsockname()
    service = Service(
        model=profile.name or profile.model.source.value,
        writer=writer,
        is_local=ip_address(host).is_loopback,
        tell=lambda message: echo(message, err=True),
    )
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    options.report(to_tell(sink, options), {}, {**facts(deployment), "url": url, "model": service.model})
    if options.shows_tables:
        if profile.workload.context_length.value is None:
            echo("no context is planned: write `workload.context_length`, so that there is room for requests", err=True)
        if writer.media.reason is not None and (
            profile.workload.inputs.images or profile.workload.inputs.audio_seconds
        ):
            echo(f"requests with images or sound are refused: {writer.media.reason}", err=True)
        if not service.is_local:
            echo("anyone who can reach this address can use the model: no key is required", err=True)
        echo(f"`{service.model}` is served at {url}")
    with running(deployment.request):
        listen(service, listener)


def _require_library() -> None:
    from devmap_config.runner.loading import RunnerError

    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise RunnerError(
            "server-missing",
            f"serving needs {' and '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed",
            "run `pip install 'devmap-config[serve]'`",
        )


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address; it does not listen until the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        if sys.platform != "win32":  # on Windows, it would share the port with another process
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        raise click.UsageError(
            f"cannot listen at `{host}`, port {port}: {getattr(error, 'strerror', None) or error}"
        ) from None
    return listener
