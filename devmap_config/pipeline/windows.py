"""Reads the attention window of each layer from a model's config, like transformers' config class, which vLLM uses.

A config may omit `layer_types`; its class then derives them, each family of models in its own way. A test compares the
families that are known here with those classes; windows of other families are refused rather than guessed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FULL, SLIDING = "full_attention", "sliding_attention"
"""transformers' names of the kinds of layers whose cache is counted."""

EVERY_FULL = {
    "afmoe": 4,
    "cohere2": 4,
    "exaone4": 4,
    "exaone_moe": 4,
    "gemma2": 2,
    "gemma3_text": 6,
    "gpt_oss": 2,
    "olmo3": 4,
    "vaultgemma": 2,
}
"""Families in which every n-th layer has full attention, and the others a window."""

PATTERN_KEYS = {
    **dict.fromkeys(("cohere2", "exaone4", "exaone_moe", "gemma3_text"), "sliding_window_pattern"),
    "afmoe": "global_attn_every_n_layers",
}
"""The key with which the config of some of these families may set another number."""

FIRST_FULL = {"granite_swa": 4, "granitemoe_swa": 4}
"""Families in which the first layer has full attention, and every n-th after it."""

ALL_FULL = frozenset({"laguna"})
"""Families in which all layers have full attention, whatever window their config has, unless `layer_types` says
otherwise.
"""

ONE_MORE = frozenset({"cohere2", "cohere2_moe"})
"""Families whose window in vLLM is one token longer than `sliding_window`, as in their training
(`models/commandr.py`).
"""

OF_OTHER_KINDS = frozenset(
    {"deepseek_v32", "deepseek_v4", "glm_moe_dsa", "hy_v4", "inkling_text", "kimi_linear", "llama4_text"}
)
"""Families whose layers cache something other than the keys and values of all tokens or of a window."""

EVERY_SLIDING = frozenset(
    {"ministral", "ministral3", "mistral", "mixtral", "phi3", "phimoe", "qwen3_moe", "starcoder2"}
)
"""Families in which all layers have a window, if their config has one."""

SWITCHED = frozenset({"qwen2", "qwen2_moe", "qwen3", "qwen3_moe"})
"""Families that have no window unless `use_sliding_window` says so."""

LAYERS_BEFORE_WINDOWS = 28
"""The default of `max_window_layers` in configs of Qwen."""

WINDOWS = {
    **dict.fromkeys((*EVERY_FULL, *SWITCHED, "ministral", "mistral"), 4096),
    **dict.fromkeys(("gpt_oss", *FIRST_FULL), 128),
    "afmoe": 1024,
}
"""The default of `sliding_window` by family."""

KEYS_OF_OTHER_LAYERS = (
    "conv_L_cache",
    "full_attention_interval",
    "layers_block_type",
    "linear_attn_config",
    "linear_num_value_heads",
    "mamba_d_state",
    "ssm_state_size",
    "state_size",
)
"""Keys of configs in which some layers cache a state instead of keys and values; `layer_types` says which."""


class UnknownWindowsError(ValueError):
    """A config does not say which layers have a window, or their cache cannot be counted; the text says why."""


def windows_of(config: Mapping[str, Any], count: int) -> tuple[int | None, ...]:
    """Return the attention window of each layer, in tokens; `None` without a limit.

    Args:
        config: the parsed `config.json`.
        count: the number of layers.

    Raises:
        UnknownWindowsError: if the config does not say, or layers cache something else.

    Example:
        >>> windows_of({"model_type": "gemma2", "sliding_window": 512}, 3)
        (512, None, 512)
        >>> windows_of({"model_type": "llama"}, 2)
        (None, None)
    """
    family = config.get("model_type")
    window = config.get("sliding_window", WINDOWS.get(str(family)))
    if not config.get("use_sliding_window", family not in SWITCHED):
        window = None
    if config.get("sliding_windows"):
        raise UnknownWindowsError("its layers see unequal windows (`sliding_windows` in its config)")
    kinds: Sequence[str] = config.get("layer_types") or _kinds(config, str(family), window, count)
    if other := [kind for kind in kinds if kind not in (FULL, SLIDING)]:
        raise UnknownWindowsError(f"what its layers keep that are `{other[0]}` is not counted yet")
    if len(kinds) != count or (SLIDING in kinds and (not isinstance(window, int) or window < 1)):
        raise UnknownWindowsError("its config does not say how far back each layer sees")
    seen = window + 1 if isinstance(window, int) and family in ONE_MORE else window
    return tuple(seen if kind == SLIDING else None for kind in kinds)


def _kinds(config: Mapping[str, Any], family: str, window: object, count: int) -> list[str]:
    """Return the kinds of the layers that the family's config class derives."""
    if key := next((key for key in KEYS_OF_OTHER_LAYERS if config.get(key)), None):
        raise UnknownWindowsError(f"which of its layers keep a state (`{key}` in its config) is not known")
    if family in OF_OTHER_KINDS:
        raise UnknownWindowsError(f"what the layers of a `{family}` keep is not counted yet")
    if family in FIRST_FULL:
        return [SLIDING if number % FIRST_FULL[family] else FULL for number in range(count)]
    if family in EVERY_FULL:
        period = config.get(PATTERN_KEYS.get(family, ""))
        period = EVERY_FULL[family] if period is None else period
        if not isinstance(period, int) or period < 1:
            raise UnknownWindowsError(f"which of its layers see a window is not known by `{period}`")
        return [SLIDING if (number + 1) % period else FULL for number in range(count)]
    if window is None or family in ALL_FULL:
        return [FULL] * count
    if family in EVERY_SLIDING:
        return [SLIDING] * count
    before = config.get("max_window_layers", LAYERS_BEFORE_WINDOWS)
    if not isinstance(before, int):
        raise UnknownWindowsError("its config does not say which layers see a window")
    if family in ("qwen2", "qwen3"):
        return [SLIDING if number >= before else FULL for number in range(count)]
    if family == "qwen2_moe":
        return [SLIDING if number < before and (number + 1) % 2 else FULL for number in range(count)]
    raise UnknownWindowsError(f"which layers of a `{family}` see its window is not known: write `layer_types`")
