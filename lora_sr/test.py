"""`python -m lora_sr.test -opt FILE`: run a network on test sets as BasicSR does, in the current folder.

The arguments are those of BasicSR's `test.py`.
"""

import sys

from lora_sr.cli.pipelines import main

if __name__ == '__main__':
    sys.exit(main(is_train=False))
