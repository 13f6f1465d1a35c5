"""The controls of a request: what to generate, and the settings of sampling."""

from typing import Any

import gradio as gr

from serving.engine.facts import ModelFacts
from serving.page.generation import MAX_IMAGES, GenerationRequest
from serving.page.image_settings import (
    MAX_SEED,
    Kind,
    check_request,
    check_sampling,
    read_settings,
    slider_range,
)

SCHEDULES = [
    ("constant", "constant"),
    ("linear: rises with the codes", "linear"),
    ("cosine: rises slowly at both ends", "cosine"),
    ("power cosine: rises late", "power_cosine"),
]
NEW_SEED = f"() => Math.floor(Math.random() * {MAX_SEED + 1})"
TITLES = {
    "guidance_scale": ("Guidance scale", "How strongly the image follows the {condition}. 1 is off and twice as fast."),
    "temperature": ("Temperature", "Lower is more typical, higher more varied. 0 always takes the most likely code."),
    "top_p": ("Top-p", "Keep the most likely codes up to this total probability. 1 keeps all."),
    "guidance_power": ("Guidance power", "Exponent of the schedule “power cosine”."),
}
STEPS = {"guidance_scale": 0.05, "temperature": 0.05, "top_p": 0.01, "guidance_power": 0.5}
FINER_STEPS = (0.01, 0.001, 1e-4, 1e-5, 1e-6)
ADVANCED = ("guidance_start", "guidance_steps", "guidance_power")
SETTINGS = ("guidance_scale", "guidance_schedule", "top_k", "top_p", "temperature", *ADVANCED)


