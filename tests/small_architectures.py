"""Networks of torchvision, timm and transformers as people deploy them, small: random weights.

Each function builds one, as those in a user's own file do; `ROWS` says which images it takes and
which package it is from.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Row(NamedTuple):
    """One network of the table."""

    package: str
    side: int  # of its images
    cam: bool  # whether its head is a linear one on means of places
    attention: bool  # whether all its tokens attend to all, in every layer
    slow: bool = False


ROWS = {
    "tv_squeezenet": Row("torchvision", 64, True, False),
    "tv_resnet": Row("torchvision", 64, True, False, True),
    "tv_mobilenet": Row("torchvision", 64, True, False, True),
    "tv_densenet": Row("torchvision", 32, True, False, True),
    "tv_convnext": Row("torchvision", 64, True, False),
    "tv_swin": Row("torchvision", 32, True, False, True),
    "tv_maxvit": Row("torchvision", 32, False, False, True),
    "tv_vit": Row("torchvision", 32, False, True),
    "vit_class": Row("timm", 32, False, True),
    "vit_registers": Row("timm", 32, True, True),
    "deit_distilled": Row("timm", 32, False, True, True),
    "eva": Row("timm", 32, True, True, True),
    "beit": Row("timm", 32, True, True, True),
    "levit": Row("timm", 64, False, False, True),
    "hiera": Row("timm", 64, True, False, True),
    "xcit": Row("timm", 32, False, False, True),
    "mixer": Row("timm", 32, True, False),
    "convnext": Row("timm", 64, True, False, True),
    "swin": Row("timm", 32, True, False),
    "swin_v2": Row("timm", 32, True, False, True),
    "maxvit": Row("timm", 64, False, False, True),
    "efficientnet": Row("timm", 64, True, False, True),
    "regnet": Row("timm", 64, True, False, True),
    "poolformer": Row("timm", 64, True, False, True),
    "mobilenet_v3": Row("timm", 64, False, False, True),
    "edgenext": Row("timm", 64, True, False, True),
    "dpn": Row("timm", 64, True, False, True),  # its head is a convolution of one place
    "davit": Row("timm", 64, True, False, True),
    "caformer": Row("timm", 64, False, False, True),  # attention in the later stages alone
    "bit": Row("timm", 64, True, False, True),
    "hf_vit": Row("transformers", 32, False, True),
    "hf_swin": Row("transformers", 32, True, False, True),
    "hf_convnext": Row("transformers", 64, True, False, True),
    "hf_resnet": Row("transformers", 32, True, False, True),
}


def build(name: str) -> nn.Module:
    """A network of `ROWS`, with a last layer whose weights are not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: nn.Module = BUILDERS[name]()
        for parameter in network.parameters():
            if parameter.ndim > 1 and not bool(parameter.any()):
                nn.init.normal_(parameter, std=0.1)
    return network.eval()


def from_timm(name: str, **options: Any) -> nn.Module:
    network: nn.Module = import_module("timm").create_model(name, num_classes=5, **options)
    return network


def from_torchvision(name: str, *args: Any, **options: Any) -> nn.Module:
    models = import_module("torchvision.models")
    network: nn.Module = getattr(models, name)(*args, num_classes=5, **options)
    return network


