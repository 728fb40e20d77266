"""DeepLabV3+ on ResNeSt-50 beside segmentation-models-pytorch's: `python -m tests.benchmarks.deeplabv3plus`.

Both have 150 classes and output stride 16, and are timed in NCHW and in channels_last, in one process, interleaved, so
that a slow spell of the machine meets all of them. A forward pass is of one image in evaluation; a training step is
forward, cross-entropy and backward of two images. Prints a Markdown table of medians with (lowest-highest).

MACs are half of what torch.utils.flop_counter counts in a forward pass: the convolutions and matrix products; norms,
activations, pools and resizing are not in it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resnest_det import create_backbone
from resnest_det.models import deeplabv3plus

NUM_CLASSES = 150
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def build_ours() -> nn.Module:
    return deeplabv3plus(create_backbone("resnest50", output_stride=16), NUM_CLASSES)


def build_theirs() -> nn.Module:
    return smp.DeepLabV3Plus("tu-resnest50d", encoder_weights=None, encoder_output_stride=16, classes=NUM_CLASSES)


def our_loss(model: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    return model(images, masks)["loss_seg"]


def their_loss(model: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    return F.cross_entropy(model(images), masks.long(), ignore_index=255)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor, Tensor], Tensor]]] = {
    "resnest_det, resnest50": (build_ours, our_loss),
    "segmentation-models-pytorch, tu-resnest50d": (build_theirs, their_loss),
}


def gigamacs(model: nn.Module, size: int) -> float:
    """Multiplications of the forward pass of one square image, in thousands of millions."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.eval()(torch.rand(1, 3, size, size))
    return counter.get_total_flops() / 2e9


def seconds_of_forward(model: nn.Module, size: int, layout: torch.memory_format) -> float:
    images = torch.rand(1, 3, size, size).contiguous(memory_format=layout)
    model.eval()
    with torch.inference_mode():
        start = time.perf_counter()
        model(images)
        return time.perf_counter() - start


def seconds_of_training_step(
    model: nn.Module, loss: Callable[[nn.Module, Tensor, Tensor], Tensor], size: int, layout: torch.memory_format
) -> float:
    images = torch.rand(2, 3, size, size).contiguous(memory_format=layout)
    masks = torch.randint(0, NUM_CLASSES, (2, size, size), dtype=torch.uint8)
    model.train().zero_grad(set_to_none=True)
    start = time.perf_counter()
    loss(model, images, masks).backward()
    return time.perf_counter() - start


def spread(seconds: list[float]) -> str:
    """Median (lowest-highest), in milliseconds."""
    low, middle, high = (f"{1000 * f(seconds):.0f}" for f in (min, statistics.median, max))
    return f"{middle} ({low}-{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="side of the forward pass's image, a multiple of 16")
    parser.add_argument("--train-size", type=int, default=512, help="side of the training step's images")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, after one that is not counted")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    models = {
        (name, layout): build().to(memory_format=memory_format)
        for name, (build, _) in MODELS.items()
        for layout, memory_format in LAYOUTS.items()
    }
    forward: dict[tuple[str, str], list[float]] = {key: [] for key in models}
    training: dict[tuple[str, str], list[float]] = {key: [] for key in models}
    for _ in range(arguments.rounds + 1):
        for (name, layout), model in models.items():
            forward[name, layout].append(seconds_of_forward(model, arguments.size, LAYOUTS[layout]))
            training[name, layout].append(
                seconds_of_training_step(model, MODELS[name][1], arguments.train_size, LAYOUTS[layout])
            )
            model.zero_grad(set_to_none=True)

    theirs = models["segmentation-models-pytorch, tu-resnest50d", "NCHW"]
    rates = [branch[0][0].dilation[0] for branch in theirs.decoder.aspp[0].convs[1:4]]
    print(
        f"{NUM_CLASSES} classes, output stride 16, {torch.get_num_threads()} threads; forward of one image of "
        f"{arguments.size} x {arguments.size} in evaluation, training step of two of {arguments.train_size} x "
        f"{arguments.train_size}; median of {arguments.rounds} (lowest-highest)\n\n"
        f"| model | parameters, M | GMACs | layout | forward, ms | training step, ms |\n|---|---|---|---|---|---|"
    )
    for (name, layout), model in models.items():
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(
            f"| {name} | {parameters:.2f} | {gigamacs(model, arguments.size):.1f} | {layout} "
            f"| {spread(forward[name, layout][1:])} | {spread(training[name, layout][1:])} |"
        )
    print(
        f"\nOurs: ASPP rates 6, 12, 18; two separable 3x3 in the decoder, each with a norm and a ReLU between its "
        f"parts, as the paper's code has them; logits float32 at the image's size; the model normalises its input.\n"
        f"segmentation-models-pytorch {smp.__version__}, its defaults: ASPP rates {', '.join(map(str, rates))}; one "
        f"separable 3x3 after the ASPP at its size and one in the decoder, no norm or ReLU between their parts; the "
        f"input comes normalised."
    )


if __name__ == "__main__":
    main()
