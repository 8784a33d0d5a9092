"""A plugin for vLLM that records how many bytes of weights each rank loads, which the engine's log omits on CPUs."""

import json
import os
from pathlib import Path


def register():
    from vllm.distributed import get_world_group
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load_weights = DefaultModelLoader.load_weights

    def noted(self, model, model_config):
        load_weights(self, model, model_config)
        held = [*model.parameters(), *model.buffers()]
        weights = {each.data_ptr(): each.numel() * each.element_size() for each in held}  # those of rotation are shared
        rank = get_world_group().rank
        Path(os.environ["NOTED_WEIGHTS"], f"rank.{rank}").write_text(json.dumps(sum(weights.values())))

    DefaultModelLoader.load_weights = noted
