"""What is known of stock models: their structure, and how to call one of their layers on some of its rows."""

from exeunt.models.layer_call import KeyValues, LayerCall, RowTaker, spread, stand_in
from exeunt.models.structure import FinalNorm, Structure, discover

__all__ = ["FinalNorm", "KeyValues", "LayerCall", "RowTaker", "Structure", "discover", "spread", "stand_in"]
