"""`--to vllm`: makes the files that all hosts share, those of each host, and the scripts that start and watch them."""

from __future__ import annotations

import csv
import json
import re
import shlex
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from devmap_config.amounts import counted
from devmap_config.diagnostics.diagnostic import Sink
from devmap_config.exports.export import (
    Export,
    UnfitExportError,
    check_model_alone,
    is_local,
    require_no_errors,
    weights_for,
)
from devmap_config.files import ANYWHERE, PACKAGED, read_text, real_path
from devmap_config.graph.source import HUB_ID

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.compiler import Compiled
    from devmap_config.pipeline.stages import Pipeline, PipelineHost

HERE = Path(__file__).parent
AS_THEY_ARE = ("serve.sh", "cluster.py", "vllm@.service")
"""The files that are copied unchanged."""

DTYPES = ("bfloat16", "float16", "float32")

MASTER_PORT, JOIN_PORT, API_PORT = 29501, 29502, 8000
JOIN_SECONDS = 600
EXECUTE_SECONDS = 300
"""vLLM's default; the first request on a busy CPU needs more than 10."""

HEALTH_SECONDS = 60

URL = re.compile(r"[a-z][a-z0-9]*://\S+")
"""Matches the URL of an object store, some of which vLLM reads weights from."""


def options() -> Mapping[str, str]:
    """Return the flags and variables that exported files use, with the version of vLLM that defines them."""
    text = read_text(HERE / "vllm_options.csv", PACKAGED, ANYWHERE)
    return {row["option"]: row["version"] for row in csv.DictReader(text.splitlines())}


@cache
def version() -> str:
    """Return the version of vLLM that exported files were tried with."""
    return max(options().values())


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The arguments of the engine that describe the model.

    `source` is its folder on every host or its hub id, `revision` the latter's commit (empty for a folder), and `name`
    the model's name in requests.
    """

    source: str
    name: str
    revision: str = ""

    @property
    def is_folder(self) -> bool:
        """True if the model is a folder on the hosts, rather than on the hub."""
        return Path(self.source).is_absolute()


def export_to_vllm(compiled: Compiled, *, weights: str | None) -> Export:
    """Return the files with which vLLM serves a plan, on one host or several.

    Args:
        compiled: the profile with its plan.
        weights: the place of the weights on every host, if not the profile's.

    Raises:
        UnfitExportError: if the plan was not made for vLLM, or lacks what the hosts need to find each other.
    """
    sink, profile = Sink(), compiled.loaded.profile
    check_model_alone(compiled, "vLLM", sink)
    pipeline = compiled.plan.pipeline
    if pipeline is None:
        sink.error(
            "unfit-export",
            "the plan is made for transformers, and vLLM places by its own rules",
            profile.targets.span,
            help="write `targets: [vllm]` and compile again",
        )
        raise UnfitExportError(sink.diagnostics, compiled.texts)
    _check(pipeline, compiled, sink)
    source = weights or weights_for(compiled, "vLLM", sink)
    require_no_errors(sink, compiled)
    path = _path_on_hosts(str(source), compiled, sink, is_given=weights is not None)
    require_no_errors(sink, compiled)
    model = ServedModel(
        source=path,
        name=profile.name or Path(str(source)).name,
        revision="" if weights else compiled.model.source.commit or "",
    )
    return Export(files=files_for(pipeline, model))


def _path_on_hosts(source: str, compiled: Compiled, sink: Sink, *, is_given: bool) -> str:
    """Return the path of the weights on every host; a path that depends on the working directory is reported."""
    is_of_hub = not is_given and compiled.model.source.commit is not None
    if is_of_hub or (is_given and Path(source).is_absolute()):
        return source
    if is_local(source):
        return str(real_path(Path(source)))
    if not HUB_ID.fullmatch(source) and not URL.fullmatch(source):
        sink.error(
            "unfit-export",
            f"`{source}` is not here, and is neither a path from `/` on nor a hub id: each host would look elsewhere",
            compiled.loaded.profile.model.source.span,
            help="pass `--model` with the whole path, which is the same on every host: `/models/llama`",
        )
    return source


def files_for(pipeline: Pipeline, model: ServedModel) -> dict[str, str]:
    """Return the files for every host of a pipeline, by name."""
    nodes = range(len(pipeline.hosts))
    return {
        "README.md": _readme(pipeline),
        "plan.env": _plan(pipeline, model),
        **{f"node.{node}.env": _node(pipeline, node) for node in nodes},
        **{name: read_text(HERE / "vllm_files" / name, PACKAGED, ANYWHERE) for name in AS_THEY_ARE},
        **{f"compose.{node}.yaml": _compose(pipeline, node, model) for node in nodes},
    }


def _check(pipeline: Pipeline, compiled: Compiled, sink: Sink) -> None:
    profile = compiled.loaded.profile
    if profile.model.quantization.value is not None:
        sink.error(
            "unfit-export",
            "vLLM takes a checkpoint's quantization as it is, and the profile changes it",
            profile.model.quantization.key_span,
            help="leave `quantization` out, or name a checkpoint that is quantised so",
        )
    if pipeline.dtype not in DTYPES:
        message, help = f"vLLM has no {pipeline.dtype}", f"say one of {', '.join(DTYPES)}"
        sink.error("unfit-export", message, profile.model.dtype.span, help=help)
    addresses: dict[str, str | None] = {}
    for host in pipeline.hosts if len(pipeline.hosts) > 1 else ():
        address = None if host.address is None else _same_address(host.address)
        if address in addresses:
            sink.error(
                "unfit-export",
                f"`{host.name}` has the address of `{addresses[address]}`, and hosts reach each other by theirs",
                profile.hardware.hosts[str(host.name)].network.address.span,
                help="give each host its own: on one machine 127.0.0.1 and 127.0.0.2 are two",
            )
        elif address is not None:
            addresses[address] = host.name
        else:
            sink.error(
                "unfit-export",
                f"vLLM needs the address of `{host.name}`, at which the other hosts reach it",
                profile.hardware.hosts[str(host.name)].key_span,
                help="write `network: {address: 10.0.0.1}`",
            )


def _same_address(address: str) -> str:
    """Return the canonical spelling of an address: `::1` for `0:0:0:0:0:0:0:1`."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address.lower()  # a host's name
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


