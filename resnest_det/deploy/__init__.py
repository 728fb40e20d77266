"""From a trained model to one that is deployed: folded, packed, exported, quantised; and how fast it is.

onnx and onnxruntime, which files need, are imported where they are used.
"""

from resnest_det.deploy.benchmark import interleaved
from resnest_det.deploy.export import Check, Export, NormalisedNetwork, export_onnx, export_program
from resnest_det.deploy.folding import fold_batch_norms
from resnest_det.deploy.inference import optimize_for_inference
from resnest_det.deploy.integer_form import integer_form
from resnest_det.deploy.onnx_form import onnx_form
from resnest_det.deploy.onnx_model import OnnxModel
from resnest_det.deploy.quantization import IntegerNodes, cosine_similarities, quantize_onnx

__all__ = [
    "Check",
    "Export",
    "IntegerNodes",
    "NormalisedNetwork",
    "OnnxModel",
    "cosine_similarities",
    "export_onnx",
    "export_program",
    "fold_batch_norms",
    "integer_form",
    "interleaved",
    "onnx_form",
    "optimize_for_inference",
    "quantize_onnx",
]
