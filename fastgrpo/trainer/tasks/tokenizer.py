"""Word-level tokenizers for small closed vocabularies, built in code: no download, no training, no file."""

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def word_tokenizer(words: Sequence[str], pattern: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are exactly `words`; `pattern` cuts text into words and decoding glues them again."""
    vocabulary = {word: i for i, word in enumerate((PAD, EOS, UNKNOWN, *words))}
    if len(vocabulary) != len(words) + 3:
        raise ValueError("words must be distinct and differ from the special tokens")
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
