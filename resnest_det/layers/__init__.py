"""Attention layers and normalisation: small modules, one paper to a file."""

from resnest_det.layers.norm import NormLayer, NormName, group_norm, norm_layer, pooled_group_norm
from resnest_det.layers.split_attention import SplitAttentionConv2d

__all__ = [
    "NormLayer",
    "NormName",
    "SplitAttentionConv2d",
    "group_norm",
    "norm_layer",
    "pooled_group_norm",
]
