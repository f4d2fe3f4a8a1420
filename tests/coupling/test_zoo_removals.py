"""The oracle on known architectures: some units of some groups of each, in float64."""

from __future__ import annotations

import random

import pytest
import torch

import graphopt as go
from benchmarks.removals import error_of, removals
from graphopt.analysis.coupling import couple
from tests import zoo

TRIES = 3

# What has to be found: groups, and the units of one of them by family.
GROUPS = {
    "resnet18": (12, "layer2.0.conv2", [128]),
    "resnext50_32x4d": (21, "layer1.0.conv1", [32, 8]),
    "densenet121": (120, "features.conv0", [64]),
    "mobilenet_v2": (25, "features.2.conv.0.0", [96]),
    "shufflenet_v2_x1_0": (21, "stage2.1.branch2.0", [58]),
    "convnext_tiny": (22, "features.1.0.block.3", [384]),
    "vit_b_16": (25, "encoder.layers.encoder_layer_0.self_attention", [64, 12]),
    "swin_t": (28, "features.1.0.attn.qkv", [3, 32]),
    "gpt2": (7, "transformer.h.0.attn.c_attn", [4, 32]),
    "llama": (7, "model.layers.0.self_attn.q_proj", [2, 24]),
}


# One of each kind; `python -m benchmarks.removals` goes through all groups of all nets.
NETS = (
    *GROUPS,
    "googlenet",
    "regnet_y_400mf",
    "mobilenet_v3_small",
    "squeezenet1_1",
    "bert",
)


@pytest.mark.parametrize("name", NETS)
def test_what_is_left_computes_what_the_masked_net_does(name: str) -> None:
    net = zoo.build(name)
    args = tuple(arg.double() if arg.is_floating_point() else arg for arg in net.args())
    coupling = couple(go.capture(net.module.double(), args, dynamic=net.dynamic))
    if name in GROUPS:
        count, group, families = GROUPS[name]
        assert len(coupling.groups) == count
        assert [len(family) for family in coupling.group(group).families] == families
    assert all(pinned.reasons for pinned in coupling.pinned)
    found = list(removals(coupling))
    for label, classes in random.Random(name).sample(found, min(TRIES, len(found))):
        error = error_of(coupling, classes, list(torch.utils._pytree.tree_leaves(args)))
        assert error <= 1e-9, f"{label}: {error:.1e}"
