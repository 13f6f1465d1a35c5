"""Threads that write images while the next ones are sampled. H × W pixels."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore

import numpy as np
from PIL import Image

from llamagen.grids import save_png

THREADS = 4
WAITING = 512


class ImageThreads:
    """A few threads that write PNG files, each complete or absent. They run in parallel: compression releases the GIL.

    Args:
        threads: number of threads.
        waiting: maximum number of images that wait for a thread. If more are queued, :meth:`write` blocks, so that
            memory is bounded.
    """

    def __init__(self, threads: int = THREADS, waiting: int = WAITING) -> None:
        self._pool = ThreadPoolExecutor(threads, "images")
        self._slots = Semaphore(threads + waiting)
        self._error: BaseException | None = None

    def write(self, image: Callable[[], np.ndarray], path: Path, text: Mapping[str, str] | None = None) -> None:
        """Queue an image for writing.

        Args:
            image: returns (H, W, 3) uint8; called in a thread, where it may wait for a device.
            path: the file; its folder is created if it does not exist.
            text: text chunks of the PNG by keyword.

        Raises:
            BaseException: the first error of a thread.
        """
        self._check()
        self._slots.acquire()
        self._pool.submit(self._save, image, path, text)

    def _save(self, image: Callable[[], np.ndarray], path: Path, text: Mapping[str, str] | None) -> None:
        try:
            if self._error is None:
                save_png(Image.fromarray(image()), path, text)
        except BaseException as error:  # raised by the next call of this object
            self._error = self._error or error
        finally:
            self._slots.release()

    def finish(self) -> None:
        """Wait until all images are written, then end the threads.

        Raises:
            BaseException: the first error of a thread.
        """
        self._pool.shutdown()
        self._check()

    def cancel(self) -> None:
        """Discard the images that wait, and end the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
