"""Attention layers and normalisation: small modules, one paper to a file."""

from resnest_det.layers.cbam import CBAM, ChannelAttention, SpatialAttention
from resnest_det.layers.eca import EfficientChannelAttention
from resnest_det.layers.fused import plain_layers
from resnest_det.layers.norm import (
    NormLayer,
    NormName,
    describe_norms,
    group_norm,
    norm_layer,
    norm_warnings,
    pooled_group_norm,
)
from resnest_det.layers.selective_kernel import SelectiveKernelConv2d
from resnest_det.layers.split_attention import SplitAttentionConv2d, use_triton
from resnest_det.layers.squeeze_excitation import SqueezeExcitation
from resnest_det.layers.sync_batch_norm import SyncBatchNorm

__all__ = [
    "CBAM",
    "ChannelAttention",
    "EfficientChannelAttention",
    "NormLayer",
    "NormName",
    "SelectiveKernelConv2d",
    "SpatialAttention",
    "SplitAttentionConv2d",
    "SqueezeExcitation",
    "SyncBatchNorm",
    "describe_norms",
    "group_norm",
    "norm_layer",
    "norm_warnings",
    "plain_layers",
    "pooled_group_norm",
    "use_triton",
]
