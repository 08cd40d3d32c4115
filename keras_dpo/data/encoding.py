"""Encodes text with stand-ins as token ids, with BOS and one end token."""

from keras_dpo.data.control_tokens import StandIns
from keras_dpo.data.tokenizers import TextTokenizer


def encode(
    tokenizer: TextTokenizer, texts: list[str], stand_ins: StandIns
) -> list[list[int]]:
    """Token ids of texts; stand-ins are encoded as the text they replace."""
    if not texts:
        return []
    escaped = {
        i: stand_ins.pattern.split(text)
        for i, text in enumerate(texts)
        if stand_ins.pattern.search(text)
    }
    plain = [text for i, text in enumerate(texts) if i not in escaped]
    encoded = iter(tokenizer.encode(plain))
    result = []
    for i in range(len(texts)):
        if i not in escaped:
            result.append(next(encoded))
            continue
        ids: list[int] = []
        for piece in filter(None, escaped[i]):
            name = stand_ins.name(piece)
            if name is None:
                ids += tokenizer.encode([piece])[0]
            else:
                ids += tokenizer.encode_plain(name)
        result.append(ids)
    return result


def with_bos(tokenizer: TextTokenizer, ids: list[int]) -> list[int]:
    """Prepend BOS if the tokenizer has one and it is missing."""
    bos = tokenizer.bos_id
    if bos is None or ids[:1] == [bos]:
        return ids
    return [bos, *ids]


def with_end(
    tokenizer: TextTokenizer, control_ids: set[int], ids: list[int]
) -> list[int]:
    """End with one end token, less whitespace that templates write after it."""
    ends = [i for i, t in enumerate(ids) if t in control_ids]
    if ends and not tokenizer.decode(ids[ends[-1] + 1 :]).strip():
        return ids[: ends[-1] + 1]
    if ids[-1:] == [tokenizer.eos_id]:
        return ids
    return [*ids, tokenizer.eos_id]