class Form:
    """Controls of one tab. Its components are the inputs of handlers.

    Args:
        facts: an autoregressive model.
        kind: what the tab does.

    Attributes:
        components: all inputs, in the order of the arguments of :meth:`request`.
        back: the button that puts the settings of a file back.
    """

    back: gr.UploadButton

    def __init__(self, facts: ModelFacts, kind: Kind) -> None:
        self._facts, self._kind = facts, kind
        self._what = "class" if facts.kind == "class" else "prompt"
        assert facts.grid is not None
        self._codes = facts.grid**2  # of an image
        self.components: list[Any] = []

    def build_request(self) -> None:
        """Build the controls of what to generate, in the current column."""
        self.components.append(self._condition_control())
        label, info = f"Images of each {self._what}", f"At most {MAX_IMAGES} in total."
        self.components.append(gr.Slider(1, MAX_IMAGES, value=4, step=1, label=label, info=info))
        with gr.Row(elem_classes="seed"):
            seed = gr.Number(0, label="Seed", info="The same seed gives the same images.", precision=0, scale=3)
            new_seed = gr.Button("New seed", scale=1, min_width=100)
        new_seed.click(None, None, seed, js=NEW_SEED, api_visibility="private")
        self.components.append(seed)

    def build_settings(self) -> None:
        """Build the controls of sampling, in the current column; after :meth:`build_request`."""
        self.components += [self._control(name) for name in SETTINGS if name not in ADVANCED]
        with gr.Accordion("More about guidance", open=False):
            self.components += [self._control(name) for name in ADVANCED]
        self.back = gr.UploadButton("Same settings as a downloaded image", file_types=[".png"], size="md")

    def request(self, *values: Any) -> GenerationRequest:
        """Check the values of :attr:`components`.

        Raises:
            ValueError: in one line, if one is missing or out of range.
        """
        given, images, seed, *others = values
        settings = dict(zip(SETTINGS, others, strict=True))
        for name in ("top_k", "guidance_start"):
            settings[name] = _integer(settings[name] or 0)
        steps = _integer(settings["guidance_steps"])
        guided_to_the_end = steps is None or (isinstance(steps, int) and steps >= self._codes)
        settings["guidance_steps"] = None if guided_to_the_end else steps
        conditions = given or []
        if isinstance(conditions, str):
            conditions = [line.strip() for line in conditions.splitlines() if line.strip()]  # one prompt per line
        images, seed = _integer(images), _integer(seed)
        check_request(self._facts, conditions, images, seed)
        check_sampling(self._facts, settings)
        return GenerationRequest(tuple(conditions), images, seed, settings)

    def put_back(self, file: str) -> tuple[list[Any], int]:
        """Values of :attr:`components` from the settings in a file, and the number of kept rows.

        Raises:
            ValueError: in one line, if the file has no valid settings of this model.
        """
        read = read_settings(file, self._facts, self._kind)
        conditions: Any = list(read.conditions)
        if self._facts.kind == "text":
            conditions = "\n".join(map(str, conditions))
        settings = {
            **read.settings,
            "guidance_steps": self._first_code_without_guidance(read.settings["guidance_steps"]),
        }
        return [
            conditions,
            read.images_per_prompt,
            read.seed,
            *(settings[name] for name in SETTINGS),
        ], read.keep_rows

    def _first_code_without_guidance(self, steps: int | None) -> int:
        """Value of the field for a setting, which is None if all codes are guided.

        Footgun: Gradio turns an empty number field in a closed accordion into 0 when the accordion is opened, which
        would turn guidance off. The field is therefore never empty.
        """
        return self._codes if steps is None else min(steps, self._codes)

    def title(self, condition: int | str) -> str:
        """Class or prompt, for people."""
        return condition if isinstance(condition, str) else class_title(condition, self._facts.class_names[condition])

    def _condition_control(self) -> Any:
        if self._facts.kind == "text":
            return gr.Textbox(
                label="Prompts", info="One prompt per line.", lines=3, max_lines=8, placeholder="a red fox in the snow"
            )
        return gr.Dropdown(
            [(class_title(number, name), number) for number, name in enumerate(self._facts.classes)],
            label="Classes",
            info="Type a name or a number, then choose one or several.",
            multiselect=True,
            max_choices=MAX_IMAGES,
        )

    def _control(self, name: str) -> Any:
        own = self._facts.sampling[name]
        if name == "guidance_schedule":
            return gr.Dropdown(
                SCHEDULES, value=own, label="Guidance schedule", info="Guidance over the codes of an image."
            )
        if name == "top_k":
            high = max(self._facts.codebook_size, own)
            return gr.Slider(
                0, high, value=own, step=1, label="Top-k", info="Keep this many of the most likely codes. 0 keeps all."
            )
        if name in ("guidance_start", "guidance_steps"):
            starts = name == "guidance_start"
            return gr.Number(
                own if starts else self._first_code_without_guidance(own),
                precision=0,
                label="First guided code" if starts else "First code without guidance",
                info=f"0 to {self._codes}." if starts else f"{self._codes} guides all codes to the end.",
            )
        low, high = slider_range(self._facts, name)
        label, info = TITLES[name]
        return gr.Slider(
            low,
            high,
            value=own,
            step=_step(low, high, own, STEPS[name]),
            label=label,
            info=info.format(condition=self._what),
        )


def class_title(number: int, name: str) -> str:
    """Number and name of a class; the number alone if that is its name."""
    return name if name == str(number) else f"{number} {name}"


def all_settings(facts: ModelFacts, request: GenerationRequest) -> dict[str, Any]:
    """All settings of sampling of a request, as they are stored in images."""
    return facts.settings(request.settings).image_settings()


def _integer(value: Any) -> Any:
    """Sliders and number fields give whole numbers as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _step(low: float, high: float, value: float, step: float) -> float:
    """The step of a slider; a finer one if the model's own value, or the end of the range, cannot be reached with it.

    Browsers count steps from ``low``, and round other values.
    """
    for each in (step, *FINER_STEPS):
        counts = [(reached - low) / each for reached in (value, high)]
        if all(abs(count - round(count)) < 1e-6 for count in counts):
            return each
    return FINER_STEPS[-1]
