"""Batch normalisation folded away: the same answers, and only where that is so."""

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

from kelp.nn.backend import folded


def norms(net):
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def with_statistics(net):
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return net.eval()


@pytest.mark.parametrize(
    ("architecture", "encoder"),
    [
        ("unet", "tu-tf_efficientnet_lite0"),  # normalisation and activation in one module
        ("unetplusplus", "tu-resnet10t"),
        ("deeplabv3plus", "tu-resnet10t"),
        ("segformer", "tu-mobilenetv3_small_050"),
    ],
)
def test_folding_keeps_the_answers(architecture, encoder):
    torch.manual_seed(0)
    net = with_statistics(
        smp.create_model(architecture, encoder, encoder_weights=None, in_channels=3, classes=1)
    )
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        before, state = net(x), {k: v.clone() for k, v in net.state_dict().items()}
        small = folded(net, torch.randn(1, 3, 64, 64))
        after = small(x)
    assert norms(small) < norms(net) / 10
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())  # a copy was folded


class Twice(nn.Module):
    """The convolution's output goes into the normalisation, and around it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


def test_a_network_that_would_answer_differently_stays_as_it_is():
    net = with_statistics(Twice())
    assert folded(net, torch.randn(1, 3, 8, 8)) is net


def test_a_normalisation_without_a_convolution_stays():
    net = with_statistics(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU()))
    assert norms(folded(net, torch.randn(1, 3, 8, 8))) == 1
