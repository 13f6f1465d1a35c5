"""The page: tabs, and what happens when buttons are pressed."""

from collections.abc import Iterator
from dataclasses import replace
from math import isinf
from typing import Any

import gradio as gr
from PIL import Image

from serving.engine.facts import ModelFacts
from serving.page import markup
from serving.page.form import Form
from serving.page.generation import GenerationRequest, Waiting
from serving.page.reconstruction import AMPLIFICATION, Reconstruction
from serving.page.runs import Runs, Update, sentence
from serving.page.uploads import mark_cut, painted_codes, read_upload, to_canvas, to_png

HIDDEN = {"show_progress": "hidden", "api_visibility": "private"}
"""Options of all events. The page shows its own progress, and is not an API."""
QUICK = {**HIDDEN, "queue": False}
"""Options of events that do not wait for the model."""
DELETE_UPLOADS = (3600, 3600)
"""Seconds between two deletions of uploads, and their minimum age. All are deleted when the server ends."""


def build_page(runs: Runs) -> gr.Blocks:
    """Build the page of a model.

    Args:
        runs: runs of the model.
    """
    facts = runs.facts
    with gr.Blocks(
        title=f"{facts.name} · LlamaGen", analytics_enabled=False, fill_width=True, delete_cache=DELETE_UPLOADS
    ) as page:
        gr.Markdown(f"# {_plain(facts.name)}\n{_plain(_description(facts))}")
        with gr.Tabs():
            if facts.kind != "tokenizer":
                with gr.Tab("Generate", id="generate"):
                    _generate_tab(runs)
                with gr.Tab("Complete", id="complete"):
                    _complete_tab(runs)
            if facts.can_inpaint:
                with gr.Tab("Inpaint", id="inpaint"):
                    _inpaint_tab(runs)
            with gr.Tab("Reconstruct", id="reconstruct"):
                _reconstruct_tab(runs)

        def left(request: gr.Request) -> None:
            runs.stop_all(_session(request))

        page.unload(left)
    page.queue(max_size=None, default_concurrency_limit=None)  # the backend has the queue that matters
    return page


class _Results:
    """Buttons and results of a tab.

    Args:
        runs: runs of the model.
        tab: name of the tab.
        button: text of the button that starts.
    """

    def __init__(self, runs: Runs, tab: str, button: str) -> None:
        self._runs, self._tab = runs, tab
        with gr.Row(elem_classes="buttons"):
            self.start = gr.Button(button, variant="primary", elem_id=f"{tab}-start", min_width=120)
            self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id=f"{tab}-stop", min_width=120)
        self.status = gr.HTML(elem_id=f"{tab}-status", elem_classes="status")
        self.finished = gr.HTML(elem_id=f"{tab}-finished")
        self.growing = gr.HTML(elem_id=f"{tab}-growing")
        self.components = [self.status, self.finished, self.growing, self.stop]
        self.stop.click(self._stop, None, None, **QUICK)

    def _stop(self, request: gr.Request) -> None:
        self._runs.stop(_session(request), self._tab)

    def updates(self, session: str, form: Form, request: GenerationRequest) -> Iterator[list[Any]]:
        """Run a request, and give the new values of :attr:`components`."""
        for update in self._runs.run(session, self._tab, form, request):
            yield self.values(update)

    def values(self, update: Update) -> list[Any]:
        """New values of :attr:`components`."""
        contents = [gr.skip() if each is None else each for each in update[:3]]
        return [*contents, gr.skip() if update.running is None else gr.Button(interactive=update.running)]

    def error(self, error: Exception) -> list[Any]:
        """Values that show an error, and no images."""
        return self.values(Update(markup.error_message(sentence(error)), "", "", False))


