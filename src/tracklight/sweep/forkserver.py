"""What the process from which all trials are forked does first, as this file is imported.

It ignores Ctrl-C in the terminal, which the sweep's process handles, and reads the digest of the
code, so that all trials have that of the sweep's start, whatever is edited meanwhile.
"""

import signal

from tracklight.tracking.provenance import own_code

signal.signal(signal.SIGINT, signal.SIG_IGN)
own_code()
