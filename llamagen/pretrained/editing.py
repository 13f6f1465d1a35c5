"""Images of which a part is given and the rest is generated.

Shapes: N images of S × S pixels, h × w codes of an image, h = w, L = h · w.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.models.inputs import CodeInput, grids_of_codes
from llamagen.option_checks import check_integer
from llamagen.pretrained.codec import ImageCodec
from llamagen.pretrained.conditions import ClassOrPrompt, as_list, is_one
from llamagen.pretrained.images import ImageLike, is_single
from llamagen.pretrained.inpainting import MaskLike, is_one_mask, known_codes, masks_of_codes, matched, pixels_of_images
from llamagen.sampling import SamplingConfig

OnRow = Callable[[Tensor, int, int], None]
OnImages = Callable[[list[Image.Image], int], None]


class ImageEditing(ImageCodec):
    """Completion and inpainting, for models that generate codes.

    Attributes:
        gpt: the autoregressive model; None for a tokenizer alone.
        name: name of the model.
    """

    gpt: GPT | None
    name: str

    @abstractmethod
    def generate_codes(self, conditions: ClassOrPrompt | Sequence[ClassOrPrompt], **options: Any) -> Tensor:
        """See :meth:`~llamagen.pretrained.model.LlamaGen.generate_codes`."""

    @abstractmethod
    def settings(self, **settings: Any) -> SamplingConfig:
        """See :meth:`~llamagen.pretrained.model.LlamaGen.settings`."""

    @abstractmethod
    def _images(self, *call: Any, on_images: OnImages | None) -> list[Image.Image]:
        """Images of a call."""

    def complete(
        self,
        image: ImageLike | Sequence[ImageLike],
        keep_rows: int,
        condition: ClassOrPrompt | Sequence[ClassOrPrompt],
        *,
        images_per_prompt: int = 1,
        seed: int = 0,
        progress: bool = True,
        on_row: OnRow | None = None,
        on_images: OnImages | None = None,
        **settings: Any,
    ) -> Any:
        """Keep the upper rows of an image, and generate the rest.

        Args:
            image: image of any size, cropped to its centre and resized to S × S; or several.
            keep_rows: rows of codes to keep, 0 to h; a row is as high as ``tokenizer.config.downsampling`` pixels. With
                0 this is :meth:`generate`, with h :meth:`reconstruct`.
            condition: class or prompt; or one for each image.
            images_per_prompt: completions of each image, in the order of :meth:`generate`.
            seed: see :meth:`generate`.
            progress: see :meth:`generate`.
            on_row: see :meth:`generate`.
            on_images: see :meth:`generate`.
            settings: see :meth:`generate`.

        Returns:
            The image for one image and one completion, otherwise a list of images.

        Raises:
            ValueError: in one line, if an argument is invalid.
        """
        gpt = self._require_gpt()
        check_integer("keep_rows", keep_rows, 0, gpt.config.grid_size)
        conditions = as_list(condition)
        single = is_single(image) and images_per_prompt == 1 and is_one(condition)
        kept = self._whole_grids(self.encode(image))[:, :keep_rows]
        if is_one(condition):
            conditions *= len(kept)
        call = conditions, images_per_prompt, seed, progress, on_row, settings, kept
        images = self._images(*call, on_images=on_images)
        return images[0] if single else images

    def inpaint(
        self,
        image: ImageLike | Sequence[ImageLike],
        mask: MaskLike | Sequence[MaskLike],
        condition: ClassOrPrompt | Sequence[ClassOrPrompt],
        *,
        images_per_prompt: int = 1,
        seed: int = 0,
        progress: bool = True,
        **settings: Any,
    ) -> Any:
        """Generate the masked part of an image again, with the rest of it in view.

        A code is generated again if its cell of the grid has a masked pixel; the other codes are kept exactly. Pixels
        outside of the mask are those of :meth:`reconstruct`, except near the mask, where the tokenizer's decoder sees
        the new codes. They are not blended with the given image.

        Args:
            image: image of any size, cropped to its centre and resized to S × S; or several.
            mask: what to generate again, white or True: an image, a file, or an array (H, W) of bool or uint8 of the
                image's size before it is cropped; or an array (h, w) of bool that names codes. One for each image or
                for all. With nothing masked this is :meth:`reconstruct`, with all :meth:`generate` in raster order.
            condition: class or prompt; or one for each image.
            images_per_prompt: results for each image, in the order of :meth:`generate`.
            seed: see :meth:`generate`.
            progress: see :meth:`generate`.
            settings: see :meth:`generate`.

        Returns:
            The image for one image and one result, otherwise a list of images.

        Raises:
            ValueError: in one line, if an argument is invalid, or the model was not trained in random orders.
        """
        gpt = self._require_any_order()
        self.settings(**settings)  # before the images are encoded
        pixels = pixels_of_images(image)
        masks = masks_of_codes(mask, pixels, self.resolution or 0, gpt.config.grid_size)
        codes, options = self._whole_grids(self.encode(pixels)), {"images_per_prompt": images_per_prompt, "seed": seed}
        images = self.decode(self.inpaint_codes(codes, masks, condition, progress=progress, **options, **settings))
        single = is_single(image) and is_one_mask(mask) and images_per_prompt == 1 and is_one(condition)
        return images[0] if single else images

    def inpaint_codes(
        self,
        codes: CodeInput,
        mask: Any,
        condition: ClassOrPrompt | Sequence[ClassOrPrompt],
        *,
        images_per_prompt: int = 1,
        seed: int = 0,
        progress: bool = True,
        **settings: Any,
    ) -> Tensor:
        """Like :meth:`inpaint`, from codes and to codes, (N, h, w) int64.

        The known codes come first and then the missing ones, each in raster order. Settings and random numbers count
        from the first known code. Images with equally many known codes are sampled together.

        Args:
            codes: (h, w) or (n, h, w), codes of the images.
            mask: (h, w) or (n, h, w) bool, True for codes that are generated again.
            condition: see :meth:`inpaint`.
            images_per_prompt: see :meth:`generate`.
            seed: see :meth:`generate`.
            progress: see :meth:`generate`; a bar for each number of known codes.
            settings: see :meth:`generate`.
        """
        gpt, conditions = self._require_any_order(), as_list(condition)
        self.settings(**settings)  # not options of generate_codes, such as order
        check_integer("images_per_prompt", images_per_prompt)
        given = grids_of_codes(codes, gpt.config.vocab_size, self.device)
        given, masks, conditions = matched(self._whole_grids(given), mask, conditions)
        count = len(given)
        found = given.repeat(images_per_prompt, 1, 1)
        for part in known_codes(given, masks):
            numbers = [turn * count + row for turn in range(images_per_prompt) for row in part.rows]
            found[numbers] = self.generate_codes(
                [conditions[row] for row in part.rows],
                kept=part.kept,
                order=part.order,
                images_per_prompt=images_per_prompt,
                seed=seed,
                indices=numbers,
                progress=progress,
                **settings,
            )
        return found

    def _whole_grids(self, codes: Tensor) -> Tensor:
        """Codes of images, which may come from tensors of another size, checked to be (n, h, w) of the model."""
        grid = self._require_gpt().config.grid_size
        if codes.shape[1:] != (grid, grid):
            raise ValueError(
                f"the image has {codes.shape[1]} × {codes.shape[2]} codes, but the model's have {grid} × {grid}; give "
                f"a tensor of {self.resolution} × {self.resolution} pixels, or a Pillow image"
            )
        return codes

    def _require_any_order(self) -> GPT:
        gpt = self._require_gpt()
        if not gpt.config.target_aware:
            raise ValueError(
                f"{self.name} generates in raster order only, so it can complete but not inpaint; use a model that was "
                "trained in random orders (model.order: see docs/recipes.md)"
            )
        return gpt

    def _require_gpt(self) -> GPT:
        if self.gpt is None:
            raise ValueError(
                f"{self.name} is a tokenizer, which encodes and decodes images; to generate, load an autoregressive "
                "model, such as c2i_B_256"
            )
        return self.gpt
