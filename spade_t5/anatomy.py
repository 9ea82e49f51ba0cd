"""Which part of a model a parameter belongs to, by its name."""

_PARTS = {
    "embed_tokens": "embedding",
    "positions": "embedding",
    "relative_attention_bias": "position_bias",
    "self_attention": "attention",
    "cross_attention": "cross_attention",
    "feed_forward": "feed_forward",
    "global_mixer": "ssm",
    "fusion": "fusion",
    "lm_head": "head",
    "classification_head": "head",
}
_OF_BOTH_STACKS = ("position_bias", "attention", "feed_forward")


def part_of(name: str) -> str:
    """Part of a SPADE-T5 model that a parameter belongs to; what lies elsewhere, such as an adapter's matrices, goes by its first word.

    >>> [part_of(f"encoder.layers.0.{name}.weight") for name in ("self_attention.q", "feed_forward_norm", "fusion.out")]
    ['encoder_attention', 'norms', 'fusion']
    >>> part_of("decoder.layers.3.cross_attention.k.weight"), part_of("encoder.layers.0.global_mixer.A")
    ('cross_attention', 'ssm')
    """
    words = name.split(".")
    if any(word.endswith("norm") for word in words):
        return "norms"
    for word in reversed(words):
        part = _PARTS.get(word)
        if part is not None:
            stack = next((word for word in words if word in ("encoder", "decoder")), None)
            return f"{stack}_{part}" if stack and part in _OF_BOTH_STACKS else part
    return words[0]
