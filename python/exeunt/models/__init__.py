"""What is known of stock models: their structure, and how to call one of their layers on some of its rows."""

from exeunt.models.key_values import KeyValueWeights, rotary_of
from exeunt.models.layer_call import KeyValues, LayerCall, RowTaker, spread, stand_in
from exeunt.models.structure import FinalNorm, Structure, discover

__all__ = [
    "FinalNorm",
    "KeyValueWeights",
    "KeyValues",
    "LayerCall",
    "RowTaker",
    "Structure",
    "discover",
    "rotary_of",
    "spread",
    "stand_in",
]
