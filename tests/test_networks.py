"""The networks as a run builds them: shapes, sizes, normalisation inside, refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mnist_lit import ConvNet
from mnist_lit.model.networks import map_sizes

Fails = Callable[..., str]

ARCHITECTURES: list[dict[str, Any]] = [
    {},
    {"channels": [8]},
    {"channels": [2, 2, 2, 2]},
    {"channels": [4, 8], "kernel_size": 1},
    {"channels": [4, 8], "kernel_size": 2},
    {"channels": [4, 8], "kernel_size": 4},
    {"channels": [4, 8], "kernel_size": 5},
    {"channels": [4, 8], "kernel_size": 31},
    {"channels": [4, 8], "convs_per_stage": 3},
    {"channels": [4, 8], "convs_per_stage": 3, "residual": True},
    {"channels": [4, 8], "residual": True},
    {"channels": [4, 8], "convs_per_stage": 3, "residual": True, "pool_at_end": True},
    {"channels": [4, 8], "convs_per_stage": 2, "pool_at_end": True},
    {"channels": [4, 8], "convs_per_stage": 2, "pool_at_end": True, "unpadded_stages": 2},
    {"channels": [4, 8, 8], "convs_per_stage": 2, "residual": False, "unpadded_stages": 1, "kernel_size": 5},
    {"channels": [4, 8], "pooling": "avg"},
    {"channels": [4] * 6, "pooling": "none"},
    {"channels": [4, 8], "global_pool": "avg"},
    {"channels": [4, 8], "global_pool": "max", "hidden": [16]},
    {"channels": [4, 8], "norm": "layer", "hidden": [16]},
    {"channels": [4, 8], "norm": "none", "hidden": [16, 12]},
    {"channels": [4, 8], "activation": "gelu"},
    {"channels": [4, 8], "activation": "silu"},
    {"channels": [4, 8], "activation": "leaky_relu"},
    {"channels": [4, 8], "dropout": 0.5, "hidden": [16]},
    {"channels": [4, 8], "dropout": 1.0},
    {"channels": [], "hidden": [500], "norm": "none"},
    {"channels": [], "hidden": [32, 16], "norm": "layer", "global_pool": "avg"},
    {"channels": [], "hidden": [1], "image_size": 1},
    {"channels": [1], "image_size": 2},
    {"channels": [4, 8], "image_size": 33},
    {"channels": [4, 8], "image_size": 64},
]


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


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


def test_the_mlp_has_the_parameters_of_the_formula() -> None:
    model = ConvNet(channels=[], hidden=[500], norm="none")
    assert num_parameters(model) == 784 * 500 + 500 + 500 * 10 + 10 == 397_510


def test_the_default_network_has_the_parameters_of_the_formula() -> None:
    convolutions = 9 * (1 * 16 + 16 * 32 + 32 * 64)
    norms = 2 * (16 + 32 + 64)
    output = 3 * 3 * 64 * 10 + 10  # 28 -> 14 -> 7 -> 3
    assert num_parameters(ConvNet()) == convolutions + norms + output == 29_178


def test_a_deep_network_has_the_parameters_of_the_formula() -> None:
    model = ConvNet(
        channels=[4, 8], convs_per_stage=2, kernel_size=2, norm="none", global_pool="avg", hidden=[6], image_size=12
    )
    convolutions = [(1, 4), (4, 4), (4, 8), (8, 8)]
    expected = sum(4 * num_in * num_out + num_out for num_in, num_out in convolutions)
    assert num_parameters(model) == expected + (8 * 6 + 6) + (6 * 10 + 10)


def test_residual_stages_add_the_input_of_their_later_convolutions(pixels: Tensor) -> None:
    plain, residual = (ConvNet(channels=[4], convs_per_stage=3, residual=flag).network.eval() for flag in (False, True))
    residual.load_state_dict(dict(zip(residual.state_dict(), plain.state_dict().values(), strict=True)))
    maps = plain.stages[:4](pixels)
    assert residual.stages(pixels).allclose(maps + plain.stages[4:](maps), atol=1e-6)


def test_stages_of_one_convolution_have_nothing_to_add() -> None:
    assert list(ConvNet(residual=True).state_dict()) == list(ConvNet().state_dict())


@pytest.mark.parametrize(("norm", "with_bias"), [("batch", 1), ("layer", 1), ("none", 3)])
def test_only_layers_without_a_normalisation_have_a_bias(norm: Any, with_bias: int) -> None:
    model = ConvNet(channels=[4], hidden=[8], norm=norm)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert [layer.bias is not None for layer in layers] == [norm == "none", norm == "none", True]
    assert sum(layer.bias is not None for layer in layers) == with_bias


@pytest.mark.parametrize(
    ("image_size", "num_stages", "pooling", "sizes"),
    [(28, 0, "max", [28]), (28, 4, "max", [28, 14, 7, 3, 1]), (28, 2, "none", [28] * 3), (5, 2, "avg", [5, 2, 1])],
)
def test_map_sizes_halve_at_each_stage_that_pools(
    image_size: int, num_stages: int, pooling: Any, sizes: list[int]
) -> None:
    assert map_sizes(image_size, num_stages, pooling) == sizes


@pytest.mark.parametrize(("kernel_size", "convs_per_stage"), [(1, 1), (2, 2), (3, 1), (4, 3), (9, 1)])
def test_stages_make_the_maps_of_map_sizes(kernel_size: int, convs_per_stage: int, pixels: Tensor) -> None:
    model = ConvNet(channels=[3, 5, 7], kernel_size=kernel_size, convs_per_stage=convs_per_stage)
    shapes: list[tuple[int, ...]] = []
    for module in model.modules():
        if isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(lambda _module, _inputs, maps: shapes.append(tuple(maps.shape[1:])))
    model(pixels)
    assert shapes == [(3, 14, 14), (5, 7, 7), (7, 3, 3)]


@pytest.mark.parametrize(("pool_at_end", "sizes"), [(False, [28, 14, 14, 7]), (True, [28, 28, 14, 14])])
def test_pooling_comes_after_the_first_convolution_or_at_the_end(
    pool_at_end: bool, sizes: list[int], pixels: Tensor
) -> None:
    model = ConvNet(channels=[2, 3], convs_per_stage=2, pool_at_end=pool_at_end)
    seen: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, inputs, _maps: seen.append(inputs[0].shape[-1]))
    model(pixels)
    assert seen == sizes


@pytest.mark.parametrize(
    ("pool_at_end", "sizes"), [(False, [28, 13, 11, 5, 5, 2]), (True, [28, 26, 12, 10, 4, 4])], ids=["first", "end"]
)
def test_unpadded_stages_lose_their_border(pool_at_end: bool, sizes: list[int], pixels: Tensor) -> None:
    stages = 2 if pool_at_end else 1
    model = ConvNet(channels=[2, 3, 4], convs_per_stage=2, pool_at_end=pool_at_end, unpadded_stages=stages)
    seen: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, inputs, _maps: seen.append(inputs[0].shape[-1]))

    assert model(pixels).shape == (len(pixels), 10)

    assert seen == sizes


def test_residual_stages_without_padding_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.residual needs .*\n.*model\.unpadded_stages 0"):
        ConvNet(channels=[2, 3], convs_per_stage=2, residual=True, unpadded_stages=1)


def test_an_empty_network_is_refused_with_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"network is empty: .* model\.channels or in model\.hidden"):
        ConvNet(channels=[], hidden=[])


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ({"channels": [8] * 5}, r"5 stages .* 0x0 map \(28x28 -> 14x14 -> 7x7 -> 3x3 -> 1x1 -> 0x0\)\n.*at most 4"),
        ({"channels": [8] * 9}, r"9 stages .*1x1 -> 0x0\)\n.*at most 4"),
        ({"channels": [8], "image_size": 1}, r"1 stages .* \(1x1 -> 0x0\)\n.*larger data\.image_size"),
        ({"channels": [8] * 3, "unpadded_stages": 3, "kernel_size": 5}, r"0x0.*\n.*or less model\.unpadded_stages"),
        ({"channels": [8] * 3, "image_size": 7}, r"7x7 -> 3x3 -> 1x1 -> 0x0.*\n.*at most 2 stages.*pooling: none"),
    ],
    ids=str,
)
def test_stages_without_pixels_are_refused_with_the_way_there_and_the_way_out(
    architecture: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        ConvNet(**architecture)


def test_an_impossible_network_is_a_short_error_without_a_run_directory(fails: Fails, tmp_path: Path) -> None:
    error = fails("fit", "--data.dataset=digits", "--data.val_size=200", "--model.channels=[8,8,8,8,8]")
    assert "5 stages in model.channels leave a 0x0 map" in error
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("flag", "key"),
    [
        ("--model.channels=[0]", "model.channels"),
        ("--model.channels=[-3]", "model.channels"),
        ("--model.hidden=[1.5]", "model.hidden"),
        ("--model.kernel_size=0", "model.kernel_size"),
        ("--model.convs_per_stage=0", "model.convs_per_stage"),
        ("--model.pooling=mean", "model.pooling"),
        ("--model.norm=group", "model.norm"),
        ("--model.activation=tanh", "model.activation"),
        ("--model.dropout=1.1", "model.dropout"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(fails: Fails, flag: str, key: str) -> None:
    assert key in fails("fit", "--data.dataset=digits", "--data.val_size=200", flag)


def test_normalisation_is_part_of_the_network(pixels: Tensor) -> None:
    plain, normalising = ConvNet(channels=[4]).eval(), ConvNet(channels=[4]).eval()
    normalising.load_state_dict(plain.state_dict())
    normalising.network.mean.fill_(0.25)
    normalising.network.std.fill_(0.5)
    torch.testing.assert_close(normalising(pixels), plain((pixels - 0.25) / 0.5))
    assert not torch.allclose(normalising(pixels), plain(pixels))


def test_the_statistics_are_saved_with_the_weights() -> None:
    state = ConvNet(channels=[4]).state_dict()
    assert (float(state["network.mean"]), float(state["network.std"])) == (0.0, 1.0)


@pytest.mark.parametrize("architecture", [{"channels": []}, {"channels": [4]}, {"channels": [4], "global_pool": "avg"}])
def test_dropout_never_drops_a_pixel(architecture: dict[str, Any], pixels: Tensor) -> None:
    model = ConvNet(hidden=[16], dropout=0.9, norm="none", **architecture)
    reached: list[Tensor] = []
    modules = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    modules[0].register_forward_pre_hook(lambda _module, inputs: reached.append(inputs[0].reshape(pixels.shape)))
    model(pixels)
    assert torch.equal(reached[0], pixels)


@pytest.mark.parametrize(("architecture", "count"), [({"channels": []}, 2), ({"channels": [4]}, 3)])
def test_dropout_stands_before_each_dense_layer_that_does_not_see_pixels(
    architecture: dict[str, Any], count: int
) -> None:
    model = ConvNet(hidden=[16, 12], dropout=0.3, **architecture)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.3] * count


def test_dropout_is_only_for_training(pixels: Tensor) -> None:
    model = ConvNet(channels=[4], hidden=[16], dropout=0.5, norm="none")
    assert not torch.equal(model(pixels), model(pixels))
    model.eval()
    assert torch.equal(model(pixels), model(pixels))


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_the_forward_pass_runs_in_bfloat16(norm: Any, pixels: Tensor) -> None:
    model = ConvNet(channels=[4, 8], hidden=[16], norm=norm).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(pixels)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(pixels), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("architecture", [{"channels": [4, 8], "kernel_size": 2}, {"channels": [], "hidden": [16]}])
def test_torch_export_gives_the_same_logits_for_any_number_of_images(
    architecture: dict[str, Any], pixels: Tensor
) -> None:
    model = ConvNet(**architecture).eval()
    exported = torch.export.export(model, (pixels,), dynamic_shapes=({0: torch.export.Dim("n")},))
    images = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(exported.module()(images), model(images))
