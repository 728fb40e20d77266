"""The one residual network. A family is two slots in its blocks and a line in the table of variants.

Papers: He et al., "Deep Residual Learning", arXiv 1512.03385; ResNeXt, arXiv 1611.05431; the deep stem and the
pooled shortcut ("ResNet-D"), arXiv 1812.01187; ResNeSt, arXiv 2004.08955; stochastic depth, arXiv 1603.09382.
Reference implementations: torchvision's `resnet.py` (names of children, stride on the 3x3 convolution) and
zhanghang1989/ResNeSt (deep stem, average pooling before or after the 3x3, dilation).

What differs: stochastic depth drops the residual branch, as its paper says (the released ResNeSt code has none);
activation checkpointing leaves the running statistics of BatchNorm as one forward pass would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpoint_call
from torchvision.ops import StochasticDepth

from resnest_det.layers import NormLayer, SplitAttentionConv2d
from resnest_det.layers.fused import (
    average_pool,
    conv_norm_add_relu,
    conv_norm_relu,
    convolve,
    has_hooks,
    may_fuse,
    norm_add_relu,
    norm_relu_conv,
    plain_layers,
    trains_fused,
)

Gate = Callable[[int], nn.Module]  # channels -> a module that scales (N, channels, H, W)
OutputStride = Literal[8, 16, 32]


class SpatialConv(Protocol):
    """Builds what stands in a bottleneck's 3x3 slot, norm and activation included.

    The network initialises the Conv2d in it as its own; see ResNet.
    """

    def __call__(self, channels: int, *, stride: int, dilation: int, groups: int, norm_layer: NormLayer) -> nn.Module:
        """A module from (N, channels, H, W) to (N, channels, H / stride, W / stride)."""
        ...


def conv3x3(in_channels: int, channels: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(in_channels, channels, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: the block of ResNet-18 and -34.

    Args:
        in_channels: channels of the input.
        planes: channels of the output.
        stride: stride of the first convolution.
        dilation: dilation of both convolutions.
        shortcut: what the input passes through before the addition; None adds it as it is.
        gate: builds the attention applied after the second norm; None for none.
        drop_path: probability of dropping the residual branch of a sample in training, in [0, 1).
        norm_layer: builds a norm from its channels.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        planes: int,
        *,
        stride: int,
        dilation: int,
        shortcut: nn.Module | None,
        gate: Gate | None,
        drop_path: float,
        norm_layer: NormLayer,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, planes, stride, dilation)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes, dilation=dilation)
        self.bn2 = norm_layer(planes)
        self.gate = None if gate is None else _slot_module("gate", gate, planes)
        self.downsample = shortcut
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, planes, H / stride, W / stride)."""
        if trains_fused(x, (self.conv1, self.conv2), (self.bn1, self.bn2), self.relu):
            out = norm_relu_conv(self.conv1(x), self.bn1, self.conv2)
            return _add_shortcut(self, x, out, self.bn2)
        out = conv_norm_relu(x, self.conv1, self.bn1, self.relu)
        return _add_shortcut(self, x, out, self.bn2, self.conv2)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut, with a slot in place of the 3x3 and one for a gate before the addition.

    Args:
        in_channels: channels of the input.
        planes: the output has `4 * planes` channels.
        stride: stride of the block: on the 3x3, or on the average pool where there is one.
        dilation: dilation of the 3x3.
        shortcut: what the input passes through before the addition; None adds it as it is.
        gate: builds the attention applied after the last norm; None for none.
        drop_path: probability of dropping the residual branch of a sample in training, in [0, 1).
        norm_layer: builds a norm from its channels.
        width: channels of the 3x3.
        groups: groups of the 3x3.
        spatial_conv: fills the slot of the 3x3; None is a plain convolution with its norm and ReLU.
        average_pool: "before" or "after" the 3x3, an average pool carries the block's stride (ResNeSt's avd);
            None has no pool.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        *,
        stride: int,
        dilation: int,
        shortcut: nn.Module | None,
        gate: Gate | None,
        drop_path: float,
        norm_layer: NormLayer,
        width: int,
        groups: int,
        spatial_conv: SpatialConv | None,
        average_pool: Literal["before", "after"] | None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm_layer(width)
        conv_stride = 1 if average_pool else stride
        pool = nn.AvgPool2d(3, stride, padding=1) if average_pool else None
        self.avd_before = pool if average_pool == "before" else None
        if spatial_conv is None:
            self.conv2: nn.Module = conv3x3(width, width, conv_stride, dilation, groups)
            self.bn2: nn.Module | None = norm_layer(width)
        else:
            self.conv2 = _slot_module(
                "spatial_conv",
                spatial_conv,
                width,
                stride=conv_stride,
                dilation=dilation,
                groups=groups,
                norm_layer=norm_layer,
            )
            self.bn2 = None
        self.avd_after = pool if average_pool == "after" else None
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.gate = None if gate is None else _slot_module("gate", gate, planes * self.expansion)
        self.downsample = shortcut
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, 4 * planes, H / stride, W / stride)."""
        if self._trains_fused(x):
            return self._forward_fused(x)
        out = conv_norm_relu(x, self.conv1, self.bn1, self.relu)
        if self.avd_before is not None:
            out = self.avd_before(out)
        out = self.conv2(out) if self.bn2 is None else conv_norm_relu(out, self.conv2, self.bn2, self.relu)
        if self.avd_after is not None:
            out = self.avd_after(out)
        return _add_shortcut(self, x, out, self.bn3, self.conv3)

    def _trains_fused(self, x: Tensor) -> bool:
        own = trains_fused(x, (self.conv1, self.conv3), (self.bn1, self.bn3), self.relu)
        if not own:
            return False
        if self.bn2 is not None:
            return trains_fused(x, (self.conv2,), (self.bn2,))
        return type(self.conv2) is SplitAttentionConv2d and not has_hooks(self.conv2) and self.conv2.trains_fused(x)

    def _forward_fused(self, x: Tensor) -> Tensor:
        """The same, with less kept for the backward pass; where `_trains_fused`."""
        attention = self.conv2 if isinstance(self.conv2, SplitAttentionConv2d) else None
        spatial = self.conv2 if attention is None else attention.conv
        out = convolve(x, self.conv1)
        if self.avd_before is None:
            out = norm_relu_conv(out, self.bn1, spatial)
        else:
            out = spatial(average_pool(self.relu(self.bn1(out)), self.avd_before))
        if attention is not None:
            out = attention.attend(out)
        else:
            assert self.bn2 is not None
            if self.avd_after is None:
                return _add_shortcut(self, x, norm_relu_conv(out, self.bn2, self.conv3), self.bn3)
            out = self.relu(self.bn2(out))
        if self.avd_after is not None:
            out = average_pool(out, self.avd_after)
        return _add_shortcut(self, x, convolve(out, self.conv3), self.bn3)


Block = BasicBlock | Bottleneck


def _slot_module(slot: str, build: Callable[..., nn.Module], channels: int, **arguments: Any) -> nn.Module:
    """The module for one of a block's slots, built by what the user passed for it.

    Raises:
        ValueError: that is a module itself, takes other arguments, or returns no module.
    """
    takes = ", ".join(["channels", *(["*", *arguments] if arguments else [])])
    if isinstance(build, nn.Module):
        raise ValueError(
            f"{slot} is a module of {type(build).__name__}, and every block needs one of its own: pass a function of "
            f"({takes}) that builds it, such as a class"
        )
    try:
        module = build(channels, **arguments)
    except TypeError as error:
        raise ValueError(f"{slot} must be a function of ({takes}), and failed called so: {error}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"{slot} returned {module!r} for {channels} channels; it must return a module")
    return module


def _add_shortcut(
    block: Block, x: Tensor, out: Tensor, norm: nn.Module | None = None, conv: nn.Module | None = None
) -> Tensor:
    """The end of every block: what is left of its last convolution and norm, gate, stochastic depth, addition, ReLU.

    Where the norm is given and the convolution is not, the block trains fused.
    """
    shortcut = x if block.downsample is None else _downsampled(block.downsample, x)
    joined = block.gate is None and block.drop_path is None
    if conv is not None:
        assert norm is not None
        if joined:
            return conv_norm_add_relu(out, conv, norm, shortcut, block.relu)
        out = conv_norm_relu(out, conv, norm, None)
    elif norm is not None:
        if joined and shortcut.shape == out.shape:
            return norm_add_relu(out, norm, shortcut)
        out = norm(out)
    if block.gate is not None:
        out = block.gate(out)
    if block.drop_path is not None:
        out = block.drop_path(out)
    if block.gate is None:
        out += shortcut
    else:  # a user's gate may need its output again for its gradient
        out = out + shortcut
    return block.relu(out)


def _downsampled(shortcut: nn.Module, x: Tensor) -> Tensor:
    """The shortcut of the block's input, its norm in its convolution where no gradient is wanted."""
    if type(shortcut) is not nn.Sequential or len(shortcut) < 2 or not may_fuse(x, shortcut):
        return shortcut(x)
    *pools, conv, norm = shortcut
    for pool in pools:
        x = pool(x)
    return conv_norm_relu(x, conv, norm, None)


