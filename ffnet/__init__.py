"""FFNet models in PyTorch (arXiv 2406.02021).

>>> model = ffnet.create_model("ffnet_1", checkpoint="ffnet_1.pth").eval()
>>> fused = ffnet.reparameterize(model)  # same outputs, plain convolutions
"""

from .backbone import FFNetBackbone
from .checkpoint import KeyReport, load_checkpoint
from .folding import reparameterize
from .forecasting import ForecastFFNet, ffnet_ts
from .mixers import MetaMixer, conv_ffn_mixer, ffnified_attention_mixer, self_attention_mixer
from .model import FFNet, ffnet_1, ffnet_2, ffnet_3, ffnet_4
from .pretrained import from_pretrained, push_to_hub, save_pretrained
from .profile import count_macs, count_parameters
from .registry import create_model, list_models
from .segmentation import FFNetSeg, UPerNet, ffnet_seg
from .super_resolution import FFNetSR, ffnet_sr_large, ffnet_sr_light, upscale
from .timm_registry import register_timm, register_when_imported

__all__ = [
    "FFNet",
    "FFNetBackbone",
    "FFNetSR",
    "FFNetSeg",
    "ForecastFFNet",
    "KeyReport",
    "MetaMixer",
    "UPerNet",
    "conv_ffn_mixer",
    "count_macs",
    "count_parameters",
    "create_model",
    "ffnet_1",
    "ffnet_2",
    "ffnet_3",
    "ffnet_4",
    "ffnet_seg",
    "ffnet_sr_large",
    "ffnet_sr_light",
    "ffnet_ts",
    "ffnified_attention_mixer",
    "from_pretrained",
    "list_models",
    "load_checkpoint",
    "push_to_hub",
    "register_timm",
    "reparameterize",
    "save_pretrained",
    "self_attention_mixer",
    "upscale",
]

register_when_imported()
