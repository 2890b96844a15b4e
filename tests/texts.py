"""A text and tokenizers for tests of calibration and evaluation."""


class Letters:
    """A tokenizer: a token a character."""

    def __call__(self, text, **_):
        return type("Encoding", (), {"input_ids": [ord(one) % 126 + 2 for one in text]})()


TEXT = "".join(f"Line {n} says that {n * 7919 % 1000} comes before {n * 104729 % 997}. " for n in range(200))


class Words(Letters):
    """The same, and back."""

    def decode(self, ids):
        return "".join(chr(max(one - 2, 0)) for one in ids)


SETTINGS = {"text": TEXT, "lengths": (700,), "depths": 2, "seeds": 1, "text_tokens": 12, "batch": 2}