def _plan(pipeline: Pipeline, model: ServedModel) -> str:
    hosts = pipeline.hosts
    head = hosts[0].address if len(hosts) > 1 else "127.0.0.1"
    values = {
        "MODEL": model.source,
        "REVISION": model.revision,
        "SERVED_NAME": model.name,
        "KIND": pipeline.kind,
        "DTYPE": pipeline.dtype,
        "KV_CACHE_DTYPE": "auto" if pipeline.cache_dtype == pipeline.dtype else pipeline.cache_dtype,
        "TENSOR_PARALLEL_SIZE": pipeline.tensor_parallel_size,
        "PIPELINE_PARALLEL_SIZE": pipeline.pipeline_parallel_size,
        "VLLM_PP_LAYER_PARTITION": ",".join(map(str, pipeline.partition)),
        "NODES": len(hosts),
        "RANKS": len(hosts[0].devices),
        "MAX_MODEL_LEN": pipeline.max_model_len,
        "MAX_NUM_SEQS": pipeline.max_num_seqs,
        "MAX_NUM_BATCHED_TOKENS": pipeline.max_num_batched_tokens,
        "BLOCK_SIZE": pipeline.block_size,
        "MASTER_ADDR": head,
        "MASTER_PORT": MASTER_PORT,
        "JOIN_PORT": JOIN_PORT,
        "JOIN_SECONDS": JOIN_SECONDS,
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": EXECUTE_SECONDS,
        "HEALTH_SECONDS": HEALTH_SECONDS,
        "API_HOST": head,
        "API_PORT": API_PORT,
    }
    return _assignments("The same on every host: before they serve, hosts compare a checksum of this file.", values)


def _node(pipeline: Pipeline, node: int) -> str:
    host = pipeline.hosts[node]
    values = {
        "NODE_RANK": node,
        "VLLM_HOST_IP": host.address or "127.0.0.1",
        "INTERFACE": host.interface or "",
        "DEVICE_IDS": ",".join(str(device.index or 0) for device in host.devices),
        "KV_CACHE_MEMORY_BYTES": host.cache_bytes,
    }
    return _assignments(f"Of node {node} alone.", values)


def _assignments(comment: str, values: Mapping[str, object]) -> str:
    lines = (f"{name}={shlex.quote(str(value))}\n" for name, value in values.items())
    return f"# {comment}\n{''.join(lines)}"


def _compose(pipeline: Pipeline, node: int, model: ServedModel) -> str:
    """Return a compose file, with values in JSON, which is YAML; only the image is a variable."""
    run = ["/bin/sh", "/devmap/serve.sh"]
    of_node = ["/devmap/plan.env", f"/devmap/node.{node}.env"]
    volumes = [_bind(".", "/devmap")]
    volumes.append(
        _bind(model.source, model.source)
        if model.is_folder
        else {**_bind("~/.cache/huggingface", "/root/.cache/huggingface"), "read_only": False}
    )
    is_cuda = pipeline.kind == "cuda"
    image = f"${{VLLM_IMAGE:-vllm/vllm-openai:v{version()}}}" if is_cuda else "${VLLM_IMAGE:?the image of vLLM}"
    lines = [
        "# Run with the engine's own image; made for that of vLLM for CUDA. `VLLM_IMAGE` names another.",
        "services:",
        "  vllm:",
        f"    image: {json.dumps(image)}",
        "    network_mode: host",
        "    ipc: host",
        "    init: true",
        "    restart: always",
        "    stop_grace_period: 60s",
        f"    entrypoint: {json.dumps([*run, *of_node])}",
        f"    volumes: {_literal(volumes)}",
        "    healthcheck:",
        f"      test: {json.dumps(['CMD', *run, '--health', *of_node])}",
        "      interval: 60s",
        f"      timeout: {HEALTH_SECONDS + 5}s",
        "      start_period: 1800s",
        "      retries: 3",
    ]
    if is_cuda:  # all of them, as `--device-ids` selects some
        lines += [
            "    deploy:",
            "      resources:",
            "        reservations:",
            '          devices: [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]',
        ]
    return "\n".join(lines) + "\n"


