"""Images in: what a data set may hold, pixel values, placeholders in the prompt; models with and without a vision tower.

An image stays encoded, or on disk, until a batch needs its pixel values. All are decoded once before training, so that a
missing or corrupt one says so with its row. In the text it stands where `<image>` stands, or in front; in the prompt's
tokens it is one <|image_pad|> for each vector that the tower makes of it (vLLM wants one an image: see collapse).
"""

import base64
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PLACEHOLDER, PAD = "<image>", "<|image_pad|>"  # in the text of a problem; in the prompt
SPAN = f"<|vision_start|>{PAD}<|vision_end|>"


# ---- Models
def sees(config) -> bool:
    """Whether a model of this configuration takes images."""
    return config.model_type in FAMILIES


def load_model(path: str, dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a Hugging Face decoder, with its vision tower if it has one."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    auto = AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=dtype, trust_remote_code=trust_remote_code)


def load_processor(
    path: str,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    trust_remote_code: bool = False,
):
    """Load a model's image processor: torchvision's, else Pillow's, to the same effect; None: the model's limits."""
    limits = {
        k: v
        for k, v in {"min_pixels": min_pixels, "max_pixels": max_pixels}.items()
        if v is not None
    }
    try:
        processor = AutoImageProcessor.from_pretrained(
            path, trust_remote_code=trust_remote_code, **limits
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} has no image processor ({error}); expected its preprocessor_config.json"
        ) from error
    low, high = processor.size["shortest_edge"], processor.size["longest_edge"]
    if not 0 < low <= high:
        raise ValueError(
            f"min_pixels={low}, max_pixels={high}: expected two positive numbers, the first not the larger"
        )
    return processor


# ---- Images
@dataclass(frozen=True, eq=False)
class Image:
    """An image that has been decoded once, and is again for its pixel values."""

    source: bytes | str  # encoded, or its path
    processor: Callable
    grid: tuple[int, int, int]  # patches: time (1), height, width

    @property
    def n_tokens(self) -> int:
        """Positions that it takes in the prompt: a vector for merge_size * merge_size patches."""
        return self.grid[0] * self.grid[1] * self.grid[2] // self.processor.merge_size**2

    def open(self):
        """Return the Pillow image, in RGB and in its size for the tower.

        Processors and vLLM find nothing left to resize: with torchvision one pixel in a thousand would be rounded otherwise.
        """
        height, width = (patches * self.processor.patch_size for patches in self.grid[1:])
        return decode(self.source).resize((width, height), self.processor.resample)

    def pixel_values(self) -> Tensor:
        """Return its patches (t*h*w, channels * temporal_patch_size * patch_size**2): normalised, flat."""
        found = self.processor(images=[self.open()], return_tensors="pt")
        assert tuple(found["image_grid_thw"][0].tolist()) == self.grid, (
            found["image_grid_thw"],
            self.grid,
        )
        return found["pixel_values"]


def decode(source: bytes | str):
    """Return the Pillow image of encoded bytes or of a path, in RGB."""
    from PIL import Image as Pillow  # only where there are images

    with Pillow.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        if image.mode.startswith("I;16"):  # 16 bits: convert() would cut values off at 255
            image = image.point(lambda value: value / 256).convert("L")
        if (
            "A" in image.mode or "transparency" in image.info
        ):  # on white: a drawing on nothing is as a rule black
            layer = image.convert("RGBA")
            image = Pillow.alpha_composite(Pillow.new("RGBA", layer.size, "white"), layer)
        return image.convert("RGB")


