"""MobileNetV2 in torch: see jaxnorm/lab/mobilenet.py."""

from typing import Any

from jaxnorm.lab.mobilenet import STEPS


def torch_mobilenet() -> Any:
    """The same in torch, whose state_dict has the names of the published weights."""
    from torch import nn as tnn

    def conv_norm(i, o, k, stride=1, groups=1):
        conv = tnn.Conv2d(i, o, k, stride, (k - 1) // 2, groups=groups, bias=False)
        return tnn.Sequential(conv, tnn.BatchNorm2d(o), tnn.ReLU6())

    class Inverted(tnn.Module):
        def __init__(self, i, o, stride, expansion):
            super().__init__()
            wide = i * expansion
            expand = [conv_norm(i, wide, 1)] if expansion > 1 else []
            project = [tnn.Conv2d(wide, o, 1, bias=False), tnn.BatchNorm2d(o)]
            self.conv = tnn.Sequential(*expand, conv_norm(wide, wide, 3, stride, wide), *project)
            self.residual = stride == 1 and i == o

        def forward(self, x):
            return x + self.conv(x) if self.residual else self.conv(x)

    class Net(tnn.Module):
        def __init__(self):
            super().__init__()
            widths = [32, *(channels for channels, *_ in STEPS)]
            blocks = [Inverted(i, *step) for i, step in zip(widths, STEPS, strict=False)]
            self.features = tnn.Sequential(conv_norm(3, 32, 3, 2), *blocks, conv_norm(320, 1280, 1))
            self.classifier = tnn.Sequential(tnn.Dropout(0.2), tnn.Linear(1280, 1000))

        def forward(self, x):
            return self.classifier(self.features(x).mean((2, 3)))

    return Net()
