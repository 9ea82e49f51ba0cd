"""Pretraining: corpora, tokenizers, token stores, span corruption."""
