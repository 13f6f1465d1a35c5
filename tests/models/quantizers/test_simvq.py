"""SimVQ: the codebook is the product of frozen codes and a learned map."""

import torch

from llamagen.models.quantizers import SimVQ


def test_the_codebook_is_the_product_of_frozen_codes_and_the_linear_map() -> None:
    torch.manual_seed(0)
    quantizer = SimVQ(20, 4)
    torch.nn.init.normal_(quantizer.projection.weight)
    product = torch.stack([quantizer.projection.weight @ code for code in quantizer.frozen_codes])
    torch.testing.assert_close(quantizer.codebook(), product)
    entries = quantizer.lookup(torch.arange(20).view(1, 4, 5)).movedim(1, -1).reshape(20, 4)
    torch.testing.assert_close(entries, product)
    latent = torch.randn(2, 4, 3, 3, requires_grad=True)
    encoding = quantizer(latent)
    vectors = latent.detach().movedim(1, -1)
    nearest = (vectors[..., None, :] - product).square().sum(-1).argmin(-1)
    assert torch.equal(encoding.codes, nearest)
    torch.testing.assert_close(encoding.quantized.movedim(1, -1), product[nearest].detach(), rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_map_and_pass_straight_to_the_latent_but_not_to_the_frozen_codes() -> None:
    torch.manual_seed(0)
    quantizer = SimVQ(20, 4)
    latent = torch.randn(2, 4, 3, 3, requires_grad=True)
    upstream = torch.randn(2, 4, 3, 3)
    encoding = quantizer(latent)
    assert torch.equal(torch.autograd.grad(encoding.quantized, latent, upstream, retain_graph=True)[0], upstream)
    weight = quantizer.projection.weight
    (found,) = torch.autograd.grad(encoding.losses["codebook"], weight)
    chosen, target = quantizer.frozen_codes[encoding.codes], latent.detach().movedim(1, -1)
    (expected,) = torch.autograd.grad((chosen @ weight.T - target).square().mean(), weight)
    torch.testing.assert_close(found, expected)
    assert [name for name, _ in quantizer.named_parameters()] == ["projection.weight"]
    assert list(quantizer.state_dict()) == ["frozen_codes", "projection.weight"]
    assert tuple(encoding.losses) == quantizer.loss_names == ("codebook", "commitment")
