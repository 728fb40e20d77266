"""INT8 static quantisation of ONNX files, by onnxruntime's own tools.

Weights become int8, with a scale for each output channel; activations uint8, with one scale a tensor, from the range
that calibration images give it. A layer's sums are exact integers: what is lost is the rounding of what goes into it.
Which nodes become integer is read from the graph, see `find_integer_nodes`.

Papers: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv 1712.05877; the ranges of "entropy": Migacz, "8-bit Inference with TensorRT", GTC 2017.
"""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from resnest_det.deploy.export import checked_output, write_whole
from resnest_det.deploy.onnx_model import open_session, required

CalibrationMethod = Literal["minmax", "entropy", "percentile"]

_METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}  # as onnxruntime spells them
_PERCENTILE = 99.999  # of a tensor's values that "percentile" covers
_LAYERS = ("Conv", "Gemm", "MatMul")
# What uint8 kernels run on feature maps, in NHWC, the layout of onnxruntime's integer convolutions. That of AveragePool
# is slower than float32's, and GlobalAveragePool's rounds what attention is made of.
_BETWEEN_LAYERS = ("Relu", "MaxPool", "Add", "Mul", "Concat", "Split", "Slice", "Resize")
# Which inputs carry features, where not all do: the others say where or how much to read.
_FEATURE_INPUTS = {
    **dict.fromkeys(("RoiAlign", "Gather", "GatherElements", "GatherND", "Slice", "Reshape", "Expand", "Resize"), (0,)),
    **dict.fromkeys(("Tile", "Squeeze", "Unsqueeze", "Pad", "Split"), (0,)),
    **dict.fromkeys(("ScatterND", "ScatterElements"), (0, 2)),
    "Where": (1, 2),
}
_WITHOUT_FEATURES = ("Shape", "Size", "NonZero", "TopK", "NonMaxSuppression", "ArgMax", "ConstantOfShape")


@dataclass(frozen=True, slots=True)
class IntegerNodes:
    """Which nodes of a graph are integer, by their names.

    Attributes:
        layers: convolutions and fully connected layers.
        between: what lies between them.
        last: layers that stay in float32 as no layer comes after them: they give logits and boxes.
        last_maps: the convolutions among these that see the image. They give numbers for each place, which can be
            compared: what heads give that see regions depends on a detector's proposals.
        pooled: convolutions that stay in float32 as they see one place only, or channels: attention's.
    """

    layers: tuple[str, ...]
    between: tuple[str, ...]
    last: tuple[str, ...]
    last_maps: tuple[str, ...]
    pooled: tuple[str, ...]


def quantize_onnx(
    model_path: str | Path,
    output: str | Path,
    calibration: Iterable[NDArray[np.float32]],
    *,
    method: CalibrationMethod = "minmax",
    per_channel: bool = True,
) -> IntegerNodes:
    """Write the INT8 form of a float32 ONNX file. Its inputs and outputs stay what they were.

    Args:
        model_path: a file with one input and BatchNorm folded, as export_onnx writes it.
        output: the file to write, which ends in .onnx; one that is there is replaced when all is done.
        calibration: images as the file's input takes them, at least one. A few dozen of the training set are usual.
        method: the range of a tensor that the 8 bits cover: "minmax" all that was seen; "percentile" all but the
            outermost 0.001 % of the values; "entropy" what changes their distribution least. The last two keep
            histograms, and take several times as long.
        per_channel: a scale for each output channel of a weight, rather than one for all of it.

    Returns:
        Which nodes became integer.

    Raises:
        FileNotFoundError: there is no such file, or no folder for the output.
        OSError: the output cannot be written.
        ValueError: onnxruntime is not installed; the output has another ending; the method is unknown; there are no
            images, or one does not fit the input; the file has several inputs, is quantised already, or has nothing to
            quantise. What stood at `output` stays then.
    """
    if method not in get_args(CalibrationMethod):
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(get_args(CalibrationMethod))}")
    onnx, quantization = required("onnx"), required("onnxruntime.quantization")
    model_path, output = Path(model_path), checked_output(output, ".onnx")
    if not model_path.is_file():
        raise FileNotFoundError(f"there is no ONNX file {model_path}; write one with export_onnx")
    with tempfile.TemporaryDirectory() as folder, _quietly():
        prepared, quantized = Path(folder) / "prepared.onnx", Path(folder) / "quantized.onnx"
        # Symbolic shapes end at the sizes that depend on data; the shapes that are asked for here are plain ones.
        quantization.quant_pre_process(model_path, prepared, skip_symbolic_shape=True)
        model = onnx.load(prepared)
        reader = _CalibrationReader(model.graph, calibration)
        nodes = find_integer_nodes(model)
        chosen = {*nodes.layers, *nodes.between}
        quantization.quantize_static(
            prepared,
            quantized,
            reader,
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=per_channel,
            nodes_to_quantize=sorted(chosen),
            op_types_to_quantize=sorted({node.op_type for node in model.graph.node if node.name in chosen}),
            calibrate_method=quantization.CalibrationMethod[_METHODS[method]],
            # One image at a time: all the maps of all images would take gigabytes.
            extra_options={"CalibStridedMinMax": 1, "CalibPercentile": _PERCENTILE},
        )
        model = onnx.load(quantized)
    metadata = {entry.key: entry.value for entry in onnx.load(model_path).metadata_props}
    metadata.pop("checks", None)  # by which export_onnx found the float32 file to be right
    metadata["quantization"] = f"int8, {method} over {len(reader)} images"
    onnx.helper.set_model_props(model, metadata)
    write_whole(output, model.SerializeToString())
    return nodes


