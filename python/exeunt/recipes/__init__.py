"""Recipes: one function per published system, a composition of the four concepts and nothing else.

Where a published code differs from its paper, or is wrong, a recipe follows the paper; ``as_code=True``, where it is
offered, follows the code. ``docs/systems.md`` is generated from the notes of these functions.
"""

from exeunt.recipes.classifiers import (
    berxit,
    cascadebert,
    cats,
    deebert,
    fastbert,
    gpf,
    right_tool,
    shallow_deep,
)
from exeunt.recipes.generators import calm, free, skipdecode, specee
from exeunt.recipes.recipe import Recipe
from exeunt.recipes.successive import act, beem, elbert, ensemble, leebert, pabee
from exeunt.recipes.taggers import sentee, tokee

__all__ = [
    "Recipe",
    "act",
    "beem",
    "berxit",
    "calm",
    "cascadebert",
    "cats",
    "deebert",
    "elbert",
    "ensemble",
    "fastbert",
    "free",
    "gpf",
    "leebert",
    "pabee",
    "right_tool",
    "sentee",
    "shallow_deep",
    "skipdecode",
    "specee",
    "tokee",
]
