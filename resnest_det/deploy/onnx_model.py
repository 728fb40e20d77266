"""ONNX files in the place of the models that they are of, run by ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class OnnxModel(nn.Module):
    """An ONNX file in the place of its model, so that what evaluates or times the one does so with the other.

    Args:
        path: a file with one input: images (N, 3, H, W), or as that of a detector an image (3, H, W).

    Shape:
        Images (N, 3, H, W), or a list of (3, H, W), on the CPU. A file that takes them at once gives a dict of its
        outputs; one that takes an image, and then runs on one after the other, a list of such dicts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: onnxruntime is not installed, or the file is none of ONNX's or has another input; when called, the
            file takes other images, such as bytes, or one size only.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}; write it with resnest-det export")
        self._session = open_session(path)
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) not in (3, 4):
            shapes = ", ".join(f"{own.name} {own.shape}" for own in inputs)
            raise ValueError(f"{path} has the inputs {shapes}; expected one, images (N, 3, H, W) or an image (3, H, W)")
        self._path, self._input = path, inputs[0]
        self._output_names = [own.name for own in self._session.get_outputs()]
        self.eval()

    def forward(self, images: Tensor | Sequence[Tensor]) -> Any:
        """Run the file."""
        if len(self._input.shape) == 3:
            return [self._run(image) for image in images]
        return self._run(images if isinstance(images, Tensor) else torch.stack(list(images)))

    def _run(self, images: Tensor) -> dict[str, Tensor]:
        array = images.contiguous().numpy()
        try:
            outputs = self._session.run(None, {self._input.name: array})
        except Exception as error:  # of a class of its own for each cause
            raise ValueError(
                f"{self._path} takes {self._input.type} {self._input.shape}, and does not run on {array.dtype} "
                f"{array.shape}; give images that it takes (--batch, --size), or export it without --uint8 and "
                f"--fixed-size"
            ) from error
        return {name: torch.from_numpy(output) for name, output in zip(self._output_names, outputs, strict=True)}


def open_session(model: str | Path | bytes) -> Any:
    """A session of ONNX Runtime on the CPU, with as many threads as torch has.

    Args:
        model: an ONNX file, or its content.

    Raises:
        ValueError: onnxruntime is not installed, or does not take the model.
    """
    runtime = required("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors: of shapes it only guesses, it warns at length
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads would slow down what is next
    try:
        return runtime.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # of a class of its own for each cause
        name = "the ONNX model" if isinstance(model, bytes) else model
        raise ValueError(f"{name} cannot be read by ONNX Runtime: {error}") from error


def required(module: str) -> Any:
    """A module of onnx or onnxruntime, which the package does not depend on.

    Raises:
        ValueError: it cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"ONNX files need {module.partition('.')[0]}, which cannot be imported ({error}); install "
            f"resnest-det[export]"
        ) from error
