"""Where images come from, and how they are kept."""

from idaa_lib.data.cached import ImageSet, data_root, load
from idaa_lib.data.decoding import decode
from idaa_lib.data.sources import NAMES
