"""Published weights of fixed networks: found in a cache or downloaded, verified, and read without running code."""

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor
from torch.hub import download_url_to_file, get_dir

from llamagen.files import atomic_file
from llamagen.full_disk import DiskFullError
from llamagen.hub.download import is_remote, local_file
from llamagen.state_dicts import differences


@dataclass(frozen=True)
class PublishedWeights:
    """A file of weights that is published at an address.

    Attributes:
        network: name of the network for messages.
        name: name of the file, also in the cache.
        address: URL.
        sha256: SHA-256 of the file, or its first digits; empty if it is not known.
        options: options with which a user gives the path of the file, for messages.
        alternative: another remedy if the file is not available.
        other_names: other names of the same file in the cache.
    """

    network: str
    name: str
    address: str
    sha256: str
    options: str
    alternative: str = ""
    other_names: tuple[str, ...] = ()

    def fetch(self, path: Path | str | None = None) -> Path:
        """Find the file, or download it; its content is not read.

        Args:
            path: the file, or ``hf://owner/repository/file[@revision]``; None for the one in torch.hub's cache folder,
                which is downloaded if it is missing.

        Raises:
            ValueError: in one line, if the file does not exist or could not be downloaded.
            DiskFullError: in one line, if there is no room for the file.
        """
        if path is not None and is_remote(path):
            return local_file(path)
        if path is not None:
            if not Path(path).is_file():
                raise ValueError(
                    f"weights {path} is not a file; get {self.address} and give its path as {self.options}"
                )
            return Path(path)
        folder = Path(get_dir()) / "checkpoints"
        for name in (self.name, *self.other_names):
            if (folder / name).is_file():
                return folder / name
        try:
            with atomic_file(folder / self.name) as temporary:
                download_url_to_file(self.address, str(temporary), hash_prefix=self.sha256)
        except DiskFullError:
            raise
        except (OSError, RuntimeError, HTTPException) as error:
            raise ValueError(
                f"{self.name}, the weights of {self.network}, is not in {folder} and could not be downloaded from "
                f"{self.address} ({error}); put it there, or give its path as {self.options}{self.alternative}"
            ) from None  # the traceback inside urllib is long and adds nothing
        return folder / self.name

    def read(
        self,
        file: Path,
        shapes: Mapping[str, torch.Size] | Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
        ignored_prefix: str = "",
        ignored_suffix: str = "",
    ) -> dict[str, Tensor]:
        """Read the weights from a ``.pth`` or ``.safetensors`` file.

        Args:
            file: the file, as returned by :meth:`fetch`.
            shapes: names and shapes of the weights, or a function from the file's weights to those of a network that
                fits them.
            ignored_prefix: entries whose names start with it are left out.
            ignored_suffix: entries whose names end with it are left out.

        Returns:
            The weights by name, float32, on the CPU.

        Raises:
            ValueError: in one line, if the file is damaged or holds other weights.
        """
        try:
            loaded = {
                name: tensor.float()
                for name, tensor in _load(file).items()
                if not (ignored_prefix and name.startswith(ignored_prefix))
                and not (ignored_suffix and name.endswith(ignored_suffix))
            }
        except Exception as error:  # a damaged file can raise anything
            raise ValueError(
                f"{file} cannot be read as {self.network} ({type(error).__name__}); get {self.address}"
            ) from error
        if callable(shapes):
            expected = shapes(loaded)
        else:
            expected = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        if faults := differences(loaded, expected):
            raise ValueError(f"{file} is not {self.network}: {faults}; get {self.address}")
        return loaded


def _load(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file  # imported here because few runs need it

        return load_file(file)
    # Only the zip format can be mapped into memory; torchvision's VGG16 is in the older format.
    content: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    return content
