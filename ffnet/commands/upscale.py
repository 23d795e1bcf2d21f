"""``ffnet upscale``: a picture enlarged by FFNet-SR."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import CommandError, model_of, new_file, require_place

if TYPE_CHECKING:
    from PIL.Image import Image

TILE = 256
#: Formats by the ends of file names, and options of saving. Others that Pillow writes reduce colours or sizes.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}), ".tif": ("TIFF", {}), ".tiff": ("TIFF", {}), ".bmp": ("BMP", {}),
    ".webp": ("WEBP", {"quality": 95}), ".jpg": ("JPEG", {"quality": 95}), ".jpeg": ("JPEG", {"quality": 95}),
}  # fmt: skip
OPAQUE = ("JPEG", "BMP")  # formats without transparency
#: The modes that pictures of each mode are read as. Other modes do not have 8 bits a channel, or have colours that
#: depend on a profile.
TAKEN = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB", "LA": "LA", "La": "LA", "PA": "RGBA", "RGBA": "RGBA",
         "RGBa": "RGBA", "RGBX": "RGB"}  # fmt: skip


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "upscale",
        help="a picture enlarged by FFNet-SR",
        description="Enlarges a picture of 8 bits a channel. Grey pictures stay grey, palettes become RGB, and "
        "transparency is enlarged by bicubic interpolation. Of an animation the first frame is read. The picture's "
        "colour profile is kept.",
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="any picture of 8 bits a channel that Pillow reads")
    parser.add_argument("--scale", type=int, metavar="S", help="2, 3 or 4; default: the checkpoint's")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="trained weights of FFNet-SR")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help=f"the picture to write: {', '.join(FORMATS)}"
    )
    parser.add_argument(
        "--tile", type=int, default=TILE, metavar="N",
        help="pixels of a tile's side, which bounds the memory; 0: the whole picture at once (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--overlap", type=int, metavar="P",
        help="pixels around a tile; default: all that the network looks at, so that tiles do not show",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        import PIL  # noqa: F401
    except ModuleNotFoundError as error:
        raise CommandError(f"{error} (pip install 'ffnet-kernels[demo]' brings what it needs)") from error

    for name, least in (("tile", 0), ("overlap", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise CommandError(f"expected --{name} of {least} or more, got {value}")
    if options.out.suffix.lower() not in FORMATS:
        raise CommandError(f"expected --out to end in {', '.join(FORMATS)}; got {options.out}")
    kind, how = FORMATS[options.out.suffix.lower()]
    require_place(options.out)
    image = picture_from(options.image)
    if kind in OPAQUE and "A" in image.mode:
        raise CommandError(f"{options.out}: {kind} holds no transparency; expected .png, for one")
    model = _model(options)
    result = enlarged(model, image, options.tile or None, options.overlap)
    if image.info.get("icc_profile"):
        how = {**how, "icc_profile": image.info["icc_profile"]}
    with new_file(options.out) as file:
        try:
            result.save(file, format=kind, **how)
        except (ValueError, KeyError) as error:
            raise CommandError(f"cannot write {options.out}: {error}") from error
    print(f"{options.out}: {result.width}x{result.height}, {image.width}x{image.height} enlarged {model.scale} times")
    return 0


def _model(options: argparse.Namespace) -> Any:
    from ..super_resolution import SCALES, FFNetSR, sr_arguments

    if options.scale is not None and options.scale not in SCALES:
        raise CommandError(f"expected --scale 2, 3 or 4, got {options.scale}")

    def build(state: dict[str, Any]) -> FFNetSR:
        arguments = sr_arguments(state)
        if options.scale not in (None, arguments["scale"]):
            raise CommandError(f"{options.checkpoint} enlarges {arguments['scale']} times, got --scale {options.scale}")
        return FFNetSR(**arguments)

    model = model_of(options.checkpoint, build)
    if model.in_chans != 3:
        raise CommandError(f"{options.checkpoint}: expected a model of 3 channels, got {model.in_chans}")
    return model


def picture_from(path: Path) -> Image:
    """Reads a picture of 8 bits a channel as grey or RGB, with its transparency, if any, rotated according to EXIF.

    Raises:
        CommandError: If it cannot be read, or has 16 bits, floating point, CMYK or another colour space.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            # Where Pillow has no mode for 16 bits a channel, it silently returns the upper 8.
            stored = " ".join(str(part) for tile in image.tile for part in tile)
            if image.mode not in TAKEN or ";16" in stored:
                what = "16 bits a channel" if "16" in image.mode + stored else f"mode {image.mode}"
                raise CommandError(
                    f"{path}: expected grey, RGB or a palette of 8 bits a channel, got {what}; convert it first"
                )
            mode = "RGBA" if image.mode in ("P", "RGB", "L") and image.has_transparency_data else TAKEN[image.mode]
            return ImageOps.exif_transpose(image).convert(mode)
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:  # raised by decoders for broken files
        raise CommandError(f"cannot read {path}: {error}") from error
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror or error}") from error


def enlarged(model: Any, image: Image, tile: int | None = None, overlap: int | None = None) -> Image:
    """Enlarges a picture of `picture_from`: colours by the model, transparency by bicubic interpolation."""
    import numpy as np
    import torch
    from PIL import Image

    from ..super_resolution import upscale

    colour, size = image.convert("RGB"), (model.scale * image.width, model.scale * image.height)
    pixels = torch.from_numpy(np.array(colour)).permute(2, 0, 1)[None]
    out = upscale(model, pixels, tile=tile, overlap=overlap)[0]
    result = Image.fromarray(out.permute(1, 2, 0).contiguous().numpy())
    if image.mode in ("L", "LA"):
        result = result.convert("L")
    if image.mode in ("LA", "RGBA"):
        result.putalpha(image.getchannel("A").resize(size, Image.Resampling.BICUBIC))
    return result
