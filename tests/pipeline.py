"""A random SANA pipeline of toy size, made of the peers' own classes: what the tests load in place of the real weights."""
import json

import pytorch_fid.inception as fid
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

SANA = dict(in_channels=8, out_channels=8, num_layers=2, num_attention_heads=3, attention_head_dim=8, num_cross_attention_heads=2,
            cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=32, mlp_ratio=2.5, qk_norm="rms_norm_across_heads")
DC_AE = dict(latent_channels=8, attention_head_dim=8, encoder_block_types=["ResBlock", "ResBlock", "EfficientViTBlock"],
             decoder_block_types=["ResBlock", "ResBlock", "EfficientViTBlock"], encoder_block_out_channels=[8, 16, 32],
             decoder_block_out_channels=[8, 16, 32], encoder_layers_per_block=[1, 1, 2], decoder_layers_per_block=[1, 2, 1],
             encoder_qkv_multiscales=[[], [], [5]], decoder_qkv_multiscales=[[], [], [5]], downsample_block_type="Conv",
             upsample_block_type="interpolate", scaling_factor=0.41407)
GEMMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             query_pre_attn_scalar=16)
CORPUS = ["Remove the noise from this old photograph, please.\nIt has JPEG blocking   and  low light noise.", "a cat, a dog; the 3 birds & 42 trees",
          "naïve café déjà vu — größer, señor", "日本語のテキスト and 中文", "for (int i = 0; i < n; ++i) { sum += a[i]; }",
          "Given a user prompt, generate an enhanced prompt that provides detailed visual descriptions"] * 4


def randomize(module, seed=0, scale=0.3):
    """Random weights everywhere, also where a fresh module has zeros or ones; batch statistics too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        batch_statistics = [(name, b) for name, b in module.named_buffers() if "running" in name]
        for name, p in [*module.named_parameters(), *batch_statistics]:
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
            if name.endswith("running_var"):
                p.abs_().add_(0.5)
    return module.eval()


def random_inception():
    """pytorch-fid's network, with random weights that keep the size of what passes through."""
    net = fid._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    for name, width, pool in (("b", 192, 32), ("c", 256, 64), ("d", 288, 64)):
        setattr(net, f"Mixed_5{name}", fid.FIDInceptionA(width, pool_features=pool))
    for name, inner in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
        setattr(net, f"Mixed_6{name}", fid.FIDInceptionC(768, channels_7x7=inner))
    net.Mixed_7b, net.Mixed_7c = fid.FIDInceptionE_1(1280), fid.FIDInceptionE_2(2048)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.8, 1.2), module.bias.data.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.7, 1.3)
    return net.eval()


def vocabulary(size=600):
    """(vocab, merges) of Gemma's kind: four special tokens, 256 bytes, and what byte-pair encoding learns of CORPUS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"] + [f"<0x{byte:02X}>" for byte in range(256)] + sorted(model["vocab"], key=model["vocab"].get)
    return {name: i for i, name in enumerate(names)}, [tuple(merge) for merge in model["merges"]]


def tiny_pipeline():
    vocab, merges = vocabulary()
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, extra_special_tokens=["<start_of_turn>", "\n\n", "   "])
    gemma = randomize(Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), **GEMMA)), 1, 0.1)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(tokenizer, gemma, randomize(AutoencoderDC(**DC_AE), 2, 0.1),
                        randomize(SanaTransformer2DModel(**SANA), 3), scheduler)
