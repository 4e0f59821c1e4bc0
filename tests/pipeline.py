"""A random SANA pipeline of toy size, which the tests load in place of the real weights.

It is made of the peers' own classes.
"""

import json

import pytorch_fid.inception as fid
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline
from diffusers import SanaTransformer2DModel
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from model import INSTRUCTION

SANA = {
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": 32,
    "mlp_ratio": 2.5,
    "qk_norm": "rms_norm_across_heads",
}
DC_AE = {
    "latent_channels": 8,
    "attention_head_dim": 8,
    "encoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [8, 16, 32],
    "decoder_block_out_channels": [8, 16, 32],
    "encoder_layers_per_block": [1, 1, 2],
    "decoder_layers_per_block": [1, 2, 1],
    "encoder_qkv_multiscales": [[], [], [5]],
    "decoder_qkv_multiscales": [[], [], [5]],
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
GEMMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
}
CORPUS = 4 * [
    "Remove the noise from this old photograph, please.\nIt has JPEG blocking   and  low light "
    "noise.",
    "a cat, a dog; the 3 birds & 42 trees",
    "naïve café déjà vu — größer, señor",
    "日本語のテキスト and 中文",
    "for (int i = 0; i < n; ++i) { sum += a[i]; }",
    INSTRUCTION,  # 135 tokens then; 675 if none of its words were known, and most of the time
]


def randomize(module, seed=0, scale=0.3):
    """Fill all weights at random, also those that start as zeros or ones; batch statistics too."""
    generator = torch.Generator().manual_seed(seed)
    statistics = [(name, b) for name, b in module.named_buffers() if "running" in name]
    with torch.no_grad():
        for name, p in [*module.named_parameters(), *statistics]:
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
            if name.endswith("running_var"):
                p.abs_().add_(0.5)
    return module.eval()


def random_inception():
    """Make pytorch-fid's network, its random weights of a size that keeps what passes through."""
    net = fid._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    net.Mixed_5b = fid.FIDInceptionA(192, pool_features=32)
    net.Mixed_5c = fid.FIDInceptionA(256, pool_features=64)
    net.Mixed_5d = fid.FIDInceptionA(288, pool_features=64)
    net.Mixed_6b = fid.FIDInceptionC(768, channels_7x7=128)
    net.Mixed_6c = fid.FIDInceptionC(768, channels_7x7=160)
    net.Mixed_6d = fid.FIDInceptionC(768, channels_7x7=160)
    net.Mixed_6e = fid.FIDInceptionC(768, channels_7x7=192)
    net.Mixed_7b = fid.FIDInceptionE_1(1280)
    net.Mixed_7c = fid.FIDInceptionE_2(2048)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.8, 1.2)
            module.bias.data.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.7, 1.3)
    return net.eval()


def vocabulary(size=600):
    """Make a vocabulary and merges of Gemma's kind.

    Five special tokens, 256 bytes, and what byte-pair encoding learns of CORPUS.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    names += [f"<0x{byte:02X}>" for byte in range(256)]
    names += sorted(model["vocab"], key=model["vocab"].get)
    vocab = {name: i for i, name in enumerate(names)}
    merges = [tuple(merge) for merge in model["merges"]]
    return vocab, merges


def tiny_pipeline():
    vocab, merges = vocabulary()
    tokenizer = GemmaTokenizer(
        vocab=vocab,
        merges=merges,
        add_bos_token=True,
        extra_special_tokens=["<start_of_turn>", "\n\n", "   "],
    )
    config = Gemma2Config(vocab_size=len(tokenizer), **GEMMA)
    gemma = randomize(Gemma2Model(config), 1, 0.1)
    autoencoder = randomize(AutoencoderDC(**DC_AE), 2, 0.1)
    transformer = randomize(SanaTransformer2DModel(**SANA), 3)
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return SanaPipeline(tokenizer, gemma, autoencoder, transformer, scheduler)
