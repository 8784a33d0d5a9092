"""Makes inputs for images, with the shapes that a model's processor would make, but without the processor.

The shapes follow from the parameters of the model's forward and from its config, rather than from its type: a model
that takes an `image_grid_thw` is given patches in a row; one that takes `spatial_shapes`, patches and a mask.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from devmap_config.graph.failures import MissingSizeError
from devmap_config.graph.media import Media, config_within, stated
from devmap_config.libraries.transformers import tiles_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PretrainedConfig, PreTrainedModel

    from devmap_config.graph.costs import WorkloadShape
    from devmap_config.graph.media import Tensors

VISION_CONFIGS = (
    *("vision_config", "vision_tower_config", "vq_config", "vision_encoder_config", "visual_config", "encoder"),
    *("vit_config", "thinker_config"),
)


@dataclass(frozen=True)
class _Images:
    """The config's description of the images that a model takes, and their number."""

    model: PreTrainedModel
    workload: WorkloadShape
    accepted: frozenset[str]

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def vision(self) -> PretrainedConfig:
        return config_within(self.config, VISION_CONFIGS)

    @property
    def count(self) -> int:
        return self.workload.batch_size * self.in_sequence

    @property
    def in_sequence(self) -> int:
        """The number of images that the model is given for each sequence, with every tile counted as an image."""
        return self.workload.images * max(self.workload.tiles, 1)

    @property
    def channels(self) -> int:
        names = ("num_channels", "in_channels", "in_chans", "num_image_channels")
        return int(self.first(*names, default=3))

    @property
    def patch(self) -> int:
        return int(_side(self.first("patch_size", default=getattr(self.config, "patch_size", None)), 14))

    @property
    def merged(self) -> int:
        """The number of patches in each direction that become one token."""
        names = ("spatial_merge_size", "merge_size", "merge_kernel_size")
        outer = next((value for name in names[:2] if (value := getattr(self.config, name, None)) is not None), None)
        return int(_side(self.first(*names, default=outer), 2))

    @property
    def fixed(self) -> int | None:
        """The side of the square images that the model takes, if it takes no others."""
        side = _side(self.first("image_size", "input_size", "resolution"), None)
        return None if side is None else int(side)

    def first(self, *names: str, default: Any = None) -> Any:
        return next((value for name in names if (value := getattr(self.vision, name, None)) is not None), default)

    def ones(self, *shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=self.model.dtype)

    @property
    def size(self) -> tuple[int, int]:
        """The height and width of each image, in pixels.

        Raises:
            MissingSizeError: if the workload does not say.
        """
        height, width = self.workload.image_height, self.workload.image_width
        if height is None or width is None:
            raise MissingSizeError("it takes images of any size")
        return height, width

    @property
    def shape(self) -> tuple[int, int]:
        """The height and width that the model takes by its config, or else those of the workload."""
        return self.size if self.fixed is None else (self.fixed, self.fixed)


def _side(value: Any, default: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) else default if value is None else value


def image_candidates(model: PreTrainedModel, workload: WorkloadShape) -> Iterator[Media]:
    """Yield ways to give a model its images, likely ones first."""
    images = _Images(model, workload, frozenset(inspect.signature(model.forward).parameters))
    for name, make in BY_PARAMETER.items():
        if name in images.accepted:
            yield from make(images)
            return
    yield from _pixels(images)


def _patches_in_a_row(images: _Images) -> Iterator[Media]:
    """Yield the patches of all images in a row, with the grid of each image (Qwen2-VL and similar models)."""
    patch, unit = images.patch, images.patch * images.merged
    tokens_down, tokens_across = (max(1, round(side / unit)) for side in images.size)
    rows, columns = tokens_down * images.merged, tokens_across * images.merged
    grid = torch.tensor([[1, rows, columns]] * images.count)
    more = {"image_merge_sizes": torch.tensor([images.merged] * images.count)}
    given = {"image_grid_thw": grid} | {name: tensor for name, tensor in more.items() if name in images.accepted}
    count, depth = images.count * rows * columns, images.channels * patch * patch
    temporal = images.first("temporal_patch_size", default=1)
    for shape in (
        (count, depth * temporal),
        (count, depth),
        (count, images.channels, patch, patch),
        (count, 2 * depth),
    ):
        yield Media(tensors={"pixel_values": images.ones(*shape), **given})
    pixels = images.ones(images.count * tokens_down * tokens_across, unit, unit, images.channels)  # one row a token
    yield Media(
        tensors={
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, tokens_down, tokens_across]] * images.count),
        }
    )