def _generate_tab(runs: Runs) -> None:
    form = Form(runs.facts, "generation")
    with gr.Row(elem_classes="split"):
        with gr.Column(elem_classes="request"):
            form.build_request()
        with gr.Column(elem_classes="results"):
            results = _Results(runs, "generate", "Generate")
        with gr.Column(elem_classes="settings"):
            form.build_settings()

    def generate(request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        try:
            wanted = form.request(*values)
        except Exception as error:
            yield results.error(error)
            return
        yield from results.updates(_session(request), form, wanted)

    def put_back(file: str) -> list[Any]:
        return _put_back(form, file, "The settings of the image are in the form. Generate to see it again.")

    results.start.click(generate, form.components, results.components, **HIDDEN)
    form.back.upload(put_back, form.back, [*form.components, results.status], **QUICK)


def _put_back(form: Form, file: str, note: str, with_rows: bool = False) -> list[Any]:
    """New values of the form's components, if wanted of the rows to keep, and of the status."""
    try:
        values, kept = form.put_back(file)
    except Exception as error:
        return [*[gr.skip()] * (len(form.components) + with_rows), markup.error_message(sentence(error))]
    return [*values, *[kept] * with_rows, markup.message(note)]


def _complete_tab(runs: Runs) -> None:
    facts = runs.facts
    assert facts.grid is not None
    rows, factor = facts.grid, facts.downsampling
    form = Form(facts, "completion")
    with gr.Row(elem_classes="split"):
        with gr.Column(elem_classes="request"):
            upload = _upload("Image to complete")
            keep = gr.Slider(
                0,
                rows,
                value=rows // 2,
                step=1,
                label="Rows to keep",
                info=f"Rows of codes from the top; each is {factor} pixels high.",
            )
            cut = gr.HTML(elem_id="complete-cut", elem_classes="status")
            form.build_request()
        with gr.Column(elem_classes="results"):
            results = _Results(runs, "complete", "Complete")
        with gr.Column(elem_classes="settings"):
            form.build_settings()

    def show_cut(path: str | None, kept: float) -> str:
        # Errors are shown here, too: the status may hold the progress of a run, or a message about settings.
        if path is None:
            return ""
        try:
            image = read_upload(path, facts)
            return markup.cut_image(mark_cut(image, int(kept), factor), f"{int(kept)} of {rows} rows are kept")
        except Exception as error:
            return markup.error_message(sentence(error))

    def complete(request: gr.Request, path: str | None, kept: float, *values: Any) -> Iterator[list[Any]]:
        try:
            image = to_png(read_upload(path, facts))
            wanted = replace(form.request(*values), image=image, keep_rows=int(kept))
        except Exception as error:
            yield results.error(error)
            return
        yield from results.updates(_session(request), form, wanted)

    def put_back(file: str) -> list[Any]:
        note = "The settings of the image are in the form. Choose the same image to complete it in the same way."
        return _put_back(form, file, note, with_rows=True)

    gr.on([upload.change, keep.change], show_cut, [upload, keep], cut, **QUICK)
    results.start.click(complete, [upload, keep, *form.components], results.components, **HIDDEN)
    form.back.upload(put_back, form.back, [*form.components, keep, results.status], **QUICK)


def _inpaint_tab(runs: Runs) -> None:
    facts = runs.facts
    form = Form(facts, "inpainting")
    with gr.Row(elem_classes="split"):
        with gr.Column(elem_classes="request"):
            upload = _upload("Image to inpaint")
            editor = gr.ImageEditor(
                type="pil",
                label="Paint over what to generate again",
                sources=(),
                transforms=(),
                layers=False,
                buttons=[],
                format="png",
                brush=gr.Brush(colors=["#dc2626"], color_mode="fixed"),
                visible=False,
                elem_id="inpaint-editor",
            )
            note = gr.HTML(elem_id="inpaint-note", elem_classes="status")
            form.build_request()
        with gr.Column(elem_classes="results"):
            results = _Results(runs, "inpaint", "Inpaint")
        with gr.Column(elem_classes="settings"):
            form.build_settings()

    def show_editor(path: str | None) -> list[Any]:
        if path is None:
            return [gr.ImageEditor(None, visible=False), ""]
        try:
            canvas = to_canvas(read_upload(path, facts))
        except Exception as error:
            return [gr.ImageEditor(None, visible=False), markup.error_message(sentence(error))]
        size = facts.downsampling
        text = f"Squares of {size} × {size} pixels of the image that you touch are generated again."
        value = {"background": canvas, "layers": [], "composite": canvas}
        return [gr.ImageEditor(value, visible=True), markup.message(text)]

    def inpaint(request: gr.Request, path: str | None, painted: Any, *values: Any) -> Iterator[list[Any]]:
        try:
            image = to_png(read_upload(path, facts))
            wanted = replace(form.request(*values), image=image, mask=painted_codes(painted, facts))
        except Exception as error:
            yield results.error(error)
            return
        yield from results.updates(_session(request), form, wanted)

    def put_back(file: str) -> list[Any]:
        note = "The settings of the image are in the form. Choose the same image and paint over the same part."
        return _put_back(form, file, note)

    upload.change(show_editor, upload, [editor, note], **QUICK)
    results.start.click(inpaint, [upload, editor, *form.components], results.components, **HIDDEN)
    form.back.upload(put_back, form.back, [*form.components, results.status], **QUICK)


def _reconstruct_tab(runs: Runs) -> None:
    facts = runs.facts
    with gr.Row(elem_classes="split"):
        with gr.Column(elem_classes="request"):
            upload = _upload("Image to reconstruct")
            start = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct-start")
            status = gr.HTML(elem_id="reconstruct-status", elem_classes="status")
        with gr.Column(elem_classes="results"):
            results = gr.HTML(elem_id="reconstruct-results")

    def run(request: gr.Request, path: str | None) -> Iterator[list[str]]:
        yield [markup.message("Reconstructing."), ""]
        try:
            image = read_upload(path, facts)
            for found in runs.reconstruct(_session(request), "reconstruct", image):
                yield [markup.waiting(found), ""] if isinstance(found, Waiting) else shown(image, found)
        except Exception as error:
            yield [markup.error_message(sentence(error)), ""]

    def shown(image: Image.Image, found: Reconstruction) -> list[str]:
        height, width = found.codes.shape
        used, size = len(set(found.codes.flatten().tolist())), facts.codebook_size
        psnr = "no difference" if isinf(found.psnr) else f"PSNR {found.psnr:.2f} dB"
        return [
            markup.message(f"{image.width} × {image.height} pixels, {width * height} codes: {psnr}."),
            markup.comparison(
                [
                    (image, "Original, cropped" if facts.resolution else "Original"),
                    (found.reconstruction, f"Reconstruction, {psnr}"),
                    (found.difference, f"Difference × {AMPLIFICATION}"),
                    (found.codes_image, f"Codes: {width} × {height}, {used} different of {size:,}"),
                ]
            ),
        ]

    start.click(run, upload, [status, results], **HIDDEN)


def _upload(label: str) -> gr.File:
    # gr.Image would decode the file itself, and show a traceback's text for one that is not an image.
    return gr.File(label=label, file_types=["image"], type="filepath", height=120)


def _description(facts: ModelFacts) -> str:
    if facts.kind == "tokenizer":
        return f"Image tokenizer with {facts.codebook_size:,} codes, on {facts.device}."
    count = facts.parameters
    model = "a model" if count is None else f"a model of {_count(count)} parameters"
    condition = "classes" if facts.kind == "class" else "prompts"
    return (
        f"Images of {condition}, {facts.resolution} × {facts.resolution} pixels, from {model} on "
        f"{facts.device} ({facts.dtype})."
    )


def _count(number: int) -> str:
    return f"{number / 1e6:.0f} million" if number >= 1e6 else f"{number:,}"


def _plain(text: str) -> str:
    """Text without Markdown."""
    return "".join(f"\\{each}" if each in "\\`*_{}[]()#+-!|<>~$" else each for each in text)


def _session(request: gr.Request) -> str:
    return str(request.session_hash)