def find_integer_nodes(model: Any) -> IntegerNodes:
    """Decide which nodes of a float32 graph become integer.

    All convolutions and fully connected layers do, but for those

    - after which no other layer comes: an error in a logit or a box is an error of the result, and nothing after it
      evens it out. Whether a layer comes after another is asked of its features: that proposals, which are boxes, say
      where a detector's heads look makes the proposing layers no less the last ones.
    - over one place: attention's, which cost nothing, and whose error would be that of a whole channel.

    Additions, products, poolings and the like become integer where they lie between such layers: a feature map is
    rounded once, and is never float32. Everything else, such as what makes boxes of a detector's numbers, stays.

    Args:
        model: an onnx.ModelProto with shapes inferred, as quant_pre_process writes it. Nodes must have names.

    Raises:
        ValueError: the graph is quantised already, or no layer of it can be integer.
    """
    graph = model.graph
    if any(node.op_type == "QuantizeLinear" for node in graph.node):
        raise ValueError("the ONNX file is quantised already; give the float32 file")
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    layers = [node for node in graph.node if node.op_type in _LAYERS and node.input[1] in constants]

    leading: set[str] = set()  # tensors whose features reach a layer
    for node in reversed(graph.node):
        if node in layers:
            leading.add(node.input[0])
        elif node.op_type not in _WITHOUT_FEATURES and leading.intersection(node.output):
            leading.update(_features(node))
    single = {value.name for value in graph.value_info if _is_one_place(value)}
    pooled = [node for node in layers if node.op_type == "Conv" and node.output[0] in single]
    last = [node for node in layers if node not in pooled and node.output[0] not in leading]
    integer = [node for node in layers if node not in pooled and node not in last]
    if not integer:
        raise ValueError(
            f"the ONNX file has {len(layers)} layers with weights, and none that is followed by another: nothing to "
            f"quantise"
        )

    wanted = {node.input[0] for node in layers if node not in pooled}
    # A ReLU is part of the layer before it, whatever comes after: 8 bits are not spent on what it makes 0.
    wanted |= {name for node in graph.node if node.op_type == "Relu" for name in node.output}
    candidates = []
    for node in reversed(graph.node):
        if _can_be_between(node, constants) and wanted.intersection(node.output):
            candidates.append(node)
            wanted.update(_features(node))
    made = {node.output[0] for node in integer}
    between = []
    for node in reversed(candidates):
        if made.intersection(_features(node)):
            between.append(node)
            made.update(node.output)
    regional: set[str] = set()  # tensors that are made of regions
    for node in graph.node:
        if node.op_type == "RoiAlign" or regional.intersection(node.input):
            regional.update(node.output)
    last_maps = [node for node in last if node.op_type == "Conv" and node.input[0] not in regional]
    return IntegerNodes(*(tuple(node.name for node in part) for part in (integer, between, last, last_maps, pooled)))


