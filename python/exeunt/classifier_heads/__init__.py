"""Exit heads of classifiers and regressors: logits from the states of a text after some layer.

A head reads what it likes of a `View`: the states of all tokens, the mask, and a memory that goes through the layers
with the row, so that heads can build on the exits before them.

=================== ==================================================================================
`LinearHead`        linear on the pooled state (SDN, BERxiT)
`PoolerHead`        pooler and linear (DeeBERT); one pooler for all exits (PABEE); 32 wide (CATs)
`AttentionHead`     a narrow attention over the tokens (FastBERT's student)
`PastMixHead`       a learned mix of the states so far, and the logits of earlier exits (RightTool)
`PastFutureHead`    poolers of the exits so far, predicted states of the layers to come (GPF)
`MetaProbe`         whether the exit will agree with full depth, from what it and earlier exits say (CATs)
=================== ==================================================================================
"""

from exeunt.classifier_heads.base import ClassifierHead, Judged, View, pooled
from exeunt.classifier_heads.container import ClassifierHeads
from exeunt.classifier_heads.kinds import AttentionHead, LinearHead, PoolerHead
from exeunt.classifier_heads.meta import META, MetaProbe
from exeunt.classifier_heads.past import GlobalMaps, PastFutureHead, PastMixHead

__all__ = [
    "META",
    "AttentionHead",
    "ClassifierHead",
    "ClassifierHeads",
    "GlobalMaps",
    "Judged",
    "LinearHead",
    "MetaProbe",
    "PastFutureHead",
    "PastMixHead",
    "PoolerHead",
    "View",
    "pooled",
]