class Logits(nn.Module):
    """A network of transformers as one that gives a tensor."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x).logits
        return logits


def from_transformers(name: str, **options: Any) -> nn.Module:
    package = import_module("transformers")
    config = getattr(package, f"{name}Config")(num_labels=5, **options)
    return Logits(getattr(package, f"{name}ForImageClassification")(config))


VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
HF = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
BUILDERS: dict[str, Any] = {
    "tv_squeezenet": lambda: from_torchvision("squeezenet1_1"),
    "tv_resnet": lambda: from_torchvision("resnet18"),
    "tv_mobilenet": lambda: from_torchvision("mobilenet_v2", width_mult=0.25),
    "tv_densenet": lambda: from_torchvision("DenseNet", 8, (1, 1, 1), 16),
    "tv_convnext": lambda: small_torchvision_convnext(),
    "tv_swin": lambda: from_torchvision("SwinTransformer", [2, 2], 12, [1, 2], [1, 2], [4, 4]),
    "tv_maxvit": lambda: from_torchvision("MaxVit", (32, 32), 8, 4, [8, 16], [1, 1], 4, 0.0),
    "tv_vit": lambda: from_torchvision("VisionTransformer", 32, 8, 2, 2, 24, 48),
    "vit_class": lambda: from_timm("vit_tiny_patch16_224", **VIT),
    "vit_registers": lambda: from_timm("vit_base_patch16_reg4_gap_256", **VIT),
    "deit_distilled": lambda: from_timm("deit_tiny_distilled_patch16_224", **VIT),
    "eva": lambda: from_timm("eva02_tiny_patch14_224", **VIT),
    "beit": lambda: from_timm("beit_base_patch16_224", **VIT),
    "levit": lambda: from_timm("levit_128s", img_size=64),
    "hiera": lambda: from_timm("hiera_tiny_224", img_size=64, embed_dim=8, stages=(1, 1, 1, 1)),
    "xcit": lambda: from_timm("xcit_nano_12_p8_224", img_size=32, depth=2, embed_dim=16),
    "mixer": lambda: small_mixer(),
    "convnext": lambda: from_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 8, 16, 32)),
    "swin": lambda: small_swin("swin_tiny_patch4_window7_224"),
    "swin_v2": lambda: small_swin("swinv2_tiny_window8_256"),
    "maxvit": lambda: from_timm("maxvit_rmlp_pico_rw_256", img_size=64),
    "efficientnet": lambda: from_timm("efficientnet_b0"),
    "regnet": lambda: from_timm("regnety_002"),
    "poolformer": lambda: from_timm("poolformer_s12"),
    "mobilenet_v3": lambda: from_timm("mobilenetv3_small_050"),
    "edgenext": lambda: from_timm("edgenext_xx_small"),
    "dpn": lambda: small_dpn(),
    "davit": lambda: from_timm(
        "davit_tiny", depths=(1, 1, 1, 1), embed_dims=(8, 16, 32, 64), num_heads=(1, 1, 2, 2)
    ),
    "caformer": lambda: small_caformer(),
    "bit": lambda: small_bit(),
    "hf_vit": lambda: from_transformers("ViT", image_size=32, patch_size=8, **HF),
    "hf_swin": lambda: from_transformers(
        "Swin",
        image_size=32,
        patch_size=2,
        embed_dim=12,
        depths=[1, 2],
        num_heads=[1, 2],
        window_size=4,
    ),
    "hf_convnext": lambda: from_transformers(
        "ConvNext", hidden_sizes=[4, 8, 16, 32], depths=[1, 1, 1, 1]
    ),
    "hf_resnet": lambda: from_transformers(
        "ResNet",
        embedding_size=8,
        hidden_sizes=[8, 16, 32],
        depths=[1, 1, 1],
        layer_type="basic",
    ),
}


def small_torchvision_convnext() -> nn.Module:
    module = import_module("torchvision.models.convnext")
    blocks = [module.CNBlockConfig(8, 16, 1), module.CNBlockConfig(16, None, 1)]
    network: nn.Module = module.ConvNeXt(blocks, num_classes=5)
    return network


def small_dpn() -> nn.Module:
    module = import_module("timm.models.dpn")
    sizes = {"k_sec": (1, 1, 1, 1), "inc_sec": (8, 16, 16, 32), "k_r": 16, "groups": 4}
    network: nn.Module = module.DPN(**sizes, num_init_features=8, small=True, num_classes=5)
    return network


def small_caformer() -> nn.Module:
    module = import_module("timm.models.metaformer")
    network: nn.Module = module.MetaFormer(
        depths=(1, 1, 1, 1),
        dims=(8, 16, 32, 64),
        token_mixers=[module.SepConv] * 2 + [module.Attention] * 2,
        norm_layers=[module.LayerNorm2dNoBias] * 2 + [module.LayerNormNoBias] * 2,
        num_classes=5,
    )
    return network


def small_bit() -> nn.Module:
    layers = import_module("timm.layers")
    network: nn.Module = import_module("timm.models.resnetv2").ResNetV2(
        layers=(1, 1, 1, 1),
        channels=(128, 128, 128, 128),
        stem_chs=32,
        stem_type="fixed",
        conv_layer=partial(layers.StdConv2d, eps=1e-8),
        num_classes=5,
    )
    return network


def small_mixer() -> nn.Module:
    module = import_module("timm.models.mlp_mixer")
    network: nn.Module = module.MlpMixer(
        num_classes=5, img_size=32, patch_size=8, num_blocks=2, embed_dim=24
    )
    return network


def small_swin(name: str) -> nn.Module:
    return from_timm(
        name,
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=12,
        depths=(1, 2),
        num_heads=(1, 2),
    )


# each by its name, as a user's file has them
for _name in ROWS:
    globals()[_name] = lambda _name=_name: build(_name)