def _patches_by_height_and_width(images: _Images) -> Iterator[Media]:
    rows, columns = (max(1, side // (2 * images.patch)) * 2 for side in images.size)
    pixels = images.ones(images.count * rows * columns, images.channels * images.patch**2)
    grid = torch.tensor([[rows, columns]] * images.count)
    yield Media(tensors={"pixel_values": pixels, "image_grid_hw": grid})


def _patches_beside_a_mask(images: _Images) -> Iterator[Media]:
    """Yield each image as the greatest number of patches that it may have, with a mask (SigLIP 2)."""
    across = int(math.sqrt(images.first("num_patches", "max_num_patches", default=256))) // 2 * 2
    yield Media(
        tensors={
            "pixel_values": images.ones(images.count, across**2, images.channels * images.patch**2),
            "spatial_shapes": torch.tensor([[across, across]] * images.count),
            "pixel_attention_mask": torch.ones((images.count, across**2), dtype=torch.long),
        }
    )


def _patches_with_positions(images: _Images) -> Iterator[Media]:
    tokens = images.first("default_output_length", default=stated(images.config, "vision_soft_tokens_per_image") or 280)
    usual = int(math.sqrt(tokens)) * images.first("pooling_kernel_size", default=3)
    own = images.first("model_patch_size", default=images.patch)
    for across, patch in ((usual, own), (usual, images.patch), (16, 3 * images.patch), (16, images.patch)):
        down, along = torch.meshgrid(torch.arange(across), torch.arange(across), indexing="ij")
        positions = torch.stack([along, down], -1).reshape(1, -1, 2).repeat(images.count, 1, 1)
        pixels = images.ones(images.count, across**2, images.channels * patch**2)
        yield Media(tensors={"pixel_values": pixels, "image_position_ids": positions})


def _patches_in_strips(images: _Images) -> Iterator[Media]:
    rows, columns = (max(1, side // (4 * images.patch)) * 4 for side in images.size)
    pixels = images.ones(images.count, images.channels, images.patch, images.patch * rows * columns)
    sizes = torch.tensor([[rows, columns]] * images.count)
    for dtype in (torch.long, torch.int32):
        yield Media(tensors={"pixel_values": pixels, "target_sizes": sizes.to(dtype)})


def _tiles_attended_across(images: _Images) -> Iterator[Media]:
    """Yield tiles to which decoder layers attend by cross-attention (Mllama)."""
    batch, count, tiles = images.workload.batch_size, images.workload.images, images.first("max_num_tiles", default=4)
    height, width = images.shape

    def beside(ids: torch.Tensor, _: torch.Tensor) -> Tensors:
        return {"cross_attention_mask": torch.ones((*ids.shape, count, tiles), dtype=torch.long)}

    yield Media(
        tensors={
            "pixel_values": images.ones(batch, count, tiles, images.channels, height, width),
            "aspect_ratio_ids": torch.ones((batch, count), dtype=torch.long),
            "aspect_ratio_mask": torch.ones((batch, count, tiles), dtype=torch.long),
        },
        beside=beside,
    )


def _crops_with_a_mask(images: _Images) -> Iterator[Media]:
    """Yield crops of each image and the whole image, both with a token at the end of each row (Phi-4-multimodal)."""
    side = images.first("crop_size", "image_size", default=448)
    given = (images.workload.image_height or side, images.workload.image_width or side)
    rows, columns = (math.ceil(length / side) for length in given)
    across, crops = side // images.patch, 1 + rows * columns
    pooled = math.ceil(across / 2)
    yield Media(
        tensors={
            "image_pixel_values": images.ones(images.count, crops, images.channels, side, side),
            "image_sizes": torch.tensor([[rows * side, columns * side]] * images.count),
            "image_attention_mask": torch.ones((images.count, crops, across, across), dtype=torch.long),
        },
        placeholders=(rows * pooled * (columns * pooled + 1) + pooled * (pooled + 1) + 1) * images.workload.images,
    )


def _flattened(images: _Images) -> Iterator[Media]:
    """Yield patches that contain their own positions (Pix2Struct, Kosmos-2.5)."""
    depth = images.first("patch_embed_hidden_size", default=images.channels * min(images.patch, 16) ** 2)
    if "image_embeds_position_mask" in images.accepted:
        sides = {"width": torch.tensor([64] * images.count), "height": torch.tensor([64] * images.count)}
        pixels = images.ones(images.count, 4096, depth + 2)
        latent = stated(images.config, "latent_query_num") or 2048
        yield Media(
            tensors={"flattened_patches": pixels, **sides},
            placeholders=latent * images.workload.images,
            beside=_embedded_positions,
        )
        return
    length = images.first("seq_len", default=2048)
    yield Media(tensors={"flattened_patches": images.ones(images.count, length, depth + 2)})


def _embedded_positions(_: torch.Tensor, stands: torch.Tensor) -> Tensors:
    return {"image_embeds_position_mask": stands}


def _latents(images: _Images) -> Iterator[Media]:
    """Yield images whose features take the place of marked tokens (Kosmos-2)."""
    height, width = images.shape
    yield Media(
        tensors={"pixel_values": images.ones(images.count, images.channels, height, width)},
        placeholders=(stated(images.config, "latent_query_num") or 64) * images.workload.images,
        beside=_embedded_positions,
    )


def _pooled_patches(images: _Images) -> Iterator[Media]:
    """Yield the patches of each image, and which of them are pooled into one token (Molmo 2)."""
    across = (images.fixed or 378) // images.patch
    pooled = math.ceil(across / 2)
    order = torch.full((2 * pooled, 2 * pooled), -1)  # -1 stands for no patch
    order[:across, :across] = torch.arange(across**2).reshape(across, across)
    pools = order.reshape(pooled, 2, pooled, 2).permute(0, 2, 1, 3).reshape(pooled**2, 4)
    for crops, grid in ((1, [pooled, pooled, 0, 0]), (2, [pooled] * 4)):
        yield Media(
            tensors={
                "pixel_values": images.ones(images.count * crops, across**2, images.channels * images.patch**2),
                "image_token_pooling": pools.repeat(images.count * crops, 1),
                "image_grids": torch.tensor([grid] * images.count),
                "image_num_crops": torch.tensor([crops] * images.count),
            }
        )


def _image_patches(images: _Images) -> Iterator[Media]:
    """Yield patches that are embedded like tokens of text (Fuyu)."""
    patch = getattr(images.config, "patch_size", None) or 30
    count = math.prod(max(1, side // patch) for side in images.size) * images.workload.images
    pixels = images.ones(images.workload.batch_size, count, images.channels * patch**2)

    def beside(_: torch.Tensor, stands: torch.Tensor) -> Tensors:
        order = torch.where(stands, stands.long().cumsum(-1) - 1, -1)
        return {"image_patches_indices": order} if "image_patches_indices" in images.accepted else {}

    yield Media(tensors={"image_patches": pixels}, placeholders=count, beside=beside)


def _tiles_of_its_size(images: _Images) -> Iterator[Media]:
    """Yield each image whole and in the tiles that its size requires (LLaVA-NeXT)."""
    side = images.fixed or 336
    if not (pinpoints := getattr(images.config, "image_grid_pinpoints", None)):
        yield from _pixels(images, sized=True)
        return
    tiles = tiles_of(*images.size, pinpoints, side)
    sizes = torch.tensor([list(images.size)] * images.count)
    pixels = images.ones(images.count, tiles, images.channels, side, side)
    yield Media(tensors={"pixel_values": pixels, "image_sizes": sizes})


def _images_beside_masks(images: _Images) -> Iterator[Media]:
    """Yield the images of each sequence, with a mask of their pixels (Idefics2 and 3)."""
    batch, count, (height, width) = images.workload.batch_size, images.in_sequence, images.shape
    pixels = images.ones(batch, count, images.channels, height, width)
    for masked in ((height, width), ()):
        mask = torch.ones((batch, count, *masked), dtype=torch.bool)
        yield Media(tensors={"pixel_values": pixels, "pixel_attention_mask": mask})


def _questioned(images: _Images) -> Iterator[Media]:
    """Yield images with tokens for a transformer that queries them (InstructBLIP)."""
    words = torch.ones((images.count, 8), dtype=torch.long)
    height, width = images.shape
    given = {"qformer_input_ids": words, "qformer_attention_mask": words}
    for frames in ((), (4,)):
        yield Media(
            tensors={"pixel_values": images.ones(images.count, *frames, images.channels, height, width), **given}
        )


def _two_resolutions(images: _Images) -> Iterator[Media]:
    high = getattr(images.config, "high_res_vision_config", images.vision).image_size
    height, width = images.shape
    yield Media(
        tensors={
            "pixel_values": images.ones(images.count, images.channels, height, width),
            "high_res_pixel_values": images.ones(images.count, images.channels, high, high),
        }
    )


def _boxes(images: _Images) -> Iterator[Media]:
    """Yield a page, and the bounding box of each of its words (UDOP)."""
    height, width = images.shape

    def beside(ids: torch.Tensor, _: torch.Tensor) -> Tensors:
        return {"bbox": images.ones(*ids.shape, 4) * 0}

    yield Media(tensors={"pixel_values": images.ones(images.count, images.channels, height, width)}, beside=beside)


def _attended_images(images: _Images) -> Iterator[Media]:
    """Yield images to which decoder layers attend, with a mask of images for each token (IDEFICS)."""
    batch, count, (height, width) = images.workload.batch_size, images.workload.images, images.shape

    def beside(ids: torch.Tensor, _: torch.Tensor) -> Tensors:
        return {"image_attention_mask": torch.ones((*ids.shape, count), dtype=torch.long)}

    yield Media(tensors={"pixel_values": images.ones(batch, count, images.channels, height, width)}, beside=beside)


def _pixels(images: _Images, *, sized: bool = False) -> Iterator[Media]:
    """Yield images as plain pixels."""
    height, width = images.shape
    if getattr(images.vision, "model_type", "") == "pixtral":  # takes any size up to its config's
        unit = 2 * images.patch
        height, width = (min(own, side) // unit * unit for own, side in zip(images.size, (height, width), strict=True))
    sizes = {"image_sizes": torch.tensor([[height, width]] * images.count)}
    for given in (sizes, {}) if sized else ({},):
        for shape in ((images.count, images.channels), (images.count, 1, images.channels), (images.count, 3)):
            yield Media(tensors={"pixel_values": images.ones(*shape, height, width), **given})
    if (frames := images.first("temporal_patch_size")) and images.fixed is None:  # separate patches (Inkling)
        count = images.count * math.prod(max(1, side // images.patch) for side in images.size)
        pixels = images.ones(count, frames, images.patch, images.patch, images.channels)
        yield Media(tensors={"pixel_values": pixels})


BY_PARAMETER: dict[str, Callable[[_Images], Iterator[Media]]] = {
    "image_grid_thw": _patches_in_a_row,
    "image_grid_hw": _patches_by_height_and_width,
    "spatial_shapes": _patches_beside_a_mask,
    "image_position_ids": _patches_with_positions,
    "target_sizes": _patches_in_strips,
    "aspect_ratio_ids": _tiles_attended_across,
    "image_pixel_values": _crops_with_a_mask,
    "flattened_patches": _flattened,
    "image_token_pooling": _pooled_patches,
    "image_patches": _image_patches,
    "bbox": _boxes,
    "image_embeds_position_mask": _latents,
    "image_sizes": _tiles_of_its_size,
    "pixel_attention_mask": _images_beside_masks,
    "image_attention_mask": _attended_images,
    "qformer_input_ids": _questioned,
    "high_res_pixel_values": _two_resolutions,
}
"""The ways to give a model images, by a parameter of its forward; the first that it has decides."""
