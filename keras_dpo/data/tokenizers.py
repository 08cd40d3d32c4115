"""Hugging Face and Keras-Hub tokenizers behind one small interface."""

import re
from typing import Any

import keras

from keras_dpo.errors import UserError, UserTypeError

# Keras-Hub's Llama3Tokenizer requires these in every vocabulary; `save_policy`
# adds them, beyond the embedding, if they are not the model's own.
LLAMA3_DEFAULT_TOKENS = ("<|start_header_id|>", "<|end_header_id|>")


class TextTokenizer:
    """Tokenizer interface that the preprocessor uses.

    Attributes:
        name: Name in the start-up message.
        vocabulary_size: Number of ids.
        bos_id: Id that starts every sequence; None if the family has none.
        eos_id: Id that ends a completion.
        control_tokens: Text -> id of the tokens that only a template may
            write.
        chat_template: Jinja source, or None.
        tool_template: Template for conversations with tools, if different.
        special_texts: Names such as `bos_token` -> text, for templates.
    """

    name: str
    vocabulary_size: int
    bos_id: int | None
    eos_id: int
    control_tokens: dict[str, int]
    chat_template: str | None
    tool_template: str | None = None
    special_texts: dict[str, str]

    def token_ids(self) -> dict[str, int]:
        """Token -> id of the whole vocabulary."""
        raise NotImplementedError

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; control tokens are parsed, none is added."""
        raise NotImplementedError

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text, with control tokens treated as plain text."""
        raise NotImplementedError

    def decode(self, ids: list[int], skip_control: bool = True) -> str:
        """The text of ids."""
        raise NotImplementedError


class HuggingFaceTokenizer(TextTokenizer):
    """A `transformers` fast tokenizer.

    Args:
        tokenizer: A `PreTrainedTokenizerFast`, or a directory or repository
            name to load one from.
    """

    def __init__(self, tokenizer: Any) -> None:
        if isinstance(tokenizer, str):
            import transformers

            tokenizer = transformers.AutoTokenizer.from_pretrained(
                tokenizer, trust_remote_code=False
            )
        self.tokenizer = tokenizer
        self.name = "the model's own tokenizer.json (Hugging Face)"
        self.vocabulary_size = len(tokenizer)
        if tokenizer.eos_token_id is None:
            raise UserError(
                "The tokenizer has no EOS token, so no completion could end. "
                "Set tokenizer.eos_token."
            )
        self.eos_id = tokenizer.eos_token_id
        bare = tokenizer("x", add_special_tokens=False)["input_ids"]
        full = tokenizer("x", add_special_tokens=True)["input_ids"]
        added = full[: len(full) - len(bare)] if full != bare else []
        starts = added and added[0] == tokenizer.bos_token_id
        self.bos_id = tokenizer.bos_token_id if starts else None
        self.control_tokens = {
            token.content: index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        template = tokenizer.chat_template
        if isinstance(template, dict):
            # Choose among named templates as transformers does.
            self.tool_template = template.get("tool_use")
            template = template.get("default")
        self.chat_template = template if isinstance(template, str) else None
        self.special_texts = {
            key: str(value)
            for key, value in tokenizer.special_tokens_map.items()
            if isinstance(value, str)
        }

    def token_ids(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()

    def encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False
        )["input_ids"]

    def encode_plain(self, text: str) -> list[int]:
        return self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True
        )["input_ids"]

    def decode(self, ids: list[int], skip_control: bool = True) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_control)

    def get_config(self) -> dict[str, Any]:
        """Everything needed to recreate this tokenizer."""
        return {
            "json": self.tokenizer.backend_tokenizer.to_str(),
            "special_texts": self.special_texts,
            "chat_template": self.tokenizer.chat_template,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "HuggingFaceTokenizer":
        import tokenizers
        import transformers

        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_str(config["json"]),
            **config["special_texts"],
        )
        tokenizer.chat_template = config["chat_template"]
        return cls(tokenizer)


class KerasHubTokenizer(TextTokenizer):
    """A `keras_hub.tokenizers.Tokenizer`.

    Its start token begins every sequence, because `generate` always adds it
    (Keras-Hub 0.32).
    """

    def __init__(self, tokenizer: keras.layers.Layer) -> None:
        self.tokenizer = tokenizer
        kind = type(tokenizer).__name__
        self.name = f"Keras-Hub's {kind}"
        if hasattr(tokenizer, "merges"):
            self.name += (
                ", which may split text otherwise than the model's own "
                "tokenizer.json; keras_dpo.load_policy(directory) uses that"
            )
        self.vocabulary_size = 1 + max(
            index
            for name, index in self.token_ids().items()
            if name not in LLAMA3_DEFAULT_TOKENS
        )
        self.bos_id = getattr(tokenizer, "start_token_id", None)
        self.eos_id = tokenizer.end_token_id
        self.chat_template = None
        self.control_tokens = self._find_control_tokens()
        names = {"bos_token": "start_token", "eos_token": "end_token"}
        self.special_texts = {
            name: str(getattr(tokenizer, theirs))
            for name, theirs in names.items()
            if getattr(tokenizer, theirs, None) is not None
        }

    def _find_control_tokens(self) -> dict[str, int]:
        special = set(getattr(self.tokenizer, "special_tokens", []))
        vocabulary = self.tokenizer.get_vocabulary()
        marked = re.compile(r"<(?!0x)[^<> ]{2,}>|\[[A-Z_]+\]")
        names = [
            name
            for name in vocabulary
            if name in special or marked.fullmatch(name)
        ]
        # Only what the tokenizer turns into one id can be forged in text.
        found = {}
        for name, ids in zip(names, self.encode(names), strict=True):
            index = self.tokenizer.token_to_id(name)
            if index in ids or name in special:
                found[name] = index
        return found

    def token_ids(self) -> dict[str, int]:
        tokenizer = self.tokenizer
        names = tokenizer.get_vocabulary()
        return {name: tokenizer.token_to_id(name) for name in names}

    def encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(texts)
        if hasattr(encoded, "to_list"):
            return encoded.to_list()
        return [[int(token) for token in ids] for ids in encoded]

    def encode_plain(self, text: str) -> list[int]:
        # Neither half of a control token's text is a control token.
        halves = [half for half in (text[:1], text[1:]) if half]
        return [token for ids in self.encode(halves) for token in ids]

    def decode(self, ids: list[int], skip_control: bool = True) -> str:
        if skip_control:
            hidden = {*self.control_tokens.values(), self.bos_id, self.eos_id}
            ids = [token for token in ids if token not in hidden]
        text = self.tokenizer.detokenize([ids])[0] if ids else ""
        return text.decode() if isinstance(text, bytes) else str(text)


def as_text_tokenizer(tokenizer: Any) -> TextTokenizer:
    """Wrap a tokenizer of either library.

    Raises:
        TypeError: The tokenizer is of neither.
    """
    if isinstance(tokenizer, TextTokenizer):
        return tokenizer
    if isinstance(tokenizer, str) or hasattr(tokenizer, "backend_tokenizer"):
        return HuggingFaceTokenizer(tokenizer)
    if hasattr(tokenizer, "token_to_id") and hasattr(tokenizer, "detokenize"):
        return KerasHubTokenizer(tokenizer)
    raise UserTypeError(
        "`tokenizer` must be a Hugging Face fast tokenizer, a Keras-Hub "
        f"tokenizer or a directory. Received: {type(tokenizer).__name__}."
    )
