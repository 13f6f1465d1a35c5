"""Images that others send: damaged, huge, of other formats, of other modes."""

import io
import struct
import zlib

import pytest
from PIL import Image

from serving.engine.uploads import read_image


def file(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def webp_header(width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    content = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x00\x00\x00\x00" + size
    return b"RIFF" + struct.pack("<I", len(content)) + content


IMAGE = Image.linear_gradient("L").resize((20, 12))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "P", "1", "I;16"])
def test_images_of_any_mode_become_rgb_of_the_size_of_the_model(kind: str, mode: str) -> None:
    image = IMAGE.convert(mode)
    try:
        content = file(image, kind)
    except OSError:
        return  # the format has no such mode
    assert read_image(content, 8, 2).size == (8, 8)
    reduced = read_image(content, None, 2)
    assert (reduced.mode, reduced.size) == ("RGB", (20, 12))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the image is not a readable JPEG, PNG or WebP image; choose another file"),
        (b"GIF89a" + bytes(100), "not a readable"),
        (file(IMAGE, "PNG")[:-40], "not a readable"),
        (file(IMAGE, "JPEG")[:300], "not a readable"),
        (file(IMAGE, "GIF"), "not a readable"),
        (file(IMAGE, "TIFF"), "not a readable"),
        (png_header(2**31 - 1, 2**31 - 1), "the image is too large; choose one of at most 40,000,000 pixels"),
        (png_header(10_000, 4_001), "too large"),
        (webp_header(16_383, 16_383), "not a readable|too large"),
        (file(IMAGE, "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff" + bytes(12)), None),
        (file(Image.new("L", (1, 1)), "PNG"), "it needs at least 2 × 2"),
    ],
)
def test_what_is_no_usable_image_is_refused_in_one_line(content: bytes, message: str | None) -> None:
    if message is None:
        assert read_image(content, None, 2).size == (20, 12)
        return
    with pytest.raises(ValueError, match=message) as caught:
        read_image(content, None, 2)
    assert "\n" not in str(caught.value)


def test_large_images_are_reduced_for_a_tokenizer_alone() -> None:
    assert read_image(file(Image.new("RGB", (2000, 1000)), "PNG"), None, 16).size == (512, 256)
