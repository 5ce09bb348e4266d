"""Images: from a data set to pixel values; their placeholders in prompts; models that take them.

An image stays encoded in memory, or in its file, until a batch needs its pixel values. All images
are decoded once before training starts, so that a missing or corrupt one is reported with its row
at the beginning and not hours later. A frozen vision tower makes the same of an image every time:
it sees each image of a step once (`batching.encode_images`), and batches hold the features.

In the text of a problem an image stands where `<image>` stands, or in front of the text if there
is no `<image>`. In the token ids of a prompt it is one <|image_pad|> for each vector that the
vision tower makes of it. (vLLM expects a single <|image_pad|> an image: see `collapse`.)
"""

import base64
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import PIL.Image
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from infra.errors import in_short
from infra.parallel import gather_objects, is_first

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PLACEHOLDER = "<image>"  # an image in the text of a problem
PAD = "<|image_pad|>"  # one vector of an image in the prompt
SPAN = f"<|vision_start|>{PAD}<|vision_end|>"  # an image in the prompt, before `expand`
IMAGE_COLUMNS = ("image", "images", "image_path", "picture", "pictures")  # names often used

Source = bytes | str  # an encoded image, or the path of its file
Grid = tuple[int, int, int]  # patches of an image: time (always 1), height, width


# ---- Models
def takes_images(config) -> bool:
    """Return whether a model of this configuration takes images."""
    return config.model_type in FAMILIES


def load_model(path: str, dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a Hugging Face decoder, with its vision tower if it has one.

    ValueError if weights cannot be loaded, or some are missing, which would be random numbers.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    try:
        model, info = auto_class(config).from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"the weights of {path} cannot be loaded ({in_short(error)}); expected those of its "
            "config.json"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{len(missing)} weights of {path} are missing, e.g. {missing[0]}; expected all of "
            f"those that a model has whose config.json says {config.model_type}"
        )
    return model


def auto_class(config: PretrainedConfig) -> type:
    """Return what makes a decoder of a configuration, with its vision tower if it has one."""
    return AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM


def load_processor(
    path: str,
    max_pixels: int | None = None,
    trust_remote_code: bool = False,
):
    """Load the image processor of a model.

    It works with torchvision if that is installed and with Pillow otherwise, to the same effect.

    Args:
        path: a folder or a hub id.
        max_pixels: larger images are reduced to about this many pixels; None: the model's limit.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: if the model has no image processor, or max_pixels is below its lower limit.
    """
    limits = {}
    if max_pixels is not None:
        limits["max_pixels"] = max_pixels
    try:
        processor = AutoImageProcessor.from_pretrained(
            path, trust_remote_code=trust_remote_code, **limits
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} has no image processor ({error}); expected its preprocessor_config.json"
        ) from error
    smallest, largest = pixel_limits(processor)
    if not 0 < smallest <= largest:
        raise ValueError(
            f"max_pixels={largest}: expected a positive number, no less than the {smallest} pixels "
            f"that an image has at least for {path}"
        )
    return processor


def pixel_limits(processor) -> tuple[int, int]:
    """Return how many pixels an image has at least and at most when the tower sees it."""
    # despite their names, both count pixels
    return processor.size["shortest_edge"], processor.size["longest_edge"]


# ---- Images
@dataclass(frozen=True, eq=False)
class Image:
    """A readable image of a data set; it is decoded again whenever its pixel values are needed."""

    source: Source
    processor: Callable
    grid: Grid
    features: Tensor | None = None  # (n_tokens, K, D) of a frozen tower, see policy.Policy.encode

    @property
    def n_tokens(self) -> int:
        """Positions in the prompt: the tower makes one vector of merge_size**2 patches."""
        time, height, width = self.grid
        return time * height * width // self.processor.merge_size**2

    def open(self) -> PIL.Image.Image:
        """Return the image in RGB, already in the size that the tower takes.

        Processors and vLLM then find nothing left to resize. If torchvision did it, it would round
        one pixel in a thousand differently from Pillow.
        """
        _, height, width = self.grid
        patch_size = self.processor.patch_size
        size = (width * patch_size, height * patch_size)
        return decode(self.source).resize(size, self.processor.resample)

    def pixel_values(self) -> Tensor:
        """Return its normalised patches, flat.

        Shape (time * height * width, channels * temporal_patch_size * patch_size**2).
        """
        processed = self.processor(images=[self.open()], return_tensors="pt")
        grid = tuple(processed["image_grid_thw"][0].tolist())
        assert grid == self.grid, f"the processor made a grid of {grid}, expected {self.grid}"
        return processed["pixel_values"]


def decode(source: Source) -> PIL.Image.Image:
    """Return an image in RGB, given its encoded bytes or its path."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with PIL.Image.open(file) as image:
        return put_on_white(reduce_to_8_bits(image)).convert("RGB")


def reduce_to_8_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Scale an image of 16 bits down to 8, where convert() would cut values off at 255."""
    if not image.mode.startswith("I;16"):
        return image
    return image.point(lambda value: value / 256).convert("L")


