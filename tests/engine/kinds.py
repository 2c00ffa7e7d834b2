"""Small tokenizers of every kind, trained here on a few lines."""

from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

LINES = [
    "She isn't here , is n't she ? I 'm sure they 've gone . We 're late !",
    "He said ' no ' and n ' t is not a word ; it 's his , v r n ' v ' r .",
    "Grüße, 世界! €5 – naïve 🏁 Once upon a time there was",
    "the other one ran on in a van. I'm not sure it's his.",
] * 3
END = "<|end|>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet)
    )
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2 has it."""
    words = ["▁", *"abcdefghinorstuvwy'.,!?", "▁t", "▁th", "▁the", "er", "▁w", "as", "▁was"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("e", "r"), ("▁", "w"), ("a", "s")]
    merges += [("▁w", "as")]
    vocabulary = {name: number for number, name in enumerate(["<unk>", *BYTES, *words])}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = _llama_decoder()
    return tokenizer


def unigram() -> Tokenizer:
    """As T5 and XGLM have it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        LINES, trainers.UnigramTrainer(vocab_size=90, unk_token="<unk>", special_tokens=["<unk>"])
    )
    return tokenizer


def unigram_bytes() -> Tokenizer:
    pieces = [("<unk>", 0.0), *((name, -9.0) for name in BYTES)]
    pieces += [(letter, -4.0) for letter in ["▁", *"abcdefghinorstuvw'.,!?"]]
    pieces += [("▁the", -3.0), ("▁n", -3.0), ("'t", -3.0), ("er", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = _llama_decoder()
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=110, special_tokens=["[UNK]"])
    )
    return tokenizer


def word_piece_cleaned() -> Tokenizer:
    """The decoder itself cleans up, each token."""
    tokenizer = word_piece()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return tokenizer


def word_level() -> Tokenizer:
    """Words with spaces between them: there is no decoder."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(LINES, trainers.WordLevelTrainer(special_tokens=["[UNK]"]))
    return tokenizer


def end_of_word() -> Tokenizer:
    """As GPT-1 has it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.train_from_iterator(
        LINES,
        trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], end_of_word_suffix="</w>"),
    )
    return tokenizer


def _llama_decoder() -> decoders.Sequence:
    return decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )


KINDS = {
    make.__name__: make
    for make in (
        byte_level,
        byte_fallback,
        unigram,
        unigram_bytes,
        word_piece,
        word_piece_cleaned,
        word_level,
        end_of_word,
    )
}


@cache
def of_kind(kind: str, clean_up: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer with an end token and a word that was added; it cleans up even if it is BPE."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](),
        eos_token=END,
        clean_up_tokenization_spaces=clean_up,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=clean_up,
    )
    tokenizer.add_tokens(AddedToken("added word", normalized=False))
    return tokenizer
