"""What is known of stock models: their structure, and how to call one of their layers on some of its rows."""

from exeunt.models.encoder_structure import EncoderStructure, discover_encoder, encoder_in
from exeunt.models.layer_call import KeyValues, LayerCall, RowTaker, stand_in
from exeunt.models.structure import FinalNorm, Structure, discover

__all__ = [
    "EncoderStructure",
    "FinalNorm",
    "KeyValues",
    "LayerCall",
    "RowTaker",
    "Structure",
    "discover",
    "discover_encoder",
    "encoder_in",
    "stand_in",
]
