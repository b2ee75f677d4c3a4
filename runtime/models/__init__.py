"""Decoders that leave attention to the cache: Hugging Face checkpoints or random weights."""

from runtime.models.checkpoint import load_decoder
from runtime.models.config import DecoderConfig
from runtime.models.decoder import Decoder
from runtime.models.random_weights import random_decoder
from runtime.models.stored import as_planned

__all__ = ["Decoder", "DecoderConfig", "as_planned", "load_decoder", "random_decoder"]
