"""`python -m pbs_attn`, the same as the command `pbs-attn`."""

import sys

from _pbs_attn_cli import main

sys.exit(main())