def find_source(value, media_dir: str) -> bytes | str:
    """Return encoded bytes or a path from what a data set may hold: either, base64, or a dict of bytes and path."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError(
            f"{value!r:.60} is no image; expected a path, base64, bytes or a dict of bytes and path"
        )
    if os.path.isfile(path := os.path.join(media_dir, value)):
        return path
    try:
        return base64.b64decode(
            "".join((value.partition("base64,")[2] or value).split()), validate=True
        )
    except ValueError:
        raise ValueError(
            f"no file {path!r:.200}; put it there, or name another --media-dir"
        ) from None


def grid_of(processor, width: int, height: int) -> tuple[int, int, int]:
    """Return the grid of patches for an image of this size: one that the processor, asked again, leaves as it is."""
    limits, size = (processor.size["shortest_edge"], processor.size["longest_edge"]), None
    for _ in range(8):  # a thin image may be made smaller, and still be too large
        fitted = smart_resize(height, width, processor.patch_size * processor.merge_size, *limits)
        if fitted == size:
            return 1, height // processor.patch_size, width // processor.patch_size
        height, width = size = fitted
    raise ValueError(
        f"{width} x {height} pixels do not fit between {limits[0]} and {limits[1]}; move these limits apart"
    )


def load_images(
    rows: Sequence[dict], column: str, processor, media_dir: str, limit: int
) -> list[tuple[Image, ...]]:
    """Return each row's images, decoded for a check, by all ranks together; ValueError with the row that has a bad one."""
    near = [
        name
        for name in rows[0]
        if name in ("image", "picture", "pictures", "images", "image_path") and name != column
    ]
    if (
        processor is not None
        and not any(column in row for row in rows)
        and (column != "images" or near)
    ):
        raise ValueError(
            f"no row has a column {column!r}, only {sorted(rows[0])}; name the images' with --images-column"
        )
    values = [row.get(column) for row in rows]
    values = [
        [] if value is None else value if isinstance(value, list) else [value] for value in values
    ]
    if processor is None and (seen := [i for i, value in enumerate(values) if value]):
        raise ValueError(
            f"row {seen[0]} has images, and the model takes none; expected a model of {', '.join(FAMILIES)}"
        )
    if many := [i for i, value in enumerate(values) if len(value) > limit]:
        raise ValueError(
            f"row {many[0]} has {len(values[many[0]])} images, more than {limit}; raise --max-images or drop it"
        )

    def check(i: int, value) -> tuple[int, int, int]:
        try:
            return grid_of(processor, *decode(find_source(value, media_dir)).size)
        except Exception as error:  # decoders raise whatever hostile bytes lead them to
            raise ValueError(f"row {i}: an image cannot be read: {error}") from error

    def check_share(share: range) -> dict | ValueError:
        bar = tqdm(
            share, desc="images", unit="row", leave=False, delay=3, disable=dist.get_rank() > 0
        )
        try:
            return {i: [check(i, value) for value in values[i]] for i in bar if values[i]}
        except ValueError as error:
            return error

    shares: list = [None] * dist.get_world_size()
    dist.all_gather_object(shares, check_share(range(dist.get_rank(), len(rows), len(shares))))
    for error in (share for share in shares if isinstance(share, ValueError)):
        raise error
    grids = {i: found for share in shares for i, found in share.items()}
    return [
        tuple(
            Image(find_source(v, media_dir), processor, grid)
            for v, grid in zip(value, grids.get(i, []), strict=True)
        )
        for i, value in enumerate(values)
    ]


def stack(
    images: Sequence[Image], device: torch.device | str
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return pixel values (n_patches, dim) and grids (n_images, 3) of a batch's images, each prepared once; None if none."""
    if not images:
        return None, None
    pixels = {id(image): image for image in images}
    pixels = {key: image.pixel_values() for key, image in pixels.items()}
    grids = torch.tensor([image.grid for image in images], device=device)
    return torch.cat([pixels[id(image)] for image in images]).to(device), grids


# ---- Placeholders
def place(text: str, n_images: int, row: int) -> str:
    """Put images into a text: at each `<image>`, or in front where there is none; ValueError if the counts differ."""
    seen = text.count(PLACEHOLDER)
    if seen not in (0, n_images) or (seen and not n_images):
        raise ValueError(
            f"row {row} has {n_images} images and {seen} placeholders {PLACEHOLDER}; expected as many, or none"
        )
    return text.replace(PLACEHOLDER, SPAN) if seen else SPAN * n_images + text


def expand(ids: Sequence[int], images: Sequence[Image], pad: int | None, row: int) -> list[int]:
    """Repeat each image's placeholder token for each of its vectors; ValueError if the counts differ."""
    if (seen := list(ids).count(pad)) != len(images):
        raise ValueError(
            f"row {row} has {len(images)} images and {seen} tokens {PAD} in its prompt; drop {PAD} from the text"
        )
    sizes = iter(images)
    return [token for i in ids for token in [i] * (next(sizes).n_tokens if i == pad else 1)]


def collapse(ids: Sequence[int], pad: int) -> list[int]:
    """Undo expand, for vLLM, which expands by itself and would expand what is expanded, silently."""
    return [token for k, token in enumerate(ids) if token != pad or k == 0 or ids[k - 1] != pad]


def media_folder(media_dir: str | None, data: str) -> str:
    """Return the folder that paths of images are relative to: the given one, or that of the data."""
    return media_dir or (data if Path(data).is_dir() else str(Path(data).parent))