def cosine_similarities(
    reference: str | Path,
    other: str | Path,
    images: Iterable[NDArray[np.float32]],
    *,
    nodes: Sequence[str] = (),
) -> list[float]:
    """How alike two files' outputs are: for each image the cosine similarity of the output that is least alike.

    Args:
        reference: an ONNX file.
        other: one with the same input and outputs, such as its quantised form.
        images: as the files' input takes them.
        nodes: compare the first outputs of these nodes of both files, not the files' own outputs. Those of a detector
            are boxes in the order of their scores, which two nearly equal scores reverse.

    Raises:
        ValueError: onnxruntime is not installed, or a file has no node of that name.
    """
    runs = [_runner(path, nodes) for path in (reference, other)]
    similarities = []
    for image in images:
        pairs = zip(*(run(image) for run in runs), strict=True)
        similarities.append(min(_cosine(one, two) for one, two in pairs))
    return similarities


class _CalibrationReader:
    """The images as onnxruntime's calibration asks for them: a CalibrationDataReader by what it can do."""

    def __init__(self, graph: Any, images: Iterable[NDArray[np.float32]]) -> None:
        constants = {tensor.name for tensor in graph.initializer}
        inputs = [value for value in graph.input if value.name not in constants]
        if len(inputs) != 1:
            names = ", ".join(value.name for value in inputs)
            raise ValueError(f"the ONNX file has {len(inputs)} inputs, {names}; a file with one can be quantised")
        self._name = inputs[0].name
        self._images = list(images)
        if not self._images:
            raise ValueError("there are no calibration images; give at least one, and better a few dozen")
        shape = [dim.dim_value or None for dim in inputs[0].type.tensor_type.shape.dim]  # None: any size
        for number, image in enumerate(self._images):
            fits = len(image.shape) == len(shape) and all(
                expected in (None, size) for size, expected in zip(image.shape, shape, strict=True)
            )
            if image.dtype != np.float32 or not fits:
                wanted = ", ".join("any" if size is None else str(size) for size in shape)
                raise ValueError(
                    f"calibration image {number} is {image.dtype} {image.shape}, and the ONNX file takes float32 "
                    f"({wanted})"
                )
        self.set_range(0, len(self._images))

    def __len__(self) -> int:
        return len(self._images)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._images[start_index:end_index])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        image = next(self._left, None)
        return None if image is None else {self._name: image}


@contextmanager
def _quietly() -> Iterator[None]:
    """onnxruntime's tools print the progress of histograms, and log advice that was followed already."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.root.setLevel(level)


def _features(node: Any) -> list[str]:
    places = _FEATURE_INPUTS.get(node.op_type)
    return [name for place, name in enumerate(node.input) if places is None or place in places]


def _can_be_between(node: Any, constants: set[str]) -> bool:
    if node.op_type not in _BETWEEN_LAYERS or constants.intersection(_features(node)):
        return False
    modes = [attribute.s for attribute in node.attribute if attribute.name == "mode"]
    return node.op_type != "Resize" or modes in ([], [b"nearest"])  # integers would round what is interpolated


def _is_one_place(value: Any) -> bool:
    """Whether a tensor is (N, C, 1, 1), or of three axes, as ECA's are, one of which is the channels."""
    sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    return sizes[2:] == [1, 1] or len(sizes) == 3


def _runner(path: str | Path, nodes: Sequence[str]) -> Any:
    """A function from an image to the outputs of a file, or of nodes of it."""
    onnx = required("onnx")
    model = onnx.load(path)
    names = [value.name for value in model.graph.output]
    if nodes:
        outputs: Mapping[str, str] = {node.name: node.output[0] for node in model.graph.node}
        if unknown := [name for name in nodes if name not in outputs]:
            raise ValueError(f"{path} has no node {unknown[0]!r}; its nodes are such as {next(iter(outputs))!r}")
        names = [outputs[name] for name in nodes]
        present = {value.name for value in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    session = open_session(model.SerializeToString())
    return lambda image: session.run(names, {session.get_inputs()[0].name: image})


def _cosine(one: NDArray[Any], other: NDArray[Any]) -> float:
    a, b = (array.astype(np.float64).ravel() for array in (one, other))
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms > 0 else float(np.array_equal(a, b))
