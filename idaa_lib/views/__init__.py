"""Batched random views that return their parameters."""

from idaa_lib.views.operations import denormalise, normalise, send
from idaa_lib.views.recipes import (
    RECIPES,
    Params,
    Recipe,
    View,
    compile_view,
    keyed_generator,
    recipe,
)
