"""SPADE-T5: encoder-decoder pretraining and fine-tuning for long inputs.

Importing the package registers its models with the auto classes of transformers.
"""

from spade_t5.classification import SpadeT5ForSequenceClassification
from spade_t5.configuration import SpadeT5Config
from spade_t5.hf.auto import register_auto_classes
from spade_t5.modeling import SpadeT5EncoderModel, SpadeT5ForConditionalGeneration, SpadeT5Model

__all__ = [
    "SpadeT5Config",
    "SpadeT5EncoderModel",
    "SpadeT5ForConditionalGeneration",
    "SpadeT5ForSequenceClassification",
    "SpadeT5Model",
]

register_auto_classes()
