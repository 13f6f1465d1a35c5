"""Images are decoded to upright RGB, JPEGs with exactly Pillow's pixels; broken images are refused."""

import struct
import warnings
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.storage.bad_examples import BadExampleError
from datamodules.transforms.decode import MAX_PIXELS, open_image, read_image
from tests.datamodules.shard_files import assert_one_line, encode

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
PNG = encode(Image.fromarray(COLOURS))
WHERE = "example folder/key of train-000000.tar"

SMOOTH = np.asarray(Image.fromarray(COLOURS).resize((37, 23), Image.Resampling.BICUBIC))
"""An image that survives JPEG."""


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


def refusal(data: bytes) -> BadExampleError:
    """The error, checked to be one line with the location."""
    with pytest.raises(BadExampleError) as error:
        read_image(data, WHERE)
    assert_one_line(error, WHERE)
    return error.value


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, depth: int = 8, colours: int = 2) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))


def raw_png(width: int, height: int, depth: int, colours: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG of given bytes for each row, including the filter byte."""
    data = png_chunk(b"IDAT", zlib.compress(rows))
    return b"".join([png_header(width, height, depth, colours), *chunks, data, png_chunk(b"IEND", b"")])


@pytest.mark.parametrize(
    ("kind", "options"), [("png", {}), ("png", {"optimize": True}), ("webp", {"lossless": True})], ids=str
)
def test_lossless_images_keep_every_pixel(kind: str, options: dict[str, Any]) -> None:
    pixels = read_image(encode(Image.fromarray(COLOURS), kind, **options), WHERE)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (6, 8, 3))
    assert np.array_equal(pixels, COLOURS)


@pytest.mark.parametrize(
    ("mode", "colour", "kind", "expected", "tolerance"),
    [
        ("1", 1, "png", (255, 255, 255), 0),
        ("1", 0, "png", (0, 0, 0), 0),
        ("L", 90, "png", (90, 90, 90), 0),
        ("LA", (90, 10), "png", (90, 90, 90), 0),
        ("P", 3, "png", (30, 40, 50), 0),
        ("RGBA", (200, 100, 50, 10), "png", (200, 100, 50), 0),
        ("RGBA", (200, 100, 50, 0), "png", (200, 100, 50), 0),
        ("I;16", 40000, "png", (156, 156, 156), 0),  # 40000 / 256: not cut off at 255, as Pillow's own conversion does
        ("RGBA", (200, 100, 50, 255), "webp", (200, 100, 50), 4),
        ("RGB", (200, 100, 50), "jpeg", (200, 100, 50), 3),
        ("L", 90, "jpeg", (90, 90, 90), 0),
        ("CMYK", (0, 100, 200, 30), "jpeg", (225, 137, 49), 3),
    ],
    ids=str,
)
def test_every_mode_becomes_rgb(
    mode: str, colour: Any, kind: str, expected: tuple[int, int, int], tolerance: int
) -> None:
    image = Image.new(mode, (8, 6), colour)
    if mode == "P":
        image.putpalette([level for entry in range(4) for level in (entry * 10, entry * 10 + 10, entry * 10 + 20)])
    pixels = read_image(encode(image, kind), WHERE)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (6, 8, 3))
    assert abs(pixels.astype(int) - expected).max() <= tolerance


def test_transparent_colour_of_a_palette_keeps_its_colour() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([1, 2, 3, 200, 100, 50])
    assert (read_image(encode(image, transparency=1), WHERE) == (200, 100, 50)).all()


def test_upper_eight_of_sixteen_bits_are_kept() -> None:
    greys = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    pixels = read_image(encode(Image.fromarray(greys)), WHERE)
    assert np.array_equal(pixels, np.stack(3 * [greys >> 8], 2))
    colours = np.random.default_rng(1).integers(0, 1 << 16, (3, 5, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in colours)
    assert np.array_equal(read_image(raw_png(5, 3, 16, 2, rows), WHERE), colours >> 8)


JPEGS = {
    "half colours": {"subsampling": 2},
    "half columns": {"subsampling": 1},
    "all colours": {"subsampling": 0, "quality": 100},
    "poor": {"quality": 5},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 1},
    "no conversion": {"keep_rgb": True},
    "optimized": {"optimize": True},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_jpeg_has_the_pixels_of_pillow(options: dict[str, Any]) -> None:
    for shape in ((23, 37), (16, 16), (1, 1), (8, 65)):
        noise = np.random.default_rng(2).integers(0, 256, (*shape, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(COLOURS).resize(shape[::-1]))
        for pixels in (noise, smooth):
            data = encode(Image.fromarray(pixels), "jpeg", **options)
            assert np.array_equal(read_image(data, WHERE), pillow(data)), shape
            if "keep_rgb" not in options:
                grey = encode(Image.fromarray(pixels).convert("L"), "jpeg", **options)
                assert np.array_equal(read_image(grey, WHERE), pillow(grey)), shape


def test_jpeg_with_trailing_bytes_is_read() -> None:
    data = encode(Image.fromarray(SMOOTH), "jpeg")
    assert np.array_equal(read_image(data + b"\0" * 50, WHERE), pillow(data))


def test_first_image_of_several_in_a_file_is_read() -> None:
    images = {"save_all": True, "append_images": [Image.new("RGB", (37, 23))]}
    for kind, options in (("png", images), ("webp", {**images, "lossless": True})):
        assert np.array_equal(read_image(encode(Image.fromarray(SMOOTH), kind, **options), WHERE), SMOOTH)
    assert np.array_equal(
        read_image(encode(Image.fromarray(SMOOTH), "mpo", quality=90, **images), WHERE),
        pillow(encode(Image.fromarray(SMOOTH), "jpeg", quality=90)),
    )


ORIENTED = {
    1: COLOURS,
    2: COLOURS[:, ::-1],
    3: COLOURS[::-1, ::-1],
    4: COLOURS[::-1],
    5: COLOURS.transpose(1, 0, 2),
    6: np.rot90(COLOURS, -1),
    7: COLOURS[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(COLOURS, 1),
}


def exif(orientation: int) -> Image.Exif:
    description = Image.Exif()
    description[0x0112] = orientation
    return description


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("png", {}, 0),
        ("webp", {"lossless": True}, 0),
        ("jpeg", {"quality": 100, "subsampling": 0}, 3),
        ("jpeg", {"quality": 100, "subsampling": 0, "progressive": True}, 3),
    ],
    ids=str,
)
def test_image_is_turned_by_its_exif_orientation(kind: str, options: dict[str, Any], tolerance: int) -> None:
    for orientation, expected in ORIENTED.items():
        pixels = read_image(encode(Image.fromarray(COLOURS), kind, exif=exif(orientation), **options), WHERE)
        assert pixels.shape == expected.shape, orientation
        assert abs(pixels.astype(int) - expected).max() <= tolerance, orientation
        assert pixels.flags.c_contiguous, orientation


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientation_is_upright(orientation: int) -> None:
    data = encode(Image.fromarray(COLOURS), exif=exif(orientation))
    assert np.array_equal(read_image(data, WHERE), COLOURS)


EXIF = exif(6).tobytes().removeprefix(b"Exif\0\0")
assert EXIF.startswith(b"MM")
DAMAGED_EXIF = {
    "no TIFF header": b"this is no TIFF header",
    "nothing": b"",
    "cut off": EXIF[:12],
    "an entry beyond the end": EXIF[:4] + struct.pack(">I", 1 << 30),
}


@pytest.mark.parametrize("description", DAMAGED_EXIF.values(), ids=DAMAGED_EXIF)
def test_image_with_damaged_exif_is_read(description: bytes) -> None:
    png = PNG[:33] + png_chunk(b"eXIf", description) + PNG[33:]
    jpeg = encode(Image.fromarray(COLOURS), "jpeg", quality=100, subsampling=0)
    segment = b"Exif\0\0" + description
    jpeg = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read_image(png, WHERE), COLOURS)
        assert abs(read_image(jpeg, WHERE).astype(int) - COLOURS).max() <= 3


NOISE = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
WEBP = encode(Image.fromarray(SMOOTH), "webp")
BROKEN = {
    "no image": b"this is not an image",
    "one byte": b"\xff",
    "half a PNG": PNG[: len(PNG) // 2],
    "half a WebP": WEBP[: len(WEBP) // 2],
    "damaged data": NOISE[:2000] + bytes(5000) + NOISE[7000:],
    "a chunk of a wrong length": NOISE.replace(
        struct.pack(">I", NOISE.index(b"IEND") - NOISE.index(b"IDAT") - 12), b"\0\0\5\0", 1
    ),
    "a header that is too short": PNG[:8] + png_chunk(b"IHDR", b"\0\0\0\1"),
    "a palette that is missing": raw_png(2, 1, 8, 3, b"\0\0\1", png_chunk(b"tRNS", b"\xff\xff\0")),
    "text that fills the memory": PNG[:33] + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 22))) + PNG[33:],
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_broken_image_is_refused(data: bytes) -> None:
    error = refusal(data)
    assert (error.reason, "is broken" in str(error)) == ("broken image", True)


def test_empty_file_is_refused() -> None:
    assert refusal(b"").reason == "empty file"


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"grey": True}], ids=str)
def test_truncated_jpeg_is_refused(options: dict[str, bool]) -> None:
    grey = options.pop("grey", False)
    data = encode(Image.fromarray(SMOOTH).convert("L" if grey else "RGB"), "jpeg", **options)
    for end in [*range(1, len(data), 37), len(data) - 3, len(data) - 2, len(data) - 1]:
        assert refusal(data[:end]).reason == "broken image"


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=str)
def test_faulty_jpeg_is_read_like_pillow(options: dict[str, bool]) -> None:
    # Pillow tolerates faults that the faster decoder refuses.
    data = encode(Image.fromarray(SMOOTH), "jpeg", **options)
    generator = np.random.default_rng(3)
    kept = 0
    for _ in range(100):
        damaged = bytearray(data)
        damaged[generator.integers(len(data) // 2, len(data) - 2)] = generator.integers(256)
        try:
            expected = pillow(bytes(damaged))
        except OSError:
            assert refusal(bytes(damaged)).reason == "broken image"
            continue
        kept += 1
        assert np.array_equal(read_image(bytes(damaged), WHERE), expected)
    assert kept > 20


def test_maximum_number_of_pixels_is_allowed_but_not_one_more() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        allowed = open_image(png_header(1765, MAX_PIXELS // 1765) + PNG[33:], WHERE)
        assert MAX_PIXELS - 1765 < allowed.width * allowed.height <= MAX_PIXELS
        for width, height in ((1765, MAX_PIXELS // 1765 + 1), (9460, 9460), (100_000, 100_000)):
            error = refusal(png_header(width, height) + PNG[33:])
            assert error.reason == "too many pixels"


@pytest.mark.parametrize(("width", "height"), [(1, 4000), (20_000, 1), (10, 1001)])
def test_image_with_extreme_aspect_ratio_is_refused(width: int, height: int) -> None:
    error = refusal(encode(Image.new("L", (width, height))))
    assert error.reason == "too many pixels"
    assert read_image(encode(Image.new("L", (10, 1000))), WHERE).shape == (1000, 10, 3)


def test_jpeg_claiming_too_many_pixels_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("datamodules.transforms.decode.decode_image_jpegturbo", decode)
    data = encode(Image.fromarray(SMOOTH), "jpeg")
    size = data.index(b"\xff\xc0") + 5
    for side in (9460, 65_500):
        claim = struct.pack(">HH", side, side)
        assert refusal(data[:size] + claim + data[size + 4 :]).reason == "too many pixels"


OTHERS = {
    kind: encode(Image.fromarray(COLOURS), kind)
    for kind in ("gif", "bmp", "tiff", "ppm", "tga", "ico", "pcx", "jpeg2000", "eps", "pdf", "dds", "sgi", "icns")
}
OTHERS["PostScript"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%true) (w) file\n"
OTHERS["SVG"] = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


@pytest.mark.parametrize("data", OTHERS.values(), ids=OTHERS)
def test_other_formats_are_refused_without_decoding(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []
    Image.init()
    for name in set(Image.OPEN) - {"JPEG", "PNG", "WEBP"}:
        reach = lambda *_, name=name: reached.append(name)  # noqa: E731
        monkeypatch.setitem(Image.OPEN, name, (reach, reach))
    assert refusal(data).reason == "broken image"
    assert reached == []