def _bind(source: str, target: str) -> dict[str, object]:
    return {"type": "bind", "source": source, "target": target, "read_only": True}


def _literal(value: object) -> str:
    """Return a value that compose reads literally.

    JSON escapes characters beyond U+FFFF as surrogate pairs, which are invalid in YAML. So visible characters stay as
    they are, and invisible ones become YAML's escapes.
    """
    text = json.dumps(value, ensure_ascii=False).replace("$", "$$")
    return "".join(character if character.isprintable() else f"\\U{ord(character):08X}" for character in text)


README = """\
# A plan for vLLM {version}

`devmap export` made this folder from a lock. Export it again rather than edit it. Such folders were tested with vLLM
{version} on CPUs, over two network namespaces. `vllm@.service` and the compose files have not been run with systemd and
Docker: `systemd-analyze verify` accepts the unit, and the compose files follow the schema of the Compose Specification.

{table}

Copy this folder to every host. Each host needs vLLM {version}, and the weights at the path or from the hub's model that
`plan.env` names as `MODEL`. Then run on every host, in any order, within {join_seconds} s:

```console
{commands}
```

Set `PYTHON` and `VLLM` to use other commands than `python3` and `vllm`. Arguments after the two files are passed on to
`vllm serve`. {start}

{answers}

```console
$ sh serve.sh --health plan.env node.0.env && echo well
```

asks for one token, on any host. vLLM's own `/health` still reports success if hosts are gone that compute.

## What happens if something fails

{events}
- A forward takes longer than {execute_seconds} s: vLLM answers with an error, and ends.

vLLM offloads nothing: all weights are on the devices.

## With systemd, with containers

`vllm@.service` says how to install it; `vllm@N` is node N. `docker compose -f compose.N.yaml up` does the same in
vLLM's own image.
"""

OF_SEVERAL = """\
- Hosts differ in `plan.env` or in their version of vLLM, or two hosts have the same number: none of them starts, and
  each says which host differs and how (exit code 1). vLLM itself would serve, and give wrong answers.
- A host does not join within {join_seconds} s: the others give up (exit code 1).
- vLLM ends on one host: the others end at once (exit code 1), or within a minute if the whole host is gone. systemd and
  compose restart them, and they join again."""

OF_ONE = "- vLLM ends: the script ends too (exit code 1 or vLLM's own). systemd and compose restart it."


def _readme(pipeline: Pipeline) -> str:
    hosts, several = pipeline.hosts, len(pipeline.hosts) > 1
    rows = [_row(pipeline, node, host) for node, host in enumerate(hosts)]
    table = "\n".join(
        ("| node | host | address | devices | layers | cache of each rank |", "|---|---|---|---|---|---|", *rows)
    )
    commands = "\n".join(
        f"$ sh serve.sh plan.env node.{node}.env{f'    # on {host.name}' if host.name else ''}"
        for node, host in enumerate(hosts)
    )
    head = str(hosts[0].address) if several else "127.0.0.1"
    of_url = f"[{head}]" if ":" in head else head
    partition = "+".join(map(str, pipeline.partition))
    start = (
        f"The hosts need every port between them; `plan.env` names {MASTER_PORT} and {JOIN_PORT} of node 0."
        if several
        else ""
    )
    answers = (
        f"Requests are answered at `http://{of_url}:{API_PORT}/v1`: {counted(len(pipeline.stages), 'stage')} of"
        f" {partition} layers,\n{pipeline.max_num_seqs} at once, of up to {pipeline.max_model_len:,} tokens each."
        f" The cache holds {pipeline.cache_tokens:,} tokens."
    )
    return README.format(
        version=version(),
        table=table,
        join_seconds=JOIN_SECONDS,
        execute_seconds=EXECUTE_SECONDS,
        commands=commands,
        start=start,
        answers=answers,
        events=(OF_SEVERAL if several else OF_ONE).format(join_seconds=JOIN_SECONDS),
    )


def _row(pipeline: Pipeline, node: int, host: PipelineHost) -> str:
    stages = [stage for stage in pipeline.stages if set(stage.devices) & set(host.devices)]
    layers = ", ".join(f"{stage.first_layer}–{stage.last_layer}" for stage in stages)
    devices = ", ".join(f"{device.kind}:{device.index or 0}" for device in host.devices)
    return f"| {node} | {host.name or ''} | {host.address or ''} | {devices} | {layers} | {host.cache_bytes:,} bytes |"
