"""A reward that a random model earns differently from one completion to the next."""


def digits(completions, **columns):
    """Share of digits in the completion."""
    texts = [completion[-1]["content"] for completion in completions]
    return [sum(character.isdigit() for character in text) / max(1, len(text)) for text in texts]