class DeepStem(nn.Sequential):
    """Three convolutions, with norm and ReLU behind the first and the second."""

    def __getitem__(self, index: slice | int) -> Any:
        """One module, or some in a plain Sequential."""
        modules = list(self)[index]
        return nn.Sequential(*modules) if isinstance(modules, list) else modules

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, channels, H / 2, W / 2)."""
        conv1, norm1, relu1, conv2, norm2, relu2, conv3 = self
        if trains_fused(x, (conv1, conv2, conv3), (norm1, norm2), relu1, relu2):
            return norm_relu_conv(norm_relu_conv(conv1(x), norm1, conv2), norm2, conv3)
        x = conv_norm_relu(x, conv1, norm1, relu1)
        return conv3(conv_norm_relu(x, conv2, norm2, relu2))


class Stage(nn.Sequential):
    """Blocks that work at one size, with what a neck needs to know of their output.

    Attributes:
        channels: channels of the stage's output.
        stride: pixels of the network's input for one step of the stage's output.
        checkpoint: whether training keeps only each block's input and computes the block again in the backward
            pass: less memory for about a third more time.
    """

    def __init__(self, blocks: Sequence[Block], *, channels: int, stride: int, checkpoint: bool) -> None:
        super().__init__(*blocks)
        self.channels = channels
        self.stride = stride
        self.checkpoint = checkpoint

    def __getitem__(self, index: slice | int) -> Any:
        """One block, or some in a plain Sequential: a part of a stage states no shape."""
        blocks = list(self)[index]
        return nn.Sequential(*blocks) if isinstance(blocks, list) else blocks

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks in order."""
        if not (self.checkpoint and self.training and torch.is_grad_enabled()):
            return super().forward(x)
        for block in self:
            x = checkpoint_call(block, x, use_reentrant=False, context_fn=partial(_contexts, block))
        return x


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a checkpointed block's forward pass and of its recomputation, which takes the same way."""
    return nullcontext(), _recomputation(block, plain=not may_fuse(torch.empty(0)))


