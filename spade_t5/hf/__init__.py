"""Meeting points with Hugging Face: auto classes, tokenizers, loading and export, conversion, generation of text."""

from spade_t5.hf.generation import generate_text

__all__ = ["generate_text"]
