"""The backend of a page that has the model in its own process."""

from llamagen.sampling.config import Window
from serving.engine.dispatcher import Dispatcher
from serving.engine.embedded import load_engine
from serving.engine.spec import WorkerSpec, default_batch_size, default_window
from serving.page.generation import MAX_IMAGES

MAX_WAITING = 32 * MAX_IMAGES
"""Maximum number of images that wait."""


def local_backend(
    source: str,
    tokenizer: str | None = None,
    text_encoder: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    window: Window | None = None,
) -> Dispatcher:
    """Load a model into a thread of this process, compile it, and allocate memory: the first click does not wait.

    Args:
        source: see ``LlamaGen.from_pretrained``, as the following ones.
        tokenizer: file or published name; None for the model's.
        text_encoder: name or folder of the T5; None for the model's.
        device: None for a GPU if there is one.
        dtype: None for the model's.
        batch_size: images that are generated at a time; None for the default of the device.
        window: see ``SamplingConfig.window``; None for the default of the device.

    Raises:
        ValueError: in one line, if the model cannot be loaded.
    """
    import torch

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    count = batch_size or default_batch_size(place)
    spec = WorkerSpec(source, tokenizer, text_encoder, device, dtype, count, window=window or default_window(place))
    return Dispatcher(lambda: load_engine(spec), queue=MAX_WAITING)
