"""Text against its peers: the tokenizer against tokenizers, Gemma-2 against transformers.

And the encoding of prompts against diffusers.
"""

import inspect
import json
import random

import pytest
import torch
from diffusers import SanaPipeline
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors
from transformers import Gemma2Config, Gemma2Model

from degrade import UserError
from model import INSTRUCTION, Gemma2, GemmaTokenizer, Sana, encode_prompts, pad_text
from pipeline import CORPUS, GEMMA, randomize, vocabulary
from vae import load_pretrained

# --------------------------------------------------------------------------------------------------
# The tokenizer.

ADDED = ["<start_of_turn>", "\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁▁", "\t", "</b>", "<bos>", "<pad>"]


def peer_tokenizer(split):
    """split: at the spaces, of which the normalizer leaves none."""
    vocab, merges = vocabulary()
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    peer = Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    peer.normalizer = normalizers.Replace(" ", "▁")
    if split:
        peer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    peer.decoder = decoders.Sequence(steps)
    peer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    peer.add_tokens([AddedToken(content, normalized=False) for content in ADDED])
    return peer


WORDS = " ".join(CORPUS).split()


def draw_piece(rng):
    """Draw what a prompt may hold, and what it hardly does: each of nine kinds as often."""
    low, high = rng.choice([(32, 0xD7FF), (0xE000, 0x10FFFF)])  # between them are surrogates
    pieces = [
        rng.choice(WORDS),
        " " * rng.randint(1, 9),
        "\n" * rng.randint(1, 5),
        rng.choice(ADDED),
        rng.choice(ADDED)[:-1],
        chr(rng.randint(0, 31)),
        chr(rng.randint(low, high)),
        rng.choice("😀👨‍👩‍👧🏽é한▁"),
        "".join(rng.choices("abcdetnorsi ", k=rng.randint(1, 30))),
    ]
    return rng.choice(pieces)


def fuzzed(count, seed):
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        pieces = [draw_piece(rng) for _ in range(rng.randint(0, 12))]
        texts.append("".join(pieces))
    return texts


@pytest.mark.parametrize("split, merges_as_strings", [(True, False), (False, True)])
def test_tokenizer_gives_the_ids_of_the_tokenizers_library(tmp_path, split, merges_as_strings):
    peer = peer_tokenizer(split)
    spec = json.loads(peer.to_str())
    if merges_as_strings:
        spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    ours = GemmaTokenizer(tmp_path)
    used = set()
    for text in fuzzed(5000, seed=int(split)) + ["", " ", "\ud7ff", INSTRUCTION * 3]:
        ids = ours.encode(text)
        assert ids == peer.encode(text).ids, repr(text)
        used.update(ids)
    assert len(used) > 300  # of 571: most merges are steps to longer ones


def test_one_place_is_merged_at_a_time(tmp_path):
    """Here abc can be made in two ways, and abca is learnt between them."""
    merges = [("b", "c"), ("ab", "c"), ("abc", "a"), ("a", "bc")]
    tokens = ["<unk>", "<bos>", "a", "b", "c", "ab", "bc", "abc", "abca"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: i for i, token in enumerate(tokens)}
    peer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    peer.normalizer = normalizers.Replace(" ", "▁")
    peer.add_special_tokens(["<bos>"])
    (tmp_path / "tokenizer.json").write_text(peer.to_str())
    ids = GemmaTokenizer(tmp_path).encode("abcabc")
    assert ids == [vocab["<bos>"], *peer.encode("abcabc").ids]
    assert ids == [vocab[token] for token in ("<bos>", "abca", "bc")]


def test_tokenizers_of_another_kind_are_refused(tmp_path):
    spec = json.loads(peer_tokenizer(True).to_str())
    stripping = {"id": 9, "content": "x", "lstrip": True}
    changes = [
        ({"normalizer": None}, "normalizer"),
        ({"model": spec["model"] | {"type": "Unigram"}}, "Unigram"),
        ({"model": spec["model"] | {"ignore_merges": True}}, "ignore_merges"),
        ({"added_tokens": spec["added_tokens"] + [stripping]}, "'x'"),
    ]
    for change, word in changes:
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec | change))
        with pytest.raises(UserError, match=word):
            GemmaTokenizer(tmp_path)


# --------------------------------------------------------------------------------------------------
# Gemma-2.

CHANGES = [
    {},
    {"hidden_size": 52, "head_dim": 8, "num_key_value_heads": 4},
    {"attn_logit_softcapping": None},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
]


