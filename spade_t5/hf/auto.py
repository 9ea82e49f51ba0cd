"""Registration with transformers, so that `AutoModel...from_pretrained` knows the model type "spade_t5"."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
)

from spade_t5.classification import SpadeT5ForSequenceClassification
from spade_t5.configuration import SpadeT5Config
from spade_t5.modeling import SpadeT5EncoderModel, SpadeT5ForConditionalGeneration, SpadeT5Model


def register_auto_classes() -> None:
    """Registers configuration and models; calling it again changes nothing."""
    AutoConfig.register(SpadeT5Config.model_type, SpadeT5Config, exist_ok=True)
    for auto_class, model_class in (
        (AutoModel, SpadeT5Model),
        (AutoModelForSeq2SeqLM, SpadeT5ForConditionalGeneration),
        (AutoModelForSequenceClassification, SpadeT5ForSequenceClassification),
        (AutoModelForTextEncoding, SpadeT5EncoderModel),
    ):
        auto_class.register(SpadeT5Config, model_class, exist_ok=True)
