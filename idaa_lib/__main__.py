"""`python -m idaa_lib import model_epoch292.pth dataset=cifar10`: a published checkpoint as a run.

After the file stands what it does not say, as name=value: `python -m idaa_lib import --help`.
"""

from __future__ import annotations

import inspect
import sys

from idaa_lib.interop import import_run
from idaa_lib.train.__main__ import HELP, answer, read_words


def main(words: list[str]) -> int:
    if HELP & {*words}:
        print(__doc__, inspect.getdoc(import_run), sep="\n")
        return 0
    if len(words) < 2 or words[0] != "import":
        print(__doc__, file=sys.stderr)
        return 2
    return answer(lambda: import_run(words[1], **read_words(words[2:])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