@pytest.mark.parametrize("change", CHANGES)
def test_gemma_computes_what_transformers_computes(tmp_path, change):
    eager = {"attn_implementation": "eager"}
    config = Gemma2Config(vocab_size=90, **eager, **GEMMA | change)
    theirs = randomize(Gemma2Model(config), scale=0.4)
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, 90, (3, 21), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(21) < torch.tensor([21, 13, 1])[:, None]

    def compute(network):
        return network(ids, attention_mask=mask.long()).last_hidden_state[mask]

    with torch.no_grad():
        expected = compute(theirs)
        got = load_pretrained(Gemma2, tmp_path)(ids, mask)[mask]
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
        # in bf16 every rounding falls on the same place: bit for bit
        theirs = Gemma2Model.from_pretrained(tmp_path, dtype=torch.bfloat16, **eager)
        half = load_pretrained(Gemma2, tmp_path, torch.bfloat16)(ids, mask)[mask]
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, compute(theirs))


def test_full_size_gemma_has_the_published_number_of_tensors_and_parameters():
    with torch.device("meta"):
        full = Gemma2({})
    assert len(full.state_dict()) == 288
    assert sum(p.numel() for p in full.parameters()) == 2_614_341_888


def test_gemma_refuses_what_it_does_not_compute():
    for change in ({"rope_parameters": {"rope_type": "yarn"}}, {"attention_bias": True}):
        with pytest.raises(ValueError, match="yarn|attention_bias"):
            Gemma2(GEMMA | {"vocab_size": 9} | change)
    gemma = Gemma2(GEMMA | {"vocab_size": 9, "sliding_window": 4})
    with pytest.raises(UserError, match="5 tokens"):
        gemma(torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 5))


# --------------------------------------------------------------------------------------------------
# Prompts.


def test_instruction_is_the_pipelines():
    parameters = inspect.signature(SanaPipeline.__call__).parameters
    default = parameters["complex_human_instruction"].default
    assert "\n".join(default) == INSTRUCTION


def encode_as_diffusers(pipeline, prompt):
    """Return the embedding and its mask, 300 positions of which the last are padding."""
    options = {"complex_human_instruction": INSTRUCTION.split("\n")}
    if prompt:
        text, mask, *_ = pipeline.encode_prompt([prompt], False, **options)
    else:  # only the negative prompt stands without the instruction
        options["negative_prompt"] = ""
        _, _, text, mask = pipeline.encode_prompt(["x"], True, **options)
    assert text.shape[1] == mask.shape[1] == 300
    return text[0], mask[0].bool()


def encode_here(pipeline_folder, prompts):
    tokenizer = GemmaTokenizer(pipeline_folder / "tokenizer")
    gemma = load_pretrained(Gemma2, pipeline_folder / "text_encoder")
    return encode_prompts(tokenizer, gemma, prompts, batch_size=3)


def test_prompts_are_encoded_as_the_pipeline_does(pipeline, pipeline_folder, capsys):
    prompts = ["  Remove NOISE\nand jpeg   artifacts. ", "a", "", "café 日本", "sharp " * 400]
    rows = encode_here(pipeline_folder, prompts)
    assert "cut to 298 tokens" in capsys.readouterr().err
    for prompt, row in zip(prompts, rows):
        text, mask = encode_as_diffusers(pipeline, prompt)
        expected = text[mask]
        assert row.shape == expected.shape
        assert (row - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert len(rows[2]) == 1
    assert len(rows[4]) == 300


def test_leaving_out_the_padding_changes_nothing(pipeline, pipeline_folder):
    """The velocity from 300 masked positions is that from the fewest that hold the batch."""
    prompts = ["  Remove NOISE\nand jpeg   artifacts. ", "a"]
    sana = load_pretrained(Sana, pipeline_folder / "transformer")
    latents = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([300.0, 900.0])
    text, mask = pad_text(encode_here(pipeline_folder, prompts))
    padded = [encode_as_diffusers(pipeline, prompt) for prompt in prompts]
    long_text = torch.stack([text for text, _ in padded])
    long_mask = torch.stack([mask for _, mask in padded])
    with torch.no_grad():
        short = sana(latents, timestep, text, mask)
        long = sana(latents, timestep, long_text, long_mask)
    assert text.shape[1] < 60
    assert (short - long).abs().max() <= 2e-6 * short.abs().max()