def put_on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """Fill what is transparent with white: drawings without a background are mostly black."""
    if "A" not in image.mode and "transparency" not in image.info:
        return image
    layer = image.convert("RGBA")
    white = PIL.Image.new("RGBA", layer.size, "white")
    return PIL.Image.alpha_composite(white, layer)


def find_source(value, media_dir: str) -> Source:
    """Return the encoded bytes or the path of an image, from whatever a data set holds.

    Args:
        value: bytes, a path, base64 (also as a data URL), or a dict with `bytes` or `path`, as the
            `datasets` library stores images.
        media_dir: the folder that paths are relative to.

    Raises:
        ValueError: if the value is of another kind, or is neither the path of a file nor base64.
    """
    content = value
    if isinstance(value, dict):
        content = value.get("bytes") or value.get("path")
    if isinstance(content, bytes):
        return content
    if not isinstance(content, str) or not content:
        raise ValueError(
            f"{content!r:.60} is not an image; "
            "expected a path, base64, bytes or a dict of bytes and path"
        )
    path = os.path.join(media_dir, content)
    if os.path.isfile(path):
        return path
    try:
        return decode_base64(content)
    except ValueError:
        raise ValueError(
            f"no file {path!r:.200}; put it there, or name another --media-dir"
        ) from None


def decode_base64(text: str) -> bytes:
    """Decode base64, also after `data:image/png;base64,`; ValueError if it is something else."""
    _, _, behind_header = text.partition("base64,")
    digits = "".join((behind_header or text).split())
    return base64.b64decode(digits, validate=True)


def fit_grid(processor, width: int, height: int) -> Grid:
    """Return the grid of patches of an image with this size in pixels.

    The processor leaves an image of the grid's size as it is. One call of `smart_resize` does not
    ensure that: it may make a thin image smaller and still leave it too large.

    Raises:
        ValueError: if no size fits between the processor's limits, or the image is far too thin.
    """
    cell = processor.patch_size * processor.merge_size  # pixels a side that become one vector
    smallest, largest = pixel_limits(processor)
    size = (height, width)
    for _ in range(8):
        fitted = smart_resize(*size, cell, smallest, largest)
        if fitted == size:
            return 1, size[0] // processor.patch_size, size[1] // processor.patch_size
        size = fitted
    raise ValueError(
        f"{size[1]} x {size[0]} pixels do not fit between {smallest} and {largest}; "
        "move these limits apart"
    )


def load_images(
    rows: Sequence[Mapping], column: str, processor, media_dir: str
) -> list[tuple[Image, ...]]:
    """Return the images of each row, after decoding each of them once.

    All ranks call this together and share the work.

    Args:
        rows: rows of a data set.
        column: the column with a row's images: one, a list of them, or None.
        processor: the model's image processor; None for a model that takes no images.
        media_dir: the folder that paths are relative to.

    Raises:
        ValueError: if the column is missing; or with the row that has an image that cannot be
            read, or any at all where the model takes none.
    """
    values = [as_list(row.get(column)) for row in rows]
    if processor is None:
        check_empty(values)
    else:
        check_column(rows, column)
    images = []
    for row_values, row_grids in zip(values, fit_grids(values, processor, media_dir), strict=True):
        row_images = []
        for value, grid in zip(row_values, row_grids, strict=True):
            row_images.append(Image(find_source(value, media_dir), processor, grid))
        images.append(tuple(row_images))
    return images


def hold_paths(rows: Sequence[Mapping], column: str, processor) -> bool:
    """Return whether a data set names files of images, as far as its first image tells."""
    if processor is None:
        return False
    first = next((value for row in rows for value in as_list(row.get(column))), None)
    if isinstance(first, dict):
        first = first.get("bytes") or first.get("path")
    if not isinstance(first, str):
        return False
    try:
        decode_base64(first)
    except ValueError:
        return True
    return False


def check_column(rows: Sequence[Mapping], column: str) -> None:
    """Raise ValueError if the images seem to be in another column than the named one.

    The default column, `images`, may be missing: then the data are text only, unless there is a
    column of a similar name.
    """
    if any(column in row for row in rows):
        return
    is_text_only = column == "images" and not any(name in rows[0] for name in IMAGE_COLUMNS)
    if not is_text_only:
        raise ValueError(
            f"no row has a column {column!r}, only {sorted(rows[0])}; "
            "name the images' with --images-column"
        )


