"""The tokenizer against the tokenizers library, Gemma-2 against transformers, prompt encoding against diffusers."""
import inspect
import json
import random

import pytest
import torch
from diffusers import SanaPipeline
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import Gemma2Config, Gemma2Model

from degrade import UserError
from model import INSTRUCTION, Gemma2, GemmaTokenizer, Sana, encode_prompts, pad_text
from pipeline import CORPUS, GEMMA, randomize, vocabulary

ADDED = ["<start_of_turn>", "<unused0>", "\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁▁", "\t", "<b>", "</b>", "<bos>", "<pad>"]


def peer_tokenizer(split):
    """As a Gemma tokenizer.json, split or not at the spaces that the normalizer leaves none of."""
    vocab, merges = vocabulary()
    peer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    peer.normalizer = normalizers.Replace(" ", "▁")
    if split:
        peer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    peer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    peer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    peer.add_tokens([AddedToken(content, normalized=False) for content in ADDED])
    return peer


def fuzzed(count, seed=0):
    """Strings of words, spaces, newlines, added tokens inside words, control bytes, emoji, and any code point."""
    rng = random.Random(seed)
    words = " ".join(CORPUS).split()
    pieces = [lambda: rng.choice(words), lambda: " " * rng.randint(1, 9), lambda: "\n" * rng.randint(1, 5), lambda: rng.choice(ADDED),
              lambda: rng.choice(ADDED)[:-1], lambda: chr(rng.randint(0, 31)), lambda: chr(rng.choice([rng.randint(32, 0xD7FF), rng.randint(0xE000, 0x10FFFF)])),
              lambda: rng.choice("😀👨‍👩‍👧🏽é한▁"), lambda: "".join(rng.choice("abcdetnorsi ") for _ in range(rng.randint(1, 30)))]
    return ["".join(rng.choice(pieces)() for _ in range(rng.randint(0, 12))) for _ in range(count)]


@pytest.mark.parametrize("split, merges_as_strings", [(True, False), (False, True)])
def test_tokenizer_gives_the_ids_of_the_tokenizers_library(tmp_path, split, merges_as_strings):
    peer = peer_tokenizer(split)
    spec = json.loads(peer.to_str())
    if merges_as_strings:
        spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    ours = GemmaTokenizer(tmp_path)
    texts = fuzzed(5000, seed=int(split)) + ["", " ", "\ud7ff", INSTRUCTION * 3]
    for text in texts:
        assert ours.encode(text) == peer.encode(text).ids, repr(text)
    used = {i for text in texts for i in ours.encode(text)}
    assert len(used) > 300  # of 571: most merges are steps to longer ones


def test_tokenizers_of_another_kind_are_refused(tmp_path):
    spec = json.loads(peer_tokenizer(True).to_str())
    changes = [(spec | {"normalizer": None}, "normalizer"), (spec | {"pre_tokenizer": {"type": "ByteLevel"}}, "pre_tokenizer"),
               (spec | {"model": spec["model"] | {"vocab": {"a": 0}}}, "tokenizer"), (spec | {"model": spec["model"] | {"ignore_merges": True}}, "ignore_merges"),
               (spec | {"added_tokens": spec["added_tokens"] + [{"id": 9, "content": "x", "lstrip": True}]}, "'x'"), ({}, "model")]
    for changed, word in changes:
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=word):
            GemmaTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json"):
        GemmaTokenizer(tmp_path)


@pytest.mark.parametrize("change", [{}, {"num_attention_heads": 4, "num_key_value_heads": 4}, {"hidden_size": 52, "head_dim": 8},
                                    {"attn_logit_softcapping": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}])
def test_gemma_computes_what_transformers_computes(tmp_path, change):
    theirs = randomize(Gemma2Model(Gemma2Config(vocab_size=90, attn_implementation="eager", **GEMMA | change)), scale=0.4)
    theirs.save_pretrained(tmp_path)
    ours = Gemma2.from_pretrained(tmp_path)
    ids = torch.randint(0, 90, (3, 21), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(21) < torch.tensor([21, 13, 1])[:, None]
    with torch.no_grad():
        expected, got = theirs(ids, attention_mask=mask.long()).last_hidden_state[mask], ours(ids, mask)[mask]
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
        # in bf16 every rounding falls on the same place: bit for bit
        theirs = Gemma2Model.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
        half = Gemma2.from_pretrained(tmp_path, torch.bfloat16)(ids, mask)[mask]
        assert half.dtype == torch.bfloat16 and torch.equal(half, theirs(ids, attention_mask=mask.long()).last_hidden_state[mask])


def test_full_size_gemma_has_the_published_number_of_tensors_and_parameters():
    with torch.device("meta"):
        full = Gemma2({})
    assert len(full.state_dict()) == 288 and sum(p.numel() for p in full.parameters()) == 2_614_341_888


def test_gemma_refuses_what_it_does_not_compute(tmp_path):
    for change, word in ({"hidden_activation": "relu"}, "hidden_activation"), ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"):
        with pytest.raises(UserError, match=word):
            Gemma2(GEMMA | {"vocab_size": 9} | change)
    with pytest.raises(ValueError, match="5 tokens"):
        Gemma2(GEMMA | {"vocab_size": 9, "sliding_window": 4})(torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 5))


def test_instruction_is_the_pipelines():
    default = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    assert INSTRUCTION == "\n".join(default)


def test_prompts_are_encoded_as_the_pipeline_does_and_padding_changes_nothing(pipeline, pipeline_folder, capsys):
    prompts = ["  Remove NOISE\nand jpeg   artifacts. ", "a", "", "café 日本", "sharp " * 400]
    tokenizer, gemma = GemmaTokenizer(pipeline_folder / "tokenizer"), Gemma2.from_pretrained(pipeline_folder / "text_encoder")
    rows = encode_prompts(tokenizer, gemma, prompts, batch_size=3)
    assert "cut to 298 tokens" in capsys.readouterr().err
    instruction = INSTRUCTION.split("\n")
    padded = []
    for prompt, row in zip(prompts, rows):
        if prompt:
            text, mask, *_ = pipeline.encode_prompt([prompt], False, complex_human_instruction=instruction)
        else:
            _, _, text, mask = pipeline.encode_prompt(["x"], True, negative_prompt="", complex_human_instruction=instruction)
        assert text.shape[1] == mask.shape[1] == 300
        padded.append((text[0], mask[0]))
        expected = text[0][mask[0].bool()]
        assert row.shape == expected.shape and (row - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert [len(row) for row in rows][2] == 1 and len(rows[4]) == 300
    # dropping the padding is exact: the same velocity from 300 masked positions and from the shortest that hold the batch
    sana = Sana.from_pretrained(pipeline_folder / "transformer")
    latents, timestep = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([300.0, 900.0])
    text, mask = pad_text([rows[0], rows[1]])
    long_text, long_mask = (torch.stack([padded[i][k] for i in (0, 1)]) for k in (0, 1))
    with torch.no_grad():
        a, b = sana(latents, timestep, text, mask), sana(latents, timestep, long_text, long_mask.bool())
    assert text.shape[1] < 60 and (a - b).abs().max() <= 2e-6 * a.abs().max()
