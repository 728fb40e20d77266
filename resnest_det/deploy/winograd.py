"""3x3 convolutions with a quarter of the multiplications: Winograd's minimal filtering, F(4x4, 3x3).

Paper: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308. The output is cut into
tiles of 4 x 4 pixels. A tile's input, 6 x 6 pixels, is transformed into 36 planes; a plane is multiplied by its own
matrix of weights, as a 1x1 convolution does, and the products are transformed into the tile. That is 36 multiplications
a tile where a convolution has 144, and one sum of all planes is one `embedding_bag`: it adds weighted rows of channels,
here those of pixels, and takes neither a padded image nor a compiler.

What differs from the paper: the planes are values of polynomials at 0, 3/4, -3/4, 3/2, -3/2 and infinity, where it has
0, 1, -1, 2, -2 and infinity. The largest error is a fifth of theirs, and two to seven times that of a convolution.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_TILE, _KERNEL = 4, 3
_POINTS = _TILE + _KERNEL - 1
_PLANES = _POINTS**2

_A, _B = 0.75, 1.5  # with 0, the negative ones and infinity the points; all entries but _WEIGHTS' are exact in float32
_INPUT = [
    [_A**2 * _B**2, 0, -(_A**2) - _B**2, 0, 1, 0],
    [0, -_A * _B**2, -(_B**2), _A, 1, 0],
    [0, _A * _B**2, -(_B**2), -_A, 1, 0],
    [0, -(_A**2) * _B, -(_A**2), _B, 1, 0],
    [0, _A**2 * _B, -(_A**2), -_B, 1, 0],
    [0, _A**2 * _B**2, 0, -(_A**2) - _B**2, 0, 1],
]
_WEIGHTS = [
    *(
        [power / scale for power in (1, point, point**2)]
        for point, scale in (
            (0, _A**2 * _B**2),
            (_A, 2 * _A**2 * (_A**2 - _B**2)),
            (-_A, 2 * _A**2 * (_A**2 - _B**2)),
            (_B, 2 * _B**2 * (_B**2 - _A**2)),
            (-_B, 2 * _B**2 * (_B**2 - _A**2)),
        )
    ),
    [0, 0, 1],
]
_OUTPUT = [[point**power for point in (0, _A, -_A, _B, -_B)] + [power == _TILE - 1] for power in range(_TILE)]

_FEWEST_CHANNELS = 64  # of a group, in and out
_FEWEST_TILES = 16
_TILES_AT_A_TIME = 256  # fewer would read the weights more often
_MOST_PRODUCTS = 2**22  # 16 MiB: the allocator gives larger pieces back to the system, which costs more than is saved


def suits_winograd(conv: nn.Conv2d) -> bool:
    """Whether a convolution is of the kind that this computes, and was faster so."""
    return (
        conv.kernel_size == (_KERNEL, _KERNEL)
        and conv.stride == conv.dilation == conv.padding == (1, 1)
        and min(conv.in_channels, conv.out_channels) >= _FEWEST_CHANNELS * conv.groups
    )


@torch.no_grad()
def winograd_products(conv: nn.Conv2d) -> nn.Conv2d:
    """The 1x1 convolution of all planes, for a convolution that `suits_winograd`."""
    with torch.device("meta"):
        products = nn.Conv2d(
            _PLANES * conv.in_channels, _PLANES * conv.out_channels, 1, groups=_PLANES * conv.groups, bias=False
        )
    transform = torch.tensor(_WEIGHTS, dtype=torch.float64)
    weight = torch.einsum("ik,jl,ockl->ijoc", transform, transform, conv.weight.double())
    products.weight = nn.Parameter(weight.reshape(products.weight.shape).to(conv.weight), requires_grad=False)
    if conv.bias is not None:
        # The values of the planes of which the tile is 1 everywhere.
        ones = torch.linalg.pinv(torch.tensor(_OUTPUT, dtype=torch.float64)).sum(1)
        bias = torch.einsum("i,j,o->ijo", ones, ones, conv.bias.double())
        products.bias = nn.Parameter(bias.flatten().to(conv.bias), requires_grad=False)
    return products


class WinogradConv2d(nn.Module):
    """A 3x3 convolution that `suits_winograd`, and a ReLU where `relu` is True. For inference.

    Args:
        direct: the convolution, with its ReLU, for images of few tiles.
        products: its `winograd_products`.
        relu: whether a ReLU follows.

    Shape:
        (N, in_channels, H, W) to (N, out_channels, H, W); the output has channels last.
    """

    def __init__(self, direct: nn.Module, products: nn.Module, *, relu: bool) -> None:
        super().__init__()
        self.direct, self.products, self.relu = direct, products, relu
        self.out_channels = cast(int, products.out_channels) // _PLANES

    def forward(self, x: Tensor, term: Any = None) -> Tensor:
        """Convolve, and add a term, such as a shortcut, before the ReLU."""
        num_images, _, height, width = x.shape
        rows, columns = -(-height // _TILE), -(-width // _TILE)
        if num_images * rows * columns < _FEWEST_TILES:
            return self.direct(x) if term is None else self.direct(x, term)
        pixels = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)  # (N, H, W, C)
        at_a_time = max(min(_TILES_AT_A_TIME, _MOST_PRODUCTS // (_PLANES * self.out_channels)), 1)
        bands = min(max(rows * columns // at_a_time, 1), rows)
        batches = max(num_images * rows * columns // at_a_time, 1) if bands == 1 else num_images
        parts = []
        for image, end in _divide(num_images, min(batches, num_images)):
            for row, last in _divide(rows, bands):
                top, bottom = max(row * _TILE - 1, 0), min(last * _TILE + 1, height)
                part = pixels[image:end, top:bottom].reshape(-1, pixels.shape[3])
                size = min(last * _TILE, height) - row * _TILE
                to_planes, to_pixels = _transforms(end - image, row * _TILE - top, bottom - top, size, width)
                planes = _weighted_sums(part, to_planes).view(1, -1, columns, _PLANES * part.shape[1])
                products = self.products(planes.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
                parts.append(_weighted_sums(products.reshape(-1, self.out_channels), to_pixels))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        out = out.view(num_images, height, width, -1).permute(0, 3, 1, 2)
        if term is not None:
            out = out + term
        return out.relu_() if self.relu else out


def _divide(count: int, num_parts: int) -> list[tuple[int, int]]:
    """Beginnings and ends of parts whose sizes differ by one at most."""
    ends = [count * part // num_parts for part in range(num_parts + 1)]
    return list(pairwise(ends))


class _Sums(NamedTuple):
    """Weighted sums of rows of a matrix: of each, where it begins in the list of rows and their weights."""

    rows: Tensor
    begins: Tensor
    weights: Tensor


def _weighted_sums(matrix: Tensor, sums: _Sums) -> Tensor:
    return F.embedding_bag(sums.rows, matrix, sums.begins, mode="sum", per_sample_weights=sums.weights)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _transforms(num_images: int, above: int, height: int, size: int, width: int) -> tuple[_Sums, _Sums]:
    return _kept_transforms(num_images, above, height, size, width)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _kept_transforms(num_images: int, above: int, height: int, size: int, width: int) -> tuple[_Sums, _Sums]:
    """From pixels to planes and from products to pixels, for a band of the lines of several images.

    Args:
        num_images: how many there are.
        above: lines of the input above the first one of the output, 0 at the top of an image and else 1.
        height: lines of the input; those that are missing are zeros.
        size: lines of the output.
        width: of input and output, in pixels.
    """
    rows, columns = -(-size // _TILE), -(-width // _TILE)
    to_planes = _to_planes(num_images, above, height, rows, width)
    return to_planes, _to_pixels(num_images, rows, size, columns, width)


def _to_planes(num_images: int, above: int, height: int, rows: int, width: int) -> _Sums:
    """The same number of pixels for every tile; those outside the image weigh nothing."""
    columns = -(-width // _TILE)
    window = torch.arange(_POINTS) - 1
    y, x = (torch.arange(count)[:, None] * _TILE + window for count in (rows, columns))
    y += above
    inside = ((y >= 0) & (y < height))[:, None, :, None] & ((x >= 0) & (x < width))[:, None, :]
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    images = torch.arange(num_images).view(-1, 1, 1, 1, 1) * height
    pixels = (images + y[:, None, :, None]) * width + x[:, None, :]  # (images, rows, columns, 6, 6)

    transform = _in_both_directions(_INPUT)
    plane, pixel = transform.nonzero(as_tuple=True)
    pixels = pixels.flatten(-2)[..., pixel]
    weights = transform[plane, pixel] * inside.flatten(-2)[..., pixel]
    begins = torch.arange(num_images * rows * columns)[:, None] * len(plane)
    begins = begins + torch.searchsorted(plane, torch.arange(_PLANES))
    return _Sums(pixels.flatten().int(), begins.flatten().int(), weights.expand_as(pixels).flatten())


def _to_pixels(num_images: int, rows: int, size: int, columns: int, width: int) -> _Sums:
    """The sums of one row of tiles, line by line, and so of all, the last of which may have fewer lines."""
    x = torch.arange(width)
    weights = _in_both_directions(_OUTPUT).view(_TILE, _TILE, _PLANES)[:, x % _TILE]  # (4, width, 36)
    present = weights != 0
    planes = (x // _TILE * _PLANES)[:, None] + torch.arange(_PLANES)
    planes, weights = planes.expand_as(present)[present], weights[present]
    ends = present.sum(-1).flatten().cumsum(0)
    begins = F.pad(ends, (1, 0))[:-1]

    used = (rows - 1) * len(planes) + int(ends[(size - (rows - 1) * _TILE) * width - 1])  # of an image
    tiles = torch.arange(num_images * rows) * columns * _PLANES
    all_planes = (tiles[:, None] + planes).view(num_images, -1)[:, :used]
    begins = (torch.arange(rows)[:, None] * len(planes) + begins).flatten()[: size * width]
    all_begins = torch.arange(num_images)[:, None] * used + begins
    return _Sums(all_planes.flatten().int(), all_begins.flatten().int(), weights.repeat(rows)[:used].repeat(num_images))


def _in_both_directions(transform: list[list[float]]) -> Tensor:
    """A transform of lines and columns: (M, K) to (M * M, K * K)."""
    matrix = torch.tensor(transform, dtype=torch.float32)
    return torch.kron(matrix, matrix)
