"""Which encoded images may go into a shard: the format, the sizes, and a full decode."""

import io
import re
import warnings
from dataclasses import dataclass

from PIL import Image

_MAGIC = {  # the format is what the bytes say, not the name
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "BMP": re.compile(rb"BM"),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is refused before a pixel is decoded."""

    max_pixels: int = 64_000_000
    max_bytes: int = 2**25
    image_size: tuple[int, int] | None = None
    """(width, height) that every image must have; None: any."""


def image_format(data: bytes) -> str | None:
    """JPEG, PNG, WEBP or BMP by the first bytes; None for anything else."""
    return next((name for name, magic in _MAGIC.items() if magic.match(data)), None)


def inspect_image(data: bytes, limits: Limits) -> str | None:
    """Why an encoded image cannot be used, or None where it can."""
    name = image_format(data)
    if name is None:
        return "not a JPEG, PNG, WebP or BMP image"
    if len(data) > limits.max_bytes:
        return f"{len(data)} encoded bytes, more than {limits.max_bytes}"
    try:
        # Pillow's own guard against bombs begins where its limit is passed twice
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=(name,)) as image:
                reason = _wrong_size(image.size, limits)
                if reason is None:
                    image.load()
                return reason
    except Exception as error:  # decoders raise almost anything on damaged bytes
        return f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}"


def _wrong_size(size: tuple[int, int], limits: Limits) -> str | None:
    shown = f"{size[0]}x{size[1]} pixels"
    if limits.image_size and size != limits.image_size:
        return f"{shown}, not {limits.image_size[0]}x{limits.image_size[1]}"
    if size[0] * size[1] > limits.max_pixels:
        return f"{shown}, more than max_pixels {limits.max_pixels}"
    return None


def encode(data: bytes) -> tuple[str, bytes]:
    """(extension, bytes) for a shard: JPEG and PNG as they are, other formats as PNG."""
    name = image_format(data)
    if name in ("JPEG", "PNG"):
        return {"JPEG": "jpg", "PNG": "png"}[name], data
    output = io.BytesIO()
    with Image.open(io.BytesIO(data), formats=(name or "WEBP",)) as image:
        (image if image.mode == "RGB" else image.convert("RGB")).save(output, "PNG")
    return "png", output.getvalue()
