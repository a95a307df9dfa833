"""Networks as a run builds them: shapes, sizes, normalisation inside, impossible ones refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mnist_lit import ConvNet

ARCHITECTURES: list[dict[str, Any]] = [
    {},
    {"channels": [4, 8], "kernel_size": 31},
    {"channels": [4, 8], "convs_per_stage": 3, "residual": True, "pool_at_end": True},
    {"channels": [4, 8, 8], "convs_per_stage": 2, "unpadded_stages": 1, "kernel_size": 5},
    {"channels": [4, 8], "pooling": "avg", "activation": "gelu"},
    {"channels": [4] * 6, "pooling": "none", "activation": "silu"},
    {"channels": [4, 8], "global_pool": "max", "hidden": [16]},
    {"channels": [4, 8], "norm": "layer", "hidden": [16], "activation": "leaky_relu"},
    {"channels": [4, 8], "norm": "none", "hidden": [16, 12], "dropout": 1.0},
    {"channels": [], "hidden": [32, 16], "norm": "layer", "global_pool": "avg"},
    {"channels": [], "hidden": [1], "image_size": 1},
    {"channels": [4, 8], "image_size": 33},
]


def network(**architecture: Any) -> Any:
    return ConvNet(**architecture).network.eval()


@pytest.fixture
def pixels() -> Tensor:
    return torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_each_architecture_turns_images_into_finite_logits_and_finite_gradients(architecture: dict[str, Any]) -> None:
    model = ConvNet(**architecture)
    size = architecture.get("image_size", 28)
    logits = model(torch.rand(5, 1, size, size))
    assert logits.shape == (5, 10)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("architecture", [{"channels": []}, {"channels": [4]}, {"channels": [4], "global_pool": "avg"}])
def test_dropout_never_drops_a_pixel(architecture: dict[str, Any], pixels: Tensor) -> None:
    model = ConvNet(hidden=[16], dropout=0.9, norm="none", **architecture)
    reached: list[Tensor] = []
    modules = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    modules[0].register_forward_pre_hook(lambda _module, inputs: reached.append(inputs[0].reshape(pixels.shape)))
    model(pixels)
    assert torch.equal(reached[0], pixels)


def test_residual_stages_add_the_input_of_their_later_convolutions(pixels: Tensor) -> None:
    plain, residual = (network(channels=[4], convs_per_stage=3, residual=flag) for flag in (False, True))
    residual.load_state_dict(dict(zip(residual.state_dict(), plain.state_dict().values(), strict=True)))
    maps = plain.stages[:4](pixels)
    assert residual.stages(pixels).allclose(maps + plain.stages[4:](maps), atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ({}, [28, 14, 14, 7, 7, 3]),
        ({"unpadded_stages": 2, "pool_at_end": True}, [28, 26, 12, 10, 4, 4]),
        ({"pooling": "none", "kernel_size": 4}, [28] * 6),
    ],
    ids=str,
)
def test_maps_of_the_convolutions_have_the_documented_sizes(
    architecture: dict[str, Any], sizes: list[int], pixels: Tensor
) -> None:
    model = ConvNet(channels=[2, 3, 4], convs_per_stage=2, **architecture)
    seen: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, inputs, _maps: seen.append(inputs[0].shape[-1]))
    assert model(pixels).shape == (len(pixels), 10)
    assert seen == sizes


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ({"channels": [], "hidden": []}, ["model.channels", "model.hidden"]),
        ({"channels": [2], "convs_per_stage": 2, "residual": True, "unpadded_stages": 1}, ["model.unpadded_stages 0"]),
        ({"channels": [8] * 9}, ["model.channels", "28x28"]),
        ({"channels": [8] * 3, "unpadded_stages": 3, "kernel_size": 5}, ["model.unpadded_stages"]),
    ],
    ids=str,
)
def test_impossible_networks_are_refused_with_the_way_out(architecture: dict[str, Any], keys: list[str]) -> None:
    with pytest.raises(ValueError, match="model") as refusal:
        ConvNet(**architecture)
    assert all(key in str(refusal.value) for key in keys)


def test_normalisation_is_part_of_the_network(pixels: Tensor) -> None:
    plain, normalising = network(channels=[4]), network(channels=[4])
    normalising.load_state_dict({**plain.state_dict(), "mean": torch.tensor(0.25), "std": torch.tensor(0.5)})
    torch.testing.assert_close(normalising(pixels), plain((pixels - 0.25) / 0.5))
