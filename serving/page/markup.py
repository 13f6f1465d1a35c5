"""HTML of results, progress and messages. All texts are escaped."""

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from PIL import Image

from serving.page.generation import Progress, Waiting
from serving.page.uploads import to_png

CSS = """
.split { display: grid !important; gap: 1rem 1.5rem;
  grid-template: "request results" auto "settings results" 1fr / minmax(300px, 2fr) 3fr; }
.split > * { min-width: 0 !important; }
.request { grid-area: request; }
.results { grid-area: results; }
.settings { grid-area: settings; }
.seed button { align-self: end; min-height: 42px; flex-grow: 1; white-space: nowrap; padding: 0 .75rem; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(9rem, 44%), 1fr)); gap: .75rem; }
.images.wide { grid-template-columns: repeat(auto-fill, minmax(min(13rem, 44%), 1fr)); }
.images figure { margin: 0; min-width: 0; }
.images img { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 6px; display: block; margin: 0; }
.images img.small { image-rendering: pixelated; }
.images figcaption { font-size: .85rem; line-height: 1.35; margin-top: .3rem; overflow-wrap: anywhere; }
.images a { text-decoration: underline; margin-left: .5em; }
.status progress { width: 100%; height: .6rem; display: block; margin-top: .4rem; accent-color: #4f46e5; }
.status p { margin: 0; }
.status .error { border-left: 4px solid #dc2626; padding: .4rem .75rem; background: #dc262614;
  overflow-wrap: anywhere; }
.cut { max-width: 16rem; }
button:focus-visible, a:focus-visible, input[type=range]:focus-visible {
  outline: 3px solid #4f46e5 !important; outline-offset: 2px; }
@media (max-width: 720px) {
  .split { grid-template: "request" "results" "settings" / minmax(0, 1fr); }
  .gradio-container main { padding-left: .75rem !important; padding-right: .75rem !important; }
  .gradio-container .tab-container button { padding: 0 .55rem !important; }
}
"""
SMALL = 128
"""Sides in pixels up to which enlarged pixels stay sharp."""


class Download(NamedTuple):
    """A finished image.

    Attributes:
        url: address of its PNG file, relative to the page.
        file: name for the downloaded file.
        title: class or prompt.
        number: number of the image, from 1.
        side: its side in pixels.
    """

    url: str
    file: str
    title: str
    number: int
    side: int


def message(text: str) -> str:
    """A line about what happened."""
    return f'<p role="status">{escape(text)}</p>' if text else ""


def error_message(text: str) -> str:
    """A sentence about what went wrong, announced by screen readers."""
    sentence = text[:1].upper() + text[1:]
    return f'<p class="error" role="alert">{escape(sentence)}.</p>'


def waiting(event: Waiting) -> str:
    """Place in the queue."""
    return message(f"Waiting: {'1 image is' if event.ahead == 1 else f'{event.ahead} images are'} ahead of yours.")


def progress(event: Progress, count: int) -> str:
    """Progress of a request of ``count`` images."""
    which = _which(event.growing, count)
    row = f": row {event.row} of {event.rows}" if event.growing else ""
    text = f"{which}{row}, {_duration(event.seconds_left)} left"
    return (
        f'<p>{escape(text)}</p><progress max="{count * event.rows}" value="{event.done}" '
        'aria-label="Progress of the images"></progress>'
    )


def growing(previews: Mapping[int, bytes], titles: Sequence[str], side: int) -> str:
    """Images that are being generated: a JPEG file of each, by index, and the titles of all images."""
    figures = [
        _figure(_data("jpeg", file), f"{titles[index]}, not finished", side, f"{titles[index]} · {index + 1}")
        for index, file in previews.items()
    ]
    return _grid(figures) if figures else ""


def finished(downloads: Sequence[Download]) -> str:
    """Finished images with their links."""
    return _grid([_finished_figure(each) for each in downloads]) if downloads else ""


def comparison(images: Sequence[tuple[Image.Image, str]]) -> str:
    """Images next to each other, with captions."""
    return _grid([_figure(_png(image), text, min(image.size), text) for image, text in images], "images wide")


def cut_image(image: Image.Image, text: str) -> str:
    """An uploaded image with its cut."""
    return f'<div class="cut">{_grid([_figure(_png(image), text, min(image.size), text)])}</div>'


def file_name(model: str, seed: int, index: int) -> str:
    """Name of a downloaded image."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', model)}_seed{seed}_{index:02d}.png"


def _finished_figure(image: Download) -> str:
    url, name, title = escape(image.url), escape(image.file), escape(image.title)
    link = f'<a href="{url}" download="{name}" aria-label="Download image {image.number}, {title}">Download</a>'
    size = ' class="small"' if image.side <= SMALL else ""
    return (
        f'<figure><img src="{url}" alt="{title}, image {image.number}"{size}>'
        f"<figcaption>{title} · {image.number} {link}</figcaption></figure>"
    )


def _figure(source: str, alternative: str, side: int, caption: str) -> str:
    size = ' class="small"' if side <= SMALL else ""
    return (
        f'<figure><img src="{source}" alt="{escape(alternative)}"{size}>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _which(images: Sequence[int], count: int) -> str:
    """The images that are being generated, for people: ``Images 1–4 of 16``."""
    if not images:
        return _images(count)
    first, last = images[0] + 1, images[-1] + 1
    if len(images) == 1:
        return f"Image {last} of {count}"
    return f"Images {first}–{last} of {count}" if last - first < len(images) else f"{len(images)} of {_images(count)}"


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _grid(figures: Sequence[str], kind: str = "images") -> str:
    return f'<div class="{kind}">{"".join(figures)}</div>'


def _png(image: Image.Image) -> str:
    return _data("png", to_png(image))


def _data(kind: str, file: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min"