@contextmanager
def _recomputation(block: nn.Module, plain: bool) -> Iterator[None]:
    with _running_statistics_kept(block), plain_layers() if plain else nullcontext():
        yield


@contextmanager
def _running_statistics_kept(block: nn.Module) -> Iterator[None]:
    """Within it, BatchNorm counts into copies of its running statistics: a recomputed forward is no second batch."""
    own = {
        (module, name): buffer
        for module in block.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name, buffer in module.named_buffers(recurse=False)
    }
    for (module, name), buffer in own.items():
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for (module, name), buffer in own.items():
            setattr(module, name, buffer)


class ResNet(nn.Module):
    """A residual network as a classifier whose children are its stages, flat and in the order they run.

    Children: conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool fc, as torchvision names them, so that
    torchvision's IntermediateLayerGetter, BackboneWithFPN and detectors take the network as it is.

    Args:
        block: BasicBlock or Bottleneck.
        layers: number of blocks in each of the four stages.
        num_classes: outputs of the classifier.
        norm_layer: builds a norm from its channels.
        stem_width: None is the 7x7 stem of 64 channels; a number is the deep stem of three 3x3 convolutions with
            `stem_width`, `stem_width` and `2 * stem_width` channels.
        groups: groups of the 3x3 in each bottleneck.
        width_per_group: channels of a group where a stage's planes are 64.
        spatial_conv: the slot of the bottleneck's 3x3, see SpatialConv; None is a plain convolution.
        gate: the slot before the addition: channels -> module; None is empty. A gate keeps the initial values it
            comes with, such as a last layer of zeros; every other Conv2d starts from He's normal distribution.
        average_pool: None; or "before" or "after": the first block of layer2, layer3 and layer4 has an average
            pool there, which carries its stride. In a dilated stage it stays, at stride 1.
        pooled_shortcut: strided shortcuts pool by averages and convolve at stride 1 (ResNet-D).
        output_stride: input pixels for one step of layer4's output. At 16, layer4 has dilation 2 in place of a
            stride; at 8, layer3 has 2 and layer4 has 4. The first block of a dilated stage has half its dilation.
        drop_path: stochastic depth: probability of dropping the last block's branch, rising linearly from 0 at the
            first block, in [0, 1).
        checkpoint: activation checkpointing, block by block.

    Shape:
        (N, 3, H, W), normalised, to logits (N, num_classes).

    Attributes:
        inplanes: channels of layer4, which is what torchvision's detection builders read.
        random_tensors: names of the tensors that no state dict loaded since the network was built has held.
        weights_loaded: whether the classifier's are the only ones among them.

    Raises:
        ValueError: an argument is out of range, a BasicBlock is asked for what only a Bottleneck has, or what fills a
            slot is no function from its arguments to a module.
    """

    layer1: Stage
    layer2: Stage
    layer3: Stage
    layer4: Stage
    random_tensors: set[str]
    weights_loaded: bool

    def __init__(
        self,
        block: type[Block],
        layers: Sequence[int],
        *,
        num_classes: int = 1000,
        norm_layer: NormLayer = nn.BatchNorm2d,
        stem_width: int | None = None,
        groups: int = 1,
        width_per_group: int = 64,
        spatial_conv: SpatialConv | None = None,
        gate: Gate | None = None,
        average_pool: Literal["before", "after"] | None = None,
        pooled_shortcut: bool = False,
        output_stride: OutputStride = 32,
        drop_path: float = 0.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride={output_stride} must be 8, 16 or 32")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path={drop_path} must be at least 0 and below 1")
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be 1 or more")
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"layers={tuple(layers)} must be four numbers of blocks, each 1 or more")
        bottleneck_only = groups != 1 or width_per_group != 64 or spatial_conv is not None or average_pool
        if block is BasicBlock and bottleneck_only:
            raise ValueError("groups, width_per_group, spatial_conv and average_pool need block=Bottleneck")

        if stem_width is None:
            self.inplanes = 64
            self.conv1: nn.Module = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        else:
            self.inplanes = 2 * stem_width
            self.conv1 = DeepStem(
                conv3x3(3, stem_width, stride=2),
                norm_layer(stem_width),
                nn.ReLU(inplace=True),
                conv3x3(stem_width, stem_width),
                norm_layer(stem_width),
                nn.ReLU(inplace=True),
                conv3x3(stem_width, self.inplanes),
            )
        self.bn1 = norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        num_blocks = sum(layers)
        block_index = 0
        stage_stride = 4
        last_dilation = 1
        for number in (1, 2, 3, 4):
            planes = 64 * 2 ** (number - 1)
            stride = 1 if number == 1 else 2
            dilation = last_dilation
            if stride == 2 and stage_stride == output_stride:
                stride, dilation = 1, 2 * last_dilation
            stage_stride *= stride
            blocks: list[Block] = []
            for index in range(layers[number - 1]):
                first = index == 0
                block_stride = stride if first else 1
                channels = planes * block.expansion
                shortcut = None
                if first and (stride != 1 or self.inplanes != channels):
                    shortcut = _shortcut(self.inplanes, channels, stride, pooled_shortcut, norm_layer)
                bottleneck: dict[str, Any] = {}
                if block is Bottleneck:
                    bottleneck = {
                        "width": planes * width_per_group // 64 * groups,
                        "groups": groups,
                        "spatial_conv": spatial_conv,
                        "average_pool": average_pool if first and number > 1 else None,
                    }
                blocks.append(
                    block(
                        self.inplanes,
                        planes,
                        stride=block_stride,
                        dilation=last_dilation if first else dilation,
                        shortcut=shortcut,
                        gate=gate,
                        drop_path=drop_path * block_index / max(num_blocks - 1, 1),
                        norm_layer=norm_layer,
                        **bottleneck,
                    )
                )
                self.inplanes = channels
                block_index += 1
            last_dilation = dilation
            stage = Stage(blocks, channels=self.inplanes, stride=stage_stride, checkpoint=checkpoint)
            self.add_module(f"layer{number}", stage)

        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)
        self.random_tensors = {name for name in self.state_dict() if not name.endswith(".num_batches_tracked")}
        self.weights_loaded = False
        self.register_load_state_dict_pre_hook(_note_loaded)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classify: (N, 3, H, W) to logits (N, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _shortcut(in_channels: int, channels: int, stride: int, pooled: bool, norm_layer: NormLayer) -> nn.Sequential:
    """A shortcut that changes size or channels. A pooled one keeps its pool's place at stride 1, for the key names."""
    if not pooled:
        return nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, stride, bias=False),
            norm_layer(channels),
        )
    pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(
        pool if stride > 1 else nn.Identity(),
        nn.Conv2d(in_channels, channels, 1, bias=False),
        norm_layer(channels),
    )


def _initialise(net: nn.Module) -> None:
    """He initialisation of the convolutions by their outputs, as torchvision and the released ResNeSt do.

    Gates are left as they were built: a last layer of zeros there is meant.
    """
    for name, child in net.named_children():
        if name == "gate":
            continue
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
        _initialise(child)


def _note_loaded(net: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(net, ResNet)
    net.random_tensors = {name for name in net.random_tensors if prefix + name not in state}
    net.weights_loaded = net.weights_loaded or all(name.startswith("fc.") for name in net.random_tensors)
