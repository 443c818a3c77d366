"""Tokenizers as strangers bring them: with gaps, without an end, with words that they do not know."""

import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps.\n" * 8


def byte_level(size=290, **backend):
    """A byte-level BPE as GPT-2's, whose end of text is id 0."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([TEXT], trainer)
    for name, value in backend.items():
        setattr(bpe, name, value)
    return bpe


def wrap(backend, **names):
    """What AutoTokenizer would load."""
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"bos_token": END, "eos_token": END, **names})


def renumbered(renumber):
    """The same, but every id is another one."""
    state = json.loads(byte_level().to_str())
    state["model"]["vocab"] = {token: renumber(number) for token, number in state["model"]["vocab"].items()}
    for token in state["added_tokens"]:
        token["id"] = renumber(token["id"])
    return wrap(Tokenizer.from_str(json.dumps(state)))


def pad_on_the_last_row():
    """290 tokens, and a pad token with the id 319, as in a vocabulary rounded up to a multiple of 64."""
    state = json.loads(byte_level().to_str())
    state["model"]["vocab"]["<pad>"] = 319
    state["added_tokens"].append({**state["added_tokens"][0], "id": 319, "content": "<pad>"})
    return wrap(Tokenizer.from_str(json.dumps(state)), pad_token="<pad>")


def with_added(token, is_special):
    """One id more, which was added afterwards."""
    tokenizer = wrap(byte_level())
    tokenizer.add_tokens([token], special_tokens=is_special)
    return tokenizer


def with_pad():
    """transformers#11102: one id more, for padding."""
    tokenizer = wrap(byte_level())
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def words(known, unk="[UNK]", split=pre_tokenizers.Whitespace, **backend):
    """A tokenizer of whole words."""
    names = list(dict.fromkeys([*([unk] if unk else []), END, *known]))
    model = models.WordLevel({word: number for number, word in enumerate(names)}, unk_token=unk)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split()
    for name, value in backend.items():
        setattr(tokenizer, name, value)
    return wrap(tokenizer, **({"unk_token": unk} if unk else {}))


def characters(known=TEXT):
    """nanoGPT's: one id for each character, and no other."""
    vocabulary = {character: number for number, character in enumerate(sorted(set(known)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def pieces(unk=True, byte_fallback=False):
    """A unigram model of letters, as SentencePiece makes them; `</s>` is no special token of its own accord."""
    bytes_ = [(f"<0x{byte:02X}>", -9.0) for byte in range(256)] if byte_fallback else []
    letters = [(letter, -3.0) for letter in "▁" + "".join(sorted(set(TEXT) - {" ", "\n"}))]
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), *bytes_, *letters]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0 if unk else None, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def dropping():
    """A BPE without a token for what it does not know: it leaves that out, and says nothing."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(["the dog"] * 3, trainers.BpeTrainer(special_tokens=[END], show_progress=False))
    return wrap(bpe)


def lowering():
    """Byte-level, and every letter is made a small one."""
    return wrap(byte_level(normalizer=normalizers.Lowercase()))