def as_list(value) -> list:
    """Return the images that a row holds as a list: none, one, or a list already."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def check_empty(values: Sequence[list]) -> None:
    """Raise ValueError for the first row with images, of a model that takes none."""
    for i, row_values in enumerate(values):
        if row_values:
            raise ValueError(
                f"row {i} has images, and the model takes none; "
                f"expected a model of {', '.join(FAMILIES)}"
            )


def fit_grids(values: Sequence[list], processor, media_dir: str) -> list[list[Grid]]:
    """Decode the images of all rows, each rank those of its share, and return their grids.

    All ranks call this together. A bad image raises the same ValueError on every rank, because a
    rank that raised it by itself would leave the others waiting.
    """
    share = range(dist.get_rank(), len(values), dist.get_world_size())
    is_silent = not is_first()
    grids = {}  # by row
    error = None
    try:
        for i in tqdm(share, desc="images", unit="row", leave=False, delay=3, disable=is_silent):
            grids[i] = [read_grid(i, value, processor, media_dir) for value in values[i]]
    except ValueError as caught:
        error = caught
    all_grids = {}
    for rank_grids, rank_error in gather_objects((grids, error)):
        if rank_error is not None:
            raise rank_error
        all_grids.update(rank_grids)
    return [all_grids[i] for i in range(len(values))]


def read_grid(row: int, value, processor, media_dir: str) -> Grid:
    """Decode an image and return its grid; ValueError with the row if that fails."""
    try:
        width, height = decode(find_source(value, media_dir)).size
        return fit_grid(processor, width, height)
    except Exception as error:  # decoders raise anything when the bytes are corrupt
        raise ValueError(f"row {row}: an image cannot be read: {error}") from error


def stack(
    images: Sequence[Image],
    device: torch.device | str,
    part: Callable[[Image], Tensor] = Image.pixel_values,
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return a part of each image, stacked, and the grids (n_images, 3) of the images of a batch.

    By default the part is the pixel values, (n_patches, dim) in all. Without any image both are None.
    """
    if not images:
        return None, None
    # responses to one problem share its images: each is prepared, and copied to the device, once
    parts = {image: part(image).to(device) for image in dict.fromkeys(images)}
    stacked = torch.cat([parts[image] for image in images])
    return stacked, torch.tensor([image.grid for image in images], device=device)


class ImageInputs(NamedTuple):
    """What a vision-language model takes of the images of a batch; None where there is none."""

    pixel_values: Tensor | None = None  # (n_patches, dim), for the tower
    features: Tensor | None = None  # (n_vectors, K, D), what a frozen tower has made of them
    grids: Tensor | None = None  # (n_images, 3), patches of each: time, height, width
    all_grids: Tensor | None = None  # likewise, of the images of all rows


def stack_all(
    images: Sequence[Image], of_all_rows: Sequence[Image], device: torch.device | str
) -> ImageInputs:
    """Return the inputs for the images of a batch.

    images: those of rows whose prompt no row before them has; of_all_rows: those of all rows
    """
    if not images:
        return ImageInputs()
    all_grids = torch.tensor([image.grid for image in of_all_rows], device=device)
    if images[0].features is None:
        pixel_values, grids = stack(images, device)
        return ImageInputs(pixel_values, None, grids, all_grids)
    features, grids = stack(images, device, lambda image: image.features)
    return ImageInputs(None, features, grids, all_grids)


# ---- Placeholders
def place(text: str, n_images: int, row: int) -> str:
    """Put the images of a problem into its text: at each `<image>`, or in front if there is none.

    Raises:
        ValueError: if the text has placeholders, but not one for each image.
    """
    n_placeholders = text.count(PLACEHOLDER)
    if n_placeholders == 0:
        return SPAN * n_images + text
    if n_placeholders != n_images:
        raise ValueError(
            f"row {row} has {n_images} images and {n_placeholders} placeholders {PLACEHOLDER}; "
            "expected as many, or none"
        )
    return text.replace(PLACEHOLDER, SPAN)


def expand(ids: Sequence[int], images: Sequence[Image], pad: int | None, row: int) -> list[int]:
    """Repeat the placeholder token of each image once for each of its vectors.

    Args:
        ids: the prompt's tokens, with one `pad` an image.
        images: the prompt's images, in the same order.
        pad: the id of <|image_pad|>; None if the tokenizer has no such token.
        row: the prompt's row, for the error message.

    Raises:
        ValueError: if there are more or fewer placeholders than images.
    """
    n_pads = list(ids).count(pad)
    if n_pads != len(images):
        raise ValueError(
            f"row {row} has {len(images)} images and {n_pads} tokens {PAD} in its prompt; "
            f"drop {PAD} from the text"
        )
    remaining = iter(images)
    expanded = []
    for token in ids:
        n_copies = next(remaining).n_tokens if token == pad else 1
        expanded += [token] * n_copies
    return expanded


def collapse(ids: Sequence[int], pad: int) -> list[int]:
    """Undo `expand`, for vLLM: it expands placeholders itself and would silently do so twice."""
    collapsed = []
    previous = None
    for token in ids:
        if token != pad or previous != pad:
            collapsed.append(token)
        previous = token
    return collapsed
