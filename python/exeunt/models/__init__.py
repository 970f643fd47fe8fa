"""What is known of stock models: their structure, and how to call one of their layers on some of its rows."""

from exeunt.models import attention
from exeunt.models.attention import register_attention
from exeunt.models.discovery import discover, near, trial_forward
from exeunt.models.encoder_structure import EncoderStructure, discover_encoder, encoder_in
from exeunt.models.families import ATTENTION, CACHE_KEYWORD
from exeunt.models.key_values import KeyValueWeights, rotary_of
from exeunt.models.layer_call import (
    KeyValues,
    LayerCall,
    LayerFunction,
    RowTaker,
    hide_keys,
    own_cache,
    spread,
    stand_in,
)
from exeunt.models.structure import FinalNorm, HeadForm, Structure, evaluating

__all__ = [
    "ATTENTION",
    "CACHE_KEYWORD",
    "EncoderStructure",
    "FinalNorm",
    "HeadForm",
    "KeyValueWeights",
    "KeyValues",
    "LayerCall",
    "LayerFunction",
    "RowTaker",
    "Structure",
    "attention",
    "discover",
    "discover_encoder",
    "encoder_in",
    "evaluating",
    "hide_keys",
    "near",
    "own_cache",
    "register_attention",
    "rotary_of",
    "spread",
    "stand_in",
    "trial_forward",
]
