"""A script in which the model of each profile generates in turn; it prints the process's own memory, its pages of
files, and the largest of both.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from devmap_config import load_model
from devmap_config.runner.generation_times import GenerationWorkload, measure_generation
from devmap_config.runner.inputs import MadeUp
from devmap_config.runner.usage import process_watched


def held(profile):
    gc.collect()  # of the one before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    model = load_model(profile, probe=False)
    with process_watched() as use:
        measure_generation(model, GenerationWorkload(prompts=MadeUp(batch_size=1, length=120), new_tokens=8))
    status = Path("/proc/self/status").read_text()
    peak_bytes = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return {"anonymous": use.anonymous_bytes, "file": use.file_bytes, "peak": peak_bytes}


print(json.dumps([held(profile) for profile in sys.argv[1:]]))
