"""Values that configuration files compute: ``${num_classes_of:FOLDER}``."""

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules import CodeDataModule
from datamodules.storage.shards import read_meta


def register_interpolations() -> None:
    """Make this file's functions known to configuration files, by their names."""
    OmegaConf.register_resolver("num_classes_of", num_classes_of, replace=True)


def num_classes_of(root: str | None) -> int:
    """Number of classes of the images whose codes are in a folder.

    Args:
        root: folder or address that ``predict`` of a tokenizer wrote to.

    Raises:
        ValueError: in one line, if there is no folder, it holds no codes, or the codes have no classes.
    """
    if root is None:
        raise ValueError("data.init_args.root is null; give --data.init_args.root FOLDER, the codes of your images")
    count = read_meta(str(root), CodeDataModule.hint).get("num_classes")
    if not isinstance(count, int) or count < 1:
        raise ValueError(
            f"the codes in {root} have no classes, but num_classes is to be their number; extract codes of images in "
            "class folders, or set model.init_args.net.num_classes"
        )
    return count


def reason_of(error: OmegaConfBaseException) -> str:
    """The reason of an error of an interpolation in one line: that of the function that raised it, if one did."""
    reason: BaseException | None = error
    while isinstance(reason, OmegaConfBaseException):
        reason = reason.__cause__ or reason.__context__
    return str(reason if isinstance(reason, ValueError) else error).splitlines()[0]
