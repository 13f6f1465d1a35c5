"""Discriminators of the tokenizer's adversarial loss."""

from typing import cast

from torch import Tensor, nn


class PatchGAN(nn.Module):
    """Judge overlapping patches of a picture as real or fake (arXiv 1611.07004), with BatchNorm.

    Args:
        channels: width of the first convolution; it doubles with each further one, up to eight times.
        num_layers: convolutions of stride 2.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        if channels < 1 or num_layers < 1:
            raise ValueError(f"channels {channels} and num_layers {num_layers} must both be at least 1")
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for index in range(1, num_layers + 1):
            wider = channels * min(2**index, 8)
            layers += [
                nn.Conv2d(width, wider, 4, stride=2 if index < num_layers else 1, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))
        self.min_size = 2 ** (num_layers + 1) + 2**num_layers
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions normal(0, 0.02), norms normal(1, 0.02), biases of norms zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of patches, positive for real: (B, 3, H, W) in [-1, 1] → (B, 1, h, w).

        Raises:
            ValueError: if the picture is smaller than a patch.
        """
        if min(images.shape[2:]) < self.min_size:
            raise ValueError(
                f"the PatchGAN needs pictures of at least {self.min_size} px, not {tuple(images.shape[2:])}; "
                "use fewer layers or larger pictures"
            )
        return cast(Tensor, self.main(images))
